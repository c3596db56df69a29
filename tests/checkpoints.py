"""Folders of checkpoints, as the tests of mpisign.checkpoint find and spoil them."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from resumable import Job

MODES = pytest.mark.parametrize("asynchronous", [False, True], ids=["at once", "in the background"])


def names(path: Path) -> list[str]:
    """All that is there, but for the note whose it is."""
    return sorted(entry.name for entry in path.iterdir() if entry.name != "owner.json")


def steps(path: Path) -> list[int]:
    return [int(name.removeprefix("step-")) for name in names(path)]


def saved_twice(path: Path) -> tuple[Job, dict[str, Any]]:
    """A job after saves at steps 2 and 4, and what it was at the first."""
    job = Job().train(2)
    job.save(path)
    first = job.everything()
    job.train(4).save(path)
    return job, first


@contextmanager
def full_disk(full: bool = True) -> Iterator[None]:
    """If ``full``, no file of this process may grow beyond 1000 bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000 if full else soft, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
