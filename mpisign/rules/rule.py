"""The three kinds of rules, to be subclassed: on ballots, on values, on vectors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from mpisign.backends import Count, backend_for
from mpisign.policy import Policy, StepContext

if TYPE_CHECKING:
    from mpisign.codecs import Codec

__all__ = ["BallotRule", "PieceRule", "Rule", "TallyRule", "ValueRule", "VectorRule"]


class Rule(ABC):
    """How the messages of the ranks that vote become one decision. Make it a frozen dataclass.

    Subclass one of the three kinds: :class:`BallotRule`, :class:`ValueRule`, :class:`VectorRule`.

    Attributes:
        name: for errors.
    """

    name = "rule"

    def check(self, size: int) -> None:  # noqa: B027 - most rules work with any number
        """Raise :class:`mpisign.OptionError` if it cannot work with ``size`` ranks, saying what would."""

    def check_left(self, identities: Sequence[int]) -> None:
        """The same for the ranks that there are after some have come or gone, by their identities."""
        self.check(len(identities))

    @abstractmethod
    def decide(
        self, messages: Sequence[torch.Tensor], out: torch.Tensor, context: StepContext, first_word: int
    ) -> Count:
        """Turn V >= 1 messages, each (planes, k), into ``out`` (planes of ``down``, k). Returns the number of ties.

        The same messages must give the same bits on every rank, however the items of a rule on ballots or values are
        sliced.

        Args:
            messages: of the ranks ``context.voters``, in that order, on the parameter's device.
            first_word: number of the first item in the layout, the position of the ties' coin.
        """

    def down(self, codec: Codec, policy: Policy, size: int) -> Codec | None:
        """The codec in which the decision on messages of ``codec`` comes down among ``size`` ranks.

        None: it comes down in none, so that every rank has to decide for itself, from all messages.
        """
        return codec


class BallotRule(Rule):
    """Counts ballots of signs. Any slice of the words can be decided by itself.

    Attributes:
        elects: one side wins, so that ties and agreement mean something.
    """

    elects = True

    def decide_spoken(
        self,
        messages: Sequence[torch.Tensor],
        spoken: Sequence[torch.Tensor],
        out: torch.Tensor,
        moved: torch.Tensor,
        context: StepContext,
        first_word: int,
    ) -> Count:
        """The same where ranks abstain on some coordinates of what they vote on.

        Args:
            spoken: a bitmap (k,) for each message, 1 where its rank votes; its ballot is 0 elsewhere.
            moved: (k,) scratch; ``out[1]`` where a decision can be "do not move", and may say so.
        """
        pairs = [torch.stack([message[0], its]) for message, its in zip(messages, spoken, strict=True)]
        decided = torch.stack([out[0], moved])
        ties = self.decide(pairs, decided, context, first_word)
        out[0].copy_(decided[0])
        moved.copy_(decided[1])
        return ties


class TallyRule(BallotRule):
    """Needs to know only how many have voted what: some ballots are counted here, others there, and the tallies added.

    A tally of ballots is C counts side by side, (C, p, k) words: plane i of a count has bit i of it, everywhere.
    However the ballots are divided, ``settle(merge(tally(some), tally(others)))`` gives the bits of ``decide(all)``.
    """

    @abstractmethod
    def tally_shape(self, planes: int, voters: int) -> tuple[int, int]:
        """(C, p) of what holds a tally of ``voters`` messages of so many ``planes``."""

    @abstractmethod
    def tally(self, messages: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        """Count V >= 1 messages, each (planes, k), into ``out`` (C, p, k); p as :meth:`tally_shape` says or more."""

    def merge(self, tallies: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        """Add tallies, each (C, p, k), into ``out`` (C, q, k), with q >= p enough for all voters."""
        backend = backend_for(out.device)
        for counts, total in zip(zip(*tallies, strict=True), out, strict=True):
            backend.add_counts(counts, total)

    @abstractmethod
    def settle(
        self,
        tally: torch.Tensor,
        out: torch.Tensor,
        context: StepContext,
        first_word: int,
        voted: torch.Tensor | None = None,
    ) -> Count:
        """What :meth:`Rule.decide` would, of the messages of ``context.voters``, from their tally (C, p, k).

        Args:
            out, first_word: as for :meth:`Rule.decide`.
            voted: (q, k), how many ranks have voted, bit-sliced, where messages of one plane do not say it and it is
                not all voters everywhere. Ballots were 0 where their ranks did not vote, and ``out`` has a second row,
                as for messages of two planes.

        Returns:
            The number of ties.
        """


class ValueRule(Rule):
    """Works on numbers. Any slice of the coordinates can be decided by itself."""

    def down(self, codec: Codec, policy: Policy, size: int) -> Codec | None:
        return codec if codec.plain else None

    def weights(self, context: StepContext) -> Sequence[float] | None:
        """The V weights of a rule that is a weighted sum, whatever the messages; None for all others.

        With them, messages that are not plain values are added up one after the other, never side by side.
        """
        return None


class PieceRule(ValueRule):
    """Decides parameters, or pieces of them, one by one, and sends them down in the form of a message.

    For messages whose items mean something only together. Where shards are decided, parameters are cut at their ends.

    Attributes:
        keeps: whoever decides keeps a number for each element.
    """

    keeps = False

    def down(self, codec: Codec, policy: Policy, size: int) -> Codec:
        return codec

    def decide(
        self, messages: Sequence[torch.Tensor], out: torch.Tensor, context: StepContext, first_word: int
    ) -> Count:
        raise NotImplementedError("it decides pieces: see recode()")

    @abstractmethod
    def recode(
        self,
        messages: Sequence[torch.Tensor],
        kept: torch.Tensor,
        out: torch.Tensor,
        codec: Codec,
        context: StepContext,
        first_word: int,
    ) -> None:
        """Decide one piece of a parameter: messages (planes, k) of ``codec`` into ``out`` (planes of ``down``, k).

        Args:
            kept: what is kept of it, changed in place: (n,), in a memory's precision; (0,) if the rule keeps nothing.
            codec: of this piece.
            first_word: number of its first 32 elements, the position of the ties' coin.
        """


class VectorRule(Rule):
    """Must see whole vectors, and their distances. It is given one slice that is everything.

    Attributes:
        remembers: :meth:`Rule.decide` is given its previous decision as ``context.previous``.
        personal: each rank decides for itself on what the ranks' parameters become, so replicas differ.
    """

    remembers = False
    personal = False
