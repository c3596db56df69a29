"""What the serial tests share: a job of one rank, and modules of scripts/ in it."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import mpisign

os.environ.setdefault("MPISIGN_CALIBRATE", "0")  # what a test finds shall not depend on how quick links are

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture
def world() -> Iterator[None]:
    """A job of this one process, left again afterwards; also if the test has left it or joined another."""
    hook = sys.excepthook
    mpisign.init()
    try:
        yield
    finally:
        mpisign.shutdown()
        assert sys.excepthook is hook, "shutdown() must put the exception hook back"


@pytest.fixture
def training(world: None, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """scripts/training.py."""
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module("training")


@pytest.fixture
def flags(world: None, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """scripts/flags.py."""
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module("flags")


@pytest.fixture
def batches(world: None, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """scripts/batches.py."""
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module("batches")
