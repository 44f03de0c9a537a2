"""A named data set with its transforms: what one sample is."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass, replace
from typing import Any, cast

from distill.data.batch import Batch, Sample, Views, collate
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
    """

    name: str
    dataset: Any
    transforms: Sequence[Callable[[Any], Any]] = ()
    joint_transforms: Sequence[Callable[[Any, Any], tuple[Any, Any]]] = ()
    collate: Callable[[list[Sample]], Batch] = collate

    def __len__(self) -> int:
        return len(cast(Sized, self.dataset))

    @property
    def classes(self) -> list[str] | None:
        """Names of the classes if the data set tells them."""
        classes = getattr(self.dataset, "classes", None)
        if isinstance(classes, (list, tuple)) and all(isinstance(c, str) for c in classes):
            return list(classes)
        return None

    def read(self, index: int) -> Sample:
        """Return one sample, transformed.

        Raises:
            DataError: if the data set or a transform fails; the message names the sample.
        """
        try:
            item = self.dataset[index]
            sample = item if isinstance(item, Sample) else Sample(item[0], item[1])
            value, target = sample.input, sample.target
            for joint in self.joint_transforms:
                value, target = joint(value, target)
            if isinstance(value, Views):
                value = Views(self._transformed(view) for view in value)
            else:
                value = self._transformed(value)
        except Exception as error:
            raise DataError(
                f"data set '{self.name}': sample {index} cannot be read: "
                f"{type(error).__name__}: {error}"
            ) from error
        return replace(sample, input=value, target=target, index=index)

    def _transformed(self, value: Any) -> Any:
        for transform in self.transforms:
            value = transform(value)
        return value
