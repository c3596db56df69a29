"""mpisign.session on real ranks."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import torch

import mpisign
from mpisign.memory import Memory

if TYPE_CHECKING:
    from mpi4py import MPI

pytestmark = pytest.mark.mpi


def one_parameter() -> tuple[torch.nn.Parameter, mpisign.DistributedSignOptimizer]:
    parameter = torch.nn.Parameter(torch.zeros(3))
    sgd = torch.optim.SGD([parameter], lr=1.0)
    return parameter, mpisign.DistributedSignOptimizer(sgd, method=mpisign.signsgd())


def test_ranks_are_mpis_own(comm: MPI.Comm) -> None:
    assert (mpisign.rank(), mpisign.size()) == (comm.rank, comm.size)


def test_nodes_are_mpis_shared_memory_split(comm: MPI.Comm) -> None:
    from mpi4py import MPI

    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    members = comm.allgather(tuple(node.allgather(comm.rank)))
    nodes = sorted(set(members))
    assert (mpisign.local_rank(), mpisign.local_size()) == (node.rank, node.size)
    assert (mpisign.node_rank(), mpisign.num_nodes()) == (nodes.index(members[comm.rank]), len(nodes))
    node.Free()


def test_messages_are_large_only_where_every_rank_has_a_gpu(comm: MPI.Comm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or else ranks would cut them differently."""
    for without, messages in ((None, 1), (comm.size - 1, 2)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda without=without: comm.rank != without)
        mpisign.shutdown()
        mpisign.init()
        tensors = [torch.nn.Parameter(torch.zeros(n)) for n in (3, 8 * 2**20)]  # the second, of 1 MiB, goes first
        optimizer = mpisign.DistributedSignOptimizer(torch.optim.SGD(tensors, lr=1.0), method=mpisign.signsgd())
        tensors[0].grad = torch.ones_like(tensors[0])
        optimizer.step()
        assert optimizer.report is not None
        assert len(optimizer.report.exchange) == messages
        assert (tensors[0] == -1.0).all()
    monkeypatch.undo()
    mpisign.shutdown()


def test_nobody_leaves_a_barrier_before_all_have_come(comm: MPI.Comm) -> None:
    time.sleep(0.05 * comm.rank)
    came = time.monotonic()  # one clock for all processes of a node
    mpisign.barrier()
    left = time.monotonic()
    assert max(comm.allgather(came)) <= min(comm.allgather(left))


def test_double_init_names_the_rank_and_leaves_the_job_whole(comm: MPI.Comm) -> None:
    with pytest.raises(mpisign.AlreadyInitializedError, match=f"rank {comm.rank}: "):
        mpisign.init()
    assert mpisign.allgather_object(comm.rank) == list(range(comm.size))


def test_an_optimizer_outlives_the_world_it_was_built_in(comm: MPI.Comm) -> None:
    parameter, optimizer = one_parameter()
    for _ in range(2):
        parameter.grad = torch.tensor([1.0, -1.0, 1.0])
        optimizer.step()
        mpisign.shutdown()
        mpisign.init()
    assert parameter.tolist() == [-2.0, 2.0, -2.0]


def test_the_ranks_of_a_sub_communicator_decide_among_themselves(comm: MPI.Comm) -> None:
    side = comm.rank % 2
    half = comm.Split(side)
    mpisign.shutdown()
    mpisign.init(half)
    assert (mpisign.rank(), mpisign.size()) == (half.rank, half.size)
    parameter, optimizer = one_parameter()
    parameter.grad = torch.full((3,), 1.0 if side else -1.0)
    optimizer.step()
    assert parameter.tolist() == [-1.0 if side else 1.0] * 3
    assert optimizer.report.voters == tuple(range(half.size))
    mpisign.shutdown()
    half.Free()


def test_the_users_messages_and_the_librarys_do_not_meet(comm: MPI.Comm) -> None:
    from mpi4py import MPI

    expected = comm.irecv(source=MPI.ANY_SOURCE, tag=MPI.ANY_TAG)  # would take anything sent on this communicator
    parameter, optimizer = one_parameter()
    parameter.grad = torch.ones(3)
    optimizer.step()
    comm.isend("hello", (comm.rank + 1) % comm.size).wait()
    assert expected.wait() == "hello"


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize(
    ("act", "name"),
    [
        (mpisign.barrier, "barrier"),
        (lambda: mpisign.broadcast_object(1), "broadcast_object"),
        (lambda: mpisign.allgather_object(1), "allgather_object"),
        (lambda: mpisign.broadcast_parameters({}), "broadcast_parameters"),
        (lambda: mpisign.broadcast_optimizer_state(one_parameter()[1]), "broadcast_optimizer_state"),
        (lambda: mpisign.check_consistency(torch.nn.Linear(1, 1)), "check_consistency"),
    ],
)
def test_ranks_that_do_different_things_are_told(comm: MPI.Comm, act: Callable[[], object], name: str) -> None:
    """And since all are, the job can go on."""
    parameter, optimizer = one_parameter()
    parameter.grad = torch.ones(3)
    with pytest.raises(mpisign.ConsistencyError, match=rf"ranks \[0\] are in {name}\(\);.* in step\(\)"):
        act() if comm.rank == 0 else optimizer.step()
    mpisign.barrier()
    optimizer.step()
    assert parameter.tolist() == [-1.0] * 3


@dataclass(frozen=True)
class Sluggish(Memory):
    """A memory that remembers nothing, slowly: ``seconds[r]`` on rank r."""

    seconds: tuple[float, ...]
    name = "sluggish"
    elementwise = False

    def __call__(self, gradient: torch.Tensor, *_: object) -> torch.Tensor:
        time.sleep(self.seconds[mpisign.rank()])
        return gradient


@pytest.mark.few
@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("phase", ["handshake", "bucket 0, header"])
def test_those_who_wait_say_for_whom_at_which_step_and_phase(
    comm: MPI.Comm, caplog: pytest.LogCaptureFixture, phase: str
) -> None:
    """A rank comes late to a step, or takes its time inside one."""
    mpisign.shutdown()
    mpisign.init(stall_warning=1.0, stall_timeout=60.0)
    late = comm.size - 1
    delays = (*[0.0] * late, 5.0)
    slow = mpisign.Method(Sluggish(delays), mpisign.signsgd().codec, mpisign.signsgd().rule)
    parameter = torch.nn.Parameter(torch.zeros(3))
    sgd = torch.optim.SGD([parameter], lr=1.0)
    optimizer = mpisign.DistributedSignOptimizer(sgd, method=mpisign.signsgd() if phase == "handshake" else slow)
    if phase == "handshake":
        time.sleep(delays[comm.rank])
    parameter.grad = torch.ones(3)
    optimizer.step()
    if comm.rank != late:
        said = [r.getMessage() for r in caplog.records if f"step 0, {phase}" in r.getMessage()]
        assert all(text.startswith(f"rank {comm.rank} of {comm.size} has waited ") for text in said)
        assert any(
            text.endswith(f"; not heard from yet: ranks [{late}]") for text in said
        )  # at first perhaps others too
