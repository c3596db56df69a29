"""mpisign.exchange.header on real ranks: who votes on what, and which ranks mean something else."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import parts
import pytest
import torch

import mpisign
from mpisign import ConsistencyError
from mpisign.exchange import header
from mpisign.exchange.header import JOINED, NO_GRADIENT, NON_FINITE, SCALER_INF, VOTES

if TYPE_CHECKING:
    from mpi4py import MPI

pytestmark = pytest.mark.mpi


def needs(comm: MPI.Comm, ranks: int) -> None:
    if comm.size < ranks:
        pytest.skip(f"needs {ranks} ranks")


# --------------------------------------------------------------------------------------------- participation


@pytest.mark.parametrize("count", [0, 1, 8, 9, 33])
def test_everybody_hears_who_has_which_gradient(comm: MPI.Comm, count: int) -> None:
    has = [[(i + rank) % 3 != 0 or i % 7 == 0 for i in range(count)] for rank in range(comm.size)]
    for step in range(3):
        heard = parts.participation(VOTES, has[comm.rank], step)
        assert heard.status == (VOTES,) * comm.size
        assert heard.voters == tuple(tuple(r for r in range(comm.size) if has[r][i]) for i in range(count))
        assert heard.bytes_sent == (comm.size - 1) * (1 + -(-count // 8))


def test_who_abstains_is_no_voter_whatever_it_has(comm: MPI.Comm) -> None:
    codes = [VOTES, NON_FINITE, SCALER_INF, JOINED, NO_GRADIENT]
    for turn in range(len(codes)):
        status = tuple(codes[(rank + turn) % len(codes)] for rank in range(comm.size))
        heard = parts.participation(status[comm.rank], [True] * 9)
        assert heard.status == status
        assert heard.voters == (tuple(rank for rank, code in enumerate(status) if code == VOTES),) * 9


# ------------------------------------------------------------------------------------------------- handshake


def test_the_same_layout_at_the_same_step(comm: MPI.Comm) -> None:
    tensors = parts.parameters(*parts.SHAPES, dtypes=parts.DTYPES)
    for step in (0, 1, 10**12):
        handshake = parts.shake_hands(tensors, step)
        assert handshake.joined_for == (None,) * comm.size
        assert handshake.bytes_sent == (comm.size - 1) * 4 * 8


def test_who_has_joined_and_for_how_long(comm: MPI.Comm) -> None:
    joined = [None if rank % 2 else 10 * rank for rank in range(comm.size)]
    handshake = parts.shake_hands(parts.parameters((3,)), 7, joined[comm.rank])
    assert handshake.joined_for == tuple(joined)
    assert handshake.all_joined == (comm.size == 1)


def test_one_ranks_wish_to_stop_reaches_all(comm: MPI.Comm) -> None:
    session = parts.session()
    session.wants_stop = comm.rank == comm.size - 1
    assert parts.shake_hands(parts.parameters((3,)), 0, comm.rank).joined_for == tuple(range(comm.size))
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
    parts.shake_hands(parts.parameters((3,)), 0)  # the channel is in order


def odd_one(comm: MPI.Comm) -> int:
    """Whom the message names: the last rank is the odd one, also of two, as rank 0's word counts there."""
    return comm.size - 1


def test_another_step(comm: MPI.Comm) -> None:
    refused(
        comm,
        lambda odd: parts.shake_hands(parts.parameters((3,)), 6 if odd else 5),
        f"not at the same step: rank {odd_one(comm)} at 6, the others at 5",
        r"optimizer\.join\(\)",
    )


def test_another_wire_format(comm: MPI.Comm, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = header.FORMAT_VERSION

    def shake(odd: bool) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(header, "FORMAT_VERSION", usual + odd)
            parts.shake_hands(parts.parameters((3,)))

    refused(comm, shake, f"not at the same wire format: rank {odd_one(comm)} at {usual + 1}, the others at {usual}")


def test_another_setting(comm: MPI.Comm) -> None:
    refused(
        comm,
        lambda odd: parts.shake_hands(parts.parameters((3,)), settings=("the same", f"seed {1 + odd}")),
        rf"ranks \[{odd_one(comm)}\] have another layout",
        f"seed 2 on rank {odd_one(comm)}, seed 1 on rank 0",
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
    refused(comm, lambda odd: parts.shake_hands(parts.parameters(*(other if odd else usual))), says)


def test_another_dtype(comm: MPI.Comm) -> None:
    refused(
        comm,
        lambda odd: parts.shake_hands(parts.parameters((3,), dtypes=[torch.float16 if odd else torch.float32])),
        r"'p0' \(3,\) float16 .* on rank \d, 'p0' \(3,\) float32 .* on rank 0",
    )


def test_another_order_in_memory(comm: MPI.Comm) -> None:
    """The bits would be those of other elements."""
    plain = torch.zeros(2, 3, 2, 2)
    refused(
        comm,
        lambda odd: parts.shake_hands([plain.to(memory_format=torch.channels_last) if odd else plain]),
        r"strides \(12, 1, 6, 3\) on rank \d, .* strides \(12, 4, 2, 1\) on rank 0",
    )


def test_something_else_than_a_step(comm: MPI.Comm) -> None:
    refused(
        comm,
        lambda odd: mpisign.barrier() if odd else parts.shake_hands(parts.parameters((3,))),
        rf"ranks \[{odd_one(comm)}\] are in barrier\(\)",
        r"are in step\(\)",
    )


def test_the_majority_is_right(comm: MPI.Comm) -> None:
    """Also where rank 0 is the odd one."""
    needs(comm, 3)
    with pytest.raises(ConsistencyError, match="rank 0 at 9, the others at 3"):
        parts.shake_hands(parts.parameters((3,)), 9 if comm.rank == 0 else 3)
