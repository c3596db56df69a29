"""Two bits for each coordinate: +1, -1, or nothing."""

from __future__ import annotations

from dataclasses import dataclass

from mpisign.codecs.sign_bits import SignBits
from mpisign.policy import Policy

__all__ = ["Trits"]


@dataclass(frozen=True)
class Trits(SignBits):
    """Signs, and a plane that says where the value is not zero, whatever the policy on zeros."""

    name = "trits"

    def zeros(self, policy: Policy) -> str:
        return "abstain"
