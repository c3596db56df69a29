"""mpisign.exchange.aggregator: the mean that goes down in the codec again, and what it keeps of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import parts
import pytest
import torch
from mpisign.exchange.aggregator import Aggregator
from parts import ONE_BUCKET, ONE_SEGMENT_A_BUCKET, Side, Voters

import mpisign
from mpisign.backends.host import as_words
from mpisign.layout import Piece
from mpisign.policy import Policy

SIZES = (100, 33, 0, 1, 64)
METHOD = mpisign.double_squeeze()
RANKS = 3
ALL = tuple(range(RANKS))
EVERYBODY: Voters = [ALL] * len(SIZES)


def senders(*, shards: int = 1, cap: float = ONE_BUCKET, policy: Policy | None = None) -> list[Side]:
    def tensors() -> list[torch.nn.Parameter]:
        return parts.parameters(*[(size,) for size in SIZES], dtypes=[torch.float64])

    return [parts.side(tensors(), METHOD, cap=cap, shards=shards, rank=rank, size=RANKS, policy=policy) for rank in ALL]


def send(ranks: Sequence[Side], step: int) -> list[list[np.ndarray]]:
    """Every rank encodes; ``[rank][place]``: what it sent is worth, by the oracle."""
    worth = []
    for rank, sender in enumerate(ranks):
        gradients = parts.draw_normal(sender.tensors, step, rank)
        errors = [parts.flat(sender.memory(place)["error"]) for place in range(len(SIZES))]
        assert sender.send(gradients, step)
        sender.encoder.sent(gradients, EVERYBODY, rank)
        worth.append([squeezed(parts.flat(g) + errors[i], pieces(sender, i)) for i, g in enumerate(gradients)])
    return worth


def pieces(sender: Side, place: int) -> list[Piece]:
    return list(sender.segments()[place][1].pieces)


def squeezed(q: np.ndarray, cut: Sequence[Piece]) -> np.ndarray:
    """``(||q||_1 / n) sign(q)``, piece by piece."""
    out = np.zeros_like(q)
    for piece in cut:
        part = q[piece.lo : piece.hi]
        if part.size:
            out[piece.lo : piece.hi] = float(np.float32(np.abs(part).mean())) * np.sign(part)
    return out


def decided(receiver: Side, place: int) -> np.ndarray:
    """What came down about a parameter: scales and signs, read from the words by NumPy."""
    bucket, segment = receiver.segments()[place]
    words = as_words(receiver.exchanges[bucket].decision)[0]
    out = []
    for piece in segment.pieces:
        scale = words[piece.start : piece.start + 1].view(np.float32)[0]
        bits = np.unpackbits(words[piece.start + 1 : piece.stop].view(np.uint8), bitorder="little")
        out.append(float(scale) * (2.0 * bits[: piece.hi - piece.lo] - 1.0))
    return np.concatenate(out)


@pytest.mark.parametrize("cap", [ONE_BUCKET, ONE_SEGMENT_A_BUCKET])
@pytest.mark.parametrize("shards", [1, 3])
def test_the_mean_goes_down_and_what_it_loses_is_added_the_next_time(shards: int, cap: float) -> None:
    voters: list[Voters] = [EVERYBODY, [(0, 2), (1,), ALL, ALL, (0, 1)], EVERYBODY]
    ranks = senders(shards=shards, cap=cap)
    receiver = ranks[1]
    assert isinstance(receiver.aggregator, Aggregator)
    errors = [np.zeros(size) for size in SIZES]
    for step, who in enumerate(voters):
        worth = send(ranks, step)
        receiver.hear(ranks)
        receiver.decide(who, step)
        for place, size in enumerate(SIZES):
            if not size:
                continue
            q = np.mean([worth[rank][place] for rank in who[place]], axis=0) + errors[place]
            down = squeezed(q, pieces(receiver, place))
            errors[place] = q - down
            np.testing.assert_allclose(decided(receiver, place), down, rtol=0, atol=1e-6)
            kept = [receiver.store.piece(receiver.tensors[place], p.lo, p.hi) for p in pieces(receiver, place)]
            np.testing.assert_allclose(np.concatenate(kept), errors[place], rtol=0, atol=1e-6)


def test_ranks_that_decide_the_same_decide_the_same_words() -> None:
    ranks = senders()
    for step in range(3):
        send(ranks, step)
        for receiver in ranks:
            receiver.hear(ranks)
            receiver.decide(EVERYBODY, step)
        for receiver in ranks[1:]:
            assert torch.equal(receiver.exchanges[0].decision, ranks[0].exchanges[0].decision)


@pytest.mark.parametrize("rank", ALL)
def test_where_the_mean_is_zero_the_coin_is_everybodys(rank: int) -> None:
    """Two ranks that cancel each other: the sign that comes down must not depend on who decides."""
    ranks = senders(policy=Policy(seed=5))
    gradients = [torch.ones(size, dtype=torch.float64) for size in SIZES]
    ranks[0].send(gradients, 7)
    ranks[1].send([-g for g in gradients], 7)
    receiver = ranks[rank]
    for number, sender in ((0, ranks[0]), (1, ranks[1])):
        receiver.exchanges[0].received[number].copy_(sender.exchanges[0].message)
    receiver.decide([(0, 1)] * len(SIZES), 7)
    (piece,) = pieces(receiver, 0)
    words = as_words(receiver.exchanges[0].decision)[0, piece.start : piece.stop]
    assert words[0] == 0, "the scale"
    coins = parts.tie_coins(100, piece.first_word + 1, step=7, seed=5)
    assert np.array_equal(words[1:], parts.planes(coins, 1)[0])


def test_where_nobody_votes_nothing_is_decided_and_nothing_kept() -> None:
    ranks = senders()
    send(ranks, 0)
    receiver = ranks[0]
    receiver.hear(ranks)
    receiver.exchanges[0].decision.fill_(7)
    receiver.decide([ALL, (), ALL, ALL, ()])
    for place, voted in enumerate([True, False, True, True, False]):
        if SIZES[place]:
            assert bool((receiver.decision(place) != 7).any()) == voted, place
    kept: dict[int, Any] = receiver.store.state_dict(receiver.tensors, 0, None, "")["pieces"]
    assert set(kept) == {0, 2, 3}


def test_each_shard_keeps_the_errors_of_its_own_pieces_and_all_shards_are_the_whole() -> None:
    ranks = senders(shards=3)
    send(ranks, 0)
    (bucket,) = ranks[0].layout.buckets
    shard = bucket.length // RANKS
    whole, owners = senders(shards=3)[0], senders(shards=3)
    whole.hear(ranks)
    whole.decide(EVERYBODY)
    messages = [sender.exchanges[0].message for sender in ranks]
    spread = torch.zeros_like(whole.exchanges[0].decision)
    found: dict[tuple[int, int], torch.Tensor] = {}
    for number, owner in enumerate(owners):
        span = slice(number * shard, (number + 1) * shard)
        out = spread[:, span]
        owner.aggregator.decide(bucket, EVERYBODY, owner.context(), [m[:, span] for m in messages], out, span.start)
        mine = owner.store.state_dict(owner.tensors, 0, None, "")["pieces"]
        for place, parts_of_it in mine.items():
            for lo, error in parts_of_it.items():
                assert (place, lo) not in found, "two owners decided it"
                found[place, lo] = error
    assert torch.equal(spread, whole.exchanges[0].decision)
    everything = {(place, piece.lo) for place in range(len(SIZES)) for piece in pieces(whole, place)}
    assert set(found) == everything
    for (place, lo), error in found.items():
        assert torch.equal(error, whole.store.piece(whole.tensors[place], lo, lo + error.numel()))
