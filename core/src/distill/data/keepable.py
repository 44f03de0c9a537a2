"""What of a data set's transforms is applied once, before it is kept, and what to batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.data import default_collate

from distill import randomness
from distill.data.batch import Views, collate
from distill.data.batched import BatchedTransform
from distill.data.draw_probe import has_drawn, restart_generators
from distill.data.kept import OneByOne, Whole
from distill.data.source import Source
from distill.errors import DataError

Transform = Callable[[Any], Any]
TRIED = 4
"""Samples that are looked at to find out what draws."""


class NotKeepable(ValueError):
    """A data set cannot be kept in memory; the message says why and what to do."""


@dataclass(frozen=True)
class Split:
    """What samples go through before they are kept, and what batches of them go through."""

    before: Sequence[int]
    steps: Sequence[Whole | OneByOne]


def split(source: Source) -> Split:
    """Find the transforms that can be applied once: those in front that draw nothing.

    They end before the first that draws, or that makes floats of what are none, which would take
    four times the memory. One that makes tensors of images comes among them from behind transforms
    that have a batched form, since those take tensors as well.

    Raises:
        NotKeepable: if the data set or a joint transform draws, batches are put together by a
            collate function of their own, or inputs are no tensors before the first that draws.
        DataError: if a sample cannot be read.
    """
    if source.collate is not collate:
        raise NotKeepable(
            f"data set '{source.name}' has a collate function, and what is in memory is put "
            "together without one"
        )
    with randomness.seeded(0, "keep"):
        values = _inputs(source)
        forms = [*source.batched, *[None] * (len(source.transforms) - len(source.batched))]
        before: list[int] = []
        for number, transform in enumerate(source.transforms):
            drew, given = _tried(source, transform, values)
            if drew or (_are_floats(given) and not _are_floats(values)):
                break
            before, values = [*before, number], given
        left = [number for number in range(len(source.transforms)) if number not in before]
        made = _converted(source, forms, left, values)
        if made is not None:
            number, values = made
            before.append(number)
            left.remove(number)
        _refuse_unless_kept(source, left, values)
        return Split(before, _steps(source, forms, left, values))


def _inputs(source: Source) -> list[Any]:
    """Return inputs of a few samples from all over the data set, after the joint transforms."""
    count = len(source)
    inputs: list[Any] = []
    failed: DataError | None = None
    for index in dict.fromkeys(number * (count - 1) // TRIED for number in range(TRIED + 1)):
        restart_generators()
        try:
            sample = source.untransformed(index)
            if has_drawn():
                raise NotKeepable(
                    f"data set '{source.name}' itself draws random numbers when a sample is read, "
                    "so that there is nothing to keep"
                )
            bare = replace(source, transforms=(), batched=())
            sample = bare.transformed(sample, index)
        except DataError as error:
            failed = error
            continue
        if has_drawn():
            raise NotKeepable(
                f"a joint transform of data set '{source.name}' draws random numbers; they are "
                "applied to one sample at a time, as it is read"
            )
        inputs += sample.input if isinstance(sample.input, Views) else [sample.input]
    if not inputs and failed is not None:
        raise failed
    return inputs


def _tried(source: Source, transform: Transform, values: Sequence[Any]) -> tuple[bool, list[Any]]:
    """Return whether a transform draws for one of the values, and what it makes of them."""
    drew, given = False, []
    for value in values:
        restart_generators()
        try:
            given.append(transform(value))
        except Exception as error:  # a plugin's
            raise DataError(
                f"data set '{source.name}': {transform_name(transform)} fails on a sample: "
                f"{type(error).__name__}: {error}"
            ) from error
        drew |= has_drawn()
    return drew, given


def _converted(
    source: Source,
    forms: Sequence[BatchedTransform | None],
    left: Sequence[int],
    values: Sequence[Any],
) -> tuple[int, list[Any]] | None:
    """Return the transform that makes tensors of images, if none of those before minds."""
    if _is_tensor(values[0]):
        return None
    for number in left:
        form = forms[number]
        if form is None:
            return None
        if form.pointwise and form.draws == 0:
            try:
                drew, given = _tried(source, source.transforms[number], values)
            except DataError:
                continue  # one that is for tensors
            if not drew and all(map(_is_tensor, given)) and not _are_floats(given):
                return number, given
    return None


def _refuse_unless_kept(source: Source, left: Sequence[int], values: Sequence[Any]) -> None:
    try:
        default_collate(list(values[:1]))
    except TypeError as error:
        kind = f"{type(values[0]).__module__.split('.')[0]} {type(values[0]).__name__}"
        where, mend = "", f"write transforms: [ToImage] for data set '{source.name}'"
        if left:
            where = f" before its transform {transform_name(source.transforms[left[0]])}"
            mend = "put ToImage in front of it"
        raise NotKeepable(
            f"samples of data set '{source.name}' are no tensors{where} (they are {kind}), so that "
            f"they cannot be kept as one; {mend}"
        ) from error


def _steps(
    source: Source,
    forms: Sequence[BatchedTransform | None],
    left: Sequence[int],
    values: Sequence[Any],
) -> list[Whole | OneByOne]:
    """Put what is left into runs: of batched forms, and of transforms without."""
    steps: list[Whole | OneByOne] = []
    value = values[0]
    for number in left:
        transform, form = source.transforms[number], forms[number]
        name, last = transform_name(transform), steps[-1] if steps else None
        if form is not None and form.takes(value):
            if isinstance(last, Whole):
                steps[-1] = Whole([*last.transforms, form], [*last.names, name])
            else:
                steps.append(Whole([form], [name]))
        elif isinstance(last, OneByOne):
            steps[-1] = replace(
                last, transforms=[*last.transforms, transform], names=[*last.names, name]
            )
        else:
            steps.append(OneByOne([transform], [name], type(value)))
        _, (value,) = _tried(source, transform, [value])
    return steps


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _are_floats(values: Sequence[Any]) -> bool:
    return any(isinstance(v, torch.Tensor) and v.is_floating_point() for v in values)


def transform_name(transform: Any) -> str:
    """Return the name of a function, or of a transform's class."""
    return getattr(transform, "__name__", type(transform).__name__)
