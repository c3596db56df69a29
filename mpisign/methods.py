"""The literature, one method a line: a memory in front, a codec on the wire, a rule that decides.

``Method(memory, codec, rule)`` is all there is to a method; a new one is a new line here, or in your own code.
"""

from __future__ import annotations

from dataclasses import dataclass

from mpisign.codecs import Codec, Dense, SignBits
from mpisign.errors import OptionError
from mpisign.memory import LionMomentum, Memory, Momentum, Nothing
from mpisign.rules import MajorityVote, Mean, Rule

__all__ = ["Method", "lion", "mean", "signsgd", "signum"]


@dataclass(frozen=True)
class Method:
    """A way to turn M local gradients into one update.

    Args:
        memory: what a worker keeps in front of the codec.
        codec: what one message holds.
        rule: how M messages become one.
        name: for reports and errors.

    The ``repr`` of the three tells ranks whether they run the same method: make them dataclasses.

    Raises:
        OptionError: a ``repr`` has a memory address in it, which differs from rank to rank.
    """

    memory: Memory
    codec: Codec
    rule: Rule
    name: str = "custom"

    def __post_init__(self) -> None:
        for part, kind in ((self.memory, Memory), (self.codec, Codec), (self.rule, Rule)):
            if not isinstance(part, kind):
                raise OptionError(
                    f"{part!r} of method {self.name!r} is no {kind.__name__}: make {kind!r} its base class"
                )
            if " at 0x" in repr(part):
                raise OptionError(
                    f"{part!r} of method {self.name!r} is told from others by its address, so ranks cannot see that "
                    f"they run the same: make {type(part).__name__} a dataclass, or give it a __repr__"
                )

        if self.rule.votes and not self.codec.ballots:
            raise OptionError(
                f"the rule {self.rule.name!r} counts votes, and {self.codec.name!r} messages are none: use SignBits() "
                f"or Trits(), or another rule"
            )

        if not (self.rule.shardable or self.codec.plain):
            raise OptionError(
                f"the rule {self.rule.name!r} compares whole vectors, and {self.codec.name!r} messages are in pieces: "
                f"use Dense()"
            )

    @property
    def exchanges_models(self) -> bool:
        """Whether parameters cross the wire instead of gradients, so that replicas differ."""
        return self.rule.personal

    @property
    def by_value(self) -> bool:
        """Whether messages must be decoded before the rule can work on them."""
        return not (self.rule.votes or self.rule.reencodes or self.codec.plain)

    def at(self, step: int, epoch: int) -> Method:
        """The method as it is at this exchange of this epoch: itself, unless it changes as training goes on."""
        return self

    def __str__(self) -> str:
        return f"{self.name} ({self.memory!r}, {self.codec!r}, {self.rule!r})"


def signsgd() -> Method:
    """signSGD with majority vote: each rank votes with the sign of its gradient.

    Bernstein et al., "signSGD with Majority Vote is Communication Efficient and Fault Tolerant", 2018, Alg. 1.
    """
    return Method(Nothing(), SignBits(), MajorityVote(), "signsgd")


def signum(momentum: float = 0.9) -> Method:
    """Signum with majority vote: each rank votes with the sign of ``v <- momentum v + (1 - momentum) g``.

    The same paper, Algorithm 1 with beta > 0. The momentum lives on each worker, before the sign.
    """
    return Method(Momentum(momentum), SignBits(), MajorityVote(), "signum")


def lion(beta1: float = 0.9, beta2: float = 0.99) -> Method:
    """Distributed Lion with majority vote: sign of ``beta1 m + (1 - beta1) g``; m decays by ``beta2``.

    Liu et al., "Communication Efficient Distributed Training with Distributed Lion", 2024, Algorithm 1, MaVo.
    """
    return Method(LionMomentum(beta1, beta2), SignBits(), MajorityVote(), "lion")


def mean() -> Method:
    """The full-precision baseline: the mean of the gradients in fp32, as any data-parallel training does."""
    return Method(Nothing(), Dense(), Mean(), "mean")
