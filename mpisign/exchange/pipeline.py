"""One step from local gradients to the common decision: roll call, pack, exchange, decide, unpack.

A bucket travels while the next one is packed: its first phase starts as soon as it is full. Decisions wait for
the tally sheets, which are posted when packing ends, so that a NaN in the last gradient still withdraws the
rank's whole ballot; by then the first phase of every bucket is on its way and the network never idles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mpisign.bitmap import host
from mpisign.bitmap.tensors import DTYPES, flat, format_of, is_laid_as, raw_bits
from mpisign.errors import GradientError, MpisignError
from mpisign.exchange import header
from mpisign.exchange.choose import Exchange, choose
from mpisign.exchange.runs import decide_runs, runs_of
from mpisign.layout import Bucket, Layout, Segment
from mpisign.memory.store import state_dtype
from mpisign.methods import Method
from mpisign.policy import Policy, Turn
from mpisign.telemetry import StepReport, Stopwatch
from mpisign.world import World, current

__all__ = ["MemoryOf", "Pipeline"]

PIECE = 1 << 19  # elements given to memory and codec at once: few calls, and still near a core's cache

MemoryOf = Callable[[torch.Tensor], dict[str, torch.Tensor]]
"""The memory's state of a parameter: name -> tensor like the parameter."""


class Pipeline:
    """Everything a step needs, allocated once: the exchanges with their buffers, and scratch.

    Args:
        layout: the parameters on the wire; all ranks must have the same.
        method, policy: what is sent and how it is decided.
        exchange: ``"auto"``, ``"allgather"`` or ``"two_phase"``.
        world: the job.
        number: which of the job's optimizers this is, so that two alike are not mistaken for each other.
    """

    def __init__(
        self, layout: Layout, method: Method, policy: Policy, exchange: str, world: World, number: int
    ) -> None:
        self.layout, self.method, self.policy, self.world = layout, method, policy, world
        self.settings = (f"optimizer {number} of the job", f"method {method}", repr(policy), f"exchange {exchange!r}")
        self.fingerprint = layout.fingerprint(self.settings)
        codec, rule = method.codec, method.rule
        self._up, self._down = codec.planes_up(policy), codec.planes_down(policy)
        self.exchanges: list[Exchange] = [
            choose(exchange, rule, bucket.length, bucket.dtype, self._up, self._down, world)
            for bucket in layout.buckets
        ]
        self._piecewise = codec.elementwise and method.memory.elementwise
        largest = max((p.numel() for p in layout.parameters), default=0)
        self._scratch_size = min(PIECE, largest) if self._piecewise else largest
        self._scratches: dict[tuple[str, torch.dtype], torch.Tensor] = {}
        self._states: dict[int, dict[str, torch.Tensor]] = {}  # flat views of the memory, by parameter
        self._decisions: list[npt.NDArray[Any]] = []
        self._latest = -1
        self._unscale = 1.0

    # -------------------------------------------------------------------------------------------- a step

    @torch.no_grad()
    def run(self, step: int, memory_of: MemoryOf, excuse: int = header.VOTES, unscale: float = 1.0) -> StepReport:
        """Turn every ``p.grad`` into the decision, in place. **Collective.**

        Parameters on which nobody votes end with ``p.grad = None``; those that have a gradient elsewhere only
        get one here.

        Args:
            step: number of this exchange, equal on all ranks.
            memory_of: gives the memory's state of a parameter, changed in place.
            excuse: ``header.VOTES``, or why this rank abstains whatever its gradients are.
            unscale: factor that takes a loss scale out of the gradients.

        Raises:
            ConsistencyError: ranks differ in step or layout. No gradient and no memory has been changed.
            GradientError: a gradient is sparse or of an unsupported type.
        """
        self._unscale = unscale
        gradients = [self._gradient(i) for i in range(len(self.layout.parameters))]
        return self._run(step, gradients, memory_of, excuse, None)[1]

    def sit_out(self, step: int, joined_for: int) -> tuple[header.Roll, StepReport]:
        """Take part in a step without a gradient, after ``join()``; nothing is changed here. **Collective.**"""
        nothing: list[torch.Tensor | None] = [None] * len(self.layout.parameters)
        return self._run(step, nothing, lambda _: {}, header.JOINED, joined_for)

    def _run(
        self,
        step: int,
        gradients: Sequence[torch.Tensor | None],
        memory_of: MemoryOf,
        excuse: int,
        joined_for: int | None,
    ) -> tuple[header.Roll, StepReport]:
        world, watch = self.world, Stopwatch()
        with watch.span("exchange"):
            roll = header.call_roll(world, self.layout, self.fingerprint, self.settings, step, joined_for)
        if roll.all_joined:
            return roll, self._report(step, watch, roll, None, None)
        self._latest = step
        with world.unbroken(f"step {step}", self):
            sheets, ties = self._exchange(step, gradients, memory_of, excuse, watch)
        return roll, self._report(step, watch, roll, sheets, ties)

    def _exchange(
        self,
        step: int,
        gradients: Sequence[torch.Tensor | None],
        memory_of: MemoryOf,
        excuse: int,
        watch: Stopwatch,
    ) -> tuple[header.Sheets, int | None]:
        """All of a step but the roll call. Returns who voted, and the ties."""
        world, buckets = self.world, self.layout.buckets
        turn = self.policy.turn(step, world.rank)
        finite = True
        for bucket, exchange in zip(buckets, self.exchanges, strict=True):
            if excuse == header.VOTES:
                with watch.span("pack"):
                    for segment in bucket.segments:
                        gradient = gradients[segment.index]
                        if gradient is not None:
                            finite &= self._encode(segment, gradient, memory_of, exchange.message, turn)
            with watch.span("exchange"):
                exchange.start(world)
        present = [gradient is not None for gradient in gradients]
        status = excuse
        if status == header.VOTES:
            status = header.NON_FINITE if not finite else header.VOTES if any(present) else header.NO_GRADIENT
        with watch.span("exchange"):
            sheets = header.exchange_sheets(world, status, present, step)

        ties = np.zeros(1, np.int64)
        for bucket, exchange in zip(buckets, self.exchanges, strict=True):
            self._settle(bucket, exchange, sheets, turn, watch, ties)
        counted = np.zeros_like(ties)
        tally = world.comm.Iallreduce(ties, counted) if self.method.rule.votes else None

        self._decisions = []
        for bucket, exchange in zip(buckets, self.exchanges, strict=True):
            with watch.span("exchange"):
                decision = exchange.finish(world, f"step {step}, bucket {bucket.index}")
            self._decisions.append(decision)
            if excuse != header.JOINED:
                with watch.span("unpack"):
                    for segment in bucket.segments:
                        self._decode(segment, gradients[segment.index], decision, sheets)
        if tally is not None:
            with watch.span("exchange"):
                world.wait(tally, f"step {step}, count of ties")
        return sheets, int(counted[0]) if tally is not None else None

    def _settle(
        self,
        bucket: Bucket,
        exchange: Exchange,
        sheets: header.Sheets,
        turn: Turn,
        watch: Stopwatch,
        ties: npt.NDArray[np.int64],
    ) -> None:
        def decide(messages: Sequence[npt.NDArray[Any]], out: npt.NDArray[Any], start: int) -> None:
            before = watch.seconds["decide"]
            with watch.span("decide"):
                runs = runs_of(bucket, sheets.voters)
                tied = decide_runs(self.method.rule, turn, bucket, runs, messages, out, start)
            if exchange.counts_ties_for(self.world.rank):
                ties[0] += tied
            watch.seconds["exchange"] -= watch.seconds["decide"] - before  # the span around us counts it too

        with watch.span("exchange"):
            exchange.settle(decide, self.world, f"step {self._latest}, bucket {bucket.index}")

    def _report(
        self, step: int, watch: Stopwatch, roll: header.Roll, sheets: header.Sheets | None, ties: int | None
    ) -> StepReport:
        status = sheets.status if sheets is not None else (header.JOINED,) * self.world.size
        headers = roll.bytes_sent
        messages = 0
        if sheets is not None:
            headers += sheets.bytes_sent + (0 if ties is None else 8 * (self.world.size - 1))
            messages = sum(exchange.bytes_sent for exchange in self.exchanges)
        return StepReport(
            step=step,
            method=self.method.name,
            exchange=tuple(exchange.name for exchange in self.exchanges),
            bytes_sent=messages + headers,
            header_bytes=headers,
            voters=tuple(rank for rank, code in enumerate(status) if code == header.VOTES),
            abstentions={r: header.REASONS[code] for r, code in enumerate(status) if code != header.VOTES},
            skipped=sheets is None or not any(sheets.voters),
            ties=ties,
            seconds=dict(watch.seconds),
            _agreement=((lambda: self._agreement(step, sheets)) if self.method.rule.votes and sheets else None),
        )

    # -------------------------------------------------------------------------------------- one parameter

    def _gradient(self, index: int) -> torch.Tensor | None:
        """The parameter's gradient as a flat vector in wire order, or None."""
        parameter, name = self.layout.parameters[index], self.layout.names[index]
        gradient = parameter.grad
        if gradient is None:
            return None
        if gradient.layout != torch.strided:
            raise GradientError(
                f"rank {self.world.rank}: the gradient of {name!r} is {gradient.layout}; use sparse=False in the "
                f"embedding, or densify it with p.grad = p.grad.to_dense()"
            )
        if gradient.dtype not in DTYPES or gradient.device.type != "cpu":
            raise GradientError(
                f"rank {self.world.rank}: the gradient of {name!r} is {gradient.dtype} on {gradient.device}; "
                f"this release votes on floating-point CPU tensors only"
            )
        if not is_laid_as(gradient, self.layout.strides[index]):
            # Another order of elements than the others expect (or overlapping memory): put it in order.
            ordered = self._new_gradient(index, gradient.dtype)
            ordered.copy_(gradient)
            parameter.grad = gradient = ordered
        return torch.as_strided(gradient, (gradient.numel(),), (1,), gradient.storage_offset())

    def _new_gradient(self, index: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty_strided(self.layout.parameters[index].shape, self.layout.strides[index], dtype=dtype)

    def _encode(
        self, segment: Segment, gradient: torch.Tensor, memory_of: MemoryOf, message: npt.NDArray[Any], turn: Turn
    ) -> bool:
        """Memory, then codec, piece by piece. Returns whether all was finite."""
        states = self._states.get(segment.index)
        if states is None:
            tensors = memory_of(self.layout.parameters[segment.index]) if self.method.memory.fields else {}
            states = self._states[segment.index] = {key: flat(value) for key, value in tensors.items()}
        if segment.numel <= PIECE or not self._piecewise:
            target = message[:, segment.start : segment.stop]
            return self._encode_piece(gradient, states, target, turn, segment.first_word)
        finite = True
        length = self.method.codec.length
        for lo in range(0, segment.numel, PIECE):
            hi = min(lo + PIECE, segment.numel)
            target = message[:, segment.start + length(lo) : segment.start + length(hi)]
            state = {key: value[lo:hi] for key, value in states.items()}
            finite &= self._encode_piece(gradient[lo:hi], state, target, turn, segment.first_word + length(lo))
        return finite

    def _encode_piece(
        self,
        gradient: torch.Tensor,
        state: dict[str, torch.Tensor],
        target: npt.NDArray[Any],
        turn: Turn,
        first_word: int,
    ) -> bool:
        values, finite = self._remember(gradient, state)
        encoded = self.method.codec.encode(values, target, turn, first_word)
        if finite and not encoded:  # the memory itself has overflowed: without this it would never vote again
            for value in state.values():
                value[~torch.isfinite(value)] = 0
        return finite and encoded

    def _remember(self, g: torch.Tensor, state: dict[str, torch.Tensor]) -> tuple[torch.Tensor, bool]:
        """Let the memory take a gradient in. Where it is NaN or Inf, the memory stays as it was."""
        memory = self.method.memory
        dtype = state[memory.fields[0]].dtype if memory.fields else g.dtype
        finite = True
        if memory.fields:  # else the codec's own check is enough, as there is nothing to protect
            finite = host.all_finite(raw_bits(g), format_of(g.dtype))
        if self._unscale != 1.0:
            dtype = state_dtype(dtype)  # 32 bits at least, where small 16-bit gradients do not underflow
        wide = g
        if g.dtype != dtype or self._unscale != 1.0:
            wide = self._scratch("gradient", dtype)[: g.numel()].copy_(g).mul_(self._unscale)
        if finite:
            return memory(wide, state, self._scratch("result", dtype)), True
        if memory.elementwise:
            bad = ~torch.isfinite(wide)
            kept = {key: value[bad] for key, value in state.items()}
            memory(wide, state, self._scratch("result", dtype))
            for key, value in state.items():
                value[bad] = kept[key]
        return wide, False

    def _scratch(self, purpose: str, dtype: torch.dtype) -> torch.Tensor:
        if (purpose, dtype) not in self._scratches:
            self._scratches[purpose, dtype] = torch.empty(self._scratch_size, dtype=dtype)
        return self._scratches[purpose, dtype]

    def _decode(
        self,
        segment: Segment,
        gradient: torch.Tensor | None,
        decision: npt.NDArray[Any],
        sheets: header.Sheets,
    ) -> None:
        parameter = self.layout.parameters[segment.index]
        if not sheets.voters[segment.index]:
            parameter.grad = None
            return
        if gradient is None:
            parameter.grad = self._new_gradient(segment.index, parameter.dtype)
            gradient = flat(parameter.grad)
        self.method.codec.decode(decision[:, segment.start : segment.stop], gradient)

    # ------------------------------------------------------------------------------------------ on request

    def _agreement(self, step: int, sheets: header.Sheets) -> list[float]:
        if step != self._latest:
            raise MpisignError(
                f"the bitmaps of step {step} are gone (the latest is {self._latest}): ask for agreement() "
                f"before the next step"
            )
        if current("agreement()") is not self.world:
            raise MpisignError("this report is of a job that has been shut down: ask for agreement() before shutdown()")
        agree = spoken = 0
        for bucket, exchange, decision in zip(self.layout.buckets, self.exchanges, self._decisions, strict=True):
            for segment in bucket.segments:
                if self.world.rank not in sheets.voters[segment.index]:
                    continue
                span = slice(segment.start, segment.stop)
                same, both = host.agreement(
                    exchange.message[0, span],
                    decision[0, span],
                    segment.numel,
                    exchange.message[1, span] if self._up > 1 else None,
                    decision[1, span] if self._down > 1 else None,
                )
                agree, spoken = agree + same, spoken + both
        share = agree / spoken if spoken else float("nan")
        return self.world.gather(share, "agreement()")
