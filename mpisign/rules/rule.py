"""The shape of a rule, to be subclassed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from mpisign.bitmap.ops import Count
from mpisign.codecs import Codec
from mpisign.policy import Policy, StepContext

__all__ = ["Rule"]


class Rule(ABC):
    """How the messages of the ranks that vote become one decision. Make it a frozen dataclass.

    Attributes:
        name: for errors.
        shardable: whether it can decide a slice of the coordinates from that slice alone (vote, mean, median),
            as the two-phase exchange needs, or must see whole vectors (Krum).
        votes: messages are ballots of signs, and ties and agreement mean something.
        tallies: messages are ballots, and a decision is how many there are, bit by bit: see :meth:`planes_down`,
            :meth:`decode`.
        reencodes: the decision goes down in the codec again, with an error feedback of its own.
        remembers: :meth:`decide` is given its previous decision as ``context.previous``.
        personal: each rank decides for itself, so replicas differ.
    """

    name = "rule"
    shardable = True
    votes = False
    tallies = False
    reencodes = False
    remembers = False
    personal = False

    def check(self, size: int) -> None:  # noqa: B027 - most rules work with any number
        """Raise :class:`mpisign.OptionError` if it cannot work with ``size`` ranks, saying what would."""

    def check_left(self, identities: Sequence[int]) -> None:
        """The same for the ranks that there are after some have come or gone, by their identities."""
        self.check(len(identities))

    @abstractmethod
    def decide(
        self, messages: Sequence[torch.Tensor], out: torch.Tensor, context: StepContext, first_word: int
    ) -> Count:
        """Turn V >= 1 messages, each (planes_up, k), into ``out`` (planes_down, k). Returns the number of ties.

        The same messages must give the same bits on every rank, however a shardable rule's items are sliced.

        Args:
            messages: of the ranks ``context.voters``, in that order, on the parameter's device.
            first_word: number of the first item in the layout, the position of the ties' coin.
        """

    def planes_down(self, codec: Codec, policy: Policy, size: int) -> int:
        """Rows of a decision among ``size`` ranks."""
        return codec.planes_down(policy)

    def decode(self, decision: torch.Tensor, out: torch.Tensor, codec: Codec, context: StepContext) -> None:
        """Write a decision (planes_down, k) on messages of ``codec`` into flat fp32 or fp64 ``out`` (n,).

        Args:
            context: its ``voters`` are the ranks that voted.
        """
        codec.decode(decision, out)

    def weights(self, context: StepContext) -> Sequence[float] | None:
        """The V weights of a rule that is a weighted sum, whatever the messages; None for all others.

        With them, messages that are not plain values are added up one after the other, never side by side.
        """
        return None
