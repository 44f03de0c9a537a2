"""Reading a data set into memory: what of its transforms is applied once, and what to batches."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy
import torch
from torch.utils.data import Dataset, default_collate

from distill import memory, randomness
from distill.data.batch import Batch, Sample, Views, collate, map_tensors
from distill.data.batched import BatchedTransform
from distill.data.kept import Kept, OneByOne, Whole
from distill.data.loader import Loading, every_sample
from distill.data.source import Source
from distill.errors import DataError

Transform = Callable[[Any], Any]
CHUNK = 64
"""Samples that are read at a time."""
TRIED = 4
"""Samples that are looked at to find out what draws."""
DRAWS = "draws random numbers, which it did not for other samples"


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


def keep(source: Source, chosen: Split, loading: Loading, device: torch.device) -> Kept:
    """Read a data set and keep it: on a GPU where it fits beside the models, else on the host.

    Raises:
        NotKeepable: if there is not enough memory; the message says how much is missing.
        DataError: if samples cannot be read, differ in shape, or draw.
    """
    names = [_name(source.transforms[number]) for number in chosen.before]
    still: list[Transform] = [source.transforms[number] for number in chosen.before]
    reading = replace(
        source,
        dataset=_Still(source.dataset),
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


def _inputs(source: Source) -> list[Any]:
    """Return inputs of a few samples from all over the data set, after the joint transforms."""
    count = len(source)
    inputs: list[Any] = []
    failed: DataError | None = None
    for index in dict.fromkeys(number * (count - 1) // TRIED for number in range(TRIED + 1)):
        _restart()
        try:
            sample = source.untransformed(index)
            if _moved():
                raise NotKeepable(
                    f"data set '{source.name}' itself draws random numbers when a sample is read, "
                    "so that there is nothing to keep"
                )
            bare = replace(source, transforms=(), batched=())
            sample = bare.transformed(sample, index)
        except DataError as error:
            failed = error
            continue
        if _moved():
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
        _restart()
        try:
            given.append(transform(value))
        except Exception as error:  # a plugin's
            raise DataError(
                f"data set '{source.name}': {_name(transform)} fails on a sample: "
                f"{type(error).__name__}: {error}"
            ) from error
        drew |= _moved()
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
            where = f" before its transform {_name(source.transforms[left[0]])}"
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
        name, last = _name(transform), steps[-1] if steps else None
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


def _fits(nbytes: int, device: torch.device, steps: Sequence[Whole | OneByOne]) -> bool:
    """Whether samples are to lie on a GPU: half of it is left, and no single sample is handled."""
    if device.type != "cuda" or any(isinstance(step, OneByOne) for step in steps):
        return False
    free = memory.free_memory(device)
    return free is not None and 2 * nbytes <= free


class _Still(Dataset[Any]):
    """A data set with the generators set to a known place before a sample is read."""

    def __init__(self, dataset: Any):
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Any:
        _restart()
        return self._dataset[index]


class _Checked:
    """The last transform of a sample, which finds out whether anything has been drawn for it."""

    def __call__(self, value: Any) -> Any:
        if _moved():
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


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _are_floats(values: Sequence[Any]) -> bool:
    return any(isinstance(v, torch.Tensor) and v.is_floating_point() for v in values)


def _name(transform: Any) -> str:
    return getattr(transform, "__name__", type(transform).__name__)


def _restart() -> None:
    """Set all generators that data may draw from to a known place."""
    torch.default_generator.manual_seed(0)
    random.seed(0)
    numpy.random.seed(0)


def _next_numbers() -> tuple[float, float, float]:
    return torch.rand(()).item(), random.random(), float(numpy.random.rand())


@functools.cache
def _first_numbers() -> tuple[float, float, float]:
    _restart()
    return _next_numbers()


def _moved() -> bool:
    """Whether anything has been drawn since ``_restart``, which is done again."""
    moved = _next_numbers() != _first_numbers()
    _restart()
    return moved
