"""mpisign.exchange.header on real ranks: who votes on what, and which ranks mean something else."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import parts
import pytest
import rounds
import torch

import mpisign
from mpisign import ConsistencyError
from mpisign.exchange import header
from mpisign.exchange.header import JOINED, NO_GRADIENT, NON_FINITE, SCALER_INF, VOTES, Header

if TYPE_CHECKING:
    from mpi4py import MPI

pytestmark = pytest.mark.mpi


def needs(comm: MPI.Comm, ranks: int) -> None:
    if comm.size < ranks:
        pytest.skip(f"needs {ranks} ranks")


# --------------------------------------------------------------------------------------------- with each message


@pytest.mark.parametrize("count", [1, 8, 9, 33])
def test_everybody_hears_who_votes_on_what(comm: MPI.Comm, count: int) -> None:
    """Also who has rows of zeros where, who votes on which of the rows that are told, and whose ballot has ended."""
    rows = {0: 11, count - 1: 3}
    its = Header(rounds.bucket_of(count), rows, True, comm.size)
    for step in range(4):
        random = np.random.default_rng(step)
        votes, zero = random.random((2, comm.size, count)) < 0.5 if step else np.ones((2, comm.size, count), np.bool_)
        spoken = {place: random.random((comm.size, its)) < 0.5 for place, its in rows.items()}
        status = [VOTES if rank % 2 or step != 2 else NON_FINITE for rank in range(comm.size)]
        ended = [-1 if code == VOTES else (rank + step) % count for rank, code in enumerate(status)]
        mine = {place: its[comm.rank] for place, its in spoken.items()}
        heard = rounds.tell(its, status[comm.rank], votes[comm.rank], ended[comm.rank], zero[comm.rank], mine)
        assert (heard.status, heard.ended) == (tuple(status), tuple(ended))
        assert np.array_equal(heard.votes, votes)
        assert np.array_equal(heard.zero_rows, zero & votes)
        partly = {place for place, its in spoken.items() if not its[votes[:, place]].all()}
        assert heard.spoken.keys() == partly
        assert all(np.array_equal(heard.spoken[place], spoken[place]) for place in partly)
        for place in range(count):
            assert heard.voters(place) == tuple(r for r in range(comm.size) if votes[r, place])
    assert its.bytes_sent == (comm.size - 1) * (5 + -(-(2 * count + sum(rows.values())) // 8))


def test_who_abstains_wholly_is_no_voter_whatever_its_bits_say(comm: MPI.Comm) -> None:
    codes = [VOTES, NON_FINITE, SCALER_INF, JOINED, NO_GRADIENT]
    its = Header(rounds.bucket_of(9), {}, False, comm.size)
    for turn in range(len(codes)):
        status = tuple(codes[(rank + turn) % len(codes)] for rank in range(comm.size))
        heard = rounds.tell(its, status[comm.rank], [True] * 9)
        assert heard.status == status
        counted = tuple(rank for rank, code in enumerate(status) if code in (VOTES, NON_FINITE))
        assert [heard.voters(place) for place in range(9)] == [counted] * 9


def test_the_usual_header_is_heard_alike_beside_an_unusual_one(comm: MPI.Comm) -> None:
    """It takes a short way if all ranks have sent it."""
    its = Header(rounds.bucket_of(9), {}, True, comm.size)
    for odd in (None, 0, comm.size - 1):
        heard = rounds.tell(its, VOTES, [comm.rank != odd] * 9)
        assert heard.status == (VOTES,) * comm.size
        assert heard.votes.tolist() == [[rank != odd] * 9 for rank in range(comm.size)]
        assert not heard.zero_rows.any()


def test_headers_of_several_messages_may_be_on_their_way(comm: MPI.Comm) -> None:
    session, headers = rounds.session(), [Header(rounds.bucket_of(n), {}, False, comm.size) for n in (3, 9, 1)]
    votes = [np.arange(n) % (comm.rank + 1) == 0 for n in (3, 9, 1)]
    pending = [its.post(session, session.group.channels, VOTES, mine) for its, mine in zip(headers, votes, strict=True)]
    for its, one, n in reversed(list(zip(headers, pending, (3, 9, 1), strict=True))):
        session.wait(one)
        expected = [(np.arange(n) % (rank + 1) == 0).tolist() for rank in range(comm.size)]
        assert its.heard(session).votes.tolist() == expected


# ------------------------------------------------------------------------------------------------- handshake


def test_the_same_layout_at_the_same_step(comm: MPI.Comm) -> None:
    tensors = parts.parameters(*parts.SHAPES, dtypes=parts.DTYPES)
    for step in (0, 1, 10**12):
        handshake = rounds.shake_hands(tensors, step)
        assert handshake.joined_for == (None,) * comm.size
        assert handshake.bytes_sent == (comm.size - 1) * 7 * 8


def test_who_has_joined_and_for_how_long(comm: MPI.Comm) -> None:
    joined = [None if rank % 2 else 10 * rank for rank in range(comm.size)]
    handshake = rounds.shake_hands(parts.parameters((3,)), 7, joined[comm.rank])
    assert handshake.joined_for == tuple(joined)
    assert handshake.all_joined == (comm.size == 1)


def test_one_ranks_wish_to_stop_reaches_all(comm: MPI.Comm) -> None:
    session = rounds.session()
    session.wants_stop = comm.rank == comm.size - 1
    assert rounds.shake_hands(parts.parameters((3,)), 0, comm.rank).joined_for == tuple(range(comm.size))
    assert session.stopping


# ------------------------------------------------------------------------------------------------ disagreement


def refused(comm: MPI.Comm, differ: Callable[[bool], Any], *says: str) -> None:
    """``differ(True)`` on the last rank and ``differ(False)`` on all others is refused on each, and harms nothing."""
    needs(comm, 2)
    with pytest.raises(ConsistencyError) as caught:
        differ(comm.rank == comm.size - 1)
    for text in (*says, f"this is rank {comm.rank}"):
        assert re.search(text, str(caught.value)), (text, str(caught.value))
    assert len(set(comm.allgather(str(caught.value).replace(f"this is rank {comm.rank}", "")))) == 1
    rounds.shake_hands(parts.parameters((3,)), 0)  # the channel is in order


def odd_one(comm: MPI.Comm) -> int:
    """Whom the message names: the last rank is the odd one, also of two, as rank 0's word counts there."""
    return comm.size - 1


def test_another_step(comm: MPI.Comm) -> None:
    refused(
        comm,
        lambda odd: rounds.shake_hands(parts.parameters((3,)), 6 if odd else 5),
        f"not at the same step: rank {odd_one(comm)} at 6, the others at 5",
        r"optimizer\.join\(\)",
    )


def test_another_wire_format(comm: MPI.Comm, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = header.FORMAT_VERSION

    def shake(odd: bool) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(header, "FORMAT_VERSION", usual + odd)
            rounds.shake_hands(parts.parameters((3,)))

    refused(comm, shake, f"not at the same wire format: rank {odd_one(comm)} at {usual + 1}, the others at {usual}")


def test_another_setting(comm: MPI.Comm) -> None:
    refused(
        comm,
        lambda odd: rounds.shake_hands(parts.parameters((3,)), settings=("the same", f"seed {1 + odd}")),
        rf"ranks \[{odd_one(comm)}\] have another layout",
        f"seed 2 on rank {odd_one(comm)}, seed 1 on rank 0",
    )


def test_other_rows_that_are_told(comm: MPI.Comm) -> None:
    """Their headers would be of different lengths."""
    refused(
        comm,
        lambda odd: rounds.shake_hands(parts.parameters((3,), (70, 70)), rows=("p0", "p1") if odd else ("p0",)),
        rf"ranks \[{odd_one(comm)}\] have another layout",
        r"rows of 'p1' are told on rank \d",
    )


@pytest.mark.parametrize(
    ("usual", "other", "says"),
    [
        (((3,), (4,)), ((3,), (5,)), r"'p1' \(5,\) float32 .* on rank \d, 'p1' \(4,\) float32 .* on rank 0"),
        (((3,), (4,)), ((3,),), r"bucket 0 of 1 int32 items on rank \d, 'p1' \(4,\) .* on rank 0"),
        (((2, 3),), ((3, 2),), r"'p0' \(3, 2\) .* on rank \d, 'p0' \(2, 3\) .* on rank 0"),
    ],
    ids=["size", "number", "shape of equal size"],
)
def test_another_model(comm: MPI.Comm, usual: Any, other: Any, says: str) -> None:
    refused(comm, lambda odd: rounds.shake_hands(parts.parameters(*(other if odd else usual))), says)


def test_another_dtype(comm: MPI.Comm) -> None:
    refused(
        comm,
        lambda odd: rounds.shake_hands(parts.parameters((3,), dtypes=[torch.float16 if odd else torch.float32])),
        r"'p0' \(3,\) float16 .* on rank \d, 'p0' \(3,\) float32 .* on rank 0",
    )


def test_another_order_in_memory(comm: MPI.Comm) -> None:
    """The bits would be those of other elements."""
    plain = torch.zeros(2, 3, 2, 2)
    refused(
        comm,
        lambda odd: rounds.shake_hands([plain.to(memory_format=torch.channels_last) if odd else plain]),
        r"strides \(12, 1, 6, 3\) on rank \d, .* strides \(12, 4, 2, 1\) on rank 0",
    )


def test_something_else_than_a_step(comm: MPI.Comm) -> None:
    refused(
        comm,
        lambda odd: mpisign.barrier() if odd else rounds.shake_hands(parts.parameters((3,))),
        rf"ranks \[{odd_one(comm)}\] are in barrier\(\)",
        r"are in step\(\)",
    )


def test_the_majority_is_right(comm: MPI.Comm) -> None:
    """Also where rank 0 is the odd one."""
    needs(comm, 3)
    with pytest.raises(ConsistencyError, match="rank 0 at 9, the others at 3"):
        rounds.shake_hands(parts.parameters((3,)), 9 if comm.rank == 0 else 3)
