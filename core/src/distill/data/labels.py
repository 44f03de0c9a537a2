"""The class label of every sample of a data set, without loading its inputs where possible."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from distill.data.batch import Sample
from distill.errors import DataError

ATTRIBUTES = ("targets", "labels", "_labels", "y")
"""Where data sets keep their labels, in the order in which they are asked."""


def labels(dataset: Any, *, read: bool = True) -> list[int]:
    """Return the class label of each sample, in the order of the data set.

    They come from the first attribute among ``targets``, ``labels``, ``_labels`` and ``y`` that
    holds one whole number a sample (a list, tensor or array). A data set with a
    ``target_transform`` is not asked, since its items may differ. A data set that has a ``dataset``
    and ``indices`` into it, as ``torch.utils.data.Subset``, has the labels of that one.

    Args:
        dataset: items are ``(input, target)`` or ``Sample``.
        read: where no attribute tells, whether to read every item.

    Raises:
        DataError: if an item cannot be read or its target is no whole number, or if nothing could
            be told without reading.
    """
    known = _known(dataset)
    if known is not None:
        return known
    if not read:
        raise DataError(f"{type(dataset).__name__} does not tell its labels without being read")
    return [_read(dataset, index) for index in range(len(dataset))]


def _known(dataset: Any) -> list[int] | None:
    if getattr(dataset, "target_transform", None) is None:
        for name in ATTRIBUTES:
            found = _whole_numbers(getattr(dataset, name, None))
            if found is not None and len(found) == len(dataset):
                return found
    wrapped, indices = getattr(dataset, "dataset", None), getattr(dataset, "indices", None)
    if wrapped is None or indices is None:
        return None
    of_all = _known(wrapped)
    return None if of_all is None else [of_all[int(index)] for index in indices]


def _whole_numbers(values: Any) -> list[int] | None:
    """Return a list, tensor or array of whole numbers as a list of ``int``; ``None`` otherwise."""
    values = _plain(values)
    if not isinstance(values, (list, tuple)):
        return None
    # To unwrap a million numbers one by one takes a fifth of a second.
    numbers = values if _are_whole(values) else [_plain(value) for value in values]
    return list(numbers) if _are_whole(numbers) else None


def _are_whole(values: Iterable[Any]) -> bool:
    return set(map(type, values)) <= {int}


def _plain(value: Any) -> Any:
    """Turn a tensor, an array or one of their numbers into plain Python."""
    return value.tolist() if hasattr(value, "tolist") else value


def _read(dataset: Any, index: int) -> int:
    name = type(dataset).__name__
    try:
        item = dataset[index]
        target = _plain(item.target if isinstance(item, Sample) else item[1])
    except Exception as error:
        raise DataError(
            f"{name}: sample {index} cannot be read: {type(error).__name__}: {error}"
        ) from error
    if type(target) is not int:
        raise DataError(
            f"{name} has no class labels: the target of sample {index} must be a whole number, "
            f"got {_described(target)}"
        )
    return target


def _described(target: Any) -> str:
    if target is None:
        return "none"
    if isinstance(target, (bool, float, str)):
        return f"{target!r}"
    return f"a {type(target).__name__}"
