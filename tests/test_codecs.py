"""mpisign.codecs: what one message holds, there and back."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch

from mpisign.backends.host import as_words
from mpisign.bitmap.tensors import DTYPES
from mpisign.codecs import Dense, SignBits
from mpisign.policy import Policy

POLICIES = [Policy(zeros, ties, seed=5) for zeros in ("coin", "abstain", "positive") for ties in ("coin", "zero")]
SIZES = [0, 1, 31, 32, 33, 1000]
RANK, STEP, FIRST_WORD = 3, 17, 1001

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
sizes = pytest.mark.parametrize("n", SIZES)


def some_values(n: int, dtype: torch.dtype) -> torch.Tensor:
    values = torch.randn(n, generator=torch.Generator().manual_seed(n)).to(dtype)
    values[::3] = 0
    values[::6] *= -1  # -0
    return values


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_sign_bits_planes(policy: Policy) -> None:
    assert SignBits().planes(policy) == (2 if policy.zeros == "abstain" else 1)


@sizes
@dtypes
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_sign_bits_encode_the_ballot_of_this_rank(policy: Policy, dtype: torch.dtype, n: int) -> None:
    codec = SignBits()
    values = some_values(n, dtype)
    message = torch.full((codec.planes(policy), codec.length(n)), 0x25A5A5A5, dtype=codec.wire_dtype(dtype))
    assert codec.encode(values, message, policy.context(STEP, RANK), FIRST_WORD)
    key = oracle.coin_key(policy.seed, STEP, oracle.zeros_stream(RANK))
    ballot = oracle.ballot(values.double().numpy(), policy.zeros, oracle.coins(key, FIRST_WORD, n))
    assert (as_words(message[0]) == oracle.to_words(ballot > 0)).all()
    if policy.zeros == "abstain":
        assert (as_words(message[1]) == oracle.to_words(ballot != 0)).all()


@sizes
@dtypes
@pytest.mark.parametrize("planes", [1, 2])
def test_sign_bits_decode(planes: int, dtype: torch.dtype, n: int) -> None:
    decision = np.random.default_rng(n).integers(0, 2**32, (planes, SignBits().length(n)), np.uint32)
    out = torch.full((n,), torch.nan, dtype=dtype)
    SignBits().decode(torch.from_numpy(decision.view(np.int32)), out)
    expected = np.where(oracle.to_flags(decision[0], n), 1.0, -1.0)
    if planes == 2:
        expected[~oracle.to_flags(decision[1], n)] = 0.0
    assert out.tolist() == expected.tolist()


@sizes
@dtypes
def test_dense_loses_nothing(dtype: torch.dtype, n: int) -> None:
    codec, policy = Dense(), Policy()
    values = some_values(n, dtype)
    assert codec.planes(policy) == 1
    message = torch.full((1, codec.length(n)), torch.nan, dtype=codec.wire_dtype(dtype))
    assert message.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert codec.encode(values, message, policy.context(STEP, RANK), FIRST_WORD)
    assert torch.equal(message[0].double(), values.double())
    out = torch.full_like(values, torch.nan)
    codec.decode(message, out)
    assert torch.equal(out, values)
    assert torch.equal(out.signbit(), values.signbit())


@dtypes
@pytest.mark.parametrize("codec", [SignBits(), Dense()], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_reported(codec: SignBits | Dense, bad: float, dtype: torch.dtype) -> None:
    values = some_values(100, dtype)
    values[77] = bad
    message = torch.empty((1, codec.length(100)), dtype=codec.wire_dtype(dtype))
    assert not codec.encode(values, message, Policy().context(STEP, RANK), FIRST_WORD)


@dtypes
@pytest.mark.parametrize("codec", [SignBits(), Dense()], ids=str)
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_pieces_give_what_the_whole_gives(codec: SignBits | Dense, policy: Policy, dtype: torch.dtype) -> None:
    assert codec.elementwise
    n = 1000
    values, context = some_values(n, dtype), policy.context(STEP, RANK)
    whole, pieces = torch.zeros((2, codec.planes(policy), codec.length(n)), dtype=codec.wire_dtype(dtype))
    codec.encode(values, whole, context, FIRST_WORD)
    for lo, hi in ((0, 32), (32, 640), (640, n)):
        span = slice(codec.length(lo), codec.length(hi))
        codec.encode(values[lo:hi], pieces[:, span], context, FIRST_WORD + codec.length(lo))
    assert torch.equal(whole, pieces)
