"""Audits of those who decide: every step, other ranks recount a few blocks of votes, and name who has lied.

When decisions are here, every rank draws blocks of the others' shards, by randomness of its own that nobody could know
before. It asks all voters for their ballots of these blocks, and recounts. If something is wrong all ranks show what
they have sent and got of the block: a voter that has told two ranks two things is found out so, and who accuses
falsely. Nothing of the step has been applied then.

Voters need not say before what they have voted: one that shows what it has never sent can only help a decision that
would also have come about had it sent that. Nothing is hashed, so that an audit costs a few messages and no more. Bytes
of a rank: k ballots of ``BLOCK_ITEMS`` items to each other rank.

Among M ranks, one that falsifies a tenth of its blocks passes 20 steps unseen with a probability of
(1 - 1/(10 (M - 1)))**(20 k (M - 1)), about exp(-2 k).
"""

from __future__ import annotations

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
from mpisign.group import Group
from mpisign.layout import Bucket
from mpisign.method import Method
from mpisign.policy import StepContext
from mpisign.rules import BallotRule
from mpisign.session import Session

__all__ = ["BLOCK_ITEMS", "Audit", "check_audit"]

BLOCK_ITEMS = 1024
NOBODY = -1

_dice = random.SystemRandom()  # not the job's seed, which everybody knows

Ballots = npt.NDArray[np.uint8]
"""(M, bytes), by voter."""
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
    """Some items of one shard of a bucket, from ``start`` to ``stop``."""

    bucket: Bucket
    exchange: Exchange
    shard: int
    start: int
    stop: int

    def ballot(self) -> npt.NDArray[Any]:
        """This rank's own, (planes, k)."""
        its: npt.NDArray[Any] = self.exchange.message[:, self.start : self.stop].cpu().numpy()
        return its

    def decided(self) -> npt.NDArray[Any]:
        """What has come down, (planes, k)."""
        its: npt.NDArray[Any] = self.exchange.decision[:, self.start : self.stop].cpu().numpy()
        return its

    def held(self) -> list[tuple[int, npt.NDArray[Any]]]:
        """The ballots that this rank has counted, (planes, k), and their voters."""
        return [
            (voter, its[:, self.start - at : self.stop - at])
            for voter, at, its in self.exchange.held()
            if at <= self.start and self.stop <= at + its.shape[1]
        ]

    @property
    def shape(self) -> tuple[int, int]:
        """Of a ballot."""
        return self.exchange.message.shape[0], self.stop - self.start

    @property
    def ballot_bytes(self) -> int:
        return self.exchange.message[:, self.start : self.stop].nbytes

    def __str__(self) -> str:
        return f"items {self.start} to {self.stop} of message {self.bucket.index}"


class Audit:
    """Of one plan. All calls are **collective**.

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
        self.blocks = [
            Block(bucket, exchange, begin // exchange.shard, start, min(start + BLOCK_ITEMS, end))
            for bucket, exchange in zip(buckets, exchanges, strict=True)
            if exchange.shard and isinstance(bucket.method.rule, BallotRule)
            for begin in range(0, bucket.length, exchange.shard)
            for end in [min(begin + exchange.shard, bucket.length)]
            for start in range(begin, end, BLOCK_ITEMS)
        ]
        self._others = [
            number for number, block in enumerate(self.blocks) if group.rank != block.exchange.owners(block.shard)[0]
        ]
        self._answer_bytes = max((block.ballot_bytes for block in self.blocks), default=0)
        self.bytes_sent = (group.size - 1) * (8 * (blocks + 1) + blocks * self._answer_bytes) if self.blocks else 0

    def recount(self, session: Session, said: Said) -> AuditError | None:
        """Recount some blocks of this step's decisions, before anything is applied.

        Returns:
            Who has lied, if somebody has: an error, for every rank to raise.
        """
        if not self.blocks:
            return None
        size, rank = session.size, session.rank
        mine = np.full(self._count, NOBODY, np.int64)
        if self._others:
            mine[:] = [_dice.choice(self._others) for _ in mine]
        asked = np.empty((size, self._count), np.int64)
        self._talk(session, session.group.comm.Iallgather(mine, asked), mine, asked)
        answers = np.zeros((size, self._count, self._answer_bytes), np.uint8)
        heard = np.empty_like(answers)
        for auditor, at in zip(*np.nonzero((asked >= 0) & (asked < len(self.blocks))), strict=True):
            self._answer(self.blocks[asked[auditor, at]], answers[auditor, at])
        self._talk(session, session.group.comm.Ialltoall(answers, heard), answers, heard)
        wrong = [at for at, number in enumerate(mine.tolist()) if not self._is_right(number, heard[:, at], said)]
        told = np.array([mine[wrong[0]] if wrong else NOBODY])
        accused = np.empty(size, np.int64)
        self._talk(session, session.group.comm.Iallgather(told, accused), told, accused)
        for accuser, number in enumerate(accused.tolist()):
            if number == NOBODY:
                continue
            if not 0 <= number < len(self.blocks):
                return AuditError(f"rank {accuser} accuses in a way that cannot be (this is rank {rank})", (accuser,))
            return self._in_public(session, accuser, number, heard[:, wrong[0]] if accuser == rank else None, said)
        return None

    # ----------------------------------------------------------------------------------------------- inside

    @staticmethod
    def _talk(session: Session, request: Any, *buffers: object) -> None:
        with session.tracer.span("audit"):
            session.wait(session.post(request, *buffers))

    def _answer(self, block: Block, into: npt.NDArray[np.uint8]) -> None:
        """This rank's ballot of a block."""
        its = np.ascontiguousarray(block.ballot()).view(np.uint8)
        into[: its.size] = its.reshape(-1)

    def _is_right(self, number: int, ballots: Ballots, said: Said, decided: npt.NDArray[Any] | None = None) -> bool:
        """Whether the decision on a block is what these ballots say. What nobody has voted on may be anything.

        Args:
            decided: default what has come down here.
        """
        if number == NOBODY:
            return True
        block = self.blocks[number]
        heard, context = said[block.bucket.index]
        down = block.decided() if decided is None else decided
        mine, its = torch.from_numpy(down.copy()), block.ballot().dtype
        messages = [
            torch.from_numpy(np.ascontiguousarray(ballot[: block.ballot_bytes]).view(its).reshape(block.shape))
            for ballot in ballots
        ]
        self._deciders[block.bucket.index].decide(heard, context, messages, mine, block.start, None)
        return bool((mine.numpy() == down).all())

    def _in_public(
        self, session: Session, accuser: int, number: int, answers: Ballots | None, said: Said
    ) -> AuditError:
        """All ranks show what they have of a block, and see for themselves.

        Args:
            answers: those after which this rank accuses; None on the others.
        """
        block, here, comm = self.blocks[number], f"(this is rank {session.rank})", session.group.comm
        answer = np.zeros(self._answer_bytes, np.uint8)
        self._answer(block, answer)
        decided = np.ascontiguousarray(block.decided())
        shown, decisions = (np.empty((session.size, *one.shape), one.dtype) for one in (answer, decided))
        self._talk(session, comm.Iallgather(answer, shown), answer, shown)
        self._talk(session, comm.Iallgather(decided, decisions), decided, decisions)
        owners = block.exchange.owners(block.shard)
        got = np.zeros((session.size, 1 + self._answer_bytes), np.uint8)  # whether, and what
        if answers is not None:
            got[:, 0], got[:, 1:] = True, answers
        what = f"another ballot than they show now, for {block}"
        if contradicted := self._contradicted(session, got, accuser, shown, what):
            return contradicted
        right = [self._is_right(number, shown, said, decision) for decision in decisions]
        if all(right):
            return AuditError(f"rank {accuser} accuses rank {owners[0]} falsely, of {block} {here}", (accuser,))
        what = f"another ballot to count than they show now, for {block}"
        for owner in owners:
            got = np.zeros_like(got)
            if owner == session.rank:
                for voter, ballot in block.held():
                    its = np.ascontiguousarray(ballot).view(np.uint8).reshape(-1)
                    got[voter, 0], got[voter, 1 : 1 + its.size] = True, its
            if contradicted := self._contradicted(session, got, owner, shown, what):
                return contradicted
        one = f"one of ranks {sorted(owners)}, which count together, has"
        if len(owners) == 1:
            one = f"rank {owners[0]} has"
        if any(right):
            odd = [rank for rank, its in enumerate(right) if not its]
            return AuditError(
                f"{one} told ranks {odd} another decision than the others, for {block}, or they say so falsely {here}",
                tuple(owners),
            )
        return AuditError(f"{one} published another decision than the votes say, for {block} {here}", tuple(owners))

    def _contradicted(
        self, session: Session, got: npt.NDArray[np.uint8], witness: int, shown: Ballots, what: str
    ) -> AuditError | None:
        """Who is named where a witness says that it has got other ballots than other ranks show."""
        self._talk(session, session.group.comm.Ibcast(got, witness), got)
        differ = (got[:, 0] == 1) & (got[:, 1:] != shown).any(axis=1)
        differ[witness] = False
        others = np.flatnonzero(differ).tolist()
        if not others:
            return None
        return AuditError(
            f"ranks {others} have given rank {witness} {what}, or rank {witness} says so falsely (this is rank "
            f"{session.rank})",
            (*others, witness),
        )
