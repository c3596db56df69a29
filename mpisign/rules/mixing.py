"""Nearest-neighbour mixing: each vector is replaced by the mean of its neighbourhood before another rule decides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mpisign.backends import backend_for
from mpisign.errors import OptionError
from mpisign.policy import StepContext, check_integer
from mpisign.rules.coordinatewise import Rows, check_enough
from mpisign.rules.geometry import mean_of, squared_distances
from mpisign.rules.rule import BallotRule, PieceRule, Rule, ValueRule, VectorRule

__all__ = ["NearestNeighbourMixing", "nearest_neighbour_mixing"]


def _neighbourhoods(rows: Rows, f: int) -> list[list[int]]:
    """For each row, the V - f nearest (at least 1), itself included; of equals, the lower ones."""
    order = squared_distances(rows).argsort(dim=1, stable=True)
    return order[:, : max(1, len(rows) - f)].tolist()


def nearest_neighbour_mixing(rows: Rows, f: int) -> Tensor:
    """Each row replaced by the mean of the V - f rows (at least 1) nearest to it, itself included: (V, n).

    Args:
        rows: V vectors (n,).
        f: how many of them may be adversaries'.

    O(V^2 n).
    """
    return torch.stack([mean_of(rows, near) for near in _neighbourhoods(rows, f)])


@dataclass(frozen=True)
class NearestNeighbourMixing(VectorRule):
    """Another rule, applied to mixed vectors (``nearest_neighbour_mixing``). Needs M > 2f ranks.

    Take it in front of a robust rule where ranks hold data of different kinds: mixing brings the honest vectors nearer
    to their mean, and the bias of the rule behind it shrinks with their spread. It protects from nothing by itself.

    Distances are of whole vectors, so it is not shardable whatever ``rule`` is. If ``rule`` is, it gets a block of
    coordinates at a time; if not, mixing needs memory for another V vectors.

    Args:
        rule: what decides on the mixed vectors, e.g. ``TrimmedMean(f)``.
        f: how many ranks may be adversaries.

    Raises:
        OptionError: ``rule`` counts votes, which have no distances; or ``f`` is not an int of 0 or more.

    Source: Allouah et al., "Fixing by Mixing: A Recipe for Optimal Byzantine ML under Heterogeneity", 2023.
    """

    rule: Rule
    f: int
    name = "nearest_neighbour_mixing"

    def __post_init__(self) -> None:
        check_integer("f", self.f, 0)
        if isinstance(self.rule, (BallotRule, PieceRule)):
            raise OptionError(f"{self.rule!r} decides on signs, which cannot be averaged: mix in front of a dense rule")
        if isinstance(self.rule, VectorRule):
            for trait in ("remembers", "personal"):
                object.__setattr__(self, trait, getattr(self.rule, trait))

    def check(self, size: int) -> None:
        check_enough(self.name, self.f, 1, size)
        self.rule.check(size)

    def decide(self, messages: Sequence[Tensor], out: Tensor, context: StepContext, first_word: int) -> int:
        rows = [message[0] for message in messages]
        near = _neighbourhoods(rows, self.f)
        length = out.shape[-1]
        width = min(length, backend_for(out.device).rows) if isinstance(self.rule, ValueRule) else length
        mixed = out.new_empty(len(rows), 1, width)
        for lo in range(0, length, max(1, width)):
            block = mixed[..., : min(width, length - lo)]
            for mine, neighbours in zip(block, near, strict=True):
                mean_of([row[lo : lo + width] for row in rows], neighbours, mine[0])
            self.rule.decide(list(block), out[:, lo : lo + width], context, first_word + lo)
        return 0
