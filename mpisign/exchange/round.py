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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import numpy as np
import torch

from mpisign.backends import Count
from mpisign.errors import ConsistencyError, MpisignError
from mpisign.exchange import header
from mpisign.exchange.agreement import agreement
from mpisign.exchange.decider import Deciding
from mpisign.exchange.header import Bools, Handshake, Heard
from mpisign.exchange.local import clipped, unscaled
from mpisign.exchange.packed import push_and_ask, rows_of_zeros
from mpisign.exchange.plan import Batch, Plan
from mpisign.exchange.settling import settled
from mpisign.exchange.sink import Sink
from mpisign.exchange.sums import sum_over_ranks
from mpisign.layout import Bucket
from mpisign.method import Method
from mpisign.policy import StepContext
from mpisign.report import StepReport
from mpisign.rules import VectorRule
from mpisign.session import current
from mpisign.watchdog import Pending

__all__ = ["Round"]

Grads = Sequence[torch.Tensor | None]


@dataclass
class Flight:
    """A message on its way.

    Attributes:
        header: until it is here.
        pending: its phase; None when the last one is over.
        phase: the number of it.
        heard, deciding: what the headers say, and who decides accordingly, when they are here.
    """

    bucket: Bucket
    header: Pending | None
    pending: Pending | None
    phase: int = 0
    heard: Heard | None = None
    deciding: Deciding | None = None


class Round:
    """One exchange over a plan. All calls are **collective**; every rank makes the same, in the same order.

    Args:
        step: number of this exchange, equal on all ranks.
        abstention: ``header.VOTES``, or why this rank abstains whatever its gradients are.
        unscale: factor that takes a loss scale out of the gradients.
        intent: what this rank says of itself.
        reversible: write the memory to second buffers, so that the round can be dropped.

    Attributes:
        plan: after :meth:`open` maybe another one.
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
    ) -> None:
        self.plan, self._step, self._abstention, self._unscale = plan, step, abstention, unscale
        self._intent, self._reversible = intent, reversible
        self._session = current()
        self._began = self._session.tracer.mark()
        group = self._session.group
        self._channels = group.channels
        self._context = plan.policy.context(step, group.rank, group.size, plan.store.secret, group.identities)
        self._flights: list[Flight] = []
        self._ended: dict[str, int] = {}  # by method: the parameter at which this rank's ballot has ended
        self._unfit = False  # its gradients are not finite, and must not be taken in, as they could not be clipped
        self._contexts: dict[str, StepContext] = {}  # by method, after what it had to see first
        self._landed = 0  # how many flights are over
        self._summed = False  # sums were made anew, as ranks have come or gone: drop() must have that done again
        self.handshake: Handshake | None = None

    # ---------------------------------------------------------------------------------------------- phases

    def open(self, remake: Callable[[], Plan] | None = None) -> Handshake:
        """Make sure that all ranks mean the same bits by the same step.

        Args:
            remake: makes the plan anew, if some rank has a new one and what it needs is not to be had.

        Raises:
            ConsistencyError: on every rank, naming those that differ and in what. Nothing has been changed.
        """
        plan, session = self.plan, self._session
        intent = dataclasses.replace(self._intent, fresh=not plan.use.settled)
        with session.tracer.stepping(self._step):
            self.handshake = header.shake_hands(
                session, plan.layout, plan.fingerprint, plan.settings, plan.told, self._step, intent
            )
            if self.handshake.fresh:
                with session.watchdog.unbroken(f"step {self._step}"):
                    plan = self.plan = settled(plan, session, remake)
        if not self.handshake.all_joined:
            plan.use.step = self._step
            if self._reversible:
                plan.store.draft()
            if plan.store.unsummed:
                with self._inside(), torch.no_grad():
                    sum_over_ranks(plan, self._context, self._session)
                self._summed = True
            if plan.counts is not None:
                plan.counts.zero_()
        return self.handshake

    @torch.no_grad()
    def prepare(self, gradients: Grads) -> None:
        """Show all gradients to what must see them before any is taken in: clipping, and methods.

        Args:
            gradients: by parameter.
        """
        if self.plan.clip is not None and self._abstention == header.VOTES and not self.plan.exchanges_models:
            with self._inside(), self._session.tracer.span("pack"):
                self._clip(gradients)
        for number, method in enumerate(self.plan.layout.methods):
            if method.memory.needs_all and not method.exchanges_models:
                with self._inside():
                    self._prepare(number, method, gradients)

    @torch.no_grad()
    def submit(self, batch: Batch, gradients: Grads) -> None:
        """Encode a batch's buckets and send them. All batches are submitted once, in the order of the plan.

        Args:
            gradients: in the order of ``batch.places``; None where this rank has none.
        """
        with self._inside():
            self._submit(batch, gradients)

    @torch.no_grad()
    def advance(self) -> bool:
        """Go on with what has arrived, without waiting. Returns whether all that was submitted has been decided."""
        with self._inside():
            while self._go_on():
                pass
        return self._landed == len(self._flights)

    @torch.no_grad()
    def close(self) -> None:
        """Wait until every message is decided here."""
        with self._inside():
            while under_way := [flight for flight in self._flights[self._landed :] if flight.pending is not None]:
                self._move(min(under_way, key=attrgetter("phase")), wait=True)

    def drop(self) -> None:
        """Wait for what was submitted, the same on all ranks, and forget the round.

        Raises:
            MpisignError: the round is not reversible.
        """
        if not self._reversible:
            raise MpisignError("this round has changed the memory: only one that is reversible can be dropped")
        self.close()
        self.plan.store.drop()
        self.plan.store.unsummed |= self._summed

    @torch.no_grad()
    def commit(self, sink: Sink) -> StepReport:
        """Write all decisions to where they belong; memories hear what has counted. Returns the report."""
        plan, session = self.plan, self._session
        if self.handshake is not None and self.handshake.all_joined:
            return self._report([], True, None)
        with self._inside():
            said = [self._heard(flight) for flight in self._flights]
            skipped = not any(bool(heard.votes.any()) for heard in said)
            tally = self._count_ties() if plan.answers is None else None
            if plan.answers is not None and plan.counts is not None and plan.elects:
                plan.answers.ask("ties", plan.counts[0])
                plan.answers.asked()
            for batch in plan.batches:
                heard = [said[bucket.index] for bucket in batch.buckets]
                with session.tracer.span("unpack", batch.buckets[0].index):
                    if batch.method.memory.feedback:
                        batch.encoder.sent([vote for its in heard for vote in its.votes[session.rank].tolist()])
                    if not skipped:  # else nothing is applied, and a CUDA graph may own the gradients
                        batch.decoder.decode(heard, sink, self._context_of(batch.method))
                    for bucket, its in zip(batch.buckets, heard, strict=True):
                        if its.votes.any():
                            plan.deciders[bucket.index].remember(plan.exchanges[bucket.index].decision)
            if plan.answers is not None:  # who asks a GPU lets it unpack meanwhile
                tally = self._count_ties()
            plan.store.commit()
            for bucket, its in zip(plan.layout.buckets, said, strict=True):
                for place in np.flatnonzero(np.any(its.zero_rows, axis=0)).tolist():
                    plan.store.rows.add(plan.layout.parameters[bucket.segments[place].index])
            ties = None
            if tally is not None:
                pending, counted = tally
                with session.tracer.span("count of ties"):
                    session.wait(pending)
                ties = self._checked(int(counted[0]))
        return self._report(said, skipped, ties)

    # --------------------------------------------------------------------------------------------- inside

    @contextlib.contextmanager
    def _inside(self) -> Iterator[None]:
        """In the step, on the device: an interruption leaves the others in the middle of something."""
        session = self._session
        with (
            session.tracer.stepping(self._step),
            session.watchdog.unbroken(f"step {self._step}"),
            self.plan.use(),
        ):
            yield

    def _context_of(self, method: Method) -> StepContext:
        return self._contexts.get(str(method), self._context) if self._contexts else self._context

    def _clip(self, gradients: Grads) -> None:
        plan = self.plan
        segments = [segment for batch in plan.batches for segment in batch.encoder.segments]
        first = int(plan.backend.first_bad([gradients[segment.index] for segment in segments]))
        if first < len(segments):
            self._unfit = True
            self._ended = {str(method): segments[first].index for method in plan.layout.methods}
        else:
            self._unscale = clipped(plan, gradients, self._unscale)

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

    def _submit(self, batch: Batch, gradients: Grads) -> None:
        plan, tracer = self.plan, self._session.tracer
        method, segments, key = batch.method, batch.encoder.segments, str(batch.method)
        abstains = self._abstention != header.VOTES
        wholly = isinstance(method.rule, VectorRule) or method.memory.needs_all
        end = len(segments)  # the place at which this rank's ballot ends
        pushed, zeros = False, None
        if not abstains and not self._unfit and not (key in self._ended and method.memory.needs_all):
            with tracer.span("pack", batch.buckets[0].index):
                first = batch.encoder.encode(gradients, self._context_of(method), self._unscale)
                if pushed := plan.answers is not None and not plan.told:  # else rows of zeros may change messages yet
                    end, zeros = push_and_ask(plan, batch, first)
                else:
                    end = int(first)
                if end < len(segments):
                    batch.encoder.recover()
        votes = np.array([gradient is not None for gradient in gradients], np.bool_)
        if end < len(segments) and key not in self._ended:
            self._ended[key] = segments[end].index
            votes[0 if wholly else end :] = False
        elif abstains or key in self._ended:
            votes[:] = False
        zero_rows, spoken = rows_of_zeros(plan, batch, votes, zeros)
        with tracer.span("send", batch.buckets[0].index):
            for bucket in () if pushed else batch.buckets:
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
        return self._session.test(pending)

    def _deciding(self, bucket: Bucket, heard: Heard) -> Deciding:
        plan, tracer = self.plan, self._session.tracer
        context = self._context_of(bucket.method)
        span = functools.partial(tracer.span, "decide", bucket.index)
        return Deciding(plan.deciders[bucket.index], heard, context, plan.counts, span)

    def _heard(self, flight: Flight) -> Heard:
        assert flight.heard is not None
        return flight.heard

    # --------------------------------------------------------------------------------------------- the end

    def _count_ties(self) -> tuple[Pending, np.ndarray] | None:
        """Begin to add up the ranks' ties."""
        plan, session = self.plan, self._session
        if not plan.elects:
            return None
        counting_ties = [flight.deciding for flight in self._flights if flight.bucket.method.elects and flight.deciding]
        ties: Count = sum(deciding.ties for deciding in counting_ties)
        if plan.answers is not None:
            with session.tracer.span("decide"):
                ties = int(ties) + plan.answers.told("ties")
        counting, counted = np.array([[int(ties)], [0]], np.int64)
        return session.post(session.group.comm.Iallreduce(counting, counted), counting, counted), counted

    def _checked(self, ties: int) -> int:
        """The ties of all ranks, if there can be so many."""
        if not 0 <= ties <= self.plan.layout.elements:
            raise ConsistencyError(
                f"step {self._step}: the ranks have counted {ties} ties together, which cannot be: run the same "
                f"version of mpisign on every rank, and only processes that you trust"
            )
        return ties

    def _report(self, said: Sequence[Heard], skipped: bool, ties: int | None) -> StepReport:
        plan, session = self.plan, self._session
        assert self.handshake is not None
        others = session.size - 1
        headers = self.handshake.bytes_sent
        messages = 0
        if not self.handshake.all_joined:
            headers += sum(told.bytes_sent for told in plan.headers) + (0 if ties is None else 8 * others)
            messages = sum(exchange.bytes_sent for exchange in plan.exchanges)
            messages += sum(maximum.bytes_sent for maximum in plan.maxima.values())
        return StepReport(
            step=self._step,
            method=", ".join(dict.fromkeys(method.name for method in plan.layout.methods)),
            exchange=tuple(exchange.name for exchange in plan.exchanges),
            bytes_sent=messages + headers,
            header_bytes=headers,
            **self._who(said, self.handshake),
            skipped=skipped,
            ties=ties,
            seconds=session.tracer.seconds(self._began),
            _agreement=functools.partial(agreement, plan, self._step, said) if plan.elects else None,
        )

    def _who(self, said: Sequence[Heard], handshake: Handshake) -> dict[str, Any]:
        """Who has voted, who has not and why, and whose ballot has ended where."""
        voters: list[int] = []
        abstentions: dict[int, str] = {}
        ended: dict[int, str] = {}
        for rank in range(self._session.size):
            reasons = [heard.status[rank] for heard in said if heard.status[rank] != header.VOTES]
            if handshake.all_joined:
                abstentions[rank] = header.REASONS[header.JOINED]
            elif any(bool(heard.votes[rank].any()) for heard in said):
                voters.append(rank)
            else:
                abstentions[rank] = header.REASONS[reasons[0] if reasons else header.NO_GRADIENT]
            for flight, heard in zip(self._flights, said, strict=True):
                if heard.ended[rank] >= 0 and rank not in ended:
                    ended[rank] = flight.bucket.segments[heard.ended[rank]].name
        return {"voters": tuple(voters), "abstentions": abstentions, "ended_at": ended}
