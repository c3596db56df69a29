"""The largest coordinates, as signs of one magnitude."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mpisign.backends import Flag, backend_for
from mpisign.codecs.codec import Codec, Planes
from mpisign.codecs.sparse import check_places, top_k
from mpisign.errors import OptionError
from mpisign.policy import StepContext, check_positive

__all__ = ["SparseTernary"]


@dataclass(frozen=True)
class SparseTernary(Codec):
    """``mu sign(p)`` on the ``k = max(1, round(ratio n))`` entries of largest magnitude, whose mean magnitude mu is.

    Of equals the lower indices are sent, so that all who decide the same send the same. First mu, an fp32 number, then
    an index for each: i for ``+mu`` at i, ``-1 - i`` for ``-mu``, and n for an entry that is 0. That is 32 bits an
    entry; the paper's Golomb codes, whose length changes, need fewer.

    Source: Sattler et al., "Robust and Communication-Efficient Federated Learning from Non-IID Data", 2019,
    Algorithm 1 (STC); with one sign only it is SBC, "Sparse Binary Compression", 2018.
    """

    ratio: float = 0.01
    name = "sparse_ternary"

    def __post_init__(self) -> None:
        if check_positive("ratio", self.ratio) > 1.0:
            raise OptionError(f"ratio={self.ratio!r} must be in (0, 1], e.g. ratio=0.01 for one coordinate in 100")

    def of(self, parameter: torch.Tensor) -> SparseTernary:
        check_places(self.name, parameter)
        return self

    def count(self, elements: int) -> int:
        """How many coordinates of ``elements`` are sent."""
        return min(elements, max(1, round(self.ratio * elements)))

    def length(self, elements: int) -> int:
        return 1 + self.count(elements)

    def encode(self, values: torch.Tensor, message: Planes, context: StepContext, first_word: int) -> Flag:
        backend, n = backend_for(values.device), values.numel()
        at = _first_of_the_largest(values, self.count(n))
        sent = values[at]
        magnitude = message[0][:1].view(torch.float32)
        magnitude.copy_(backend.magnitudes(sent[None]) / max(len(sent), 1))
        message[0][1:].copy_(torch.where(sent > 0, at, torch.where(sent < 0, ~at, n)))
        return backend.all_finite(magnitude)

    def add(self, message: torch.Tensor, out: torch.Tensor, alpha: float) -> None:
        if not out.numel():
            return
        code, magnitude = message[0][1:], message[0][:1].view(torch.float32).to(out.dtype)
        at = torch.where(code < 0, ~code, code)
        worth = torch.where(code < 0, -magnitude, magnitude)
        there = at < out.numel()  # where it is not, there is nothing, whatever rank has sent it
        out.index_add_(0, at.where(there, 0), worth.where(there, 0.0), alpha=alpha)


def _first_of_the_largest(values: torch.Tensor, count: int) -> torch.Tensor:
    """The indices (count,) of the largest magnitudes, of equals the lower: a mean of a few signs has many of these."""
    at = top_k(values, count)
    magnitudes = values.abs()
    least = magnitudes[at].min() if count else magnitudes.new_zeros(())
    larger = (magnitudes > least).nonzero()[:, 0]
    equal = (magnitudes == least).nonzero()[:, 0]
    chosen = torch.cat([larger, equal[: count - len(larger)]])
    return chosen if len(chosen) == count else at  # where a NaN is among them
