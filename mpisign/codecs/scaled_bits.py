"""One bit for each coordinate and one scale: the scaled sign of error feedback."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mpisign.bitmap import ops
from mpisign.bitmap.host import words_for
from mpisign.bitmap.ops import Flag
from mpisign.codecs.codec import Codec
from mpisign.codecs.sign_bits import add_signs
from mpisign.policy import Turn

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

    def encode(self, values: torch.Tensor, message: torch.Tensor, turn: Turn, first_word: int) -> Flag:
        scale = _scale_of(message)
        scale.copy_(torch.linalg.vector_norm(values, 1) / max(values.numel(), 1))
        zeros = "positive" if turn.policy.zeros == "positive" else "coin"
        finite = ops.pack(values, message[0, 1:], zeros=zeros, key=turn.zeros_key, first_word=first_word + 1)
        return finite & torch.isfinite(scale)  # a norm may overflow where no value does

    def add(self, message: torch.Tensor, out: torch.Tensor, alpha: float) -> None:
        scale = _scale_of(message).to(out.dtype)
        add_signs(message[0, 1:], out, scale * alpha)


def _scale_of(message: torch.Tensor) -> torch.Tensor:
    """The scale: a 0-d fp32 view of item 0."""
    return message[0, :1].view(torch.float32)[0]
