"""Rules that weigh whole vectors by their distances: Krum, geometric median, centered clipping, nearest neighbours.

Each turns distances into one weight a rank, and decides the weighted sum (:mod:`mpisign.rules.geometry`). None of them
is shardable: distances of a shard are not those of the vector, so the exchange must hand over all V messages in full.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mpisign.errors import OptionError
from mpisign.policy import StepContext, check_integer, check_positive
from mpisign.rules.coordinatewise import Rows, check_enough
from mpisign.rules.geometry import combine, distances_to, mean_of, squared_distances
from mpisign.rules.rule import VectorRule

__all__ = [
    "CenteredClipping",
    "GeometricMedian",
    "GradientElimination",
    "Krum",
    "MultiKrum",
    "NearestNeighbourAveraging",
    "centered_clipping",
    "geometric_median",
    "gradient_elimination",
    "krum",
    "multi_krum",
    "nearest_neighbour_averaging",
]


def _by_krum_score(rows: Rows, f: int) -> list[int]:
    """All rows, the one that Krum elects first."""
    count = len(rows)
    neighbours = min(count - 1, max(1, count - f - 2))
    nearest = squared_distances(rows).sort(dim=1).values[:, 1 : 1 + neighbours]  # its distance to itself is the first
    score = sum(nearest.unbind(1), torch.zeros(count, dtype=torch.float64, device="cpu"))
    return score.argsort(stable=True).tolist()


def multi_krum(rows: Rows, f: int, m: int | None = None, out: Tensor | None = None) -> Tensor:
    """The mean of the ``m`` rows with the smallest sum of squared distances to their V - f - 2 nearest others.

    Of equal scores the lowest row counts as smaller. Where V - f - 2 is below 1, the one nearest counts.

    Args:
        rows: V vectors (n,).
        f: how many of them may be adversaries'.
        m: how many to average, V at most; default V - f, but at least 1.
        out: (n,), written and returned; must not overlap with ``rows``.
    """
    m = max(1, len(rows) - f) if m is None else m
    return mean_of(rows, _by_krum_score(rows, f)[:m], out)


def krum(rows: Rows, f: int, out: Tensor | None = None) -> Tensor:
    """The row with the smallest sum of squared distances to its V - f - 2 nearest others: ``multi_krum(m=1)``."""
    return multi_krum(rows, f, 1, out)


def geometric_median(rows: Rows, nu: float = 0.1, steps: int = 3, out: Tensor | None = None) -> Tensor:
    """Towards the point with the least sum of distances, from z = 0: ``z <- sum_i b_i rows[i] / sum_i b_i``,
    ``b_i = 1 / max(nu, ||z - rows[i]||)``, ``steps`` times.

    Args:
        rows: V vectors (n,).
        nu: the distance below which all count as equally near, so that no row attracts z for good.
        out: (n,), written and returned; must not overlap with ``rows``.

    O(steps V n).
    """
    weights, total = [0.0] * len(rows), 1.0
    for _ in range(steps):
        nearness: list[float] = distances_to(rows, weights, total).clamp_(min=nu).reciprocal_().tolist()
        if not any(nearness):  # all are further away than fp64 can say
            break
        weights, total = nearness, math.fsum(nearness)
    return combine(rows, weights, total, out)


def centered_clipping(
    rows: Rows, radius: float, center: Tensor | None = None, steps: int = 1, out: Tensor | None = None
) -> Tensor:
    """From v = ``center``: ``v <- v + mean_i (rows[i] - v) min(1, radius / ||rows[i] - v||)``, ``steps`` times.

    Args:
        rows: V vectors (n,).
        radius: how far a row can pull, times 1/V.
        center: (n,), where to start; default 0.
        out: (n,), written and returned; must not overlap with ``rows`` or ``center``.

    O(steps V n).
    """
    points = list(rows) if center is None else [*rows, center]
    weights = [0.0] * len(rows) + [1.0] * (center is not None)
    for _ in range(steps):
        pulls: list[float] = (radius / distances_to(points, weights, 1.0)[: len(rows)]).clamp_(max=1.0).tolist()
        stays = 1.0 - math.fsum(pulls) / len(rows)
        weights = [stays * weight for weight in weights]
        for i, pull in enumerate(pulls):
            weights[i] += pull / len(rows)
    return combine(points, weights, 1.0, out)


def nearest_neighbour_averaging(rows: Rows, f: int, pivot: int, out: Tensor | None = None) -> Tensor:
    """The mean of the V - f rows (at least 1) nearest to ``rows[pivot]``, itself included; of equals, the lower rows.

    While at most f rows are adversaries', the result is no further from the pivot than the furthest honest row.

    Args:
        rows: V vectors (n,).
        out: (n,), written and returned; must not overlap with ``rows``.

    O(V n).
    """
    distances = distances_to(rows, [float(i == pivot) for i in range(len(rows))], 1.0)
    return mean_of(rows, distances.argsort(stable=True).tolist()[: max(1, len(rows) - f)], out)


def gradient_elimination(rows: Rows, f: int, out: Tensor | None = None) -> Tensor:
    """The mean of the V - f rows (at least 1) with the smallest L2 norms; of equals, the lower rows.

    While at most f rows are adversaries', it is no longer than the longest honest row.

    Args:
        rows: V vectors (n,).
        out: (n,), written and returned; must not overlap with ``rows``.

    O(V n).
    """
    norms = distances_to(rows, [0.0] * len(rows), 1.0)
    return mean_of(rows, norms.argsort(stable=True).tolist()[: max(1, len(rows) - f)], out)


@dataclass(frozen=True)
class Krum(VectorRule):
    """The vector of the one rank that is nearest to its neighbours (``krum``). Needs M >= 2f + 3 ranks.

    Take it to reproduce the literature. It uses one gradient of V, so it is as noisy as a job of one rank; on data that
    differ from rank to rank it elects one rank's; and colluders who stay within the spread of the honest (a little is
    enough) get elected. When ranks abstain ``f`` stays, and at least one neighbour counts.

    Source: Blanchard et al., "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent", 2017, Section 4.
    """

    f: int
    name = "krum"

    def __post_init__(self) -> None:
        check_integer("f", self.f, 0)

    def check(self, size: int) -> None:
        check_enough(self.name, self.f, 3, size)

    def decide(self, messages: Sequence[Tensor], out: Tensor, context: StepContext, first_word: int) -> int:
        krum([message[0] for message in messages], self.f, out[0])
        return 0


@dataclass(frozen=True)
class MultiKrum(VectorRule):
    """The mean of the ``m`` best vectors by Krum's score (``multi_krum``). Needs M >= 2f + 3 ranks.

    Between Krum (m = 1) and the mean (m = V): less noise, and with m > V - f an adversary is averaged in for certain.
    Otherwise as :class:`Krum`, with the same source.

    Args:
        f: how many ranks may be adversaries.
        m: how many vectors to average; default V - f of the V ranks that vote.
    """

    f: int
    m: int | None = None
    name = "multi_krum"

    def __post_init__(self) -> None:
        check_integer("f", self.f, 0)
        if self.m is not None:
            check_integer("m", self.m, 1)

    def check(self, size: int) -> None:
        check_enough(self.name, self.f, 3, size)
        if self.m is not None and self.m > size:
            raise OptionError(
                f"{self.name} cannot average m={self.m} of {size} ranks: choose m={size - self.f} or less"
            )

    def decide(self, messages: Sequence[Tensor], out: Tensor, context: StepContext, first_word: int) -> int:
        multi_krum([message[0] for message in messages], self.f, self.m, out[0])
        return 0


@dataclass(frozen=True)
class GeometricMedian(VectorRule):
    """The point with the least sum of distances, nearly (``geometric_median``).

    Needs no ``f``: what a minority sends has a bounded effect, however long its vectors are. On data that differ from
    rank to rank it is biased, as the median is. ``nu`` is in units of a message's length; far above the distances
    between honest vectors, the rule is the mean.

    Source: Pillutla, Kakade, Harchaoui, "Robust Aggregation for Federated Learning", 2019, the smoothed Weiszfeld
    algorithm.
    """

    nu: float = 0.1
    steps: int = 3
    name = "geometric_median"

    def __post_init__(self) -> None:
        check_positive("nu", self.nu)
        check_integer("steps", self.steps, 1)

    def decide(self, messages: Sequence[Tensor], out: Tensor, context: StepContext, first_word: int) -> int:
        geometric_median([message[0] for message in messages], self.nu, self.steps, out[0])
        return 0


@dataclass(frozen=True)
class CenteredClipping(VectorRule):
    """The previous decision, moved by the mean of clipped differences (``centered_clipping``).

    The previous decision, ``context.previous`` (1, k), is the state of this rule: the exchange keeps it, and it starts
    at 0. Take it with worker momentum, against adversaries who push a little, the same way, at every step. No rank
    moves a decision by more than ``steps radius / V``: tune ``radius``, in units of a message's length, to the
    differences between honest vectors. Too small, and training crawls; too large, and this is the mean.

    Source: Karimireddy, He, Jaggi, "Learning from History for Byzantine Robust Optimization", 2021, centered clipping.
    """

    radius: float = 10.0
    steps: int = 1
    name = "centered_clipping"
    remembers = True

    def __post_init__(self) -> None:
        check_positive("radius", self.radius)
        check_integer("steps", self.steps, 1)

    def decide(self, messages: Sequence[Tensor], out: Tensor, context: StepContext, first_word: int) -> int:
        center = None if context.previous is None else context.previous[0]
        centered_clipping([message[0] for message in messages], self.radius, center, self.steps, out[0])
        return 0


@dataclass(frozen=True)
class GradientElimination(VectorRule):
    """The mean without the ``f`` longest vectors (``gradient_elimination``), CGE. Needs M >= 2f + 1 ranks.

    Take it against ranks that send too much. Its cost is that of norms, one pass; but a hostile vector that is no
    longer than the honest ones is averaged in, whichever way it points. ``f`` stays when ranks abstain.

    Source: Gupta, Liu, Vaidya, "Byzantine Fault-Tolerant Distributed Machine Learning using Stochastic Gradient
    Descent (SGD) and Norm-Based Comparative Gradient Elimination (CGE)", 2021; its sum is a mean here.
    """

    f: int
    name = "gradient_elimination"

    def __post_init__(self) -> None:
        check_integer("f", self.f, 0)

    def check(self, size: int) -> None:
        check_enough(self.name, self.f, 1, size)

    def decide(self, messages: Sequence[Tensor], out: Tensor, context: StepContext, first_word: int) -> int:
        gradient_elimination([message[0] for message in messages], self.f, out[0])
        return 0


@dataclass(frozen=True)
class NearestNeighbourAveraging(VectorRule):
    """The mean of the V - f vectors nearest to this rank's own (``nearest_neighbour_averaging``). Needs M > 2f.

    **Each rank decides something else**, so it belongs to methods that exchange parameters and let replicas differ, as
    MoNNA does. The paper's ranks wait for M - f vectors and average the M - 2f nearest; ours wait for all that vote.
    It trusts this rank's own vector; a rank that abstains has none, and takes the one that Krum(f) elects instead.

    Source: Farhadkhani et al., "Robust Collaborative Learning with Linear Gradient Overhead", 2023 (MoNNA).
    """

    f: int
    name = "nearest_neighbour_averaging"
    personal = True

    def __post_init__(self) -> None:
        check_integer("f", self.f, 0)

    def check(self, size: int) -> None:
        check_enough(self.name, self.f, 1, size)

    def decide(self, messages: Sequence[Tensor], out: Tensor, context: StepContext, first_word: int) -> int:
        rows = [message[0] for message in messages]
        votes = context.rank in context.voters
        pivot = context.voters.index(context.rank) if votes else _by_krum_score(rows, self.f)[0]
        nearest_neighbour_averaging(rows, self.f, pivot, out[0])
        return 0
