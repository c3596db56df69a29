"""What the ranks have found out together of the ways between them: the same on all."""

from __future__ import annotations

from dataclasses import dataclass

from mpisign.cost import Links

__all__ = ["Network"]


@dataclass
class Network:
    """Of one group's nodes.

    Attributes:
        shares: the ranks of each node can share memory, as far as is known.
        asked: the ranks have looked how quick their links are, or have been told not to.
        links: what they have found; None for nothing.
    """

    shares: bool = True
    asked: bool = False
    links: Links | None = None
