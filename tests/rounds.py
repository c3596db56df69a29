"""Steps that all ranks of a job take, put together as the tests of plans, rounds and headers need them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from parts import ONE_BUCKET, Grads, Tensor, layout_of, method_of, named, parameters, wire_order

from mpisign.exchange import header
from mpisign.exchange.choose import Exchange
from mpisign.exchange.header import Handshake, Header, Heard, Intent
from mpisign.exchange.maximum import Maximum
from mpisign.exchange.plan import Plan, make_plan
from mpisign.exchange.round import Round
from mpisign.exchange.sink import GradientSink, ModelSink, NoSink, Sink
from mpisign.layout import Bucket
from mpisign.memory.store import MemoryStore
from mpisign.method import Method
from mpisign.policy import Policy
from mpisign.report import StepReport
from mpisign.session import Session, current
from mpisign.watchdog import Pending


def session() -> Session:
    """The job that the test is in."""
    return current()


def shake_hands(
    tensors: Sequence[Tensor],
    step: int = 0,
    joined_for: int | None = None,
    settings: Sequence[str] = ("a setting",),
    method: Method | None = None,
    rows: Sequence[str] = (),
) -> Handshake:
    """**Collective.**"""
    layout = layout_of(tensors, method or method_of())
    return header.shake_hands(session(), layout, layout.fingerprint(settings), settings, rows, step, Intent(joined_for))


def bucket_of(segments: int) -> Bucket:
    """One with so many parameters."""
    (bucket,) = layout_of(parameters(*[(1,)] * segments), method_of()).buckets
    return bucket


def tell(header_of: Header, status: int, votes: Sequence[bool], *args: Any, **options: Any) -> Heard:
    """Send a header and wait for all. **Collective.**"""
    its = session()
    its.wait(header_of.post(its, its.group.channels, status, np.array(votes, np.bool_), *args, **options))
    return header_of.heard(its)


def maximum_of(tensors: Sequence[Tensor], cap: float = ONE_BUCKET) -> tuple[Maximum, Callable[..., dict[int, Tensor]]]:
    """It, and ``over_ranks(gradients by parameter, unscale)``, which is **collective**."""
    layout = layout_of(tensors, method_of(), cap)
    its = Maximum(layout, layout.buckets, session().group)

    def over_ranks(gradients: Grads, unscale: float = 1.0) -> dict[int, Tensor]:
        return its.over_ranks([gradients[place] for place in wire_order(layout)], unscale, session())

    return its, over_ranks


@dataclasses.dataclass
class Job:
    """All ranks' plans, and how the optimizer takes a step by them."""

    plan: Plan
    tensors: Sequence[Tensor]

    @property
    def store(self) -> MemoryStore:
        return self.plan.store

    @property
    def sink(self) -> Sink:
        return (ModelSink if self.plan.exchanges_models else GradientSink)(self.plan.layout)

    def values(self) -> Grads:
        """What crosses the wire, by parameter. The plan fits what it was made for."""
        assert self.plan.fits(self.tensors, self.plan.gradients.methods, session().group)
        return self.plan.gradients.models() if self.plan.exchanges_models else self.plan.gradients.read()

    def begin(self, step: int, values: Grads, **options: Any) -> tuple[Round, Handshake]:
        """Open a round and show it all values."""
        self.plan = self.plan.telling()
        a_round = Round(self.plan, step, **options)
        handshake = a_round.open()
        a_round.begin()
        self.plan = a_round.plan
        if not handshake.all_joined:
            a_round.prepare(values)
        return a_round, handshake

    def submit(self, a_round: Round, values: Grads, count: int | None = None, *, advance: bool = False) -> None:
        """Submit all batches, or the first ``count``; with ``advance`` go on after each with what has arrived."""
        for batch in self.plan.batches[:count]:
            a_round.submit(batch, [values[place] for place in batch.places])
            if advance:
                a_round.advance()

    def run(self, step: int, abstention: int = header.VOTES, *, advance: bool = False, **options: Any) -> StepReport:
        """A whole step. **Collective.**"""
        values = self.values()
        a_round, _ = self.begin(step, values, abstention=abstention, **options)
        self.submit(a_round, values, advance=advance)
        a_round.close()
        return a_round.commit(self.sink)

    def drop(self, step: int, count: int | None, **options: Any) -> None:
        """A step that is given up after ``count`` batches. **Collective.**"""
        values = self.values()
        a_round, _ = self.begin(step, values, reversible=True, **options)
        self.submit(a_round, values, count)
        a_round.drop()

    def sit_out(self, step: int, joined_for: int) -> tuple[Handshake, StepReport]:
        """**Collective.**"""
        nothing = [None] * len(self.tensors)
        a_round, handshake = self.begin(step, nothing, abstention=header.JOINED, intent=Intent(joined_for))
        if not handshake.all_joined:
            self.submit(a_round, nothing)
            a_round.close()
        running = [place for b in self.plan.batches if b.method.memory.running for place in b.places]
        return handshake, a_round.commit(NoSink(self.plan.layout, frozenset(running)))

    def memories(self) -> list[Tensor]:
        """A copy of all that this rank keeps: memories, and what rules keep of what this rank decides.

        What is not there yet is zero, as it is when it is asked for.
        """
        state = self.store.state_dict(list(self.tensors), 0, None, "")
        kept: list[Tensor] = []
        for place, tensor in enumerate(self.tensors):
            fields = state["memory"].get(place, {})
            for field in self.store.memory_of(tensor).fields:
                kept.append(fields[field].detach().clone() if field in fields else torch.zeros_like(tensor).detach())
            whole = torch.zeros(tensor.numel(), dtype=torch.float64)
            for lo, piece in state["pieces"].get(place, {}).items():
                whole[lo : lo + piece.numel()] = piece
            kept.append(whole)
        return kept


def job(
    tensors: Sequence[Tensor],
    method: Method | Sequence[Method] | None = None,
    *,
    policy: Policy | None = None,
    exchange: str = "auto",
    cap: float | None = None,
    store: MemoryStore | None = None,
    number: int = 1,
) -> Job:
    """``method``: one, or one for each parameter; ``cap``: in bytes, None for the default."""
    its = [method or method_of()] * len(tensors) if method is None or isinstance(method, Method) else list(method)
    usual = its[0] if its else method_of()
    plan = make_plan(
        named(tensors),
        its,
        policy or Policy("coin"),
        exchange,
        None if cap is None else cap / (1 << 20),
        store or store_for(usual, tensors, its),
        session().group,
        number,
    )
    return Job(plan, tensors)


def store_for(method: Method, tensors: Sequence[Tensor] = (), each: Sequence[Method] = ()) -> MemoryStore:
    """An empty one, for parameters that may have methods of their own."""
    store = MemoryStore(method.memory)
    if tensors:
        store.follow(tensors, {t: its.memory for t, its in zip(tensors, each, strict=True)}, session().group)
    return store


class Recorder:
    """Stands before an exchange and notes the order in which its methods are called."""

    def __init__(self, exchange: Exchange, number: int, log: list[str]) -> None:
        self._exchange, self._number, self._log = exchange, number, log

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._exchange, name)
        if name in ("push", "post", "go_on"):
            self._log.append(f"{name} {self._number}")
        return found


@contextmanager
def waits_recorded(log: list[str]) -> Iterator[None]:
    """The session of the test notes for what it waits."""
    its = current()
    wait = its.wait

    def noted(pending: Pending) -> None:
        log.append(f"wait: {its.tracer.where()}")
        wait(pending)

    its.wait = noted  # type: ignore[method-assign]
    try:
        yield
    finally:
        del its.wait


def record(made: Job, log: list[str]) -> Job:
    """Let a plan's exchanges note what is called."""
    exchanges: Any = tuple(Recorder(exchange, number, log) for number, exchange in enumerate(made.plan.exchanges))
    made.plan = dataclasses.replace(made.plan, exchanges=exchanges)
    return made
