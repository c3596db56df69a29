"""mpisign.overlap on real ranks: what programs do with gradients, parameters and steps, and no bit is another."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from methods_table import TABLE
from torch.utils.checkpoint import checkpoint

import mpisign

from .overlapping import BOTH, STEPS, Training, assert_alike, assert_early, beside, network, usual

if TYPE_CHECKING:
    from mpi4py import MPI

pytestmark = [pytest.mark.mpi, pytest.mark.usefixtures("a_node_a_rank")]


# --------------------------------------------------------------------------------------- what a gradient is made of


@BOTH
@pytest.mark.parametrize("zero", ["none", "zeros", "model"])
def test_however_gradients_are_reset(comm: MPI.Comm, zero: str, overlap: bool | str) -> None:
    def program(training: Training) -> None:
        for _ in range(STEPS):
            training.backward()
            training.step()
            if zero == "model":
                training.model.zero_grad()
            else:
                training.optimizer.zero_grad(set_to_none=zero == "none")

    assert_early(beside(comm, program, overlap, method=mpisign.signum()))


@BOTH
def test_all_backward_passes_but_the_last_under_no_sync(comm: MPI.Comm, overlap: bool | str) -> None:
    def program(training: Training) -> None:
        for _ in range(STEPS):
            training.optimizer.zero_grad()
            with training.optimizer.no_sync():
                training.backward(1)
                training.backward(2)
            training.backward()
            training.step()

    ours = beside(comm, program, overlap, method=mpisign.signum())
    assert_early(ours)
    assert ours.heard == []


@BOTH
def test_two_backward_passes_a_step(comm: MPI.Comm, overlap: bool | str) -> None:
    """And one in the last, as there are no more batches: nothing leaves early then."""

    def program(training: Training) -> None:
        for at in range(STEPS + 1):
            training.optimizer.zero_grad()
            training.backward(1)
            if at < STEPS:
                training.backward(2)
            training.step()
        training.usual()

    ours = beside(comm, program, overlap, method=mpisign.signum(), backward_passes_per_step=2)
    assert ours.early[STEPS:] == [set(), set()]
    assert_early(ours, until=STEPS)
    assert ours.heard == []


def test_parameters_that_one_of_two_passes_does_not_reach(comm: MPI.Comm) -> None:
    """They have no more than they would have in one pass that does not reach them: their messages leave in the step."""

    def program(training: Training) -> None:
        for _ in range(STEPS):
            training.optimizer.zero_grad()
            training.backward(1)
            training.model[2:](torch.full((2, 12), 0.1 * comm.rank)).square().sum().backward()
            training.step()

    for overlap in (True, "auto"):
        ours = beside(comm, program, overlap, method=mpisign.signum(), backward_passes_per_step=2)
        assert ours.heard == []
        if comm.size > 1:
            assert 0 < len(ours.early[-1]) < len(ours.messages())


def test_shared_weights(comm: MPI.Comm) -> None:
    def tied() -> torch.nn.Module:
        model = network()
        layer = torch.nn.Linear(12, 12)
        layer.load_state_dict(model[2].state_dict())
        return torch.nn.Sequential(model[0], layer, torch.nn.Tanh(), layer, model[4])

    assert_early(beside(comm, usual, method=mpisign.signum(), model=tied))


@BOTH
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(comm: MPI.Comm, reentrant: bool, overlap: bool | str) -> None:
    class Checkpointed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = network()

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            hidden = inputs.requires_grad_(True)
            for part in (self.inside[:2], self.inside[2:4], self.inside[4:]):
                hidden = checkpoint(part, hidden, use_reentrant=reentrant)
            return hidden

    assert_early(beside(comm, usual, overlap, method=mpisign.signum(), model=Checkpointed))


def test_a_layer_that_reentrant_checkpointing_reaches_twice(comm: MPI.Comm) -> None:
    """Its gradient is added to twice in one backward: "auto" never begins, and True says so."""

    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.last = torch.nn.Linear(8, 8), torch.nn.Linear(8, 3)
            for parameter in self.parameters():
                torch.nn.init.constant_(parameter, 0.1)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            hidden = inputs.requires_grad_(True)
            for _ in range(2):
                hidden = checkpoint(self.layer, hidden, use_reentrant=True)
            its: torch.Tensor = self.last(hidden)
            return its

    ours = beside(comm, usual, "auto", method=mpisign.signum(), model=Twice)
    assert not any(ours.early)
    strict = Training(comm, True, model=Twice, method=mpisign.signum())
    strict.usual()
    if comm.size > 1:
        with pytest.raises(mpisign.SynchronizationError, match=r"on rank 0 the gradient of 'layer\.(bias|weight)' was"):
            strict.usual()


@pytest.mark.filterwarnings("default")
@pytest.mark.few
@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.long)])
def test_compiled(comm: MPI.Comm, whole: bool) -> None:
    """Also with compiled autograd, which moves all hooks to the end of backward."""
    torch.compiler.reset()

    def program(training: Training) -> None:
        loss = torch.compile(training.loss, backend="eager")
        for _ in range(STEPS):
            training.optimizer.zero_grad()
            its = loss()
            if whole:
                with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
                    its.backward()
            else:
                its.backward()
            training.step()

    ours = beside(comm, program, method=mpisign.signum())
    assert_early(ours)


# ------------------------------------------------------------------------------------------------ what changes


@BOTH
def test_frozen_and_unfrozen(comm: MPI.Comm, overlap: bool | str) -> None:
    def program(training: Training) -> None:
        training.usual(STEPS)
        training.model[2].requires_grad_(False)
        training.usual(2)
        training.model[2].requires_grad_(True)
        training.usual(2)

    ours = beside(comm, program, overlap, method=mpisign.signum())
    sent = [bool(step) for step in ours.early[STEPS:]]
    assert sent == [False, comm.size > 1] * 2, "the first step of another plan has to be agreed on"


@pytest.mark.parametrize("between", [False, True], ids=["before backward", "between backward and step"])
def test_another_group_of_parameters(comm: MPI.Comm, between: bool) -> None:
    def program(training: Training) -> None:
        more = torch.nn.Parameter(torch.full((33,), 0.5))
        training.usual(3)
        training.optimizer.zero_grad()
        if between:
            training.backward()
        training.optimizer.add_param_group({"params": [more]})
        if not between:
            training.backward()
        training.step()
        for _ in range(3):
            training.optimizer.zero_grad()
            (training.loss() + more.square().sum() * (comm.rank + 1)).backward()
            training.step()
        assert (more < 0.5).all()

    for name in ("signum", "double_squeeze", "ef_signsgd"):
        ours = beside(comm, program, method=TABLE[name](comm.size), exchange="auto")
        assert bool(ours.early[-1]) == (comm.size > 1)
        assert ours.heard == []


def test_a_method_that_changes_with_the_step(comm: MPI.Comm) -> None:
    """In the step in which it does, nothing leaves early."""
    ours = beside(comm, usual, method=mpisign.one_bit_adam(freeze_step=3))
    assert [bool(step) for step in ours.early] == [comm.size > 1 and at not in (0, 3) for at in range(STEPS)]


def test_a_closure(comm: MPI.Comm) -> None:
    def program(training: Training) -> None:
        for _ in range(STEPS):

            def closure() -> torch.Tensor:
                training.optimizer.zero_grad()
                loss = training.loss()
                loss.backward()
                return loss

            with training.stepping():
                assert training.optimizer.step(closure).item() > 0

    beside(comm, program, method=mpisign.signum())
    beside(comm, program, "auto", method=mpisign.signum())


@pytest.mark.parametrize("name", ["signum", "ef_signsgd"])
def test_a_scheduler_that_steps_between_backward_and_step(comm: MPI.Comm, name: str) -> None:
    """Error feedback is in units of the learning rate, so what was sent by another does not count."""

    def program(training: Training) -> None:
        scheduler = torch.optim.lr_scheduler.ExponentialLR(training.optimizer, 0.5)
        for at in range(STEPS):
            training.optimizer.zero_grad()
            training.backward()
            if at % 2:
                scheduler.step()
            training.step()

    for overlap in (True, "auto"):
        beside(comm, program, overlap, method=TABLE[name](comm.size))


def test_agreement_before_the_next_backward(comm: MPI.Comm) -> None:
    ours = beside(comm, usual, method=mpisign.signum())
    shares = ours.optimizer.report.agreement()
    assert len(shares) == comm.size
    if comm.size > 1:
        ours.optimizer.zero_grad()
        ours.backward()
        with pytest.raises(mpisign.MpisignError, match="are gone"):
            ours.optimizer.report.agreement()
        ours.step()


def test_evaluation_on_one_rank_alone(comm: MPI.Comm) -> None:
    def program(training: Training) -> None:
        for _ in range(STEPS):
            training.usual()
            if comm.rank == 0:
                with torch.no_grad():
                    training.loss(7)
                training.model(torch.ones(2, 8)).sum()  # also one that builds a graph

    assert_early(beside(comm, program, method=mpisign.signum()))
    assert_alike(comm, beside(comm, program, "auto", method=mpisign.signum()).model)
