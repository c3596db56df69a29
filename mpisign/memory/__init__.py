"""What a worker remembers between steps, in front of the codec. One idea a file."""

from __future__ import annotations

from mpisign.memory.dgc import DGC
from mpisign.memory.ef21 import EF21, ef21_step_size
from mpisign.memory.error_feedback import ErrorFeedback
from mpisign.memory.identity import Identity
from mpisign.memory.lion import LionMomentum
from mpisign.memory.memory import Memory
from mpisign.memory.momentum import Momentum
from mpisign.memory.noise import (
    ClippedNoise,
    GaussianNoise,
    SparseSign,
    StochasticSign,
    TernarySign,
    gaussian_mechanism,
)
from mpisign.memory.one_bit_adam import OneBitAdam

__all__ = [
    "DGC",
    "EF21",
    "ClippedNoise",
    "ErrorFeedback",
    "GaussianNoise",
    "Identity",
    "LionMomentum",
    "Memory",
    "Momentum",
    "OneBitAdam",
    "SparseSign",
    "StochasticSign",
    "TernarySign",
    "ef21_step_size",
    "gaussian_mechanism",
]
