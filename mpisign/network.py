"""What the ranks have found out together of the ways between them: the same on all."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

from mpisign.cost import Links

__all__ = ["Network"]


@dataclass
class Network:
    """Of one group's nodes.

    Attributes:
        shares: the ranks of each node can share memory, as far as is known.
        asked: the ranks have looked how quick their links are, or have been told not to.
        links: what they have found; None for nothing.
        sharing: by optimizer, who has the buffers of its plan, whose exchanges have a part of the node's memory.
    """

    shares: bool = True
    asked: bool = False
    links: Links | None = None
    sharing: WeakValueDictionary[int, Any] = field(default_factory=WeakValueDictionary, repr=False, compare=False)
