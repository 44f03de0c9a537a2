"""Every installed preset is a file without faults that says what it is, and runs as it says."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import distill
from distill.cli import main
from distill.config.experiment import Experiment
from distill.registry import Registry

RECIPES = [
    f"{data}-{role}"
    for data in ("cifar10", "cifar100", "imagenet")
    for role in ("kd", "student", "teacher")
]
FEATURES = [
    f"{data}-{method}"
    for data, methods in {
        "cifar100": "ab at born-again camkd cckd crd crd-kd ctkd dist dkd dot fitnet fsp ft ickd "
        "kdsvd ls-kd mlkd mutual nkd nst ofd pkt review rkd skd spkd sskd tf-kd tf-kd-virtual uskd "
        "vid wsld",
        "imagenet": "at cckd crd ctkd dist dist-plus dkd ft ghnd hnd ickd ickd-scratch l2 ls-kd "
        "mgd nkd ofd pad review rkd skd srd srrl sskd tf-kd uskd vitkd wsld",
        "voc": "cwd ktaad",
    }.items()
    for method in methods.split()
]
NAMES = [*RECIPES, *FEATURES]
OF_VOC = [name for name in FEATURES if name.startswith("voc-")]
SSKD = {"cifar100-sskd", "imagenet-sskd"}
STAGES = {
    **dict.fromkeys(
        ("cifar100-ab", "cifar100-fsp", "cifar100-ft", "cifar100-tf-kd", "imagenet-ft"), 2
    ),
    **dict.fromkeys(("imagenet-pad", "voc-ktaad", *SSKD), 2),
    "cifar100-born-again": 4,
}
"""How many they have, where it is not one."""
NO_CHECKPOINT = {
    *("cifar100-born-again", "cifar100-mutual", "cifar100-tf-kd", "cifar100-tf-kd-virtual"),
    "cifar100-uskd",
}
OTHER_MODELS = {
    *("cifar100-camkd", "imagenet-ghnd", "imagenet-hnd", "imagenet-ickd", "imagenet-ofd"),
    *("imagenet-tf-kd", "imagenet-uskd", "imagenet-vitkd"),
    *NO_CHECKPOINT,
    *OF_VOC,
}
OTHER_DATA = {*SSKD, *OF_VOC, "cifar100-mlkd", "cifar100-skd"}
OF_CIFAR100 = [name for name in FEATURES if name.startswith("cifar100-")]
NO_WEIGHTS = (("weights", "null"), ("weights_backbone", "null"), ("pretrained", "false"))
CHECKPOINT = re.compile(r"runs/([^/]+)/(?:seed-\d+/)?([^/]+)/last\.safetensors")


@pytest.fixture(scope="module")
def registry() -> Registry:
    return distill.plugins()


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_presets_of_the_packages_are_all_here(registry: Registry) -> None:
    assert set(NAMES) <= set(registry.names("presets"))
    listed = _distill("ls").splitlines()
    assert [line.split()[0] for line in listed] == registry.names("presets")
    assert all(re.search(r"\S  +[^#]\S.*\.  +distill-[a-z-]+ \d", line) for line in listed)


@pytest.mark.parametrize("name", NAMES)
def test_a_copied_preset_has_no_faults(name: str) -> None:
    _skip_without_timm(name)
    assert _distill("cp", name) == f"wrote {name}.yaml\n"
    stages = STAGES.get(name, 1)
    printed = _distill("check", f"{name}.yaml")
    assert printed.startswith(f"{name}.yaml: no faults ({stages} stage")


@pytest.mark.parametrize("name", FEATURES)
def test_two_samples_run_through_every_stage(name: str, registry: Registry) -> None:
    """Of noise, with networks that have no weights to download: wiring and shapes hold."""
    _skip_without_timm(name)
    size = 32 if name in OF_CIFAR100 else 224 if name == "imagenet-vitkd" else 64
    experiment = _load(registry, name).resolved
    given = [
        f"datasets.{dataset}.{key}={value}"
        for dataset in experiment["datasets"]
        for key, value in _noise(size).items()
    ]
    if name in OF_VOC:
        _write_voc(Path("data"))
        sizes = ("train.joint_transforms[2]", "val.joint_transforms[0]", "val.joint_transforms[1]")
        given = [f"datasets.{place}.params.size={size}" for place in sizes]
    for model, settings in experiment["models"].items():
        if "checkpoint" in settings:
            given.append(f"models.{model}={{type: {settings['type']}}}")
        given += [
            f"models.{model}.params.{key}={value}"
            for key, value in NO_WEIGHTS
            if key in settings.get("params", {})
        ]
    if name == "imagenet-cckd":
        given.append("stages.cckd.data.batch_sampler=null")  # noise has no classes to share
    if name == "cifar100-camkd":
        given.append("stages.camkd.data.drop_last=false")  # two samples are no whole batch
    _distill("cp", name)
    _distill("check", "--data", f"{name}.yaml", *(part for g in given for part in ("-s", g)))


@pytest.mark.parametrize("name", NAMES)
def test_the_head_of_a_preset_says_what_holds(name: str, registry: Registry) -> None:
    text = _text(registry, name)
    first, *more = [line for line in text.splitlines() if line.startswith("#")]
    assert re.fullmatch(r"# \S.{10,90}\.", first)
    head = " ".join(line.removeprefix("#").strip() for line in more)
    for label in ("Source: ", "Expected: ", "Data: ", "Needs: pip install ", "Run: "):
        assert head.count(label) == 1, label
    assert f"Run: distill cp {name} && distill run {name}.yaml" in head
    named = re.findall(r"distill (cp|run) ([\w-]+)", head)
    assert named
    assert {preset for _, preset in named} <= set(registry.names("presets"))
    assert set(re.findall(r"\bdistill ([a-z]+) ", head)) <= set(main.commands)
    needed = set(head.split("Needs: pip install ")[1].split(" First")[0].split(" Run:")[0].split())
    brought = registry.find("presets", name).provider.split()[0]
    assert _packages(_load(registry, name), registry) | {"distill-core", brought} == needed


@pytest.mark.parametrize("name", NAMES)
def test_what_the_head_offers_to_override_can_be(name: str, registry: Registry) -> None:
    _skip_without_timm(name)
    head = _text(registry, name).split("\nname: ")[0].replace("\n# ", " ")
    given = re.findall(r'-s ("[^"]+"|[^\s,;:)]+)', head)
    assert any(value.endswith("keep=best") for value in given)
    _distill("cp", name)
    _distill("check", f"{name}.yaml", *(part for v in given for part in ("-s", v.strip('"'))))


def test_a_preset_s_run_is_called_after_it(registry: Registry) -> None:
    assert [_load(registry, name).name for name in NAMES] == NAMES


@pytest.mark.parametrize(
    "name", ["cifar10-kd", *(n for n in OF_CIFAR100 if n not in NO_CHECKPOINT)]
)
def test_a_checkpoint_is_what_another_preset_leaves_behind(name: str, registry: Registry) -> None:
    found = CHECKPOINT.findall(_text(registry, name))
    assert found
    for run, stage in found:
        trainer = _load(registry, run)
        trained = {s.name: trainer.models[s.student.model].component for s in trainer.stages}
        models = _load(registry, name).models
        wanted = next(model.component for model in models.values() if model.checkpoint)
        assert trained[stage].type == wanted.type
        params = {k: v for k, v in wanted.params.items() if k != "weights"}
        assert trained[stage].params == params


@pytest.mark.parametrize("data", ["cifar10", "cifar100", "imagenet"])
def test_a_student_alone_compares_with_the_distilled_one(data: str, registry: Registry) -> None:
    alone, distilled = (_load(registry, f"{data}-{role}").resolved for role in ("student", "kd"))
    assert alone["datasets"] == distilled["datasets"]
    assert alone["models"]["student"] == distilled["models"]["student"]
    assert alone["seeds"] == distilled["seeds"]
    of_its_own = {"name", "teachers", "criterion"}
    first, second = (
        {k: v for k, v in e["stages"][0].items() if k not in of_its_own} for e in (alone, distilled)
    )
    assert first == second
    assert alone["test"] == distilled["test"]


@pytest.mark.parametrize(
    "name", [name for name in FEATURES if name not in OTHER_MODELS | OTHER_DATA]
)
def test_a_method_on_features_compares_with_kd(name: str, registry: Registry) -> None:
    own, kd = (_load(registry, n).resolved for n in (name, name.split("-")[0] + "-kd"))
    assert all(own[key] == kd[key] for key in ("datasets", "models", "seeds", "test"))


def test_teacher_and_distillation_run_one_after_the_other_on_cifar10(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On 40 images of noise in torchvision's format, whose checksums cannot be the real ones."""
    _write_cifar10(tmp_path / "data" / "cifar-10-batches-py")
    monkeypatch.setattr(
        "torchvision.datasets.cifar.check_integrity", lambda path, _: Path(path).is_file()
    )
    for name, stage in (("cifar10-teacher", "teacher"), ("cifar10-kd", "kd")):
        _distill("cp", name)
        short = [f"stages.{stage}.epochs=1", f"stages.{stage}.data.batch_size=20"]
        short += [f"stages.{stage}.data.workers=0", "device=cpu"]
        short += ["stages.kd.teacher.min_accuracy=0"] if stage == "kd" else []
        printed = _distill("run", f"{name}.yaml", *(p for s in short for p in ("-s", s)))
        assert f"| {stage} " in printed
        assert (tmp_path / "runs" / name / stage / "last.safetensors").is_file()
    printed = _distill("eval", "runs/cifar10-kd", "--model", "teacher")
    assert "runs/cifar10-teacher/teacher/last.safetensors" in printed


def _write_cifar10(folder: Path) -> None:
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for batch in ("test_batch", *(f"data_batch_{number}" for number in range(1, 6))):
        pixels = torch.randint(256, (8, 3072), generator=generator, dtype=torch.uint8).numpy()
        content = {"data": pixels, "labels": [number % 10 for number in range(8)]}
        (folder / batch).write_bytes(pickle.dumps(content))
    names = {"label_names": [f"class {number}" for number in range(10)]}
    (folder / "batches.meta").write_bytes(pickle.dumps(names))


def _skip_without_timm(name: str) -> None:
    if name == "imagenet-vitkd":
        pytest.importorskip("timm", reason="timm is not installed: pip install timm")


def _noise(size: int) -> dict[str, str]:
    """Return keys of a data set of two coloured squares, as values for `-s`."""
    return {
        "type": "FakeData",
        "params": f"{{size: 2, image_size: [3, {size}, {size}], num_classes: 10}}",
        "transforms": "[ToImage, {type: ToDtype, params: {dtype: float32, scale: true}}]",
    }


def _write_voc(root: Path) -> None:
    """Write images of noise and their masks in VOC's folders."""
    folder = root / "VOCdevkit" / "VOC2012"
    places = ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation")
    images, masks, lists = (folder / place for place in places)
    for place in (images, masks, lists):
        place.mkdir(parents=True)
    names = [f"{number:02}" for number in range(8)]  # a batch
    for name in names:
        noise = torch.randint(256, (40, 50, 3), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(images / f"{name}.jpg")
        Image.fromarray((noise[..., 0] % 21).numpy()).save(masks / f"{name}.png")
    for split in ("train", "val"):
        (lists / f"{split}.txt").write_text("\n".join(names), "utf-8")


def _text(registry: Registry, name: str) -> str:
    text: str = registry.find("presets", name).factory.read_text("utf-8")
    return text


def _load(registry: Registry, name: str) -> Experiment:
    return distill.load(registry.find("presets", name).factory)


def _packages(experiment: Experiment, registry: Registry) -> set[str]:
    """Return what brings the data sets, models and losses that an experiment names."""
    used = [("datasets", dataset.component) for dataset in experiment.datasets.values()]
    used += [("models", model.component) for model in experiment.models.values()]
    for stage in experiment.stages:
        used += [("losses", term.component) for term in stage.criterion.values()]
    providers = {registry.find(kind, component.type).provider for kind, component in used}
    packages = {provider.split()[0] for provider in providers}
    if ("models", "timm") in {(kind, component.type) for kind, component in used}:
        packages = {
            p.replace("distill-datasets-vision", "distill-datasets-vision[timm]") for p in packages
        }
    return packages


def _distill(*arguments: str) -> str:
    done = CliRunner().invoke(main, list(arguments))
    assert done.exit_code == 0, done.output
    return done.stdout
