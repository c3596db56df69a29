"""One bit for each coordinate: its sign. A second plane where zeros abstain."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mpisign.backends import Flag, backend_for
from mpisign.bitmap.host import words_for
from mpisign.codecs.codec import Codec, Planes
from mpisign.policy import Policy, StepContext

__all__ = ["SignBits", "add_signs"]


@dataclass(frozen=True)
class SignBits(Codec):
    """Signs as uint32 words, 32 coordinates a word (the wire format of ``bitmap.host``).

    Row 0 holds the signs. Row 1, "does it speak at all", goes up if ``zeros="abstain"``.
    """

    name = "sign_bits"
    elementwise = True
    ballots = True

    def length(self, elements: int) -> int:
        return words_for(elements)

    def zeros(self, policy: Policy) -> str:
        """What an exact zero votes."""
        return policy.zeros

    def planes(self, policy: Policy) -> int:
        return 2 if self.zeros(policy) == "abstain" else 1

    def encode(self, values: torch.Tensor, message: Planes, context: StepContext, first_word: int) -> Flag:
        """Row 1 of ``message``, where there is one, says which values are not zero; also if only row 0 is sent."""
        return backend_for(values.device).pack(
            values,
            message[0],
            zeros=self.zeros(context.policy),
            key=context.zeros_key,
            first_word=first_word,
            nonzero=message[1] if len(message) > 1 else None,
        )

    def add(self, message: torch.Tensor, out: torch.Tensor, alpha: float) -> None:
        add_signs(message[0], out, alpha, message[1] if len(message) > 1 else None)

    def decode(self, decision: torch.Tensor, out: torch.Tensor, context: StepContext | None = None) -> None:
        backend_for(out.device).unpack(decision[0], out, nonzero=decision[1] if len(decision) > 1 else None)


def add_signs(
    words: torch.Tensor, out: torch.Tensor, scale: float | torch.Tensor, nonzero: torch.Tensor | None = None
) -> None:
    """``out += scale * signs`` for flat ``out`` (n,); ``scale`` may be a 0-d tensor on its device."""
    if isinstance(scale, torch.Tensor):
        scale = scale.to(out.dtype)
    signs = torch.empty(0, dtype=out.dtype, device=out.device)
    backend = backend_for(out.device)
    for span in backend.blocks(out.numel()):
        part = out[span]
        mine = signs.resize_(part.numel())
        bits = slice(span.start // 32, span.start // 32 + words_for(part.numel()))
        backend.unpack(words[bits], mine, nonzero=None if nonzero is None else nonzero[bits])
        if isinstance(scale, torch.Tensor):
            part.addcmul_(mine, scale)
        else:
            part.add_(mine, alpha=scale)
