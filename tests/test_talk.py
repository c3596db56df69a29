"""mpisign.talk at one rank: limits, and what outlives an exception."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import parts
import pytest
import rounds
import torch

import mpisign
from mpisign import ConsistencyError
from mpisign.group import Channels
from mpisign.session import current
from mpisign.talk import ACTS
from mpisign.watchdog import Pending

pytestmark = pytest.mark.usefixtures("world")


def test_acts_have_names_of_their_own() -> None:
    """Their places are what travels."""
    assert len(set(ACTS)) == len(ACTS)


def test_what_is_too_much_for_mpi_is_refused_before_it_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpisign.talk.OBJECTS_LIMIT_BYTES", 100)
    with pytest.raises(ConsistencyError, match=r"all send 101 bytes, and at most 100 can be taken"):
        current().gather_bytes(bytes(101), "barrier()", limit=1000)
    with pytest.raises(ConsistencyError, match=r"allgather_object\(\): ranks \[0\] want to send \d+ bytes"):
        mpisign.allgather_object("x" * 1000)
    assert mpisign.allgather_object("x") == ["x"], "and all can go on"


def test_a_farewell_that_fails_does_not_keep_the_others_from_theirs() -> None:
    done: list[str] = []

    def fails() -> None:
        raise RuntimeError("no paper")

    with ExitStack() as stack:
        stack.callback(done.append, "first")
        stack.callback(fails)
        stack.callback(done.append, "last")
        with pytest.raises(RuntimeError, match="no paper"):
            current().say_goodbye(stack)
    assert done == ["last", "first"]


# ----------------------------------------------------------------------------------------- what outlives an exception


class Handed:
    """A communicator that remembers by which call, with which request and, weakly, which arrays MPI was given."""

    def __init__(self, comm: Any, given: list[tuple[str, int, list[weakref.ref[Any]]]] | None = None) -> None:
        self._comm = comm
        self.given = [] if given is None else given

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._comm, name)
        if not name.startswith("I") or name == "Iprobe":
            return found

        def call(*args: Any, **kwargs: Any) -> Any:
            arrays = [arg[0] if isinstance(arg, list) else arg for arg in args]
            request = found(*args, **kwargs)
            refs = [weakref.ref(array) for array in arrays if isinstance(array, np.ndarray)]
            self.given.append((name, id(request), refs))
            return request

        return call


@contextmanager
def interrupted(at: int) -> Iterator[Handed]:
    """The ``at``-th wait of the session is interrupted before it begins, and all before it are as usual."""
    session, count = current(), 0
    handed = Handed(session.group.comm)
    wait = session.wait

    def waiting(pending: Pending) -> None:
        nonlocal count
        count += 1
        if count - 1 == at:
            raise KeyboardInterrupt
        wait(pending)

    session.wait = waiting  # type: ignore[method-assign]
    channels = session.group.channels
    object.__setattr__(session.group, "comm", handed)
    object.__setattr__(session.group, "channels", Channels(*(Handed(one, handed.given) for one in channels)))
    try:
        yield handed
    finally:
        object.__setattr__(session.group, "comm", handed._comm)
        object.__setattr__(session.group, "channels", channels)
        del session.wait


def a_step(exchange: str, method: mpisign.Method | None = None) -> Any:
    def operation() -> None:
        tensors = parts.parameters((40,), (3, 5))
        parts.give(tensors, parts.draw_normal(tensors))
        sgd = torch.optim.SGD(tensors, lr=0.1)
        mpisign.DistributedSignOptimizer(sgd, method=method or mpisign.signsgd(), exchange=exchange).step()

    return operation


OPERATIONS = {
    "barrier": mpisign.barrier,
    "gather_bytes": lambda: current().gather_bytes(bytes(9), "barrier()"),
    "gather_bytes to a root": lambda: current().gather_bytes(bytes(9), "barrier()", root=0),
    "spread_bytes": lambda: current().spread_bytes(bytes(9), 0, "barrier()"),
    "broadcast_parameters": lambda: mpisign.broadcast_parameters({"a": torch.ones(9), "b": torch.ones(3)}),
    "step, all-gather": a_step("allgather"),
    "step, two-phase": a_step("two_phase"),
    "step with a maximum": a_step("allgather", mpisign.sto_sign()),
}


def was_interrupted(operation: Any, at: int) -> tuple[bool, Handed]:
    """In a frame of its own, so that nothing here holds what it has held."""
    with interrupted(at) as handed:
        try:
            operation()
        except KeyboardInterrupt:
            return True, handed
        return False, handed


@pytest.mark.long
@pytest.mark.parametrize("name", OPERATIONS)
def test_what_mpi_may_still_write_outlives_an_exception(name: str) -> None:
    """Wherever it comes between posting and waiting: also between the count of ties and its wait, at a step's end."""
    session = current()
    for at in range(20):
        before = set(session.watchdog._posted)
        was, handed = was_interrupted(OPERATIONS[name], at)
        gc.collect()
        posted = session.watchdog._posted - before
        if not was:
            assert at > 0, "there is nothing to wait for"
            assert not posted, "what was waited for is kept no longer"
            return
        assert len(posted) == len(handed.given) - at, "all that was not waited for"
        given = {request: (call, refs) for call, request, refs in handed.given}
        for pending in posted:
            call, refs = given[id(pending.request)]
            assert refs
            assert all(ref() is not None for ref in refs), (at, call)
            pending.request.Wait()
        session.watchdog._posted -= posted
        session.watchdog.broken = ""
    raise AssertionError("it never ended")


def test_the_count_of_ties_outlives_an_exception_before_its_wait() -> None:
    """It is posted before gradients are unpacked, where anything may go wrong."""
    session = current()
    tensors = parts.parameters((40,), (3, 5))
    parts.give(tensors, parts.draw_normal(tensors))
    made = rounds.job(tensors)

    def fails(*_: object) -> None:
        raise RuntimeError("no memory for gradients")

    made.plan.batches[0].decoder.decode = fails  # type: ignore[method-assign]
    handed = Handed(session.group.comm)
    object.__setattr__(session.group, "comm", handed)
    try:
        with pytest.raises(RuntimeError, match="no memory"):
            made.run(0)
    finally:
        object.__setattr__(session.group, "comm", handed._comm)
    del made
    gc.collect()
    (counts,) = [refs for name, _, refs in handed.given if name == "Iallreduce"]
    assert len(counts) == 2
    assert all(ref() is not None for ref in counts)
    assert session.watchdog.broken == "step 0"
    session.watchdog.broken = ""
