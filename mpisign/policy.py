"""The conventions every sign method needs and most implementations pick silently: zeros, ties, the seed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mpisign.bitmap.coin import TIES, coin_key, noise_stream, zeros_stream
from mpisign.errors import OptionError

__all__ = ["Policy", "StepContext", "check_choice", "check_positive"]

ZEROS = ("rows", "coin", "abstain", "positive")
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

    zeros: str = "rows"
    ties: str = "coin"
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("zeros", self.zeros, ZEROS)
        check_choice("ties", self.ties, TIE_RULES)
        if not isinstance(self.seed, (int, np.integer)) or isinstance(self.seed, bool):
            raise OptionError(f"seed={self.seed!r} must be an integer")
        object.__setattr__(self, "seed", int(self.seed))  # ranks compare the repr, and np.int64(3) has another

    def context(
        self, step: int, rank: int, size: int = 1, secret: str = "", identities: Sequence[int] | None = None
    ) -> StepContext:
        """This step on this rank of ``size``, with its coins; ``secret`` is mixed into its noise.

        Coins and noise are keyed by the rank's identity, which outlives a change of numbers; None: they are the ranks.
        """
        identities = tuple(range(max(size, rank + 1)) if identities is None else identities)
        identity = identities[rank]
        return StepContext(
            self,
            step,
            rank,
            size,
            zeros_key=coin_key(self.seed, step, zeros_stream(identity)),
            ties_key=coin_key(self.seed, step, TIES),
            secret=secret,
            identity=identity,
            identities=identities,
        )


@dataclass(frozen=True)
class StepContext:
    """One step on one rank: what memories, codecs and rules may depend on besides the values.

    Attributes:
        step: number of the exchange; ``rank`` of ``size``: who we are now; ``identity``: who we are for good.
        identities: the same of all ranks, or () if they are the ranks' numbers.
        zeros_key, ties_key: keys of the coins; the first is this rank's own, the second everybody's.
        secret: what only this rank knows, in hexadecimal, if its noise shall be private; else empty.
        voters: the ranks whose messages a rule is given, in their order.
        prepared: what the memory's ``prepare`` made of all gradients of this step, or None.
        previous: (1, k) what the rule decided on these items the time before, for rules that ``remember``.
        speakers: (n,) how many of the voters have voted on each coordinate, where some have abstained on rows; else
            None.
        tied: on a GPU a 0-d int64 to which a rule may add its ties, instead of returning them.
    """

    policy: Policy
    step: int
    rank: int
    size: int
    zeros_key: int
    ties_key: int
    secret: str = ""
    identity: int = 0
    identities: tuple[int, ...] = ()
    voters: tuple[int, ...] = ()
    prepared: Any = None
    previous: torch.Tensor | None = None
    speakers: torch.Tensor | None = None
    tied: torch.Tensor | None = None

    def identity_of(self, rank: int) -> int:
        """Who a rank is for good."""
        return self.identities[rank] if self.identities else rank

    def noise_key(self, first_word: int) -> int:
        """Key of this rank's own random numbers for the values that start at ``first_word``.

        64 bits; with a secret 128, from which neither it nor another key can be computed.
        """
        key = coin_key(coin_key(self.policy.seed, self.step, noise_stream(self.identity)), first_word, 0)
        if not self.secret:
            return key
        digest = hashlib.blake2b(key.to_bytes(8, "little"), key=bytes.fromhex(self.secret), digest_size=16)
        return int.from_bytes(digest.digest(), "little")

    def generator(self, first_word: int, device: torch.device) -> torch.Generator:
        """Random numbers for the values that start at ``first_word``: this rank's own, the same in every repetition.

        They depend on seed, secret, step, rank and place alone, so no generator has to be saved to resume exactly.
        """
        return torch.Generator(device).manual_seed(self.noise_key(first_word) % 2**63)
