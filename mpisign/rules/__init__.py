"""How the messages of the ranks that vote become one decision. One rule a file.

A rule is any object of this shape:

- ``name``.
- ``shardable``: whether it can decide a slice of the coordinates from that slice alone (vote, mean, median),
  as the two-phase exchange needs, or must see whole vectors (Krum).
- ``votes``: whether messages are ballots of signs, so that ties and agreement mean something.
- ``decide(messages, out, turn, first_word) -> int``: turn V >= 1 messages, each (planes_up, k), into ``out``
  (planes_down, k) and return the number of ties. The result must not depend on how coordinates were sliced.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy.typing as npt

from mpisign.policy import Turn
from mpisign.rules.mean import Mean
from mpisign.rules.vote import MajorityVote

__all__ = ["MajorityVote", "Mean", "Rule"]


class Rule(Protocol):
    """The shape of a rule; see the package's docstring."""

    @property
    def name(self) -> str: ...
    @property
    def shardable(self) -> bool: ...
    @property
    def votes(self) -> bool: ...
    def decide(
        self, messages: Sequence[npt.NDArray[Any]], out: npt.NDArray[Any], turn: Turn, first_word: int
    ) -> int: ...
