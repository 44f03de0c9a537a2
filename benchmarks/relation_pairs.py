"""Losses on relations of distill and of torchdistill, on the same tensors of published shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal
from unittest import mock

import torch
from torch import Tensor

import distill_crd as crd
import distill_relational as relational

Loss = Callable[[], Tensor]

FEATURES = {"CIFAR": (64, 256), "ImageNet": (256, 512)}
"""Pooled features of a batch."""
FORMS: Mapping[Literal["torchdistill", "paper"], str] = {
    "torchdistill": "torchdistill's form",
    "paper": "the paper's form",
}
"""Of CCKD."""
SSKD_IMAGES, SSKD_VIEWS, SSKD_WIDTH, SSKD_CLASSES = 85, 4, 512, 1000
"""What SSKD sees on ImageNet, on each of three devices."""


@dataclass(frozen=True)
class Pair:
    """A loss of distill and torchdistill's on the same tensors.

    ``leaves`` are what gets gradients, and ``alike`` says whether both define the same loss.
    """

    title: str
    ours: Loss
    theirs: Loss
    leaves: Sequence[Tensor]
    alike: bool = True


def gradients(loss: Loss, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Run a loss forward and backward."""
    return torch.autograd.grad(loss(), leaves)


def rkd_pairs(title: str, student: Tensor, teacher: Tensor) -> Iterator[Pair]:
    """Return RKD with the published weights of distances and angles, as one loss and as two."""
    from torchdistill.losses.mid_level import RKDLoss

    both = relational.RKDLoss(distance_weight=25.0, angle_weight=50.0)
    distance, angle = relational.RKDDistanceLoss(), relational.RKDAngleLoss()
    reference = RKDLoss("p", "p", 25.0, 50.0, "mean")

    def ours() -> Tensor:
        loss: Tensor = both(student, teacher)
        return loss

    def in_terms() -> Tensor:
        loss: Tensor = 25 * distance(student, teacher) + 50 * angle(student, teacher)
        return loss

    def theirs() -> Tensor:
        loss: Tensor = reference(_outputs(student), _outputs(teacher))
        return loss

    yield Pair(title, ours, theirs, [student])
    yield Pair(f"{title}, as two terms", in_terms, theirs, [student])


def cckd_pairs(title: str, student: Tensor, teacher: Tensor) -> Iterator[Pair]:
    """Return CCKD in the form that torchdistill has, and in the paper's."""
    from torchdistill.losses.mid_level import CCKDLoss

    theirs = CCKDLoss("p", "p", {"type": "gaussian", "gamma": 0.4, "max_p": 2}, "batchmean")
    for form, name in FORMS.items():
        yield Pair(
            f"{title}, {name}",
            partial(relational.CCKDLoss(form), student, teacher),
            lambda: theirs(_outputs(student), _outputs(teacher)),
            [student],
            alike=form == "torchdistill",
        )


def sskd_pairs(device: torch.device) -> Iterator[Pair]:
    """Return the losses of SSKD's two stages."""
    from torchdistill.losses import mid_level

    rows = SSKD_VIEWS * SSKD_IMAGES
    logits, embeddings = (
        torch.randn(rows, width, device=device, requires_grad=True)
        for width in (SSKD_CLASSES, SSKD_WIDTH)
    )
    answers = 3 * torch.randn(rows, SSKD_CLASSES, device=device)
    wanted = torch.randn(rows, SSKD_WIDTH, device=device)
    targets = torch.randint(SSKD_CLASSES, (SSKD_IMAGES,), device=device)
    shape = f"{SSKD_IMAGES} x {SSKD_VIEWS} images"
    first = mid_level.AuxSSKDLoss("p")
    yield Pair(
        f"SSKD, stage 1, {shape}",
        partial(crd.SelfSupervisionLoss(), embeddings),
        lambda: first(None, _outputs(embeddings)),
        [embeddings],
    )
    second = mid_level.SSKDLoss(
        "fc", "fc", "p", "p", 4.0, 0.5, 4.0, 0.75, 1.0, loss_weights=[1.0, 0.9, 10.0, 2.7]
    )

    def reference() -> Tensor:
        student = _outputs(embeddings) | {"fc": {"output": logits}}
        teacher = _outputs(wanted) | {"fc": {"output": answers}}
        loss: Tensor = second(student, teacher, targets)
        return loss

    own = crd.SSKDLoss(loss_weights=(1.0, 0.9, 10.0, 2.7))
    yield Pair(
        f"SSKD, stage 2, {shape}",
        partial(own, logits, answers, embeddings, wanted, targets),
        reference,
        [logits, embeddings],
    )


def _outputs(tensor: Tensor) -> dict[str, dict[str, Tensor]]:
    """Return a tensor as torchdistill hands on what a module gives."""
    return {"p": {"output": tensor}}


def pairs(device: torch.device) -> Iterator[Pair]:
    """Return all that is compared."""
    features = {}
    for data, shape in FEATURES.items():
        student, teacher = (torch.randn(shape, device=device).relu() for _ in range(2))
        features[data] = student.requires_grad_(), teacher
    sizes = {data: f"{rows} x {width}" for data, (rows, width) in FEATURES.items()}
    for data, both in features.items():
        yield from rkd_pairs(f"RKD, {sizes[data]} ({data})", *both)
    for data, both in features.items():
        yield from cckd_pairs(f"CCKD, {sizes[data]}", *both)
    yield from sskd_pairs(device)


def gradient_difference(pair: Pair) -> tuple[float, float]:
    """Return the largest difference of two gradients' elements, and their largest element."""
    ours = gradients(pair.ours, pair.leaves)
    with stable_order():
        theirs = gradients(pair.theirs, pair.leaves)
    apart = max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))
    return apart, max(gradient.abs().max().item() for gradient in theirs)


@contextmanager
def stable_order() -> Iterator[None]:
    """Have equal elements sorted in the order they come in.

    torchdistill's SSKD ranks answers by sorting and keeps the first; which of equal ones those are
    is left open there.
    """
    with mock.patch.object(torch, "argsort", partial(torch.argsort, stable=True)):
        yield
