"""Learning rates next to 0, and what overflows: a rank votes again at once, and nothing becomes NaN."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import pytest
import torch
from gpu_branch import gpu_branch, needs_compiler
from methods_table import Make, walk_exchanges

import mpisign
from mpisign.codecs import ScaledBits
from mpisign.policy import Policy
from mpisign.rules import RecodedMean

from .steps import assert_same_everywhere, drawn, model, step, wrap

if TYPE_CHECKING:
    from mpi4py import MPI

pytestmark = [pytest.mark.mpi, pytest.mark.few]

NEAR_ZERO = [1e-31, 1e-40, 1e-45, 1e-310, 5e-324, -1e-320]
GPU = pytest.mark.parametrize("gpu", [False, pytest.param(True, marks=needs_compiler)], ids=["host", "cuda"])


def owes(method: mpisign.Method) -> bool:
    return bool(method.memory.follows_lr)


def trained(
    comm: MPI.Comm, make: Make, exchange: str, rates: Sequence[float], gpu: bool = False
) -> tuple[list[torch.nn.Parameter], Any]:
    tensors = model()
    with gpu_branch(True) if gpu else nullcontext():
        optimizer = wrap(tensors, make(comm.size), exchange=exchange)
        for at, rate in enumerate(rates):
            optimizer.param_groups[0]["lr"] = rate
            step(optimizer, tensors, drawn(tensors, at, comm.rank))
            assert optimizer.report.voters == tuple(range(comm.size)), rate
    return tensors, optimizer.state_dict()["mpisign"]


@GPU
@walk_exchanges(owes)
def test_they_count_as_zero(comm: MPI.Comm, make: Make, exchange: str, gpu: bool) -> None:
    """What is owed is kept, bit for bit, and paid when the rate has come back."""
    before, after = [0.1, 0.2], [0.1, 0.3]

    expected, remembered = trained(comm, make, exchange, [*before, *[0.0] * len(NEAR_ZERO), *after], gpu)
    with pytest.warns(UserWarning, match=r"a learning rate of 1e-31 counts as 0") as caught:
        tensors, memory = trained(comm, make, exchange, [*before, *NEAR_ZERO, *after], gpu)
    assert len([its for its in caught if "counts as 0" in str(its.message)]) == 1
    for ours, theirs in zip(tensors, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-25)
    assert memory["rates"] == remembered["rates"] == dict.fromkeys(range(len(tensors)), 0.3)
    for part in ("memory", "pieces"):
        for place, fields in memory[part].items():
            for key, value in fields.items():
                assert torch.equal(value, remembered[part][place][key]), (part, place, key)


@walk_exchanges(owes)
def test_down_and_up_again(comm: MPI.Comm, make: Make, exchange: str) -> None:
    """A rate that falls through all of its range, from which restarts bring it back."""
    rates = [0.1 * 1e-3**at for at in range(12)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "a learning rate of .* counts as 0")
        tensors, memory = trained(comm, make, exchange, [*rates, 0.1, *rates[::-1]])
    assert_same_everywhere(comm, tensors)
    kept = [value for part in ("memory", "pieces") for fields in memory[part].values() for value in fields.values()]
    assert all(torch.isfinite(value).all() for value in (*tensors, *kept))


@pytest.mark.long
@GPU
@walk_exchanges(lambda method: method.memory.feedback or method.memory.running)
def test_gradients_that_overflow_what_is_kept(comm: MPI.Comm, make: Make, exchange: str, gpu: bool) -> None:
    """Their number is finite, and sums of them are not. All vote again soon after, and keep nothing infinite."""
    tensors, method = model(), make(comm.size)
    huge = 1e30 if "variance" in method.memory.fields else 3e38  # what is divided by its root is applied
    with gpu_branch(True) if gpu else nullcontext():
        optimizer = wrap(tensors, method, lr=1e-9, exchange=exchange)
        for at in range(24):
            gradients = drawn(tensors, at, comm.rank)
            if at in range(2, 6):
                for gradient in gradients:
                    gradient.clamp_(-1.0, 1.0).mul_(huge)
            step(optimizer, tensors, gradients)
    assert optimizer.report.voters == tuple(range(comm.size))
    assert_same_everywhere(comm, tensors)
    state = optimizer.state_dict()["mpisign"]
    kept = [value for part in ("memory", "pieces") for fields in state[part].values() for value in fields.values()]
    assert all(torch.isfinite(value).all() for value in (*tensors, *kept))
    for place, fields in state["memory"].items():
        for field in optimizer.method.memory.common:
            assert len(set(comm.allgather(fields[field].numpy().tobytes()))) == 1, (place, field)


def test_a_server_whose_error_overflows_begins_it_again() -> None:
    """Or everything that it decides from then on would be infinite, and every parameter."""
    codec, context = ScaledBits(), Policy().context(0, 0)
    message, out = (torch.zeros((1, codec.length(40)), dtype=torch.int32) for _ in range(2))
    codec.encode(torch.full((40,), 3e38), message, context, 0)
    error = torch.zeros(40)
    error[:2] = torch.tensor([3e38, -3e38])
    RecodedMean().recode([message], error, out, codec, dataclasses.replace(context, voters=(0,)), 0)
    assert out[0, :1].view(torch.float32).isfinite()
    assert error.isfinite().all()
    assert error[0].abs() <= 3e38
