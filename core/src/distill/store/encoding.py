"""Tensors of a batch <-> rows of bytes, one of the same width for each sample."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from distill.errors import DataError
from distill.store_settings import Encoding, Store

Kept = Encoding | None
"""How a tensor is kept; ``None`` for the bytes of whole numbers as they are."""
LOGITS = 2
"""Dimensions of logits (B, C)."""
MOST_SHORT = 2**16
"""Classes that two bytes can tell apart."""
SMALLEST = 1e-30
"""Range of values below which int8 keeps them as one."""


@dataclass(frozen=True)
class Field:
    """One tensor in a row.

    Attributes:
        name: of the value.
        shape: behind the first dimension, which is that of the batch.
        dtype: it is decoded to, as ``float32``.
        kept: how.
        width: bytes.
        each: so many entries of the first dimension belong to a sample, of several views of it.
        top: logits kept, for ``top_k``.
        temperature: at which the mass of the other classes is kept, for ``top_k``.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    kept: Kept
    width: int
    each: int = 1
    top: int = 0
    temperature: float = 1.0


@dataclass(frozen=True)
class Layout:
    """What a row holds, one field after the other."""

    fields: tuple[Field, ...]

    @property
    def width(self) -> int:
        """Bytes a row."""
        return sum(field.width for field in self.fields)

    def plain(self) -> list[dict[str, Any]]:
        """Return the same as plain data."""
        return [{**asdict(field), "shape": list(field.shape)} for field in self.fields]

    @classmethod
    def of_plain(cls, given: Sequence[Mapping[str, Any]]) -> Layout:
        """Read what ``plain`` gives."""
        return cls(tuple(Field(**{**f, "shape": tuple(f["shape"])}) for f in given))


def layout(tensors: Mapping[str, Tensor], logits: str, samples: int, store: Store) -> Layout:
    """Return how the tensors of a batch are kept.

    Args:
        tensors: by name, each (B * m, ...) for a batch of B samples.
        logits: the name that ``top_k`` is for.
        samples: B.
        store: what the file asks for.

    Raises:
        DataError: if a tensor does not part by samples.
    """
    return Layout(
        tuple(
            _field(name, tensor, samples, store, is_logits=name == logits)
            for name, tensor in tensors.items()
        )
    )


def _field(name: str, tensor: Tensor, samples: int, store: Store, *, is_logits: bool) -> Field:
    if tensor.dim() == 0 or tensor.shape[0] % samples:
        raise DataError(
            f"'{name}' has the shape {tuple(tensor.shape)} for a batch of {samples}, which does "
            "not part by samples; a store keeps what begins with the dimension of the batch"
        )
    each, shape = tensor.shape[0] // samples, tuple(tensor.shape[1:])
    count = each * math.prod(shape)
    if not tensor.is_floating_point():
        dtype = str(tensor.dtype).removeprefix("torch.")
        return Field(name, shape, dtype, None, count * tensor.element_size(), each)
    if store.encoding == "top_k" and is_logits:
        classes = tensor.shape[-1]
        if tensor.dim() != LOGITS or each > 1 or classes <= store.top:
            raise DataError(
                f"'{name}' has the shape {tuple(tensor.shape)}; encoding top_k is for logits "
                f"(B, C) of more than top: {store.top} classes; write a smaller top, or float16"
            )
        index = 2 if classes <= MOST_SHORT else 4
        width = store.top * (2 + index) + 2
        return Field(name, shape, "float32", "top_k", width, 1, store.top, store.temperature)
    kept: Encoding = "float16" if store.encoding == "top_k" else store.encoding
    width = {"float16": 2 * count, "float32": 4 * count, "int8": count + 8}[kept]
    return Field(name, shape, "float32", kept, width, each)


def encode(form: Layout, tensors: Mapping[str, Tensor], samples: int) -> Tensor:
    """Return the rows of a batch, uint8 (B, width), on the device of the tensors.

    Raises:
        DataError: if a tensor has another shape than that of the layout.
    """
    parts = []
    for field in form.fields:
        tensor = tensors[field.name]
        expected = (samples * field.each, *field.shape)
        if tuple(tensor.shape) != expected:
            raise DataError(
                f"'{field.name}' has the shape {tuple(tensor.shape)} for a batch of {samples}, "
                f"where the store has {expected}; it keeps values of one shape only"
            )
        flat = tensor.detach().reshape(samples, -1)
        parts.append(_bytes(_encoded(field, flat)))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _encoded(field: Field, flat: Tensor) -> list[Tensor]:
    if field.kept is None:
        return [flat]
    values = flat.float()
    if field.kept == "float32":
        return [values]
    if field.kept == "float16":
        return [values.half()]
    if field.kept == "int8":
        low, high = values.aminmax(dim=1, keepdim=True)
        scale = (high - low).clamp_min(SMALLEST) / 255
        return [low, scale, ((values - low) / scale).round_().clamp_(0, 255).to(torch.uint8)]
    top, index = values.topk(field.top, dim=1)
    rest = values.scatter(1, index, -math.inf).div_(field.temperature).logsumexp(1, keepdim=True)
    others = math.log(values.shape[1] - field.top)
    return [
        _as_short(index, values.shape[1]),
        top.half(),
        ((rest - others) * field.temperature).half(),
    ]


def _as_short(index: Tensor, classes: int) -> Tensor:
    if classes > MOST_SHORT:
        return index.int()
    return (index - (index >= MOST_SHORT // 2) * MOST_SHORT).to(torch.int16)


def _bytes(parts: list[Tensor]) -> Tensor:
    as_bytes = [part.contiguous().view(torch.uint8) for part in parts]
    return as_bytes[0] if len(as_bytes) == 1 else torch.cat(as_bytes, 1)


def is_lost(form: Layout, tensors: Mapping[str, Tensor], rows: Tensor) -> Tensor:
    """Return whether a value is not kept that should be, a bool where the rows are.

    That is a finite one beyond what float16 holds, or one that is not finite under int8.
    """
    lost, offset = torch.zeros((), dtype=torch.bool, device=rows.device), 0
    for field in form.fields:
        part = rows[:, offset : offset + field.width]
        values = tensors[field.name].detach().reshape(len(rows), -1)
        if field.kept == "int8":
            lost = lost | ~values.isfinite().all()
        elif field.kept == "float16":
            lost = lost | _overflow(values, part)
        elif field.kept == "top_k":
            index, halves = _parts_of_top(field, part)
            # The mass of the others is finite wherever the largest of them is.
            others = values.scatter(1, index, -math.inf).amax(1, keepdim=True)
            lost = lost | _overflow(torch.cat([values.gather(1, index), others], 1), halves)
        offset += field.width
    return lost


def _overflow(values: Tensor, halves: Tensor) -> Tensor:
    """Return whether any finite value is no finite half, as a bool."""
    return (values.isfinite() & ~_as(halves, torch.half).isfinite()).any()


def decode(form: Layout, rows: Tensor) -> dict[str, Tensor]:
    """Return the tensors of a batch from its rows, uint8 (B, width); floating-point as float32."""
    tensors, offset = {}, 0
    for field in form.fields:
        part = rows[:, offset : offset + field.width]
        tensors[field.name] = _decoded(field, part)
        offset += field.width
    return tensors


def _decoded(field: Field, part: Tensor) -> Tensor:
    samples = len(part)
    if field.kept is None:
        flat = _as(part, getattr(torch, field.dtype))
    elif field.kept == "float32":
        flat = _as(part, torch.float32)
    elif field.kept == "float16":
        flat = _as(part, torch.half).float()
    elif field.kept == "int8":
        low, scale = _as(part[:, :8], torch.float32).split(1, dim=1)
        flat = part[:, 8:].float() * scale + low
    else:
        flat = _from_top(field, part)
    return flat.reshape(samples * field.each, *field.shape)


def _from_top(field: Field, part: Tensor) -> Tensor:
    index, halves = _parts_of_top(field, part)
    logits = _as(halves, torch.half).float()
    return logits[:, -1:].expand(-1, field.shape[-1]).scatter(1, index, logits[:, :-1])


def _parts_of_top(field: Field, part: Tensor) -> tuple[Tensor, Tensor]:
    """Return the numbers of the classes kept, and the bytes of their logits and of the rest."""
    short = field.shape[-1] <= MOST_SHORT
    at = field.top * (2 if short else 4)
    index = _as(part[:, :at], torch.int16 if short else torch.int32).long()
    return index.where(index >= 0, index + MOST_SHORT), part[:, at:]


def _as(part: Tensor, dtype: torch.dtype) -> Tensor:
    is_aligned = part.storage_offset() % dtype.itemsize == 0
    if not is_aligned or part.stride(0) != part.shape[1]:
        part = part.clone(memory_format=torch.contiguous_format)
    return part.view(dtype)
