"""Steps in which nobody votes, or one rank never does, end in a warning or an error that is the same on all ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

import mpisign
from mpisign import DeadTrainingError
from mpisign.vigil import FIRST

from .wrapped import NAN, assert_equal_on_all_ranks, wrap

if TYPE_CHECKING:
    from mpi4py import MPI

pytestmark = [pytest.mark.mpi, pytest.mark.few]


@pytest.fixture
def raising(job: None) -> None:
    mpisign.shutdown()
    mpisign.init(on_dead_training="raise", stall_timeout=60.0)


def train(rank: int, bad: set[int], steps: int, by_hand: bool = False) -> nn.Parameter:
    tensor = nn.Parameter(torch.zeros(40))
    optimizer = wrap([tensor], lr=1.0)
    for step in range(steps):
        tensor.grad = torch.full((40,), NAN if rank in bad else 1.0)
        if by_hand:
            optimizer.synchronize()
            with optimizer.skip_synchronize():
                optimizer.step()
        else:
            optimizer.step()
        assert optimizer.report is not None
        assert optimizer.report.step == step
    return tensor


def test_all_ranks_are_warned_once(comm: MPI.Comm, caplog: pytest.LogCaptureFixture) -> None:
    train(comm.rank, set(range(comm.size)), 2 * FIRST - 1)
    texts = [record.getMessage() for record in caplog.records]
    assert comm.allgather(len(texts)) == [1] + [0] * (comm.size - 1)
    if comm.rank == 0:
        assert "training has died: nobody has voted in 32 steps in a row" in texts[0]
        assert f"rank {comm.size - 1}: non-finite gradient" in texts[0] or comm.size > 4


@pytest.mark.usefixtures("raising")
@pytest.mark.parametrize("by_hand", [False, True])
def test_all_ranks_raise_together(comm: MPI.Comm, by_hand: bool) -> None:
    with pytest.raises(DeadTrainingError, match=rf"nobody has voted in 32 steps.*this is rank {comm.rank}"):
        train(comm.rank, set(range(comm.size)), FIRST, by_hand)
    mpisign.barrier()


@pytest.mark.usefixtures("raising")
@pytest.mark.mpi(min_size=2)
def test_ranks_that_have_joined_raise_with_the_others(comm: MPI.Comm) -> None:
    tensor = nn.Parameter(torch.zeros(40))
    optimizer = wrap([tensor])

    def train() -> None:
        for _ in range(2 * FIRST if comm.rank == 0 else 1):
            tensor.grad = torch.full((40,), NAN)
            optimizer.step()
        optimizer.join()

    with pytest.raises(DeadTrainingError, match="nobody has voted in 32 steps"):
        train()
    mpisign.barrier()


@pytest.mark.usefixtures("raising")
@pytest.mark.mpi(min_size=2)
def test_the_others_go_on_without_a_rank_that_never_votes(comm: MPI.Comm, caplog: pytest.LogCaptureFixture) -> None:
    sick = comm.size - 1
    tensor = train(comm.rank, {sick}, FIRST)
    assert_equal_on_all_ranks(comm, [tensor])
    assert tensor.tolist() == [-float(FIRST)] * 40
    texts = [record.getMessage() for record in caplog.records]
    assert comm.allgather(len(texts)) == [int(rank in (0, sick)) for rank in range(comm.size)]
    assert all(f"ranks [{sick}] have not cast a whole vote in 32 steps in a row" in text for text in texts)


@pytest.mark.mpi(min_size=2)
def test_where_models_are_exchanged_the_rank_itself_says_so(comm: MPI.Comm, caplog: pytest.LogCaptureFixture) -> None:
    tensor = nn.Parameter(torch.zeros(40))
    optimizer = wrap([tensor], method=mpisign.monna(0))
    for _ in range(FIRST):
        tensor.grad = torch.full((40,), NAN if comm.rank == 0 else 1.0)
        optimizer.step()
    assert comm.allgather(len(caplog.records)) == [1] + [0] * (comm.size - 1)


@pytest.mark.parametrize("way", ["argument", "variable"])
def test_it_is_an_option_or_a_variable(comm: MPI.Comm, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mpisign.shutdown()
    monkeypatch.setenv("MPISIGN_ON_DEAD_TRAINING", "raise" if way == "variable" else "warn")
    mpisign.init(on_dead_training="raise" if way == "argument" else None)
    with pytest.raises(DeadTrainingError):
        train(comm.rank, set(range(comm.size)), FIRST)


def test_other_choices_are_refused(comm: MPI.Comm, monkeypatch: pytest.MonkeyPatch) -> None:
    mpisign.shutdown()
    with pytest.raises(
        mpisign.OptionError, match="on_dead_training='abort' is not known: choose one of 'warn', 'raise'"
    ):
        mpisign.init(on_dead_training="abort")
    monkeypatch.setenv("MPISIGN_ON_DEAD_TRAINING", "never")
    with pytest.raises(mpisign.OptionError, match="on_dead_training='never'"):
        mpisign.init()


@pytest.mark.mpi(min_size=2)
def test_ranks_that_choose_differently_are_told(comm: MPI.Comm) -> None:
    mpisign.shutdown()
    odd = comm.size - 1
    says = rf"ranks \[{odd}\] have called init\(on_dead_training='raise'\) and the others .*='warn'\)"
    with pytest.raises(mpisign.ConsistencyError, match=says):
        mpisign.init(on_dead_training="raise" if comm.rank == odd else "warn")
