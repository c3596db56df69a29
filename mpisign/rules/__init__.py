"""How the messages of the ranks that vote become one decision. One rule a file."""

from __future__ import annotations

from mpisign.rules.mean import Mean
from mpisign.rules.rule import Rule
from mpisign.rules.vote import MajorityVote

__all__ = ["MajorityVote", "Mean", "Rule"]
