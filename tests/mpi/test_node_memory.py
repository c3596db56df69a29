"""mpisign.exchange.node_memory on real ranks: no file is left, and where there is no room messages take two phases."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import mpisign
from mpisign.exchange import node_memory

from . import ballots
from .on_nodes import SHAPES, for_kinds, nodes, rounds, take, train, wrap

if TYPE_CHECKING:
    from mpi4py import MPI

pytestmark = pytest.mark.mpi
pytest_generate_tests = for_kinds


@pytest.fixture
def folder_of_the_nodes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In place of /dev/shm, so that nobody else's files are seen."""
    monkeypatch.setattr(node_memory, "FOLDER", folder)
    return folder


def test_no_file_is_left(comm: MPI.Comm, kind: str, folder_of_the_nodes: Path) -> None:
    with nodes(kind, comm):
        tensors = ballots.parameters(*SHAPES)
        optimizer = wrap(tensors, exchange="hierarchical")
        for gradients in rounds(comm.rank, 2):
            take(optimizer, tensors, gradients)
            comm.Barrier()
            assert list(folder_of_the_nodes.iterdir()) == []
        mpisign.shutdown()
    assert list(folder_of_the_nodes.iterdir()) == []


def refuse(*_: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("who", ["everybody", "one leader", "one who opens"])
def test_without_room_messages_take_two_phases(
    comm: MPI.Comm,
    kind: str,
    who: str,
    folder_of_the_nodes: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Said once, on rank 0; later optimizers know it already, also those of auto."""
    with nodes(kind, comm) as node_of:
        leader = node_of.index(node_of[comm.rank]) == comm.rank
        last = comm.size - 1
        if who == "one who opens" and node_of.index(node_of[last]) == last:
            pytest.skip("the last rank opens nothing")
        if who == "everybody" or (who == "one leader" and leader and node_of[comm.rank] == node_of[-1]):
            monkeypatch.setattr("os.posix_fallocate", refuse)
        if who == "one who opens" and comm.rank == last:
            monkeypatch.setattr(node_memory, "_open", refuse)
        steps = rounds(comm.rank)
        usual = train(steps, "two_phase")
        for number in range(2):
            tensors = ballots.parameters(*SHAPES)
            optimizer = wrap(tensors, exchange="hierarchical")
            for step, gradients in enumerate(steps):
                assert take(optimizer, tensors, gradients) == usual[step], (number, step)
            assert set(optimizer.report.exchange) == {"two_phase"}
        said = [its.getMessage() for its in caplog.records if "no exchange is hierarchical" in its.getMessage()]
        assert len(said) == (comm.rank == 0), said
        if said:
            assert "No space left on device" in said[0]
        comm.Barrier()
        assert list(folder_of_the_nodes.iterdir()) == []


def test_another_file_under_that_name(
    comm: MPI.Comm, folder_of_the_nodes: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As where a node's ranks are in containers with a /dev/shm each: large enough, and not what the leader has."""
    if comm.size == 1:
        pytest.skip("nobody opens what another has made")
    with nodes("one node", comm):
        (mine := folder_of_the_nodes / "mine").mkdir(exist_ok=True)
        opens = node_memory._open

        def opened(path: Path, size: int) -> Any:
            (other := mine / path.name).write_bytes(bytes(size))
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(node_memory, "FOLDER", mine)
                try:
                    return opens(other, size)
                finally:
                    other.unlink()

        if comm.rank == comm.size - 1:
            monkeypatch.setattr(node_memory, "_open", opened)
        tensors = ballots.parameters(*SHAPES)
        optimizer = wrap(tensors, exchange="hierarchical")
        take(optimizer, tensors, rounds(comm.rank, 1)[0])
        assert set(optimizer.report.exchange) == {"two_phase"}
        if comm.rank == 0:
            assert f"rank {comm.size - 1} does not see what rank 0 has" in caplog.text


def test_who_has_heard_that_there_is_no_room_agrees_with_who_has_not_asked_since(
    comm: MPI.Comm, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan from before there was too little room, and one rank that makes its own anew afterwards."""
    with nodes(kind, comm):
        steps = rounds(comm.rank, 3)
        usual = train(steps, "two_phase")
        tensors, others = ballots.parameters(*SHAPES), ballots.parameters(*SHAPES)
        optimizer = wrap(tensors, exchange="hierarchical")
        assert take(optimizer, tensors, steps[0]) == usual[0]
        with monkeypatch.context() as patch:
            patch.setattr("os.posix_fallocate", refuse)
            take(wrap(others, exchange="hierarchical"), others, steps[0])
        assert take(optimizer, tensors, steps[1]) == usual[1]
        assert set(optimizer.report.exchange) == {"hierarchical"}, "it has its memory"
        if comm.rank == comm.size - 1:
            optimizer._drop_plan()
        assert take(optimizer, tensors, steps[2]) == usual[2]
        assert set(optimizer.report.exchange) == {"two_phase"}


def test_a_plan_that_is_made_anew_gives_its_memory_back_first(
    comm: MPI.Comm, kind: str, folder_of_the_nodes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There may be room for one plan alone; a report of its last step keeps all else of it."""

    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count(str(folder_of_the_nodes))

    def claim(*its: int) -> None:
        before.append(mapped())
        claims(*its)

    before: list[int] = []
    claims = os.posix_fallocate
    monkeypatch.setattr("os.posix_fallocate", claim)
    with nodes(kind, comm):
        steps = rounds(comm.rank, 2)
        usual = train(steps, "two_phase")
        tensors = ballots.parameters(*SHAPES)
        optimizer = wrap(tensors, exchange="hierarchical")
        assert take(optimizer, tensors, steps[0]) == usual[0]
        report = optimizer.report
        optimizer._drop_plan()
        assert take(optimizer, tensors, steps[1]) == usual[1]
        assert set(optimizer.report.exchange) == {"hierarchical"}
        assert mapped() == 1
        assert len(set(before)) <= 1, "none of another plan is there when one is claimed"
        with pytest.raises(mpisign.MpisignError, match="are gone"):
            report.agreement()
