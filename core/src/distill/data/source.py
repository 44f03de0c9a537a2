"""A named data set with its transforms: what one sample is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import takewhile
from typing import Any, cast

import torch

from distill.data.batch import Batch, Sample, Views, collate
from distill.data.batched import BatchedTransform
from distill.errors import DataError


@dataclass(frozen=True)
class Source:
    """A named data set, ready to be read.

    Attributes:
        name: its name in the experiment file.
        dataset: items are ``(input, target)`` or ``Sample``.
        transforms: applied to the input in order, or to each of its views.
        joint_transforms: applied to input and target together, before ``transforms``.
        collate: puts samples together.
        batched: the form of each transform for whole batches, ``None`` where it has none.
    """

    name: str
    dataset: Any
    transforms: Sequence[Callable[[Any], Any]] = ()
    joint_transforms: Sequence[Callable[[Any, Any], tuple[Any, Any]]] = ()
    collate: Callable[[list[Sample]], Batch] = collate
    batched: Sequence[BatchedTransform | None] = ()

    def __len__(self) -> int:
        return len(cast(Sized, self.dataset))

    @property
    def classes(self) -> list[str] | None:
        """Names of the classes if the data set tells them."""
        classes = getattr(self.dataset, "classes", None)
        if isinstance(classes, (list, tuple)) and all(isinstance(c, str) for c in classes):
            return list(classes)
        return None

    @cached_property
    def late(self) -> Sequence[BatchedTransform]:
        """The last transforms, as far as a batch can go through them in place of its samples.

        It gets the same bits; so bytes, not floats, go from a loader's worker to the device.
        """
        if self.collate is not collate:
            return ()
        last = takewhile(lambda form: form is not None and form.pointwise, reversed(self.batched))
        return [form for form in last if form is not None][::-1]

    def read(self, index: int) -> Sample:
        """Return one sample, transformed.

        Raises:
            DataError: if the data set or a transform fails; the message names the sample.
        """
        return self.transformed(self.untransformed(index), index)

    def untransformed(self, index: int) -> Sample:
        """Return one sample as the data set gives it.

        Raises:
            DataError: if it cannot be read; the message names the sample.
        """
        with self._told(index):
            sample = _sample(self.dataset[index])
        return replace(sample, index=index)

    @cached_property
    def reads_together(self) -> bool:
        """Whether the data set has a way to read several samples at once."""
        try:
            return _reads_together(self.dataset)
        except Exception:  # of a plugin's property
            return False

    def untransformed_together(self, indices: Sequence[int]) -> dict[int, Sample]:
        """Return different samples as the data set gives them when asked for all at once.

        Raises:
            DataError: if it fails or gives no list of as many items. Each is then to be read by
                itself, which tells which of them is bad.
        """
        try:
            items = self.dataset.__getitems__(list(indices))
            samples = [_sample(item) for item in items] if isinstance(items, list) else []
        except Exception as error:  # a plugin's
            raise DataError(f"{type(error).__name__}: {error}".rstrip(": ")) from error
        if len(samples) != len(indices):
            raise DataError("it gives no list of as many items")
        return {
            index: replace(sample, index=index)
            for index, sample in zip(indices, samples, strict=True)
        }

    def transformed(self, sample: Sample, index: int) -> Sample:
        """Return a sample of the data set, transformed.

        Raises:
            DataError: if a transform fails; the message names the sample.
        """
        return self._through(self.transforms, self._joined(sample, index))

    def begun(self, sample: Sample, index: int) -> tuple[Sample, int]:
        """Return a sample of the data set up to those ``late`` transforms that can be left.

        Returns:
            The sample, and how many transforms are left: those from where it is a tensor.

        Raises:
            DataError: if a transform fails; the message names the sample.
        """
        left = len(self.late)
        first = len(self.transforms) - left
        sample = self._through(self.transforms[:first], self._joined(sample, index))
        while left and not self._taken(self.late[-left:], sample.input):
            sample = self.finished(sample, left, 1)
            left -= 1
        return sample, left

    def finished(self, sample: Sample, left: int, count: int | None = None) -> Sample:
        """Return a sample for which ``left`` transforms are left, after them or ``count`` of them.

        Raises:
            DataError: if a transform fails; the message names the sample.
        """
        first = len(self.transforms) - left
        last = len(self.transforms) if count is None else first + count
        return self._through(self.transforms[first:last], sample)

    @staticmethod
    def _taken(forms: Sequence[BatchedTransform], value: Any) -> bool:
        values = value if isinstance(value, Views) else (value,)
        return all(form.takes(one) for form in forms for one in values)

    def _joined(self, sample: Sample, index: int) -> Sample:
        value, target = sample.input, sample.target
        with self._told(index):
            for joint in self.joint_transforms:
                value, target = joint(value, target)
        return replace(sample, input=value, target=target, index=index)

    def _through(self, transforms: Sequence[Callable[[Any], Any]], sample: Sample) -> Sample:
        with self._told(sample.index):
            if isinstance(sample.input, Views):
                value: Any = Views(_one(transforms, view) for view in sample.input)
            else:
                value = _one(transforms, sample.input)
        return replace(sample, input=value)

    @contextmanager
    def _told(self, index: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise DataError(
                f"data set '{self.name}': sample {index} cannot be read: "
                f"{type(error).__name__}: {error}"
            ) from error


def alike(samples: Sequence[Sample]) -> bool:
    """Whether the inputs of all samples, or their views, are tensors of one type and shape."""
    kinds = {
        (value.dtype, value.shape) if isinstance(value, torch.Tensor) else None
        for sample in samples
        for value in (sample.input if isinstance(sample.input, Views) else (sample.input,))
    }
    return len(kinds) == 1 and None not in kinds


def _sample(item: Any) -> Sample:
    return item if isinstance(item, Sample) else Sample(item[0], item[1])


def _reads_together(dataset: Any) -> bool:
    """Whether a data set has a ``__getitems__`` that gives what its ``__getitem__`` does.

    A class with a ``__getitem__`` of its own that only inherits ``__getitems__``, or hands on that
    of what it wraps by ``__getattr__``, would give other items. A subset reads as its whole does.
    """
    both = {"__getitem__", "__getitems__"}
    nearest = next((kind for kind in type(dataset).__mro__ if both & {*vars(kind)}), object)
    if "__getitems__" not in vars(nearest) or not callable(getattr(dataset, "__getitems__", None)):
        return False
    is_part = hasattr(dataset, "dataset") and hasattr(dataset, "indices")
    return not is_part or _reads_together(dataset.dataset)


def _one(transforms: Sequence[Callable[[Any], Any]], value: Any) -> Any:
    for transform in transforms:
        value = transform(value)
    return value
