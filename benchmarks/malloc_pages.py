"""Whether memory that large temporaries took stays with the process, as an option of a benchmark.

glibc gives it back and asks for fresh pages, which the kernel clears, for the next ones.
"""

from __future__ import annotations

import argparse
import os
import sys

KEPT_PAGES = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}


def add_pages_option(parser: argparse.ArgumentParser) -> None:
    """Let the user choose."""
    parser.add_argument(
        "--pages", choices=["fresh", "kept"], default="fresh", help="what glibc's malloc gives"
    )


def start_again_if_kept(pages: str) -> None:
    """Replace the process by one that keeps its pages, if chosen and not so already."""
    if pages == "kept" and "MALLOC_MMAP_MAX_" not in os.environ:
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEPT_PAGES})
