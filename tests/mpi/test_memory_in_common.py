"""mpisign.memory.common on real ranks: who gets a state from another rank goes on with it, and replicas stay equal."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch

import mpisign
from mpisign import DistributedSignOptimizer, Method

if TYPE_CHECKING:
    from mpi4py import MPI

pytestmark = [pytest.mark.mpi(min_size=2), pytest.mark.filterwarnings("ignore:.*starts fresh")]

Make = Callable[[], Method]

KEEPING = {
    "one_bit_adam": lambda: mpisign.one_bit_adam(3),
    "ef21": lambda: mpisign.ef21(0.1),
    "centered_clipping": mpisign.centered_clipping,
    "double_squeeze": mpisign.double_squeeze,
    "stc": lambda: mpisign.stc(0.1),
    "signum": mpisign.signum,  # and where rows of zeros have been seen
}
each = pytest.mark.parametrize("name", KEEPING)
both = pytest.mark.parametrize("exchange", ["allgather", "auto"])


class Job:
    """An embedding, of which few rows have gradients, and a layer; a rate that falls from batch to batch."""

    def __init__(self, name: str, exchange: str) -> None:
        torch.manual_seed(0)
        self.table, self.layer = torch.nn.Embedding(6, 70), torch.nn.Linear(70, 3)
        self.model = torch.nn.ModuleList([self.table, self.layer])
        sgd = torch.optim.SGD(self.model.parameters(), lr=0.05)
        named, options = self.model.named_parameters(), {"method": KEEPING[name](), "exchange": exchange}
        self.optimizer = DistributedSignOptimizer(sgd, named, **options)
        self.schedule = torch.optim.lr_scheduler.ExponentialLR(sgd, 0.9)

    def train(self, steps: int, first: int = 0) -> Job:
        for at in range(first, first + steps):
            generator = torch.Generator().manual_seed(100 * at + mpisign.rank())
            self.optimizer.zero_grad()
            rows = torch.randint(0, 3, (4,), generator=generator)
            (self.layer(self.table(rows)) * torch.randn(4, 3, generator=generator)).sum().backward()
            self.optimizer.step()
            self.schedule.step()
        return self

    def assert_equal(self) -> None:
        mpisign.check_consistency(self.model, self.optimizer)
        told = mpisign.allgather_object([p.tolist() for p in self.model.parameters()])
        assert all(its == told[0] for its in told)


@each
@both
def test_rank_0_loads_and_the_others_get_it(comm: MPI.Comm, name: str, exchange: str) -> None:
    """As scripts do that come from Horovod."""
    before = Job(name, exchange).train(6)
    state: Any = {"model": before.model.state_dict(), "optimizer": before.optimizer.state_dict()}
    job = Job(name, exchange)
    if comm.rank == 0:
        job.model.load_state_dict(state["model"])
        job.optimizer.load_state_dict(state["optimizer"])
    mpisign.broadcast_parameters(job.model.state_dict())
    mpisign.broadcast_optimizer_state(job.optimizer)
    job.train(4, first=6).assert_equal()


@each
def test_the_memory_of_ones_own_stays(comm: MPI.Comm, name: str) -> None:
    """What is told again changes nothing, to the last bit."""
    job, other = (Job(name, "allgather").train(5) for _ in range(2))
    mpisign.broadcast_optimizer_state(other.optimizer, root_rank=comm.size - 1)
    for one in (job, other):
        one.train(3, first=5).assert_equal()
    assert all(torch.equal(a, b) for a, b in zip(job.model.parameters(), other.model.parameters(), strict=True))


@each
@both
def test_who_has_sat_out_goes_on_with_what_the_others_keep(comm: MPI.Comm, name: str, exchange: str) -> None:
    """Its schedule has stood still, in whose units an error may be."""
    job = Job(name, exchange).train(2)
    job.train(5 if comm.rank == 0 else 1, first=2)
    job.optimizer.join()
    rate = mpisign.broadcast_object(job.optimizer.param_groups[0]["lr"])
    job.optimizer.param_groups[0]["lr"] = rate
    job.assert_equal()
    for at in range(3):
        job.schedule = torch.optim.lr_scheduler.ConstantLR(job.optimizer.wrapped, factor=1.0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            job.train(1, first=10 + at)
        job.assert_equal()
