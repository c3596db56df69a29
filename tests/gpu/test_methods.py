"""Every method of the literature on a GPU, on a rank alone: three steps there, beside the same three on the CPU.

Krum needs more ranks; the rules for vectors of many are given them here without a job.

Without a GPU the shim runs the kernels; torch's own operations are the host's then.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from methods_table import ALONE, among, is_random
from torch import nn
from torch.optim import SGD

from mpisign import DistributedSignOptimizer, Method
from mpisign.policy import Policy

from .needs import devices, kernels_on, needs_gpu, needs_mpi

pytestmark = [pytest.mark.usefixtures("world"), pytest.mark.filterwarnings("default")]

EXACT = {name: method for name, method in ALONE.items() if not is_random(method)}
RANDOM = among(1, lambda method: is_random(method) and not method.memory.private)  # noise that can be repeated
DENSE = {size: among(size, lambda method: method.codec.plain and not is_random(method)) for size in (5, 8)}

DTYPES = {
    "fp32": [torch.float32],
    "fp16": [torch.float16],
    "bf16": [torch.bfloat16],
    "mixed": [torch.float32, torch.float64, torch.float16, torch.bfloat16],
}
SHAPES = [(3, 5, 7), (64,), (), (0,), (1,), (33, 2), (40, 50)]

types = pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)

Tensors = list[torch.Tensor]


def draw(tensor: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """A gradient of which no two elements are equally large: devices choose differently among those that are."""
    drawn = torch.randn(tensor.shape, generator=random)
    if tensor.dtype not in (torch.float16, torch.bfloat16):
        return drawn.to(tensor.dtype)
    place = drawn.abs().flatten().argsort().argsort().view(tensor.shape)  # of each magnitude, in their order
    one = torch.ones((), dtype=tensor.dtype).view(torch.int16)
    return (one + place - tensor.numel() // 2).to(torch.int16).view(tensor.dtype).copysign(drawn.to(tensor.dtype))


def train(method: Method, dtypes: list[torch.dtype], device: str = "cpu") -> tuple[list[Tensors], list[Tensors]]:
    """Of each of three steps, on the CPU: the gradients, a tenth of them exactly 0; decisions, parameters, memories."""
    random = torch.Generator().manual_seed(0)
    tensors = [nn.Parameter(torch.zeros(s, dtype=dtypes[i % len(dtypes)], device=device)) for i, s in enumerate(SHAPES)]
    optimizer = DistributedSignOptimizer(SGD(tensors, lr=0.25), method=method, seed=5)
    optimizer.set_epoch(1)
    given, seen = [], []
    for _ in range(3):
        gradients = [draw(t, random) for t in tensors]
        given.append([g.masked_fill_(torch.rand(g.shape, generator=random) < 0.1, 0.0) for g in gradients])
        for tensor, gradient in zip(tensors, gradients, strict=True):
            tensor.grad = gradient.to(device, copy=True)
        optimizer.step()
        memory = optimizer.state_dict()["mpisign"]["memory"]
        states = [value for state in memory.values() for value in state.values()]
        outcome = [*(t.grad for t in tensors if t.grad is not None), *(t.detach() for t in tensors), *states]
        seen.append([tensor.cpu().clone() for tensor in outcome])
    return given, seen


@devices
@types
@pytest.mark.parametrize("method", EXACT.values(), ids=EXACT)
def test_it_does_as_on_the_cpu(method: Method, dtypes: list[torch.dtype], device: str) -> None:
    """But for the order of sums, from which the last bits come."""
    _, expected = train(method, dtypes)
    with kernels_on(device):
        _, seen = train(method, dtypes, device)
    for step, (here, there) in enumerate(zip(expected, seen, strict=True)):
        for a, b in zip(here, there, strict=True):
            near = max(1e-5, 8 * torch.finfo(a.dtype).eps)
            torch.testing.assert_close(b, a, rtol=near, atol=near, msg=lambda text, step=step: f"step {step}: {text}")


@devices
@types
@pytest.mark.parametrize(
    "method",
    [
        pytest.param(method, id=name, marks=needs_mpi if method.memory.needs_maximum else ())
        for name, method in RANDOM.items()
    ],
)
def test_its_noise_can_be_repeated_and_follows_the_gradient(
    method: Method, dtypes: list[torch.dtype], device: str
) -> None:
    """A GPU draws other numbers than the host does."""
    with kernels_on(device):
        gradients, seen = train(method, dtypes, device)
        _, again = train(method, dtypes, device)
    for given, first, second in zip(gradients, seen, again, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert all(tensor.isfinite().all() for tensor in first)
        decisions = first[: len(given)]
        assert sum(float((g * d).sum()) for g, d in zip(given, decisions, strict=True)) > 0.0


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("ranks", "method"),
    [
        pytest.param(size, method, id=f"{name}-{size}")
        for size, methods in DENSE.items()
        for name, method in methods.items()
    ],
)
def test_it_decides_among_many_as_on_the_cpu(ranks: int, method: Method, dtype: torch.dtype) -> None:
    vectors = torch.randn(ranks + 1, 1, 5003, generator=torch.Generator().manual_seed(0), dtype=dtype)
    context = replace(Policy().context(step=3, rank=1, size=ranks), voters=tuple(range(ranks)))
    decisions = []
    for messages in (vectors, vectors.cuda()):
        out = torch.empty_like(messages[0])
        at = replace(context, previous=messages[-1] if method.rule.remembers else None)
        method.rule.decide(list(messages[:-1]), out, at, 0)
        decisions.append(out.cpu())
    torch.testing.assert_close(decisions[1], decisions[0], rtol=1e-5, atol=1e-5)
