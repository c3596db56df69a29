"""mpisign.codecs.Quantized: what QSGD and TernGrad send, against their formulas."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from gpu_branch import gpu_branch, needs_compiler

import mpisign
from mpisign.backends import backend_for
from mpisign.backends.host import Host, as_words
from mpisign.bitmap.tensors import DTYPES
from mpisign.codecs import Quantized
from mpisign.policy import Policy

FIRST_WORD = 1001
CONTEXT = Policy().context(17, 3)
CODECS = [
    Quantized(),
    Quantized(1, "max", None),
    Quantized(5, "l2", 64),
    Quantized(15, "max", 32),
    Quantized(2, clip=2.0),
]
codecs = pytest.mark.parametrize("codec", CODECS, ids=str)
sizes = pytest.mark.parametrize("n", [0, 1, 33, 1000])
on = pytest.mark.parametrize("gpu", [False, pytest.param(True, marks=needs_compiler)], ids=["host", "kernels"])


@pytest.fixture(params=[None, 64], ids=["", "small blocks"], autouse=True)
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work that is done block by block is done in one here, and once more in several."""
    if request.param:
        monkeypatch.setattr(Host, "cache", request.param)


def some_values(n: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    values = torch.randn(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    values[::5] = 0
    values[64:128] = 0  # a bucket
    return values.to(dtype)


def encoded(codec: Quantized, values: torch.Tensor, context: Any = CONTEXT) -> torch.Tensor:
    message = torch.full((1, codec.length(values.numel())), 0x25A5A5A5, dtype=torch.int32)
    assert codec.encode(values, message, context, FIRST_WORD)
    return message


def decoded(codec: Quantized, message: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    out = torch.full((like.numel(),), torch.nan, dtype=torch.promote_types(like.dtype, torch.float32))
    codec.decode(message, out)
    return out


def draws(n: int, dtype: torch.dtype) -> Any:
    """The numbers in [0, 1) that decide which way each element is rounded, block by block as the backend has them."""
    backend = backend_for(torch.device("cpu"))
    random = backend.random(CONTEXT.noise_key(FIRST_WORD), torch.device("cpu"), private=False)
    parts = [random.uniform(torch.empty(span.stop - span.start, dtype=dtype), 0.5) for span in backend.blocks(n)]
    return torch.cat([*parts, torch.empty(0)]).double().numpy() + 0.5


def expected(codec: Quantized, values: Any, u: Any) -> Any:
    """Bucket by bucket, the integer below ``s |v| / ||v|| + u``."""
    out = np.zeros_like(values)
    deviation = math.sqrt(max(0.0, np.mean(values**2) - np.mean(values) ** 2)) if values.size else 0.0
    for lo in range(0, values.size, codec.bucket or max(values.size, 1)):
        v = values[lo : lo + (codec.bucket or values.size)]
        norm = np.sqrt(np.sum(v**2)) if codec.norm == "l2" else np.abs(v).max()
        if codec.clip and codec.clip * deviation >= np.sqrt(np.mean(values**2)):  # else all would be clipped
            norm = min(norm, codec.clip * deviation)
        if norm > 0:
            xi = np.floor(codec.levels * np.minimum(np.abs(v) / norm, 1) + u[lo : lo + v.size])
            out[lo : lo + v.size] = norm * np.sign(v) * np.minimum(xi, codec.levels) / codec.levels
    return out


@on
@codecs
@sizes
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_the_formula(dtype: torch.dtype, n: int, codec: Quantized, gpu: bool) -> None:
    values = some_values(n, dtype)
    with gpu_branch(gpu):
        ours = decoded(codec, encoded(codec, values), values).double().numpy()
        u = draws(n, torch.promote_types(dtype, torch.float32))
    its = expected(codec, values.double().numpy(), u)
    level = np.abs(its).max(initial=0.0) / codec.levels
    near = np.isclose(ours, its, rtol=1e-5, atol=1e-12)
    assert np.abs(ours - its)[~near].max(initial=0.0) <= 1.01 * level, "what lies on the border of two levels"
    assert near.mean() > 0.99 if n else True
    assert not ours[64:128].any(), "a bucket of zeros"


@codecs
def test_adding_is_decoding_times_a_factor(codec: Quantized) -> None:
    values = some_values(1000, torch.float64)
    message = encoded(codec, values)
    out = torch.ones(1000, dtype=torch.float64)
    codec.add(message, out, -0.5)
    torch.testing.assert_close(out, 1 - 0.5 * decoded(codec, message, out))


@pytest.mark.long
@pytest.mark.parametrize("codec", [codec for codec in CODECS if codec.clip is None], ids=str)
def test_its_mean_is_the_value_and_its_variance_the_papers_bound(codec: Quantized) -> None:
    """QSGD, Lemma 3.1: at most min(n / s^2, sqrt(n) / s) |v|^2; of TernGrad, sum |v| (max - |v|)."""
    steps, n = 2000, 48
    values = some_values(n, torch.float64)
    drawn = np.stack([decoded(codec, encoded(codec, values, Policy().context(at, 3)), values) for at in range(steps)])
    v = values.numpy()
    deviation = np.linalg.norm(v) / codec.levels
    np.testing.assert_allclose(drawn.mean(0), v, rtol=0, atol=5 * deviation / math.sqrt(steps))
    error = float(((drawn - v) ** 2).sum(1).mean())
    s = codec.levels
    if codec.norm == "l2":
        assert error <= 1.05 * min(n / s**2, math.sqrt(n) / s) * float(v @ v)
    elif s == 1:
        assert error == pytest.approx(np.sum(np.abs(v) * (np.abs(v).max() - np.abs(v))), rel=0.05)


def test_its_bits() -> None:
    """The norms, then the signs, then the magnitude's bits from the lowest on."""
    values = torch.tensor([0.0, 1.0, -2.0, 3.0])
    message = encoded(Quantized(3, "max", 32), values)
    assert message.shape == (1, 1 + 3)
    assert message[0, :1].view(torch.float32).item() == 3.0
    signs, low, high = as_words(message[0, 1:]).tolist()
    assert (signs & 0b1010, signs & 0b0100) == (0b1010, 0)
    assert (low, high) == (0b1010, 0b1100)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@codecs
def test_what_is_not_finite_is_told(codec: Quantized, bad: float) -> None:
    values = torch.ones(100, dtype=torch.float64)
    values[70] = bad
    message = torch.zeros((1, codec.length(100)), dtype=torch.int32)
    assert not codec.encode(values, message, CONTEXT, 0)


def test_large_values_do_not_overflow_on_the_way() -> None:
    values = torch.tensor([1e38, -2e38, 0.0, 1e30])
    assert decoded(Quantized(7), encoded(Quantized(7), values), values).isfinite().all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mpisign.qsgd(0), "levels=0 must be an int of 1 or more"),
        (lambda: mpisign.qsgd(1 << 16), "levels=65536 must be less than 65536"),
        (lambda: mpisign.qsgd(bucket=33), "bucket=33 must be a multiple of 32"),
        (lambda: mpisign.qsgd(bucket=0), "bucket=0 must be an int of 32 or more"),
        (lambda: mpisign.terngrad(-1.0), "clip=-1.0 must be a positive number, or None for never"),
        (lambda: Quantized(norm="l1"), "norm='l1' is not known: choose one of 'l2', 'max'"),
    ],
)
def test_impossible_options(make: Any, message: str) -> None:
    with pytest.raises(mpisign.OptionError, match=message):
        make()


@pytest.mark.parametrize("values", [[0.7], [-3.0], [0.7, 0.7, 0.7], [0.7, 0.71, 0.7]])
def test_what_hardly_differs_is_not_clipped(values: list[float]) -> None:
    """Such as the one weight of a PReLU, whose standard deviation is 0."""
    its, codec = torch.tensor(values), mpisign.terngrad(2.5).codec
    message = torch.zeros(codec.planes(Policy()), codec.length(len(values)), dtype=torch.int32)
    total = torch.zeros(len(values))
    for seed in range(400):
        context = Policy(seed=seed).context(0, 0)
        assert bool(codec.encode(its, message, context, 0))
        codec.add(message, total, 1 / 400)
    assert torch.allclose(total, its, rtol=0.1)
