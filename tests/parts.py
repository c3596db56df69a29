"""The parts of a step, put together as the tests of single parts need them. The only place that calls constructors.

A :class:`Side` is one rank's memory, encoder, exchanges and decoder. It needs no other rank, and no MPI: tests carry
messages from one side to the other by hand.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import oracle
import pytest
import torch
from methods_table import SOME, TABLE
from mpisign.exchange.aggregator import Aggregator
from mpisign.exchange.pipeline import Pipeline
from mpisign.exchange.runs import decide_runs, runs_of

from mpisign import OptionError, methods
from mpisign.backends.host import as_words
from mpisign.exchange import header
from mpisign.exchange.choose import Exchange, choose
from mpisign.exchange.decoder import Decoder
from mpisign.exchange.encoder import Encoder
from mpisign.exchange.gradients import Gradients
from mpisign.exchange.maximum import Maximum
from mpisign.group import Group
from mpisign.layout import Layout, Segment
from mpisign.memory.store import MemoryStore
from mpisign.method import Method
from mpisign.policy import Policy, StepContext
from mpisign.session import Session, current
from mpisign.watchdog import Pending

Tensor = torch.Tensor
Grads = Sequence[Tensor | None]
Voters = Sequence[tuple[int, ...]]

HOST = torch.device("cpu")
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
SHAPES = ((3, 5, 7), (31,), (), (0,), (32,), (33, 2), (1,), (127,))
"""Below, at and above a word's 32 elements, nothing at all, and no dimensions at all."""

ONE_BUCKET, ONE_SEGMENT_A_BUCKET = math.inf, 1.0
"""Sizes in bytes at which a bucket is closed."""

# ---------------------------------------------------------------------------------------------- the method table


def methods_for(size: int) -> dict[str, Method]:
    """Every method of the library for a job of ``size`` ranks, and every phase it goes through, by name.

    Those that need more ranks are made for more: a rank can send and receive by them, but not decide.
    """
    table: dict[str, Method] = {}
    for name, make in TABLE.items():
        try:
            method = make(size)
        except pytest.skip.Exception:
            method = make(SOME)
        table[name] = dataclasses.replace(method, by_step=(), by_epoch=())
        for number, (_, phase) in enumerate((*method.by_step, *method.by_epoch), 1):
            table[f"{name}, phase {number}"] = phase
    return table


def each_method_that(fits: Callable[[Method], bool]) -> pytest.MarkDecorator:
    """For tests of all methods that have a trait: ``methods_for(size)[name]`` is it."""
    return pytest.mark.parametrize("name", [name for name, method in methods_for(1).items() if fits(method)])


each_method = each_method_that(lambda method: True)


def runs_with(method: Method, size: int) -> bool:
    """Whether its rule can decide with so many ranks."""
    try:
        method.rule.check(size)
    except OptionError:
        return False
    return True


def runs_alone(method: Method) -> bool:
    return runs_with(method, 1)


def method_of(memory: Any = None, codec: Any = None, rule: Any = None) -> Method:
    """signSGD, with another memory, codec or rule where one is given."""
    like = methods.signsgd()
    return Method(memory or like.memory, codec or like.codec, rule or like.rule)


# --------------------------------------------------------------------------------------- parameters and gradients


def parameters(*shapes: tuple[int, ...], dtypes: Sequence[torch.dtype] = DTYPES[:1]) -> list[torch.nn.Parameter]:
    """Zeros, the dtypes in turn."""
    return [torch.nn.Parameter(torch.zeros(shape, dtype=dtypes[i % len(dtypes)])) for i, shape in enumerate(shapes)]


def named(tensors: Sequence[Tensor]) -> list[tuple[str, Tensor]]:
    """``p0``, ``p1``, ..."""
    return [(f"p{i}", tensor) for i, tensor in enumerate(tensors)]


def draw(tensors: Sequence[Tensor], *seeds: int) -> list[Tensor]:
    """Small integers, of which a fifth are zero: zeros and ties abound, and sums of them are exact."""
    random = torch.Generator().manual_seed(hash(seeds) % 2**63)
    return [torch.randint(-2, 3, t.shape, generator=random).to(t.dtype) for t in tensors]


def draw_normal(tensors: Sequence[Tensor], *seeds: int) -> list[Tensor]:
    """Normal numbers, none of them zero."""
    random = torch.Generator().manual_seed(hash(seeds) % 2**63)
    return [torch.randn(t.shape, generator=random, dtype=torch.float64).to(t.dtype) for t in tensors]


def give(tensors: Sequence[Tensor], gradients: Grads) -> None:
    """Let these be the parameters' gradients."""
    for tensor, gradient in zip(tensors, gradients, strict=True):
        tensor.grad = None if gradient is None else gradient.clone()


def flat(tensor: Tensor) -> npt.NDArray[np.float64]:
    """A tensor's elements in reading order, in fp64, which holds every dtype's exactly."""
    return tensor.detach().double().reshape(-1).numpy().copy()


def copies(tensors: Grads) -> list[Tensor | None]:
    return [None if tensor is None else tensor.detach().clone() for tensor in tensors]


def same(ours: Grads, theirs: Grads) -> bool:
    """Whether all are equal, None to None and NaN to NaN."""
    return all(
        (a is None) == (b is None) and (a is None or torch.equal(a.nan_to_num(1e9), b.nan_to_num(1e9)))
        for a, b in zip(ours, theirs, strict=True)
    )


# ------------------------------------------------------------------------------------------- what the oracle says


def zero_coins(size: int, first_word: int, *, step: int = 0, rank: int = 0, seed: int = 0) -> oracle.Ballot:
    """The coins with which a rank votes on zeros of a parameter that starts at ``first_word``."""
    return oracle.coins(oracle.coin_key(seed, step, oracle.zeros_stream(rank)), first_word, size)


def tie_coins(size: int, first_word: int, *, step: int = 0, seed: int = 0) -> oracle.Ballot:
    return oracle.coins(oracle.coin_key(seed, step, oracle.TIES), first_word, size)


def planes(ballot: oracle.Ballot, rows: int) -> npt.NDArray[np.uint32]:
    """A ballot's or decision's words: (rows, ceil(n/32)), the signs and, if there are two, what is not zero."""
    return np.stack([oracle.to_words(ballot > 0), oracle.to_words(ballot != 0)][:rows])


# ------------------------------------------------------------------------------------------------- one rank's side


def context_of(policy: Policy, step: int = 0, rank: int = 0, size: int = 1) -> StepContext:
    return policy.context(step, rank, size)


def layout_of(tensors: Sequence[Tensor], method: Method, cap: float = ONE_BUCKET, shards: int = 1) -> Layout:
    return Layout(named(tensors), method.codec, cap, whole=isinstance(method.rule, VectorRule), shards=shards)


def gradients_of(tensors: Sequence[Tensor], method: Method | None = None, rank: int = 0) -> Gradients:
    return Gradients(layout_of(tensors, method or method_of()), rank)


def session() -> Session:
    """The job that the test is in."""
    return current()


def group_of(size: int, rank: int = 0) -> Group:
    """A rank's place among so many, with which buffers can be made and nothing sent."""
    nobody: Any = None
    return Group(nobody, nobody, nobody, rank, size, (0,) * size, 0, tuple(range(size)))


@dataclasses.dataclass
class Side:
    """One rank of ``size``: what it sends, and what it makes of what comes back."""

    tensors: Sequence[Tensor]
    method: Method
    policy: Policy
    rank: int
    size: int
    layout: Layout
    store: MemoryStore
    exchanges: list[Exchange]
    encoder: Encoder
    decoder: Decoder
    aggregator: Aggregator

    def context(self, step: int = 0) -> StepContext:
        return context_of(self.policy, step, self.rank, self.size)

    def segments(self) -> list[tuple[int, Segment]]:
        """(bucket, segment), by parameter."""
        found = [(bucket.index, segment) for bucket in self.layout.buckets for segment in bucket.segments]
        return sorted(found, key=lambda pair: pair[1].index)

    def first_words(self) -> list[int]:
        return [segment.first_word for _, segment in self.segments()]

    @torch.no_grad()
    def send(self, gradients: Grads, step: int = 0, unscale: float = 1.0) -> bool:
        """Encode all buckets in their order, if the encoder lets us go on. Returns whether all was finite."""
        context, finite = self.encoder.begin(gradients, self.context(step), unscale)
        if not finite:
            return False
        if self.method.memory.needs_maximum:  # as if this rank's were the largest
            bounds = {
                segment.first_word: torch.zeros(segment.numel) if g is None else g.float().reshape(-1).abs() * unscale
                for _, segment in reversed(self.segments())  # an empty one begins where the next on the wire does
                for g in [gradients[segment.index]]
            }
            context = dataclasses.replace(context, prepared=bounds)
        flags = [self.encoder.encode([bucket], gradients, context) for bucket in self.layout.buckets]
        return all(bool(flag) for some in flags for flag in some)

    def message(self, place: int) -> Tensor:
        """What has been encoded of a parameter: (planes_up, k), a view."""
        bucket, segment = self.segments()[place]
        return self.exchanges[bucket].message[:, segment.start : segment.stop]

    def words(self, place: int) -> npt.NDArray[np.uint32]:
        return as_words(self.message(place)).copy()

    def decision(self, place: int) -> Tensor:
        """What comes back about a parameter: (planes_down, k), a view to be written."""
        bucket, segment = self.segments()[place]
        return self.exchanges[bucket].decision[:, segment.start : segment.stop]

    def memory(self, place: int) -> dict[str, Tensor]:
        """A copy of the memory's state of a parameter, by field."""
        return {field: value.clone() for field, value in self.store.of(self.tensors[place]).items()}

    def memories(self) -> list[Tensor]:
        return [value for place in range(len(self.tensors)) for value in self.memory(place).values()]

    def hear(self, senders: Sequence[Side]) -> None:
        """Receive every rank's messages, as the all-gather does."""
        for bucket, exchange in enumerate(self.exchanges):
            for rank, sender in enumerate(senders):
                exchange.received[rank].copy_(sender.exchanges[bucket].message)

    @torch.no_grad()
    def decide(self, voters: Voters, step: int = 0) -> int:
        """Decide all buckets from what was heard. Returns the ties."""
        ties = 0
        for bucket, exchange in zip(self.layout.buckets, self.exchanges, strict=True):
            messages = list(exchange.received)
            if self.method.rule.reencodes:
                self.aggregator.decide(bucket, voters, self.context(step), messages, exchange.decision, 0)
            elif not self.method.by_value:
                runs, context = runs_of(bucket, voters), self.context(step)
                ties += int(decide_runs(self.method.rule, context, bucket, runs, messages, exchange.decision, 0))
        return ties

    @torch.no_grad()
    def receive(self, gradients: Grads, voters: Voters, step: int = 0, buckets: Sequence[int] | None = None) -> None:
        """Decode all buckets, or those of these numbers."""
        chosen = self.layout.buckets if buckets is None else [self.layout.buckets[number] for number in buckets]
        self.decoder.decode(chosen, gradients, voters, self.context(step))

    @torch.no_grad()
    def follow(self, voters: Voters, step: int = 0) -> None:
        self.decoder.follow(self.layout.buckets, voters, self.context(step))


def side(
    tensors: Sequence[Tensor],
    method: Method | None = None,
    *,
    policy: Policy | None = None,
    cap: float = ONE_BUCKET,
    shards: int = 1,
    rank: int = 0,
    size: int = 1,
) -> Side:
    method, policy = method or method_of(), policy or Policy()
    layout, store = layout_of(tensors, method, cap, shards), MemoryStore(method.memory)
    up, down = method.codec.planes(policy), method.rule.planes_down(method.codec, policy, size)
    exchanges = [
        choose("allgather", method, b.length, b.dtype, up, down, group_of(size, rank), HOST) for b in layout.buckets
    ]
    messages = [exchange.message for exchange in exchanges]
    encoder = Encoder(layout, method, messages, store.of, Gradients(layout, rank).locate)
    return Side(
        tensors,
        method,
        policy,
        rank,
        size,
        layout,
        store,
        exchanges,
        encoder,
        Decoder(layout, method, exchanges, encoder),
        Aggregator(layout, method, store.piece),
    )


# ---------------------------------------------------------------------------------------------- what needs a session


def shake_hands(
    tensors: Sequence[Tensor],
    step: int = 0,
    joined_for: int | None = None,
    settings: Sequence[str] = ("a setting",),
    method: Method | None = None,
) -> header.Handshake:
    """**Collective.**"""
    layout = layout_of(tensors, method or method_of())
    return header.shake_hands(session(), layout, layout.fingerprint(settings), settings, step, joined_for)


def participation(status: int, present: Sequence[bool], step: int = 0) -> header.Participation:
    """**Collective.**"""
    return header.exchange_participation(session(), status, present)


def maximum_of(tensors: Sequence[Tensor], cap: float = ONE_BUCKET) -> tuple[Maximum, Callable[..., dict[int, Tensor]]]:
    """It, and ``over_ranks(gradients, unscale)``, which is **collective**."""
    its = Maximum(layout_of(tensors, method_of(), cap), session().group)
    return its, lambda gradients, unscale=1.0: its.over_ranks(gradients, unscale, session())


def pipeline(
    tensors: Sequence[Tensor],
    method: Method | None = None,
    *,
    policy: Policy | None = None,
    exchange: str = "auto",
    cap: float | None = None,
    store: MemoryStore | None = None,
    session: Session | None = None,
    number: int = 1,
) -> Pipeline:
    """``cap``: in bytes, None for the default."""
    method = method or method_of()
    return Pipeline(
        named(tensors),
        method,
        policy or Policy(),
        exchange,
        None if cap is None else cap / (1 << 20),
        store or MemoryStore(method.memory),
        session or current(),
        number,
    )


def store_for(method: Method) -> MemoryStore:
    return MemoryStore(method.memory)


class Recorder:
    """Stands before an exchange and notes the order in which its methods are called."""

    def __init__(self, exchange: Exchange, number: int, log: list[str]) -> None:
        self._exchange, self._number, self._log = exchange, number, log

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._exchange, name)
        if name in ("push", "start", "settle", "finish"):
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


def record(made: Pipeline, log: list[str]) -> Pipeline:
    """Let a pipeline's exchanges note what is called."""
    made.exchanges[:] = [Recorder(exchange, number, log) for number, exchange in enumerate(made.exchanges)]
    return made
