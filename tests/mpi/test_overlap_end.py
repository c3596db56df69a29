"""mpisign.overlap on real ranks: states, copies, several optimizers, and the end, while messages are on their way."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import TYPE_CHECKING, Any

import pytest
import torch
from methods_table import TABLE

import mpisign
from mpisign.session import current

from .overlapping import BOTH, METHODS, STEPS, Training, assert_alike, beside, last, same, usual

if TYPE_CHECKING:
    from mpi4py import MPI

pytestmark = [pytest.mark.mpi, pytest.mark.usefixtures("a_node_a_rank")]


# ---------------------------------------------------------------------------------------------- saved, loaded, copied


@METHODS
@pytest.mark.parametrize("alone", [False, True], ids=["all", "one"])
def test_a_state_that_is_saved_and_loaded_between_backward_and_step(comm: MPI.Comm, name: str, alone: bool) -> None:
    def program(training: Training) -> None:
        training.usual(STEPS)
        for _ in range(2):
            training.optimizer.zero_grad()
            training.backward()
            saved = copy.deepcopy(training.optimizer.state_dict())
            if not alone or last(comm):
                training.optimizer.load_state_dict(saved)
            training.step()
        training.usual(2)

    for overlap in (True, "auto"):
        ours = beside(comm, program, overlap, method=TABLE[name](comm.size))
        assert ours.heard == []


@METHODS
@pytest.mark.parametrize("how", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))], ids=["copy", "pickle"])
def test_a_copy_between_backward_and_step(comm: MPI.Comm, name: str, how: Any) -> None:
    """It takes nothing along of what has left, nor of what memories have taken in."""

    def program(training: Training) -> None:
        training.usual(STEPS)
        training.optimizer.zero_grad()
        training.backward()
        model, optimizer = how((training.model, training.optimizer))
        training.step()
        training.at -= 1
        training.model, training.optimizer = model, optimizer
        training.optimizer.zero_grad()
        training.backward()
        training.step()
        training.usual(3)

    ours = beside(comm, program, method=TABLE[name](comm.size), exchange="auto")
    assert same(ours.trace[STEPS][-1], ours.trace[STEPS + 1][-1])
    assert bool(ours.early[-1]) == (comm.size > 1)


# ------------------------------------------------------------------------------------------- several optimizers


@BOTH
def test_another_optimizer_over_the_same_parameters(comm: MPI.Comm, overlap: bool | str) -> None:
    """The hooks of the first are gone after a step of the second, which is the one that sends."""

    def program(training: Training) -> None:
        training.usual(STEPS)
        first = training.optimizer
        training.wrap(training.model)
        training.usual(STEPS)
        assert first is not training.optimizer

    ours = beside(comm, program, overlap, method=mpisign.signum())
    assert ours.heard == []
    for parameter in ours.model.parameters():
        hooks = parameter._post_accumulate_grad_hooks or {}
        assert len(hooks) == (comm.size > 1)


@BOTH
def test_two_whose_backward_passes_come_in_another_order_on_each_rank(comm: MPI.Comm, overlap: bool | str) -> None:
    made = []
    for its in (False, overlap):
        made.append([Training(comm, its, method=mpisign.signum(0.9 - 0.1 * one)) for one in range(2)])
        for _ in range(STEPS):
            both = made[-1][:: -1 if comm.rank % 2 else 1]
            for training in both:
                training.optimizer.zero_grad()
                training.backward()
            for training in made[-1]:
                training.step()
    for ours, theirs in zip(made[1], made[0], strict=True):
        assert same(ours.trace, theirs.trace)
        assert same(ours.kept(), theirs.kept())
    if comm.size > 1:
        sent = {span.step for span in current().tracer.spans() if span.name == "send"}
        assert sent == set(range(STEPS))


# ------------------------------------------------------------------------------------------------------ the end


@METHODS
@pytest.mark.parametrize("who", ["one", "all"])
def test_shutdown_after_a_backward_without_a_step(comm: MPI.Comm, name: str, who: str) -> None:
    """Neither waits for ever nor leaves anything: the next job goes on."""
    ours = Training(comm, True, method=TABLE[name](comm.size), exchange="auto")
    for _ in range(2):
        ours.usual(2)
        ours.optimizer.zero_grad()
        if who == "all" or last(comm):
            ours.backward()
        session = current()
        mpisign.shutdown()
        assert not session.watchdog._posted
        mpisign.init(stall_timeout=60, node_of=range(comm.size))
        ours._mark = current().tracer.mark()
        ours.optimizer.zero_grad()
    ours.usual(2)
    assert bool(ours.early[-1]) == (comm.size > 1)
    assert_alike(comm, ours.model)


def hooks_of(model: torch.nn.Module) -> int:
    return sum(len(p._post_accumulate_grad_hooks or {}) for p in model.parameters())


@pytest.mark.parametrize("who", ["nobody", "one", "all"])
@pytest.mark.parametrize("gone", ["one", "all"])
def test_an_optimizer_that_is_garbage_collected(comm: MPI.Comm, who: str, gone: str) -> None:
    """Its hooks go with it; after a backward without a step, what was sent is not left to MPI."""
    ours = Training(comm, True, method=mpisign.signum())
    ours.usual(2)
    model = ours.model
    assert hooks_of(model) == (len(list(model.parameters())) if comm.size > 1 else 0)
    ours.optimizer.zero_grad()
    if who == "all" or (who == "one" and last(comm)):
        ours.backward()
    optimizer = weakref.ref(ours.optimizer)
    if gone == "all" or not last(comm):
        del ours
        gc.collect()
        assert optimizer() is None
        assert not hooks_of(model)
        model(torch.ones(1, 8)).sum().backward()
    other = Training(comm, True, method=mpisign.signum())
    other.usual(2)
    assert_alike(comm, other.model)
    session = current()
    mpisign.shutdown()
    stranded = who == "one" and last(comm) and comm.size > 1
    assert bool(session.watchdog._posted) == stranded, "MPI has what nobody can take back until the process ends"


def test_optimizers_that_are_gone_leave_their_communicators_to_others(comm: MPI.Comm) -> None:
    """One after the other, as in a sweep; and not while one rank alone still has the optimizer."""
    kept: list[Training] = []
    for number, lines in enumerate((1, 1, 1, 2, 2, 2)):
        ours = Training(comm, True, method=mpisign.signum())
        ours.usual(3)
        assert ours.early[-1] == (ours.messages() if comm.size > 1 else set())
        assert_alike(comm, ours.model)
        assert len(current().group.lines) == (lines if comm.size > 1 else 0)
        if number == 2 and last(comm):
            kept.append(ours)
        del ours


def test_a_model_with_hooks_is_copied_and_pickled_without_them(comm: MPI.Comm) -> None:
    ours = Training(comm, True, method=mpisign.signum())
    ours.usual(2)
    for copied in (copy.deepcopy(ours.model), pickle.loads(pickle.dumps(ours.model))):
        assert not hooks_of(copied)
    usual(ours)
