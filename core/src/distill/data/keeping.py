"""Reading a data set into memory: its samples, as they are before what draws."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from distill import memory
from distill.data.batch import Batch, Sample, Views, collate, map_tensors
from distill.data.draw_probe import has_drawn
from distill.data.keepable import NotKeepable, Split, Transform, transform_name
from distill.data.kept import Kept, OneByOne, Whole
from distill.data.loader import Loading, every_sample
from distill.data.source import Source
from distill.errors import DataError

CHUNK = 64
"""Samples that are read at a time."""
DRAWS = "draws random numbers, which it did not for other samples"


def keep(source: Source, chosen: Split, loading: Loading, device: torch.device) -> Kept:
    """Read a data set and keep it: on a GPU where it fits beside the models, else on the host.

    Raises:
        NotKeepable: if there is not enough memory; the message says how much is missing.
        DataError: if samples cannot be read, differ in shape, or draw.
    """
    names = [transform_name(source.transforms[number]) for number in chosen.before]
    still: list[Transform] = [source.transforms[number] for number in chosen.before]
    reading = replace(
        source,
        transforms=[*still, _Checked()],
        collate=_Alike(),
        batched=(),
    )
    store: _Store | None = None
    bad: dict[int, str] = {}
    loading = replace(loading, pin_memory=False)
    for batch in every_sample(reading, CHUNK, loading):
        bad.update(batch.skipped)
        if len(batch):
            store = store or _Store.like(source, batch, chosen, device)
            store.put(batch)
    for why in bad.values():
        if DRAWS in why:
            raise DataError(why)
    if store is None:
        raise DataError(f"data set '{source.name}': no sample can be read")
    own = {name: getattr(source, name) for name in Source.__dataclass_fields__}
    return Kept(
        **own,
        inputs=store.inputs,
        targets=store.targets,
        extras=store.extras,
        views=store.views,
        bad=bad,
        steps=chosen.steps,
        before=names,
        nbytes=store.nbytes,
        device=store.device,
    )


@dataclass
class _Store:
    """Room for all samples, filled bit by bit."""

    name: str
    inputs: Any
    targets: Any
    extras: Any
    views: int
    nbytes: int
    device: torch.device

    @classmethod
    def like(cls, source: Source, batch: Batch, chosen: Split, device: torch.device) -> _Store:
        """Make room for as many samples as there are, each like those of a first batch."""
        count, size = len(source), len(batch)
        parts = (batch.inputs, batch.targets, dict(batch.extras))
        nbytes = sum(t.nbytes // size for t in _tensors(parts)) * count
        place = device if _fits(nbytes, device, chosen.steps) else torch.device("cpu")
        try:
            memory.claim(
                nbytes,
                place,
                f"the {count:,} samples of data set '{source.name}' in memory",
                "set data.in_memory: false, or make the samples smaller before what draws",
            )
        except ValueError as error:
            raise NotKeepable(str(error)) from error
        inputs, targets, extras = (_room(part, size, count, place) for part in parts)
        views = len(batch.inputs) // size if isinstance(batch.inputs, torch.Tensor) else 1
        return cls(source.name, inputs, targets, extras, views, nbytes, place)

    def put(self, batch: Batch) -> None:
        """Put samples where they belong."""
        rows = batch.index.to(self.device)
        of_inputs = rows
        if self.views > 1:
            views = torch.arange(self.views, device=self.device)
            of_inputs = (rows[:, None] * self.views + views).flatten()
        try:
            _fill(self.inputs, batch.inputs, of_inputs)
            _fill(self.targets, batch.targets, rows)
            _fill(self.extras, dict(batch.extras), rows)
        except (RuntimeError, LookupError, TypeError, ValueError) as error:
            raise DataError(_unlike(self.name, str(error).split("\n")[0])) from error


def _fits(nbytes: int, device: torch.device, steps: Sequence[Whole | OneByOne]) -> bool:
    """Whether samples are to lie on a GPU: half of it is left, and no single sample is handled."""
    if device.type != "cuda" or any(isinstance(step, OneByOne) for step in steps):
        return False
    free = memory.free_memory(device)
    return free is not None and 2 * nbytes <= free


class _Checked:
    """The last transform of a sample, which finds out whether anything has been drawn for it."""

    def __call__(self, value: Any) -> Any:
        if has_drawn():
            raise ValueError(DRAWS)
        return value


class _Alike:
    """The default collate, telling samples apart that cannot be kept as one tensor."""

    def __call__(self, samples: list[Sample]) -> Batch:
        shapes = [
            tuple(value.shape)
            for sample in samples
            for value in (sample.input if isinstance(sample.input, Views) else [sample.input])
            if isinstance(value, torch.Tensor)
        ]
        other = next((shape for shape in shapes if shape != shapes[0]), None)
        if other is not None:
            raise ValueError(_differ(f"{shapes[0]} and {other}"))
        return collate(samples)


def _differ(what: str) -> str:
    return (
        f"data.in_memory keeps them as one tensor, and they differ before augmentation ({what}); "
        "begin the transforms with a Resize to one size, height and width, or set "
        "data.in_memory: false"
    )


def _unlike(name: str, what: str) -> str:
    return f"data set '{name}': samples cannot be kept: {_differ(what)}"


def _room(value: Any, size: int, count: int, device: torch.device) -> Any:
    """Return the like of ``size`` samples' values for ``count`` samples."""
    if isinstance(value, torch.Tensor):
        rows = len(value) // size * count
        return torch.zeros((rows, *value.shape[1:]), dtype=value.dtype, device=device)
    if isinstance(value, Mapping):
        return {key: _room(item, size, count, device) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        if value and all(isinstance(item, (str, bytes)) for item in value):
            return [type(value[0])()] * count
        parts = [_room(item, size, count, device) for item in value]
        return type(value)(*parts) if hasattr(value, "_fields") else parts
    return value


def _fill(room: Any, value: Any, rows: torch.Tensor) -> None:
    if isinstance(room, torch.Tensor):
        if room.dtype != value.dtype:
            raise TypeError(f"{room.dtype} and {value.dtype}")
        if room.shape[1:] != value.shape[1:]:
            raise ValueError(f"{tuple(room.shape[1:])} and {tuple(value.shape[1:])}")
        room[rows] = value.to(room.device)
    elif isinstance(room, Mapping):
        for key in room:
            _fill(room[key], value[key], rows)
    elif isinstance(room, list) and room and isinstance(room[0], (str, bytes)):
        for row, item in zip(rows.tolist(), value, strict=True):
            room[row] = item
    elif isinstance(room, (list, tuple)):
        for own, item in zip(room, value, strict=True):
            _fill(own, item, rows)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    found: list[torch.Tensor] = []
    map_tensors(lambda tensor: found.append(tensor) or tensor, value)  # type: ignore[func-returns-value]
    yield from found
