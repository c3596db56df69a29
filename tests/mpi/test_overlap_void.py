"""mpisign.overlap on real ranks: what has left and must not count."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from methods_table import TABLE

import mpisign
from mpisign.session import current

from .overlapping import BOTH, METHODS, STEPS, WINDOWS, Training, assert_alike, beside, last, same, sgd

if TYPE_CHECKING:
    from mpi4py import MPI

pytestmark = [pytest.mark.mpi, pytest.mark.usefixtures("a_node_a_rank")]

several = pytest.mark.mpi(min_size=2)


# -------------------------------------------------------------------------- programs that are not as they must be


def twice(training: Training) -> None:
    training.usual(STEPS)
    for _ in range(3):
        training.optimizer.zero_grad()
        training.backward(1)
        training.backward(2)
        training.step()


def clips(training: Training) -> None:
    training.usual(STEPS)
    for _ in range(3):
        training.optimizer.zero_grad()
        training.backward()
        torch.nn.utils.clip_grad_norm_(training.model.parameters(), 0.1)
        training.step()


def replaces(training: Training) -> None:
    """One gradient by another, which may well lie where that one was."""
    training.usual(STEPS)
    for _ in range(3):
        training.optimizer.zero_grad()
        training.backward()
        first = training.model[0].weight
        other = (first.grad * -0.5).tolist()
        first.grad = None
        first.grad = torch.tensor(other)
        training.step()


def adds_under_no_sync(training: Training) -> None:
    """The wrong way round: the pass that is said to be the last comes first."""
    training.usual(STEPS)
    for _ in range(3):
        training.optimizer.zero_grad()
        training.backward(1)
        with training.optimizer.no_sync():
            training.backward(2)
        training.step()


PROGRAMS = pytest.mark.parametrize(
    ("program", "what"),
    [
        (twice, "was added to 2 times"),
        (clips, "was changed after backward"),
        (replaces, "was changed after backward"),
        (adds_under_no_sync, "was changed after backward"),
    ],
)


@METHODS
@PROGRAMS
def test_auto_warns_once_and_is_off_for_good(comm: MPI.Comm, program: Any, what: str, name: str) -> None:
    def until_the_end(training: Training) -> None:
        program(training)
        training.usual(STEPS)

    ours = beside(comm, until_the_end, "auto", method=TABLE[name](comm.size))
    if comm.size == 1:
        assert not any(ours.early)
        return
    assert all(ours.early[WINDOWS : STEPS + 1])
    assert not any(ours.early[STEPS + 1 :])
    (warning,) = ours.heard
    assert f"rank {comm.rank}: " in warning
    assert what in warning
    assert "parameter" in warning or "gradient of '" in warning


@several
@PROGRAMS
def test_true_is_an_error_on_every_rank(comm: MPI.Comm, program: Any, what: str) -> None:
    ours = Training(comm, True, method=mpisign.signum())
    with pytest.raises(mpisign.SynchronizationError, match=rf"on rank 0 the gradient of '0\.weight' {what}") as caught:
        program(ours)
    assert "on rank 1 " in str(caught.value)
    assert "no_sync()" in str(caught.value)
    before = [p.detach().clone() for p in ours.model.parameters()]
    assert same(before, ours.trace[STEPS - 1][-1]), "nothing has been applied"
    ours.optimizer.step()  # goes on with what is in the gradients
    ours.usual(2)
    assert ours.early[-1] == ours.messages()
    assert_alike(comm, ours.model)


@several
def test_a_report_tells_also_of_what_was_dropped(comm: MPI.Comm) -> None:
    ours, tracer = Training(comm, "auto", method=mpisign.signum()), current().tracer
    ours.usual(WINDOWS + 1)
    usual, plan = ours.optimizer.report, ours.optimizer._plan
    assert usual is not None
    assert plan is not None
    headers, messages = (sum(its.bytes_sent for its in some) for some in (plan.headers, plan.exchanges))
    mark = tracer.mark()
    ours.optimizer.zero_grad()
    ours.backward()
    if last(comm):
        ours.model[0].weight.grad.mul_(2)  # the others have nothing to drop on their own
    opened = tracer.mark()
    ours.step()
    report = ours.optimizer.report
    assert report is not None
    assert report.bytes_sent == usual.bytes_sent + headers + messages
    assert report.header_bytes == usual.header_bytes + headers
    assert report.seconds == tracer.seconds(mark)
    assert report.exposed_seconds == tracer.seconds(opened)["exchange"]


@several
def test_one_rank_alone_is_named_to_all(comm: MPI.Comm) -> None:
    ours = Training(comm, True, method=mpisign.ef_signsgd())
    ours.usual(2)
    ours.optimizer.zero_grad()
    ours.backward()
    if last(comm):
        ours.model[2].weight.grad.mul_(-1)
    its = rf"overlap=True, and on rank {comm.size - 1} the gradient of '2\.weight' was changed after backward: "
    with pytest.raises(mpisign.SynchronizationError, match=its):
        ours.step()


@several
def test_one_rank_alone_is_off_and_the_others_go_on(comm: MPI.Comm) -> None:
    def program(training: Training) -> None:
        training.usual(STEPS)
        training.optimizer.zero_grad()
        training.backward()
        if last(comm):
            training.model[2].weight.grad.mul_(-1)
        training.step()
        training.usual(3)

    ours = beside(comm, program, "auto", method=mpisign.signum())
    assert len(ours.heard) == last(comm)
    assert bool(ours.early[-1]) == (not last(comm))


def test_a_discriminator_with_one_backward_before_its_first_step_and_two_later(comm: MPI.Comm) -> None:
    def program(training: Training) -> None:
        generator = torch.nn.Linear(4, 8)
        for parameter in generator.parameters():
            torch.nn.init.constant_(parameter, 0.2)
        ours = mpisign.DistributedSignOptimizer(
            torch.optim.SGD(generator.parameters(), lr=0.1), overlap=training.overlap, bucket_cap_mb=1e-6
        )
        for at in range(STEPS):
            random = torch.Generator().manual_seed(10 * at + comm.rank)
            fake = generator(torch.randn(5, 4, generator=random))
            training.optimizer.zero_grad()
            training.backward()
            if at:
                training.model(fake.detach()).sum().backward()
            training.step()
            ours.zero_grad()
            training.model(fake).square().sum().backward()  # through the discriminator
            ours.step()

    ours = beside(comm, program, "auto", method=mpisign.signum())
    assert not any(ours.early), "there were no three steps in which it would have been right"
    if comm.size > 1:
        with pytest.raises(mpisign.SynchronizationError, match=r"3 times on end.*no_sync\(\)"):
            beside(comm, program, True, method=mpisign.signum())


@pytest.mark.parametrize("count", [2, 3])
def test_what_was_sent_and_is_dropped_by_zero_grad(comm: MPI.Comm, count: int) -> None:
    """As where another network is trained through this one: nobody is to blame at first, but it costs."""

    def program(training: Training) -> None:
        training.usual(STEPS)
        for _ in range(count):
            training.backward(1)
            training.optimizer.zero_grad()
            training.backward()
            training.step()
        training.usual(2)

    ours = beside(comm, program, "auto", method=mpisign.ef_signsgd())
    stops = count == 3 and comm.size > 1
    assert len(ours.heard) == stops, "it stops sending everything twice"
    assert bool(ours.early[-1]) == (not stops and comm.size > 1)
    if stops:
        with pytest.raises(mpisign.SynchronizationError, match="3 times on end"):
            beside(comm, program, True, method=mpisign.ef_signsgd())
    else:
        assert beside(comm, program, True, method=mpisign.ef_signsgd()).heard == []


@pytest.mark.parametrize("way", ["step", "unscale", "unit"])
@BOTH
def test_a_grad_scaler_turns_it_off_and_it_is_said_once(comm: MPI.Comm, way: str, overlap: bool | str) -> None:
    """Also in a step whose gradients are not finite."""

    def program(training: Training) -> None:
        scaler = torch.amp.GradScaler("cpu", init_scale=1.0 if way == "unit" else 64.0, growth_interval=100)
        for at in range(STEPS + 3):
            training.optimizer.zero_grad()
            loss = training.loss()
            if at == STEPS + 1 and last(comm):
                loss = loss * float("inf")
            scaler.scale(loss).backward()
            if way == "unscale":
                scaler.unscale_(training.optimizer)
                torch.nn.utils.clip_grad_norm_(training.model.parameters(), 0.5)
            with training.stepping():
                scaler.step(training.optimizer)
            scaler.update()

    ours = beside(comm, program, overlap, method=mpisign.signum(), inner=sgd)
    assert not any(ours.early[2:]), "it is off before the third step"
    if overlap is True and comm.size > 1:
        (said,) = ours.heard
        assert "GradScaler" in said
    else:
        assert ours.heard == []


@BOTH
def test_synchronize_and_a_step_under_skip_synchronize(comm: MPI.Comm, overlap: bool | str) -> None:
    def program(training: Training) -> None:
        for _ in range(STEPS):
            training.optimizer.zero_grad()
            training.backward()
            with training.stepping():
                training.optimizer.synchronize()
                torch.nn.utils.clip_grad_norm_(training.model.parameters(), 1.0)
                with training.optimizer.skip_synchronize():
                    training.optimizer.step()

    ours = beside(comm, program, overlap, method=mpisign.mean())
    assert ours.early[-1] == (ours.messages() if comm.size > 1 else set())
    assert ours.heard == []


# ------------------------------------------------------------------------------------------------- what goes wrong


@METHODS
def test_an_exception_between_backward_and_step(comm: MPI.Comm, name: str) -> None:
    """On one rank, which begins the step again; the others do not know."""

    def program(training: Training) -> None:
        training.usual(STEPS)
        for _ in range(2):
            training.optimizer.zero_grad()
            if last(comm):
                training.backward(9)
                training.optimizer.zero_grad()
            training.backward()
            training.step()
        training.usual()

    for overlap in (True, "auto"):
        ours = beside(comm, program, overlap, method=TABLE[name](comm.size))
        assert ours.heard == []


@METHODS
def test_an_exception_inside_another_hook(comm: MPI.Comm, name: str) -> None:
    """In the middle of backward; the rank begins again."""

    def program(training: Training) -> None:
        def fails(gradient: torch.Tensor) -> None:
            raise ZeroDivisionError

        training.usual(STEPS)
        for _ in range(2):
            training.optimizer.zero_grad()
            if last(comm):
                hook = training.model[2].weight.register_hook(fails)
                with pytest.raises(ZeroDivisionError):
                    training.backward(9)
                hook.remove()
                training.optimizer.zero_grad()
            training.backward()
            training.step()
        training.usual()

    for overlap in (True, "auto"):
        assert beside(comm, program, overlap, method=TABLE[name](comm.size)).heard == []


@several
def test_options_that_differ_do_not_spoil_what_has_left(comm: MPI.Comm) -> None:
    """All ranks get the error, set it right, and go on with the same gradients."""
    ours = Training(comm, True, method=mpisign.signum())
    ours.usual(3)
    ours.optimizer.zero_grad()
    ours.backward()
    if last(comm):
        ours.optimizer.param_groups[0]["lr"] = 0.5
    with pytest.raises(mpisign.ConsistencyError, match="apply something else"):
        ours.step()
    ours.optimizer.param_groups[0]["lr"] = 0.05
    ours.step()
    ours.usual()
    assert ours.early[-1] == ours.messages()
    assert_alike(comm, ours.model)
