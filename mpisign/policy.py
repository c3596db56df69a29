"""The conventions every sign method needs and most implementations pick silently: zeros, ties, the seed."""

from __future__ import annotations

import dataclasses
import hashlib
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, get_args

import numpy as np
import torch

from mpisign.bitmap.coin import TIES, coin_key, noise_stream, zeros_stream
from mpisign.errors import OptionError

__all__ = [
    "Policy",
    "StepContext",
    "Ties",
    "Zeros",
    "check_choice",
    "check_integer",
    "check_positive",
    "use_plain_numbers",
]

Zeros = Literal["rows", "coin", "abstain", "positive"]
Ties = Literal["coin", "zero", "positive"]

ZEROS: tuple[Zeros, ...] = get_args(Zeros)
TIE_RULES: tuple[Ties, ...] = get_args(Ties)


def check_choice(option: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise :class:`OptionError`, listing what is possible, unless ``value`` is one of ``choices``."""
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise OptionError(f"{option}={value!r} is not known: choose one of {listed}")


def check_positive(option: str, value: object, alternative: str = "") -> float:
    """A number above zero, Python's or NumPy's, as Python's.

    Raises:
        OptionError: it is something else; ``alternative`` says what else is allowed.
    """
    number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else 0.0
    if not number > 0.0:
        raise OptionError(f"{option}={value!r} must be a positive number{alternative}")
    return number


def check_integer(option: str, value: object, least: int | None = None) -> int:
    """An integer of at least ``least``, Python's, NumPy's or torch's, as Python's. Raises :class:`OptionError`."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None or (least is not None and number < least):
        raise OptionError(f"{option}={value!r} must be an int" + ("" if least is None else f" of {least} or more"))
    return number


def use_plain_numbers(part: object) -> None:
    """Make NumPy's and torch's numbers in a dataclass Python's, as ranks compare the ``repr``."""
    for field in dataclasses.fields(part) if dataclasses.is_dataclass(part) else ():
        value = getattr(part, field.name, None)
        if isinstance(value, (np.generic, np.ndarray, torch.Tensor)) and not value.shape:
            object.__setattr__(part, field.name, value.item())
        else:
            use_plain_numbers(value)


@dataclass(frozen=True)
class Policy:
    """What an exact zero votes, who wins a tie, and the seed of the coins. The same on every rank."""

    zeros: Zeros = "rows"
    ties: Ties = "coin"
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("zeros", self.zeros, ZEROS)
        check_choice("ties", self.ties, TIE_RULES)
        object.__setattr__(self, "seed", check_integer("seed", self.seed))  # ranks compare the repr

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
