"""One bit for each coordinate and one scale: the scaled sign of error feedback."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from mpisign.backends import WORD, Backend, Flag, backend_for
from mpisign.bitmap.host import words_for
from mpisign.codecs.codec import Codec, Planes
from mpisign.codecs.sign_bits import add_signs
from mpisign.policy import StepContext

__all__ = ["ScaledBits"]


@dataclass(frozen=True)
class ScaledBits(Codec):
    """``C(p) = (||p||_1 / n) sign(p)``: item 0 is the scale, an fp32 number; the signs follow as k words.

    The L1 scale makes it a contraction for every p, ``||C(p) - p||^2 = (1 - delta) ||p||^2`` with
    ``delta = ||p||_1^2 / (n ||p||_2^2)``, which the L2 scale of other codes does not. One scale a parameter.
    Exact zeros get a coin as sign (or the policy's ``"positive"``). But 32 of them that fill a word are sent as zeros,
    where the policy is ``"rows"`` or ``"abstain"``, so that rows without gradient stay where they are: ceil(k/32)
    further words have a 1 for each word that is not silent.

    Source: Karimireddy et al., "Error Feedback Fixes SignSGD and other Gradient Compression Schemes", 2019,
    Algorithm 1.
    """

    name = "scaled_bits"

    def length(self, elements: int) -> int:
        words = words_for(elements)
        return 1 + words + words_for(words)

    def encode(self, values: torch.Tensor, message: Planes, context: StepContext, first_word: int) -> Flag:
        silent = context.policy.zeros in ("rows", "abstain")
        zeros = "rows" if silent else context.policy.zeros
        backend = backend_for(values.device)
        signs, spoken = _parts(message, values.numel())
        norm: float | torch.Tensor = 0.0
        finite: Flag = True
        scratch, nonzero = values.new_empty(0), torch.full_like(signs, -1)
        for span in backend.blocks(values.numel()):
            part = values[span]
            here = slice(span.start // 32, span.start // 32 + words_for(part.numel()))
            key, at = context.zeros_key, first_word + 1 + here.start
            told = nonzero[here] if silent else None
            finite = finite & backend.pack(part, signs[here], zeros=zeros, key=key, first_word=at, nonzero=told)
            torch.abs(part, out=scratch.resize_(part.numel()))
            norm = norm + backend.total(scratch)
        backend.pack((nonzero != 0).float().sub_(0.5), spoken, zeros="positive")
        item = message[0][:1].view(torch.float32)
        scale = norm / max(values.numel(), 1)
        item.copy_(torch.as_tensor(scale, dtype=torch.float64, device=values.device))
        written = _scale_of(message, backend)
        # It overflows where fp64 values are too large for fp32.
        return finite & (math.isfinite(written) if isinstance(written, float) else written.isfinite())

    def add(self, message: torch.Tensor, out: torch.Tensor, alpha: float) -> None:
        backend = backend_for(out.device)
        signs, spoken = _parts(message, out.numel())
        add_signs(signs, out, _scale_of(message, backend) * alpha, _spread(spoken, len(signs), backend))

    def decode(self, decision: torch.Tensor, out: torch.Tensor, context: StepContext | None = None) -> None:
        backend = backend_for(out.device)
        scale = _scale_of(decision, backend)
        signs, spoken = _parts(decision, out.numel())
        nonzero = _spread(spoken, len(signs), backend)
        for span in backend.blocks(out.numel()):
            part = out[span]
            here = slice(span.start // 32, span.start // 32 + words_for(part.numel()))
            backend.unpack(signs[here], part, nonzero=nonzero[here])
            part.mul_(scale)


def _parts(message: Planes, elements: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The words of signs (k,), and those that say which of them are not silent."""
    words = words_for(elements)
    return message[0][1 : 1 + words], message[0][1 + words : 1 + words + words_for(words)]


def _spread(spoken: torch.Tensor, words: int, backend: Backend) -> torch.Tensor:
    """As many ``words``, all ones where they are not silent, else all zeros."""
    signs = torch.empty(words, dtype=torch.float32, device=spoken.device)
    backend.unpack(spoken, signs)
    return (signs > 0).to(WORD).neg_()


def _scale_of(message: Planes, backend: Backend) -> float | torch.Tensor:
    """The scale that item 0 holds."""
    return backend.number(message[0][:1].view(torch.float32)[0])
