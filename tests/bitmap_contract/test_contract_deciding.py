"""mpisign.bitmap: majorities, counts and agreement."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from contract import KEY, TIES, Memory, Subject, Votes, array, coins, random_words, some_votes, votes

from mpisign.bitmap import host
from mpisign.bitmap.host import words_for
from mpisign.bitmap.kernels import BITMAP_CAPACITY

# ------------------------------------------------------------------------------------------------- deciding


def check_majority(
    backend: Subject,
    memory: Memory,
    cast: Votes,
    ties: str,
    abstain: bool,
    first_word: int = 0,
    offsets: tuple[int, int] = (0, 0),
) -> int:
    """Compare with the oracle; returns the ties. ``offsets``: of the ballots and of what is written, in words."""
    ballots = cast.ballots
    n = len(ballots[0])
    k, wants_moved = words_for(n), abstain or ties == "zero"
    out, moved = (memory.words(k, offsets[1]) for _ in range(2))
    tied = backend.majority(
        [memory.put(words, offset=offsets[0]) for words in cast.signs],
        out,
        ties=ties,
        key=KEY,
        first_word=first_word,
        nonzeros=[memory.put(words, offset=offsets[0]) for words in cast.nonzeros] if abstain else None,
        out_nonzero=moved if wants_moved else None,
    )
    expected, expected_ties = oracle.majority(ballots, ties, coins(KEY, first_word, n))
    decided = np.where(oracle.to_flags(array(out), n), 1, -1)
    if wants_moved:
        decided[~oracle.to_flags(array(moved), n)] = 0
    assert (decided == expected).all(), f"{len(ballots)} ranks"
    assert tied == expected_ties, f"{len(ballots)} ranks"
    return tied


@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("abstaining", [0.0, 0.2, 0.9])
def test_majority_of_1_to_70_ranks(abstaining: float, ties: str, backend: Subject, memory: Memory) -> None:
    tied = 0
    for ranks in range(1, 71):
        cast = some_votes(ranks, 200, abstaining)
        tied += check_majority(backend, memory, cast, ties, abstaining > 0, 2**32 - 3)
    assert tied > 100


@pytest.mark.parametrize("abstain", [False, True])
@pytest.mark.parametrize("ties", TIES)
def test_majority_of_sizes_and_alignments(ties: str, abstain: bool, backend: Subject, memory: Memory) -> None:
    """Four words a thread and 256 threads a block; 16-byte accesses only where every bitmap is aligned."""
    for words in (1, 3, 4, 5, 127, 1023, 1024, 1025, 1028):
        for offsets in ((0, 0), (0, 1), (2, 0), (3, 3)):
            n = 32 * words - words % 32
            check_majority(backend, memory, some_votes(4, n, 0.3 * abstain), ties, abstain, words, offsets)


@pytest.mark.parametrize("ranks", [BITMAP_CAPACITY // 2 + 1, BITMAP_CAPACITY, BITMAP_CAPACITY + 1, 700])
def test_majority_of_hundreds(ranks: int, backend: Subject, memory: Memory) -> None:
    """More than the parameters of a launch can list."""
    for abstain in (False, True):
        check_majority(backend, memory, some_votes(ranks, 100, 0.3 * abstain), "coin", abstain)


def test_one_vote_more_decides_whatever_the_number(backend: Subject, memory: Memory) -> None:
    """Counters of every number of planes, at their fullest."""
    for ranks in (1, 2, 3, 4, 7, 8, 15, 16, 31, 32, 63, 64, 127, 128, 255, 256):
        for ayes in {0, ranks // 2 - 1, ranks // 2, ranks // 2 + 1, ranks} - {-1}:
            ballots = [np.full(40, 1 if rank < ayes else -1, np.int8) for rank in range(ranks)]
            for abstain in (False, True):
                check_majority(backend, memory, votes(ballots), "zero", abstain)


def test_ballots_that_lie_about_abstaining_are_counted_alike(backend: Subject, memory: Memory) -> None:
    """A sign where its rank does not vote breaks the format; every backend must still decide the same."""
    ballots, nonzeros = random_words((2, 6, 50))
    plain = [memory.put(words) for words in (*ballots, *nonzeros)]
    out, moved = memory.words(50), memory.words(50)
    tied = backend.majority(plain[:6], out, ties="coin", key=KEY, nonzeros=plain[6:], out_nonzero=moved)
    expected = np.empty((2, 50), np.uint32)
    reference = host.majority(
        list(ballots), expected[0], ties="coin", key=KEY, nonzeros=list(nonzeros), out_nonzero=expected[1]
    )
    assert tied == reference
    assert (np.stack([array(out), array(moved)]) == expected).all()


@pytest.mark.parametrize("ties", TIES)
def test_nobody_votes_is_no_tie_and_does_not_move(ties: str, backend: Subject, memory: Memory) -> None:
    nothing = [memory.put(np.zeros(2, np.uint32)) for _ in range(2)]
    out, moved = memory.words(2), memory.words(2)
    assert backend.majority(nothing, out, ties=ties, key=KEY, nonzeros=nothing, out_nonzero=moved) == 0
    assert not array(moved).any()


def test_nothing_to_decide(backend: Subject, memory: Memory) -> None:
    empty = memory.words(0)
    assert backend.majority([empty, empty], empty) == 0
    assert backend.agreement(empty, empty, 0) == (0, 0)
    backend.count([empty, empty], empty.view(1, 0).expand(2, 0))


def test_ties_are_returned_or_added_to_those_given(backend: Subject, memory: Memory) -> None:
    """Where it saves a wait, a GPU adds them up there."""
    tied, returned = torch.tensor(5, device=backend.device), 0
    for _ in range(2):
        returned += backend.majority(
            [memory.put(np.array([word], np.uint32)) for word in (0b0011, 0b0101)], memory.words(1), tied=tied
        )
    assert (returned, tied.item()) in ((4, 5), (0, 9))


@pytest.mark.parametrize("options", [{"ties": "zero"}, {"nonzeros": []}])
def test_do_not_move_needs_a_plane_to_say_so(options: dict, backend: Subject, memory: Memory) -> None:
    with pytest.raises(ValueError, match="out_nonzero"):
        backend.majority([memory.words(1)], memory.words(1), **options)


# ------------------------------------------------------------------------------------------------- counting


def test_count(backend: Subject, memory: Memory) -> None:
    """Also into rows that lie further apart than they are long."""
    for ballots in (1, 2, 3, 4, 5, 7, 8, 16, 63, 64, 70, 256, BITMAP_CAPACITY + 1):
        for k, offset, gap, spare in ((5, 1, 0, 0), (4, 0, 0, 1), (7, 0, 1, 0), (1027, 0, 5, 2)):
            if k > 1000 and ballots > 8:
                continue
            words = random_words((ballots, k), ballots)
            p = ballots.bit_length() + spare
            planes = memory.put(np.full((p, k + gap), 0xA5A5A5A5, np.uint32), offset=offset)
            backend.count([memory.put(row, offset=offset) for row in words], planes[:, :k])
            bits = np.stack([oracle.to_flags(row, 32 * k) for row in words])
            rows = array(planes)
            counted = sum((1 << i) * oracle.to_flags(row[:k], 32 * k).astype(int) for i, row in enumerate(rows))
            assert (counted == bits.sum(axis=0)).all()
            assert (rows[:, k:] == 0xA5A5A5A5).all()


def number_of(count: np.ndarray, n: int) -> np.ndarray:
    """What a bit-sliced count says of n elements."""
    return sum((1 << i) * oracle.to_flags(row, n).astype(int) for i, row in enumerate(count))


def bit_sliced(numbers: np.ndarray, planes: int) -> np.ndarray:
    return np.stack([oracle.to_words(numbers >> i & 1) for i in range(planes)])


# Whose sums take 1, 2, 3, 4, 5, 7 and 10 planes: one for each of the kernels.
COUNTS = [(1, 1, 0), (2, 1, 0), (2, 2, 0), (3, 2, 0), (2, 3, 1), (5, 2, 3), (40, 4, 0)]


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("k", [1, 4, 7, 1028])
@pytest.mark.parametrize(("counts", "planes", "spare"), COUNTS)
def test_add_counts(
    counts: int, planes: int, spare: int, k: int, offset: int, backend: Subject, memory: Memory
) -> None:
    numbers = np.random.default_rng(counts).integers(0, 2**planes, (counts, 32 * k))
    some = [memory.put(bit_sliced(these, planes), offset=offset) for these in numbers]
    total = memory.put(
        np.full(((counts * (2**planes - 1)).bit_length() + spare, k), 0xA5A5A5A5, np.uint32), offset=offset
    )
    backend.add_counts(some, total)
    assert (number_of(array(total), 32 * k) == numbers.sum(0)).all()


def test_add_more_counts_than_a_launch_can_list(backend: Subject, memory: Memory) -> None:
    numbers = np.random.default_rng(0).integers(0, 8, (BITMAP_CAPACITY // 3 + 1, 64))
    total = memory.put(np.zeros((11, 2), np.uint32))
    backend.add_counts([memory.put(bit_sliced(these, 3)) for these in numbers], total)
    assert (number_of(array(total), 64) == numbers.sum(0)).all()


@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("k", [1, 4, 1025])
def test_decide_counts(k: int, ties: str, backend: Subject, memory: Memory) -> None:
    """Of as many votes everywhere, and of more or fewer; from counts of any numbers of planes."""
    n = 32 * k
    for voters in (1, 2, 3, 4, 7, 8, 15, 16, 200) if k < 1000 else (3, 200):
        rng = np.random.default_rng(voters)
        for some in (False, True):
            voted = rng.integers(0, voters + 1, n) if some else np.full(n, voters)
            yes = np.where(rng.random(n) < 0.3, voted // 2, rng.integers(0, voted + 1))
            expected = np.sign(2 * yes - voted)
            tied = (expected == 0) & (voted > 0)
            broken = {"coin": coins(KEY, 5, n), "positive": np.ones(n), "zero": np.zeros(n)}[ties]
            expected[tied] = broken[tied]
            for spare in (0, 2):
                out, moved = memory.words(k), memory.words(k)
                planes = voters.bit_length()
                found = backend.decide_counts(
                    memory.put(bit_sliced(yes, planes)),
                    memory.put(bit_sliced(voted, planes + spare)) if some else voters,
                    out, ties=ties, key=KEY, first_word=5, out_nonzero=moved,
                )  # fmt: skip
                decided = np.where(oracle.to_flags(array(out), n), 1, -1)
                decided[~oracle.to_flags(array(moved), n)] = 0
                assert (decided == expected).all()
                assert found == tied.sum()


def test_decided_counts_add_ties_to_those_given(backend: Subject, memory: Memory) -> None:
    tied, returned = torch.tensor(5, device=backend.device), 0
    for _ in range(2):
        yes = memory.put(np.array([[0b0110], [0b1000]], np.uint32))  # of the lowest: 0, 1, 1, 2, and then 0
        returned += backend.decide_counts(yes, 2, memory.words(1), tied=tied)
    assert (returned, tied.item()) in ((4, 5), (0, 9))


def test_counts_that_do_not_fit(backend: Subject, memory: Memory) -> None:
    def planes(p: int) -> torch.Tensor:
        return memory.put(np.zeros((p, 1), np.uint32))

    with pytest.raises(ValueError, match="2 planes cannot hold the sum of counts of 3, 3 planes"):
        backend.add_counts([planes(3), planes(3)], planes(2))
    with pytest.raises(ValueError, match="4 planes cannot hold the sum of counts of 3, 2 planes"):
        backend.add_counts([planes(3), planes(2)], planes(4))
    with pytest.raises(ValueError, match="2 planes cannot count 8 voters"):
        backend.decide_counts(planes(2), 8, memory.words(1))
    for options in ({"voted": planes(2)}, {"voted": 2, "ties": "zero"}):
        with pytest.raises(ValueError, match="out_nonzero"):
            backend.decide_counts(planes(2), options.pop("voted"), memory.words(1), **options)


def test_planes_too_few_to_count(backend: Subject, memory: Memory) -> None:
    with pytest.raises(ValueError, match="2 planes cannot count 4 ballots"):
        backend.count([memory.words(1)] * 4, memory.put(np.zeros((2, 1), np.uint32)))


@pytest.mark.parametrize("n", [1, 31, 32, 33, 200, 32 * 1024 + 1])
def test_agreement(n: int, backend: Subject, memory: Memory) -> None:
    for ranks in (1, 3):
        ballots = some_votes(ranks, n, 0.3).ballots
        decision, _ = oracle.majority(ballots, "zero")
        signs, moved = (memory.put(oracle.to_words(flags)) for flags in (decision > 0, decision != 0))
        for ballot in ballots:
            mine, spoke = (memory.put(oracle.to_words(flags), offset=1) for flags in (ballot > 0, ballot != 0))
            both = (ballot != 0) & (decision != 0)
            together = int((both & (ballot == decision)).sum())
            assert backend.agreement(mine, signs, n, spoke, moved) == (together, int(both.sum()))
            assert backend.agreement(mine, signs, n) == (int(((ballot > 0) == (decision > 0)).sum()), n)
