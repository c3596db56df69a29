"""The conventions every sign method needs and most implementations pick silently: zeros, ties, the seed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mpisign.bitmap.coin import TIES, coin_key, zeros_stream
from mpisign.errors import OptionError

__all__ = ["Policy", "Turn", "check_choice", "check_positive"]

ZEROS = ("coin", "abstain", "positive")
TIE_RULES = ("coin", "zero", "positive")


def check_choice(option: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise :class:`OptionError`, listing what is possible, unless ``value`` is one of ``choices``."""
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise OptionError(f"{option}={value!r} is not known: choose one of {listed}")


def check_positive(option: str, value: object, alternative: str = "") -> None:
    """Raise :class:`OptionError` unless ``value`` is a number above zero; ``alternative`` says what else is allowed."""
    if not (isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0):
        raise OptionError(f"{option}={value!r} must be a positive number{alternative}")


@dataclass(frozen=True)
class Policy:
    """What an exact zero votes, who wins a tie, and the seed of the coins. The same on every rank."""

    zeros: str = "coin"
    ties: str = "coin"
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("zeros", self.zeros, ZEROS)
        check_choice("ties", self.ties, TIE_RULES)
        if not isinstance(self.seed, (int, np.integer)) or isinstance(self.seed, bool):
            raise OptionError(f"seed={self.seed!r} must be an integer")
        object.__setattr__(self, "seed", int(self.seed))  # ranks compare the repr, and np.int64(3) has another

    def turn(self, step: int, rank: int) -> Turn:
        """This step's coins on this rank."""
        return Turn(
            self,
            zeros_key=coin_key(self.seed, step, zeros_stream(rank)),
            ties_key=coin_key(self.seed, step, TIES),
        )


@dataclass(frozen=True)
class Turn:
    """A policy with the keys of one step's coins: ``zeros_key`` is this rank's own, ``ties_key`` everybody's."""

    policy: Policy
    zeros_key: int
    ties_key: int
