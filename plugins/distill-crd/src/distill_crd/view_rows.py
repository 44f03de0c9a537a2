"""The rows of a batch of which each image comes with three transformed copies of it."""

from __future__ import annotations

from torch import Tensor

from distill.parameters import Parametrized

VIEWS = 4
"""An original, then its copies."""
COPIES = VIEWS - 1


class SplitViews(Parametrized):
    """Parts the rows of a batch into those of the originals and those of their copies.

    So that a loss which knows nothing of copies can have the originals alone: cross entropy with
    the labels takes ``rows.originals`` of a ``rows`` wired to the student's logits. It has nothing
    to train.

    Shape:
        - features: (4B, ...), as ``Rotations`` orders them: each original before its copies.
        - returns: ``originals`` (B, ...) and ``copies`` (3B, ...).

    Raises:
        ValueError: if the rows do not come in fours.
    """

    # Without one, torch's would take any parameter that a file gives.
    def __init__(self) -> None:
        super().__init__()

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        """Return both parts under their names."""
        originals, copies = split_views(self, "features", features)
        return {"originals": originals, "copies": copies.flatten(0, 1)}


def split_views(owner: object, name: str, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows of the originals (B, ...) and those of their copies (B, 3, ...), as views.

    Raises:
        ValueError: if they do not come in fours; it names the owner's class and the rows.
    """
    check_views(owner, name, rows)
    # Not two slices, each of which would have a gradient of the size of all rows.
    originals, copies = rows.unflatten(0, (-1, VIEWS)).split([1, COPIES], dim=1)
    return originals.squeeze(1), copies


def check_views(owner: object, name: str, rows: Tensor, images: int | None = None) -> None:
    """Refuse rows that are not four for each image, or do not come in fours at all."""
    fits = rows.ndim > 0 and len(rows) > 0 and len(rows) % VIEWS == 0
    if not fits or images not in (None, len(rows) // VIEWS):
        wanted = "rows in fours" if images is None else f"{VIEWS} rows for each of {images} labels"
        raise ValueError(
            f"{type(owner).__name__}: {name} must have {wanted}, an image and {COPIES} transformed "
            f"copies of it, got {tuple(rows.shape)}; `wrappers: [Rotations]` at the training data "
            "set makes them"
        )
