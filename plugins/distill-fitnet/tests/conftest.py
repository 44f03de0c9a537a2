"""Reference numbers for tests that ask for them."""

from __future__ import annotations

from pathlib import Path

import pytest

from distill.golden import parametrize


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    parametrize(metafunc, Path(__file__).parent / "golden")
