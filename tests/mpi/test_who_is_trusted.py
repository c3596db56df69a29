"""What SECURITY.md says of a rank that runs other code than the rest, tried on a rank that does."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

import pytest
import torch

import mpisign
from mpisign import ConsistencyError
from mpisign.rules import MajorityVote

if TYPE_CHECKING:
    from mpi4py import MPI

pytestmark = pytest.mark.mpi(min_size=2)

ELEMENTS = 6_400


def voted(exchange: str) -> tuple[torch.nn.Module, mpisign.DistributedSignOptimizer]:
    """All vote for -1."""
    model = torch.nn.Linear(ELEMENTS, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    model.weight.grad = torch.ones_like(model.weight)
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer = mpisign.DistributedSignOptimizer(sgd, method=mpisign.signsgd(), exchange=exchange)
    optimizer.step()
    return model, optimizer


@pytest.fixture
def liar(comm: MPI.Comm, monkeypatch: pytest.MonkeyPatch) -> int:
    """A rank that inverts whatever it decides."""
    if comm.rank == comm.size - 1:
        decide = MajorityVote.decide

        def invert(self: MajorityVote, messages: Any, out: torch.Tensor, *rest: Any) -> Any:
            count = decide(self, messages, out, *rest)
            out[0].bitwise_not_()
            return count

        monkeypatch.setattr(MajorityVote, "decide", invert)
    return comm.size - 1


def test_two_phase_trusts_the_owner_of_a_shard(comm: MPI.Comm, liar: int) -> None:
    """It decides its shard alone, on every rank, and no check sees it."""
    model, optimizer = voted("two_phase")
    wrong = int((model.weight == 1).sum())
    assert abs(wrong - ELEMENTS / comm.size) <= 32 * comm.size, "about a shard"
    mpisign.check_consistency(model, optimizer)


def test_all_gather_trusts_nobody_to_count(comm: MPI.Comm, liar: int) -> None:
    """It changes its own replica alone, and the check names it."""
    model, optimizer = voted("allgather")
    assert bool((model.weight == (1 if comm.rank == liar else -1)).all())
    odd = r"ranks \[0\]|ranks \[1\]" if comm.size == 2 else rf"ranks \[{liar}\] differ"  # of two, either may be odd
    with pytest.raises(ConsistencyError, match=odd):
        mpisign.check_consistency(model, optimizer)


class Code:
    def __reduce__(self) -> tuple[object, ...]:
        return print, ("run by another rank",)


def test_users_objects_run_code_unless_pickles_are_off(comm: MPI.Comm, capsys: pytest.CaptureFixture[str]) -> None:
    mpisign.broadcast_object(Code() if comm.rank == 0 else None)
    assert ("run by another rank" in capsys.readouterr().out) == (comm.rank != 0)
    mpisign.shutdown()
    mpisign.init(pickle=False)
    with pytest.raises(mpisign.OptionError):
        mpisign.broadcast_object(Code() if comm.rank == 0 else None)
    assert pickle.dumps(Code())
    assert "run by another rank" not in capsys.readouterr().out
