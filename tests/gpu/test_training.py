"""Training on a GPU, on a rank alone: the votes of the CPU, and all that users put around a step.

The latter is tried without a GPU too, where the shim runs the kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

import mpisign
from mpisign import DistributedSignOptimizer, Method

from .needs import devices, kernels_on, needs_gpu, needs_mpi

pytestmark = [
    pytest.mark.usefixtures("world"),
    pytest.mark.filterwarnings("default"),  # what torch advises on some GPUs is no failure of ours
]

METHODS = [mpisign.signsgd(), mpisign.signum(0.5), mpisign.lion(0.5, 0.75)]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SHAPES = [(3, 5, 7), (64,), (), (0,), (1,), (33, 2), (20_000,)]
SLEEP = 200_000_000  # cycles: a tenth of a second

Step = Callable[[], object]


def wrap(parameters: Any, method: Method | None = None, **options: Any) -> DistributedSignOptimizer:
    return DistributedSignOptimizer(SGD(parameters, lr=0.25), method=method or mpisign.signum(0.5), **options)


def votes(device: str, method: Method, **options: Any) -> list[list[torch.Tensor]]:
    """Decisions and parameters after each of 3 steps; gradients are small integers, so that no arithmetic rounds."""
    random = torch.Generator().manual_seed(0)
    tensors = [nn.Parameter(torch.zeros(s, dtype=DTYPES[i % 4], device=device)) for i, s in enumerate(SHAPES)]
    optimizer = wrap(tensors, method, **options)
    seen = []
    for _ in range(3):
        for tensor in tensors:
            tensor.grad = torch.randint(-2, 3, tensor.shape, generator=random).to(device, tensor.dtype)
        optimizer.step()
        seen.append([t.detach().cpu().clone() for p in tensors for t in (p, p.grad)])
    return seen


@needs_gpu
@pytest.mark.parametrize("exchange", ["allgather", pytest.param("two_phase", marks=needs_mpi)])
@pytest.mark.parametrize("zeros", ["coin", "abstain", "positive", "rows"])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_it_votes_as_on_the_cpu(method: Method, zeros: str, exchange: str) -> None:
    options = {"zeros": zeros, "ties": "zero", "exchange": exchange, "seed": 5}
    for here, there in zip(votes("cpu", method, **options), votes("cuda", method, **options), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))


@needs_gpu
def test_steps_on_changing_streams_follow_each_other() -> None:
    """Buffers are zeroed, filled and read on whichever stream is current, and none may overtake another."""
    parameter = nn.Parameter(torch.zeros(1_000_000, device="cuda"))
    torch.cuda._sleep(SLEEP)  # what the optimizer does to its buffers is done after this
    optimizer = wrap([parameter], mpisign.signsgd())
    streams = [torch.cuda.Stream() for _ in range(3)]
    for step in range(6):
        with torch.cuda.stream(streams[step % 3]):
            parameter.grad = torch.full_like(parameter, -1.0 if step % 2 else 1.0)
            torch.cuda._sleep(SLEEP // 10)
            optimizer.synchronize()
            streams[step % 3].synchronize()
            assert (parameter.grad == (-1.0 if step % 2 else 1.0)).all(), f"step {step}"
        optimizer.zero_grad()


@needs_gpu
def test_a_step_on_a_side_stream_that_is_far_behind() -> None:
    """A gradient that arrives late must be the one that is voted on."""
    parameter = nn.Parameter(torch.zeros(20_000, device="cuda"))
    optimizer = wrap([parameter], mpisign.signsgd())
    late, parameter.grad = -torch.ones_like(parameter), torch.ones_like(parameter)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(SLEEP)
        parameter.grad.copy_(late)
        optimizer.step()
        torch.cuda.current_stream().synchronize()
    assert (parameter == 0.25).all()


def regression(device: str, compiled: bool = False) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A model, inputs, and targets that it can reach."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 1)).to(device)
    inputs = torch.randn(256, 16, device=device)
    return torch.compile(model) if compiled else model, inputs, inputs.sum(1, keepdim=True)


def learns(model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor, step: Step) -> bool:
    def loss() -> float:
        with torch.no_grad():
            return float(nn.functional.mse_loss(model(inputs), targets))

    before = loss()
    for _ in range(40):
        step()
    return loss() < before / 2


@functools.cache
def no_compiler(device: str) -> str:
    """What keeps torch.compile from working here at all (it wants a C compiler and Python's headers), or nothing."""
    try:
        torch.compile(lambda x: x + 1)(torch.ones(1, device=device))
    except Exception as error:  # of torch or of any of the compilers that it calls
        return f"{type(error).__name__}: {error}".partition("\n")[0]
    return ""


@devices
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_mixed_precision(dtype: torch.dtype, compiled: bool, device: str) -> None:
    if compiled and no_compiler(device):
        pytest.skip(f"torch.compile does not work here: {no_compiler(device)}")
    model, inputs, targets = regression(device, compiled)
    with kernels_on(device):
        optimizer = DistributedSignOptimizer(SGD(model.parameters(), lr=0.005), method=mpisign.signum())
        scaler = torch.amp.GradScaler(device, enabled=dtype is torch.float16)

        def step() -> None:
            optimizer.zero_grad()
            with torch.autocast(device, dtype):
                loss = nn.functional.mse_loss(model(inputs), targets)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()

        assert learns(model, inputs, targets, step)


class Imitation:
    """Of a CUDA graph: a replay writes into the tensors that were the gradients at the beginning."""

    def __init__(self, parameters: list[nn.Parameter], loss: Callable[[], torch.Tensor]) -> None:
        self._parameters, self._loss = parameters, loss
        self._gradients = torch.autograd.grad(loss(), parameters)
        for parameter, gradient in zip(parameters, self._gradients, strict=True):
            parameter.grad = gradient

    def replay(self) -> None:
        torch._foreach_copy_(self._gradients, torch.autograd.grad(self._loss(), self._parameters))


def recorded(parameters: list[nn.Parameter], loss: Callable[[], torch.Tensor], device: str) -> Any:
    """Forward and backward as a CUDA graph, or on the CPU as its imitation."""
    if device == "cpu":
        return Imitation(parameters, loss)

    def backward() -> None:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.zero_()
        loss().backward()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        backward()  # makes the gradients, which the graph then writes to
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        backward()
    return graph


@devices
@pytest.mark.parametrize("amp", ["no scaler", "scaler", "unscaled before"])
def test_forward_and_backward_in_a_cuda_graph(amp: str, device: str) -> None:
    """Also after a replay with bad gradients: the step is skipped, and the graph's own tensors stay the gradients."""
    model, inputs, targets = regression(device)
    parameters, reachable = list(model.parameters()), targets.clone()
    scaler = torch.amp.GradScaler(device, init_scale=1024.0, enabled=amp != "no scaler")
    graph = recorded(parameters, lambda: scaler.scale(nn.functional.mse_loss(model(inputs), targets)), device)
    gradients = [parameter.grad for parameter in parameters]
    with kernels_on(device):
        optimizer = DistributedSignOptimizer(SGD(parameters, lr=0.005), method=mpisign.signum())

        def step() -> None:
            graph.replay()
            if amp == "unscaled before":
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()

        step()
        before = [parameter.detach().clone() for parameter in parameters]
        targets.fill_(torch.inf)
        step()
        assert optimizer.report is not None
        assert optimizer.report.skipped
        assert all(torch.equal(p, value) for p, value in zip(parameters, before, strict=True))
        targets.copy_(reachable)
        assert learns(model, inputs, targets, step)
        assert not optimizer.report.skipped
    assert all(p.grad is gradient for p, gradient in zip(parameters, gradients, strict=True))


@needs_gpu
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_steady_step_takes_no_more_memory(method: Method) -> None:
    import cupy

    parameters = [nn.Parameter(torch.zeros(1_000_000, device="cuda")) for _ in range(4)]
    optimizer = wrap(parameters, method)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)

    def memory() -> tuple[int, int, int]:
        pool = cupy.get_default_memory_pool()
        return torch.cuda.memory_allocated(), torch.cuda.memory_reserved(), pool.total_bytes()

    def allocations() -> int:
        return torch.cuda.memory_stats()["allocation.all.allocated"]

    for _ in range(2):
        optimizer.step()
    made = allocations()
    for _ in range(3):
        optimizer.synchronize()
        for parameter in parameters:
            parameter.grad.fill_(1.0)  # where all is zero, rows of zeros are looked for
    assert allocations() == made
    before = memory()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        optimizer.step()
    assert memory() == before
    assert torch.cuda.max_memory_allocated() - before[0] < 100_000, "a bitmap of one parameter is 125 kB"


@needs_gpu
def test_seconds_of_a_step_end_when_the_gpu_has_done_it(training: ModuleType) -> None:
    meter = training.Meter(samples=1, per_epoch=1, history={})
    torch.cuda._sleep(SLEEP)
    meter.add(torch.zeros((), device="cuda"), began=0.0)
    assert torch.cuda.current_stream().query()
