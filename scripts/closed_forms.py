"""What must come out of small problems, computed apart from the library: means of walks, odds of votes, bounds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Curve = np.ndarray
"""(steps + 1,) float64: what is shown, before each step and after the last."""


def chain(
    start: float,
    spacing: float,
    reach: float,
    steps: int,
    moves: Callable[[np.ndarray], Sequence[tuple[Any, np.ndarray]]],
    shown: Callable[[np.ndarray], np.ndarray] = lambda x: x,
) -> Curve:
    """The exact mean of ``shown(x)`` by step, where x jumps on a lattice through ``start``: a Markov chain.

    Args:
        reach: states further from ``start`` than that do not occur.
        moves: of the states x (n,), the ways to go on: (probability (n,) or a number, next states (n,)).
    """
    far = math.ceil(reach / spacing)
    states = start + spacing * np.arange(-far, far + 1)
    here = np.arange(len(states))
    matrix = np.zeros((len(states), len(states)))
    for probability, target in moves(states):
        there = np.rint((target - states[0]) / spacing).astype(int).clip(0, len(states) - 1)
        np.add.at(matrix, (here, there), np.broadcast_to(probability, here.shape))
    distribution = (here == far).astype(float)
    means = []
    for _ in range(steps + 1):
        means.append(distribution @ shown(states))
        distribution = distribution @ matrix
    return np.array(means)


def wins(votes: Sequence[Any]) -> Any:
    """The probability of a majority of independent voters who are for it with these probabilities; a tie is a coin."""
    counts = [1.0]  # counts[k]: the probability that k are for it
    for p in votes:
        counts = [a * (1 - p) + b * p for a, b in zip([*counts, 0.0], [0.0, *counts], strict=True)]
    half = len(votes) / 2
    return sum(chance * (1.0 if k > half else 0.5) for k, chance in enumerate(counts) if k >= half)


def so_far(curve: Curve) -> Curve:
    """The mean up to each step."""
    return np.cumsum(curve) / np.arange(1, len(curve) + 1)


def lipschitz_bound(distance: float, squared: float, delta: float, lr: float, steps: int) -> Curve:
    """What error feedback keeps the mean of f - f* so far below, for convex f; Karimireddy et al. 2019, Theorem III.

    Args:
        distance: from start to minimum.
        squared: the mean of ||g||^2 at most.
        delta: C loses at most a share 1 - delta of ||p||^2: 1 / n for scaled signs of n numbers, k / n for top-k.
    """
    done = np.arange(1, steps + 2)
    return distance**2 / (2 * lr * done) + lr * squared * (0.5 + 2 * math.sqrt(1 - delta) / delta)


def interpolated_bound(distance: float, ratio: float, smooth: float, delta: float, lr: float, steps: int) -> Curve:
    """The same for a quadratic f, least on all ranks and for all samples at one place; their proof gives then:

    With y = x - e, E||y'||^2 = ||y||^2 - 2 lr <grad f, x - e> + lr^2 E||g||^2, where <grad f, x> = 2 f and
    <grad f, e> <= f / 2 + L ||e||^2, and the sum of all ||e||^2 is at most 4 (1 - delta) / delta^2 lr^2 that of all
    ||g||^2.

    Args:
        ratio: the mean of ||g||^2 is at most so many times f.
        smooth: L, the Lipschitz constant of f's gradient.
    """
    gain = 3 * lr - lr**2 * ratio - 8 * smooth * lr**3 * ratio * (1 - delta) / delta**2
    assert gain > 0, "the bound needs a smaller learning rate"
    return distance**2 / (gain * np.arange(1, steps + 2))
