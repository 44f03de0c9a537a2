"""What rows of stored outputs cost on disk, against one file a sample.

Microseconds to write and to read what a sample's 1,000 logits take, and a store of as many samples
as ImageNet has, filled and read.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy
import torch

from distill.store.rows import CHECKS, ROWS, Rows, create, open_rows

WIDTH, IMAGENET, BATCH = 2_000, 1_281_167, 64
"""Bytes of a row, samples, rows that are read at once."""


def rows(samples: int) -> None:
    """Print what rows cost on disk."""
    generator = numpy.random.default_rng(0)
    content = generator.integers(0, 256, (BATCH, WIDTH), dtype=numpy.uint8)
    inputs = generator.integers(1, 2**63, BATCH, dtype=numpy.uint64)
    with tempfile.TemporaryDirectory(dir=".") as folder:
        order = generator.permutation(samples)[: samples // BATCH * BATCH].reshape(-1, BATCH)
        started = perf_counter()
        create(Path(folder, "store"), {}, samples, WIDTH)
        store = open_rows(Path(folder, "store"))
        write = _timed(order, lambda at: store.write(at, content, inputs))
        read = _timed(order, lambda at: _all_valid(store, at, inputs))
        again = _timed(order, lambda at: _all_valid(store, at, inputs))
        seconds = perf_counter() - started
        files = [Path(folder, "store", name) for name in (ROWS, CHECKS)]
        nbytes = sum(file.stat().st_size for file in files)
        print(
            f"{samples:,} samples x 1,000 float16 logits: {nbytes / samples:,.0f} bytes each, "
            f"{len(list(Path(folder, 'store').iterdir()))} files, {seconds:.1f} s in all"
        )
        print(f"microseconds a row: written {write:.1f}, read {read:.1f}, again {again:.1f}")
        few, folder_of_files = 2_000, Path(folder, "files")
        folder_of_files.mkdir()
        logits = torch.randn(1000)
        started = perf_counter()
        for number in range(few):
            torch.save({"logits": logits}, folder_of_files / f"{number}.pt")
        written = (perf_counter() - started) / few
        started = perf_counter()
        for number in range(few):
            torch.load(folder_of_files / f"{number}.pt", weights_only=True)
        loaded = (perf_counter() - started) / few
        print(f"a file a sample, by torch: written {written * 1e6:,.0f}, read {loaded * 1e6:,.0f}")


def _timed(order: Any, work: Callable[[Any], object]) -> float:
    """Return the median microseconds a row."""
    times = []
    for at in order:
        started = perf_counter()
        work(at)
        times.append(perf_counter() - started)
    return median(times) / BATCH * 1e6


def _all_valid(store: Rows, at: Any, inputs: Any) -> None:
    assert store.read(at, inputs).valid.all()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=IMAGENET)
    rows(parser.parse_args().samples)


if __name__ == "__main__":
    main()
