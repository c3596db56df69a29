"""What this rank sends: gradients through the memory and the codec into messages."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mpisign.backends import Backend, Bitmaps, First, Flag
from mpisign.bitmap.located import Located, Places, locate
from mpisign.bitmap.tensors import flat
from mpisign.codecs import SignBits
from mpisign.codecs.codec import Part, Planes
from mpisign.layout import Bucket, Layout, Segment
from mpisign.memory import Identity, Memory
from mpisign.memory.memory import State
from mpisign.memory.store import MemoryStore, state_dtype
from mpisign.method import Method
from mpisign.policy import StepContext
from mpisign.rules import BallotRule, VectorRule

__all__ = ["PIECE", "Encoder", "bitmaps_of"]

PIECE = 1 << 19  # elements given to memory and codec at once: few calls, and still near a core's cache


class Encoder:
    """Fills the messages of some buckets of one method, with scratch that is allocated once.

    A rank's ballot ends at the first parameter that is not finite. Its memory takes in what is finite of all others
    all the same, and stays as it was where a gradient is NaN or Inf.

    Args:
        buckets: of one method, to be filled at once.
        messages: by bucket, the (planes, length) that are sent.
        spoken: by bucket, (length,) words that become 1 where a value is not zero, if rows of zeros matter.
        store: where the memory's state is, changed in place.

    Attributes:
        segments: all that are encoded, in the order of the wire.
    """

    def __init__(
        self,
        layout: Layout,
        buckets: Sequence[Bucket],
        messages: Sequence[torch.Tensor],
        spoken: Sequence[torch.Tensor | None],
        backend: Backend,
        store: MemoryStore,
    ) -> None:
        self.method: Method = buckets[0].method
        self._layout, self._backend, self._store = layout, backend, store
        memory, codec = self.method.memory, self.method.codec
        pairs = list(zip(buckets, messages, spoken, strict=True))
        self.segments = [segment for bucket in buckets for segment in bucket.segments]
        self.rows = [
            (*message, its) if its is not None else tuple(message) for _, message, its in pairs
        ]  # of each bucket: what is sent, and what is not zero
        self._rows_of = [rows for (bucket, *_), rows in zip(pairs, self.rows, strict=True) for _ in bucket.segments]
        self._parameters = [layout.parameters[segment.index] for segment in self.segments]
        cut = any(len(segment.pieces) > 1 for segment in self.segments)
        by_parts = memory.elementwise and not (memory.feedback or memory.needs_maximum)
        self._piecewise = codec.elementwise and by_parts and not cut
        largest = max((segment.numel for segment in self.segments), default=0)
        self._scratch_size = largest if backend.together or not self._piecewise else min(PIECE, largest)
        self._scratches: dict[tuple[str, torch.dtype], torch.Tensor] = {}
        self._unscale = 1.0
        packs = isinstance(codec, SignBits) and type(codec).encode is SignBits.encode  # a subclass may do more
        counts = isinstance(codec, SignBits) and isinstance(self.method.rule, BallotRule)
        self._silent_at_zero = memory.noisy and counts  # if the policy has rows of zeros abstain
        self._signs_alone = packs and type(memory) is Identity
        together = self._signs_alone or (packs and _is_average(memory))
        self._bitmaps = bitmaps_of(self.segments, self._rows_of, backend) if together else None
        self._averages: tuple[int, Located] | None = None  # of all, and the store's moves then
        self._fitting: Places | None = None
        self._hears_of_drops = type(memory).dropped is not Memory.dropped
        self._taken: dict[int, torch.Tensor | None] = {}  # by parameter, if so; where it had a NaN, which
        self._sound = False  # no gradient has one, as far as it is known

    def encode(self, gradients: Sequence[torch.Tensor | None], context: StepContext, unscale: float) -> First:
        """Fill the messages.

        Args:
            gradients: in the order of ``segments``; None where this rank has none.
            unscale: factor that takes this rank's loss scale out of its gradients.

        Returns:
            The place among ``segments`` of the first that is not finite.
        """
        self._unscale = 1.0 if self._signs_alone else unscale
        self._taken = {}
        if self._bitmaps is not None and self._fits(located := locate(gradients)):
            return self._encode_together(self._bitmaps, located, context)
        self._sound = self._are_sound(gradients)
        flags: list[Flag] = []
        for segment, gradient, rows in zip(self.segments, gradients, self._rows_of, strict=True):
            if gradient is not None:
                flags.append(self._encode(segment, gradient, rows, context))
                continue
            flags.append(True)
            if isinstance(self.method.rule, VectorRule):  # it stands for a vector that is 0 here
                for row in rows:
                    row[segment.start : segment.stop].zero_()
        return _first_false(flags)

    def local_update(self, gradients: Sequence[torch.Tensor | None], context: StepContext, unscale: float) -> bool:
        """Replace each gradient by what the memory makes of it, and send nothing. Returns whether all was finite."""
        self._unscale = unscale
        self._sound = self._are_sound(gradients)
        flags: list[Flag] = []
        for segment, gradient in zip(self.segments, gradients, strict=True):
            if gradient is None:
                continue
            state = self.state(segment)
            for lo in range(0, gradient.numel(), max(self._scratch_size, 1)):
                g = flat(gradient)[lo : lo + self._scratch_size]
                part = {key: value[lo : lo + self._scratch_size] for key, value in state.items()}
                values, ok = self._remember(g, part, context, segment.first_word)
                g.copy_(values)
                flags += [ok, self._backend.all_finite(g)]
        return int(_first_false(flags)) == len(flags)

    def recover(self) -> None:
        """Clear what this rank's memory has of an element that has overflowed, or it would never vote again."""
        common = self.method.memory.common
        for segment in self.segments:
            own = [value for field, value in self.state(segment).items() if field not in common]
            if own:
                bad = ~torch.stack([torch.isfinite(value) for value in own]).all(0)
                for value in own:
                    value[bad] = 0

    def sent(self, counted: Sequence[bool]) -> None:
        """Tell the memory which messages have counted, in the order of ``segments``."""
        if not self.method.memory.feedback:
            return
        for segment, rows, its in zip(self.segments, self._rows_of, counted, strict=True):
            if not its:
                self._drop(segment)
                continue
            state = self.state(segment)
            for piece in segment.pieces:
                message = torch.stack([row[piece.start : piece.stop] for row in rows]) if len(rows) > 1 else None
                message = rows[0][None, piece.start : piece.stop] if message is None else message
                part = {key: value[piece.lo : piece.hi] for key, value in state.items()}
                self.method.memory.sent(message, piece.codec, part)
        self._taken = {}

    def _drop(self, segment: Segment) -> None:
        """Tell the memory that its last message does not count; where it had taken nothing in it hears of nothing."""
        if segment.index not in self._taken:
            return
        state, bad = self.state(segment), self._taken[segment.index]
        kept = {} if bad is None else {key: value[bad] for key, value in state.items()}
        self.method.memory.dropped(state)
        for key, value in kept.items():
            state[key][bad] = value

    def state(self, segment: Segment) -> State:
        """The memory's state of a parameter as flat views, by field."""
        return self._store.of(self._layout.parameters[segment.index]) if self.method.memory.fields else {}

    def _encode(
        self, segment: Segment, gradient: torch.Tensor, rows: Sequence[torch.Tensor], context: StepContext
    ) -> Flag:
        """One parameter: memory, then codec."""
        g, state = flat(gradient), self.state(segment)
        finite: Flag = True
        if not self._piecewise:
            values, finite = self._remember(g, state, context, segment.first_word)
            if self._hears_of_drops:
                self._taken[segment.index] = None if bool(finite) else ~torch.isfinite(self._widened(g, state))
            parts = [
                Part(piece.codec, piece.lo, piece.hi, _between(rows, piece.start, piece.stop), piece.first_word)
                for piece in segment.pieces
            ]
            return finite & segment.codec.encode_parts(values, parts, context)
        length = segment.codec.length
        for lo in range(0, segment.numel, max(self._scratch_size, 1)):
            hi = min(lo + self._scratch_size, segment.numel)
            part = {key: value[lo:hi] for key, value in state.items()}
            values, ok = self._remember(g[lo:hi], part, context, segment.first_word + length(lo))
            start, stop = segment.start + length(lo), segment.start + length(hi)
            finite = finite & ok
            message, first_word = _between(rows, start, stop), segment.first_word + length(lo)
            finite = finite & segment.codec.encode(values, message, context, first_word)
        return finite

    def _are_sound(self, gradients: Sequence[torch.Tensor | None]) -> bool:
        """Whether all are finite, where asking once saves asking for each: a GPU is waited for."""
        memory = self.method.memory
        if not (self._backend.together and memory.fields) or memory.needs_all or self._unscale > 1.0:
            return False
        return int(self._backend.first_bad(gradients)) >= len(gradients)

    def _remember(
        self, g: torch.Tensor, state: State, context: StepContext, first_word: int
    ) -> tuple[torch.Tensor, Flag]:
        """Let the memory take a gradient in. Where that is NaN or Inf, the memory stays as it was."""
        memory, plain = self.method.memory, type(self.method.memory) is Identity
        if plain and self._unscale == 1.0:  # what is sent is the gradient: the codec's own check is enough
            return g, True
        wide = self._widened(g, state)
        if plain or memory.needs_all or self._sound:  # or all gradients have been looked at before
            return self._remembered(wide, g, state, context, first_word), True
        finite = self._backend.all_finite(wide)  # what a memory makes of a NaN need not be one
        if not state or bool(finite):
            return self._remembered(wide, g, state, context, first_word), finite
        bad = ~torch.isfinite(wide)
        kept = {key: value[bad] for key, value in state.items()}
        memory(wide, state, self._result(g, state), context, first_word)
        for key, value in state.items():
            value[bad] = kept[key]
        return wide, False

    def _remembered(
        self, wide: torch.Tensor, g: torch.Tensor, state: State, context: StepContext, first_word: int
    ) -> torch.Tensor:
        values = self.method.memory(wide, state, self._result(g, state), context, first_word)
        if self._silent_at_zero and context.policy.zeros == "rows":
            values.masked_fill_(wide == 0, 0.0)
        return values

    # ------------------------------------------------------------------------------------ many at once

    def _fits(self, gradients: Located) -> bool:
        """Whether each gradient is of a type that its average can take in."""
        if self.method.memory.betas is None:
            return True
        if not gradients.places.same_forms(self._fitting):
            pairs = zip(gradients, self._parameters, strict=True)
            if any(g is not None and state_dtype(g.dtype) != state_dtype(p.dtype) for g, p in pairs):
                return False
            self._fitting = gradients.places
        return True

    def _encode_together(self, bitmaps: Bitmaps, gradients: Located, context: StepContext) -> First:
        assert isinstance(self.method.codec, SignBits)
        zeros, betas = self.method.codec.zeros(context.policy), self.method.memory.betas
        if betas is None:
            return bitmaps.pack(gradients, zeros=zeros, key=context.zeros_key)
        if self._store.drafting:  # second buffers are written in the pass that reads the first
            (field,) = self.method.memory.fields
            former: list[torch.Tensor | None] = [None] * len(gradients)
            written = list(former)
            for place, parameter in enumerate(self._parameters):
                if gradients[place] is not None:
                    before, now = self._store.before(parameter)
                    former[place], written[place] = before[field], now[field]
            return bitmaps.pack_average(
                gradients, written, betas, unscale=self._unscale, zeros=zeros, key=context.zeros_key, before=former
            )
        averages = self._averages_for(gradients)
        return bitmaps.pack_average(
            gradients, averages, betas, unscale=self._unscale, zeros=zeros, key=context.zeros_key
        )

    def _averages_for(self, gradients: Located) -> Sequence[torch.Tensor | None]:
        """This rank's, each made when its parameter first has a gradient."""
        (field,) = self.method.memory.fields
        if not gradients.places.complete:
            pairs = zip(gradients, self._parameters, strict=True)
            return [None if gradient is None else self._store.of(parameter)[field] for gradient, parameter in pairs]
        if self._averages is None or self._averages[0] != self._store.moves:
            averages = locate([self._store.of(parameter)[field] for parameter in self._parameters])
            self._averages = self._store.moves, averages
        return self._averages[1]

    # ------------------------------------------------------------------------------------------- precision

    def _widened(self, g: torch.Tensor, state: State) -> torch.Tensor:
        """The gradient in the memory's precision, without the loss scale: in 32 bits small ones do not underflow."""
        dtype = _precision(g, state)
        if g.dtype == dtype and self._unscale == 1.0:
            return g
        wide = self._scratch("gradient", dtype)[: g.numel()].copy_(g)
        return wide.mul_(self._unscale) if self._unscale != 1.0 else wide

    def _result(self, g: torch.Tensor, state: State) -> torch.Tensor:
        return self._scratch("result", _precision(g, state))

    def _scratch(self, purpose: str, dtype: torch.dtype) -> torch.Tensor:
        if (purpose, dtype) not in self._scratches:
            self._scratches[purpose, dtype] = torch.empty(self._scratch_size, dtype=dtype, device=self._layout.device)
        return self._scratches[purpose, dtype]


def _between(rows: Sequence[torch.Tensor], start: int, stop: int) -> Planes:
    """Items of a message."""
    return [row[start:stop] for row in rows] if len(rows) > 1 else rows[0][None, start:stop]


def _precision(g: torch.Tensor, state: State) -> torch.dtype:
    """What a memory computes in: the type of its state, else 32 bits or more."""
    return next((value.dtype for value in state.values()), state_dtype(g.dtype))


def _is_average(memory: Memory) -> bool:
    """Whether its betas say all it does: a subclass may have inherited them and call for something else."""
    owners = {next(kind for kind in type(memory).__mro__ if name in vars(kind)) for name in ("betas", "__call__")}
    return memory.betas is not None and len(owners) == 1


def _first_false(flags: Sequence[Flag]) -> First:
    """The place of the first that is not true; on a GPU it waits for nobody."""
    tensors = [flag for flag in flags if isinstance(flag, torch.Tensor)]
    if not tensors:
        return next((place for place, flag in enumerate(flags) if not flag), len(flags))
    told = torch.ones(len(flags) + 1, dtype=torch.bool, device=tensors[0].device)
    told[-1] = False
    for place, flag in enumerate(flags):
        if flag is not True:
            told[place] = flag
    return told.to(torch.uint8).argmin()


def bitmaps_of(segments: Sequence[Segment], rows: Sequence[Sequence[torch.Tensor]], backend: Backend) -> Bitmaps:
    """What packs or unpacks the words of all of these together.

    Args:
        rows: for each segment, its bucket's planes (length,): signs and, if there are two, what is not zero.
    """
    spans = [slice(segment.start, segment.stop) for segment in segments]
    return backend.bitmaps(
        [segment.numel for segment in segments],
        [planes[0][span] for planes, span in zip(rows, spans, strict=True)],
        [planes[1][span] if len(planes) > 1 else None for planes, span in zip(rows, spans, strict=True)],
        [segment.first_word for segment in segments],
    )
