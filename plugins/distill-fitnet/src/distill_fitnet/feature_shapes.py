"""What shapes features must have: refused with one sentence where they cannot be compared."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from distill.parameters import check

Channels = int | Sequence[int] | None
"""Channels of one feature, or of each of several layers' features, or not known yet."""

FORMS = {2: "vectors (B, D)", 3: "tokens (B, N, D)", 4: "maps (B, C, H, W)"}
"""What a feature of so many dimensions is."""


def channel_list(owner: object, name: str, channels: Channels) -> list[int] | None:
    """Return channels as a list, one number for each layer.

    Raises:
        ValueError: if a number is below 1, or there is none.
    """
    if channels is None:
        return None
    listed = [channels] if isinstance(channels, int) else list(channels)
    fits = len(listed) > 0 and all(number >= 1 for number in listed)
    check(owner, name, channels, fits, "a whole number >= 1, a list of such, or None")
    return listed


def check_form(owner: object, features: Tensor, *dimensions: int) -> None:
    """Refuse a feature that has none of these numbers of dimensions."""
    if features.ndim not in dimensions:
        wanted = " or ".join(FORMS[number] for number in dimensions)
        raise ValueError(
            f"{type(owner).__name__}: features must be {wanted}, got {tuple(features.shape)}"
        )


def check_same(owner: object, student: Tensor, teacher: Tensor, advice: str) -> None:
    """Refuse features of student and teacher that differ in shape."""
    if student.shape != teacher.shape:
        raise ValueError(f"{_both(owner, student, teacher)} must have the same shape; {advice}")


def check_maps(owner: object, student: Tensor, teacher: Tensor, advice: str | None = None) -> None:
    """Refuse features that are no maps (B, C, H, W) of the same samples.

    Args:
        owner: whose class the message names.
        student, teacher: the features.
        advice: what to do where the channels differ; ``None`` if they may.
    """
    if not student.ndim == teacher.ndim == 4 or len(student) != len(teacher):
        raise ValueError(
            f"{_both(owner, student, teacher)} must be maps (B, C, H, W) of the same batch; "
            "capture them before they are pooled and flattened"
        )
    if advice is not None and student.shape[1] != teacher.shape[1]:
        raise ValueError(f"{_both(owner, student, teacher)} must have as many channels; {advice}")


def _both(owner: object, student: Tensor, teacher: Tensor) -> str:
    shapes = f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)}"
    return f"{type(owner).__name__}: {shapes}"
