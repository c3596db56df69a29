"""Audits of those who decide: every step, other ranks recount a few blocks of votes, and name who has lied.

Every voter publishes digests of its ballot before anybody decides, and owners compare what they have received with
them. When decisions are here, every rank draws blocks of the others' shards, by randomness of its own that nobody could
know before; it asks all voters for their ballots of these blocks, compares them with the digests, and recounts. If
something is wrong all ranks repeat it in public, so that who accuses falsely is found out, too. Nothing of the step has
been applied then.

A digest is BLAKE2b, of 16 bytes. A voter publishes one for each shard of each message, that of its blocks' digests;
with a block it shows those of the whole shard. Bytes of a rank: 16 for each shard and other rank, and k blocks of
``BLOCK_ITEMS`` items with their digests to each other rank.

Among M ranks, one that falsifies a tenth of its blocks passes 20 steps unseen with a probability of
(1 - 1/(10 (M - 1)))**(20 k (M - 1)), about exp(-2 k).
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from mpisign.errors import AuditError, OptionError
from mpisign.exchange.choose import Exchange
from mpisign.exchange.decider import Decider
from mpisign.exchange.header import Heard
from mpisign.group import Channels, Group
from mpisign.layout import Bucket
from mpisign.method import Method
from mpisign.policy import StepContext
from mpisign.rules import BallotRule
from mpisign.session import Session
from mpisign.watchdog import Pending

__all__ = ["BLOCK_ITEMS", "Audit", "check_audit"]

BLOCK_ITEMS = 1024
DIGEST_BYTES = 16

NOTHING, BALLOT, ANSWER, DECISION = range(4)  # what a rank has found wrong

_dice = random.SystemRandom()  # not the job's seed, which everybody knows

Bytes = npt.NDArray[np.uint8]
Said = Sequence[tuple[Heard, StepContext]]
"""By bucket: what its headers say, and the context in which it was decided."""


def check_audit(blocks: int, method: Method) -> None:
    """Raise :class:`OptionError` unless the method's votes can be recounted."""
    if blocks and not any(isinstance(phase.rule, BallotRule) for phase in method.phases):
        raise OptionError(
            f"audit={blocks} recounts votes, and the rule {method.rule.name!r} of {method.name} counts none: leave it "
            f"out"
        )


class Block(NamedTuple):
    """The ``place``-th block of a shard of one bucket: items from ``start`` to ``stop``."""

    trail: Trail
    shard: int
    place: int
    start: int
    stop: int


class Finding(NamedTuple):
    """What a rank has found wrong: one of ``NOTHING``, .., ``DECISION``; of which rank; in which block of all."""

    kind: int
    rank: int
    block: int


class Trail:
    """What has been published of one bucket's ballots.

    Attributes:
        published: (M, shards, 16) by voter.
    """

    def __init__(self, bucket: Bucket, exchange: Exchange, size: int) -> None:
        self.bucket, self.exchange, self.width = bucket, exchange, exchange.shard
        self.shards = -(-bucket.length // self.width)
        self.mine = np.zeros((self.shards, DIGEST_BYTES), np.uint8)
        self.published = np.zeros((size, *self.mine.shape), np.uint8)

    def span(self, shard: int) -> slice:
        return slice(shard * self.width, min((shard + 1) * self.width, self.bucket.length))

    def ballot(self, start: int, stop: int) -> npt.NDArray[Any]:
        """This rank's own, (planes, k)."""
        its: npt.NDArray[Any] = self.exchange.message[:, start:stop].cpu().numpy()
        return its

    def decided(self, block: Block) -> npt.NDArray[Any]:
        """What has come down, (planes, k)."""
        its: npt.NDArray[Any] = self.exchange.decision[:, block.start : block.stop].cpu().numpy()
        return its


class Audit:
    """Of one plan. All calls but :meth:`check` are **collective**.

    Args:
        blocks: how many each rank recounts in a step.
    """

    def __init__(
        self,
        blocks: int,
        buckets: Sequence[Bucket],
        exchanges: Sequence[Exchange],
        deciders: Sequence[Decider],
        group: Group,
    ) -> None:
        self._count, self._deciders = blocks, deciders
        self.trails = {
            bucket.index: Trail(bucket, exchange, group.size)
            for bucket, exchange in zip(buckets, exchanges, strict=True)
            if exchange.shard and isinstance(bucket.method.rule, BallotRule)
        }
        self._blocks = [
            Block(trail, shard, place, start, min(start + BLOCK_ITEMS, trail.span(shard).stop))
            for trail in self.trails.values()
            for shard in range(trail.shards)
            for place, start in enumerate(range(trail.span(shard).start, trail.span(shard).stop, BLOCK_ITEMS))
        ]
        self._others = [
            number
            for number, block in enumerate(self._blocks)
            if group.rank != block.trail.exchange.owners(block.shard)[0]
        ]
        self._answer_bytes = max((self._size_of(block) for block in self._blocks), default=0)
        self._complaint = Finding(NOTHING, 0, 0)
        asked = 8 * (blocks + 3) + blocks * self._answer_bytes
        published = sum(trail.mine.nbytes for trail in self.trails.values())
        self.bytes_sent = (group.size - 1) * (published + asked) if self.trails else 0

    # ------------------------------------------------------------------------------------------ in the round

    def publish(self, session: Session, channels: Channels, bucket: Bucket) -> Pending | None:
        """Tell everybody the digests of this rank's ballot, beside the header; None where nobody owns a shard."""
        trail = self.trails.get(bucket.index)
        if trail is None:
            return None
        for shard in range(trail.shards):
            span = trail.span(shard)
            trail.mine[shard] = _digest(_digests(trail.ballot(span.start, span.stop)))
        return session.post(channels.headers.Iallgather(trail.mine, trail.published), trail)

    def check(self, bucket: Bucket) -> None:
        """Compare the ballots on which this rank will decide with what their voters have published."""
        trail = self.trails.get(bucket.index)
        if trail is None or self._complaint.kind:
            return
        for voter, at, its in trail.exchange.held():
            shards = range(at // trail.width, -(-(at + its.shape[1]) // trail.width))
            for shard in shards if its.shape[1] else ():  # the last ranks of many may own nothing
                span = trail.span(shard)
                told = _digest(_digests(its[:, span.start - at : span.stop - at]))
                if (trail.published[voter, shard] != told).any():
                    number = next(n for n, b in enumerate(self._blocks) if (b.trail, b.shard) == (trail, shard))
                    self._complaint = Finding(BALLOT, voter, number)
                    return

    def recount(self, session: Session, said: Said) -> AuditError | None:
        """Recount some blocks of this step's decisions, before anything is applied.

        Returns:
            Who has lied, if somebody has: an error, for every rank to raise.
        """
        if not self.trails:
            return None
        size, rank = session.size, session.rank
        mine = np.full(self._count, -1, np.int64)
        if self._others:
            mine[:] = [_dice.choice(self._others) for _ in mine]
        asked = np.empty((size, self._count), np.int64)
        self._talk(session, session.group.comm.Iallgather(mine, asked), mine, asked)
        answers = np.zeros((size, self._count, self._answer_bytes), np.uint8)
        heard = np.empty_like(answers)
        for auditor, at in zip(*np.nonzero((asked >= 0) & (asked < len(self._blocks))), strict=True):
            self._answer(self._blocks[asked[auditor, at]], answers[auditor, at])
        self._talk(session, session.group.comm.Ialltoall(answers, heard), answers, heard)
        found, self._complaint = self._complaint, Finding(NOTHING, 0, 0)
        for at, number in enumerate(mine.tolist()):
            if not found.kind and number >= 0:
                found = self._judged(number, list(heard[:, at]), said)
        told, findings = np.array(found, np.int64), np.empty((size, len(found)), np.int64)
        self._talk(session, session.group.comm.Iallgather(told, findings), told, findings)
        for accuser, (kind, accused, number) in enumerate(findings.tolist()):
            if kind == NOTHING:
                continue
            if kind not in (BALLOT, ANSWER, DECISION) or not (0 <= accused < size and 0 <= number < len(self._blocks)):
                return AuditError(f"rank {accuser} accuses in a way that cannot be (this is rank {rank})", (accuser,))
            return self._in_public(session, accuser, Finding(kind, accused, number), said)
        return None

    # ----------------------------------------------------------------------------------------------- inside

    @staticmethod
    def _talk(session: Session, request: Any, *buffers: object) -> None:
        with session.tracer.span("audit"):
            session.wait(session.post(request, *buffers))

    def _size_of(self, block: Block) -> int:
        """Bytes of an answer: the ballot, and the digests of all of the shard's blocks."""
        message, span = block.trail.exchange.message, block.trail.span(block.shard)
        digests: int = -(-(span.stop - span.start) // BLOCK_ITEMS)
        return message[:, block.start : block.stop].nbytes + digests * DIGEST_BYTES

    def _answer(self, block: Block, into: Bytes) -> None:
        """This rank's ballot of a block, and the digests of all blocks of that shard."""
        span = block.trail.span(block.shard)
        whole = block.trail.ballot(span.start, span.stop)
        its = np.ascontiguousarray(whole[:, block.start - span.start : block.stop - span.start]).view(np.uint8)
        into[: its.size] = its.reshape(-1)
        digests = _digests(whole)
        into[its.size : its.size + digests.size] = digests.reshape(-1)

    def _ballot_in(self, block: Block, answer: Bytes, voter: int) -> npt.NDArray[Any] | None:
        """The ballot (planes, k) of an answer; None if the voter has published another."""
        message = block.trail.exchange.message
        planes, width = message.shape[0], block.stop - block.start
        size = planes * width * message.element_size()
        digests = answer[size : self._size_of(block)].reshape(-1, DIGEST_BYTES)
        dtype = block.trail.ballot(0, 0).dtype
        ballot = np.ascontiguousarray(answer[:size]).view(dtype).reshape(planes, width)
        if (_digest(ballot) != digests[block.place]).any():
            return None
        return ballot if (_digest(digests) == block.trail.published[voter, block.shard]).all() else None

    def _judged(self, number: int, answers: Sequence[Bytes], said: Said) -> Finding:
        """What is wrong with a block, by all voters' answers."""
        block = self._blocks[number]
        ballots = [self._ballot_in(block, answer, voter) for voter, answer in enumerate(answers)]
        for voter, ballot in enumerate(ballots):
            if ballot is None:
                return Finding(ANSWER, voter, number)
        if self._is_right(block, ballots, block.trail.decided(block), said):
            return Finding(NOTHING, 0, 0)
        return Finding(DECISION, block.trail.exchange.owners(block.shard)[0], number)

    def _is_right(
        self,
        block: Block,
        ballots: Sequence[Any],
        decided: npt.NDArray[Any],
        said: Said,
    ) -> bool:
        """Whether a decision is what the ballots say. What nobody has voted on may be anything."""
        heard, context = said[block.trail.bucket.index]
        mine = torch.from_numpy(decided.copy())
        messages = [torch.from_numpy(ballot) for ballot in ballots]
        self._deciders[block.trail.bucket.index].decide(heard, context, messages, mine, block.start, None)
        return bool((mine.numpy() == decided).all())

    def _in_public(self, session: Session, accuser: int, found: Finding, said: Said) -> AuditError:
        """All ranks show what they have of a block, and see for themselves."""
        block, here = self._blocks[found.block], f"(this is rank {session.rank})"
        where = f"items {block.start} to {block.stop} of message {block.trail.bucket.index}"
        answer = np.zeros(self._answer_bytes, np.uint8)
        self._answer(block, answer)
        decided = np.ascontiguousarray(block.trail.decided(block))
        answers, decisions = (np.empty((session.size, *one.shape), one.dtype) for one in (answer, decided))
        self._talk(session, session.group.comm.Iallgather(answer, answers), answer, answers)
        self._talk(session, session.group.comm.Iallgather(decided, decisions), decided, decisions)
        ballots = [self._ballot_in(block, its, voter) for voter, its in enumerate(answers)]
        liars = tuple(voter for voter, ballot in enumerate(ballots) if ballot is None)
        if liars:
            return AuditError(
                f"ranks {list(liars)} show other ballots than they have published, for {where} {here}", liars
            )
        if found.kind != DECISION:
            return AuditError(
                f"rank {found.rank} has given rank {accuser} another ballot than it has published, for {where}, or "
                f"rank {accuser} says so falsely {here}",
                (found.rank, accuser),
            )
        owners = block.trail.exchange.owners(block.shard)
        right = [self._is_right(block, ballots, decision, said) for decision in decisions]
        if all(right):
            return AuditError(f"rank {accuser} accuses rank {owners[0]} falsely, of {where} {here}", (accuser,))
        one = f"one of ranks {sorted(owners)}, which count together, has"
        if len(owners) == 1:
            one = f"rank {owners[0]} has"
        if any(right):
            odd = [rank for rank, its in enumerate(right) if not its]
            return AuditError(
                f"{one} told ranks {odd} another decision than the others, for {where}, or they say so falsely {here}",
                tuple(owners),
            )
        return AuditError(f"{one} published another decision than the votes say, for {where} {here}", tuple(owners))


def _digests(ballot: npt.NDArray[Any]) -> Bytes:
    """Of each block of a shard, (planes, k): (blocks, 16)."""
    starts = range(0, ballot.shape[1], BLOCK_ITEMS)
    return np.array([_digest(ballot[:, start : start + BLOCK_ITEMS]) for start in starts], np.uint8)


def _digest(its: npt.NDArray[Any]) -> Bytes:
    """(16,)"""
    digest = hashlib.blake2b(np.ascontiguousarray(its).data, digest_size=DIGEST_BYTES).digest()
    return np.frombuffer(digest, np.uint8)
