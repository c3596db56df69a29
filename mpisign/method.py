"""What a method is: a memory in front, a codec on the wire, a rule that decides."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

from mpisign.codecs import Codec
from mpisign.errors import OptionError
from mpisign.memory import Memory
from mpisign.policy import use_plain_numbers
from mpisign.rules import BallotRule, Rule, ValueRule, VectorRule

__all__ = ["Method"]


@dataclass(frozen=True)
class Method:
    """A way to turn M local gradients into one update.

    Args:
        memory: what a worker keeps in front of the codec.
        codec: what one message holds.
        rule: how M messages become one.
        name: for reports and errors.
        by_step, by_epoch: (start, method) in order: from that exchange, or that epoch on (see
            :meth:`mpisign.DistributedSignOptimizer.set_epoch`), it is that method. The fields of their memories must
            be the same.

    The ``repr`` of the three tells ranks whether they run the same method: make them dataclasses.

    Raises:
        OptionError: a ``repr`` has a memory address in it, which differs from rank to rank.
    """

    memory: Memory
    codec: Codec
    rule: Rule
    name: str = "custom"
    by_step: tuple[tuple[int, Method], ...] = field(default=(), repr=False)
    by_epoch: tuple[tuple[int, Method], ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        for part, kind in ((self.memory, Memory), (self.codec, Codec), (self.rule, Rule)):
            if not isinstance(part, kind):
                raise OptionError(
                    f"{part!r} of method {self.name!r} is no {kind.__name__}: make {kind!r} its base class"
                )
            use_plain_numbers(part)
            if " at 0x" in repr(part):
                raise OptionError(
                    f"{part!r} of method {self.name!r} is told from others by its address, so ranks cannot see that "
                    f"they run the same: make {type(part).__name__} a dataclass, or give it a __repr__"
                )

        if not isinstance(self.rule, (BallotRule, ValueRule, VectorRule)):
            raise OptionError(
                f"{self.rule!r} of method {self.name!r} is of no kind: make BallotRule, ValueRule or VectorRule its "
                f"base class, for what it decides on"
            )

        if isinstance(self.rule, BallotRule) and not self.codec.ballots:
            raise OptionError(
                f"the rule {self.rule.name!r} counts votes, and {self.codec.name!r} messages are none: use SignBits() "
                f"or Trits(), or another rule"
            )

        if isinstance(self.rule, VectorRule) and not self.codec.plain:
            raise OptionError(
                f"the rule {self.rule.name!r} compares whole vectors, and {self.codec.name!r} messages are in pieces: "
                f"use Dense()"
            )

        if self.exchanges_models and self.memory.needs_maximum:
            raise OptionError(f"{self.memory!r} needs the ranks' gradients, and {self.rule.name!r} exchanges models")

    @property
    def exchanges_models(self) -> bool:
        """Whether parameters cross the wire instead of gradients, so that replicas differ."""
        return isinstance(self.rule, VectorRule) and self.rule.personal

    @property
    def elects(self) -> bool:
        """Whether ballots are cast, and one side wins, so that ties and agreement mean something."""
        return isinstance(self.rule, BallotRule) and self.rule.elects

    @property
    def phases(self) -> list[Method]:
        """Itself, and what it becomes as training goes on."""
        return [self, *(method for _, method in (*self.by_step, *self.by_epoch))]

    @property
    def needs_all(self) -> bool:
        """Whether no message can be made before all gradients are there, as something sees all or adds to them."""
        return self.memory.needs_all or self.memory.needs_maximum or self.exchanges_models

    def at(self, step: int, epoch: int) -> Method:
        """The method as it is at this exchange of this epoch: itself, unless it changes as training goes on."""
        reached = [method for start, method in self.by_step if start <= step]
        reached += [method for start, method in self.by_epoch if start <= epoch]
        return reached[-1] if reached else self

    def __str__(self) -> str:
        return self._text

    @functools.cached_property
    def _text(self) -> str:
        return f"{self.name} ({self.memory!r}, {self.codec!r}, {self.rule!r})"
