"""mpisign.sync on real ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch

import mpisign

from . import ballots

if TYPE_CHECKING:
    from mpi4py import MPI

pytestmark = pytest.mark.mpi


def roots(comm: MPI.Comm) -> set[int]:
    return {0, comm.size - 1}


def model(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2, bias=False))


# ------------------------------------------------------------------------------------------- broadcast_parameters


def every_kind(seed: int) -> dict[str, torch.Tensor]:
    """Sizes are odd, so that in one message no tensor but the first starts at a multiple of its item size."""
    random = ballots.generator(seed)
    tensors = {
        "flags": torch.rand(3, generator=random) < 0.5,
        "int8": torch.randint(-9, 9, (7,), generator=random).to(torch.int8),
        "complex": torch.randn(3, generator=random, dtype=torch.complex64),
        "count": torch.randint(0, 1 << 40, (), generator=random),
        "empty": torch.zeros(0, 4),
        "transposed": torch.randn(5, 3, generator=random).t(),
        "strided": torch.randn(9, 6, generator=random)[::2, 1::3],
        "channels_last": torch.randn(2, 3, 4, 5, generator=random).to(memory_format=torch.channels_last),
        "parameter": torch.nn.Parameter(torch.randn(4, generator=random)),
    }
    tensors |= {str(dtype): torch.randn(5, generator=random).to(dtype) for dtype in ballots.DTYPES}
    return tensors


def test_every_kind_of_tensor_arrives_in_place(comm: MPI.Comm) -> None:
    for root in roots(comm):
        mine, expected = every_kind(comm.rank), every_kind(root)
        before = {name: (t.data_ptr(), t.stride()) for name, t in mine.items()}
        mpisign.broadcast_parameters(mine, root_rank=root)
        for name, tensor in mine.items():
            assert torch.equal(tensor, expected[name]), name
        assert {name: (t.data_ptr(), t.stride()) for name, t in mine.items()} == before


def test_what_lies_between_a_strided_tensors_elements_is_left_alone(comm: MPI.Comm) -> None:
    whole = torch.full((6, 4), float(comm.rank))
    mpisign.broadcast_parameters([("columns", whole[:, ::2])])
    assert not whole[:, ::2].any()
    assert (whole[:, 1::2] == comm.rank).all()


def test_a_model_by_its_state_or_by_its_parameters(comm: MPI.Comm) -> None:
    by_state, by_parameters = model(comm.rank), model(comm.rank)
    by_state[1].running_mean += comm.rank
    by_parameters[1].running_mean += comm.rank
    mpisign.broadcast_parameters(by_state.state_dict())
    mpisign.check_consistency(by_state)
    mpisign.broadcast_parameters(by_parameters.named_parameters())
    mpisign.check_consistency(by_parameters, buffers=False)
    assert (by_parameters[1].running_mean == comm.rank).all()


def test_tensors_beyond_one_message(comm: MPI.Comm) -> None:
    """Three of 20 MiB, in messages of about 32."""
    tensors = [(f"t{i}", torch.full((20 << 20,), comm.rank + i, dtype=torch.uint8)) for i in range(3)]
    mpisign.broadcast_parameters(tensors)
    assert [(t == i).all().item() for i, (_, t) in enumerate(tensors)] == [True] * 3


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize(
    "other",
    [
        pytest.param([("a", torch.zeros(3)), ("b", torch.zeros(2, 3))], id="shape"),
        pytest.param([("a", torch.zeros(3)), ("b", torch.zeros(6, dtype=torch.float16))], id="dtype"),
        pytest.param([("a", torch.zeros(3)), ("c", torch.zeros(6))], id="name"),
        pytest.param([("a", torch.zeros(3))], id="one-less"),
    ],
)
def test_other_tensors_on_one_rank_are_an_error_on_all(comm: MPI.Comm, other: list[tuple[str, torch.Tensor]]) -> None:
    odd = comm.size - 1
    tensors = other if comm.rank == odd else [("a", torch.full((3,), 1.0 + comm.rank)), ("b", torch.zeros(6))]
    before = [t.clone() for _, t in tensors]
    with pytest.raises(mpisign.ConsistencyError, match=rf"ranks \[{odd}\] .*this is rank {comm.rank}.*'b'"):
        mpisign.broadcast_parameters(tensors)
    assert all(torch.equal(t, b) for (_, t), b in zip(tensors, before, strict=True))


def test_a_rank_that_does_not_exist_cannot_be_the_root(comm: MPI.Comm) -> None:
    for broadcast in (mpisign.broadcast_parameters, mpisign.broadcast_object):
        with pytest.raises(mpisign.OptionError, match=f"root_rank={comm.size} .*0 .. {comm.size - 1}"):
            broadcast({}, root_rank=comm.size)


# ------------------------------------------------------------------------------------------- broadcast_optimizer_state


def a_few_steps(net: torch.nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
    for _ in range(count):
        optimizer.zero_grad()
        net(torch.randn(6, 4)).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("kind", [torch.optim.AdamW, lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9)])
def test_a_plain_optimizers_state(comm: MPI.Comm, kind: Callable[..., torch.optim.Optimizer]) -> None:
    """Step numbers, moments and group options; also to ranks that have no state yet."""
    for root in roots(comm):
        net = model(0)
        optimizer = kind(net.parameters(), lr=0.01 * (comm.rank + 1))
        if comm.rank == root or comm.rank % 2:
            a_few_steps(net, optimizer, 1 + comm.rank)
        mpisign.broadcast_optimizer_state(optimizer, root_rank=root)
        states = comm.allgather(optimizer.state_dict())
        assert_same(optimizer.state_dict(), states[root])
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01 * (root + 1))
        assert len(optimizer.state) == len(list(net.parameters()))
        assert all(p in optimizer.state for p in net.parameters())


@pytest.mark.parametrize("kind", [torch.optim.Adafactor, torch.optim.SGD])
def test_what_torch_would_add_to_an_optimizers_defaults(comm: MPI.Comm, kind: type[torch.optim.Optimizer]) -> None:
    """Which not all of its optimizers know: a wrapped one's state can be sent, too, and ranks may sit out."""
    net = model(0)
    plain = kind(net.parameters(), lr=0.01)  # type: ignore[call-arg]
    before = dict(plain.defaults)
    optimizer = mpisign.DistributedSignOptimizer(plain, net.named_parameters(), method=mpisign.mean())
    assert plain.defaults == before
    mpisign.broadcast_optimizer_state(optimizer)
    a_few_steps(net, optimizer, 1 + (comm.rank == 0))
    optimizer.join()
    mpisign.check_consistency(net, buffers=False)


def assert_same(a: Any, b: Any) -> None:
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    else:
        assert a == b


def test_a_wrapped_optimizers_state_leaves_each_rank_its_memory(comm: MPI.Comm) -> None:
    parameter = torch.nn.Parameter(torch.zeros(40))
    root = comm.size - 1
    sgd = torch.optim.SGD([parameter], lr=0.01, momentum=0.5)
    optimizer = mpisign.DistributedSignOptimizer(sgd, method=mpisign.signum(0.5))
    parameter.grad = torch.full((40,), 2.0 + 2 * comm.rank)
    optimizer.step()
    sgd.param_groups[0]["lr"] = 0.01 * (comm.rank + 1)
    before = optimizer.state_dict()
    before["mpisign"]["step"] = 10 * comm.rank
    optimizer.load_state_dict(before)

    mpisign.broadcast_optimizer_state(optimizer, root_rank=root)
    after = optimizer.state_dict()
    assert after["mpisign"]["step"] == 10 * root
    assert after["mpisign"]["rank"] == comm.rank
    assert after["mpisign"]["memory"][0]["momentum"].tolist() == [1.0 + comm.rank] * 40
    assert after["param_groups"][0]["lr"] == pytest.approx(0.01 * (root + 1))
    assert optimizer.state[parameter]["momentum_buffer"].tolist() == [1.0] * 40
    parameter.grad = torch.ones(40)
    optimizer.step()
    assert optimizer.report.step == 10 * root


def test_a_scheduler_attached_before_goes_on_working(comm: MPI.Comm) -> None:
    net = model(0)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    mpisign.broadcast_optimizer_state(optimizer, root_rank=comm.size - 1)
    a_few_steps(net, optimizer, 1)
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.5


# ------------------------------------------------------------------------------------------- objects


def test_objects(comm: MPI.Comm) -> None:
    for root in roots(comm):
        assert mpisign.broadcast_object({"from": comm.rank, "big": "x" * 100_000}, root_rank=root)["from"] == root
    assert mpisign.allgather_object(("rank", comm.rank)) == [("rank", r) for r in range(comm.size)]
    assert mpisign.broadcast_object(None) is None


# ------------------------------------------------------------------------------------------- check_consistency


def nudge(net: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    with torch.no_grad():
        net[2].weight[0, 1] = torch.nextafter(net[2].weight[0, 1], torch.tensor(2.0))


def flip_a_zero(net: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    net[1].running_mean[1] = -0.0


def other_rate(net: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.param_groups[0]["lr"] = 0.2


def test_equal_ranks_are_consistent(comm: MPI.Comm) -> None:
    net = model(0)
    mpisign.check_consistency(net)
    mpisign.check_consistency(net, torch.optim.SGD(net.parameters(), lr=0.1))


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize(
    ("change", "first"),
    [
        pytest.param(nudge, r"parameter '2\.weight' \(2, 3\) float32", id="parameter-by-one-bit"),
        pytest.param(flip_a_zero, r"buffer '1\.running_mean'", id="buffer-by-the-sign-of-zero"),
        pytest.param(other_rate, r"'lr' of parameter group 0 = 0\.2", id="learning-rate"),
    ],
)
def test_the_rank_and_the_first_difference_are_named_on_all(
    comm: MPI.Comm, change: Callable[[torch.nn.Module, torch.optim.Optimizer], None], first: str
) -> None:
    net = model(0)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    odd = comm.size - 1
    if comm.rank == odd:
        change(net, optimizer)
    with pytest.raises(
        mpisign.ConsistencyError, match=rf"ranks \[{odd}\] .*this is rank {comm.rank}.*{first}.* rank {odd}"
    ):
        mpisign.check_consistency(net, optimizer)


@pytest.mark.mpi(min_size=2)
def test_buffers_that_may_differ(comm: MPI.Comm) -> None:
    net = model(0)
    net[1].running_mean += comm.rank
    mpisign.check_consistency(net, buffers=False)
    with pytest.raises(mpisign.ConsistencyError, match="running_mean"):
        mpisign.check_consistency(net)


@pytest.mark.mpi(min_size=3)
def test_several_ranks_that_differ_are_all_named(comm: MPI.Comm) -> None:
    net = model(0 if comm.rank < 2 else comm.rank)
    with pytest.raises(mpisign.ConsistencyError, match=rf"ranks \[{', '.join(map(str, range(2, comm.size)))}\] "):
        mpisign.check_consistency(net)
