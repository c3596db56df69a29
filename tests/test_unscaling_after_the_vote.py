"""Horovod's order for mixed precision, and every other way in which a scale could be taken out of a decision."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator

import methods_table
import pytest
import torch
from torch import nn
from torch.amp import GradScaler
from torch.optim import SGD

import mpisign
from mpisign import DistributedSignOptimizer, Method, SynchronizationError
from mpisign.scaling import living

pytestmark = pytest.mark.usefixtures("world", "no_scaler_of_another_test")

Order = Callable[[GradScaler, DistributedSignOptimizer, nn.Parameter], None]

SIZE = 70


@pytest.fixture(scope="module", autouse=True)
def few_objects() -> Iterator[None]:
    """What there is before is not looked at again and again for scalers."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def no_scaler_of_another_test() -> None:
    gc.collect()
    for it in living(GradScaler):  # in the traceback of an error that was expected
        it._enabled = False


def unscale_before(scaler: GradScaler, optimizer: DistributedSignOptimizer, parameter: nn.Parameter) -> None:
    scaler.unscale_(optimizer)
    optimizer.synchronize()


def unscale_after(scaler: GradScaler, optimizer: DistributedSignOptimizer, parameter: nn.Parameter) -> None:
    optimizer.synchronize()
    scaler.unscale_(optimizer)


def unscale_inner_before(scaler: GradScaler, optimizer: DistributedSignOptimizer, parameter: nn.Parameter) -> None:
    scaler.unscale_(optimizer.wrapped)
    optimizer.synchronize()


def not_at_all(scaler: GradScaler, optimizer: DistributedSignOptimizer, parameter: nn.Parameter) -> None:
    optimizer.synchronize()


def train(
    order: Order,
    method: Method,
    *,
    scale: float = 2.0**16,
    clip: float = 0.0,
    resume_at: int = -1,
    steps: int = 6,
) -> tuple[list[float], float, list[list[float]]]:
    """Parameters, scale and memory after some steps, in one of which a gradient is Inf; the scale changes twice."""
    parameter = nn.Parameter(torch.linspace(-1, 1, SIZE))
    optimizer = DistributedSignOptimizer(SGD([parameter], lr=0.25), method=method, seed=3)
    scaler = GradScaler("cpu", init_scale=scale, growth_interval=2)
    generator = torch.Generator().manual_seed(5)
    for step in range(steps):
        if step == resume_at:
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = DistributedSignOptimizer(SGD([parameter], lr=0.25), method=method, seed=3)
            optimizer.load_state_dict(state)
        optimizer.zero_grad()
        weights = torch.randn(SIZE, generator=generator)
        scaler.scale((parameter * weights).sum()).backward()
        if step == 3:
            assert parameter.grad is not None
            parameter.grad[SIZE // 2] = torch.inf
        order(scaler, optimizer, parameter)
        if clip and step != 3:
            nn.utils.clip_grad_norm_([parameter], clip)
        with optimizer.skip_synchronize():
            scaler.step(optimizer)
        scaler.update()
    memory = optimizer.state_dict()["mpisign"]["memory"].get(0, {})
    return parameter.tolist(), scaler.get_scale(), [value.tolist() for value in memory.values()]


LONG = pytest.mark.long


@pytest.mark.parametrize(
    "order", [unscale_after, pytest.param(unscale_inner_before, marks=LONG), pytest.param(not_at_all, marks=LONG)]
)
@pytest.mark.parametrize(
    "method",
    [method for method in methods_table.ALONE.values() if not (method.exchanges_models or method.memory.private)],
    ids=[
        name for name, method in methods_table.ALONE.items() if not (method.exchanges_models or method.memory.private)
    ],
)
def test_any_order_trains_with_the_same_bits(method: Method, order: Order) -> None:
    """Also through an Inf, and as the scale grows and falls: a memory takes in gradients of one scale."""
    if method.by_epoch:
        method = method.at(0, 100)
    expected = train(unscale_before, method)
    assert expected[1] == 2.0**17, "it has fallen once and grown twice"
    assert train(order, method) == expected


@pytest.mark.parametrize("order", [unscale_after, unscale_inner_before])
@pytest.mark.parametrize("method", methods_table.FOUR, ids=str)
def test_clipping_between_vote_and_step(method: Method, order: Order) -> None:
    assert train(order, method, clip=0.5) == train(unscale_before, method, clip=0.5)


@pytest.mark.parametrize("method", methods_table.FOUR, ids=str)
def test_after_resuming(method: Method) -> None:
    assert train(unscale_after, method, resume_at=2) == train(unscale_before, method)


@pytest.mark.parametrize("method", methods_table.FOUR, ids=str)
def test_a_scale_that_is_no_power_of_two(method: Method) -> None:
    assert train(unscale_after, method, scale=1000.0) == train(unscale_before, method, scale=1000.0)


def test_the_decision_is_not_touched() -> None:
    parameter, optimizer, scaler = ready()
    optimizer.synchronize()
    scaler.unscale_(optimizer)
    assert parameter.grad is not None
    assert set(parameter.grad.tolist()) == {1.0}
    with optimizer.skip_synchronize():
        scaler.step(optimizer)
    assert set(parameter.tolist()) == {-1.0}


def ready(method: Method | None = None) -> tuple[nn.Parameter, DistributedSignOptimizer, GradScaler]:
    """A model with gradients that are scaled."""
    parameter = nn.Parameter(torch.zeros(4))
    optimizer = DistributedSignOptimizer(SGD([parameter], lr=1.0), method=method or mpisign.signsgd())
    scaler = GradScaler("cpu", init_scale=1024.0)
    scaler.scale(parameter.sum()).backward()
    return parameter, optimizer, scaler


# ----------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("method", methods_table.FOUR, ids=str)
def test_the_optimizer_inside_is_not_unscaled_after_the_vote(method: Method) -> None:
    parameter, optimizer, scaler = ready(method)
    optimizer.synchronize()
    scaler.unscale_(optimizer.wrapped)
    with optimizer.skip_synchronize():
        with pytest.raises(
            SynchronizationError, match=r"given the optimizer that is inside.*unscale_\(optimizer\) before"
        ):
            scaler.step(optimizer)
        with pytest.raises(SynchronizationError, match="given the optimizer that is inside"):
            optimizer.step()
    assert not parameter.any()


@pytest.mark.parametrize("voted", [False, True])
def test_the_optimizer_inside_does_not_step_by_itself(voted: bool) -> None:
    parameter, optimizer, scaler = ready()
    for its in (optimizer, copy.deepcopy(optimizer)):
        if voted and its is optimizer:
            its.synchronize()
        with pytest.raises(SynchronizationError, match=r"rank 0: the SGD inside .*step by itself"):
            its.wrapped.step()
    with pytest.raises(SynchronizationError, match="by itself"):
        scaler.step(optimizer.wrapped)
    assert not parameter.any()


def test_it_steps_again_once_the_wrapper_is_gone_or_the_job_is_over() -> None:
    parameter = nn.Parameter(torch.zeros(4))
    sgd = SGD([parameter], lr=1.0)
    optimizer = DistributedSignOptimizer(sgd)
    parameter.grad = torch.ones(4)
    mpisign.shutdown()
    sgd.step()
    mpisign.init()
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    sgd.step()
    assert parameter.tolist() == [-2.0] * 4


def test_scalers_of_several_scales_cannot_be_told_apart() -> None:
    """Nobody can know at the vote which of them it was."""
    parameter, optimizer, scaler = ready()
    other = GradScaler("cpu", init_scale=8.0)
    other.scale(torch.zeros(()))
    optimizer.synchronize()
    with pytest.raises(SynchronizationError, match=r"could not know which scale.*unscale_\(optimizer\) before"):
        scaler.unscale_(optimizer)
    with optimizer.skip_synchronize(), pytest.raises(SynchronizationError, match="could not know which scale"):
        scaler.step(optimizer)
    assert not parameter.any()


# ------------------------------------------------------------------------------------------ scalers of somebody else


def test_votes_do_not_mind_a_scaler_of_another_model() -> None:
    parameter, optimizer, scaler = ready(mpisign.signum(0.5))
    for _ in range(2):
        optimizer.zero_grad()
        parameter.grad = torch.full((4,), 3.0)
        optimizer.synchronize()
        with optimizer.skip_synchronize():
            optimizer.step()
    assert parameter.tolist() == [-2.0] * 4
    momentum = optimizer.state_dict()["mpisign"]["memory"][0]["momentum"]
    assert momentum.tolist() == pytest.approx([1.5] * 4, rel=1e-2), "from the second step on the gradient is its own"
    del scaler


def test_where_magnitudes_count_it_is_said_and_learned() -> None:
    parameter, optimizer, scaler = ready(mpisign.mean())
    parameter.grad = torch.full((4,), 3.0)
    optimizer.synchronize()
    with optimizer.skip_synchronize(), pytest.raises(SynchronizationError, match="if these gradients were not scaled"):
        optimizer.step()
    optimizer.zero_grad()
    parameter.grad = torch.full((4,), 3.0)
    optimizer.synchronize()
    with optimizer.skip_synchronize():
        optimizer.step()
    assert parameter.tolist() == [-3.0] * 4
    del scaler


def test_step_alone_looks_for_no_scaler() -> None:
    parameter, optimizer, scaler = ready(mpisign.mean())
    parameter.grad = torch.full((4,), 3.0)
    optimizer.step()
    assert parameter.tolist() == [-3.0] * 4
    del scaler


def test_a_scaler_that_is_turned_off_has_no_scale() -> None:
    parameter = nn.Parameter(torch.zeros(4))
    optimizer = DistributedSignOptimizer(SGD([parameter], lr=1.0), method=mpisign.mean())
    scaler = GradScaler("cpu", enabled=False)
    scaler.scale((3.0 * parameter).sum()).backward()
    optimizer.synchronize()
    scaler.unscale_(optimizer)
    with optimizer.skip_synchronize():
        scaler.step(optimizer)
    scaler.update()
    assert parameter.tolist() == [-3.0] * 4
