"""What this rank sends: every gradient through the memory and the codec into the buckets' messages."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch

from mpisign.bitmap import ops
from mpisign.bitmap.batch import Batch, Located, locate
from mpisign.bitmap.ops import Flag
from mpisign.bitmap.tensors import flat
from mpisign.codecs import SignBits
from mpisign.layout import Bucket, Layout, Segment
from mpisign.memory import Identity, Memory
from mpisign.memory.store import state_dtype
from mpisign.method import Method
from mpisign.policy import StepContext

__all__ = ["PIECE", "Encoder", "MemoryOf", "one_launch"]

PIECE = 1 << 19  # elements given to memory and codec at once: few calls, and still near a core's cache

Locate = Callable[[Sequence[torch.Tensor | None]], Located]
MemoryOf = Callable[[torch.Tensor], dict[str, torch.Tensor]]
"""The memory's state of a parameter: name -> tensor like the parameter."""


class Encoder:
    """Fills messages on one device, with scratch that is allocated once.

    Where a gradient is NaN or Inf the rank will abstain, and its memory must not be spoilt. An elementwise memory
    is kept as it was there and takes the rest in. For all others the gradients are checked before any is taken in,
    and if one is not finite, none is.

    Args:
        messages: (planes_up, length) of each bucket.
        memory_of: gives the memory's state of a parameter, changed in place.
        locate: finds out, on a GPU, where gradients are, in wire order.

    Attributes:
        located: the gradients in wire order, as :meth:`encode` has found them; None if it looks at one by one.
    """

    def __init__(
        self, layout: Layout, method: Method, messages: Sequence[torch.Tensor], memory_of: MemoryOf, locate: Locate
    ) -> None:
        self._layout, self._method, self._messages = layout, method, messages
        self._memory_of, self._locate = memory_of, locate
        memory = method.memory
        self._checks_first = memory.feedback or not memory.elementwise
        self._piecewise = method.codec.elementwise and memory.elementwise and not memory.feedback
        largest = max((p.numel() for p in layout.parameters), default=0)
        self._scratch_size = min(PIECE, largest) if self._piecewise and layout.device.type == "cpu" else largest
        self._scratches: dict[tuple[str, torch.dtype], torch.Tensor] = {}
        self._states: dict[int, dict[str, torch.Tensor]] = {}  # flat views of the memory, by parameter
        self._unscale = 1.0
        self._signs_alone = type(memory) is Identity and isinstance(method.codec, SignBits)
        together = self._signs_alone or _is_average(memory)
        self._batch = one_launch(layout, method, messages) if together else None
        self._order = layout.order
        self._momenta: Located | None = None  # of all parameters, in that order
        self._fitting: tuple[object, ...] = ()
        self.located: Located | None = None

    def begin(
        self, gradients: Sequence[torch.Tensor | None], context: StepContext, unscale: float
    ) -> tuple[StepContext, bool]:
        """Before the first bucket: the context for memory and codec, and whether this rank may go on."""
        self._unscale = unscale
        if not self._checks_first:
            return context, True
        present = [flat(gradient) for gradient in gradients if gradient is not None]
        if not bool(ops.all_finite_many(present)):
            return context, False
        if unscale != 1.0:
            present = [g.to(state_dtype(g.dtype), copy=True).mul_(unscale) for g in present]
        prepared = self._method.memory.prepare(present, context)
        return context if prepared is None else dataclasses.replace(context, prepared=prepared), True

    def encode(
        self, buckets: Sequence[Bucket], gradients: Sequence[torch.Tensor | None], context: StepContext
    ) -> list[Flag]:
        """Fill the messages of ``buckets``. Returns flags that are all true if all values were finite."""
        if self._batch is not None:
            self.located = self._locate(gradients)
            if self._fits_kernels(self.located):
                return [self._encode_together(self._batch, self.located, context)]
        if self._signs_alone:
            self._unscale = 1.0
        flags: list[Flag] = []
        for bucket in buckets:
            message = self._messages[bucket.index]
            for segment in bucket.segments:
                gradient = gradients[segment.index]
                if gradient is not None:
                    flags.append(self._encode(segment, gradient, message, context))
                elif not self._method.rule.shardable:  # it stands for a vector that is 0 here
                    message[:, segment.start : segment.stop].zero_()
        return flags

    def local_update(self, gradients: Sequence[torch.Tensor | None], context: StepContext, unscale: float) -> bool:
        """Replace each gradient by what the memory makes of it, and send nothing. Returns whether all was finite."""
        context, finite = self.begin(gradients, context, unscale)
        if not finite:
            return False
        for segment in (segment for bucket in self._layout.buckets for segment in bucket.segments):
            gradient, state = gradients[segment.index], self.state(segment.index)
            if gradient is None:
                continue
            for lo in range(0, gradient.numel(), max(self._scratch_size, 1)):
                g = flat(gradient)[lo : lo + self._scratch_size]
                part = {key: value[lo : lo + self._scratch_size] for key, value in state.items()}
                values, ok = self._remember(g, part, context, segment.first_word)
                g.copy_(values)
                finite &= bool(ok) and bool(ops.all_finite(g))
        return finite

    def recover(self) -> None:
        """Clear the memory where it has overflowed: without this the rank would never vote again."""
        for state in self._states.values():
            for value in state.values():
                value[~torch.isfinite(value)] = 0

    def sent(self, gradients: Sequence[torch.Tensor | None], voters: Sequence[tuple[int, ...]], rank: int) -> None:
        """Tell the memory what has counted of what it gave: the messages of parameters on which ``rank`` votes."""
        if not self._method.memory.feedback:
            return
        for bucket in self._layout.buckets:
            for segment in bucket.segments:
                if gradients[segment.index] is None or rank not in voters[segment.index]:
                    continue
                state = self.state(segment.index)
                for piece in segment.pieces:
                    message = self._messages[bucket.index][:, piece.start : piece.stop]
                    part = {key: value[piece.lo : piece.hi] for key, value in state.items()}
                    self._method.memory.sent(message, segment.codec, part)

    def state(self, index: int) -> dict[str, torch.Tensor]:
        """The memory's state of a parameter as flat views, by field."""
        if index not in self._states:
            tensors = self._memory_of(self._layout.parameters[index]) if self._method.memory.fields else {}
            self._states[index] = {key: flat(value) for key, value in tensors.items()}
        return self._states[index]

    def _encode(self, segment: Segment, gradient: torch.Tensor, message: torch.Tensor, context: StepContext) -> Flag:
        """One parameter: memory, then codec."""
        g, state = flat(gradient), self.state(segment.index)
        if segment.numel <= self._scratch_size and self._piecewise:
            return self._encode_piece(g, state, message[:, segment.start : segment.stop], context, segment.first_word)
        if self._piecewise:
            return self._encode_piecewise(segment, g, state, message, context)
        values, finite = self._remember(g, state, context, segment.first_word)
        for piece in segment.pieces:
            target = message[:, piece.start : piece.stop]
            finite = finite & segment.codec.encode(values[piece.lo : piece.hi], target, context, piece.first_word)
        return finite

    def _encode_piecewise(
        self,
        segment: Segment,
        g: torch.Tensor,
        state: dict[str, torch.Tensor],
        message: torch.Tensor,
        context: StepContext,
    ) -> Flag:
        finite: Flag = True
        length = self._method.codec.length
        for lo in range(0, segment.numel, self._scratch_size):
            hi = min(lo + self._scratch_size, segment.numel)
            target = message[:, segment.start + length(lo) : segment.start + length(hi)]
            part = {key: value[lo:hi] for key, value in state.items()}
            finite = finite & self._encode_piece(g[lo:hi], part, target, context, segment.first_word + length(lo))
        return finite

    def _encode_piece(
        self,
        g: torch.Tensor,
        state: dict[str, torch.Tensor],
        target: torch.Tensor,
        context: StepContext,
        first_word: int,
    ) -> Flag:
        values, finite = self._remember(g, state, context, first_word)
        return finite & self._method.codec.encode(values, target, context, first_word)

    def _remember(
        self, g: torch.Tensor, state: dict[str, torch.Tensor], context: StepContext, first_word: int
    ) -> tuple[torch.Tensor, Flag]:
        """Let the memory take a gradient in. Where it is NaN or Inf, an elementwise memory stays as it was."""
        memory = self._method.memory
        if self._checks_first:
            return memory(self._widened(g, state), state, self._result(g, state), context, first_word), True
        if not state and self._unscale == 1.0:  # nothing to protect: the codec's own check is enough
            return memory(g, state, self._result(g, state), context, first_word), True
        wide = self._widened(g, state)
        if not state or bool(ops.all_finite(wide)):
            return memory(wide, state, self._result(g, state), context, first_word), True
        bad = ~torch.isfinite(wide)
        kept = {key: value[bad] for key, value in state.items()}
        memory(wide, state, self._result(g, state), context, first_word)
        for key, value in state.items():
            value[bad] = kept[key]
        return wide, False

    def _fits_kernels(self, located: Located) -> bool:
        """Whether each gradient, in wire order, is of a type that its momentum can take in there."""
        seen = (located.places, located.dtypes)
        if self._method.memory.betas is not None and seen != self._fitting:
            places = range(len(self._order)) if located.places is None else located.places
            parameters = [self._layout.parameters[self._order[place]] for place in places]
            if list(map(state_dtype, located.dtypes)) != [state_dtype(parameter.dtype) for parameter in parameters]:
                return False
            self._fitting = seen
        return True

    def _encode_together(self, batch: Batch, located: Located, context: StepContext) -> Flag:
        """All parameters in one launch, on a GPU."""
        assert isinstance(self._method.codec, SignBits)
        zeros, betas = self._method.codec.zeros(context.policy), self._method.memory.betas
        if betas is None:
            return batch.pack(located, zeros=zeros, key=context.zeros_key)
        momenta = self._momenta
        if momenta is None:
            present = set(range(len(self._order)) if located.places is None else located.places)
            (field,) = self._method.memory.fields
            momenta = locate(
                [self.state(index)[field] if place in present else None for place, index in enumerate(self._order)]
            )
            self._momenta = momenta if momenta.places is None else None
        return batch.pack_momentum(located, momenta, betas, unscale=self._unscale, zeros=zeros, key=context.zeros_key)

    # ------------------------------------------------------------------------------------------- precision

    def _widened(self, g: torch.Tensor, state: dict[str, torch.Tensor]) -> torch.Tensor:
        """The gradient in the memory's precision, without the loss scale: in 32 bits small ones do not underflow."""
        dtype = _precision(g, state)
        if g.dtype == dtype and self._unscale == 1.0:
            return g
        wide = self._scratch("gradient", dtype)[: g.numel()].copy_(g)
        return wide.mul_(self._unscale) if self._unscale != 1.0 else wide

    def _result(self, g: torch.Tensor, state: dict[str, torch.Tensor]) -> torch.Tensor:
        return self._scratch("result", _precision(g, state))

    def _scratch(self, purpose: str, dtype: torch.dtype) -> torch.Tensor:
        if (purpose, dtype) not in self._scratches:
            self._scratches[purpose, dtype] = torch.empty(self._scratch_size, dtype=dtype, device=self._layout.device)
        return self._scratches[purpose, dtype]


def _precision(g: torch.Tensor, state: dict[str, torch.Tensor]) -> torch.dtype:
    """What a memory computes in: the type of its state, else 32 bits or more."""
    return next((value.dtype for value in state.values()), state_dtype(g.dtype))


def _is_average(memory: Memory) -> bool:
    """Whether its betas say all it does: a subclass may have inherited them and call for something else."""
    owners = {next(kind for kind in type(memory).__mro__ if name in vars(kind)) for name in ("betas", "__call__")}
    return memory.betas is not None and len(owners) == 1


def one_launch(layout: Layout, method: Method, buckets: Sequence[torch.Tensor]) -> Batch | None:
    """What packs or unpacks all parameters in one launch, where there are kernels for that.

    Args:
        buckets: (planes, length) of each bucket: its messages or its decisions.
    """
    if ops.kernels_for(layout.device) is None or not isinstance(method.codec, SignBits):
        return None
    rows = [
        (buckets[bucket.index][:, segment.start : segment.stop], segment)
        for bucket in layout.buckets
        for segment in bucket.segments
    ]
    return Batch(
        [segment.numel for _, segment in rows],
        [row[0] for row, _ in rows],
        nonzeros=[row[1] for row, _ in rows] if rows and len(rows[0][0]) > 1 else None,
        first_words=[segment.first_word for _, segment in rows],
    )
