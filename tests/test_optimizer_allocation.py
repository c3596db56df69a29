"""A steady-state step allocates nothing that grows with the model."""

from __future__ import annotations

import gc
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import mpisign
from mpisign import DistributedSignOptimizer, Method

ELEMENTS = 8_000_000
BOUND = 500_000  # bytes: half of what one bit an element would be
GROWTH = 32_000  # bytes more for four times the elements

Peak = Callable[[Callable[[], object]], int]


@pytest.fixture
def peak(tmp_path: Path) -> Peak:
    """``peak(work)``: by how many bytes memory grew while ``work()`` ran, at the worst: NumPy's and torch's."""

    def measure(work: Callable[[], object]) -> int:
        gc.collect()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            tracemalloc.start()
            work()
            numpy_peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        trace = tmp_path / "trace.json"
        profiled.export_chrome_trace(str(trace))
        events = [
            event["args"] for event in json.loads(trace.read_text())["traceEvents"] if event["name"] == "[memory]"
        ]
        held = [event["Total Allocated"] for event in events]
        torch_peak = max(held) - (held[0] - events[0]["Bytes"]) if events else 0
        return numpy_peak + torch_peak

    return measure


@pytest.mark.parametrize(
    ("allocate", "expected"),
    [
        (lambda: np.ones(1_000_000, np.uint8), 1_000_000),
        (lambda: torch.ones(1_000_000, dtype=torch.uint8), 1_000_000),
        (lambda: [torch.ones(1_000_000).mul(2).sum() for _ in range(3)], 8_000_000),
        (lambda: (np.ones(1_000_000, np.uint8), torch.ones(1_000_000, dtype=torch.uint8)), 2_000_000),
        (lambda: None, 0),
    ],
    ids=["NumPy", "torch", "at a time", "both", "neither"],
)
def test_the_measure_sees_what_is_allocated(peak: Peak, allocate: Callable[[], object], expected: int) -> None:
    assert abs(peak(allocate) - expected) < 50_000


def steady_peak(
    peak: Peak, elements: int, dtype: torch.dtype, method: Method, scaled: bool = False, **options: str
) -> int:
    shapes = [(elements // 2,), (1000, elements // 2000), (7,), ()]
    parameters = [torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes]
    optimizer = DistributedSignOptimizer(torch.optim.SGD(parameters, lr=1e-3), method=method, **options)
    gradient = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    gradient[::10] = 0

    def new_gradients() -> None:
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad.view(-1).copy_(gradient.to(dtype).repeat(1 + parameter.numel() // 1000)[: parameter.numel()])

    scaler = torch.amp.GradScaler("cpu", enabled=scaled)
    scaler.scale(torch.zeros(()))

    def step() -> None:
        scaler.step(optimizer)
        scaler.update()

    for _ in range(2):
        new_gradients()
        step()
    new_gradients()
    return peak(step)


@pytest.mark.long
@pytest.mark.usefixtures("world")
@pytest.mark.parametrize(
    ("method", "dtype", "options"),
    [
        (mpisign.signum(), torch.float32, {}),
        (mpisign.signum(), torch.float32, {"zeros": "abstain", "ties": "zero"}),
        (mpisign.signum(), torch.float32, {"exchange": "two_phase"}),
        (mpisign.signum(), torch.bfloat16, {}),
        (mpisign.lion(), torch.float16, {}),
        (mpisign.lion(), torch.float16, {"scaled": True}),
        (mpisign.signsgd(), torch.float32, {"scaled": True}),
        (mpisign.lion(), torch.float32, {}),
        (mpisign.signsgd(), torch.float64, {"zeros": "positive"}),
        (mpisign.mean(), torch.float32, {}),
        (mpisign.mean(), torch.bfloat16, {"exchange": "two_phase"}),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_a_steady_step_allocates_little_whatever_the_model(
    peak: Peak, method: Method, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    small, large = (steady_peak(peak, elements, dtype, method, **options) for elements in (ELEMENTS // 4, ELEMENTS))
    assert large < BOUND
    assert large < small + GROWTH
