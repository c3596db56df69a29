"""One step from local gradients to the common decision: handshake, pack, exchange, decide, unpack.

A bucket travels while the next one is packed: its first phase starts as soon as it is full. Decisions wait for
the participation headers, which are posted when packing ends, so that a NaN in the last gradient still withdraws the
rank's whole ballot; by then the first phase of every bucket is on its way and the network never idles.

On a GPU launches cost more than they overlap: all buckets are packed in one, then leave one after the other.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from mpisign.bitmap import ops
from mpisign.bitmap.ops import Count, Flag
from mpisign.errors import ConsistencyError, MpisignError, SynchronizationError
from mpisign.exchange import header
from mpisign.exchange.aggregator import Aggregator
from mpisign.exchange.choose import Exchange, cap_bytes, choose, shards_for
from mpisign.exchange.decoder import Decoder
from mpisign.exchange.encoder import Encoder
from mpisign.exchange.gradients import Gradients
from mpisign.exchange.maximum import Maximum
from mpisign.exchange.runs import decide_runs, runs_of
from mpisign.exchange.sums import sum_over_ranks
from mpisign.layout import Bucket, Layout
from mpisign.memory import Identity
from mpisign.memory.store import MemoryStore
from mpisign.method import Method
from mpisign.policy import Policy, StepContext
from mpisign.report import StepReport
from mpisign.session import Session, current
from mpisign.watchdog import Pending

__all__ = ["Pipeline"]


class Pipeline:
    """Everything a step needs, allocated once: the exchanges with their buffers, and scratch.

    Args:
        named: (name, parameter) in registration order; all ranks must have the same.
        method, policy: what is sent and how it is decided.
        exchange: ``"auto"``, ``"allgather"`` or ``"two_phase"``.
        bucket_cap_mb: a message leaves when it has grown to so many MiB; None for the default.
        store: where the memory's state is kept.
        session: the job, for the size of its group; a pipeline is of no use to another.
        number: which of the job's optimizers this is, so that two alike are not mistaken for each other.
    """

    def __init__(
        self,
        named: Sequence[tuple[str, torch.Tensor]],
        method: Method,
        policy: Policy,
        exchange: str,
        bucket_cap_mb: float | None,
        store: MemoryStore,
        session: Session,
        number: int,
    ) -> None:
        group = session.group
        if group.generation:
            method.rule.check_left(group.identities)
        else:
            method.rule.check(group.size)
        shards = shards_for(exchange, method, group.size)
        layout = Layout(
            named, method.codec, cap_bytes(bucket_cap_mb, group), whole=not method.rule.shardable, shards=shards
        )
        self.layout, self.method, self.policy = layout, method, policy
        self.made_for = session, group.generation
        self.settings = (f"optimizer {number} of the job", f"method {method}", repr(policy), f"exchange {exchange!r}")
        self.fingerprint = layout.fingerprint(self.settings)
        self._up, down = method.codec.planes_up(policy), method.rule.planes_down(method.codec, policy, group.size)
        self._down = 0 if method.by_value else down
        self.exchanges: list[Exchange] = [
            choose(exchange, method, bucket.length, bucket.dtype, self._up, self._down, group, layout.device)
            for bucket in layout.buckets
        ]
        self._given = Gradients(layout, group.rank)
        messages = [exchange.message for exchange in self.exchanges]
        sending = dataclasses.replace(method, memory=Identity()) if method.exchanges_models else method
        self._encoder = self._local = Encoder(layout, sending, messages, store.of, self._given.locate)
        if method.exchanges_models:
            self._local = Encoder(layout, method, messages, store.of, self._given.locate)
        self._decoder = Decoder(layout, method, self.exchanges, self._encoder)
        self._maximum = Maximum(layout, group) if method.memory.needs_maximum else None
        self._aggregator = Aggregator(layout, method, store.piece)
        store.sharded = shards > 1
        self._store = store
        self._previous = [
            store.remembered(layout, bucket) if method.rule.remembers else None for bucket in layout.buckets
        ]
        together = ops.kernels_for(layout.device) is not None
        self._groups = [list(layout.buckets)] if together else [[bucket] for bucket in layout.buckets]
        # Ties that enter the job's count, and others: kernels add them up where they are.
        self._counts = torch.zeros(2, dtype=torch.int64, device=layout.device) if together else None
        self._ended: torch.cuda.Event | None = None
        if layout.device.type == "cuda":
            self._ended = torch.cuda.Event()
            self._ended.record(torch.cuda.current_stream(layout.device))  # the buffers are zero from here on
        self._latest = -1

    def fits(self, parameters: Sequence[torch.Tensor]) -> bool:
        """Whether it was made for these parameters, as they are now."""
        return self._given.fits(parameters)

    # -------------------------------------------------------------------------------------------- a step

    @torch.no_grad()
    def run(self, step: int, abstention: int = header.VOTES, unscale: float = 1.0) -> StepReport:
        """Turn every ``p.grad`` into the decision, in place. **Collective.**

        Parameters on which nobody votes end with ``p.grad = None``, unless nobody votes at all; those that have a
        gradient elsewhere only get one here. A method that exchanges models works on the parameters themselves instead.

        Args:
            step: number of this exchange, equal on all ranks.
            abstention: ``header.VOTES``, or why this rank abstains whatever its gradients are.
            unscale: factor that takes a loss scale out of the gradients.

        Raises:
            ConsistencyError: ranks differ in step or layout. No gradient and no memory has been changed.
            GradientError: a gradient is sparse or of an unsupported type.
        """
        given = self._given.models() if self.method.exchanges_models else self._given.read()
        return self._run(step, given, abstention, unscale, None)[1]

    @torch.no_grad()
    def local_update(self, step: int, unscale: float) -> bool:
        """Turn every ``p.grad`` into what the memory makes of it, for a step of this rank alone.

        Returns:
            Whether all of it was finite. If not, the memory has been protected, and the gradients are worth nothing.
        """
        with self._on_device():
            return self._local.local_update(self._given.read(), self._context(step), unscale)

    def _context(self, step: int) -> StepContext:
        group = current().group
        return self.policy.context(step, group.rank, group.size, self._store.secret, group.identities)

    @torch.no_grad()
    def sit_out(self, step: int, joined_for: int) -> tuple[header.Handshake, StepReport]:
        """Take part in a step without a gradient, after ``join()``; no parameter changes here. **Collective.**"""
        if self.method.exchanges_models:
            raise SynchronizationError(
                f"{self.method.name} exchanges models, which no rank can sit out: give all the same number of batches"
            )
        nothing: list[torch.Tensor | None] = [None] * len(self.layout.parameters)
        return self._run(step, nothing, header.JOINED, 1.0, joined_for)

    def _run(
        self,
        step: int,
        gradients: Sequence[torch.Tensor | None],
        abstention: int,
        unscale: float,
        joined_for: int | None,
    ) -> tuple[header.Handshake, StepReport]:
        session = current()
        began = session.tracer.mark()
        with session.tracer.stepping(step):
            handshake = header.shake_hands(session, self.layout, self.fingerprint, self.settings, step, joined_for)
            if handshake.all_joined:
                return handshake, self._report(step, session, began, handshake, None, None)
            self._latest = step
            with session.watchdog.unbroken(f"step {step}"), self._on_device():
                if self._store.unsummed:
                    sum_over_ranks(self.layout, self._store, self._context(step), session)
                participation, ties = self._exchange(step, session, gradients, abstention, unscale)
        return handshake, self._report(step, session, began, handshake, participation, ties)

    @contextlib.contextmanager
    def _on_device(self) -> Iterator[None]:
        """Select the device; what was done inside the last time, maybe on another stream, comes first."""
        if self._ended is None:
            yield
            return
        with torch.cuda.device(self.layout.device):
            torch.cuda.current_stream().wait_event(self._ended)
            yield
            self._ended.record()

    def _exchange(
        self,
        step: int,
        session: Session,
        gradients: Sequence[torch.Tensor | None],
        abstention: int,
        unscale: float,
    ) -> tuple[header.Participation, int | None]:
        """All of a step but the handshake. Returns who voted, and the ties."""
        span, context = session.tracer.span, self._context(step)
        present = [gradient is not None for gradient in gradients]
        status = abstention if abstention != header.VOTES or any(present) else header.NO_GRADIENT
        if status == header.VOTES:
            with span("pack"):
                context, finite = self._encoder.begin(gradients, context, unscale)
            status = header.VOTES if finite else header.NON_FINITE
        if self._maximum is not None:
            heard = gradients if status == header.VOTES else [None] * len(gradients)
            bounds = self._maximum.over_ranks(heard, unscale, session)
            context = dataclasses.replace(context, prepared=bounds)
        encoded = status == header.VOTES
        status = self._send(session, gradients, status, context)
        participation = header.exchange_participation(session, status, present)
        voters = participation.voters
        if status == header.VOTES:
            with span("pack"):
                self._encoder.sent(gradients, voters, session.rank)

        ties: Count = 0
        if self._counts is not None:
            self._counts.zero_()
        for bucket, exchange in zip(self.layout.buckets, self.exchanges, strict=True):
            ties = ties + self._settle(session, bucket, exchange, self._whole(voters), context)
        if self._counts is not None and self.method.rule.votes:
            with span("decide"):
                ties = int(ties) + int(self._counts[0])
        counting, counted = np.array([[int(ties)], [0]], np.int64)
        tally: Pending | None = None
        if self.method.rule.votes:
            tally = session.post(session.group.comm.Iallreduce(counting, counted), counting, counted)

        located = self._encoder.located if encoded else None
        for group in self._groups:
            for bucket in group:
                self.exchanges[bucket.index].finish(session, bucket.index)
                self._remember(bucket)
            with span("unpack", group[0].index):
                if abstention == header.JOINED:
                    self._decoder.follow(group, voters, context)
                elif any(voters):  # else nothing is applied, and a CUDA graph may own the gradients
                    self._decoder.decode(group, gradients, voters, context, located)
        if tally is None:
            return participation, None
        with span("count of ties"):
            session.wait(tally)
        return participation, self._checked(int(counted[0]))

    def _checked(self, ties: int) -> int:
        """The ties of all ranks, if there can be so many."""
        if not 0 <= ties <= sum(parameter.numel() for parameter in self.layout.parameters):
            raise ConsistencyError(
                f"step {self._latest}: the ranks have counted {ties} ties together, which cannot be: run the same "
                f"version of mpisign on every rank, and only processes that you trust"
            )
        return ties

    def _send(
        self, session: Session, gradients: Sequence[torch.Tensor | None], status: int, context: StepContext
    ) -> int:
        """Pack and send, group by group. Returns the status, now that all values have been looked at."""
        flags: list[Flag] = []
        for group in self._groups:
            if status == header.VOTES:
                with session.tracer.span("pack", group[0].index):
                    flags += self._encoder.encode(group, gradients, context)
            with session.tracer.span("send", group[0].index):
                for bucket in group:
                    self.exchanges[bucket.index].push()
                for bucket in group:
                    self.exchanges[bucket.index].start(session)
        if all([bool(flag) for flag in flags]):
            return status
        self._encoder.recover()
        return header.NON_FINITE

    def _settle(
        self,
        session: Session,
        bucket: Bucket,
        exchange: Exchange,
        voters: Sequence[tuple[int, ...]],
        context: StepContext,
    ) -> Count:
        tied: Count = 0
        counts = exchange.counts_ties_for(session.rank)
        total = None if self._counts is None else self._counts[0 if counts else 1]

        def decide(messages: Sequence[torch.Tensor], out: torch.Tensor, start: int) -> None:
            nonlocal tied
            with session.tracer.span("decide", bucket.index):
                if self.method.rule.reencodes:
                    self._aggregator.decide(bucket, voters, context, messages, out, start)
                elif not self.method.by_value:
                    runs, previous = runs_of(bucket, voters), self._previous[bucket.index]
                    tied = decide_runs(
                        self.method.rule, context, bucket, runs, messages, out, start, previous=previous, tied=total
                    )

        exchange.settle(decide, session, bucket.index)
        return tied if counts else 0

    def _whole(self, voters: Sequence[tuple[int, ...]]) -> Sequence[tuple[int, ...]]:
        """For rules on whole vectors, whoever votes at all votes on everything, with zeros where it has none."""
        if self.method.rule.shardable:
            return voters
        everybody = tuple(sorted({rank for ranks in voters for rank in ranks}))
        return [everybody] * len(voters)

    def _remember(self, bucket: Bucket) -> None:
        previous = self._previous[bucket.index]
        if previous is not None:
            previous.copy_(self.exchanges[bucket.index].decision)

    def _report(
        self,
        step: int,
        session: Session,
        began: int,
        handshake: header.Handshake,
        participation: header.Participation | None,
        ties: int | None,
    ) -> StepReport:
        status = participation.status if participation is not None else (header.JOINED,) * session.size
        headers = handshake.bytes_sent
        messages = 0
        if participation is not None:
            headers += participation.bytes_sent + (0 if ties is None else 8 * (session.size - 1))
            messages = sum(exchange.bytes_sent for exchange in self.exchanges)
            messages += self._maximum.bytes_sent if self._maximum is not None else 0
        return StepReport(
            step=step,
            method=self.method.name,
            exchange=tuple(exchange.name for exchange in self.exchanges),
            bytes_sent=messages + headers,
            header_bytes=headers,
            voters=tuple(rank for rank, code in enumerate(status) if code == header.VOTES),
            abstentions={r: header.REASONS[code] for r, code in enumerate(status) if code != header.VOTES},
            skipped=participation is None or not any(participation.voters),
            ties=ties,
            seconds=session.tracer.seconds(began),
            _agreement=(
                (lambda: self._agreement(step, participation)) if self.method.rule.votes and participation else None
            ),
        )

    # ------------------------------------------------------------------------------------------ on request

    def _agreement(self, step: int, participation: header.Participation) -> list[float]:
        if step != self._latest:
            raise MpisignError(
                f"the bitmaps of step {step} are gone (the latest is {self._latest}): ask for agreement() "
                f"before the next step"
            )
        session = current("agreement()")
        if (session, session.group.generation) != self.made_for:
            raise MpisignError(
                f"the group that voted in step {step} is no more (ranks have left, or mpisign was shut down): ask for "
                f"agreement() before"
            )
        agree: Count = 0
        spoken: Count = 0
        with self._on_device():
            for bucket, exchange in zip(self.layout.buckets, self.exchanges, strict=True):
                for segment in bucket.segments:
                    if session.rank not in participation.voters[segment.index]:
                        continue
                    span = slice(segment.start, segment.stop)
                    same, both = ops.agreement(
                        exchange.message[0, span],
                        exchange.decision[0, span],
                        segment.numel,
                        exchange.message[1, span] if self._up > 1 else None,
                        exchange.decision[1, span] if self._down > 1 else None,
                    )
                    agree, spoken = agree + same, spoken + both
            share = int(agree) / int(spoken) if int(spoken) else float("nan")
        heard = session.gather_bytes(np.float64(share).tobytes(), "agreement()", limit=8)
        if any(len(message) != 8 for message in heard):
            raise ConsistencyError("agreement(): a rank has sent no share: run one version of mpisign on every rank")
        return [float(np.frombuffer(message, np.float64)[0]) for message in heard]
