"""What ranks tell each other besides the messages: the handshake before a step, and a header with each message.

Messages of different sizes must never meet in a collective (that is a hang or garbage, not an error), so the layout is
agreed on before the first of them: the handshake, one small all-gather of fixed size. Whether a rank votes is told with
each message, on a communicator of its own, at the same time as the message's first phase: no latency is added, and in
every exchange each rank knows all voters. Messages stay pure words, cut and received in place.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter_ns

import numpy as np
import numpy.typing as npt

from mpisign.differences import minority
from mpisign.errors import ConsistencyError
from mpisign.group import Channels
from mpisign.lateness import NOBODY, WINDOW, Late, Lateness
from mpisign.layout import FORMAT_VERSION, Bucket, Layout
from mpisign.session import Session
from mpisign.watchdog import Pending

__all__ = [
    "JOINED",
    "NON_FINITE",
    "NO_GRADIENT",
    "REASONS",
    "SCALER_INF",
    "VOTES",
    "Handshake",
    "Header",
    "Heard",
    "Intent",
    "shake_hands",
]

VOTES, NON_FINITE, SCALER_INF, JOINED, NO_GRADIENT = range(5)
REASONS = {
    NON_FINITE: "non-finite gradient",
    SCALER_INF: "inf found by GradScaler",
    JOINED: "joined",
    NO_GRADIENT: "no gradient",
}

EARLY_BITS = 32  # what has been sent before the handshake; above them stands how long ranks have waited
EARLY_MASK = (1 << EARLY_BITS) - 1

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Intent:
    """What this rank says of itself in a handshake.

    Attributes:
        joined_for: the exchanges it has sat out since ``join()``, or None if it trains.
        applied: a digest of what its step applies besides the decision, or 0 where that may differ.
        lines: what the digest stands for.
        gradients: a digest of its gradients, or 0.
        fresh: its plan is new, and nothing of it is shared with other ranks yet.
        void: what it has sent before the handshake must not count.
        posted: how many batches it has sent before.
        lateness: gets to know for whom ranks wait.
    """

    joined_for: int | None = None
    applied: int = 0
    lines: Callable[[], Sequence[str]] = tuple
    gradients: int = 0
    fresh: bool = False
    void: bool = False
    posted: int = 0
    lateness: Lateness | None = None


@dataclass(frozen=True)
class Handshake:
    """Who is here.

    Attributes:
        joined_for: by rank, the exchanges it has sat out since ``join()``, or None if it trains.
        gradients: by rank, a digest of them, or 0 where it has not been told.
        fresh: some rank's plan is new.
        void: what some rank has sent before the handshake must not count.
        posted: the most batches that a rank has sent before.
        late: for whom ranks have waited lately.
    """

    joined_for: tuple[int | None, ...]
    bytes_sent: int
    gradients: tuple[int, ...] = ()
    fresh: bool = False
    void: bool = False
    posted: int = 0
    late: Late = NOBODY

    @property
    def all_joined(self) -> bool:
        return all(steps is not None for steps in self.joined_for)


def shake_hands(
    session: Session,
    layout: Layout,
    fingerprint: int,
    settings: Sequence[str],
    rows: Sequence[str],
    step: int,
    intent: Intent,
) -> Handshake:
    """Make sure that all ranks mean the same bits by the same step, and apply the same. **Collective.**

    Args:
        fingerprint: of ``layout`` and ``settings``.
        rows: the parameters whose headers tell of rows; they change from step to step.

    Raises:
        ConsistencyError: on every rank, naming those that differ and in what.
    """
    told = fingerprint ^ _digest(rows) if rows else fingerprint
    joined_for = 0 if intent.joined_for is None else intent.joined_for + 1
    lateness = intent.lateness or Lateness()
    early = (lateness.says(step) << EARLY_BITS) + 4 * intent.posted + 2 * intent.void + intent.fresh
    said = FORMAT_VERSION, step, told, intent.applied, intent.gradients, early, joined_for
    mine = np.array(said, np.int64)
    began = perf_counter_ns()
    with session.tracer.span("handshake"):
        heard = session.call(mine)
    lateness.waits(perf_counter_ns() - began)
    if step % WINDOW == 0 and (heard[:, 5] >= 0).all():
        lateness.hears(step, (heard[:, 5] >> EARLY_BITS).tolist(), session.group.identities, session.rank)
        heard[:, 5] &= EARLY_MASK
        mine[5] &= EARLY_MASK
    late = lateness.among(session.group.identities)
    sent = (session.size - 1) * mine.nbytes
    if heard.tobytes() == session.size * mine.tobytes() and not joined_for:  # all train, as nearly always
        alike = (intent.gradients,) * session.size
        return Handshake((None,) * session.size, sent, alike, intent.fresh, intent.void, intent.posted, late)
    if not (heard[:, :3] == mine[:3]).all():
        _explain(session, layout, [*settings, *(f"rows of {name!r} are told" for name in rows)], heard)
    for column, what in ((5, "sent less than no messages"), (6, "sat out less than no steps")):
        if (heard[:, column] < 0).any():
            odd = np.flatnonzero(heard[:, column] < 0).tolist()
            raise ConsistencyError(f"ranks {odd} say that they have {what} (this is {session.rank})")
    joined = tuple(None if field == 0 else int(field) - 1 for field in heard[:, 6])
    applied = heard[:, 3]
    if not (applied == applied[0]).all():
        _compare_applied(session, applied, [rank for rank, its in enumerate(joined) if its is None], intent.lines())
    told_early = heard[:, 5] & EARLY_MASK
    return Handshake(
        joined,
        sent,
        tuple(heard[:, 4].tolist()),
        fresh=bool((told_early & 1).any()),
        void=bool((told_early & 2).any()),
        posted=int(told_early.max()) // 4,
        late=late,
    )


def _compare_applied(session: Session, applied: np.ndarray, training: Sequence[int], lines: Sequence[str]) -> None:
    """Raise, on all ranks, if those that train apply different things."""
    places, usual = minority([int(applied[rank]) for rank in training])
    if not places:
        return
    odd = [training[place] for place in places]
    usual_rank = next(rank for rank in training if applied[rank] == usual)
    here, there = session.compare(lines, odd[0], usual_rank, "a comparison of options")
    raise ConsistencyError(
        f"ranks {odd} apply something else to the decision than the others (this is rank {session.rank}), so replicas "
        f"would drift apart: {here} on rank {odd[0]}, {there} on rank {usual_rank}. Change learning rates and other "
        f"options on all ranks alike: give a scheduler the same numbers everywhere, such as mpisign.average(loss), "
        f"or load the same state"
    )


def _digest(texts: Sequence[str]) -> int:
    digest = hashlib.blake2b("\0".join(texts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _explain(session: Session, layout: Layout, settings: Sequence[str], heard: np.ndarray) -> None:
    """All ranks have seen the mismatch, so they can talk about it: raise the error that says what differs."""
    session.demand_same_act(heard)
    for column, what in ((0, "wire format"), (1, "step")):
        values = heard[:, column].tolist()
        if len(set(values)) > 1:
            odd, usual = minority(values)
            said = ", ".join(f"rank {rank} at {values[rank]}" for rank in odd)
            raise ConsistencyError(
                f"ranks are not at the same {what}: {said}, the others at {usual} (this is rank {session.rank}). "
                "Every rank must call step() (or synchronize()) the same number of times and resume from the "
                "same checkpoint; a rank that runs out of batches calls optimizer.join()"
            )
    fingerprints = heard[:, 2].tolist()
    odd, usual = minority(fingerprints)
    usual_rank = fingerprints.index(usual)
    here, there = session.compare([*settings, *layout.lines()], odd[0], usual_rank, "a comparison of layouts")
    raise ConsistencyError(
        f"ranks {odd} have another layout than the others (this is rank {session.rank}); the first difference is "
        f"{here} on rank {odd[0]}, {there} on rank {usual_rank}. Build the same model, with the same parameters "
        f"frozen, and pass the same options on every rank"
    )


@dataclass(frozen=True)
class Heard:
    """What all M ranks say of one bucket of S segments.

    Attributes:
        status: by rank: VOTES, or a key of REASONS.
        votes: (M, S) who votes on which segment.
        ended: by rank, the segment at which its ballot has ended, or -1.
        zero_rows: (M, S) who has found a row of zeros where; all False where rows do not count.
        spoken: by segment with rows on which some voter does not vote: (M, R) the rows on which each rank does.
    """

    status: tuple[int, ...]
    votes: Bools
    ended: tuple[int, ...]
    zero_rows: Bools
    spoken: dict[int, Bools]

    @functools.cached_property
    def voted(self) -> list[bool]:
        """By segment, whether somebody votes on it."""
        return [bool(its) for its in np.any(self.votes, axis=0)]

    @functools.cached_property
    def unanimous(self) -> tuple[int, ...] | None:
        """Who votes on all segments, if nobody votes on some of them alone, nor on some rows of one; else None."""
        if self.spoken or (self.votes != self.votes[:, :1]).any():
            return None
        return self.voters(0)

    def voters(self, segment: int) -> tuple[int, ...]:
        """The ranks that vote on the segment at this place."""
        return tuple(np.flatnonzero(self.votes[:, segment]).tolist())


class Header:
    """What travels beside one bucket: one byte for the status, four for the end of a ballot, and bits.

    Args:
        rows: by the place of each segment whose rows are told, how many it has.
        tells: whether a rank that has found a row of zeros says so.
        ranks: how many there are.

    Attributes:
        size: of what all say, in bytes.
    """

    def __init__(self, bucket: Bucket, rows: dict[int, int], tells: bool, ranks: int) -> None:
        self._segments, self._rows, self._tells = len(bucket.segments), rows, tells
        self._bits = self._segments * (2 if tells else 1) + sum(rows.values())
        self._mine = np.zeros(5 + -(-self._bits // 8), np.uint8)
        self._heard = np.zeros((ranks, self._mine.size), np.uint8)
        self.size = self._heard.size
        self.bytes_sent = (ranks - 1) * self._mine.size
        self._simple = np.concatenate([[VOTES, *b"\xff\xff\xff\xff"], self._pack([np.ones(self._segments, np.bool_)])])
        self._parsed: tuple[bytes, Heard] | None = None  # what was heard last, and what it says

    def _pack(self, parts: Sequence[Bools]) -> npt.NDArray[np.uint8]:
        bits = np.zeros(self._bits, np.bool_)
        at = 0
        for part in parts:
            bits[at : at + part.size] = part
            at += part.size
        return np.packbits(bits, bitorder="little")

    def post(
        self,
        session: Session,
        channels: Channels,
        status: int,
        votes: Bools,
        ended: int = -1,
        zero_rows: Bools | None = None,
        spoken: dict[int, Bools] | None = None,
    ) -> Pending:
        """Begin to tell the others; see :class:`Heard`. **Collective**, in the order of the buckets."""
        if status == VOTES and not self._rows and (zero_rows is None or not zero_rows.any()) and votes.all():
            self._mine[:] = self._simple
        else:
            parts = [votes]
            if self._tells:
                parts.append(np.zeros(self._segments, np.bool_) if zero_rows is None else zero_rows)
            for segment, count in self._rows.items():
                its = None if spoken is None else spoken.get(segment)
                parts.append(np.ones(count, np.bool_) if its is None else its)
            self._mine[0] = status
            self._mine[1:5] = np.frombuffer(np.int32(ended).tobytes(), np.uint8)
            self._mine[5:] = self._pack(parts)
        request = channels.headers.Iallgather(self._mine, self._heard)
        return session.post(request, self)

    @property
    def said(self) -> npt.NDArray[np.uint8]:
        """What all have said, as it was heard last: (bytes,)."""
        assert self._parsed is not None
        return np.frombuffer(self._parsed[0], np.uint8)

    def hear(self, said: npt.NDArray[np.uint8]) -> None:
        """Let it be what another rank has heard."""
        self._heard[:] = said.reshape(self._heard.shape)

    def heard(self, session: Session) -> Heard:
        """What all have said. Raises ConsistencyError on every rank if somebody's cannot be."""
        told = self._heard.tobytes()
        if self._parsed is None or self._parsed[0] != told:  # nearly always they say what they have said before
            self._parsed = told, self._parse(session.rank)
        return self._parsed[1]

    def _parse(self, rank_here: int) -> Heard:
        heard = self._heard
        status = heard[:, 0].tolist()
        ended = heard[:, 1:5].copy().view(np.int32)[:, 0].tolist()
        unknown = [
            rank
            for rank, (code, end) in enumerate(zip(status, ended, strict=True))
            if (code != VOTES and code not in REASONS) or not -1 <= end < self._segments
        ]
        if unknown:
            raise ConsistencyError(
                f"ranks {unknown} abstain for a reason that this mpisign does not know "
                f"({status[unknown[0]]}, {ended[unknown[0]]}; this is "
                f"rank {rank_here}): run the same version on every rank"
            )
        bits = np.unpackbits(heard[:, 5:], axis=1, count=self._bits, bitorder="little").astype(np.bool_)
        votes, at = bits[:, : self._segments], self._segments
        votes &= np.isin(heard[:, :1], (VOTES, NON_FINITE))  # who abstains wholly has no vote whatever its bits say
        zero_rows = np.zeros_like(votes)
        if self._tells:
            zero_rows = bits[:, at : at + self._segments] & votes
            at += self._segments
        spoken = {}
        for segment, count in self._rows.items():
            its = bits[:, at : at + count]
            if not its[votes[:, segment]].all():
                spoken[segment] = its
            at += count
        return Heard(tuple(status), votes, tuple(ended), zero_rows, spoken)
