"""What stored outputs of teachers cost and save in training: epochs, views of one reading.

``epochs``: a ResNet-18 learning from ResNets: by hand, by torchdistill where it is installed, by
distill without a store, filling one and reading it, and the same loop with targets for free.
Augmentation is on: each epoch takes a view of every sample. Each turn is an epoch of every side, a
fifth at a time, of which filling begins with an empty store.
``steps``: what a store adds to a step of those epochs, seen beside networks of a single layer,
since beside a ResNet-18 it is less than what the machine's time scatters by.
``views``: an epoch of distillation with four views taken from each decoding of a JPEG and the
teacher's logits stored, against an epoch of plain training, which decodes every image.

All sides of a comparison run in one process and in turns; printed are medians and their ratios.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain, count, islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy
import torch
import torchvision
from by_torchdistill import by_torchdistill, is_installed
from data import Transformed, write_photos
from engine import Train, opened
from fast_teacher import ALPHA, TEMPERATURE, by_hand
from PIL import Image
from timing import in_turns, ratio
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from distill.data.batch import Batch
from distill.data.loader import training_batches
from distill.model.stored import Outputs
from distill.training.loop import Loop
from distill.training.prepared import prepare
from distill.training.ready import make_ready
from distill.training.seed_run import SeedRun
from distill.training.stored_stage import fingerprints_wanted, with_stored

CPU = torch.device("cpu")
WARM_UP = 3
"""Steps of each side before its epochs count."""
CROPS = (32, 64)
"""The larger a crop, the more the student takes beside the decoding."""
EPOCHS_BATCH = 16
STEPS_TURNS = 25
"""Epochs of each side, which take a second."""
PARTS = 5
"""An epoch's parts, which take turns, so that a slow minute of the machine is every side's."""
Batches = Callable[[], Iterator[Batch]]
"""Gives those of an epoch."""
UNTRAINED = {"zero_init_residual": True}
"""Of teachers; else an untrained ResNet-101 gives more than float16 holds."""
EPOCHS = ["by hand", "torchdistill", "no store", "filling", "stored", "free targets"]
"""Sides whose seconds are printed."""
TEACHERS = ["resnet34", "resnet50", "resnet101", "resnet152"]
PUBLISHED = {"resnet152": 1_944 / 917}
"""Seconds an epoch of ImageNet without stored outputs over those with, in torchdistill's paper."""


class Images(Dataset[tuple[Tensor, int]]):
    """Random images (3, size, size) uint8 in memory."""

    def __init__(self, samples: int, size: int):
        generator = torch.Generator().manual_seed(0)
        shape = (samples, 3, size, size)
        self.images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], index % 10


class Photos(Dataset[tuple[Image.Image, int]]):
    """JPEG files of 500 x 375 pixels."""

    def __init__(self, folder: str):
        self.files = sorted(Path(folder).rglob("*.jpg"))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.open(self.files[index]).convert("RGB"), index % 10


class Free(nn.Module):
    """A teacher whose outputs cost nothing."""

    def __init__(self, classes: int = 1000):
        super().__init__()
        self.register_buffer("logits", torch.randn(1024, classes))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return random logits (B, classes)."""
        logits: Any = self.logits
        return logits[: len(inputs)]  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Side:
    """One way to train, ready to run an epoch."""

    run: SeedRun
    loop: Loop
    source: Any
    plan: Any
    stores: Mapping[str, Outputs]

    def batches(self) -> Iterator[Batch]:
        """Return the batches of an epoch, with what is stored for them."""
        stage = self.run.builder.experiment.stages[0]
        batches = training_batches(
            self.source,
            self.plan,
            seed=0,
            epoch=0,
            fingerprints=fingerprints_wanted(stage, self.stores),
        )
        return with_stored(batches, self.stores, 0)

    def train(self, batches: Iterable[Batch]) -> None:
        """Train on some of them as `distill run` does."""
        self.loop.epoch(iter(batches))

    def epoch(self) -> None:
        """Train for one epoch."""
        self.train(self.batches())

    def forget(self) -> None:
        """Empty the stores."""
        for outputs in self.stores.values():
            outputs.rows.forget(numpy.arange(len(outputs.rows)))

    def anew(self) -> Iterator[Batch]:
        """Return the same, with nothing stored yet."""
        self.forget()
        return self.batches()


class SingleLayer(nn.Sequential):
    """A network that costs next to nothing."""

    def __init__(self, classes: int = 1000):
        super().__init__(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, classes))


DATA_SETS = {"Images": Images, "Photos": Photos}
MODELS = {"Free": Free, "SingleLayer": SingleLayer}


def side(described: Mapping[str, Any], folder: Path, stack: ExitStack) -> Side:
    """Put together what an experiment's only stage is."""
    folder.mkdir()
    run = opened(described, folder, DATA_SETS, MODELS)
    run.builder.stores = folder / "stores"
    (stage,) = run.builder.experiment.stages
    ready = make_ready(run, prepare(run, stage, stack), stack)
    distiller = ready.spread.assembly.distiller
    assert distiller is not None
    return Side(run, ready.loop, ready.source, ready.plan, distiller.stores)


def described(
    teacher: str | None,
    data: Mapping[str, Any],
    dataset: Any,
    student: str = "resnet18",
    **role: Any,
) -> Any:
    """Return an experiment: a student with a teacher, or alone."""
    models: dict[str, Any] = {"student": {"type": student}}
    stage: dict[str, Any] = {
        "name": "distil",
        "epochs": 4,
        "data": {"train": "train", **data},
        "student": {"model": "student"},
        "criterion": {"ce": {"type": "CrossEntropyLoss"}},
        "optimizer": {"type": "SGD", "params": {"lr": 1e-3, "momentum": 0.9}},
        "metrics": [],
    }
    if teacher is not None:
        params = {} if teacher in MODELS else UNTRAINED
        models["teacher"] = {"type": teacher, "params": params}
        stage["teacher"] = {"model": "teacher", **role}
        loss = {"temperature": TEMPERATURE, "alpha": ALPHA}
        stage["criterion"] = {"kd": {"type": "KDLoss", "params": loss}}
    return {
        "name": "store",
        "device": "cpu",
        "datasets": {"train": dataset},
        "models": models,
        "stages": [stage],
        "observers": [],
    }


def epochs(turns: int, samples: int, size: int, teachers: list[str]) -> None:
    """Print what epochs cost with and without a store."""
    print(
        f"ResNet-18, {samples} images of {size} x {size}, batches of {EPOCHS_BATCH}, "
        f"{-(-samples // EPOCHS_BATCH)} steps an epoch, medians of {turns}, in seconds\n"
    )
    print(
        "| teacher | by hand | torchdistill | no store | filling | stored | free targets |"
        " filling : no store | stored : free | stored, bf16 : no store | no store : stored |"
        " published |"
    )
    print("| --- " * 12 + "|")
    steps = samples // EPOCHS_BATCH // PARTS
    if samples != steps * EPOCHS_BATCH * PARTS:
        raise SystemExit(f"--samples: write a multiple of {EPOCHS_BATCH * PARTS}")
    for teacher in teachers:
        with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
            sides = sides_of_scripts(teacher, samples, size)
            sides |= sides_of_stages(teacher, samples, size, Path(folder), stack)
            works = [in_parts(train, batches, steps) for train, batches in sides.values()]
            found = in_turns(works, turns * PARTS, CPU, warms_up=False)
        took = dict(zip(sides, map(whole, found), strict=True))
        cells = [f"{median(took[name]):.2f}" if name in took else "" for name in EPOCHS]
        no, stored = took["no store"], took["stored"]
        cells += [f"{ratio(took['filling'], no):.3f}", f"{ratio(stored, took['free targets']):.3f}"]
        cells += [f"{ratio(took['stored, bf16'], no):.2f}", f"{ratio(no, stored):.2f}"]
        cells += [f"{PUBLISHED[teacher]:.2f}" if teacher in PUBLISHED else ""]
        print(f"| {teacher} | {' | '.join(cells)} |", flush=True)


def in_parts(train: Train, batches: Batches, steps: int) -> Callable[[], None]:
    """Return a work that trains for so many steps, of one epoch after the other."""
    endless = chain.from_iterable(batches() for _ in count())
    return lambda: train(islice(endless, steps))


def whole(parts: Sequence[float]) -> list[float]:
    """Return the seconds of epochs from those of their parts."""
    return [sum(parts[first : first + PARTS]) for first in range(0, len(parts), PARTS)]


def sides_of_stages(
    teacher: str, samples: int, size: int, folder: Path, stack: ExitStack
) -> dict[str, tuple[Train, Batches]]:
    """Return how a stage trains and on what, warm; of stored ones all is stored."""
    dataset, data = augmented_images(samples, size), {"batch_size": EPOCHS_BATCH, "views": 1}
    with_store = described(teacher, data, dataset, store=True)
    reduced = described(teacher, data, dataset, store=True)
    reduced["stages"][0] |= {"precision": "bf16", "channels_last": True}
    plain = side(described(teacher, data, dataset), folder / "plain", stack)
    filling = side(with_store, folder / "filling", stack)
    stored = side(with_store, folder / "stored", stack)
    free = side(described("Free", data, dataset), folder / "free", stack)
    bf16 = side(reduced, folder / "bf16", stack)
    for one in (plain, filling, free):
        one.train(islice(one.batches(), WARM_UP))
    for one in (stored, bf16):
        one.epoch()
    return {
        "no store": (plain.train, plain.batches),
        "filling": (filling.train, filling.anew),
        "stored": (stored.train, stored.batches),
        "free targets": (free.train, free.batches),
        "stored, bf16": (bf16.train, bf16.batches),
    }


def sides_of_scripts(teacher: str, samples: int, size: int) -> dict[str, tuple[Train, Batches]]:
    """Return how one trains by hand and by torchdistill, without a store, and on what, warm."""
    transforms = augmented(size) | {"ToDtype": {"dtype": torch.float32, "scale": True}}
    images = Transformed(Images(samples, size), transforms)
    loader = DataLoader(images, EPOCHS_BATCH, shuffle=True)

    def batches() -> Iterator[Batch]:
        return (Batch(inputs, labels, torch.arange(len(labels))) for inputs, labels in loader)

    deep = getattr(torchvision.models, teacher)(**UNTRAINED).eval().requires_grad_(False)

    def expects(batch: Batch) -> Tensor:
        logits: Tensor = deep(batch.inputs)
        return logits

    trains = {"by hand": by_hand(expects, torchvision.models.resnet18(), reduced=False)}
    if is_installed():
        student = torchvision.models.resnet18()
        trains["torchdistill"] = by_torchdistill(deep, student, CPU, TEMPERATURE, ALPHA)
    for train in trains.values():
        train(islice(batches(), WARM_UP))
    return {name: (train, batches) for name, train in trains.items()}


def steps(turns: int, samples: int, size: int) -> None:
    """Print what filling and reading add to a step."""
    dataset, data = augmented_images(samples, size), {"batch_size": EPOCHS_BATCH, "views": 1}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:

        def ready(name: str, *, store: bool) -> Side:
            layer = "SingleLayer"
            wanted = described(layer, data, dataset, student=layer, store=store)
            return side(wanted, Path(folder, name), stack)

        plain = ready("plain", store=False)
        filling, stored = (ready(name, store=True) for name in ("filling", "stored"))
        stored.epoch()
        works = [plain.epoch, lambda: filling.train(filling.anew()), stored.epoch]
        found = in_turns(works, turns, CPU)
    count = -(-samples // EPOCHS_BATCH)
    print("| a step of a single layer | time | beyond no store |")
    print("| --- | ---: | ---: |")
    for name, took in zip(("no store", "filling", "stored"), found, strict=True):
        beyond = median(one - other for one, other in zip(took, found[0], strict=True))
        added = f"{beyond / count * 1e3:.2f} ms" if took is not found[0] else ""
        print(f"| {name} | {median(took) / count * 1e3:.2f} ms | {added} |")
    print(f"\nBatches of {EPOCHS_BATCH} images of {size} x {size}, 1,000 logits.")


def augmented_images(samples: int, size: int) -> dict[str, Any]:
    """Return a data set as a file describes it."""
    transforms = [{"type": name, "params": params} for name, params in augmented(size).items()]
    params = {"samples": samples, "size": size}
    return {"type": "Images", "params": params, "transforms": transforms}


def augmented(size: int) -> dict[str, dict[str, Any]]:
    """Return transforms of images by name, as a file describes them."""
    return {
        "RandomCrop": {"size": size, "padding": 4},
        "RandomHorizontalFlip": {},
        "ToDtype": {"dtype": "float32", "scale": True},
        "Normalize": {"mean": [0.5] * 3, "std": [0.25] * 3},
    }


def views(turns: int, samples: int, crop: int) -> None:
    """Print what an epoch costs whose views come four at a time from one decoding."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        photos = Path(folder, "photos")
        write_photos(photos, samples)
        transforms = [
            {"type": "RandomResizedCrop", "params": {"size": crop}},
            "RandomHorizontalFlip",
            "ToImage",
            {"type": "ToDtype", "params": {"dtype": "float32", "scale": True}},
        ]
        dataset = {"type": "Photos", "params": {"folder": str(photos)}, "transforms": transforms}
        alone = side(described(None, {"batch_size": 32}, dataset), Path(folder, "alone"), stack)
        data = {"batch_size": 32, "views": 4, "views_at_once": 4}
        role: Any = {"store": {"encoding": "top_k", "temperature": TEMPERATURE}}
        one = side(described("resnet18", data, dataset, **role), Path(folder, "one"), stack)
        one.epoch()
        plain, stored = in_turns([alone.epoch, one.epoch], turns, CPU)
    print(
        f"| {samples} JPEGs of 500 x 375, crops of {crop} | {median(plain):.2f} s | "
        f"{median(stored):.2f} s | {ratio(stored, plain):.3f} | 0.84 |",
        flush=True,
    )


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="*", default=["steps", "epochs", "views"])
    parser.add_argument("--turns", type=int, default=6, help="epochs of each side")
    parser.add_argument("--samples", type=int, default=320, help="images of an epoch")
    parser.add_argument("--size", type=int, default=64, help="height and width of these images")
    parser.add_argument("--photos", type=int, default=192, help="JPEGs that views are taken of")
    parser.add_argument("--teachers", nargs="*", default=TEACHERS)
    given = parser.parse_args()
    if "steps" in given.what:
        steps(STEPS_TURNS, given.samples, given.size)
    if "epochs" in given.what:
        epochs(given.turns, given.samples, given.size, given.teachers)
    if "views" in given.what:
        print("| data | plain training | four views, stored | ratio | published best |")
        print("| ---- | -------------: | -----------------: | ----: | -------------: |")
        for crop in CROPS:
            views(given.turns, given.photos, crop)


if __name__ == "__main__":
    main()
