"""What a stage asks of one teacher: taken from a store where it is there, put there where not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor

from distill.data.batch import Batch
from distill.errors import DataError
from distill.model.wiring import Address, Values
from distill.randomness import derive
from distill.store.encoding import Layout, decode, encode, is_lost, layout
from distill.store.rows import Rows
from distill.store_settings import Store

Structure = Any
"""A value in which every tensor is replaced by its name: text, lists, dicts and ``None``."""


class StoredRows(NamedTuple):
    """What a store has for a batch.

    Attributes:
        rows: uint8 (B, width); where ``missing``, they hold anything.
        missing: bool (B,), ``None`` if none is.
        at: int64 (B,), numbers of the rows.
        fingerprints: int64 (B,), of what the teacher is given.
    """

    rows: Tensor
    missing: Tensor | None
    at: Tensor
    fingerprints: Tensor


@dataclass(frozen=True)
class Form:
    """How what a stage asks of a teacher becomes a row, and what it asked comes of a row.

    Attributes:
        structures: name of a value -> its structure.
    """

    layout: Layout
    structures: Mapping[str, Structure]

    def plain(self) -> dict[str, Any]:
        """Return the same as plain data."""
        return {"fields": self.layout.plain(), "values": dict(self.structures)}

    @classmethod
    def of_plain(cls, given: Mapping[str, Any]) -> Form:
        """Read what ``plain`` gives."""
        return cls(Layout.of_plain(given["fields"]), given["values"])

    def encode(self, values: Values, samples: int) -> Tensor:
        """Return rows, uint8 (B, width).

        Raises:
            DataError: if the values are of another form.
        """
        tensors = self.tensors(values)
        return encode(self.layout, tensors, samples)

    def lost(self, values: Values, rows: Tensor) -> Tensor:
        """Return whether rows do not hold some of the values, a bool where those are."""
        return is_lost(self.layout, self.tensors(values), rows)

    def tensors(self, values: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the tensors that are kept of values, by the names of the layout."""
        tensors: dict[str, Tensor] = {}
        for name, structure in self.structures.items():
            _collect(structure, values[name], tensors)
        return tensors

    def decode(self, rows: Tensor) -> Values:
        """Return values by name, floating-point ones as float32."""
        tensors = decode(self.layout, rows)
        return {name: _rebuilt(s, tensors) for name, s in self.structures.items()}


def form_of(
    values: Values, addresses: Iterable[Address], role: str, samples: int, store: Store
) -> Form:
    """Return the form of what is read of a teacher at ``addresses``.

    Raises:
        DataError: if something else than tensors in lists and mappings is read, or a tensor does
            not part by samples.
    """
    tensors: dict[str, Tensor] = {}
    structures: dict[str, Structure] = {}
    for address in sorted(addresses, key=lambda a: (a.value, a.keys)):
        name = address.value + "".join(f".{key}" for key in address.keys)
        structure = _structure(address.read(values), name, tensors)
        if not address.keys:
            structures[address.value] = structure
        elif isinstance(structures.setdefault(address.value, {}), dict):
            _place(structures[address.value], address.keys, structure)
    return Form(layout(tensors, role, samples, store), structures)


def _structure(value: Any, name: str, tensors: dict[str, Tensor]) -> Structure:
    if value is None:
        return None
    if isinstance(value, Tensor):
        tensors[name] = value
        return name
    if isinstance(value, Mapping):
        return {str(k): _structure(item, f"{name}.{k}", tensors) for k, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_structure(item, f"{name}.{n}", tensors) for n, item in enumerate(value)]
    raise DataError(
        f"'{name}' is a {type(value).__name__}; a store keeps tensors, in lists and mappings too"
    )


def _place(around: dict[str, Structure], keys: Sequence[str], structure: Structure) -> None:
    *outer, last = keys
    for key in outer:
        around = around.setdefault(key, {})
    around[last] = structure


def _collect(structure: Structure, value: Any, tensors: dict[str, Tensor]) -> None:
    if isinstance(structure, str):
        tensors[structure] = value
    elif isinstance(structure, dict):
        for key, part in structure.items():
            in_mapping = isinstance(value, Mapping)
            _collect(part, value[key] if in_mapping else value[int(key)], tensors)
    elif isinstance(structure, list):
        for part, item in zip(structure, value, strict=True):
            _collect(part, item, tensors)


def _rebuilt(structure: Structure, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(structure, str):
        return tensors[structure]
    if isinstance(structure, dict):
        return {key: _rebuilt(part, tensors) for key, part in structure.items()}
    if isinstance(structure, list):
        return [_rebuilt(part, tensors) for part in structure]
    return None


@dataclass
class Outputs:
    """A teacher's outputs in a store, as one stage reads and writes them.

    Attributes:
        rows: on disk.
        views: of each sample there are so many rows.
        mixed: so many batch transforms there are, each of which mixes a sample with the one before.
        computed: rows that this process has computed and written.
        refused: rows that had been there, damaged or of another input.
    """

    rows: Rows
    form: Form
    views: int = 1
    mixed: int = 0
    computed: int = 0
    refused: int = 0
    _copies: list[_Copy] = field(default_factory=list)

    def find(self, batch: Batch, epoch: int = 0, number: int = 0) -> StoredRows:
        """Return what there is for a batch, which lies on the CPU with its fingerprints.

        Args:
            batch: as it has been read.
            epoch: of the stage; with ``number``, that of the batch, what transforms of batches draw
                depends on it.
            number: in the epoch.
        """
        assert batch.fingerprint is not None
        place = epoch % self.views, number
        taken = mixed_fingerprints(batch.fingerprint.numpy(), self.mixed, place)
        fingerprints = taken[batch.lead :]
        at = self._numbers(batch)[batch.lead :]
        found = self.rows.read(at, fingerprints.view(numpy.uint64))
        self.refused += found.refused
        is_whole = bool(found.valid.all())
        return StoredRows(
            torch.from_numpy(found.rows),
            None if is_whole else torch.from_numpy(~found.valid),
            torch.from_numpy(at),
            torch.from_numpy(fingerprints),
        )

    def first(self, count: int) -> StoredRows:
        """Return the first view of the first samples whatever their inputs are."""
        at = numpy.arange(count, dtype=numpy.int64) * self.views
        rows = torch.from_numpy(self.rows.rows[at])
        return StoredRows(rows, None, torch.from_numpy(at), torch.from_numpy(at))

    def _numbers(self, batch: Batch) -> Any:
        view = 0 if batch.view is None else batch.view.numpy()
        return batch.index.cpu().numpy() * self.views + view

    def take_refused(self) -> int:
        """Return how many rows did not fit since the last time."""
        refused, self.refused = self.refused, 0
        return refused

    def values(self, stored: StoredRows) -> Values:
        """Return what is stored for a batch of which nothing is missing."""
        return self.form.decode(stored.rows)

    def keep(self, stored: StoredRows, values: Values) -> Values:
        """Put what is missing into the store; return what it will be read as from now on.

        Raises:
            DataError: if the values do not have the form of those in the store.
        """
        missing = stored.missing
        assert missing is not None
        rows = self.form.encode(values, len(stored.at))
        merged = torch.where(missing[:, None], rows, stored.rows)
        self.flush()
        copy = _Copy.start(rows, missing, stored, self.form.lost(values, rows))
        if rows.device.type == "cpu":
            self._write(copy)
        else:
            self._copies.append(copy)
        return self.form.decode(merged)

    def flush(self) -> None:
        """Write what has been copied from the device meanwhile."""
        for copy in self._copies:
            copy.wait()
            self._write(copy)
        self._copies.clear()

    def _write(self, copy: _Copy) -> None:
        if copy.lost.item():
            raise DataError(
                "a teacher gives values that its store does not hold: beyond 65,504, the largest "
                "of float16, or infinite ones with int8; write store: {encoding: float32}"
            )
        chosen = copy.missing.numpy()
        at, fingerprints = copy.at.numpy()[chosen], copy.fingerprints.numpy()[chosen]
        self.rows.write(at, copy.rows.numpy()[chosen], fingerprints.view(numpy.uint64))
        self.computed += len(at)


@dataclass
class _Copy:
    """Rows on their way from a device: they are written a step later, so that no step waits."""

    rows: Tensor
    missing: Tensor
    at: Tensor
    fingerprints: Tensor
    lost: Tensor
    event: torch.cuda.Event | None

    @classmethod
    def start(cls, rows: Tensor, missing: Tensor, stored: StoredRows, lost: Tensor) -> _Copy:
        is_cuda = rows.device.type == "cuda"
        copied = _to_host(rows), _to_host(missing)
        places = _to_host(stored.at), _to_host(stored.fingerprints), _to_host(lost)
        event = torch.cuda.Event() if is_cuda else None
        if event is not None:
            event.record()
        return cls(*copied, *places, event)

    def wait(self) -> None:
        if self.event is not None:
            self.event.synchronize()


def _to_host(tensor: Tensor) -> Tensor:
    if tensor.device.type != "cuda":
        return tensor.cpu()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def mixed_fingerprints(fingerprints: Any, transforms: int, place: tuple[int, int] = (0, 0)) -> Any:
    """Return fingerprints of samples each of which is mixed with as many before it in its batch.

    Args:
        fingerprints: int64 (B,), of the samples in their order, the lead in front.
        transforms: of the batch.
        place: of the batch: which of the epochs that come again, and which batch of it.
    """
    if transforms == 0:
        return fingerprints
    unsigned = fingerprints.astype(numpy.uint64)
    mixed = unsigned + numpy.uint64(derive(0, *place))
    for before in range(1, transforms + 1):
        mixed = mixed * numpy.uint64(0x9E3779B97F4A7C15) + numpy.roll(unsigned, before)
    return mixed.view(numpy.int64)
