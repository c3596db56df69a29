"""What all ranks have agreed on once, so that a step allocates nothing that grows with the model: the plan.

It holds until parameters, methods or the group change; then another is made.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from mpisign.backends import Backend, backend_for
from mpisign.bitmap.tensors import is_laid_as
from mpisign.codecs import SignBits
from mpisign.errors import OptionError
from mpisign.exchange import rows
from mpisign.exchange.answers import Answers
from mpisign.exchange.audit import Audit
from mpisign.exchange.choose import Exchange, cap_bytes, choose, planes_of, shards_for
from mpisign.exchange.choose import named as named_exchange
from mpisign.exchange.decider import Decider
from mpisign.exchange.decoder import Decoder
from mpisign.exchange.encoder import Encoder
from mpisign.exchange.gradients import Gradients
from mpisign.exchange.header import Header
from mpisign.exchange.maximum import Maximum
from mpisign.group import Channels, Group
from mpisign.layout import Bucket, Layout
from mpisign.memory import Identity
from mpisign.memory.store import MemoryStore
from mpisign.method import Method
from mpisign.network import Network
from mpisign.policy import Policy
from mpisign.rules import BallotRule

__all__ = ["Batch", "Plan", "Use", "make_plan"]


class Use:
    """Who has a plan's buffers.

    Attributes:
        step: number of the latest exchange, whose bits they hold; -1 for none.
        settled: all ranks have them, and those of a node share what they must.
        channels: what messages cross; None for the group's own.
        given: what gives back the parts of the node's memory that its exchanges have.
    """

    def __init__(self, device: torch.device) -> None:
        self.step = -1
        self.settled = False
        self.channels: Channels | None = None
        self.given: list[Callable[[], None]] = []
        self._device = device
        self._aside: torch.cuda.Stream | None = None
        self._others: set[torch.cuda.Stream] = set()
        self._ended: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._ended = torch.cuda.Event()
            self._ended.record(torch.cuda.current_stream(device))  # the buffers are zero from here on

    def __call__(self, *, aside: bool = False) -> AbstractContextManager[None]:
        """Select the device; what was done inside the last time, maybe on another stream, comes first.

        Args:
            aside: on a stream of its own, so that nothing waits for what backward has still to compute.
        """
        return contextlib.nullcontext() if self._ended is None else self._on_device(self._ended, aside)

    @contextlib.contextmanager
    def _on_device(self, ended: torch.cuda.Event, aside: bool) -> Iterator[None]:
        with torch.cuda.device(self._device), contextlib.ExitStack() as stack:
            if aside:
                self._aside = self._aside or torch.cuda.Stream(self._device)
                stack.enter_context(torch.cuda.stream(self._aside))
            torch.cuda.current_stream().wait_event(ended)
            while self._others and not aside:
                torch.cuda.current_stream().wait_stream(self._others.pop())
            try:
                yield
            finally:
                ended.record()

    def comes_after_this(self) -> None:
        """Let the next use wait for what the current stream has to do, as gradients may be made on several."""
        if self._ended is not None:
            self._others.add(torch.cuda.current_stream(self._device))

    def give_back(self) -> None:
        """Give the node's memory back: all rounds are over, and another plan is in its place."""
        self.step = -1
        while self.given:
            self.given.pop()()

    def over(self) -> None:
        """Wait until nobody uses them, on whatever stream: they may be given away then."""
        if self._ended is not None:
            self._ended.synchronize()


@dataclass(frozen=True)
class Batch:
    """Buckets of one method that are encoded and decoded together: one, or on a GPU all of the method's."""

    buckets: tuple[Bucket, ...]
    places: tuple[int, ...]
    encoder: Encoder
    decoder: Decoder
    answers: Answers | None

    @property
    def method(self) -> Method:
        """Theirs."""
        return self.buckets[0].method


@dataclass(frozen=True)
class Plan:
    """Everything a step needs but the gradients. Nobody changes it; rounds write into its buffers.

    Attributes:
        layout: which parameter is where in which message.
        settings: what else must be the same on all ranks, as text.
        fingerprint: of both.
        group: the ranks it was made for.
        policy: zeros, ties and the seed.
        backend: who does the bit arithmetic.
        store: where memories are kept; the optimizer's.
        exchanges, deciders, headers: by bucket.
        spoken: by bucket, (length,) words that say which values are not zero, or None where rows do not count.
        scattered: the places of parameters whose rows lie apart on the wire.
        told: the names of the parameters whose rows headers tell.
        batches: all buckets, in the order in which they are sent.
        gradients: reads them.
        maxima: by method, for those that need one.
        local: by batch, who makes an update of this rank alone; where models are exchanged, of their gradients.
        clip: the norm to which each rank's whole gradient is clipped; None for never.
        counts: (2,) int64 on the device, where ties are added up; None where they are returned.
        answers: what the device tells this rank; None where nobody waits for it.
        use: who has the buffers.
        number: which of the job's optimizers this is for.
        early: messages may leave before a step.
        asks: what is best depends on how quick the links are, which nobody has measured yet.
        audit: who recounts what others decide; None if nobody does.
        why: why messages take the way that they take, of the largest one.
    """

    layout: Layout
    settings: tuple[str, ...]
    fingerprint: int
    group: Group
    policy: Policy
    backend: Backend
    store: MemoryStore
    exchanges: tuple[Exchange, ...]
    deciders: tuple[Decider, ...]
    headers: tuple[Header, ...]
    spoken: tuple[torch.Tensor | None, ...]
    scattered: frozenset[int]
    told: tuple[str, ...]
    batches: tuple[Batch, ...]
    gradients: Gradients
    maxima: dict[int, Maximum]
    local: tuple[Encoder, ...]
    clip: float | None
    counts: torch.Tensor | None
    answers: Answers | None
    use: Use
    number: int
    early: bool
    asks: bool
    audit: Audit | None
    why: str

    @property
    def exchanges_models(self) -> bool:
        """Whether parameters cross the wire instead of gradients."""
        return any(method.exchanges_models for method in self.layout.methods)

    @property
    def elects(self) -> bool:
        """Whether there are votes, so that ties and agreement mean something."""
        return any(method.elects for method in self.layout.methods)

    @functools.cached_property
    def steps(self) -> bool:
        """Whether a decision can be applied to the parameters where they lie: bits, in the parameters' order."""
        pairs = zip(self.layout.parameters, self.layout.strides, strict=True)
        return all(batch.decoder.bits for batch in self.batches) and all(is_laid_as(p, strides) for p, strides in pairs)

    def fits(self, parameters: Sequence[torch.Tensor], methods: Sequence[Method], group: Group) -> bool:
        """Whether it was made for these, as they are now."""
        if group is not self.group or self.gradients.methods != methods:
            return False
        return self.gradients.fits(parameters)

    def telling(self) -> Plan:
        """The same plan, with headers that tell rows of all parameters in which somebody has had a row of zeros."""
        if not (self.store.rows or self.told):  # as in nearly every step
            return self
        told = _told(self.layout, self.spoken, self.store)
        if told == self.told:
            return self
        headers = _headers(self.layout, self.spoken, told, self.group.size)
        return dataclasses.replace(self, told=told, headers=headers)


def make_plan(
    named: Sequence[tuple[str, torch.Tensor]],
    methods: Sequence[Method],
    policy: Policy,
    exchange: str,
    bucket_cap_mb: float | None,
    store: MemoryStore,
    group: Group,
    number: int,
    clip: float | None = None,
    network: Network | None = None,
    overlap: bool | str = False,
    audit: int = 0,
) -> Plan:
    """Cut the messages and allocate what they need.

    Args:
        named: (name, parameter) in registration order; all ranks must have the same.
        methods: by parameter.
        exchange: one of ``choose.CHOICES``.
        bucket_cap_mb: a message leaves when it has grown to so many MiB; None for the default.
        clip: the norm to which each rank's whole gradient is clipped.
        network: what is known of the ways between the ranks; None for nothing.
        audit: how many blocks each rank recounts in a step.
        overlap: whether messages shall leave while backward runs; ``"auto"``: if there is a network to wait for.
        number: which of the job's optimizers this is, so that two alike are not mistaken for each other.

    Raises:
        OptionError: a rule cannot work with so many ranks, or models are exchanged beside gradients.
        GradientError: parameters that cannot be voted on.
    """
    size = group.size
    network = network or Network()
    whole = clip is not None or any(method.needs_all for method in methods)
    early = overlap is True or (overlap == "auto" and group.num_nodes > 1)
    early = early and size > 1 and not whole
    cap = cap_bytes(bucket_cap_mb, methods, policy, group, network, early=early)
    layout = Layout(named, methods, cap, lambda method: shards_for(exchange, method, size))
    for method in layout.methods:
        if group.generation:
            method.rule.check_left(group.identities)
        else:
            method.rule.check(size)
        if method.exchanges_models and len(layout.methods) > 1:
            raise OptionError(f"{method.name} exchanges models, so it must be the method of all parameters")
    store.sharded = any(shards_for(exchange, method, size) > 1 for method in layout.methods)
    backend = backend_for(layout.device)
    spoken = tuple(_spoken(bucket, policy, layout.device) for bucket in layout.buckets)
    exchanges = tuple(_exchange(exchange, bucket, policy, group, network, layout.device) for bucket in layout.buckets)
    listed = [f"method {method}" for method in layout.methods]
    if len(layout.methods) > 1:
        listed += [f"{name!r} by {method.name}" for (name, _), method in zip(named, methods, strict=True)]
    settings = (f"optimizer {number} of the job", *listed, repr(policy), f"exchange {exchange!r}")
    if overlap:
        settings += (f"overlap= or delay= {overlap!r}",)
    if clip is not None:
        settings += (f"clip_grad_norm {clip!r}",)
    if audit:
        settings += (f"audit {audit}",)
    told = _told(layout, spoken, store)
    deciders = tuple(Decider(layout, bucket, store) for bucket in layout.buckets)
    batches: list[tuple[Batch, Encoder]] = []
    for method in layout.methods:
        mine = [bucket for bucket in layout.buckets if bucket.method is method]
        for some in [mine] if backend.together and not early else [[bucket] for bucket in mine]:
            batches.append(_batch(layout, some, exchanges, spoken, policy, size, backend, store))
    batches.sort(key=lambda pair: pair[0].buckets[0].index)
    return Plan(
        layout=layout,
        settings=settings,
        fingerprint=layout.fingerprint(settings),
        group=group,
        policy=policy,
        backend=backend,
        store=store,
        exchanges=exchanges,
        deciders=deciders,
        headers=_headers(layout, spoken, told, size),
        spoken=spoken,
        scattered=frozenset(
            segment.index
            for bucket in layout.buckets
            for segment in bucket.segments
            if rows.is_scattered(tuple(layout.parameters[segment.index].shape), layout.strides[segment.index])
        ),
        told=told,
        batches=tuple(batch for batch, _ in batches),
        gradients=Gradients(layout, methods, group.rank),
        maxima={
            number: Maximum(layout, [bucket for bucket in layout.buckets if bucket.method is method], group)
            for number, method in enumerate(layout.methods)
            if method.memory.needs_maximum
        },
        local=tuple(local for _, local in batches),
        clip=clip,
        counts=torch.zeros(2, dtype=torch.int64, device=layout.device) if backend.together else None,
        answers=Answers(layout.device) if backend.together else None,
        use=Use(layout.device),
        number=number,
        early=early,
        asks=exchange == "auto" and group.num_nodes > 1 and not network.asked,
        audit=Audit(audit, layout.buckets, exchanges, deciders, group) if audit and size > 1 else None,
        why=_why(exchange, layout, policy, group, network),
    )


def _batch(
    layout: Layout,
    buckets: Sequence[Bucket],
    exchanges: Sequence[Exchange],
    spoken: Sequence[torch.Tensor | None],
    policy: Policy,
    size: int,
    backend: Backend,
    store: MemoryStore,
) -> tuple[Batch, Encoder]:
    """The batch, and who makes a local update of it: its encoder, unless models are exchanged."""
    mine = [exchanges[bucket.index] for bucket in buckets]
    messages, words = [one.message for one in mine], [spoken[bucket.index] for bucket in buckets]
    local = encoder = Encoder(layout, buckets, messages, words, backend, store)
    if local.method.exchanges_models:  # their memory is for the gradients, and models are sent as they are
        plain = dataclasses.replace(local.method, memory=Identity())
        models = [dataclasses.replace(bucket, method=plain) for bucket in buckets]
        encoder = Encoder(layout, models, messages, words, backend, store)
    decoder = Decoder(layout, buckets, mine, encoder, policy, size, backend)
    places = tuple(segment.index for segment in encoder.segments)
    answers = Answers(layout.device) if backend.together else None
    return Batch(tuple(buckets), places, encoder, decoder, answers), local


def _exchange(
    option: str, bucket: Bucket, policy: Policy, group: Group, network: Network, device: torch.device
) -> Exchange:
    planes = planes_of(bucket.method, policy, group.size)
    return choose(option, bucket.method, bucket.length, bucket.dtype, *planes, group, network, device)


def _why(option: str, layout: Layout, policy: Policy, group: Group, network: Network) -> str:
    if not layout.buckets:
        return ""
    bucket = max(layout.buckets, key=lambda bucket: bucket.length * bucket.dtype.itemsize)
    planes = planes_of(bucket.method, policy, group.size)
    return named_exchange(option, bucket.method, bucket.length * bucket.dtype.itemsize, *planes, group, network)[1]


def _spoken(bucket: Bucket, policy: Policy, device: torch.device) -> torch.Tensor | None:
    method = bucket.method
    counts = isinstance(method.rule, BallotRule) and isinstance(method.codec, SignBits)
    if not (policy.zeros == "rows" and counts and method.codec.planes(policy) == 1):
        return None
    # Ones where nothing is ever written, behind a shard's last segment: words of zeros are what one looks for.
    return torch.full((bucket.length,), -1, dtype=bucket.dtype, device=device)


def _told(layout: Layout, spoken: Sequence[torch.Tensor | None], store: MemoryStore) -> tuple[str, ...]:
    return tuple(
        segment.name
        for bucket in layout.buckets
        if spoken[bucket.index] is not None
        for segment in bucket.segments
        if layout.parameters[segment.index] in store.rows
    )


def _headers(
    layout: Layout, spoken: Sequence[torch.Tensor | None], told: Sequence[str], size: int
) -> tuple[Header, ...]:
    headers = []
    for bucket in layout.buckets:
        counts = {
            place: rows.count_rows(tuple(layout.parameters[segment.index].shape))
            for place, segment in enumerate(bucket.segments)
            if segment.name in told
        }
        headers.append(Header(bucket, counts, spoken[bucket.index] is not None, size))
    return tuple(headers)
