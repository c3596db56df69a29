"""What the serial tests share: a job of one rank."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

import mpisign


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
