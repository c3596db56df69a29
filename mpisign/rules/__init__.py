"""How the messages of the ranks that vote become one decision. One family of rules a file."""

from __future__ import annotations

from mpisign.rules.coordinatewise import Median, TrimmedMean
from mpisign.rules.distance import (
    CenteredClipping,
    GeometricMedian,
    GradientElimination,
    Krum,
    MultiKrum,
    NearestNeighbourAveraging,
)
from mpisign.rules.mean import Mean, MeanOfSigns, RecodedMean
from mpisign.rules.mixing import NearestNeighbourMixing
from mpisign.rules.rule import BallotRule, PieceRule, Rule, TallyRule, ValueRule, VectorRule
from mpisign.rules.scaled_vote import ScaledVote
from mpisign.rules.vote import MajorityVote
from mpisign.rules.weighted_vote import WeightedVote

__all__ = [
    "BallotRule",
    "CenteredClipping",
    "GeometricMedian",
    "GradientElimination",
    "Krum",
    "MajorityVote",
    "Mean",
    "MeanOfSigns",
    "Median",
    "MultiKrum",
    "NearestNeighbourAveraging",
    "NearestNeighbourMixing",
    "PieceRule",
    "RecodedMean",
    "Rule",
    "ScaledVote",
    "TallyRule",
    "TrimmedMean",
    "ValueRule",
    "VectorRule",
    "WeightedVote",
]
