"""One bit for each coordinate and one scale: the scaled sign of error feedback."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from mpisign.bitmap import ops
from mpisign.bitmap.host import words_for
from mpisign.bitmap.ops import Flag
from mpisign.bitmap.tensors import blocks
from mpisign.codecs.codec import Codec
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

    def encode(self, values: torch.Tensor, message: torch.Tensor, context: StepContext, first_word: int) -> Flag:
        zeros = "positive" if context.policy.zeros == "positive" else "coin"
        norm: float | torch.Tensor = 0.0
        finite: Flag = True
        scratch = values.new_empty(0)
        for span in blocks(values.numel(), values.device):
            part, at = values[span], 1 + span.start // 32
            words = message[0, at : at + words_for(part.numel())]
            finite = finite & ops.pack(part, words, zeros=zeros, key=context.zeros_key, first_word=first_word + at)
            torch.abs(part, out=scratch.resize_(part.numel()))
            norm = norm + _sum(scratch)
        item = message[0, :1].view(torch.float32)
        item.copy_(torch.as_tensor(norm / max(values.numel(), 1)))
        scale = _scale_of(message)
        # It overflows where fp64 values are too large for fp32.
        return finite & (math.isfinite(scale) if isinstance(scale, float) else scale.isfinite())

    def add(self, message: torch.Tensor, out: torch.Tensor, alpha: float) -> None:
        add_signs(message[0, 1:], out, _scale_of(message) * alpha)

    def decode(self, decision: torch.Tensor, out: torch.Tensor) -> None:
        scale, words = _scale_of(decision), decision[0, 1:]
        for span in blocks(out.numel(), out.device):
            part = out[span]
            ops.unpack(words[span.start // 32 :][: words_for(part.numel())], part)
            part.mul_(scale)


def _sum(magnitudes: torch.Tensor) -> float | torch.Tensor:
    """The sum of (n,), of which no fp32 value is too large; torch's own L1 norm is several times slower."""
    if magnitudes.is_cuda:
        return magnitudes.sum(dtype=torch.float64)
    quick = magnitudes.sum().item()
    return quick if math.isfinite(quick) else magnitudes.sum(dtype=torch.float64).item()


def _scale_of(message: torch.Tensor) -> float | torch.Tensor:
    """The scale that item 0 holds; on a GPU a 0-d fp64 tensor, so that nobody waits."""
    item = message[0, :1].view(torch.float32)
    return item[0].double() if item.is_cuda else item.item()
