"""Resuming is exact on many ranks: by every method and exchange, from any kind of save."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from methods_table import FOUR, Make, walk, walk_exchanges
from resumable import Job, assert_resuming_is_exact, assert_states_are_enough, in_the_background

from mpisign import Method

if TYPE_CHECKING:
    from mpi4py import MPI

pytestmark = pytest.mark.mpi


@walk_exchanges()
def test_resuming_is_exact(comm: MPI.Comm, folder: Path, make: Make, exchange: str) -> None:
    """Also of what a rule remembers and of what the deciding ranks keep."""
    method = make(comm.size)
    assert_resuming_is_exact(folder, lambda: Job(method, exchange=exchange))
    assert sorted(entry.name for entry in (folder / "step-00000002").iterdir()) == [
        "manifest.json",
        *(f"rank-{rank:05d}.pt" for rank in range(comm.size)),
        "shared.pt",
    ]


@pytest.mark.parametrize("method", FOUR, ids=lambda method: method.name)
def test_from_a_save_in_the_background(folder: Path, method: Method) -> None:
    assert_resuming_is_exact(folder, lambda: Job(method), in_the_background, until=11)


@pytest.mark.long
@walk()
def test_from_one_state_a_rank(comm: MPI.Comm, tmp_path: Path, make: Make) -> None:
    """Also by signSGD, which has no memory (the coins go by the step's number), and of replicas that differ."""
    method = make(comm.size)
    assert_states_are_enough(tmp_path / f"rank{comm.rank}.pt", lambda: Job(method, seed=4, dtype=torch.bfloat16))
