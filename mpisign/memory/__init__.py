"""What a worker remembers between steps, in front of the codec. One idea a file."""

from __future__ import annotations

from mpisign.memory.lion import LionMomentum
from mpisign.memory.memory import Memory
from mpisign.memory.momentum import Momentum
from mpisign.memory.nothing import Nothing

__all__ = ["LionMomentum", "Memory", "Momentum", "Nothing"]
