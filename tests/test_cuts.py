"""mpisign.cuts: every item once, no part beyond the limit, and no call of MPI's that is not cut."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import mpisign
from mpisign import cuts


@pytest.mark.parametrize(
    ("length", "item", "expected"),
    [
        (0, 1, []),
        (1, 1, [(0, 1)]),
        (100, 1, [(0, 100)]),
        (101, 1, [(0, 100), (100, 1)]),
        (250, 1, [(0, 100), (100, 100), (200, 50)]),
        (60, 4, [(0, 25), (25, 25), (50, 10)]),
        (3, 1000, [(0, 1), (1, 1), (2, 1)]),
    ],
)
def test_parts(length: int, item: int, expected: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuts, "LIMIT_BYTES", 100)
    assert list(cuts.cut(length, item)) == expected


def test_the_limit_is_one_that_mpi_can_count() -> None:
    ((_, length), (start, _)) = cuts.cut(cuts.LIMIT_BYTES + 1)
    assert length == start == cuts.LIMIT_BYTES < 2**31


class Counting:
    """A request that is over when it has been asked so often."""

    def __init__(self, times: int) -> None:
        self.left = times

    def Test(self) -> bool:  # noqa: N802
        assert self.left, "it was over"
        self.left -= 1
        return self.left == 0


def test_together_is_over_when_all_are() -> None:
    one = Counting(1)
    assert cuts.together([one]) is one
    many = cuts.together([Counting(3), Counting(1), Counting(2)])
    assert [many.Test() for _ in range(4)] == [False, False, True, True]
    assert cuts.together([]).Test()


def test_blocks_are_what_they_say() -> None:
    from mpi4py import MPI

    block = cuts.block_type(np.dtype(np.uint32), rows=2, width=3, stride=10, extent=5)
    sent, received = np.arange(40, dtype=np.uint32), np.zeros(12, np.uint32)
    MPI.COMM_SELF.Sendrecv([sent, 2, block], 0, 0, received, 0, 0)
    assert received.tolist() == [0, 1, 2, 10, 11, 12, 5, 6, 7, 15, 16, 17]


WHOLE = {  # what is small whatever the model is, or is the memory of other programs
    "talk.py": {"Iallgather"},  # a call
    "header.py": {"Iallgather"},  # some bits a parameter or row
    "ties.py": {"Iallreduce"},  # a count
    "audit.py": {"Iallgather", "Ialltoall", "Ibcast"},  # a few blocks
    "regrouping.py": {"Allgather"},  # where ranks are
    "group.py": {"Allgather", "Bcast"},  # maps of ranks
    "presence.py": {"Alltoall"},
    "calibration.py": {"Iallgather", "Ialltoall", "Ibcast"},  # trials of some MiB
    "doctor.py": {"Iallgather", "Ialltoall", "Allgather"},
    "attacks.py": {"Allgather", "Gather"},
}


def test_all_traffic_is_cut() -> None:
    collective = re.compile(r"\.(I?(?:all|bcast|reduce|gather|scatter)\w*)\(", re.IGNORECASE)
    for path in Path(mpisign.__file__).parent.rglob("*.py"):
        text = path.read_text()
        used = {name for name in collective.findall(text) if name[0].isupper()} - WHOLE.get(path.name, set())
        cuts_it = re.search(r"\b(cut|shard_operations)\(|\bCHUNK_BYTES\b", text)  # the latter are a few MiB
        assert not used or cuts_it, (path, used)
