"""What the ranks have found out together of the ways between them: the same on all."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Network"]


@dataclass
class Network:
    """Of one group's nodes.

    Attributes:
        shares: the ranks of each node can share memory, as far as is known.
    """

    shares: bool = True
