"""Teachers in a faster form; two processes run this file too."""

import copy
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from distill import Batch, ConfigError, Observer, check, run
from distill.model.criterion import Criterion
from distill.model.distiller import Distiller
from distill.model.fast import FastTeacher, cast, fold, foldable, relative_error
from distill.model.wiring import Address, Call
from distill.testing import run_processes, toy_experiment, toy_registry
from distill.training.build import Builder
from distill.training.fast_teachers import compiled_teachers, fast_notes
from distill.training.prepared import prepare
from distill.training.seed_run import SeedRun

CPU = torch.device("cpu")
IMAGES = {
    "train": {"type": "ToyData", "params": {"size": 20, "shape": [3, 6, 6]}},
    "val": {"type": "ToyData", "params": {"size": 12, "shape": [3, 6, 6], "seed": 1}},
}
NECK = {"in_channels": 4, "out_channels": 4, "kernel_size": 1}
MATCH = {"type": "MSELoss", "inputs": {"input": "student", "target": "teacher"}}
FOLDED = {"fold_batchnorm": True}


def warmed(model):
    """A model in eval mode whose BatchNorms have seen something."""
    torch.manual_seed(0)
    for norm in model.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            if norm.affine:
                nn.init.normal_(norm.weight)
                nn.init.normal_(norm.bias)
    return model.eval()


def fold_all(model, inputs, tapped=()):
    pairs, ran = foldable(model, lambda: model(inputs), tapped)
    return fold(model, pairs), len(pairs), ran


class Net(nn.Module):
    """A block with a skip connection, a head in a row, and a side branch before the end."""

    def __init__(self, width=4, classes=3):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.block = nn.Sequential(nn.Conv2d(width, width, 1), nn.BatchNorm2d(width))
        self.side = nn.Linear(width, 2)
        self.head = nn.Sequential(
            nn.Linear(width, 6), nn.BatchNorm1d(6, affine=False), nn.Linear(6, classes)
        )

    def forward(self, images):
        stem = self.relu(self.norm(self.stem(images)))
        features = (stem + self.block(stem)).mean((2, 3))
        return {"logits": self.head(features), "side": self.side(features)}


class Plain(Net):
    """The same with logits alone."""

    def forward(self, images):
        return super().forward(images)["logits"]


class Skipping(nn.Module):
    """What its first layer gives is read behind the BatchNorm too."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm, self.head = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)
        self.norm.running_var.fill_(4)

    def forward(self, inputs):
        features = self.layer(inputs)
        return self.head(self.norm(features) + features)


class Twice(nn.Module):
    """Uses one layer with two BatchNorms, or one BatchNorm for two layers."""

    def __init__(self, of_layer):
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.norm, self.other = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
        self.of_layer = of_layer

    def forward(self, inputs):
        if self.of_layer:
            return self.other(self.one(self.norm(self.one(inputs))))
        return self.norm(self.two(self.norm(self.one(inputs))))


class Shared(Skipping):
    """Has two BatchNorms for what one layer gives."""

    def __init__(self):
        super().__init__()
        self.other = nn.BatchNorm1d(4)

    def forward(self, inputs):
        features = self.layer(inputs)
        return self.head(self.norm(features) + self.other(features))


class Overwriting(nn.Module):
    """Changes what its layer gave before the BatchNorm reads it."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, inputs):
        features = self.layer(inputs)
        features += 1
        return self.norm(features)


class Standardized(nn.Conv2d):
    """A convolution that does something to its weight."""

    def forward(self, inputs):
        weight = self.weight / self.weight.norm()
        return nn.functional.conv2d(inputs, weight, self.bias)


class Counting(Plain):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, images):
        self.calls += 1
        return super().forward(images)


class NeedsFloat32(Plain):
    def forward(self, images):
        if images.dtype != torch.float32:
            raise TypeError("only float32 here")
        return super().forward(images)


class Doubtful(Plain):
    """Is another model in bf16: less sure, and at times of another class."""

    def forward(self, images):
        logits = super().forward(images)
        if images.dtype == torch.float32:
            return logits
        return 0.5 * logits - logits * (images[:, :1, 0, 0] > 0)


class NoCopy(Plain):
    def __deepcopy__(self, memo):
        raise TypeError("holds a lock")


class Large(Plain):
    """Gives more than fp16 can hold."""

    def forward(self, images):
        return super().forward(images) + 1e5


class Flipped(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        return self.model(-batch.inputs)


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4)), torch.randn(2, 3, 7)),
        (nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)), torch.randn(2, 4, 5, 5)),
        (nn.Sequential(nn.Conv3d(2, 4, 2), nn.BatchNorm3d(4)), torch.randn(2, 2, 3, 3, 3)),
        (nn.Sequential(nn.ConvTranspose2d(3, 4, 2), nn.BatchNorm2d(4)), torch.randn(2, 3, 4, 4)),
        (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), torch.randn(2, 3)),
        (
            nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False)),
            torch.ones(2, 3, 2, 2),
        ),
    ],
)
def test_a_folded_batchnorm_passes_on_and_the_layer_before_it_gives_the_same(model, inputs):
    model = warmed(model)
    with torch.no_grad():
        expected = model(inputs)
    undo, folded, ran = fold_all(model, inputs)
    assert (folded, ran) == (1, 1)
    assert isinstance(model[1], nn.Identity)
    torch.testing.assert_close(model(inputs), expected, rtol=1e-5, atol=1e-5)
    undo()
    assert torch.equal(model(inputs), expected)


@pytest.mark.parametrize(
    ("model", "inputs", "tapped"),
    [
        (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), torch.randn(2, 4), ["0"]),
        (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), torch.randn(2, 4), ["1:input"]),
        (nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.BatchNorm1d(4)), torch.ones(2, 4), ["0"]),
        (nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.BatchNorm1d(4)), torch.randn(2, 4), []),
        (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(3)), torch.randn(2, 3, 4), []),
        (nn.Sequential(Standardized(3, 4, 1), nn.BatchNorm2d(4)), torch.randn(2, 3, 2, 2), []),
        (
            nn.Sequential(nn.ConvTranspose2d(4, 4, 1, groups=2), nn.BatchNorm2d(4)),
            torch.randn(2, 4, 2, 2),
            [],
        ),
        (
            nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False)),
            torch.randn(3, 4),
            [],
        ),
        (nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), torch.randn(2, 4), []),
        (Overwriting(), torch.randn(2, 4), []),
        (Shared(), torch.randn(2, 4), []),
        (Twice(of_layer=True), torch.randn(2, 4), []),
        (Twice(of_layer=False), torch.randn(2, 4), []),
    ],
)
def test_what_is_read_between_or_used_otherwise_is_not_folded(model, inputs, tapped):
    if nn.utils.parametrize.is_parametrized(model):
        model = nn.Sequential(model, nn.BatchNorm1d(4))
    model = model.eval()
    assert foldable(model, lambda: model(inputs), tapped)[0] == []


def test_a_layer_with_a_hook_is_not_folded():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    model[0].register_forward_hook(lambda module, args, output: output * 2)
    assert foldable(model, lambda: model(torch.randn(2, 4)), [])[0] == []


def test_batchnorm_keeps_its_precision_and_takes_what_layers_give_in_fewer_bits():
    model = warmed(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1)))
    inputs = torch.randn(2, 3, 4, 4)
    expected, statistics = model(inputs), model[1].running_mean.clone()
    cast(model, torch.bfloat16)
    assert model[2].weight.dtype == torch.bfloat16
    assert torch.equal(model[1].running_mean, statistics)
    torch.testing.assert_close(model(inputs.bfloat16()).float(), expected, rtol=0.05, atol=0.05)


def test_the_relative_error_is_over_the_largest_value_and_infinite_for_what_was_finite():
    plain = {"a": torch.tensor([1.0, -4.0]), "b": [torch.tensor([2.0])]}
    assert relative_error(plain, plain) == 0
    other = {"a": torch.tensor([1.0, -4.4]), "b": [torch.tensor([2.1])]}
    assert relative_error(plain, other) == pytest.approx(0.1)
    broken = {"a": torch.tensor([1.0, torch.inf]), "b": [torch.tensor([2.0])]}
    assert relative_error(plain, broken) == float("inf")
    assert relative_error(broken, plain) == 0


class Embedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(10, 4), nn.Linear(4, 3)

    def forward(self, inputs):
        return self.head(self.table(inputs["tokens"]).mean(1) + inputs["shift"])


def test_token_ids_stay_and_floats_are_cast():
    model = Embedding().bfloat16().eval()
    form = FastTeacher(model, None, CPU, CPU, torch.bfloat16)
    inputs = {"tokens": torch.tensor([[1, 2], [9, 3]]), "shift": torch.ones(2, 4)}
    with torch.no_grad():
        output = form(Batch(inputs, None, torch.arange(2)))
    assert output.dtype == torch.bfloat16
    assert form.back(output).dtype == torch.float32


def distiller(teacher, *references, autocast=None):
    """Compares what references of the teacher give with the student's logits' mean."""
    terms = [
        Call(
            f"term{n}",
            nn.MSELoss(),
            {"input": Address("student", "student"), "target": Address(ref, *ref.split("|"))},
        )
        for n, ref in enumerate(references)
    ]
    paths = [r.removeprefix("teacher.") for r in references if r.startswith("teacher.")]
    return Distiller(
        nn.Linear(4, 3),
        {"teacher": teacher},
        [],
        Criterion(terms, {term.name: 1.0 for term in terms}),
        {"teacher": paths},
        autocast=autocast,
    )


def test_a_fast_teacher_runs_outside_of_the_students_autocast_and_gives_float32():
    seen = []

    class Seeing(nn.Linear):
        def forward(self, inputs):
            seen.append((inputs.dtype, torch.is_autocast_enabled("cpu")))
            return super().forward(inputs)

    teacher = nn.Sequential(Seeing(4, 3)).eval()
    module = distiller(teacher, "teacher", "teacher.0", autocast=("cpu", torch.bfloat16))
    module.run_fast("teacher", lambda plain: FastTeacher(copy.deepcopy(plain), None, CPU, CPU))
    batch = Batch(torch.randn(2, 4), None, torch.arange(2))
    values = module.values(batch)
    assert seen == [(torch.float32, False)]
    assert values["teacher"].dtype == values["teacher.0"].dtype == torch.float32
    assert torch.equal(values["teacher"], teacher(batch.inputs))


def test_parameters_of_a_distiller_are_those_of_the_plain_teacher():
    teacher = nn.Linear(4, 3)
    module = distiller(teacher, "teacher")
    before = list(module.parameters())
    fast = nn.Linear(4, 3).bfloat16()
    module.run_fast("teacher", lambda plain: FastTeacher(fast, None, CPU, CPU, torch.bfloat16))
    assert all(a is b for a, b in zip(module.parameters(), before, strict=True))
    assert module.models()["teacher"] is teacher
    assert module.runs("teacher") is fast


def experiment(folder, fast, *, model="Plain", wires=None, **keys):
    """A stage in which ``thin`` learns from a fast ``wide``; wires: term -> the teacher's side."""
    wires = wires or {"match": ("student", "teacher")}
    terms = {
        name: {"type": "MSELoss", "inputs": {"input": one, "target": other}}
        for name, (one, other) in wires.items()
    }
    stage = {
        "epochs": 2,
        "teacher": {"model": "wide", "fast": fast},
        "student": {"model": "thin"},
        "criterion": {"ce": {"type": "CrossEntropyLoss"}, **terms},
        **keys,
    }
    stage["teacher"].update(stage.pop("of_teacher", {}))
    models = {"wide": {"type": model}, "thin": {"type": "Plain"}}
    return toy_experiment(folder, stage, datasets=IMAGES, models=models, observers=["Heard"])


class Heard(Observer):
    """Writes down notes; ends the run after an epoch."""

    notes: tuple[str, ...] = ()
    stops = 0

    def stage_start(self, event):
        type(self).notes = tuple(event.notes)

    def epoch_end(self, event):
        if event.position.epoch == type(self).stops:
            raise KeyboardInterrupt


def registry():
    models = {
        each.__name__: each
        for each in (Plain, Net, Skipping, Counting, Doubtful, NeedsFloat32, NoCopy, Large)
    }
    return toy_registry(
        models=models, observers={"Heard": Heard}, special_modules={"Flipped": Flipped}
    )


def trained(folder, fast, **keys):
    """Run, and return the student's weights and the notes."""
    result = run(experiment(folder, fast, **keys), registry=registry(), runs=folder / "runs")
    state = load_file(result.directory / "stage0" / "last.safetensors")
    return state, [note for note in Heard.notes if "BatchNorm" in note or "fast" in note]


def prepared(folder, stack, fast, *, warm=True, **keys):
    """Return the distiller of the stage, with its run."""
    described = experiment(folder, fast, **keys)
    builder = Builder(described, registry())
    models = {name: builder.model(name, 0) for name in described.models}
    if warm:
        warmed(models["wide"])
    sources = {name: builder.source(name) for name in described.datasets}
    seed_run = SeedRun(builder, 0, CPU, folder, lambda *_: None, models, sources)
    ready = prepare(seed_run, described.stages[0], stack)
    return ready, seed_run


def values(ready, seed_run):
    batch = seed_run.first_batch(ready.assembly.stage, ready.source, CPU)
    return ready.assembly.distiller.values(batch)


WIRES = {
    "match": ("student", "teacher"),
    "stem": ("student.stem", "teacher.stem"),
    "norm": ("student.norm", "teacher.norm"),
    "block": ("student.block", "teacher.block"),
}


@pytest.mark.parametrize(
    ("fast", "tolerance"),
    [
        (FOLDED, 1e-5),
        ({**FOLDED, "channels_last": True}, 1e-5),
        (True, 0.03),
        ({"precision": "fp16"}, 0.005),
    ],
)
def test_a_fast_teacher_gives_what_the_plain_one_gives(tmp_path, fast, tolerance):
    with ExitStack() as stack:
        plain = values(*prepared(tmp_path / "plain", stack, False, wires=WIRES))
        ready, seed_run = prepared(tmp_path / "fast", stack, fast, wires=WIRES)
        found = values(ready, seed_run)
        for name in ("teacher", "teacher.stem", "teacher.norm", "teacher.block"):
            assert found[name].dtype == torch.float32
            assert relative_error(plain[name], found[name]) <= tolerance, name
        if fast in (True, FOLDED):
            # The stem's own output is read, so its BatchNorm stays.
            running = ready.assembly.distiller.runs("teacher")
            assert isinstance(running.norm, nn.BatchNorm2d)
            assert isinstance(running.block[1], nn.Identity)


def test_a_convolution_that_is_read_gives_the_very_bits_it_gave(tmp_path):
    with ExitStack() as stack:
        plain = values(*prepared(tmp_path / "plain", stack, False, wires=WIRES))
        found = values(*prepared(tmp_path / "fast", stack, FOLDED, wires=WIRES))
        assert torch.equal(found["teacher.stem"], plain["teacher.stem"])


def test_the_teacher_itself_stays_as_it_is(tmp_path):
    with ExitStack() as stack:
        wires = {**WIRES, "weight": ("student.head.2.weight", "teacher.head.2.weight")}
        ready, seed_run = prepared(tmp_path, stack, True, wires=wires)
        teacher = seed_run.models["wide"]
        assert isinstance(teacher.norm, nn.BatchNorm2d)
        assert all(p.dtype == torch.float32 for p in teacher.parameters())
        found = values(ready, seed_run)["teacher.head.2.weight"]
        assert found is teacher.head[2].weight
        assert ready.assembly.roles["teacher"] is teacher


def test_a_cut_fast_teacher_stops_early_and_its_parameters_are_counted_as_the_plain_ones(tmp_path):
    wires = {"norm": ("student.norm", "teacher.norm")}
    with ExitStack() as stack:
        plain, _ = prepared(tmp_path / "plain", stack, False, wires=wires)
        ready, seed_run = prepared(tmp_path / "fast", stack, True, wires=wires)
        assert ready.rehearsal.ran["teacher"] == plain.rehearsal.ran["teacher"]
        head = ready.assembly.distiller.runs("teacher").head
        head.register_forward_hook(lambda *_: pytest.fail("the head ran"))
        assert set(values(ready, seed_run)) >= {"teacher.norm"}


def test_a_side_branch_of_a_fast_teacher_is_left_out(tmp_path):
    wires = {"match": ("student", "teacher.logits")}
    with ExitStack() as stack:
        plain = values(*prepared(tmp_path / "plain", stack, False, model="Net", wires=wires))
        ready, seed_run = prepared(tmp_path / "fast", stack, FOLDED, model="Net", wires=wires)
        assert ready.assembly.distiller.branches == {"teacher": ("side",)}
        found = values(ready, seed_run)
        assert relative_error(plain["teacher"]["logits"], found["teacher"]["logits"]) <= 1e-5


def test_a_special_module_is_put_around_the_fast_teacher(tmp_path):
    around = {"of_teacher": {"special": "Flipped"}}
    with ExitStack() as stack:
        plain = values(*prepared(tmp_path / "plain", stack, False, **around))
        ready, seed_run = prepared(tmp_path / "fast", stack, True, **around)
        found = values(ready, seed_run)
        assert relative_error(plain["teacher"], found["teacher"]) <= 0.03
        special = ready.assembly.specials["teacher"]
        assert special.model is ready.assembly.distiller.runs("teacher")
        assert not special.training


def test_a_redesigned_teacher_can_be_fast(tmp_path):
    row = {"type": "sequential", "params": {"modules": ["stem", "norm"]}}
    keys = {"of_teacher": {"redesign": row}, "wires": {"norm": ("student.norm", "teacher.norm")}}
    with ExitStack() as stack:
        plain = values(*prepared(tmp_path / "plain", stack, False, **keys))
        ready, seed_run = prepared(tmp_path / "fast", stack, FOLDED, **keys)
        found = values(ready, seed_run)
        name = next(name for name in found if name.startswith("teacher."))
        assert relative_error(plain[name], found[name]) <= 1e-5
        assert ready.assembly.distiller.fast["teacher"].folded == 1


def test_folding_that_would_change_what_is_read_is_undone_and_told(tmp_path):
    data = {"train": {"type": "ToyData"}, "val": {"type": "ToyData", "params": {"seed": 1}}}
    stage = {
        "teacher": {"model": "wide", "fast": FOLDED},
        "student": {"model": "mlp"},
        "criterion": {"match": MATCH},
        "metrics": [],
    }
    models = {"wide": {"type": "Skipping"}, "mlp": {"type": "ToyMLP"}}
    described = toy_experiment(tmp_path, stage, datasets=data, models=models, observers=["Heard"])
    run(described, registry=registry(), runs=tmp_path / "runs")
    fast, refused = (note for note in Heard.notes if "BatchNorm" in note)
    assert "0 of 1 BatchNorms folded" in fast
    assert "teacher is KL 0 from the plain one" in fast
    assert refused.startswith("no BatchNorm of teacher is folded: the 1 that could be would change")


def test_a_student_learns_nearly_the_same_and_the_log_says_how_far_the_teacher_is(tmp_path):
    plain, none = trained(tmp_path / "plain", False)
    folded, told = trained(tmp_path / "folded", FOLDED)
    rounded, _ = trained(tmp_path / "rounded", True)
    assert none == []
    assert len(told) == 1
    assert "teacher is fast (3 of 3 BatchNorms folded): on 20 training samples" in told[0]
    assert "with the same top-1 for 100.0 %" in told[0]
    for name, weight in plain.items():
        torch.testing.assert_close(folded[name], weight, rtol=0, atol=1e-5)
        torch.testing.assert_close(rounded[name], weight, rtol=0, atol=0.02)
    assert any(not torch.equal(rounded[name], weight) for name, weight in plain.items())


def test_the_divergence_is_that_of_the_formula_and_features_are_told_by_their_error(tmp_path):
    with ExitStack() as stack:
        keys = {"model": "Doubtful", "wires": WIRES}
        ready, seed_run = prepared(tmp_path, stack, {"precision": "bf16"}, **keys)
        teacher = seed_run.models["wide"]
        (note,) = fast_notes(seed_run, ready.assembly, ready.source, ready.plan)
        inputs = ready.source.dataset.inputs
        small = ready.assembly.distiller.runs("teacher")
        with torch.no_grad():
            p = teacher(inputs).double().softmax(1)
            q = small(inputs.bfloat16()).float().double().softmax(1)
        expected = (p * (p.log() - q.log())).sum(1).mean().item()
        told = float(note.split("teacher is KL ")[1].split()[0])
        assert told == pytest.approx(expected, rel=0.06)
        same = (p.argmax(1) == q.argmax(1)).double().mean().item()
        assert f"with the same top-1 for {100 * same:.1f} %" in note
        assert 0 < same < 1
        assert "teacher.block is off by at most 0.0" in note


def test_values_that_fp16_cannot_hold_are_warned_of(tmp_path):
    with ExitStack() as stack:
        ready, seed_run = prepared(tmp_path, stack, {"precision": "fp16"}, model="Large")
        notes = fast_notes(seed_run, ready.assembly, ready.source, ready.plan)
    assert notes[-1].startswith("warning: in fp16 what teacher gives is not finite")


def test_a_stopped_run_with_a_fast_teacher_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    straight, _ = trained(tmp_path / "straight", True)
    monkeypatch.setattr(Heard, "stops", 2)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "stopped", True)
    monkeypatch.setattr(Heard, "stops", 0)
    resumed, _ = trained(tmp_path / "stopped", True)
    assert all(torch.equal(resumed[name], weight) for name, weight in straight.items())


def test_a_fast_teacher_that_counts_its_forwards_is_noticed(tmp_path):
    with pytest.raises(ConfigError, match="'teacher' has changed while the student trained"):
        trained(tmp_path, {"channels_last": True}, model="Counting")


def test_a_teacher_that_torch_compiles_is_not_cut(tmp_path):
    wires = {"norm": ("student.norm", "teacher.norm")}
    with ExitStack() as stack:
        ready, _ = prepared(tmp_path, stack, {"compile": True}, wires=wires)
        fast = ready.assembly.distiller.runs("teacher")
        assert compiled_teachers(ready.assembly) == [fast]
        assert ready.assembly.distiller.extents["teacher"] == "whole"


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (
            {"fast": {"compile": True}, "compile": ["teacher"]},
            "'teacher' is in the stage's 'compile'",
        ),
        ({"fast": True, "parallel": "fsdp"}, "parallel: fsdp shards the teacher as it is"),
        (
            {
                "fast": True,
                "auxiliary": {"neck": {"type": "Conv2d", "params": NECK}},
                "wires": {"neck": ("student.norm", "neck")},
                "of_teacher": {
                    "redesign": {
                        "type": "sequential",
                        "params": {"modules": ["stem", {"auxiliary": "neck"}]},
                    }
                },
            },
            "'neck' stands in the teacher's row",
        ),
    ],
)
def test_what_cannot_be_fast_is_told_at_its_key_before_anything_is_read(tmp_path, keys, said):
    with pytest.raises(ConfigError, match=said) as raised:
        check(experiment(tmp_path, keys.pop("fast"), **keys), registry())
    assert "teacher.fast" in str(raised.value)


@pytest.mark.parametrize(
    ("fast", "model", "said"),
    [
        (
            {"precision": "bf16"},
            "NeedsFloat32",
            r"does not run in bf16 on cpu: .*only float32 here",
        ),
        (
            {"precision": "fp16"},
            "NeedsFloat32",
            r"does not run in fp16 on cpu: .*only float32 here",
        ),
        ({"channels_last": True}, "NoCopy", r"NoCopy cannot be copied: .*holds a lock"),
        ({"device": "cuda:63"}, "Plain", r"cuda:63 was asked for, and torch sees \d+"),
    ],
)
def test_a_teacher_that_cannot_run_so_is_told_at_its_key(tmp_path, fast, model, said):
    with pytest.raises(ConfigError, match=said) as raised:
        trained(tmp_path, fast, model=model)
    assert "teacher.fast" in str(raised.value)


def test_two_processes_give_with_a_fast_teacher_what_one_gives(tmp_path):
    alone, _ = trained(tmp_path / "alone", FOLDED)
    run_processes(Path(__file__), str(tmp_path / "two"))
    two = load_file(tmp_path / "two" / "runs" / "toy" / "stage0" / "last.safetensors")
    for name, weight in alone.items():
        torch.testing.assert_close(two[name], weight, rtol=0, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("fast", [True, {"device": "cpu"}, {"precision": "fp16"}])
def test_a_fast_teacher_on_a_gpu_or_beside_it_gives_what_the_plain_one_gives(tmp_path, fast):
    described = experiment(tmp_path / "fast", fast, wires=WIRES)
    plain = experiment(tmp_path / "plain", False, wires=WIRES)
    students = []
    for each in (plain, described):
        object.__setattr__(each, "device", "cuda")
        folder = tmp_path / each.document.file.parent.name
        result = run(each, registry=registry(), runs=folder / "runs")
        students.append(load_file(result.directory / "stage0" / "last.safetensors"))
    for name, weight in students[0].items():
        torch.testing.assert_close(students[1][name], weight, rtol=0, atol=0.05)


if __name__ == "__main__":
    trained(Path(sys.argv[1]), FOLDED)
