"""A few bits for each coordinate, rounded at random so that they are right on average: QSGD and TernGrad."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from mpisign.backends import Flag, backend_for
from mpisign.bitmap.host import words_for
from mpisign.codecs.codec import Codec, Planes
from mpisign.errors import OptionError
from mpisign.policy import StepContext, check_choice, check_integer, check_positive

__all__ = ["Quantized"]


@dataclass(frozen=True)
class Quantized(Codec):
    """``||p|| sign(p) xi / s``, xi one of the two integers next to ``s |p| / ||p||``, at random so that the mean is p.

    First the norms, fp32 numbers; then the words of the signs, and those of each bit of xi. It is unbiased, and
    ``E ||C(p) - p||^2 <= min(n / s^2, sqrt(n) / s) ||p||^2`` for the n elements that share an L2 norm.

    Args:
        levels: s.
        norm: ``"l2"`` (QSGD), or ``"max"``, the largest magnitude (TernGrad).
        bucket: how many elements share a norm, a multiple of 32; None for all of a parameter.
        clip: magnitudes above so many standard deviations of the parameter's values are cut to that; None for never.

    Source: Alistarh et al., "QSGD: Communication-Efficient SGD via Gradient Quantization and Encoding", 2017,
    section 3.1 (here with fixed lengths, not Elias codes); Wen et al., "TernGrad: Ternary Gradients to Reduce
    Communication in Distributed Deep Learning", 2017, section 3.
    """

    levels: int = 7
    norm: str = "l2"
    bucket: int | None = 512
    clip: float | None = None
    name = "quantized"
    random = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", check_integer("levels", self.levels, 1))
        if self.levels >= 1 << 16:
            raise OptionError(f"levels={self.levels} must be less than 65536, e.g. levels=7 for 4 bits a coordinate")
        check_choice("norm", self.norm, ("l2", "max"))
        if self.bucket is not None and check_integer("bucket", self.bucket, 32) % 32:
            raise OptionError(f"bucket={self.bucket} must be a multiple of 32, e.g. bucket=512, or None")
        if self.clip is not None:
            check_positive("clip", self.clip, ", or None for never")

    @property
    def bits(self) -> int:
        """Of a magnitude."""
        return self.levels.bit_length()

    def norms(self, elements: int) -> int:
        """How many norms a message has."""
        return -(-elements // self.bucket) if self.bucket else min(elements, 1)

    def length(self, elements: int) -> int:
        return self.norms(elements) + (1 + self.bits) * words_for(elements)

    def encode(self, values: torch.Tensor, message: Planes, context: StepContext, first_word: int) -> Flag:
        backend, device = backend_for(values.device), values.device
        norms, words = self._split(message[0], values.numel())
        norms.copy_(self._norms(values))
        finite = backend.all_finite(values) & backend.all_finite(norms)
        random = backend.random(context.noise_key(first_word), device, private=False)
        for span, norm in self._blocks(norms, values.numel()):
            part = values[span].to(torch.promote_types(values.dtype, torch.float32))
            here = slice(span.start // 32, words_for(span.stop))
            backend.pack(part, words[0, here], zeros="positive")
            share = part.abs().div_(norm.where(norm > 0, 1.0)).clamp_(max=1.0)
            level = share.mul_(self.levels).add_(random.uniform(torch.empty_like(part), 0.5)).add_(0.5).floor_()
            level.clamp_(0, self.levels)
            for bit, plane in enumerate(words[1:, here]):
                backend.pack(torch.div(level, 2**bit, rounding_mode="floor").remainder_(2).sub_(0.5), plane)
        return finite

    def add(self, message: torch.Tensor, out: torch.Tensor, alpha: float) -> None:
        for span, part in self._decoded(message, out):
            out[span].add_(part, alpha=alpha)

    def decode(self, decision: torch.Tensor, out: torch.Tensor, context: StepContext | None = None) -> None:
        for span, part in self._decoded(decision, out):
            out[span].copy_(part)

    # ---------------------------------------------------------------------------------------------- inside

    def _split(self, row: torch.Tensor, elements: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of a message: the norms (b,) fp32, and the words (1 + bits, k)."""
        norms = self.norms(elements)
        return row[:norms].view(torch.float32), row[norms:].view(1 + self.bits, words_for(elements))

    def _blocks(self, norms: torch.Tensor, elements: int) -> Iterator[tuple[slice, torch.Tensor]]:
        """All elements in blocks, with the norm of each, or of all."""
        for span in backend_for(norms.device).blocks(elements):
            if self.bucket is None:
                yield span, norms
            else:
                at = torch.arange(span.start, span.stop, device=norms.device)
                yield span, norms[at.div_(self.bucket, rounding_mode="floor")]

    def _norms(self, values: torch.Tensor) -> torch.Tensor:
        """Of each bucket: (b,)."""
        backend, n = backend_for(values.device), values.numel()
        if not n:
            return values.new_empty(0)
        size = min(self.bucket or n, n)
        whole = n // size * size
        norms = [self._norms_of(values[:whole].view(-1, size)), self._norms_of(values[whole:].view(1, -1))]
        together = torch.cat([its for its in norms if its.numel()])
        if self.clip is None:
            return together
        wide = values.to(torch.promote_types(values.dtype, torch.float32))
        mean, square = (
            torch.as_tensor(backend.total(its), dtype=torch.float64, device=values.device) / n
            for its in (wide, wide.square())
        )
        limit = (square - mean.square()).clamp(min=0.0).sqrt() * self.clip
        # Of values that hardly differ it would clip all, and of one value alone leave nothing.
        return together.clamp(max=limit.where(limit.square() >= square, torch.inf))

    def _norms_of(self, buckets: torch.Tensor) -> torch.Tensor:
        if not buckets.numel():
            return buckets.new_empty(0)
        smallest, largest = torch.aminmax(buckets, dim=1)
        top = torch.maximum(-smallest, largest).double()
        if self.norm == "max":
            return top
        backend, norms = backend_for(buckets.device), torch.empty_like(top)
        height = max(1, backend.cache // buckets.shape[1])
        for lo in range(0, len(buckets), height):
            span = slice(lo, lo + height)
            shares = buckets[span].to(torch.promote_types(buckets.dtype, torch.float32))
            shares = shares / top[span, None].where(top[span, None] > 0, 1.0).to(shares.dtype)  # against overflow
            norms[span] = backend.magnitudes(shares.square_()).sqrt_().mul_(top[span])
        return norms

    def _decoded(self, message: torch.Tensor, out: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """What it is worth, block by block, in the precision of ``out``."""
        backend = backend_for(out.device)
        norms, words = self._split(message[0], out.numel())
        for span, norm in self._blocks(norms, out.numel()):
            here = slice(span.start // 32, words_for(span.stop))
            level = torch.full((span.stop - span.start,), 2.0**self.bits - 1, dtype=out.dtype, device=out.device)
            part = torch.empty_like(level)
            for bit, plane in enumerate(words[1:, here]):
                backend.unpack(plane, part)
                level.add_(part, alpha=2.0**bit)
            backend.unpack(words[0, here], part)
            yield span, part.mul_(level).mul_(norm.to(out.dtype).mul(0.5 / self.levels))
