"""mpisign.bitmap.coin: the hash is the documented one, bit for bit, and its coins are fair and independent."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import oracle
import pytest

from mpisign.bitmap.coin import TIES, coin_key, coin_words, zeros_stream

WORDS = 1 << 15  # a million coins
ODDS = 5.5  # standard deviations; the seeds are fixed, so a test passes always or never


GOLDEN_KEYS = {
    (0, 0, 0): 0x238275BC38FCBE91,
    (0, 0, 1): 0x2F32A78496C67C60,
    (0, 1, 0): 0x44E5B98100C67FB0,
    (1, 0, 0): 0xB18A02F46D8D86C3,
    (42, 7, 4): 0x0FB65D1603B9FE58,
}
GOLDEN_TIES = [0xAAC80268, 0x2130748A, 0x79CE5090, 0x0CC78FB9]
GOLDEN_ZEROS = [0xB5C471CA, 0xCCB2E54F, 0x85240526, 0xDACB3311]


def excess(words: npt.NDArray[np.uint32]) -> float:
    """By how many standard deviations the share of ones is off one half."""
    bits = 32 * words.size
    return abs(int(np.bitwise_count(words).sum(dtype=np.int64)) - bits / 2) / (math.sqrt(bits) / 2)


def test_pairs_are_the_outputs_of_splitmix64() -> None:
    # The published test vector of SplitMix64 for the state 1234567; two words a 64-bit output, low half first.
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    words = coin_words(1234567, 0, 10).tolist()
    assert [low | high << 32 for low, high in zip(words[::2], words[1::2], strict=True)] == published


def test_golden_values() -> None:
    """These may never change: a job resumed under another version must flip the same coins."""
    assert {args: coin_key(*args) for args in GOLDEN_KEYS} == GOLDEN_KEYS
    assert coin_words(coin_key(0, 0, TIES), 0, 4).tolist() == GOLDEN_TIES
    assert coin_words(coin_key(42, 7, zeros_stream(3)), 1_000_001, 4).tolist() == GOLDEN_ZEROS


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63, 2**64 - 1, 2**70 + 5, -(2**65)])
def test_keys_follow_the_formula_modulo_2_to_the_64(seed: int) -> None:
    for step, stream in ((0, TIES), (1, zeros_stream(0)), (10**12, zeros_stream(10**6))):
        assert coin_key(seed, step, stream) == oracle.coin_key(seed, step, stream)
    assert coin_key(seed, 3, 1) == coin_key(seed + 2**64, 3, 1)


@pytest.mark.parametrize("first_word", [0, 1, 2, 31, 2**32 - 1, 2**33 + 1, 2**40 + 3])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 64, 65])
def test_words_follow_the_formula(first_word: int, count: int) -> None:
    for key in (0, 2**64 - 1, coin_key(5, 6, 7)):
        words = coin_words(key, first_word, count)
        assert words.dtype == np.uint32
        assert words.tolist() == [oracle.coin_word(key, first_word + w) for w in range(count)]


def test_a_coin_depends_on_its_position_alone() -> None:
    key = coin_key(1, 2, TIES)
    whole = coin_words(key, 0, 101)
    for start in range(101):
        for stop in {start, start + 1, min(start + 2, 101), 101}:
            assert (coin_words(key, start, stop - start) == whole[start:stop]).all()


@pytest.mark.parametrize("bit", range(32))
def test_every_bit_of_a_word_is_fair(bit: int) -> None:
    words = coin_words(coin_key(9, 0, TIES), 0, WORDS)
    ones = int((words >> np.uint32(bit) & np.uint32(1)).sum())
    assert abs(ones - WORDS / 2) < ODDS * math.sqrt(WORDS) / 2


@pytest.mark.parametrize(
    "other",
    [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 2, 0), (0, 0, 0, 1), (0, 0, 0, 2), (1, 1, 0, 0), (0, 1, 1, 0)],
    ids=lambda other: "seed+{} step+{} stream+{} word+{}".format(*other),
)
def test_coins_that_differ_in_one_place_are_independent(other: tuple[int, int, int, int]) -> None:
    here = coin_words(coin_key(20, 30, 40), 0, WORDS)
    seed, step, stream, word = other
    there = coin_words(coin_key(20 + seed, 30 + step, 40 + stream), word, WORDS)
    assert excess(here) < ODDS
    assert excess(here ^ there) < ODDS


def test_seed_step_and_stream_are_not_interchangeable() -> None:
    keys = {coin_key(seed, step, stream) for seed in range(20) for step in range(20) for stream in range(20)}
    assert len(keys) == 20**3
