"""Slow and obviously right: the formats and methods written again from their documentation, to test against.

A ballot here is a vector of integers, +1, -1 or 0 ("does not vote"), one a coordinate; a coin is +1 or -1.
Nothing of the library's arithmetic is imported.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Ballot = npt.NDArray[np.int8]
Floats = npt.NDArray[np.floating]

MODULUS = 1 << 64
GOLDEN = 0x9E3779B97F4A7C15
TIES = 0
BIT = np.arange(32, dtype=np.uint64)


def zeros_stream(rank: int) -> int:
    return rank + 1


# --------------------------------------------------------------------------------------------------- coins


def mix(z: int) -> int:
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % MODULUS
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % MODULUS
    return z ^ (z >> 31)


def h(x: int) -> int:
    return mix((x + GOLDEN) % MODULUS)


def coin_key(seed: int, step: int, stream: int) -> int:
    return h(h(h(seed % MODULUS) ^ step % MODULUS) ^ stream % MODULUS)


def coin_word(key: int, word: int) -> int:
    pair = h((key + word // 2 * GOLDEN) % MODULUS)
    return pair >> 32 if word % 2 else pair & 0xFFFFFFFF


def coins(key: int, first_word: int, n: int) -> Ballot:
    """The coins of n elements, of which the first is bit 0 of ``first_word``."""
    words = [coin_word(key, first_word + w) for w in range((n + 31) // 32)]
    return np.where(to_flags(np.array(words, np.uint32), n), 1, -1).astype(np.int8)


# --------------------------------------------------------------------------------------------------- words


def to_words(flags: Sequence[bool] | npt.NDArray[np.bool_]) -> npt.NDArray[np.uint32]:
    """Element ``32 w + i`` becomes bit i of word w; the rest of the last word is 0."""
    bits = np.zeros((-(-len(flags) // 32), 32), np.uint64)
    bits.reshape(-1)[: len(flags)] = flags
    return (bits << BIT).sum(1).astype(np.uint32)


def to_flags(words: npt.NDArray[np.uint32], n: int) -> npt.NDArray[np.bool_]:
    bits = np.asarray(words, np.uint64)[:, None] >> BIT & np.uint64(1)
    return bits.astype(np.bool_).reshape(-1)[:n]


def first_words(sizes: Sequence[int]) -> list[int]:
    """The global word at which each parameter starts: word-aligned segments, last registered first."""
    starts, at = [0] * len(sizes), 0
    for i in reversed(range(len(sizes))):
        starts[i] = at
        at += (sizes[i] + 31) // 32
    return starts


# ------------------------------------------------------------------------------------------------- ballots


def ballot(values: Floats, zeros: str = "coin", coin: Ballot | None = None) -> Ballot:
    """What a rank votes on finite ``values``; ``coin`` (n,) decides zeros under ``zeros="coin"``."""
    if zeros == "positive":
        for_zero = np.ones(len(values), np.int8)
    elif zeros == "abstain":
        for_zero = np.zeros(len(values), np.int8)
    else:
        assert coin is not None
        for_zero = coin
    return np.where(values > 0, 1, np.where(values < 0, -1, for_zero)).astype(np.int8)


def zero_rows(values: Floats, shape: tuple[int, ...]) -> npt.NDArray[np.bool_]:
    """Element by element, whether its row is zero throughout; ``values`` are in reading order.

    A row is what has one index in the first dimension; where it has less than 64 elements, all is one row.
    """
    count = shape[0] if len(shape) > 1 and shape[0] > 0 and values.size // shape[0] >= 64 else 1
    if not values.size:
        return np.zeros(0, np.bool_)
    rows = np.asarray(values).reshape(count, -1)
    return np.repeat((rows == 0).all(axis=1), rows.shape[1])


def majority(ballots: Sequence[Ballot], ties: str = "coin", coin: Ballot | None = None) -> tuple[Ballot, int]:
    """The decision and the number of ties: equal votes for and against, of at least one."""
    total = np.sum(ballots, axis=0, dtype=np.int64)
    voted = np.any(np.stack(ballots) != 0, axis=0)
    tied = (total == 0) & voted
    for_tie: Ballot | int
    if ties == "coin":
        assert coin is not None
        for_tie = coin
    else:
        for_tie = {"positive": 1, "zero": 0}[ties]
    return np.where(tied, for_tie, np.sign(total)).astype(np.int8), int(tied.sum())


def decide(
    updates: Sequence[Floats],
    step: int,
    first_word: int = 0,
    *,
    zeros: str = "coin",
    ties: str = "coin",
    seed: int = 0,
) -> tuple[Ballot, int]:
    """The vote of ranks 0, 1, ... on one parameter that starts at ``first_word``: the decision and the ties."""
    n = len(updates[0])
    ballots = [
        ballot(u, zeros, coins(coin_key(seed, step, zeros_stream(rank)), first_word, n))
        for rank, u in enumerate(updates)
    ]
    return majority(ballots, ties, coins(coin_key(seed, step, TIES), first_word, n))


# ------------------------------------------------------------------------------------------------- methods


def mean(updates: Sequence[Floats]) -> Floats:
    """Summed in the order of the ranks, in the updates' own precision."""
    total = updates[0].copy()
    for update in updates[1:]:
        total = total + update
    return total / total.dtype.type(len(updates))


def momentum(v: Floats, g: Floats, beta: float) -> tuple[Floats, Floats]:
    """Signum: (what is sent, what is kept)."""
    v = beta * v + (1 - beta) * g
    return v, v


def lion(m: Floats, g: Floats, beta1: float, beta2: float) -> tuple[Floats, Floats]:
    """Lion: (what is sent, what is kept)."""
    return beta1 * m + (1 - beta1) * g, beta2 * m + (1 - beta2) * g


# ------------------------------------------------------------------------------- dense rules: (V, n) to (n,)


def trimmed_mean(rows: Floats, f: int) -> Floats:
    """Summed from the smallest value up, in the rows' own precision; what trims everything trims to the median."""
    ordered = np.array([sorted(column) for column in rows.T], rows.dtype).T.reshape(rows.shape)
    while len(ordered) - 2 * f < 1:
        f -= 1
    return mean(ordered[f : len(rows) - f])


def squared_distance(a: Floats, b: Floats) -> float:
    return float(np.sum((a.astype(np.float64) - b.astype(np.float64)) ** 2))


def distance(a: Floats, b: Floats) -> float:
    return float(np.sqrt(squared_distance(a, b)))


def nearest(rows: Floats, point: Floats, count: int) -> list[int]:
    """The ``count`` rows nearest to ``point``; of equals, the lower ones."""
    return sorted(range(len(rows)), key=lambda i: (distance(rows[i], point), i))[: max(1, count)]


def krum_scores(rows: Floats, f: int) -> list[float]:
    """The sum of squared distances to the V - f - 2 nearest others, or to the nearest alone."""
    scores = []
    for i, row in enumerate(rows):
        squares = sorted(squared_distance(row, other) for j, other in enumerate(rows) if j != i)
        scores.append(sum(squares[: max(1, len(rows) - f - 2)]))
    return scores


def multi_krum(rows: Floats, f: int, m: int) -> Floats:
    scores = krum_scores(rows, f)
    chosen = sorted(range(len(rows)), key=lambda i: (scores[i], i))[:m]
    return rows[chosen].mean(axis=0, dtype=np.float64)


def geometric_median(rows: Floats, nu: float, steps: int) -> Floats:
    z = np.zeros(rows.shape[1])
    for _ in range(steps):
        b = [1 / max(nu, distance(row, z)) for row in rows]
        z = np.average(rows, axis=0, weights=b)
    return z


def centered_clipping(rows: Floats, radius: float, center: Floats, steps: int) -> Floats:
    v = center.astype(np.float64)
    for _ in range(steps):
        differences = [row - v for row in rows]
        lengths = [distance(row, v) for row in rows]
        v = v + np.mean(
            [d * (min(1, radius / n) if n else 1) for d, n in zip(differences, lengths, strict=True)], axis=0
        )
    return v


def gradient_elimination(rows: Floats, f: int) -> Floats:
    norms = [float(np.linalg.norm(row.astype(np.float64))) for row in rows]
    chosen = sorted(range(len(rows)), key=lambda i: (norms[i], i))[: max(1, len(rows) - f)]
    return rows[chosen].mean(axis=0, dtype=np.float64)


def nearest_neighbour_averaging(rows: Floats, f: int, pivot: int) -> Floats:
    return rows[nearest(rows, rows[pivot], len(rows) - f)].mean(axis=0, dtype=np.float64)


def nearest_neighbour_mixing(rows: Floats, f: int) -> Floats:
    return np.stack([nearest_neighbour_averaging(rows, f, i) for i in range(len(rows))])


# ------------------------------------------------------------------------------------------------ scaled vote


def count_rows(shape: Sequence[int]) -> int:
    """How many scales a parameter has: one an index of its first dimension, if that is worth it."""
    elements = int(np.prod(shape, dtype=int))
    return shape[0] if len(shape) > 1 and shape[0] > 0 and elements // shape[0] >= 64 else 1


def scales(values: Floats, row: npt.NDArray[np.integer]) -> Floats:
    """The mean magnitude of each row; ``row`` (n,) says in which each element is."""
    return np.array([np.abs(values[row == r], dtype=np.float64).mean() for r in np.unique(row)]).astype(np.float32)


def scaled_vote(
    updates: Sequence[Floats],
    row: npt.NDArray[np.integer],
    step: int,
    first_word: int = 0,
    *,
    ranks: Sequence[int] | None = None,
    zeros: str = "rows",
    ties: str = "coin",
    seed: int = 0,
) -> Floats:
    """The majority's sign times the median of the scales, of ``ranks`` on one parameter; all in the wire's order."""
    n, ranks = len(row), range(len(updates)) if ranks is None else ranks
    said = np.stack([scales(update, row) for update in updates])
    ballots = []
    for rank, update, its in zip(ranks, updates, said, strict=True):
        coin = coins(coin_key(seed, step, zeros_stream(rank)), first_word, n)
        vote = ballot(update, "coin" if zeros == "rows" else zeros, coin)
        ballots.append(np.where(its[row] > 0, vote, 0).astype(np.int8))
    decision, _ = majority(ballots, ties, coins(coin_key(seed, step, TIES), first_word, n))
    return decision * np.median(said, axis=0)[row]


def weighted_vote(ballots: Sequence[Ballot], ties: str = "coin", coin: Ballot | None = None) -> Ballot:
    """The votes' sum with weights of the log-odds of having been with the plain majority, in whole 1/64."""
    plain, _ = majority(ballots, "zero")
    total = np.zeros(len(plain))
    for its in ballots:
        both = (its != 0) & (plain != 0)
        wrong, votes = int((its != plain)[both].sum()), int(both.sum())
        total += np.round(64 * np.log((votes - wrong + 1) / (wrong + 1))) * its
    voted = np.any(np.stack(ballots) != 0, axis=0)
    for_tie = coin if ties == "coin" else {"positive": 1, "zero": 0}[ties]
    return np.where((total == 0) & voted, for_tie, np.sign(total)).astype(np.int8)
