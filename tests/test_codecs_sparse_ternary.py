"""mpisign.codecs.SparseTernary: the largest as signs of one magnitude, there and back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gpu_branch import gpu_branch, needs_compiler

import mpisign
from mpisign.codecs import SparseTernary
from mpisign.policy import Policy

on = pytest.mark.parametrize("gpu", [False, pytest.param(True, marks=needs_compiler)], ids=["host", "kernels"])


def encoded(codec: SparseTernary, values: torch.Tensor) -> torch.Tensor:
    message = torch.full((1, codec.length(values.numel())), 0x25A5A5A5, dtype=torch.int32)
    assert codec.encode(values, message, Policy().context(1, 0), 0)
    return message


@on
@pytest.mark.parametrize("ratio", [0.01, 0.2, 1.0])
@pytest.mark.parametrize("n", [0, 1, 2, 33, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_it_is_the_paper_s(dtype: torch.dtype, n: int, ratio: float, gpu: bool) -> None:
    values = torch.randn(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64).to(dtype)
    codec = SparseTernary(ratio)
    with gpu_branch(gpu):
        message, out = encoded(codec, values), torch.full((n,), torch.nan, dtype=dtype)
        codec.decode(message, out)
        twice = torch.ones(n, dtype=dtype)
        codec.add(message, twice, -2.0)
    v = values.double().numpy()
    k = min(n, max(1, round(ratio * n)))
    kept = np.argsort(-np.abs(v))[:k]
    expected = np.zeros(n)
    expected[kept] = np.abs(v[kept]).mean() * np.sign(v[kept]) if k else 0.0
    assert message.shape == (1, 1 + k)
    np.testing.assert_allclose(out, expected, rtol=1e-6)
    np.testing.assert_allclose(twice, 1 - 2 * expected, rtol=1e-5)


def test_its_items() -> None:
    message = encoded(SparseTernary(0.75), torch.tensor([0.0, 3.0, -1.0, 0.0]))
    assert message[0, :1].view(torch.float32).item() == pytest.approx(4 / 3)  # of three, one of which is 0
    assert sorted(message[0, 1:].tolist()) == [-3, 1, 4]


@on
def test_of_equals_the_first_are_sent(gpu: bool) -> None:
    """Whoever decides, on whatever device."""
    values = torch.tensor([1.0, -2.0] * 3000)
    values[5000] = 3.0
    with gpu_branch(gpu):
        message = encoded(SparseTernary(0.001), values)
    assert message[0, 1:].tolist() == [5000, ~1, ~3, ~5, ~7, ~9]


def test_zeros_are_sent_as_zeros() -> None:
    out = torch.ones(100)
    SparseTernary(0.5).decode(encoded(SparseTernary(0.5), torch.zeros(100)), out)
    assert not out.any()


def test_it_is_a_contraction() -> None:
    for seed in range(20):
        values = torch.randn(200, generator=torch.Generator().manual_seed(seed)).pow(3)
        out = torch.empty(200)
        SparseTernary(0.05).decode(encoded(SparseTernary(0.05), values), out)
        assert float((out - values).norm()) < float(values.norm())


def test_indices_that_are_none_do_nothing() -> None:
    """Another rank's may be any bits."""
    codec = SparseTernary(1.0)
    message = encoded(codec, torch.ones(4))
    message[0, 1:] = torch.tensor([2**31 - 1, -(2**31), 4, -6], dtype=torch.int32)
    out = torch.zeros(4)
    codec.add(message, out, 1.0)
    assert out.tolist() == [0.0] * 4


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_told(bad: float) -> None:
    values = torch.ones(100, dtype=torch.float64)
    values[70] = bad
    codec = SparseTernary(0.1)
    message = torch.zeros((1, codec.length(100)), dtype=torch.int32)
    assert not codec.encode(values, message, Policy().context(0, 0), 0)


@pytest.mark.parametrize("ratio", [0.0, -1.0, 1.5, "a", True])
def test_impossible_ratios(ratio: object) -> None:
    with pytest.raises(mpisign.OptionError, match="ratio="):
        mpisign.stc(ratio)  # type: ignore[arg-type]
