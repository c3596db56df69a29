"""mpisign.exchange.decider: who votes on what, and the mean that goes down in the codec again."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import oracle
import parts
import pytest
import torch
from parts import ONE_BUCKET, ONE_SEGMENT_A_BUCKET, Side, Voters, heard_of

import mpisign
from mpisign.backends.host import as_words
from mpisign.codecs import Dense
from mpisign.exchange.decider import Run
from mpisign.layout import Piece
from mpisign.policy import Policy
from mpisign.rules import GeometricMedian

SIZES = (100, 33, 0, 1, 64)
METHOD = mpisign.double_squeeze()
RANKS = 3
ALL = tuple(range(RANKS))
EVERYBODY: Voters = [ALL] * len(SIZES)


def senders(*, exchange: str = "allgather", cap: float = ONE_BUCKET, policy: Policy | None = None) -> list[Side]:
    def tensors() -> list[torch.nn.Parameter]:
        return parts.parameters(*[(size,) for size in SIZES], dtypes=[torch.float64])

    return [
        parts.side(tensors(), METHOD, cap=cap, exchange=exchange, rank=rank, size=RANKS, policy=policy) for rank in ALL
    ]


def send(ranks: Sequence[Side], step: int) -> list[list[np.ndarray]]:
    """Every rank encodes; ``[rank][place]``: what it sent is worth, by the oracle."""
    worth = []
    for rank, sender in enumerate(ranks):
        gradients = parts.draw_normal(sender.tensors, step, rank)
        errors = [parts.flat(sender.memory(place)["error"]) for place in range(len(SIZES))]
        assert sender.send(gradients, step)
        sender.sent(EVERYBODY)
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
@pytest.mark.parametrize("exchange", ["allgather", "two_phase"])
def test_the_mean_goes_down_and_what_it_loses_is_added_the_next_time(exchange: str, cap: float) -> None:
    voters: list[Voters] = [EVERYBODY, [(0, 2), (1,), ALL, ALL, (0, 1)], EVERYBODY]
    ranks = senders(exchange=exchange, cap=cap)
    receiver = ranks[1]
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
    ranks = senders(policy=Policy("coin", seed=5))
    gradients = [torch.ones(size, dtype=torch.float64) for size in SIZES]
    ranks[0].send(gradients, 7)
    ranks[1].send([-g for g in gradients], 7)
    receiver = ranks[rank]
    receiver.hear(ranks)
    receiver.decide([(0, 1)] * len(SIZES), 7)
    (piece,) = pieces(receiver, 0)
    words = as_words(receiver.exchanges[0].decision)[0, piece.start : piece.stop]
    assert words[0] == 0, "the scale"
    coins = parts.tie_coins(100, piece.first_word + 1, step=7, seed=5)
    assert np.array_equal(words[1:-1], parts.planes(coins, 1)[0])
    assert words[-1] == 0b1111, "none of the four words is silent, as the policy says coin"


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
    ranks = senders(exchange="two_phase")
    send(ranks, 0)
    (bucket,) = ranks[0].layout.buckets
    shard = bucket.length // RANKS
    whole, owners = senders(exchange="two_phase")[0], senders(exchange="two_phase")
    whole.hear(ranks)
    whole.decide(EVERYBODY)
    messages = [sender.exchanges[0].message for sender in ranks]
    spread = torch.zeros_like(whole.exchanges[0].decision)
    found: dict[tuple[int, int], torch.Tensor] = {}
    heard = heard_of(bucket, EVERYBODY, RANKS)
    for number, owner in enumerate(owners):
        span = slice(number * shard, (number + 1) * shard)
        (decider,) = owner.plan.deciders
        decider.decide(heard, owner.context(), [m[:, span] for m in messages], spread[:, span], span.start, None)
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


# --------------------------------------------------------------------------------------------- who votes on what


WIDTHS = [40, 32, 0, 100, 5]


def voting(rule: Any = None) -> Side:
    tensors = parts.parameters(*[(size,) for size in WIDTHS])
    codec = None if rule is None else Dense()
    return parts.side(tensors, parts.method_of(codec=codec, rule=rule), size=RANKS, policy=Policy("coin", seed=1))


def runs(receiver: Side, voters: Voters, **options: Any) -> list[Run]:
    (decider,), (heard,) = receiver.plan.deciders, receiver.heard(voters, **options)
    return [run for run in decider.runs(heard) if run[0] < run[1]]


def test_the_usual_bucket_is_one_run() -> None:
    assert runs(voting(), [ALL] * 5) == [(0, 8, ALL)]


def test_runs_end_where_the_voters_change() -> None:
    voters: Voters = [(0, 1), (0, 1), (2,), (), (0, 2)]  # the bucket holds them from the last to the first
    assert runs(voting(), voters) == [(0, 1, (0, 2)), (1, 5, ()), (5, 8, (0, 1))]


def test_what_rows_are_told_of_is_left_to_the_rows() -> None:
    told = {3: np.ones((RANKS, 1), np.bool_)}
    assert runs(voting(), [ALL] * 5, spoken=told) == [(0, 1, ALL), (1, 5, ()), (5, 8, ALL)]


def test_whoever_votes_on_anything_votes_on_whole_vectors() -> None:
    voters: Voters = [(0, 1), (0,), (0, 1), (), (0,)]
    assert runs(voting(GeometricMedian()), voters) == [(0, sum(WIDTHS), (0, 1))]


@pytest.mark.parametrize("told", [False, True], ids=["whole", "told"])
@pytest.mark.parametrize("cuts", [[0, 8], [0, 1, 8], [0, 3, 6, 8], [0, 2, 4, 5, 7, 8]])
def test_shards_decide_what_the_voters_of_each_parameter_decide(cuts: list[int], told: bool) -> None:
    """Also where rank 1 has no vote on the only row of the first parameter, which its header tells."""
    receiver, (bucket,) = voting(), voting().layout.buckets
    voters: Voters = [(0, 1), ALL, (2,), (), (0, 2)]
    spoken = {0: np.array([[True], [False], [True]])} if told else None
    ranks = [parts.side(receiver.tensors, rank=rank, size=RANKS, policy=receiver.policy) for rank in ALL]
    drawn = [parts.draw_normal(receiver.tensors, rank) for rank in ALL]
    for sender, gradients in zip(ranks, drawn, strict=True):
        sender.send(gradients)
    (heard,), (decider,) = receiver.heard(voters, spoken), receiver.plan.deciders
    out, ties = torch.zeros((1, bucket.length), dtype=torch.int32), 0
    for lo, hi in itertools.pairwise(cuts):
        shards = [sender.exchanges[0].message[:, lo:hi] for sender in ranks]
        ties += int(decider.decide(heard, receiver.context(7), shards, out[:, lo:hi], lo, None))
    expected_ties = 0
    for place, ((_, segment), size) in enumerate(zip(receiver.segments(), WIDTHS, strict=True)):
        who = [rank for rank in voters[place] if not (told and place == 0 and rank == 1)]
        if who and size:
            coin = parts.tie_coins(size, segment.first_word, step=7, seed=1)
            votes = [oracle.ballot(parts.flat(drawn[rank][place]), "positive") for rank in who]
            decision, tied = oracle.majority(votes, "coin", coin)
            words = as_words(out)[0, segment.start : segment.stop]
            assert (oracle.to_flags(words, size) == (decision > 0)).all(), place
            expected_ties += tied
    assert ties == expected_ties > 0


def test_a_rule_that_remembers_is_given_what_it_decided_before() -> None:
    tensors = parts.parameters((40,), (3,), dtypes=[torch.float64])
    receiver = parts.side(tensors, mpisign.centered_clipping(radius=0.5, momentum=0.0), size=1)
    center = np.zeros(43)
    for step in range(3):
        gradients = parts.draw_normal(tensors, step)
        receiver.send(gradients, step)
        receiver.hear([receiver])
        receiver.decide([(0,)] * 2, step)
        g = np.concatenate([parts.flat(gradient) for gradient in gradients])
        if step != 1:  # what was decided and not kept is forgotten
            receiver.plan.deciders[0].remember(receiver.exchanges[0].decision)
            center = oracle.centered_clipping(g[None], 0.5, center, 1)
        decision = np.concatenate([receiver.decision(place)[0].numpy() for place in (0, 1)])
        if step != 1:
            np.testing.assert_allclose(decision, center, rtol=0, atol=1e-6)
