"""Random votes on real ranks: how often they are right, as the papers say."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

import mpisign
from mpisign import Method
from mpisign.attacks import Adversary, SignFlip

from . import ballots
from .steps import EXCHANGES, step, wrap

if TYPE_CHECKING:
    from mpi4py import MPI


pytestmark = pytest.mark.mpi


# -------------------------------------------------------------------------------------------- random votes

PULLS = (0.3, -0.5, 0.1, 0.7, -0.2)  # the gradient of each rank, in every coordinate
DRAWS = 40_000
TOLERANCE = 5 / math.sqrt(DRAWS)  # five standard deviations of a mean of values in [-1, 1]


def normal_cdf(x: float) -> float:
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


def expected_vote(chances: Sequence[tuple[float, float]]) -> float:
    """The mean decision of ranks that vote +1 and -1 with these chances, ties being fair coins."""
    total = np.ones(1)
    for up, down in chances:
        total = np.convolve(total, [down, 1 - up - down, up])
    middle = len(chances)
    return float(total[middle + 1 :].sum() - total[:middle].sum())


def two_sided(up: float) -> tuple[float, float]:
    return up, 1 - up


def clipped(g: float, bound: float) -> float:
    return min(max(g, -bound), bound)


RANDOM: dict[str, tuple[Method, Callable[[float, float], tuple[float, float]]]] = {
    # method, and (gradient, largest magnitude over ranks) -> the chances of +1 and -1
    "noisy_signsgd": (mpisign.noisy_signsgd(0.5), lambda g, top: two_sided(normal_cdf(g / 0.5))),
    "noisy_signsgd relative": (
        mpisign.noisy_signsgd(2.0, relative=True),
        lambda g, top: two_sided(normal_cdf(math.copysign(0.5, g))),
    ),
    "sto_sign": (mpisign.sto_sign(0.6), lambda g, top: two_sided(0.5 + clipped(g, 0.6) / 1.2)),
    "sto_sign maximum": (mpisign.sto_sign(), lambda g, top: two_sided(0.5 + g / (2 * top))),
    "dp_sign": (
        mpisign.dp_sign(0.4 * math.sqrt(DRAWS), noise=0.5),
        lambda g, top: two_sided(normal_cdf(clipped(g, 0.4) / 0.5)),
    ),
    "ternary_vote": (
        mpisign.ternary_vote(0.6, 0.8),
        lambda g, top: ((0.6 + clipped(g, 0.6)) / 1.6, (0.6 - clipped(g, 0.6)) / 1.6),
    ),
    "sparsign": (
        mpisign.sparsign(1.5),
        lambda g, top: (min(1.0, 1.5 * max(g, 0.0)), min(1.0, 1.5 * max(-g, 0.0))),
    ),
}


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize(("method", "chances"), RANDOM.values(), ids=RANDOM)
def test_the_mean_of_random_votes(
    comm: MPI.Comm, method: Method, chances: Callable[[float, float], tuple[float, float]], exchange: str
) -> None:
    (tensor,) = tensors = ballots.parameters((DRAWS,), dtypes=[torch.float32])
    optimizer = wrap(tensors, method, exchange=exchange)
    step(optimizer, tensors, [torch.full((DRAWS,), PULLS[comm.rank])])
    pulls = PULLS[: comm.size]
    top = max(abs(g) for g in pulls)
    expected = expected_vote([chances(g, top) for g in pulls])
    assert float(tensor.grad.mean()) == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_the_median_of_noisy_gradients(comm: MPI.Comm, exchange: str) -> None:
    """Its mean and spread are those of medians of normal numbers around the ranks' gradients."""
    (tensor,) = tensors = ballots.parameters((DRAWS,), dtypes=[torch.float64])
    optimizer = wrap(tensors, mpisign.noisy_median(0.5), exchange=exchange)
    step(optimizer, tensors, [torch.full((DRAWS,), PULLS[comm.rank], dtype=torch.float64)])
    pulls = np.array(PULLS[: comm.size])[:, None]
    expected = np.median(pulls + 0.5 * np.random.default_rng(0).standard_normal((comm.size, DRAWS)), axis=0)
    assert float(tensor.grad.mean()) == pytest.approx(expected.mean(), abs=TOLERANCE)
    assert float(tensor.grad.std()) == pytest.approx(expected.std(), rel=0.03)


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("signal", [0.3, 1.0])
def test_wrong_votes_are_the_binomial_tail(comm: MPI.Comm, signal: float, exchange: str) -> None:
    """Gaussian noise, signal-to-noise ratio S: an honest rank is right with Phi(S), a blind flipper with 1 - Phi(S)."""
    for flippers in range((comm.size + 1) // 2):
        (tensor,) = tensors = ballots.parameters((DRAWS,), dtypes=[torch.float32])
        tensor.grad = torch.randn(DRAWS, generator=ballots.generator(comm.rank, flippers)) + signal
        Adversary(SignFlip(), range(flippers), comm, i_know_this_is_an_attack=True).corrupt(tensors)
        wrap(tensors, mpisign.signsgd(), exchange=exchange).step()
        right = normal_cdf(signal)
        ups = [1 - right] * flippers + [right] * (comm.size - flippers)
        expected = (1 - expected_vote([two_sided(up) for up in ups])) / 2
        wrong = float((tensor.grad < 0).float().mean())
        assert wrong == pytest.approx(expected, abs=TOLERANCE / 2)


@pytest.mark.parametrize("noise", [2.0, 6.0])
def test_noisy_votes_stop_where_the_theory_says(comm: MPI.Comm, noise: float) -> None:
    """f_m = (x - a_m)^2 / 2, a = 1, 2, 10: the mean vote is 0 where sum arctan(erf((x - a_m) / (b sqrt 2))) is."""
    if comm.size != 3:
        pytest.skip("three functions, three ranks")
    lowest, highest = 1.0, 10.0
    for _ in range(60):
        x = (lowest + highest) / 2
        pull = sum(math.atan(math.erf((x - a) / (noise * math.sqrt(2)))) for a in (1, 2, 10))
        lowest, highest = (x, highest) if pull < 0 else (lowest, x)
    assert 2 < x < 13 / 3  # from the median to the mean, the further the more noise
    a = (1.0, 2.0, 10.0)[comm.rank]
    (tensor,) = tensors = ballots.parameters((DRAWS,), dtypes=[torch.float32])
    optimizer = wrap(tensors, mpisign.noisy_signsgd(noise))
    for away, sign in ((0.0, 0), (1.0, 1), (-1.0, -1)):
        step(optimizer, tensors, [torch.full((DRAWS,), x + away - a)])
        vote = float(tensor.grad.mean())
        assert vote == pytest.approx(0, abs=TOLERANCE) if sign == 0 else vote * sign > TOLERANCE
