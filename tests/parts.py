"""The parts of a step, put together as the tests of single parts need them. The only place that calls constructors.

A :class:`Side` is one rank's plan: its memory, encoders, exchanges, deciders and decoders. It needs no other rank, and
sends nothing: tests carry messages from one side to the other by hand. ``rounds.py`` has what needs all ranks.
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

from mpisign import OptionError, methods
from mpisign.backends.host import as_words
from mpisign.exchange import header
from mpisign.exchange.choose import Exchange, shards_for
from mpisign.exchange.gradients import Gradients
from mpisign.exchange.header import Bools, Heard
from mpisign.exchange.plan import Plan, make_plan
from mpisign.exchange.sink import GradientSink, ModelSink, NoSink, Sink
from mpisign.group import Group
from mpisign.layout import Bucket, Layout, Segment
from mpisign.memory.store import MemoryStore
from mpisign.method import Method
from mpisign.policy import Policy, StepContext

Tensor = torch.Tensor
Grads = Sequence[Tensor | None]
Voters = Sequence[tuple[int, ...]]

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


def wire_order(layout: Layout) -> list[int]:
    """The parameters as they follow each other on the wire, by index."""
    return [segment.index for bucket in layout.buckets for segment in bucket.segments]


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


def layout_of(
    tensors: Sequence[Tensor], method: Method, cap: float = ONE_BUCKET, exchange: str = "allgather", size: int = 1
) -> Layout:
    return Layout(named(tensors), [method] * len(tensors), cap, lambda its: shards_for(exchange, its, size))


def gradients_of(tensors: Sequence[Tensor], method: Method | None = None, rank: int = 0) -> Gradients:
    method = method or method_of()
    return Gradients(layout_of(tensors, method), [method] * len(tensors), rank)


def group_of(size: int, rank: int = 0) -> Group:
    """A rank's place among so many, with which buffers can be made and nothing sent."""
    return dataclasses.replace(Group.alone(None), rank=rank, size=size, identities=tuple(range(size)))


def heard_of(bucket: Bucket, voters: Voters, size: int, spoken: dict[int, Bools] | None = None) -> Heard:
    """What headers say of a bucket.

    Args:
        voters: by parameter.
        spoken: by parameter, the rows (M, R) on which each rank votes.
    """
    votes = np.array([[rank in voters[s.index] for s in bucket.segments] for rank in range(size)], np.bool_)
    votes = votes.reshape(size, len(bucket.segments))
    rows = {at: spoken[s.index] for at, s in enumerate(bucket.segments) if spoken and s.index in spoken}
    return Heard((header.VOTES,) * size, votes, (-1,) * size, np.zeros_like(votes), rows)


@dataclasses.dataclass
class Side:
    """One rank of ``size``: what it sends, and what it makes of what comes back.

    Attributes:
        ended: the parameter at which the ballot of the latest :meth:`send` has ended, or None.
    """

    tensors: Sequence[Tensor]
    method: Method
    policy: Policy
    rank: int
    size: int
    plan: Plan
    ended: int | None = None
    _heard: list[list[Tensor]] = dataclasses.field(default_factory=list)

    @property
    def layout(self) -> Layout:
        return self.plan.layout

    @property
    def store(self) -> MemoryStore:
        return self.plan.store

    @property
    def exchanges(self) -> tuple[Exchange, ...]:
        return self.plan.exchanges

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
        """Encode all buckets in their order, as a round does. Returns whether all was finite."""
        context, self.ended = self.context(step), None
        if self.method.memory.needs_all:
            its = [gradients[place] for place in wire_order(self.layout)]
            first = int(self.plan.backend.first_bad(its))
            if first < len(its):
                self.ended = wire_order(self.layout)[first]
                return False
            flats = [g.reshape(-1) * unscale for g in its if g is not None]
            prepared: Any = self.method.memory.prepare(flats, context)
            if self.method.memory.needs_maximum:  # as if this rank's were the largest
                prepared = {
                    segment.first_word: torch.zeros(segment.numel)
                    if g is None
                    else g.float().reshape(-1).abs() * unscale
                    for _, segment in reversed(self.segments())  # an empty one begins where the next on the wire does
                    for g in [gradients[segment.index]]
                }
            context = dataclasses.replace(context, prepared=prepared)
        for batch in self.plan.batches:
            first = int(batch.encoder.encode([gradients[place] for place in batch.places], context, unscale))
            if first < len(batch.places) and self.ended is None:
                self.ended = batch.places[first]
        return self.ended is None

    def recover(self) -> None:
        for batch in self.plan.batches:
            batch.encoder.recover()

    @torch.no_grad()
    def sent(self, voters: Voters) -> None:
        """Tell the memory on which parameters this rank has voted."""
        for batch in self.plan.batches:
            batch.encoder.sent([self.rank in voters[place] for place in batch.places])

    @torch.no_grad()
    def local_update(self, gradients: Grads, unscale: float = 1.0) -> bool:
        orders = [(local, [s.index for s in local.segments]) for local in self.plan.local]
        return all(
            [local.local_update([gradients[at] for at in its], self.context(), unscale) for local, its in orders]
        )

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
        """A copy of the memory's state of a parameter, by field, flat."""
        return {field: value.clone() for field, value in self.store.of(self.tensors[place]).items()}

    def memories(self) -> list[Tensor]:
        return [value for place in range(len(self.tensors)) for value in self.memory(place).values()]

    def hear(self, senders: Sequence[Side]) -> None:
        """Receive every rank's messages, as the all-gather does."""
        self._heard = []
        for bucket, exchange in enumerate(self.exchanges):
            messages = [sender.exchanges[bucket].message.clone() for sender in senders]
            if exchange.name == "allgather":
                for mine, message in zip(exchange.received, messages, strict=True):
                    mine.copy_(message)
            self._heard.append(messages)

    def heard(self, voters: Voters, spoken: dict[int, Bools] | None = None) -> list[Heard]:
        """What headers say, by bucket."""
        return [heard_of(bucket, voters, self.size, spoken) for bucket in self.layout.buckets]

    @torch.no_grad()
    def decide(self, voters: Voters, step: int = 0, spoken: dict[int, Bools] | None = None) -> int:
        """Decide all buckets from what was heard. Returns the ties."""
        ties, context = 0, self.context(step)
        pairs = zip(self.heard(voters, spoken), self.exchanges, self._heard, self.plan.deciders, strict=True)
        for heard, exchange, messages, decider in pairs:
            if len(exchange.decision):
                ties += int(decider.decide(heard, context, messages, exchange.decision, 0, None))
        return ties

    @torch.no_grad()
    def receive(
        self,
        voters: Voters,
        step: int = 0,
        batches: Sequence[int] | None = None,
        spoken: dict[int, Bools] | None = None,
        sink: Sink | None = None,
    ) -> list[Tensor | None]:
        """Decode all batches, or those of these numbers. Returns what the parameters' gradients are then."""
        sink = sink or (ModelSink if self.plan.exchanges_models else GradientSink)(self.layout)
        heard = self.heard(voters, spoken)
        for number, batch in enumerate(self.plan.batches):
            if batches is None or number in batches:
                batch.decoder.decode([heard[bucket.index] for bucket in batch.buckets], sink, self.context(step))
        return [tensor.grad for tensor in self.tensors]

    def follow(self, voters: Voters, step: int = 0) -> None:
        """Receive as a rank does that has joined."""
        running = range(len(self.tensors)) if self.method.memory.running else ()
        self.receive(voters, step, sink=NoSink(self.layout, frozenset(running)))


def side(
    tensors: Sequence[Tensor],
    method: Method | None = None,
    *,
    policy: Policy | None = None,
    cap: float = ONE_BUCKET,
    exchange: str = "allgather",
    rank: int = 0,
    size: int = 1,
) -> Side:
    """``policy``: default one in which zeros toss coins."""
    method, policy = method or method_of(), policy or Policy("coin")
    with check_off(method, size):
        plan = make_plan(
            named(tensors),
            [method] * len(tensors),
            policy,
            exchange,
            cap / (1 << 20),
            MemoryStore(method.memory),
            group_of(size, rank),
            1,
        )
    return Side(tensors, method, policy, rank, size, plan)


@contextmanager
def check_off(method: Method, size: int) -> Iterator[None]:
    """A side sends and receives by any method, also by one that cannot decide with so few ranks."""
    if runs_with(method, size):
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(method.rule), "check", lambda self, size: None)
        yield
