"""A data set of images in few files, at the size that it is trained on.

The folder holds ``images.bin``, all images one behind the other; ``offsets.npy``, where each begins
and the last ends; ``shapes.npy``, height, width and channels of each; ``checks.npy``, a hash of
each; ``targets.npy`` where there are targets; and ``meta.json``, written last. Until then there is
``packing.jsonl``, from which packing can go on.
"""

from __future__ import annotations

import errno
import io
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import xxhash
from PIL import Image as PILImage
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional
from torchvision.tv_tensors import Image  # type: ignore[attr-defined]

from distill import DataError, Sample
from distill_datasets_vision.packing_journal import (
    IMAGES,
    JOURNAL,
    Bad,
    Entry,
    Images,
    line_of,
    record_of,
    take_up,
)

META = "meta.json"
ARRAYS = {"offsets": np.int64, "shapes": np.int32, "checks": np.uint64}
KIND, VERSION = "distill packed images", 1
CHANNELS = {1: "L", 3: "RGB"}
Progress = Callable[[int], None]
OnBad = Callable[[Mapping[int, str]], None]
TARGETS = "targets must be numbers or arrays of one shape to be packed"
LOST = (
    "the file system does not give this file, so packing ends here, with --skip-bad too: that is "
    "for damaged images, not for those of a disk or mount that is lost; once the file is back, the "
    "same command goes on from here"
)
WORKER = (
    "if it needed too much memory, fewer --workers need less; with --workers 0 its own error is "
    "seen. What is packed stays"
)
TO_PICTURE: Callable[[torch.Tensor], PILImage.Image] = vars(functional)["to_pil_image"]


class Packed(Dataset[Any]):
    """What ``distill data pack`` has written.

    An item is ``(image, target)``, or a ``Sample`` without a target where there are none. The image
    is a ``tv_tensors.Image``, uint8 (C, H, W): a packed JPEG is decoded, raw pixels are read as
    they lie. Files are memory-mapped, and each image's hash is compared whenever it is read.

    Args:
        root: the folder.

    Attributes:
        classes: names of the classes, where the data set that was packed had them.
        targets: of all samples, where there are any.

    Raises:
        FileNotFoundError: if there is no such folder, or packing has not come to its end.
        DataError: if a file is damaged or does not belong to the others; reading an item, if the
            image is damaged.
    """

    def __init__(self, root: str) -> None:
        self.root = Path(root).expanduser().absolute()
        meta = _meta(self.root)
        self._encoding: str = meta["encoding"]
        arrays = {name: _array(self.root, name, meta) for name in ARRAYS}
        self._offsets, self._shapes = arrays["offsets"], arrays["shapes"]
        self._checks = arrays["checks"]
        _refuse_unless_whole(self.root, meta, self._offsets)
        if "targets" in meta["checks"]:
            targets = _array(self.root, "targets", meta)
            self.targets = targets.tolist() if targets.ndim == 1 else torch.from_numpy(targets)
        if meta["classes"] is not None:
            self.classes: Sequence[str] = meta["classes"]
        self._images = self._map()

    def __len__(self) -> int:
        return len(self._checks)

    def __getitem__(self, index: int) -> Any:
        image = self._image(index)
        if hasattr(self, "targets"):
            return image, self.targets[index]
        return Sample(image)

    def __getstate__(self) -> dict[str, Any]:  # to a loader worker, which maps the file itself
        return {**vars(self), "_images": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._images = self._map()

    def _map(self) -> np.ndarray:
        return np.memmap(self.root / IMAGES, np.uint8, "r")

    def _image(self, index: int) -> Image:
        index = range(len(self))[index]
        first, last = self._offsets[index : index + 2]
        # A copy: a transform may write into its image, and the file is not to be written to.
        data = np.array(self._images[first:last])
        if xxhash.xxh3_64_intdigest(data.data) != self._checks[index]:
            raise DataError(f"image {index} in {self.root / IMAGES} is damaged; pack it again")
        if self._encoding == "jpeg":
            data = np.array(PILImage.open(io.BytesIO(data.data)))
        return Image(torch.from_numpy(data).view(*self._shapes[index].tolist()).permute(2, 0, 1))


def _refuse(bad: Mapping[int, str]) -> None:
    raise DataError("\n".join(bad.values()))


@dataclass(frozen=True)
class Packer:
    """Writes a data set of images to a folder that ``Packed`` reads.

    Args:
        encoding: ``jpeg``, or ``raw`` for pixels, which take about ten times the room and no time
            to decode.
        size: of the shorter side; images are made smaller with their aspect kept, by the bilinear
            interpolation of ``Resize``, and never larger.
        quality: of JPEGs, from 1 to 100.
        workers: processes that read and encode.
    """

    encoding: Literal["jpeg", "raw"]
    size: int = 256
    quality: int = 90
    workers: int = 0

    def __post_init__(self) -> None:
        if self.size < 1 or not 1 <= self.quality <= 100:
            raise ValueError("size must be at least 1, and quality from 1 to 100")

    def __call__(
        self,
        dataset: Any,
        folder: Path,
        source: Mapping[str, Any],
        progress: Progress = lambda done: None,
        on_bad: OnBad = _refuse,
    ) -> str:
        """Write all items, ``Sample`` or ``(image, target)``, in their order.

        Args:
            dataset: images are PIL images or tensors, uint8 (C, H, W).
            folder: a new or empty one, or one in which packing has not come to its end: of the
                same samples, source and settings it goes on from there.
            source: what it is made from, plain data: for people who read ``meta.json``, and to
                know an unfinished packing of the same again.
            progress: told how many samples have been gone through, as they come; those that
                were there already count.
            on_bad: told once, after the last sample, which ones cannot be packed and why, by index.
                They are left out; what it raises leaves the folder unfinished.

        Returns:
            What a file writes to read it.

        Raises:
            DataError: if there are bad samples and no ``on_bad``, or none that can be packed; at
                once, if one is of a kind that is not packed, and then no files are left unless an
                image has been packed.
            FileExistsError: if there is something else in the folder.
        """
        _refuse_unless_free(folder)
        is_new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        try:
            images = self._write_images(dataset, folder, source, progress)
        except _OtherKindError:
            if (folder / IMAGES).stat().st_size == 0:
                _take_away(folder, is_new=is_new)
            raise
        if images.bad:
            on_bad(images.bad)
        if not images.shapes:
            raise DataError("there is no sample to pack")
        classes = getattr(dataset, "classes", None)
        meta = {
            "kind": KIND,
            "version": VERSION,
            "encoding": self.encoding,
            "size": self.size,
            "quality": self.quality if self.encoding == "jpeg" else None,
            "images": len(images.shapes),
            "bytes": images.offsets[-1],
            "skipped": images.bad,
            "classes": list(classes) if classes is not None else None,
            "source": source,
            "checks": {name: _save(folder, name, each) for name, each in _arrays(images).items()},
        }
        written = folder / f"{META}.new"
        written.write_text(json.dumps(meta, indent=1) + "\n", "utf-8")
        os.replace(written, folder / META)
        (folder / JOURNAL).unlink()
        return f"{{type: Packed, params: {{root: {_yaml(str(folder))}}}}}"

    def _write_images(
        self, dataset: Any, folder: Path, source: Mapping[str, Any], progress: Progress
    ) -> Images:
        encoding = _Encoding(dataset, self)
        head = {
            "version": VERSION,
            "packer": [self.encoding, self.size, self.quality],
            "samples": len(dataset),
            "source": source,
        }
        images = take_up(folder, head, lambda index: record_of(_told(encoding[index])))
        if images.samples:
            progress(images.samples)
        with (folder / IMAGES).open("ab") as stream, (folder / JOURNAL).open("ab") as journal:
            for entry in self._encoded(encoding, images.samples):
                if isinstance(entry, Entry):
                    stream.write(entry.data)
                    stream.flush()
                record = record_of(entry)
                journal.write(line_of(record))
                journal.flush()
                images.add(record)
                progress(images.samples)
        return images

    def _encoded(self, encoding: _Encoding, first: int) -> Iterator[Entry | Bad]:
        loader = DataLoader(
            encoding,
            batch_size=None,
            sampler=range(first, len(encoding)),
            num_workers=self.workers,
            generator=torch.Generator(),
        )
        try:
            yield from map(_told, loader)
        except RuntimeError as error:  # the loader's: what a sample raises has been told
            raise DataError(f"{str(error).splitlines()[0].rstrip('. ')}; {WORKER}") from error


def _told(entry: Entry | Bad | DataError) -> Entry | Bad:
    if isinstance(entry, DataError):
        raise entry
    return entry


def _take_away(folder: Path, *, is_new: bool) -> None:
    """Leave nothing of a packing in which no image was packed."""
    for name in (IMAGES, JOURNAL):
        (folder / name).unlink()
    if is_new:
        folder.rmdir()


def _arrays(images: Images) -> dict[str, np.ndarray]:
    arrays = {name: np.array(getattr(images, name), kind) for name, kind in ARRAYS.items()}
    if any(target is not None for target in images.targets):
        arrays["targets"] = _stacked(images.targets)
    return arrays


class _OtherKindError(DataError):
    """A sample can be read, and no data set with its like can be packed."""


@dataclass(frozen=True)
class _Encoding(Dataset["Entry | Bad | DataError"]):
    """Images as they are packed; an error, which a worker cannot raise as it is, ends packing."""

    dataset: Any
    packer: Packer

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Entry | Bad | DataError:
        try:
            item = self.dataset[index]
            return self._entry(item if isinstance(item, Sample) else Sample(item[0], item[1]))
        except _OtherKindError as error:
            return _OtherKindError(f"sample {index} cannot be packed: TypeError: {error}")
        except Exception as error:  # the data set's, or of a file that is read only now
            why = f"sample {index} cannot be packed: {type(error).__name__}: {error}"
            why = str(error) if isinstance(error, DataError) else why
            return DataError(f"{why}\n{LOST}") if _is_lost(error) else Bad(why)

    def _entry(self, sample: Sample) -> Entry:
        if sample.extras:
            raise _OtherKindError(f"it has more than a target: {', '.join(sample.extras)}")
        target = _numbers(sample.target)
        image = _resized(_picture(sample.input), self.packer.size)
        shape = (image.height, image.width, len(image.getbands()))
        if self.packer.encoding == "raw":
            return Entry(image.tobytes(), shape, target)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=self.packer.quality)
        return Entry(buffer.getvalue(), shape, target)


def _is_lost(error: BaseException | None) -> bool:
    """Whether the file system has not given a file, which says nothing of the image in it.

    Decoders raise ``OSError`` too: without a number, or with EINVAL where damaged bytes make them
    seek a place that there is not. Those that are no Python may have the system's text alone.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            is_lost = error.errno != errno.EINVAL
        else:
            is_named = isinstance(error, (FileNotFoundError, PermissionError))
            is_lost = is_named or str(error).startswith("[Errno ")
        if is_lost:
            return True
        error = error.__cause__ or error.__context__
    return False


def _numbers(target: Any) -> np.ndarray | None:
    if target is None:
        return None
    try:
        array = np.asarray(target)
    except (ValueError, TypeError, RuntimeError):  # lists of many lengths, a tensor of bfloat16
        array = np.array(None)
    if array.dtype.kind not in "biuf":
        raise _OtherKindError(f"{TARGETS}, not {type(target).__name__}")
    return array


def _picture(value: Any) -> PILImage.Image:
    """Return an image in RGB or grey."""
    if isinstance(value, torch.Tensor):
        if value.dtype != torch.uint8 or value.ndim != 3 or len(value) not in CHANNELS:
            raise _OtherKindError(
                "images must be PIL images or uint8 tensors (1 or 3, H, W), this is a tensor of "
                f"{value.dtype} {tuple(value.shape)}"
            )
        value = TO_PICTURE(value)
    if not isinstance(value, PILImage.Image):
        raise _OtherKindError(f"its input is no image but {type(value).__name__}")
    return value if value.mode in CHANNELS.values() else value.convert("RGB")


def _resized(image: PILImage.Image, size: int) -> PILImage.Image:
    short, long = sorted(image.size)
    if short <= size:
        return image
    other = int(size * long / short)
    wanted = (size, other) if image.width <= image.height else (other, size)
    return image.resize(wanted, PILImage.Resampling.BILINEAR)


def _stacked(targets: Sequence[np.ndarray | None]) -> np.ndarray:
    there = [target for target in targets if target is not None]
    if len(there) < len(targets):
        raise DataError("some samples have a target and some have none")
    shapes = sorted({target.shape for target in there})
    if len(shapes) > 1:
        raise DataError(f"{TARGETS}, not of shapes such as {shapes[0]} and {shapes[-1]}")
    return np.stack(there)


def _save(folder: Path, name: str, array: np.ndarray) -> str:
    """Write an array, and return the hash of its file."""
    file = folder / f"{name}.npy"
    np.save(file, array, allow_pickle=False)
    return xxhash.xxh3_64_hexdigest(file.read_bytes())


def _yaml(path: str) -> str:
    """Return a path as a file writes it, in quotes unless it can be read as nothing else.

    Without a slash it may be, as ``1e3`` and ``null``.
    """
    is_plain = re.fullmatch(r"[\w.-]*/[\w./-]*", path)
    return path if is_plain else json.dumps(path, ensure_ascii=False)


def _refuse_unless_free(folder: Path) -> None:
    own = {IMAGES, JOURNAL, f"{META}.new", "targets.npy", *(f"{name}.npy" for name in ARRAYS)}
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if folder.exists() and (not folder.is_dir() or there - own):
        what = "a packed data set" if META in there else "something else"
        raise FileExistsError(f"{folder} is there already, with {what}; choose another folder")


def _meta(root: Path) -> dict[str, Any]:
    file = root / META
    if not file.is_file():
        reason = "it was not packed to its end" if (root / IMAGES).exists() else "there is none"
        raise FileNotFoundError(
            f"Packed finds no data: looked for {file}, but {reason}; write it with `distill data "
            f"pack FILE DATASET -o {root}`, which --skip-bad leads past images that cannot be read"
        )
    try:
        meta: dict[str, Any] = json.loads(file.read_text("utf-8"))
        known = meta["kind"] == KIND and meta["version"] == VERSION
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} is damaged: {type(error).__name__}: {error}") from error
    if not known or meta["encoding"] not in ("jpeg", "raw"):
        raise DataError(f"{file} is of another version or kind than {KIND} {VERSION}")
    return meta


def _array(root: Path, name: str, meta: Mapping[str, Any]) -> np.ndarray:
    file = root / f"{name}.npy"
    try:
        text = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error}") from error
    if xxhash.xxh3_64_hexdigest(text) != meta["checks"].get(name):
        raise DataError(f"{file} is damaged, or of another data set than {root / META}")
    array: np.ndarray = np.load(io.BytesIO(text), allow_pickle=False)
    return array


def _refuse_unless_whole(root: Path, meta: Mapping[str, Any], offsets: np.ndarray) -> None:
    file = root / IMAGES
    there = file.stat().st_size if file.is_file() else 0
    wanted = int(offsets[-1])
    if there != wanted or meta["images"] != len(offsets) - 1:
        raise DataError(
            f"{file} has {there:,} bytes, of {wanted:,} that were written; pack it again"
        )
