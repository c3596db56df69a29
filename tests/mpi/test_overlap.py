"""mpisign.overlap on real ranks: messages leave while backward runs, and change no bit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from gpu_branch import gpu_branch, needs_compiler
from methods_table import TABLE, among, exchanges, walk

import mpisign
from mpisign import overlap as overlap_module

from .overlapping import BOTH, NAN, STEPS, Training, assert_early, beside, network, usual

if TYPE_CHECKING:
    from mpi4py import MPI

pytestmark = [pytest.mark.mpi, pytest.mark.usefixtures("a_node_a_rank")]

VOTES = ("signsgd", "signum", "lion", "lion mean")
OTHERS = ("ef_signsgd", "double_squeeze", "mean", "scaled_vote error feedback")


# ------------------------------------------------------------------------------------------ methods and exchanges


@walk(lambda method: not method.memory.private)
def test_every_method_decides_the_same(comm: MPI.Comm, make: Any) -> None:
    method = make(comm.size)
    late = [phase.needs_all for phase in method.phases]
    ours = beside(comm, usual, "auto" if all(late) else True, method=method, exchange="auto")
    assert any(late) or bool(ours.early[-1]) == (comm.size > 1)


@BOTH
@pytest.mark.parametrize("exchange", ["allgather", "two_phase", "hierarchical"])
@pytest.mark.parametrize("name", VOTES)
def test_every_exchange_of_votes(comm: MPI.Comm, name: str, exchange: str, overlap: bool | str) -> None:
    assert_early(beside(comm, usual, overlap, method=TABLE[name](comm.size), exchange=exchange))


@BOTH
@pytest.mark.parametrize("name", OTHERS)
def test_every_exchange_of_numbers(comm: MPI.Comm, name: str, overlap: bool | str) -> None:
    method = TABLE[name](comm.size)
    for exchange in exchanges(method):
        assert_early(beside(comm, usual, overlap, method=method, exchange=exchange))


@pytest.mark.parametrize("nodes", [(0, 0, 0, 0, 0), (0, 0, 1, 1, 2), (0, 1, 0, 1, 0)])
def test_ranks_of_a_node_that_share_memory(comm: MPI.Comm, nodes: tuple[int, ...]) -> None:
    """Hierarchical exchanges have two phases inside the node; "auto" wants at least two nodes."""
    mpisign.shutdown()
    mpisign.init(stall_timeout=60, node_of=nodes[: comm.size])
    assert_early(beside(comm, usual, method=mpisign.signum(), exchange="hierarchical"))
    auto = beside(comm, usual, "auto", method=mpisign.signum(), exchange="hierarchical")
    assert any(auto.early) == (len(set(nodes[: comm.size])) > 1)


@needs_compiler
@BOTH
@pytest.mark.parametrize("name", ["signum", "ef_signsgd"])
def test_as_a_gpu_does_it(comm: MPI.Comm, name: str, overlap: bool | str) -> None:
    """Without streams: messages go through the kernels, one by one, and what packing has found is asked for."""
    with gpu_branch():
        assert_early(beside(comm, usual, overlap, method=TABLE[name](comm.size)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types(comm: MPI.Comm, dtype: torch.dtype) -> None:
    assert_early(beside(comm, usual, method=mpisign.signum(), model=lambda: network(dtype)))


@pytest.mark.parametrize("apply", ["auto", "optimizer"])
@pytest.mark.parametrize("inner", [torch.optim.SGD, torch.optim.AdamW])
def test_whoever_applies_the_decision(comm: MPI.Comm, inner: Any, apply: str) -> None:
    options: dict[str, Any] = {"inner": lambda p: inner(p, lr=0.01, weight_decay=0.1), "apply": apply}
    assert_early(beside(comm, usual, method=mpisign.mean(), **options))
    if inner is torch.optim.SGD:
        assert_early(beside(comm, usual, method=mpisign.signum(), **options))


def test_groups_with_methods_of_their_own(comm: MPI.Comm) -> None:
    def inner(parameters: Any) -> torch.optim.Optimizer:
        every = list(parameters)
        return torch.optim.SGD([{"params": every[::2]}, {"params": every[1::2], "method": mpisign.mean()}], lr=0.05)

    assert_early(beside(comm, usual, method=mpisign.signum(), inner=inner))


@BOTH
def test_groups_of_what_decays_and_the_rest(comm: MPI.Comm, overlap: bool | str) -> None:
    """As Trainer makes them: messages leave in the order of backward, and not of groups."""

    def inner(parameters: Any) -> torch.optim.Optimizer:
        every = list(parameters)
        decayed, rest = [p for p in every if p.dim() > 1], [p for p in every if p.dim() < 2]
        return torch.optim.SGD([{"params": decayed, "weight_decay": 0.1}, {"params": rest}], lr=0.05)

    left: list[set[int]] = []  # by the time at which backward begins with the first layer

    def program(training: Training) -> None:
        def look(*_: Any) -> None:
            left.append(training.sent())

        training.model[1].register_full_backward_pre_hook(look)
        training.usual(STEPS)

    ours = beside(comm, program, overlap, method=mpisign.signum(), inner=inner)
    assert_early(ours)
    assert left[-1] == (ours.messages() - {4, 5} if comm.size > 1 else set()), "all but of the first layer"


def test_one_big_message_or_many_small_ones(comm: MPI.Comm) -> None:
    def ends(cap: float) -> list[torch.Tensor]:
        return list(beside(comm, usual, method=mpisign.signum(), bucket_cap_mb=cap).model.parameters())

    assert all(map(torch.equal, ends(1e-6), ends(1.0)))


# ------------------------------------------------------------------------------------------------- who votes


@pytest.mark.parametrize("name", ["signum", "ef_signsgd", "double_squeeze"])
@BOTH
def test_a_nan_ends_the_ballot_at_the_same_parameter(comm: MPI.Comm, name: str, overlap: bool | str) -> None:
    def program(training: Training) -> None:
        spoilt = training.model[2].weight
        for at in range(STEPS):
            training.optimizer.zero_grad()
            bad = at in (2, 4) and comm.rank == comm.size - 1
            hook = spoilt.register_hook(lambda g: g.index_fill(0, torch.tensor(3), NAN)) if bad else None
            training.backward()
            training.step()
            if hook is not None:
                hook.remove()

    ours = beside(comm, program, overlap, method=TABLE[name](comm.size))
    assert [step[3] for step in ours.trace][2] == {comm.size - 1: "2.weight"}
    assert_early(ours)


@BOTH
def test_ranks_without_a_gradient_and_other_calls_in_between(comm: MPI.Comm, overlap: bool | str) -> None:
    def program(training: Training) -> None:
        for at in range(STEPS + 2):
            training.optimizer.zero_grad()
            if comm.rank or at < STEPS - 2 or at == STEPS:
                training.backward()
            mpisign.barrier()
            assert mpisign.broadcast_object(comm.rank, root_rank=comm.size - 1) == comm.size - 1
            assert len(mpisign.allgather_object(at)) == comm.size
            training.step()

    ours = beside(comm, program, overlap, method=mpisign.signum())
    idle = comm.rank == 0 and comm.size > 1
    assert [bool(step) for step in ours.early[STEPS - 2 :]] == [not idle and comm.size > 1] * 2 + [
        comm.size > 1,
        not idle and comm.size > 1,
    ]


def test_parameters_without_a_gradient_on_some_ranks(comm: MPI.Comm, monkeypatch: pytest.MonkeyPatch) -> None:
    """A message leaves when all in it is there, in order; what is behind one that is not leaves in the step."""

    class Branches(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk = torch.nn.Linear(8, 6)
            self.branches = torch.nn.ModuleList(torch.nn.Linear(6, 4) for _ in range(3))
            for parameter in self.parameters():
                torch.nn.init.constant_(parameter, 0.1)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            its: torch.Tensor = self.branches[comm.rank % 2](self.trunk(inputs))
            return its

    monkeypatch.setattr(overlap_module, "ATTEMPTS", STEPS - 2)
    ours = beside(comm, usual, method=mpisign.signum(), model=Branches)
    last = {0, 1}  # of the last branch, which nobody takes
    assert ours.early[-1] <= ours.messages() - last or comm.size == 1
    assert len(ours.heard) == (comm.size > 1)
    assert all("no effect for 4 steps" in it and "'branches.2.bias' has got no gradient" in it for it in ours.heard)
    monkeypatch.undo()
    assert beside(comm, usual, "auto", method=mpisign.signum(), model=Branches).heard == []


@BOTH
def test_join_with_uneven_batches(comm: MPI.Comm, overlap: bool | str) -> None:
    """The last rank has the most; the first one has made a backward that no step follows."""

    def program(training: Training) -> None:
        training.usual(STEPS + comm.rank)
        if comm.rank == 0:
            training.optimizer.zero_grad()
            training.backward()
        with training.listening():
            assert training.optimizer.join() == comm.size - 1
        training.optimizer.zero_grad()
        training.at = 50
        training.usual(3)

    ours = beside(comm, program, overlap, method=mpisign.signum())
    assert ours.heard == []
    assert bool(ours.early[-1]) == (comm.size > 1)


def test_what_methods_are_there() -> None:
    assert set((*VOTES, *OTHERS)) <= set(among(5))
