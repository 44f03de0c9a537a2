"""What shapes features must have: refused with one sentence where they cannot be compared."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from distill_fitnet.parameters import check

Channels = int | Sequence[int] | None
"""Channels of one feature, or of each of several layers' features, or not known yet."""


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


def as_map(owner: object, features: Tensor) -> Tensor:
    """Return a feature that is a map (B, C, H, W); refuse any other shape."""
    if features.ndim != 4:
        raise ValueError(
            f"{type(owner).__name__}: features must be maps (B, C, H, W), "
            f"got {tuple(features.shape)}"
        )
    return features


def check_same(owner: object, student: Tensor, teacher: Tensor, advice: str) -> None:
    """Refuse features of student and teacher that differ in shape."""
    if student.shape != teacher.shape:
        raise ValueError(
            f"{type(owner).__name__}: student {tuple(student.shape)} and teacher "
            f"{tuple(teacher.shape)} must have the same shape; {advice}"
        )


def check_maps(owner: object, student: Tensor, teacher: Tensor, advice: str | None = None) -> None:
    """Refuse features that are no maps (B, C, H, W) of the same samples.

    Args:
        owner: whose class the message names.
        student, teacher: the features.
        advice: what to do where the channels differ; ``None`` if they may.
    """
    fits = student.ndim == teacher.ndim == 4 and len(student) == len(teacher)
    if fits and (advice is None or student.shape[1] == teacher.shape[1]):
        return
    wanted = "maps (B, C, H, W)" if advice is None else "maps (B, C, H, W) of as many channels"
    raise ValueError(
        f"{type(owner).__name__}: student {tuple(student.shape)} and teacher "
        f"{tuple(teacher.shape)} must be {wanted}" + (f"; {advice}" if fits else "")
    )
