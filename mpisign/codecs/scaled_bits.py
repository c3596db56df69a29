"""One bit for each coordinate and one scale: the scaled sign of error feedback."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from mpisign.backends import Backend, Flag, backend_for
from mpisign.bitmap.host import words_for
from mpisign.codecs.codec import Codec, Planes
from mpisign.codecs.sign_bits import add_signs
from mpisign.policy import StepContext

__all__ = ["ScaledBits"]


@dataclass(frozen=True)
class ScaledBits(Codec):
    """``C(p) = (||p||_1 / n) sign(p)``: item 0 is the scale, an fp32 number; the signs follow as words.

    The L1 scale makes it a contraction for every p, ``||C(p) - p||^2 = (1 - delta) ||p||^2`` with
    ``delta = ||p||_1^2 / (n ||p||_2^2)``, which the L2 scale of other codes does not. One scale a parameter.
    Exact zeros get a coin as sign (or the policy's ``"positive"``).

    Source: Karimireddy et al., "Error Feedback Fixes SignSGD and other Gradient Compression Schemes", 2019,
    Algorithm 1.
    """

    name = "scaled_bits"

    def length(self, elements: int) -> int:
        return 1 + words_for(elements)

    def encode(self, values: torch.Tensor, message: Planes, context: StepContext, first_word: int) -> Flag:
        zeros = "positive" if context.policy.zeros == "positive" else "coin"
        backend = backend_for(values.device)
        norm: float | torch.Tensor = 0.0
        finite: Flag = True
        scratch = values.new_empty(0)
        for span in backend.blocks(values.numel()):
            part, at = values[span], 1 + span.start // 32
            words = message[0][at : at + words_for(part.numel())]
            finite = finite & backend.pack(part, words, zeros=zeros, key=context.zeros_key, first_word=first_word + at)
            torch.abs(part, out=scratch.resize_(part.numel()))
            norm = norm + backend.total(scratch)
        item = message[0][:1].view(torch.float32)
        scale = norm / max(values.numel(), 1)
        item.copy_(torch.as_tensor(scale, dtype=torch.float64, device=values.device))
        written = _scale_of(message, backend)
        # It overflows where fp64 values are too large for fp32.
        return finite & (math.isfinite(written) if isinstance(written, float) else written.isfinite())

    def add(self, message: torch.Tensor, out: torch.Tensor, alpha: float) -> None:
        add_signs(message[0, 1:], out, _scale_of(message, backend_for(out.device)) * alpha)

    def decode(self, decision: torch.Tensor, out: torch.Tensor, context: StepContext | None = None) -> None:
        backend = backend_for(out.device)
        scale, words = _scale_of(decision, backend), decision[0, 1:]
        for span in backend.blocks(out.numel()):
            part = out[span]
            backend.unpack(words[span.start // 32 :][: words_for(part.numel())], part)
            part.mul_(scale)


def _scale_of(message: Planes, backend: Backend) -> float | torch.Tensor:
    """The scale that item 0 holds."""
    return backend.number(message[0][:1].view(torch.float32)[0])
