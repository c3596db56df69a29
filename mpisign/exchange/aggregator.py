"""The shard owner's side of a compressed mean: it goes down in the codec again, and what that loses is kept.

Source: Tang et al., "DoubleSqueeze: Parallel Stochastic Gradient Descent with Double-Pass Error-Compensated
Compression", 2019, Algorithm 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch

from mpisign.codecs import Codec
from mpisign.layout import Bucket, Layout, Piece
from mpisign.method import Method
from mpisign.policy import StepContext

__all__ = ["Aggregator", "ErrorOf"]

ErrorOf = Callable[[torch.Tensor, int, int], torch.Tensor]
"""``error_of(parameter, lo, hi)``: the error kept for these elements (hi - lo,) of a parameter, changed in place."""


class Aggregator:
    """Decides pieces of parameters: ``q = mean + e``, ``C(q)`` goes down, ``e <- q - C(q)`` stays."""

    def __init__(self, layout: Layout, method: Method, error_of: ErrorOf) -> None:
        self._layout, self._method, self._error_of = layout, method, error_of

    def decide(
        self,
        bucket: Bucket,
        voters: Sequence[tuple[int, ...]],
        context: StepContext,
        messages: Sequence[torch.Tensor],
        out: torch.Tensor,
        start: int,
    ) -> None:
        """Decide the pieces that lie in items ``start .. start + out.shape[1]`` of a bucket."""
        # Where several ranks decide this, all do it alike.
        context = dataclasses.replace(context, zeros_key=context.ties_key)
        for segment in bucket.segments:
            for piece in segment.pieces:
                if voters[segment.index] and start <= piece.start and piece.stop <= start + out.shape[1]:
                    here = dataclasses.replace(context, voters=voters[segment.index])
                    span = slice(piece.start - start, piece.stop - start)
                    mine = [messages[rank][:, span] for rank in here.voters]
                    self._decide(self._layout.parameters[segment.index], segment.codec, piece, here, mine, out[:, span])

    def _decide(
        self,
        parameter: torch.Tensor,
        codec: Codec,
        piece: Piece,
        context: StepContext,
        messages: Sequence[torch.Tensor],
        out: torch.Tensor,
    ) -> None:
        weights = self._method.rule.weights(context)
        assert weights is not None
        error = self._error_of(parameter, piece.lo, piece.hi)
        for message, weight in zip(messages, weights, strict=True):
            codec.add(message, error, weight)
        codec.encode(error, out, context, piece.first_word)
        codec.add(out, error, -1.0)
