"""mpisign.bitmap.host against the oracle: pack, unpack, majority and agreement, bit for bit."""

from __future__ import annotations

import functools
import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import oracle
import pytest
import torch

from mpisign.bitmap.host import (
    FORMATS,
    PACK_BLOCK,
    FloatFormat,
    agreement,
    all_finite,
    majority,
    pack,
    unpack,
    words_for,
)

Bits = npt.NDArray[np.unsignedinteger]
Words = npt.NDArray[np.uint32]

SMALL = [0, 1, 7, 31, 32, 33, 1023]
BLOCKS = [PACK_BLOCK - 1, PACK_BLOCK, PACK_BLOCK + 1]
ZEROS = ["coin", "abstain", "positive", "rows"]
TWO_PLANES = ("abstain", "rows")  # of those
TIES = ["coin", "zero", "positive"]
KEY = oracle.coin_key(3, 1, 4)
FULL = 0xFFFFFFFF

formats = pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda fmt: fmt.name)
coins = functools.cache(oracle.coins)


def as_doubles(bits: Bits, fmt: FloatFormat) -> npt.NDArray[np.float64]:
    """The values exactly: every format fits into a double."""
    signed = torch.from_numpy(bits.view(f"i{bits.itemsize}").copy())
    return signed.view(getattr(torch, fmt.name)).double().numpy()


def edge_values(fmt: FloatFormat) -> list[int]:
    """Both zeros, the smallest and largest denormals, the smallest and largest normals, one; of either sign."""
    smallest_normal = fmt.infinity & -fmt.infinity
    positive = [0, 1, smallest_normal - 1, smallest_normal, fmt.one, fmt.infinity - 1]
    return positive + [fmt.sign | value for value in positive]


def non_finite_values(fmt: FloatFormat) -> list[int]:
    """Inf, a signalling and a quiet NaN, and the NaN of all ones; of either sign."""
    positive = [fmt.infinity, fmt.infinity + 1, fmt.infinity | (fmt.infinity & -fmt.infinity) >> 1, fmt.sign - 1]
    return positive + [fmt.sign | value for value in positive]


def some_values(n: int, fmt: FloatFormat, seed: int = 0) -> Bits:
    """Any finite bit patterns, a third of them from the edges."""
    rng = np.random.default_rng(seed)
    magnitudes = rng.integers(0, fmt.infinity, n, np.uint64)
    any_value = np.where(rng.random(n) < 0.5, magnitudes, magnitudes | np.uint64(fmt.sign))
    edges = np.array(edge_values(fmt), np.uint64)[rng.integers(0, len(edge_values(fmt)), n)]
    return np.where(rng.random(n) < 1 / 3, edges, any_value).astype(fmt.bits)


def check_pack(values: Bits, fmt: FloatFormat, zeros: str, first_word: int = 0) -> None:
    n = values.size
    buffers = np.full((2, words_for(n) + 2), 0xA5A5A5A5, np.uint32)
    words, nonzero = buffers[:, 1:-1]
    wants_nonzero = zeros in TWO_PLANES
    finite = pack(
        values, fmt, words, zeros=zeros, key=KEY, first_word=first_word, nonzero=nonzero if wants_nonzero else None
    )
    doubles = as_doubles(values, fmt)
    ballot = oracle.ballot(doubles, "coin" if zeros == "rows" else zeros, coins(KEY, first_word, n))
    assert finite is True
    assert (words == oracle.to_words(ballot > 0)).all()
    if wants_nonzero:
        assert (nonzero == oracle.to_words(doubles != 0)).all()
    assert (buffers[:, [0, -1]] == 0xA5A5A5A5).all(), "words outside the message were written"


# ------------------------------------------------------------------------------------------------ packing


@pytest.mark.parametrize(("n", "words"), [(0, 0), (1, 1), (31, 1), (32, 1), (33, 2), (64, 2), (65, 3)])
def test_words_for(n: int, words: int) -> None:
    assert words_for(n) == words


@formats
@pytest.mark.parametrize("zeros", ZEROS)
@pytest.mark.parametrize("n", SMALL)
def test_pack(n: int, zeros: str, fmt: FloatFormat) -> None:
    check_pack(some_values(n, fmt), fmt, zeros)
    check_pack(some_values(n, fmt), fmt, zeros, first_word=2**33 + 1)


@formats
@pytest.mark.parametrize(
    ("n", "zeros"), [*((n, "coin") for n in BLOCKS), *((BLOCKS[-1], zeros) for zeros in ZEROS[1:])]
)
def test_pack_across_blocks(n: int, zeros: str, fmt: FloatFormat) -> None:
    check_pack(some_values(n, fmt), fmt, zeros)


@formats
@pytest.mark.parametrize("zeros", ZEROS)
def test_pack_zeros_only(zeros: str, fmt: FloatFormat) -> None:
    values = np.zeros(100, fmt.bits)
    values[1::2] = fmt.sign
    check_pack(values, fmt, zeros)


@formats
@pytest.mark.parametrize("zeros", ZEROS)
def test_pack_without_zeros(zeros: str, fmt: FloatFormat) -> None:
    values = some_values(1000, fmt)
    check_pack(np.where((values & fmt.bits.type(fmt.sign - 1)) == 0, fmt.bits.type(1), values), fmt, zeros)


@formats
@pytest.mark.parametrize("zeros", ZEROS)
def test_pack_of_a_slice_is_the_slice_of_the_pack(zeros: str, fmt: FloatFormat) -> None:
    """Buckets and pieces are cut at words; the bits must not notice."""
    values = some_values(PACK_BLOCK + 1000, fmt)
    whole, parts = np.zeros((2, 2, words_for(values.size)), np.uint32)

    def pack_words(lo: int, hi: int, words: Words, nonzero: Words) -> None:
        plane = nonzero[lo:hi] if zeros in TWO_PLANES else None
        pack(values[32 * lo : 32 * hi], fmt, words[lo:hi], zeros=zeros, key=KEY, first_word=5 + lo, nonzero=plane)

    pack_words(0, whole.shape[1], *whole)
    cuts = [0, 1, 2, 3, 40, PACK_BLOCK // 32 - 1, PACK_BLOCK // 32 + 9, whole.shape[1]]
    for lo, hi in itertools.pairwise(cuts):
        pack_words(lo, hi, *parts)
    assert (whole == parts).all()


@formats
@pytest.mark.parametrize("offset", [1, 2, 3])
def test_pack_and_unpack_misaligned_memory(offset: int, fmt: FloatFormat) -> None:
    n = 1000
    memory = np.zeros(offset + n * fmt.bits.itemsize, np.uint8)
    values = memory[offset:].view(fmt.bits)
    values[:] = some_values(n, fmt)
    check_pack(values, fmt, "coin")
    check_pack(values[1:], fmt, "coin")
    words = oracle.to_words(np.random.default_rng(1).random(n) < 0.5)
    unpack(words, fmt, values)
    assert (as_doubles(values, fmt) == np.where(oracle.to_flags(words, n), 1.0, -1.0)).all()


# ------------------------------------------------------------------------------------------ finite or not


@formats
@pytest.mark.parametrize("zeros", ZEROS)
@pytest.mark.parametrize("n", [1, 33, PACK_BLOCK + 33])
def test_one_non_finite_value_is_found_wherever_it_is(n: int, zeros: str, fmt: FloatFormat) -> None:
    values = some_values(n, fmt)
    words, plane = np.empty((2, words_for(n)), np.uint32)
    nonzero = plane if zeros in TWO_PLANES else None
    for place in {0, n // 2, n - 1, min(PACK_BLOCK - 1, n - 1), min(PACK_BLOCK, n - 1)}:
        kept = values[place]
        for bad in non_finite_values(fmt):
            values[place] = bad
            assert not all_finite(values, fmt)
            assert pack(values, fmt, words, zeros=zeros, key=KEY, nonzero=nonzero) is False
        values[place] = kept
        assert all_finite(values, fmt)


@formats
@pytest.mark.parametrize("n", [0, 1, 1000, PACK_BLOCK + 1])
def test_huge_finite_values_are_finite(n: int, fmt: FloatFormat) -> None:
    """Their squares and their sum overflow."""
    largest = np.full(n, fmt.infinity - 1, fmt.bits)
    largest[::3] |= fmt.bits.type(fmt.sign)
    assert all_finite(largest, fmt)
    check_pack(largest, fmt, "coin")


@formats
def test_infinities_of_both_signs_do_not_cancel(fmt: FloatFormat) -> None:
    assert not all_finite(np.array([fmt.infinity, fmt.sign | fmt.infinity], fmt.bits), fmt)


# ---------------------------------------------------------------------------------------------- unpacking


@formats
@pytest.mark.parametrize("masked", [False, True], ids=["signs", "signs and zeros"])
@pytest.mark.parametrize("n", [*SMALL, BLOCKS[-1]])
def test_unpack(n: int, masked: bool, fmt: FloatFormat) -> None:
    rng = np.random.default_rng(n)
    words, nonzero = rng.integers(0, 2**32, (2, words_for(n)), np.uint32)
    memory = np.full(n + 2, 7, fmt.bits)
    unpack(words, fmt, memory[1:-1], nonzero=nonzero if masked else None)
    expected = np.where(oracle.to_flags(words, n), 1.0, -1.0)
    if masked:
        expected[~oracle.to_flags(nonzero, n)] = 0.0
    values = as_doubles(memory[1:-1], fmt)
    assert (values == expected).all()
    assert not np.signbit(values[values == 0]).any(), "a coordinate that does not move is +0"
    assert memory[0] == memory[-1] == 7


@formats
def test_pack_inverts_unpack(fmt: FloatFormat) -> None:
    n = 1000
    words = oracle.to_words(np.random.default_rng(2).random(n) < 0.5)
    values, again = np.empty(n, fmt.bits), np.empty_like(words)
    unpack(words, fmt, values)
    assert pack(values, fmt, again)
    assert (again == words).all()


# ----------------------------------------------------------------------------------------------- deciding


def some_ballots(ranks: int, n: int, abstaining: float) -> list[oracle.Ballot]:
    rng = np.random.default_rng((ranks, n))
    leaning = rng.random(n)  # so that close, clear and unanimous votes all occur
    ballots = [np.where(rng.random(n) < leaning, 1, -1).astype(np.int8) for _ in range(ranks)]
    for ballot in ballots:
        ballot[rng.random(n) < abstaining] = 0
        ballot[: n // 8] = 0 if abstaining else ballot[: n // 8]
    return ballots


@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("abstaining", [0.0, 0.2, 0.9])
def test_majority(abstaining: float, ties: str) -> None:
    """By 1 to 70 ranks: past 64 the counters have seven planes."""
    n, first_word = 200, 2**32 - 3
    coin = coins(KEY, first_word, n)
    tied_at_all = 0
    for ranks in range(1, 71):
        ballots = some_ballots(ranks, n, abstaining)
        out, moved = np.full((2, words_for(n)), 0xA5A5A5A5, np.uint32)
        tied = majority(
            [oracle.to_words(ballot > 0) for ballot in ballots],
            out,
            ties=ties,
            key=KEY,
            first_word=first_word,
            nonzeros=[oracle.to_words(ballot != 0) for ballot in ballots] if abstaining else None,
            out_nonzero=moved if abstaining or ties == "zero" else None,
        )
        expected, expected_ties = oracle.majority(ballots, ties, coin)
        decided = np.where(oracle.to_flags(out, n), 1, -1)
        if abstaining or ties == "zero":
            decided[~oracle.to_flags(moved, n)] = 0
        assert (decided == expected).all(), f"{ranks} ranks"
        assert tied == expected_ties, f"{ranks} ranks"
        tied_at_all += tied
    assert tied_at_all > 100


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("abstain", [False, True])
def test_a_decision_does_not_depend_on_the_shards(ranks: int, ties: str, abstain: bool) -> None:
    """Two-phase decides shards, all-gather whole buckets, in blocks; all must be the same bits and ties."""
    k = 20_003
    rng = np.random.default_rng(ranks)
    nonzeros = list(rng.integers(0, 2**32, (ranks, k), np.uint32))
    ballots = [nonzero & rng.integers(0, 2**32, k, np.uint32) for nonzero in nonzeros]

    def decide(lo: int, hi: int, out: Words, moved: Words) -> int:
        return majority(
            [ballot[lo:hi] for ballot in ballots],
            out[lo:hi],
            ties=ties,
            key=KEY,
            first_word=11 + lo,
            nonzeros=[nonzero[lo:hi] for nonzero in nonzeros] if abstain else None,
            out_nonzero=moved[lo:hi],
        )

    whole, shards = np.empty((2, 2, k), np.uint32)
    tied = decide(0, k, *whole)
    cuts = [0, 1, 8, 4001, 8191, 8192, 8193, 16_384, k]
    assert tied == sum(decide(lo, hi, *shards) for lo, hi in itertools.pairwise(cuts))
    assert (whole == shards).all()


def test_padding_neither_ties_nor_votes() -> None:
    """One element, two opposed votes: one tie, although 31 more bits agree on 0."""
    for nonzeros in (None, [np.ones(1, np.uint32)] * 2):
        out, moved = np.empty((2, 1), np.uint32)
        ballots = [np.ones(1, np.uint32), np.zeros(1, np.uint32)]
        assert majority(ballots, out, ties="positive", nonzeros=nonzeros, out_nonzero=moved) == 1
        assert out[0] == 1


def test_nobody_votes_is_no_tie_and_does_not_move() -> None:
    nothing = [np.zeros(2, np.uint32)] * 2
    for ties in TIES:
        out, moved = np.full((2, 2), FULL, np.uint32)
        assert majority(nothing, out, ties=ties, key=KEY, nonzeros=nothing, out_nonzero=moved) == 0
        assert not moved.any()


def test_nothing_to_decide() -> None:
    empty = np.empty(0, np.uint32)
    assert majority([empty, empty], empty) == 0


def test_majority_leaves_the_ballots_alone() -> None:
    rng = np.random.default_rng(0)
    for ranks in (1, 2, 7):
        nonzeros = rng.integers(0, 2**32, (ranks, 100), np.uint32)
        ballots = nonzeros & rng.integers(0, 2**32, (ranks, 100), np.uint32)
        before = nonzeros.copy(), ballots.copy()
        out, moved = np.empty((2, 100), np.uint32)
        majority(list(ballots), out, nonzeros=list(nonzeros), out_nonzero=moved)
        majority(list(ballots), out)
        assert (nonzeros == before[0]).all()
        assert (ballots == before[1]).all()


@pytest.mark.parametrize("arguments", [{"ties": "zero"}, {"nonzeros": [np.zeros(1, np.uint32)]}])
def test_do_not_move_needs_a_plane_to_say_so(arguments: dict) -> None:
    with pytest.raises(ValueError, match="out_nonzero"):
        majority([np.zeros(1, np.uint32)], np.zeros(1, np.uint32), **arguments)


def test_threads_do_not_share_scratch() -> None:
    n = 2 * PACK_BLOCK
    values = [some_values(n, FORMATS["bfloat16"], seed) for seed in range(4)]

    def work(bits: Bits) -> tuple[bytes, bytes]:
        words, decided = np.empty((2, words_for(n)), np.uint32)
        for _ in range(3):
            pack(bits, FORMATS["bfloat16"], words, key=KEY)
            majority([words, words[::-1].copy(), words], decided, key=KEY)
        return words.tobytes(), decided.tobytes()

    alone = [work(bits) for bits in values]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(work, values)) == alone


# ---------------------------------------------------------------------------------------------- agreement


@pytest.mark.parametrize("n", [0, 1, 31, 32, 33, 200])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_agreement(ranks: int, n: int) -> None:
    ballots = some_ballots(ranks, n, 0.3)
    decision, _ = oracle.majority(ballots, "zero")
    signs, moved = oracle.to_words(decision > 0), oracle.to_words(decision != 0)
    for ballot in ballots:
        mine, spoke = oracle.to_words(ballot > 0), oracle.to_words(ballot != 0)
        both = (ballot != 0) & (decision != 0)
        assert agreement(mine, signs, n, spoke, moved) == (int((both & (ballot == decision)).sum()), int(both.sum()))
        assert agreement(mine, signs, n) == (int(((ballot > 0) == (decision > 0)).sum()), n)
