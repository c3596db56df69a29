"""What the tests on a GPU share: a job of one rank, on machines without MPI too."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In the place of the one that needs MPI."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    with importlib.import_module("alone").job():
        yield
