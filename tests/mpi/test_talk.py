"""mpisign.talk on real ranks: who hears what, in which order, and what all are told where they do not fit together."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import mpisign
from mpisign import ConsistencyError, OptionError
from mpisign.encoding import Optional
from mpisign.session import current
from mpisign.talk import EXIT

from . import hostile

if TYPE_CHECKING:
    from mpi4py import MPI

pytestmark = pytest.mark.mpi

ACT = "barrier()"


def of(rank: int) -> bytes:
    """Messages of different lengths, one of which has none."""
    return bytes([rank]) * (7 * rank)


# ------------------------------------------------------------------------------------------------------ meetings


def test_a_call_brings_every_ranks_numbers(comm: MPI.Comm) -> None:
    mine = np.array([comm.rank, -comm.rank, 2**63 - 1, -(2**62)], np.int64)
    heard = current().call(mine)
    assert heard.tolist() == [[rank, -rank, 2**63 - 1, -(2**62)] for rank in range(comm.size)]
    assert mine.tolist() == [comm.rank, -comm.rank, 2**63 - 1, -(2**62)], "and leaves the caller's as they are"


@pytest.mark.parametrize("last", [2**62 - 1, -(2**62)])
def test_the_wish_to_stop_travels_with_the_last_number(comm: MPI.Comm, last: int) -> None:
    session = current()
    session.wants_stop = comm.rank == comm.size - 1
    assert session.call(np.array([0, last], np.int64))[:, 1].tolist() == [last] * comm.size
    assert session.stopping
    session.wants_stop = False
    assert session.call(np.array([0, last], np.int64))[:, 1].tolist() == [last] * comm.size
    assert session.stopping, "also when who was asked is gone"


def test_who_meets_tells_a_number(comm: MPI.Comm) -> None:
    assert current().meet(ACT, 10 - comm.rank).tolist() == [10 - rank for rank in range(comm.size)]
    assert current().meet(ACT).tolist() == [0] * comm.size


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("other", ["timeline()", EXIT])
def test_ranks_in_different_acts_are_told_both(comm: MPI.Comm, other: str) -> None:
    odd = comm.size - 1
    others = "have left the job" if other == EXIT else r"are in timeline\(\)"
    with pytest.raises(ConsistencyError) as caught:
        current().meet(other if comm.rank == odd else ACT)
    said = str(caught.value)
    assert f"ranks {list(range(odd))} are in barrier()" in said
    assert f"ranks [{odd}] {others}".replace("\\", "") in said
    assert f"(this is rank {comm.rank})" in said
    if other == EXIT:
        with pytest.raises(ConsistencyError, match="a rank has left the job before the others; it can only end now"):
            current().meet(ACT)
        hostile.start_anew(comm)
    else:
        assert current().meet(ACT).tolist() == [0] * comm.size, "and all can go on"


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("code", [-1, -(2**63), -1000])
def test_an_act_that_nobody_knows(comm: MPI.Comm, code: int) -> None:
    mine = np.array([code if comm.rank == 0 else 1, 0, 0, 0], np.int64)
    with pytest.raises(ConsistencyError, match=r"ranks \[0\] are in something that this mpisign does not know"):
        current().demand_same_act(current().call(mine))


@pytest.mark.mpi(min_size=2)
def test_a_rank_that_leaves_during_a_step_is_an_error_to_the_others_and_none_to_itself(comm: MPI.Comm) -> None:
    import torch

    parameter = torch.nn.Parameter(torch.zeros(3))
    parameter.grad = torch.ones(3)
    optimizer = mpisign.DistributedSignOptimizer(torch.optim.SGD([parameter], lr=1.0))
    if comm.rank == 0:
        mpisign.shutdown()
    else:
        with pytest.raises(ConsistencyError, match=r"ranks \[0\] have left the job; .*are in step\(\)"):
            optimizer.step()
        assert not parameter.any()
    hostile.start_anew(comm)


# --------------------------------------------------------------------------------------------------- what is told


def test_every_rank_hears_all_bytes(comm: MPI.Comm) -> None:
    assert current().gather_bytes(of(comm.rank), ACT) == [of(rank) for rank in range(comm.size)]
    assert current().gather_bytes(b"", ACT) == [b""] * comm.size


def test_or_one_rank_alone_does(comm: MPI.Comm) -> None:
    for root in range(comm.size):
        heard = current().gather_bytes(of(comm.rank), ACT, root=root)
        assert heard == ([of(rank) for rank in range(comm.size)] if comm.rank == root else [])


def test_the_roots_bytes_reach_all(comm: MPI.Comm) -> None:
    for root in range(comm.size):
        for message in (b"", b"x" * 100_000):
            mine = message if comm.rank == root else b"not heard"
            assert current().spread_bytes(mine, root, ACT) == message


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("root", [None, 0])
def test_a_rank_with_too_much_is_named_on_all(comm: MPI.Comm, root: int | None) -> None:
    odd = comm.size - 1
    mine = bytes(101 if comm.rank == odd else 100)
    says = rf"barrier\(\): ranks \[{odd}\] want to send 101 bytes, and at most 100 .*this is rank {comm.rank}"
    with pytest.raises(ConsistencyError, match=says):
        current().gather_bytes(mine, ACT, 100, root)
    with pytest.raises(ConsistencyError, match=says):
        current().spread_bytes(mine, odd, ACT, 100)
    assert current().gather_bytes(bytes(100), ACT, 100) == [bytes(100)] * comm.size, "and all can go on"


def test_values_are_what_they_were(comm: MPI.Comm) -> None:
    schema = {"who": int, "names": [str], "maybe": Optional(float)}
    values = [{"who": rank, "names": ["ä"] * rank, "maybe": None if rank else 0.1} for rank in range(comm.size)]
    assert current().gather_values(values[comm.rank], schema, ACT) == values
    for root in range(comm.size):
        mine = values[root] if comm.rank == root else object()  # nobody looks at it
        assert current().spread_value(mine, schema, root, ACT) == values[root]


@pytest.mark.mpi(min_size=2)
def test_a_value_of_another_shape_names_its_sender_on_all(comm: MPI.Comm) -> None:
    odd = comm.size - 1
    with pytest.raises(ConsistencyError, match=f"rank {odd} has sent 3 bytes that are no message of mpisign's"):
        current().gather_values("x" if comm.rank == odd else 3, int, ACT)
    with pytest.raises(ConsistencyError, match=f"rank {odd} has sent 3 bytes that are no message"):
        current().spread_value("x", int, odd, ACT)
    assert current().gather_values(comm.rank, int, ACT) == list(range(comm.size)), "and all can go on"


def test_objects_of_users_are_pickled(comm: MPI.Comm) -> None:
    assert current().gather_objects({comm.rank}, ACT) == [{rank} for rank in range(comm.size)]
    for root in range(comm.size):
        mine = {"root": root}
        heard = current().spread_object(mine, root, ACT)
        assert heard == mine
        assert (heard is mine) == (comm.rank == root)


def test_an_object_that_cannot_be_pickled_is_an_error_before_anything_is_sent(comm: MPI.Comm) -> None:
    with pytest.raises(Exception, match="pickle"):
        current().gather_objects(lambda: None, ACT)
    assert current().gather_objects(1, ACT) == [1] * comm.size


def test_pickles_can_be_turned_off(comm: MPI.Comm) -> None:
    """And then what another rank sends in their place is not looked at."""
    mpisign.shutdown()
    mpisign.init(pickle=False)
    for call in (lambda: mpisign.broadcast_object(1), lambda: mpisign.allgather_object(1)):
        with pytest.raises(OptionError, match=rf"rank {comm.rank}: .*init\(pickle=False\) has turned off"):
            call()
    mpisign.barrier()


@pytest.mark.mpi(min_size=2)
def test_all_turn_them_off_or_none(comm: MPI.Comm) -> None:
    mpisign.shutdown()
    odd = comm.size - 1
    with pytest.raises(ConsistencyError, match=rf"ranks \[{odd}\] have called init\(pickle=False\) and the others"):
        mpisign.init(pickle=comm.rank != odd)
    assert not mpisign.is_initialized()


@pytest.mark.mpi(min_size=2)
def test_all_hear_where_two_ranks_differ(comm: MPI.Comm) -> None:
    """Also those that are neither, and what a terminal should not show is not shown."""
    odd = comm.size - 1
    lines = ["same", f"rank {comm.rank}\x1b[31m", "later"]
    assert current().compare(lines, odd, 0, ACT) == (f"rank {odd}?[31m", "rank 0?[31m")
    assert current().compare(["same"], odd, 0, ACT) == ("nothing more", "nothing more")
    assert current().compare(["a"] * (comm.rank + 1), odd, 0, ACT) == ("a", "nothing more")


# ---------------------------------------------------------------------------------------------- order, clocks, end


class Noted:
    """A communicator that notes which calls are made."""

    def __init__(self, comm: Any) -> None:
        self._comm = comm
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._comm, name)
        if name[0] == "I" and callable(found) and name != "Iprobe":
            self.calls.append(name)
        return found


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        (lambda talk: talk.meet(ACT), ["Iallgather"]),
        (lambda talk: talk.gather_bytes(b"x", ACT), ["Iallgather", "Iallgatherv"]),
        (lambda talk: talk.gather_bytes(b"x", ACT, root=0), ["Iallgather", "Igatherv"]),
        (lambda talk: talk.spread_bytes(b"x", 0, ACT), ["Iallgather", "Ibcast"]),
        (lambda talk: talk.gather_values(1, int, ACT), ["Iallgather", "Iallgatherv"]),
        (lambda talk: talk.spread_value(1, int, 0, ACT), ["Iallgather", "Ibcast"]),
        (lambda talk: talk.gather_objects(1, ACT), ["Iallgather", "Iallgatherv", "Iallgather"]),
        (lambda talk: talk.spread_object(1, 0, ACT), ["Iallgather", "Ibcast", "Iallgather"]),
        (lambda talk: talk.compare(["x"], 0, 0, ACT), ["Iallgather", "Ibcast"] * 2),
    ],
)
def test_everything_begins_with_the_call(comm: MPI.Comm, operation: Callable[[Any], object], expected: Any) -> None:
    """So ranks that do different things meet in it."""
    session = current()
    noted = Noted(session.group.comm)
    object.__setattr__(session.group, "comm", noted)
    try:
        operation(session)
    finally:
        object.__setattr__(session.group, "comm", noted._comm)
    assert noted.calls == expected


def test_clocks_of_one_machine_are_one(comm: MPI.Comm) -> None:
    """Rank 0's is ahead of nobody's by more than it takes to ask, and each alignment is added."""
    session = current()
    before = len(session.clocks)
    session.align_clocks()
    assert len(session.clocks) == before + 1
    moment, ahead = session.clocks[-1]
    assert moment > 0
    assert abs(ahead) < 60 * 10**9
    assert comm.rank > 0 or ahead == 0


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("time", [-1, 2**61, 2**63 - 1])
def test_a_time_that_no_clock_shows(comm: MPI.Comm, monkeypatch: pytest.MonkeyPatch, time: int) -> None:
    session = current()
    if comm.rank == 0:
        with monkeypatch.context() as patch:
            patch.setattr("mpisign.talk.perf_counter_ns", lambda: time)
            session.align_clocks()
    else:
        with pytest.raises(ConsistencyError, match=f"rank 0 has told the time {time}, .*this is rank {comm.rank}"):
            session.align_clocks()
    hostile.start_anew(comm)


def test_all_say_goodbye_together(comm: MPI.Comm) -> None:
    done: list[str] = []
    with ExitStack() as stack:
        stack.callback(mpisign.barrier)  # farewells may be collective
        stack.callback(done.append, "farewell")
        assert current().say_goodbye(stack)
    assert done == ["farewell"]


@pytest.mark.mpi(min_size=2)
def test_who_leaves_alone_has_no_farewells(comm: MPI.Comm, caplog: pytest.LogCaptureFixture) -> None:
    done: list[str] = []
    with ExitStack() as stack:
        stack.callback(done.append, "farewell")
        if comm.rank == 0:
            assert not current().say_goodbye(stack)
            assert done == []
            assert "ranks [0] have left the job" in caplog.text
            stack.pop_all()
        else:
            stack.pop_all()
            with pytest.raises(ConsistencyError, match=r"ranks \[0\] have left the job"):
                mpisign.barrier()
    hostile.start_anew(comm)


def test_an_exception_in_a_farewell_is_the_shutdowns(comm: MPI.Comm) -> None:
    done: list[str] = []

    def fails() -> None:
        raise RuntimeError("no paper")

    for farewell in (lambda: done.append("first"), fails, lambda: done.append("last")):
        current().farewells.callback(farewell)
    with pytest.raises(RuntimeError, match="no paper"):
        mpisign.shutdown()
    assert done == ["last", "first"]
    assert not mpisign.is_initialized()
    mpisign.init()
    mpisign.barrier()
