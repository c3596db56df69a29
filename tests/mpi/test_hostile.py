"""A rank that sends arbitrary bytes wherever the library talks to itself: the others raise a named error, or go on.

Where that is: the calls with which everything begins (the handshake, ``meet``), the sizes and bytes of what is told,
the headers, the messages and decisions of both exchanges, the maximum, the count of ties, broadcast
tensors, the clocks, the forming of a group, the doctor's vote, and notices of presence. For messages, decisions and
tensors any bits are legal; so a rank may go on, with those votes.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import parts
import pytest
from methods_table import exchanges

import mpisign

from . import hostile

if TYPE_CHECKING:
    from mpi4py import MPI

from .operations import FILLINGS, OPERATIONS, a_step, fuzz

pytestmark = [pytest.mark.mpi(min_size=2), pytest.mark.usefixtures("nothing_runs_and_memory_stays")]


@pytest.mark.long
@pytest.mark.parametrize("evil", [-1, 0], ids=["the last", "rank 0"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_other_bytes_in_every_message(comm: MPI.Comm, folder: Path, name: str, evil: int) -> None:
    """One filling for each message, in turn."""
    fuzz(comm, folder, name, evil % comm.size, lambda number, at: (number + evil) % FILLINGS == at)


@pytest.mark.long
@pytest.mark.parametrize("evil", [-1, 0], ids=["the last", "rank 0"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_all_other_bytes_in_every_message(comm: MPI.Comm, folder: Path, name: str, evil: int) -> None:
    fuzz(comm, folder, name, evil % comm.size, lambda number, at: True)


@pytest.mark.long
@parts.each_method
def test_other_bytes_in_a_step_of_every_method(comm: MPI.Comm, folder: Path, name: str) -> None:
    """One filling for each message, another for each method."""
    methods = parts.methods_for(comm.size)
    method, place = methods[name], list(methods).index(name)
    if not parts.runs_with(method, comm.size):
        pytest.skip("needs more ranks")
    for exchange in ("allgather", "two_phase"):
        if exchange in exchanges(method):
            OPERATIONS[name] = a_step(method, exchange=exchange)
            fuzz(comm, folder, name, comm.size - 1, lambda number, at: (number + place) % FILLINGS == at)


# ----------------------------------------------------------------------------------------- notices


def test_a_notice_of_another_length(comm: MPI.Comm) -> None:
    """In a long wait, or at the end."""
    from mpisign.presence import TAG

    if comm.rank == comm.size - 1:
        for rank in range(comm.size - 1):
            mpisign.session.current().group.comm.Send(np.zeros(7, np.uint8), rank, TAG)
    comm.Barrier()

    def hear() -> None:
        while True:  # until it has come
            mpisign.session.current()._presence.listen("a test")

    if comm.rank < comm.size - 1:
        with pytest.raises(
            mpisign.ConsistencyError, match=rf"rank {comm.size - 1} has sent 7 bytes that are no notice"
        ):
            hear()
    hostile.start_anew(comm)
