"""One step's exchange: open, submit each batch, close, commit.

A message travels while the next is packed: its first phase starts as soon as it is filled, and its header with it. All
that a round writes until it commits are its plan's buffers, and, if it is ``reversible``, second buffers of the memory:
it can be dropped and run again, with the same coins.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from operator import attrgetter
from typing import Any

import numpy as np
import torch

from mpisign.backends import First
from mpisign.errors import MpisignError
from mpisign.exchange import handover, header, reporting
from mpisign.exchange.decider import Deciding
from mpisign.exchange.flight import Flight
from mpisign.exchange.handover import Handover
from mpisign.exchange.header import Bools, Handshake, Heard
from mpisign.exchange.local import clipped, unscaled
from mpisign.exchange.packed import Packed, rows_of_zeros
from mpisign.exchange.plan import Batch, Plan
from mpisign.exchange.settling import settled
from mpisign.exchange.sink import Sink
from mpisign.exchange.sums import sum_over_ranks
from mpisign.exchange.ties import Ties
from mpisign.group import Channels
from mpisign.layout import Bucket
from mpisign.method import Method
from mpisign.policy import StepContext
from mpisign.report import StepReport
from mpisign.rules import VectorRule
from mpisign.session import Session, current
from mpisign.watchdog import Pending

__all__ = ["Round"]

Grads = Sequence[torch.Tensor | None]


class Round:
    """One exchange over a plan. All calls are **collective**; every rank makes the same, in the same order.

    Args:
        step: number of this exchange, equal on all ranks.
        abstention: ``header.VOTES``, or why this rank abstains whatever its gradients are.
        unscale: factor that takes a loss scale out of the gradients.
        intent: what this rank says of itself.
        reversible: write the memory to second buffers, so that the round can be dropped; always where the job outlives
            its ranks.
        session: default the present one.

    Attributes:
        plan: after :meth:`begin` maybe another one.
        submitted: how many batches.
        summed: sums were made anew, as ranks have come or gone: who drops it must have that done again.
    """

    def __init__(
        self,
        plan: Plan,
        step: int,
        *,
        abstention: int = header.VOTES,
        unscale: float = 1.0,
        intent: header.Intent = header.Intent(),  # noqa: B008 - it is frozen
        reversible: bool = False,
        session: Session | None = None,
    ) -> None:
        self.plan, self._step, self._abstention, self._unscale = plan, step, abstention, unscale
        self._session = session or current()
        self._intent, self._reversible = intent, reversible or self._session.membership is not None
        self._handover: Handover | None = None  # after settle()
        self._began = self._opened = self._session.tracer.mark()
        group = self._session.group
        self._context = plan.policy.context(step, group.rank, group.size, plan.store.secret, group.identities)
        self._flights: list[Flight] = []
        self._ended: dict[str, int] = {}  # by method: the parameter at which this rank's ballot has ended
        self._unfit = False  # its gradients are not finite, and must not be taken in, as they could not be clipped
        self._contexts: dict[str, StepContext] = {}  # by method, after what it had to see first
        self._landed = 0  # how many flights are over
        self._begun = False
        self._packed: deque[Packed] = deque()  # and not sent yet
        self._uncounted = 0  # operations that were over before others have come to this step
        self.submitted = 0
        self.summed = False
        self.handshake: Handshake | None = None
        self._dropped = 0, 0  # bytes of headers and messages that were dropped for it

    @property
    def agreed(self) -> Handshake:
        """The handshake, after :meth:`open`."""
        assert self.handshake is not None
        return self.handshake

    # ---------------------------------------------------------------------------------------------- phases

    def intend(self, intent: header.Intent) -> None:
        """Say something else of this rank than what the round was made with."""
        self._intent = intent

    def open(self) -> Handshake:
        """Make sure that all ranks mean the same bits by the same step.

        Raises:
            ConsistencyError: on every rank, naming those that differ and in what. Nothing has been changed.
        """
        plan, session = self.plan, self._session
        self._opened = session.tracer.mark()
        intent = dataclasses.replace(self._intent, fresh=not plan.use.settled)
        with session.tracer.stepping(self._step):
            self.handshake = header.shake_hands(
                session, plan.layout, plan.fingerprint, plan.settings, plan.told, self._step, intent
            )
        return self.handshake

    def replace(self, opened: Round, dropped: Round) -> None:
        """Stand for a round that was opened, as what had left for this step is dropped; its report tells of all."""
        self.handshake, self._opened = opened.handshake, opened._opened
        self._began = min(opened._began, dropped._began)
        sent = [(dropped.plan.headers[at], dropped.plan.exchanges[at]) for at in range(len(dropped._flights))]
        self._dropped = sum(told.bytes_sent for told, _ in sent), sum(said.bytes_sent for _, said in sent)

    def begin(self, remake: Callable[[], Plan] | None = None) -> None:
        """Get everything ready for the first message. Before the handshake only where the plan is settled.

        Args:
            remake: makes the plan anew, if some rank has a new one and what it needs is not to be had.
        """
        plan, session = self.plan, self._session
        if self._begun or (self.handshake is not None and self.handshake.all_joined):
            return
        if self.handshake is not None and self.handshake.fresh:
            with session.tracer.stepping(self._step), session.watchdog.unbroken(f"step {self._step}"):
                plan = self.plan = settled(plan, session, remake)
        self._begun = True
        plan.use.step = self._step
        if self._reversible:
            plan.store.draft()
        if plan.store.unsummed:
            with self._inside(), torch.no_grad():
                sum_over_ranks(plan, self._context, session)
            self.summed = True
        if plan.counts is not None:
            with self._inside():
                plan.counts.zero_()

    @torch.no_grad()
    def prepare(self, gradients: Grads) -> None:
        """Show all gradients to what must see them before any is taken in: clipping, and methods.

        Args:
            gradients: by parameter.
        """
        if self.plan.clip is not None and self._abstention == header.VOTES and not self.plan.exchanges_models:
            with self._inside(), self._session.tracer.span("pack"):
                self._clip(gradients, self.plan.clip)
        for number, method in enumerate(self.plan.layout.methods):
            if method.memory.needs_all and not method.exchanges_models:
                with self._inside():
                    self._prepare(number, method, gradients)

    @torch.no_grad()
    def submit(self, batch: Batch, gradients: Grads, *, wait: bool = True) -> None:
        """Encode a batch's buckets and send them. All batches are submitted once, in the order of the plan.

        Args:
            gradients: in the order of ``batch.places``; None where this rank has none.
            wait: until it is encoded; else it is sent in a later call, if a GPU has not done so yet.
        """
        with self._inside():
            self._packed.append(self._encode(batch, gradients))
            self.submitted += 1
            if wait:
                self._send_packed(wait=True)
        if not wait:
            self.advance()

    @torch.no_grad()
    def advance(self) -> bool:
        """Go on with what has arrived, without waiting. Returns whether all that was submitted has been decided."""
        with self._inside(aside=True):
            self._send_packed(wait=False)
            while self._go_on():
                pass
        return self._landed == len(self._flights) and not self._packed

    @torch.no_grad()
    def close(self) -> None:
        """Wait until every message is decided here."""
        with self._inside():
            self._session.count(self._uncounted)
            self._uncounted = 0
            self._send_packed(wait=True)
            while under_way := [flight for flight in self._flights[self._landed :] if flight.pending is not None]:
                self._move(min(under_way, key=attrgetter("phase")), wait=True)

    def settle(self) -> None:
        """After :meth:`close`: hear all that a commit needs, so that nothing can keep this rank from it any more."""
        if not self.agreed.all_joined:
            self._audit()
            with self._inside():
                self._handover = handover.settled(self.plan, self._step, self._flights, self.agreed, self._session)

    def _audit(self) -> None:
        """Raise AuditError on all ranks if one is found to have lied."""
        if self.plan.audit is not None and self._handover is None:
            with self._inside():
                said = [(flight.said, self._context_of(flight.bucket.method)) for flight in self._flights]
                lie = self.plan.audit.recount(self._session, said)
            if lie is not None:
                raise lie

    def told(self) -> bytes:
        """What another rank needs to end this round; see :class:`mpisign.membership.Act`."""
        assert self._handover is not None
        return self._handover.told()

    @torch.no_grad()
    def take(self, told: bytes) -> None:
        """End it with what another rank has told, instead of :meth:`close` and :meth:`settle`."""
        with self.plan.use():
            self._handover = handover.taken(self.plan, self._step, self._flights, told, self._deciding)
        self.handshake, self._landed = self._handover.handshake, len(self._flights)

    def abandon(self, count: int) -> None:
        """Submit nothing up to the ``count``-th batch, and drop the round: no more has left on any rank."""
        self.begin()
        self._abstention = header.JOINED
        for batch in self.plan.batches[self.submitted : count]:
            self.submit(batch, [None] * len(batch.places))
        self.drop()

    def drop(self) -> None:
        """Wait for what was submitted, the same on all ranks, and forget the round.

        Raises:
            MpisignError: the round is not reversible.
        """
        if not self._reversible:
            raise MpisignError("this round has changed the memory: only one that is reversible can be dropped")
        self.close()
        self.plan.store.drop()
        self.plan.store.unsummed |= self.summed

    @torch.no_grad()
    def commit(self, sink: Sink) -> StepReport:
        """Write all decisions to where they belong; memories hear what has counted. Returns the report."""
        plan, session = self.plan, self._session
        session.committed(plan.group.identities)
        if self.handshake is not None and self.handshake.all_joined:
            return self._report([], True, None)
        self._audit()
        said = [flight.said for flight in self._flights]
        with self._inside():
            skipped = not any(bool(heard.votes.any()) for heard in said)
            ties = Ties(plan, self._step, self._flights, session) if self._handover is None else self._handover.ties
            if plan.answers is None:
                ties.add_up()
            ties.ask()
            for batch in plan.batches:
                heard = [said[bucket.index] for bucket in batch.buckets]
                with session.tracer.span("unpack", batch.buckets[0].index):
                    if batch.method.memory.feedback:
                        batch.encoder.sent([vote for its in heard for vote in its.votes[plan.group.rank].tolist()])
                    if not skipped:  # else nothing is applied, and a CUDA graph may own the gradients
                        batch.decoder.decode(heard, sink, self._context_of(batch.method))
                    for bucket, its in zip(batch.buckets, heard, strict=True):
                        if its.votes.any():
                            plan.deciders[bucket.index].remember(plan.exchanges[bucket.index].decision)
            if plan.answers is not None:  # who asks a GPU lets it unpack meanwhile
                ties.add_up()
            plan.store.commit()
            for bucket, its in zip(plan.layout.buckets, said, strict=True):
                for place in np.flatnonzero(np.any(its.zero_rows, axis=0)).tolist():
                    plan.store.rows.add(plan.layout.parameters[bucket.segments[place].index])
            count = ties.counted()
        return self._report(said, skipped, count)

    # --------------------------------------------------------------------------------------------- inside

    @contextlib.contextmanager
    def _inside(self, *, aside: bool = False) -> Iterator[None]:
        """In the step, on the device: an interruption leaves the others in the middle of something."""
        session = self._session
        with (
            session.tracer.stepping(self._step),
            session.watchdog.unbroken(f"step {self._step}"),
            self.plan.use(aside=aside),
        ):
            yield

    @property
    def _channels(self) -> Channels:
        """What its messages cross."""
        return self.plan.use.channels or self._session.group.channels

    def _context_of(self, method: Method) -> StepContext:
        return self._contexts.get(str(method), self._context) if self._contexts else self._context

    def _clip(self, gradients: Grads, clip: float) -> None:
        plan = self.plan
        segments = [segment for batch in plan.batches for segment in batch.encoder.segments]
        first = int(plan.backend.first_bad([gradients[segment.index] for segment in segments]))
        if first < len(segments):
            self._unfit = True
            self._ended = {str(method): segments[first].index for method in plan.layout.methods}
        else:
            self._unscale = clipped(plan.backend, gradients, self._unscale, clip)

    def _prepare(self, number: int, method: Method, gradients: Grads) -> None:
        plan, session = self.plan, self._session
        segments = [s for batch in plan.batches if batch.method is method for s in batch.encoder.segments]
        its = [gradients[segment.index] for segment in segments]
        prepared: Any = None
        votes = self._abstention == header.VOTES and str(method) not in self._ended
        if votes:
            with session.tracer.span("pack"):
                first = int(plan.backend.first_bad(its))
                if first < len(its):
                    self._ended[str(method)], votes = segments[first].index, False
                else:
                    prepared = method.memory.prepare(unscaled(its, self._unscale), self._context)
        if number in plan.maxima:
            heard: Grads = its if votes else [None] * len(its)
            prepared = plan.maxima[number].over_ranks(heard, self._unscale, session)
        if prepared is not None:
            self._contexts[str(method)] = dataclasses.replace(self._context, prepared=prepared)

    def _encode(self, batch: Batch, gradients: Grads) -> Packed:
        method = batch.method
        first: First | None = None
        abstains = self._abstention != header.VOTES or self._unfit
        with self._session.tracer.span("pack", batch.buckets[0].index):
            if not abstains and not (str(method) in self._ended and method.memory.needs_all):
                first = batch.encoder.encode(gradients, self._context_of(method), self._unscale)
            return Packed(self.plan, batch, np.array([gradient is not None for gradient in gradients], np.bool_), first)

    def _send_packed(self, *, wait: bool) -> None:
        while self._packed and (wait or self._packed[0].ready()):
            self._send_batch(self._packed.popleft())

    def _send_batch(self, packed: Packed) -> None:
        plan, tracer, batch, votes = self.plan, self._session.tracer, packed.batch, packed.votes
        method, segments, key = batch.method, batch.encoder.segments, str(batch.method)
        wholly = isinstance(method.rule, VectorRule) or method.memory.needs_all
        with tracer.span("pack", batch.buckets[0].index):
            end, zeros = packed.told()  # the place at which this rank's ballot ends
            if end < len(segments):
                batch.encoder.recover()
        if end < len(segments) and key not in self._ended:
            self._ended[key] = segments[end].index
            votes[0 if wholly else end :] = False
        elif self._abstention != header.VOTES or key in self._ended:
            votes[:] = False
        zero_rows, spoken = rows_of_zeros(plan, batch, votes, zeros)
        with tracer.span("send", batch.buckets[0].index):
            for bucket in () if packed.pushed else batch.buckets:
                plan.exchanges[bucket.index].push()
            at = 0
            for bucket in batch.buckets:
                span = slice(at, at + len(bucket.segments))
                at = span.stop
                self._send(bucket, votes[span], zero_rows[span], spoken.get(bucket.index))

    def _send(self, bucket: Bucket, votes: Bools, zero_rows: Bools, spoken: dict[int, Bools] | None) -> None:
        session = self._session
        ended = self._ended.get(str(bucket.method))
        status, place = self._abstention, -1
        if status == header.VOTES and ended is not None:
            status = header.NON_FINITE
            place = next((at for at, segment in enumerate(bucket.segments) if segment.index == ended), -1)
        told = self.plan.headers[bucket.index].post(session, self._channels, status, votes, place, zero_rows, spoken)
        posted = self.plan.exchanges[bucket.index].post(session, self._channels)
        self._flights.append(Flight(bucket, told, posted))

    # ------------------------------------------------------------------------------------------- progress

    def _go_on(self) -> bool:
        """Bring what has arrived one phase further, without waiting. Returns whether there was something."""
        moved, behind = False, sys.maxsize  # a message begins no phase before those in front of it have
        for flight in self._flights[self._landed :]:
            if flight.pending is None:
                continue
            if flight.phase < behind:
                moved |= self._move(flight, wait=False)
                if flight.pending is not None:
                    behind = flight.phase
            if behind == 0:
                break
        return moved

    def _move(self, flight: Flight, *, wait: bool) -> bool:
        """Bring one message into its next phase, if this one is over. Returns whether it was."""
        session, index = self._session, flight.bucket.index
        if flight.header is not None:
            with session.tracer.span("header", index):
                if not self._over(flight.header, wait):
                    return False
                flight.header = None
                flight.heard = self.plan.headers[index].heard(session)
                flight.deciding = self._deciding(flight.bucket, flight.heard)
        assert flight.pending is not None
        assert flight.deciding is not None
        with session.tracer.span(f"phase {flight.phase + 1}", index):
            if not self._over(flight.pending, wait):
                return False
        with session.tracer.span("send", index):
            exchange = self.plan.exchanges[index]
            flight.pending = exchange.go_on(session, self._channels, flight.phase, flight.deciding)
        flight.phase += 1
        while self._landed < len(self._flights) and self._flights[self._landed].pending is None:
            self._landed += 1
        return True

    def _over(self, pending: Pending, wait: bool) -> bool:
        if wait:
            self._session.wait(pending)
            return True
        over = self._session.test(pending)
        self._uncounted += over
        return over

    def _deciding(self, bucket: Bucket, heard: Heard) -> Deciding:
        plan, tracer = self.plan, self._session.tracer
        context = self._context_of(bucket.method)
        span = functools.partial(tracer.span, "decide", bucket.index)
        return Deciding(plan.deciders[bucket.index], heard, context, plan.counts, span)

    # --------------------------------------------------------------------------------------------- the end

    def _report(self, said: Sequence[Heard], skipped: bool, ties: int | None) -> StepReport:
        assert self.handshake is not None
        tracer = self._session.tracer
        exposed = tracer.seconds(self._opened)["exchange"]
        membership = self._session.membership
        times = tracer.seconds(self._began), exposed, 0.0 if membership is None else membership.seconds()
        return reporting.report(self.plan, self._step, self.handshake, said, skipped, ties, times, self._dropped)
