"""What comes back: decisions, or everybody's messages, into what the optimizer will apply."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from mpisign.backends import Backend, Bitmaps
from mpisign.bitmap.tensors import flat
from mpisign.codecs import Codec, SignBits
from mpisign.exchange import rows
from mpisign.exchange.choose import Exchange
from mpisign.exchange.encoder import Encoder, bitmaps_of
from mpisign.exchange.header import Bools, Heard
from mpisign.exchange.sink import Sink, StepSink
from mpisign.layout import Bucket, Layout, Segment
from mpisign.memory.store import state_dtype
from mpisign.policy import Policy, StepContext
from mpisign.rules import PieceRule, ValueRule

__all__ = ["Decoder"]


class Decoder:
    """Decodes some buckets of one method.

    Args:
        exchanges: by bucket.
        encoder: whose memory may turn a decision into a gradient.
    """

    def __init__(
        self,
        layout: Layout,
        buckets: Sequence[Bucket],
        exchanges: Sequence[Exchange],
        encoder: Encoder,
        policy: Policy,
        size: int,
        backend: Backend,
    ) -> None:
        self._layout, self._buckets, self._exchanges, self._encoder = layout, buckets, exchanges, encoder
        self._backend, self._method = backend, encoder.method
        self._codec_down = self._method.rule.down(self._method.codec, policy, size)
        self._places = [
            (bucket, exchange, place, segment)
            for bucket, exchange in zip(buckets, exchanges, strict=True)
            for place, segment in enumerate(bucket.segments)
        ]
        self._indices = tuple(segment.index for *_, segment in self._places)
        # Whether what comes down is what is applied, in whatever type.
        down = self._codec_down
        simple = not (self._method.memory.running or isinstance(self._method.rule, PieceRule))
        self._direct = down is not None and (down.plain or down.ballots) and simple
        self._bitmaps: Bitmaps | None = None
        if self._direct and isinstance(down, SignBits) and type(down).decode is SignBits.decode:
            planes = [tuple(exchange.decision) for _, exchange, _, _ in self._places]
            self._bitmaps = bitmaps_of([segment for *_, segment in self._places], planes, backend)

    def decode(self, heard: Sequence[Heard], sink: Sink, context: StepContext) -> None:
        """Write all decisions.

        Args:
            heard: by bucket.
        """
        outs = sink.targets(self._indices, [its for one in heard for its in one.voted])
        said = {bucket.index: its for bucket, its in zip(self._buckets, heard, strict=True)}
        if isinstance(sink, StepSink):
            self._apply(outs, said, sink)
        elif self._bitmaps is not None:
            self._bitmaps.unpack(outs)
        else:
            for (bucket, exchange, place, segment), out in zip(self._places, outs, strict=True):
                if out is not None:
                    self._decode(exchange, place, segment, flat(out), said[bucket.index], context)
        if self._direct and not isinstance(sink, StepSink):
            for place, silent in self._silent(outs, said).items():
                out, (*_, segment) = outs[place], self._places[place]
                assert out is not None
                rows.silence(flat(out), silent, *self._form_of(segment))
        sink.written(self._indices, outs)

    @property
    def bits(self) -> bool:
        """Whether what comes down are bits that can be applied as they are."""
        return self._bitmaps is not None

    def _apply(self, outs: Sequence[torch.Tensor | None], said: Mapping[int, Heard], sink: StepSink) -> None:
        assert self._bitmaps is not None
        moved: list[torch.Tensor | None] = [None] * len(outs)
        for place, silent in self._silent(outs, said).items():
            (_, exchange, _, segment) = self._places[place]
            device = exchange.decision.device
            moved[place] = rows.spoken_words(~silent, *self._form_of(segment), self._backend, device)
        rates, decays = sink.numbers(self._indices)
        self._bitmaps.apply(outs, rates, decays, moved)

    def _silent(self, outs: Sequence[torch.Tensor | None], said: Mapping[int, Heard]) -> dict[int, Bools]:
        """By the place of a parameter, rows on which nobody has voted, where a decision cannot say so itself."""
        found = {}
        if any(heard.spoken for heard in said.values()):
            for at, ((bucket, exchange, place, _), out) in enumerate(zip(self._places, outs, strict=True)):
                heard = said[bucket.index]
                if out is not None and place in heard.spoken and len(exchange.decision) == 1:
                    silent = ~np.any(heard.spoken[place][list(heard.voters(place))], axis=0)
                    if silent.any():
                        found[at] = silent
        return found

    def _form_of(self, segment: Segment) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shape, and strides on the wire."""
        return tuple(self._layout.parameters[segment.index].shape), self._layout.strides[segment.index]

    def _decode(
        self,
        exchange: Exchange,
        place: int,
        segment: Segment,
        out: torch.Tensor,
        heard: Heard,
        context: StepContext,
    ) -> None:
        memory, rule = self._method.memory, self._method.rule
        voters = heard.voters(place)
        context = dataclasses.replace(context, voters=voters)
        decision = exchange.decision[:, segment.start : segment.stop]
        if place in heard.spoken:
            spoken = heard.spoken[place][list(voters)]
            context = dataclasses.replace(context, speakers=rows.speakers(spoken, *self._form_of(segment), out.device))
        if self._direct and self._codec_down is not None:
            self._codec_down.decode(decision, out, context)
            return
        wide = out if out.dtype == state_dtype(out.dtype) else out.to(state_dtype(out.dtype))
        for piece in segment.pieces:
            target = wide[piece.lo : piece.hi]
            if self._codec_down is not None:
                own = isinstance(rule, PieceRule) or self._codec_down is self._method.codec
                codec = piece.codec if own else self._codec_down
                codec.decode(exchange.decision[:, piece.start : piece.stop], target, context)
                continue
            messages = [exchange.received[rank][:, piece.start : piece.stop] for rank in voters]
            assert isinstance(rule, ValueRule)
            _combine(rule, piece.codec, messages, target, context, piece.first_word)
        if memory.running:
            memory.received(wide, self._encoder.state(segment))
        if wide is not out:
            out.copy_(wide)


def _combine(
    rule: ValueRule,
    codec: Codec,
    messages: Sequence[torch.Tensor],
    out: torch.Tensor,
    context: StepContext,
    first_word: int,
) -> None:
    """Apply a rule to messages that must be decoded first."""
    weights = rule.weights(context)
    if weights is not None:
        codec.decode(messages[0], out, context)
        if weights[0] != 1.0:
            out.mul_(weights[0])
        for message, weight in zip(messages[1:], weights[1:], strict=True):
            codec.add(message, out, weight)
        return
    decoded = out.new_zeros((len(messages), 1, out.numel()))
    for message, row in zip(messages, decoded, strict=True):
        codec.add(message, row[0], 1.0)
    rule.decide(list(decoded), out[None], context, first_word)
