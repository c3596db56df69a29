"""What comes back: decisions, or everybody's messages, into the gradients that the optimizer will apply."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from mpisign.bitmap.batch import Batch, Located
from mpisign.bitmap.tensors import flat
from mpisign.codecs import Codec
from mpisign.exchange.choose import Exchange
from mpisign.exchange.encoder import Encoder, one_launch
from mpisign.layout import Bucket, Layout, Segment
from mpisign.memory.store import state_dtype
from mpisign.method import Method
from mpisign.policy import StepContext

__all__ = ["Decoder"]


class Decoder:
    """Writes into ``p.grad`` on one device, or into the parameters themselves if the method exchanges models.

    Args:
        exchanges: one a bucket, which hold the decisions and, if all ranks have all messages, those.
        encoder: whose memory may turn a decision into a gradient.
    """

    def __init__(self, layout: Layout, method: Method, exchanges: Sequence[Exchange], encoder: Encoder) -> None:
        self._layout, self._method, self._exchanges, self._encoder = layout, method, exchanges, encoder
        self._direct = not (
            method.by_value
            or method.memory.running
            or method.rule.tallies
            or method.rule.reencodes
            or method.exchanges_models
        )
        self._batch: Batch | None = (
            one_launch(layout, method, [exchange.decision for exchange in exchanges]) if self._direct else None
        )
        self._order = layout.order

    def decode(
        self,
        buckets: Sequence[Bucket],
        gradients: Sequence[torch.Tensor | None],
        voters: Sequence[tuple[int, ...]],
        context: StepContext,
        located: Located | None = None,
    ) -> None:
        """Replace the gradients of ``buckets``: by the decision; by None where nobody votes; new ones where needed.

        Args:
            gradients: in wire order, by parameter; None where this rank has none.
            voters: the ranks that vote, by parameter.
            located: the gradients in wire order, if the encoder has looked at them in this step.
        """
        if self._batch is not None:
            if located is not None and located.places is None and all(voters):
                self._batch.unpack(located)
                return
            self._batch.unpack(
                [
                    out if (out := gradients[place]) is not None and voters[place] else self._target(place, voters)
                    for place in self._order
                ]
            )
            return
        for bucket in buckets:
            for segment in bucket.segments:
                place = segment.index
                out = gradients[place]
                if out is None or not voters[place]:
                    out = self._target(place, voters)
                if out is not None:
                    self._decode(bucket, segment, flat(out), voters[place], context)

    def follow(self, buckets: Sequence[Bucket], voters: Sequence[tuple[int, ...]], context: StepContext) -> None:
        """Keep a running memory up to date on a rank that trains no more and has no use for the gradients."""
        if not self._method.memory.running:
            return
        for bucket in buckets:
            for segment in bucket.segments:
                if voters[segment.index]:
                    parameter = self._layout.parameters[segment.index]
                    unused = torch.empty(segment.numel, dtype=parameter.dtype, device=parameter.device)
                    self._decode(bucket, segment, unused, voters[segment.index], context)

    def _target(self, place: int, voters: Sequence[tuple[int, ...]]) -> torch.Tensor | None:
        """A new gradient for a parameter that has none here; None, also as its gradient, where nobody votes."""
        parameter = self._layout.parameters[place]
        if not voters[place]:
            if not self._method.exchanges_models:
                parameter.grad = None
            return None
        parameter.grad = torch.empty_strided(
            parameter.shape, self._layout.strides[place], dtype=parameter.dtype, device=parameter.device
        )
        return parameter.grad

    def _decode(
        self, bucket: Bucket, segment: Segment, out: torch.Tensor, voters: tuple[int, ...], context: StepContext
    ) -> None:
        exchange, method = self._exchanges[bucket.index], self._method
        if self._direct:
            segment.codec.decode(exchange.decision[:, segment.start : segment.stop], out)
            return
        wide = out if out.dtype == state_dtype(out.dtype) else out.to(state_dtype(out.dtype))
        for piece in segment.pieces:
            target, here = wide[piece.lo : piece.hi], dataclasses.replace(context, voters=voters)
            if not method.by_value:
                method.rule.decode(exchange.decision[:, piece.start : piece.stop], target, segment.codec, here)
                continue
            messages = [exchange.received[rank][:, piece.start : piece.stop] for rank in voters]
            self._combine(segment.codec, messages, target, here, piece.first_word)
        if method.memory.running:
            method.memory.received(wide, self._encoder.state(segment.index))
        if wide is not out:
            out.copy_(wide)
        parameter = self._layout.parameters[segment.index]
        if method.exchanges_models and out.data_ptr() != parameter.data_ptr():
            parameter.copy_(out.view(parameter.shape))

    def _combine(
        self, codec: Codec, messages: Sequence[torch.Tensor], out: torch.Tensor, context: StepContext, first_word: int
    ) -> None:
        """Apply the rule to messages that must be decoded first."""
        rule = self._method.rule
        weights = rule.weights(context)
        if weights is not None:
            codec.decode(messages[0], out)
            if weights[0] != 1.0:
                out.mul_(weights[0])
            for message, weight in zip(messages[1:], weights[1:], strict=True):
                codec.add(message, out, weight)
            return
        rows = out.new_zeros((len(messages), 1, out.numel()))
        for message, row in zip(messages, rows, strict=True):
            codec.add(message, row[0], 1.0)
        rule.decide(list(rows), out[None], context, first_word)
