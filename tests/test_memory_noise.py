"""mpisign.memory.noise: what random signs are on average, and where their randomness comes from."""

from __future__ import annotations

import dataclasses
import io
import math

import pytest
import torch

import mpisign
from mpisign.backends.host import Host
from mpisign.memory import (
    ClippedNoise,
    GaussianNoise,
    Memory,
    SparseSign,
    StochasticSign,
    TernarySign,
    gaussian_mechanism,
)
from mpisign.policy import Policy

G = torch.tensor([-1.0, -0.6, -0.1, 0.0, 0.05, 0.3, 0.9, 1.0], dtype=torch.float64)
DRAWS = 40_000
MANY = G.repeat(DRAWS)  # each value as often as a Monte Carlo needs it
TOLERANCE = 5 / math.sqrt(DRAWS)  # five standard deviations of a mean of values in [-1, 1]
MEMORIES: list[Memory] = [
    GaussianNoise(0.5),
    GaussianNoise(0.5, relative=True),
    StochasticSign(2.0),
    ClippedNoise(1.0, 0.5),
    TernarySign(1.0, 2.0),
    SparseSign(0.5),
]
each = pytest.mark.parametrize("memory", MEMORIES, ids=str)


def sent(
    memory: Memory, gradient: torch.Tensor = MANY, *, seed: int = 0, step: int = 0, rank: int = 0, word: int = 0
) -> torch.Tensor:
    context = Policy(seed=seed).context(step, rank)
    context = dataclasses.replace(context, prepared=memory.prepare([gradient], context))
    before, scratch = gradient.clone(), torch.full((gradient.numel() + 7,), torch.nan, dtype=gradient.dtype)
    result = memory(gradient, {}, scratch, context, word)
    assert torch.equal(gradient, before), "the gradient must be left alone"
    assert result.data_ptr() == scratch.data_ptr()
    assert result.shape == gradient.shape
    return result


def means(values: torch.Tensor) -> torch.Tensor:
    """Of each of the values in G."""
    return values.view(DRAWS, len(G)).mean(0)


def normal_cdf(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def assert_near(a: torch.Tensor, b: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


@each
def test_randomness_is_told_by_seed_step_rank_and_place(memory: Memory) -> None:
    drawn = sent(memory)
    assert torch.equal(drawn, sent(memory))
    for other in ({"seed": 1}, {"step": 1}, {"rank": 1}, {"word": 1}):
        assert not torch.equal(drawn, sent(memory, **other)), other


@each
def test_no_number_is_drawn_twice(memory: Memory) -> None:
    """Neither in one block of the work nor in the next."""
    same = torch.full((3 * Host.cache,), 0.3, dtype=torch.float64)
    parts = sent(memory, same).view(-1, 256)
    assert parts.unique(dim=0).shape == parts.shape


@pytest.mark.parametrize("memory", [StochasticSign(2.0), TernarySign(1.0, 2.0), SparseSign(0.5)], ids=str)
def test_coins_do_not_depend_on_the_blocks(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = sent(memory)
    monkeypatch.setattr(Host, "cache", 96_000)
    assert torch.equal(sent(memory), whole)


@pytest.mark.parametrize("bound", [1.0, 2.0])
def test_stochastic_signs_are_unbiased(bound: float) -> None:
    assert_near(bound * means(sent(StochasticSign(bound)).sign()), G, bound * TOLERANCE)


def test_stochastic_signs_take_their_bound_from_the_ranks() -> None:
    memory = StochasticSign()
    assert memory.needs_maximum
    assert not StochasticSign(2.0).needs_maximum
    bounds = MANY.abs() + 0.5
    context = dataclasses.replace(Policy().context(0, 0), prepared={7: bounds})
    signs = memory(MANY, {}, torch.empty_like(MANY), context, 7).sign()
    assert_near(means(signs), G / (G.abs() + 0.5))


@pytest.mark.parametrize(("a", "b"), [(1.0, 1.0), (1.0, 2.0), (2.0, 5.0)])
def test_ternary_votes_are_unbiased(a: float, b: float) -> None:
    trits = sent(TernarySign(a, b))
    assert set(trits.tolist()) <= {-1.0, 0.0, 1.0}
    assert_near(b * means(trits), G, b * TOLERANCE)
    assert_near(means(trits.abs()), torch.full_like(G, a / b))  # who speaks tells nothing about the gradient


@pytest.mark.parametrize("budget", [0.5, 1.0])
def test_sparse_signs_are_unbiased(budget: float) -> None:
    trits = sent(SparseSign(budget))
    assert set(trits.tolist()) <= {-1.0, 0.0, 1.0}
    assert_near(means(trits) / budget, G, TOLERANCE / budget)
    assert_near(means(trits.abs()), budget * G.abs())


def test_sparse_signs_of_large_values_are_certain() -> None:
    assert torch.equal(sent(SparseSign(100.0), G), torch.tensor([-1.0, -1, -1, 0, 1, 1, 1, 1], dtype=torch.float64))


@pytest.mark.parametrize(("memory", "noise"), [(GaussianNoise(0.5), 0.5), (GaussianNoise(0.5, relative=True), 0.2)])
def test_gaussian_noise(memory: Memory, noise: float) -> None:
    """The relative one is half of the largest magnitude, here 0.4."""
    scaled = 0.4 * MANY if memory.relative else MANY
    values = sent(memory, scaled)
    assert_near(means(values), means(scaled), noise * TOLERANCE)
    assert float((values - scaled).std()) == pytest.approx(noise, rel=0.01)


@pytest.mark.parametrize("clip", [1.0, 1e6])
def test_private_signs_are_of_the_clipped_gradient(clip: float) -> None:
    clipped = min(1.0, clip / float(MANY.norm())) * G
    noise = 0.5 * float(clipped.abs().max())
    positive = (sent(ClippedNoise(clip, noise)) > 0).double()
    assert_near(means(positive), normal_cdf(clipped / noise))


def test_the_norm_that_is_clipped_is_the_whole_gradients() -> None:
    memory, parts = ClippedNoise(1.0, 1e-9), [torch.full((4,), 3.0), torch.full((9,), 4.0)]
    factor = memory.prepare(parts, Policy().context(0, 0))
    assert float(factor) == pytest.approx((4 * 9 + 9 * 16) ** -0.5)
    assert float(memory.prepare([torch.zeros(3)], Policy().context(0, 0))) == 1.0


def test_the_gaussian_mechanism() -> None:
    assert gaussian_mechanism(2.0, 0.5, 1e-5) == pytest.approx(2.0 * math.sqrt(2 * math.log(1.25e5)) / 0.5)
    assert mpisign.dp_sign(2.0, epsilon=0.5, delta=1e-5).memory == ClippedNoise(2.0, gaussian_mechanism(2.0, 0.5, 1e-5))


@pytest.mark.parametrize(
    "options", [{}, {"noise": 1.0, "epsilon": 1.0}, {"epsilon": 1.0}, {"noise": 1.0, "delta": 0.1}]
)
def test_private_signs_need_the_noise_or_the_privacy(options: dict[str, float]) -> None:
    with pytest.raises(mpisign.OptionError, match=r"dp_sign needs noise=, or epsilon= and delta="):
        mpisign.dp_sign(1.0, **options)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_impossible_amounts(value: float) -> None:
    for kind in (GaussianNoise, StochasticSign, ClippedNoise, SparseSign):
        with pytest.raises(mpisign.OptionError, match="must be a positive number"):
            kind(value)
    with pytest.raises(mpisign.OptionError):
        TernarySign(value, 1.0)
    with pytest.raises(mpisign.OptionError, match=r"must be at least A=2\.0"):
        TernarySign(2.0, 1.0)


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("method", [mpisign.dp_sign(1.0, 0.5), mpisign.ternary_vote(4.0, 4.0, private=True)])
def test_noise_that_only_this_rank_can_repeat(method: mpisign.Method) -> None:
    """Two jobs of the same seed differ, unless one goes on with the other's state."""

    def started() -> tuple[mpisign.DistributedSignOptimizer, torch.nn.Parameter]:
        x = torch.nn.Parameter(torch.zeros(10_000))
        sgd = torch.optim.SGD([x], lr=1.0)
        return mpisign.DistributedSignOptimizer(sgd, method=method, seed=3, apply="optimizer"), x

    def vote(optimizer: mpisign.DistributedSignOptimizer, x: torch.nn.Parameter) -> torch.Tensor:
        x.grad = torch.zeros_like(x)
        optimizer.step()
        return x.grad.clone()

    (first, x), (second, y), (resumed, z) = started(), started(), started()
    votes, others = vote(first, x), vote(second, y)
    assert 4_500 < (votes == others).sum() < 5_500
    with io.BytesIO() as file:
        torch.save(first.state_dict(), file)
        file.seek(0)
        resumed.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(vote(first, x), vote(resumed, z))


@pytest.mark.usefixtures("world")
def test_noise_that_all_can_repeat() -> None:
    grads = []
    for _ in range(2):
        x = torch.nn.Parameter(torch.zeros(1000))
        sgd = torch.optim.SGD([x], lr=1.0)
        optimizer = mpisign.DistributedSignOptimizer(
            sgd, method=mpisign.dp_sign(1.0, 0.5, private=False), apply="optimizer"
        )
        x.grad = torch.zeros(1000)
        optimizer.step()
        grads.append(x.grad)
    assert torch.equal(*grads)


def test_keys_of_a_secret_tell_nothing_of_others() -> None:
    """128 bits for each place, step and rank; without a secret 64, the same for all who know the seed."""
    open_keys = [Policy(seed=5).context(step, rank).noise_key(7) for step in (0, 1) for rank in (0, 1)]
    keys = [
        Policy(seed=5).context(step, 0, 1, secret).noise_key(7) for step in (0, 1) for secret in ("ab" * 32, "cd" * 32)
    ]
    assert len({*open_keys, *keys}) == 8
    assert max(open_keys) < 2**64 < max(keys) < 2**128
    assert keys == [
        Policy(seed=5).context(step, 0, 1, secret).noise_key(7) for step in (0, 1) for secret in ("ab" * 32, "cd" * 32)
    ]
