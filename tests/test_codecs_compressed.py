"""mpisign.codecs that compress: scaled signs, top-k and trits, there and back."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch

import mpisign
from mpisign.backends.host import Host, as_words
from mpisign.codecs import Codec, ScaledBits, SparseTernary, TopK, Trits
from mpisign.policy import Policy

FIRST_WORD = 1001
SIZES = [0, 1, 2, 31, 32, 33, 1000]
sizes = pytest.mark.parametrize("n", SIZES)
floats = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@pytest.fixture(params=[None, 64], ids=["", "small blocks"], autouse=True)
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work that is done block by block is done in one here, and once more in several."""
    if request.param:
        monkeypatch.setattr(Host, "cache", request.param)


def some_values(n: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64).to(dtype)


def encoded(codec: Codec, values: torch.Tensor, policy: Policy | None = None) -> torch.Tensor:
    policy = policy or Policy()
    message = torch.full((codec.planes(policy), codec.length(values.numel())), 0x25A5A5A5, dtype=torch.int32)
    assert codec.encode(values, message, policy.context(17, 3), FIRST_WORD)
    return message


def decoded(codec: Codec, message: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    out = torch.full_like(like, torch.nan)
    codec.decode(message, out)
    return out


COMPRESSED = [ScaledBits(), TopK(0.1), TopK(1.0), TopK(0.05, sample=0.25)]


@sizes
@floats
@pytest.mark.parametrize("codec", COMPRESSED, ids=str)
def test_adding_is_decoding_times_a_factor(codec: Codec, dtype: torch.dtype, n: int) -> None:
    message = encoded(codec, some_values(n, dtype))
    out = torch.ones(n, dtype=dtype)
    codec.add(message, out, -0.5)
    torch.testing.assert_close(out, 1 - 0.5 * decoded(codec, message, out))


@pytest.mark.parametrize("codec", COMPRESSED, ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_told(codec: Codec, bad: float) -> None:
    values = some_values(100)
    values[7] = bad
    message = torch.zeros((1, codec.length(100)), dtype=torch.int32)
    assert not codec.encode(values, message, Policy().context(0, 0), 0)


# ------------------------------------------------------------------------------------------- scaled signs


@sizes
@floats
def test_scaled_bits_are_a_scale_and_words_of_signs(dtype: torch.dtype, n: int) -> None:
    values = some_values(n, dtype)
    (message,) = encoded(ScaledBits(), values)
    k = -(-n // 32)
    assert message.shape == (1 + k + -(-k // 32),)
    scale = message[:1].view(torch.float32)
    assert float(scale) == pytest.approx(float(values.abs().sum()) / max(n, 1), rel=1e-6)
    assert (as_words(message[1 : 1 + k]) == oracle.to_words(values.numpy() > 0)).all()
    assert (as_words(message[1 + k :]) == oracle.to_words(np.ones(k, np.bool_))).all(), "none is silent"


@floats
@pytest.mark.parametrize("n", SIZES[1:])
@pytest.mark.parametrize("kind", ["normal", "one-hot", "heavy tail"])
def test_the_scaled_sign_is_a_contraction(kind: str, n: int, dtype: torch.dtype) -> None:
    """|C(p) - p|^2 = (1 - delta) |p|^2, delta = |p|_1^2 / (n |p|_2^2), also where one coordinate has it all."""
    p = some_values(n, dtype)
    if kind == "one-hot":
        p[1:] = 0
    elif kind == "heavy tail":
        p = p**5
    loss, silent = (
        float((decoded(ScaledBits(), encoded(ScaledBits(), p, Policy(zeros)), p) - p).double().square().sum())
        for zeros in ("coin", "rows")
    )
    square, delta = (
        float(p.double().square().sum()),
        float(p.double().abs().sum() ** 2 / (n * p.double().square().sum())),
    )
    assert loss == pytest.approx((1 - delta) * square, rel=1e-4, abs=1e-6 * square)
    assert silent <= loss, "words of zeros are sent as they are"
    assert (silent < loss) == (kind == "one-hot" and n > 32)
    assert delta <= 1 + 1e-12


@pytest.mark.parametrize("zeros", ["coin", "rows", "abstain", "positive"])
def test_zeros_among_scaled_signs(zeros: str) -> None:
    """There is no third sign, so who would abstain tosses a coin, too, but in words of nothing but zeros."""
    values = torch.zeros(1000)
    values[0] = values[999] = -500.0
    policy = Policy(zeros, seed=5)
    ours = decoded(ScaledBits(), encoded(ScaledBits(), values, policy), values)
    coins = oracle.coins(oracle.coin_key(5, 17, oracle.zeros_stream(3)), FIRST_WORD + 1, 1000)
    expected = oracle.ballot(values.double().numpy(), "positive" if zeros == "positive" else "coin", coins)
    if zeros in ("rows", "abstain"):
        expected[32:992] = 0
    assert ours.tolist() == expected.tolist()


def test_a_scale_that_overflows_is_not_sent_and_a_norm_may() -> None:
    message = torch.zeros((1, ScaledBits().length(4)), dtype=torch.int32)
    assert ScaledBits().encode(torch.full((4,), 3e38), message, Policy().context(0, 0), 0)
    assert message[0, :1].view(torch.float32).item() == pytest.approx(3e38)
    assert not ScaledBits().encode(torch.full((4,), 3e39, dtype=torch.float64), message, Policy().context(0, 0), 0)


# -------------------------------------------------------------------------------------------------- top-k


@pytest.mark.parametrize("sample", [None, 1.0, 0.1, 0.01])
@pytest.mark.parametrize("ratio", [0.001, 0.01, 0.3])
@pytest.mark.parametrize("n", [3, 33, 1000, 20_000])
def test_top_k_is_exact_with_and_without_a_sample(n: int, ratio: float, sample: float | None) -> None:
    codec, values = TopK(ratio, sample), some_values(n)
    count = max(1, round(ratio * n))
    assert codec.count(n) == count
    message = encoded(codec, values)
    assert message.shape == (1, 2 * count)
    expected = torch.zeros(n)
    kept = values.abs().topk(count).indices
    expected[kept] = values[kept]
    assert torch.equal(decoded(codec, message, values), expected)


@pytest.mark.parametrize("values", [torch.arange(1000.0), torch.zeros(1000), torch.tensor([1.0] + 999 * [0.0])])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_sample_that_misleads_costs_time_not_exactness(values: torch.Tensor, reverse: bool) -> None:
    values = values.flip(0).contiguous() if reverse else values
    ours = decoded(TopK(0.02, sample=0.01), encoded(TopK(0.02, sample=0.01), values), values)
    assert ours.count_nonzero() == min(20, int(values.count_nonzero()))
    assert torch.equal(ours.sort().values, values.sort().values * (torch.arange(1000) >= 980))


@pytest.mark.parametrize("n", [1, 5, 64])
@floats
def test_indices_are_left_out_where_all_is_sent(n: int, dtype: torch.dtype) -> None:
    codec, values = TopK(1.0), some_values(n, dtype)
    message = encoded(codec, values)
    assert message.shape == (1, n)
    assert torch.equal(decoded(codec, message, values), values.float().to(dtype))


def test_vectors_may_be_sent_whole() -> None:
    codec = TopK(0.01, vectors=False)
    assert codec.of(torch.zeros(1000)).count(1000) == 1000
    assert codec.of(torch.zeros(())).count(1) == 1
    assert codec.of(torch.zeros(10, 100)).count(1000) == 10
    assert TopK(0.01).of(torch.zeros(1000)).count(1000) == 10


@pytest.mark.parametrize("ratio", [0.1, 1.0])
def test_clearing_where_values_were_sent(ratio: float) -> None:
    codec, values = TopK(ratio), some_values(100)
    out = torch.ones(100)
    codec.clear(encoded(codec, values), out)
    sent = torch.zeros(100, dtype=torch.bool)
    sent[values.abs().topk(codec.count(100)).indices] = True
    assert torch.equal(out, (~sent).float())


@pytest.mark.parametrize("options", [{"ratio": 0.0}, {"ratio": 1.1}, {"ratio": "much"}, {"sample": 0.0}, {"sample": 2}])
def test_impossible_shares(options: dict[str, float]) -> None:
    with pytest.raises(mpisign.OptionError, match=rf"{next(iter(options))}=.* must be in \(0, 1\]"):
        TopK(**options)


# -------------------------------------------------------------------------------------------------- trits


@sizes
@pytest.mark.parametrize("zeros", ["coin", "abstain", "positive"])
def test_trits_keep_zeros_whatever_the_policy(zeros: str, n: int) -> None:
    policy, values = Policy(zeros), some_values(n)
    values[::3] = 0
    assert Trits().planes(policy) == 2
    message = encoded(Trits(), values, policy)
    assert message.shape == (2, -(-n // 32))
    assert torch.equal(decoded(Trits(), message, values), values.sign())
    assert (as_words(message[1]) == oracle.to_words(np.asarray(values != 0))).all()


@pytest.mark.parametrize("codec", [TopK(0.01), SparseTernary(0.01)], ids=lambda codec: codec.name)
def test_more_elements_than_places_can_be_told_are_refused(codec: Codec) -> None:
    codec.of(torch.empty(2**31 - 1, 1, device="meta"))
    with pytest.raises(mpisign.GradientError, match=r"places in 32 bits.*mpisign\.signum"):
        codec.of(torch.empty(2**16, 2**15, device="meta"))
