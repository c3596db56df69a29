"""One bit for each coordinate: its sign. A second plane where zeros abstain."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mpisign.bitmap import ops
from mpisign.bitmap.host import words_for
from mpisign.bitmap.ops import Flag
from mpisign.bitmap.tensors import blocks
from mpisign.codecs.codec import Codec
from mpisign.policy import Policy, StepContext

__all__ = ["SignBits", "add_signs"]


@dataclass(frozen=True)
class SignBits(Codec):
    """Signs as uint32 words, 32 coordinates a word (the wire format of ``bitmap.host``).

    Row 0 holds the signs. Row 1, "does it speak at all", goes up if ``zeros="abstain"``, and comes down if a
    decision can be "do not move": then, and if ``ties="zero"``.
    """

    name = "sign_bits"
    elementwise = True
    ballots = True

    def length(self, elements: int) -> int:
        return words_for(elements)

    def zeros(self, policy: Policy) -> str:
        """What an exact zero votes."""
        return policy.zeros

    def planes_up(self, policy: Policy) -> int:
        return 2 if self.zeros(policy) == "abstain" else 1

    def planes_down(self, policy: Policy) -> int:
        return 2 if self.zeros(policy) == "abstain" or policy.ties == "zero" else 1

    def encode(self, values: torch.Tensor, message: torch.Tensor, context: StepContext, first_word: int) -> Flag:
        return ops.pack(
            values,
            message[0],
            zeros=self.zeros(context.policy),
            key=context.zeros_key,
            first_word=first_word,
            nonzero=message[1] if len(message) > 1 else None,
        )

    def add(self, message: torch.Tensor, out: torch.Tensor, alpha: float) -> None:
        add_signs(message[0], out, alpha, message[1] if len(message) > 1 else None)

    def decode(self, decision: torch.Tensor, out: torch.Tensor) -> None:
        ops.unpack(decision[0], out, nonzero=decision[1] if len(decision) > 1 else None)


def add_signs(
    words: torch.Tensor, out: torch.Tensor, scale: float | torch.Tensor, nonzero: torch.Tensor | None = None
) -> None:
    """``out += scale * signs`` for flat ``out`` (n,); ``scale`` may be a 0-d tensor on its device."""
    if isinstance(scale, torch.Tensor):
        scale = scale.to(out.dtype)
    signs = torch.empty(0, dtype=out.dtype, device=out.device)
    for span in blocks(out.numel(), out.device):
        part = out[span]
        mine = signs.resize_(part.numel())
        bits = slice(span.start // 32, span.start // 32 + words_for(part.numel()))
        ops.unpack(words[bits], mine, nonzero=None if nonzero is None else nonzero[bits])
        if isinstance(scale, torch.Tensor):
            part.addcmul_(mine, scale)
        else:
            part.add_(mine, alpha=scale)
