"""The largest coordinates and where they are."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mpisign.bitmap import ops
from mpisign.bitmap.ops import Flag
from mpisign.codecs.codec import Codec
from mpisign.errors import OptionError
from mpisign.policy import Turn

__all__ = ["TopK"]


@dataclass(frozen=True)
class TopK(Codec):
    """The ``k = max(1, round(ratio n))`` entries of largest magnitude: k indices, then k fp32 values, 64 bits each.

    fp64 values travel as fp32.

    Args:
        ratio: share of each parameter's coordinates that is sent, in (0, 1].

    Raises:
        OptionError: ``ratio`` is out of range.
    """

    ratio: float = 0.01
    name = "top_k"

    def __post_init__(self) -> None:
        if not (isinstance(self.ratio, (int, float)) and 0.0 < self.ratio <= 1.0):
            raise OptionError(f"ratio={self.ratio!r} must be in (0, 1], e.g. ratio=0.001 for one coordinate in 1000")

    def count(self, elements: int) -> int:
        """How many coordinates of ``elements`` are sent."""
        return min(elements, max(1, round(self.ratio * elements)))

    def length(self, elements: int) -> int:
        return 2 * self.count(elements)

    def encode(self, values: torch.Tensor, message: torch.Tensor, turn: Turn, first_word: int) -> Flag:
        chosen = self.select(values, self.count(values.numel()))
        indices, sent = _parts(message)
        indices.copy_(chosen)
        sent.copy_(values[chosen])
        return ops.all_finite(sent)

    def select(self, values: torch.Tensor, count: int) -> torch.Tensor:
        """The indices (count,) int64 of what is sent."""
        return values.abs().topk(count, sorted=False).indices

    def add(self, message: torch.Tensor, out: torch.Tensor, alpha: float) -> None:
        indices, values = _parts(message)
        out.index_add_(0, indices, values.to(out.dtype), alpha=alpha)

    def indices(self, message: torch.Tensor) -> torch.Tensor:
        """Where a message has values: (k,) int32."""
        return _parts(message)[0]


def _parts(message: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of a message: indices (k,) int32, values (k,) fp32."""
    half = message.shape[1] // 2
    return message[0, :half], message[0, half:].view(torch.float32)
