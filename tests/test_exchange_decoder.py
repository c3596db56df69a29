"""mpisign.exchange.decoder: what becomes of decisions and messages, on several ranks' sides without MPI."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import oracle
import parts
import pytest
import torch
from parts import DTYPES, ONE_BUCKET, ONE_SEGMENT_A_BUCKET, SHAPES, Side, Voters

import mpisign
from mpisign import Method
from mpisign.backends.host import as_words
from mpisign.codecs import SignBits
from mpisign.memory import ErrorFeedback
from mpisign.policy import Policy
from mpisign.rules import Median

RANKS = 3
ALL = tuple(range(RANKS))


def sides(
    make: Callable[[], list[torch.nn.Parameter]], method: Method, cap: float = ONE_BUCKET, **options: Any
) -> list[Side]:
    return [parts.side(make(), method, cap=cap, rank=rank, size=RANKS, **options) for rank in ALL]


def tell(receiver: Side, place: int, ballot: oracle.Ballot) -> None:
    """Put a decision on a parameter where the exchange would."""
    target = receiver.decision(place)
    as_words(target)[:] = parts.planes(ballot, len(target))


def ballot_for(tensor: torch.Tensor, *seeds: int, least: int = -1) -> oracle.Ballot:
    return np.random.default_rng(seeds).choice([-1, 0, 1] if least < 1 else [-1, 1], tensor.numel()).astype(np.int8)


# ----------------------------------------------------------------------------------------------------- decisions


@pytest.mark.parametrize("cap", [ONE_BUCKET, ONE_SEGMENT_A_BUCKET])
@pytest.mark.parametrize("ties", ["coin", "zero"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_words_become_gradients(dtype: torch.dtype, ties: str, cap: float) -> None:
    tensors = parts.parameters(*SHAPES, dtypes=[dtype])
    receiver = parts.side(tensors, policy=Policy("coin", ties), cap=cap, size=RANKS)
    gradients = parts.draw(tensors, 0)
    parts.give(tensors, gradients)
    given = [t.grad for t in tensors]
    ballots = [ballot_for(t, i, least=0 if ties == "zero" else 1) for i, t in enumerate(tensors)]
    for place, ballot in enumerate(ballots):
        tell(receiver, place, ballot)
    receiver.receive([ALL] * len(tensors))
    for tensor, gradient, ballot in zip(tensors, given, ballots, strict=True):
        assert tensor.grad is gradient, "decisions are written in place"
        assert tensor.grad.dtype == dtype
        assert parts.flat(tensor.grad).tolist() == ballot.tolist()


def test_nobody_votes_on_a_parameter() -> None:
    tensors = parts.parameters((40,), (3,), (2, 2))
    receiver = parts.side(tensors, size=RANKS)
    parts.give(tensors, [torch.ones(40), torch.ones(3), None])
    for place, tensor in enumerate(tensors):
        tell(receiver, place, -np.ones(tensor.numel(), np.int8))
    receiver.receive([(0, 1), (), ()])
    assert (tensors[0].grad == -1).all()
    assert tensors[1].grad is None
    assert tensors[2].grad is None


@pytest.mark.parametrize("name", ["signsgd", "mean", "ef_signsgd"])
def test_a_parameter_without_gradient_here_gets_one_as_the_parameter_lies(name: str) -> None:
    weight = torch.nn.Parameter(torch.zeros(6, 7, 2, 3, dtype=torch.float16).to(memory_format=torch.channels_last))
    method = parts.methods_for(RANKS)[name]
    receiver, sender = (parts.side([weight], method, rank=rank, size=RANKS) for rank in (0, 1))
    (gradient,) = parts.draw_normal([weight], 0)
    sender.send([gradient.to(memory_format=torch.channels_last)])
    receiver.hear([sender] * RANKS)
    receiver.decide([(1,)])
    receiver.receive([(1,)])
    assert weight.grad is not None
    assert weight.grad.stride() == weight.stride()
    assert weight.grad.dtype == torch.float16
    if name == "mean":
        assert torch.equal(weight.grad, gradient)
    else:
        assert torch.equal(weight.grad.sign(), gradient.sign())


@dataclass(frozen=True)
class Doubled(SignBits):
    def decode(self, decision: torch.Tensor, out: torch.Tensor, context: Any = None) -> None:
        super().decode(decision, out, context)
        out.mul_(2.0)


def test_a_codec_that_decodes_in_its_own_way_is_asked() -> None:
    tensors = parts.parameters((40,))
    receiver = parts.side(tensors, parts.method_of(codec=Doubled()), size=RANKS)
    tell(receiver, 0, np.ones(40, np.int8))
    receiver.receive([ALL])
    assert (tensors[0].grad == 2.0).all()


def test_one_batch_after_the_other() -> None:
    """A decision is written where its batch belongs, and nowhere else."""
    tensors = parts.parameters((40,), (3,))
    receiver = parts.side(tensors, cap=ONE_SEGMENT_A_BUCKET, size=RANKS)
    parts.give(tensors, [torch.full((40,), 7.0), torch.full((3,), 7.0)])
    for place, tensor in enumerate(tensors):
        tell(receiver, place, np.ones(tensor.numel(), np.int8))
    receiver.receive([ALL] * 2, batches=[0])
    assert (tensors[1].grad == 1.0).all()
    assert (tensors[0].grad == 7.0).all()
    receiver.receive([ALL] * 2, batches=[1])
    assert (tensors[0].grad == 1.0).all()


def test_the_mean_is_written_in_the_gradients_type() -> None:
    tensors = parts.parameters((3,), (3,), (3,), (3,), dtypes=DTYPES)
    ranks = sides(lambda: parts.parameters((3,), (3,), (3,), (3,), dtypes=DTYPES), mpisign.mean())
    drawn = [parts.draw_normal(tensors, rank) for rank in ALL]
    for rank, sender in enumerate(ranks):
        assert sender.send(drawn[rank])
    receiver = ranks[0]
    receiver.hear(ranks)
    receiver.decide([(0, 2)] * 4)
    out: list[Any] = receiver.receive([(0, 2)] * 4)
    for place, dtype in enumerate(DTYPES):
        wire = np.float64 if dtype == torch.float64 else np.float32
        expected = oracle.mean([parts.flat(parts.draw_normal(tensors, rank)[place]).astype(wire) for rank in (0, 2)])
        assert torch.equal(out[place], torch.from_numpy(expected).to(dtype)), dtype


@pytest.mark.parametrize("zeros", ["coin", "abstain"])
def test_counted_signs_become_their_mean(zeros: str) -> None:
    """Of as many voters as there are on each parameter, not of all ranks."""
    voters: Voters = [(0, 1, 2), (1,), (0, 2)]
    shapes = ((40,), (33,), (5,))
    ranks = sides(lambda: parts.parameters(*shapes), mpisign.lion(0.0, 0.0, vote=False), policy=Policy(zeros))
    drawn = [parts.draw(ranks[0].tensors, rank) for rank in ALL]
    for rank, sender in enumerate(ranks):
        assert sender.send(drawn[rank])
    ranks[0].hear(ranks)
    ranks[0].decide(voters)
    out: list[Any] = ranks[0].receive(voters)
    for place, start in enumerate(ranks[0].first_words()):
        ballots = [
            oracle.ballot(
                parts.flat(drawn[rank][place]), zeros, parts.zero_coins(shapes[place][0], start, rank=rank)
            ).astype(np.float32)
            for rank in voters[place]
        ]
        np.testing.assert_allclose(parts.flat(out[place]), np.mean(ballots, axis=0), rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------------------- rows of zeros


def spoken_by(drawn: Sequence[torch.Tensor]) -> np.ndarray:
    """On which rows each rank votes: (M, R)."""
    return np.stack([(g != 0).flatten(1).any(1).numpy() for g in drawn])


def with_rows_of_zeros(tensors: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
    """By rank: each has another row of zeros in the first parameter; row 4 is zero on all."""
    drawn = [parts.draw(tensors, rank) for rank in ALL]
    for rank, its in enumerate(drawn):
        its[0][rank] = its[0][4] = 0
    return drawn


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ties", ["coin", "zero", "positive"])
def test_where_a_row_is_told_its_zeros_are_no_votes(ties: str, dtype: torch.dtype) -> None:
    shapes, policy = ((5, 65), (40,)), Policy("rows", ties, seed=2)
    ranks = sides(lambda: parts.parameters(*shapes, dtypes=[dtype]), parts.method_of(), policy=policy)
    drawn = with_rows_of_zeros(ranks[0].tensors)
    for rank, sender in enumerate(ranks):
        assert sender.send(drawn[rank], 3)
    spoken = {0: spoken_by([its[0] for its in drawn])}
    ranks[1].hear(ranks)
    tied = ranks[1].decide([ALL] * 2, 3, spoken)
    out: list[Any] = ranks[1].receive([ALL] * 2, 3, spoken=spoken)
    expected_ties = 0
    for place, start in enumerate(ranks[1].first_words()):
        size = ranks[1].tensors[place].numel()
        votes = [
            oracle.ballot(parts.flat(its[place]), "coin", parts.zero_coins(size, start, step=3, rank=rank, seed=2))
            for rank, its in enumerate(drawn)
        ]
        if place in spoken:
            votes = [vote * np.repeat(spoken[0][rank], 65) for rank, vote in enumerate(votes)]
        decision, here = oracle.majority(votes, ties, parts.tie_coins(size, start, step=3, seed=2))
        expected_ties += here
        assert parts.flat(out[place]).tolist() == decision.tolist()
    assert (out[0][4] == 0).all(), "nobody has voted on it"
    assert tied == expected_ties > 0


def test_the_mean_of_signs_is_of_those_who_have_voted_on_the_row() -> None:
    ranks = sides(
        lambda: parts.parameters((5, 65), (40,)), mpisign.lion(0.0, 0.0, vote=False), policy=Policy("rows", seed=2)
    )
    drawn = with_rows_of_zeros(ranks[0].tensors)
    for rank, sender in enumerate(ranks):
        assert sender.send(drawn[rank], 3)
    spoken = {0: spoken_by([its[0] for its in drawn])}
    ranks[0].hear(ranks)
    ranks[0].decide([ALL] * 2, 3, spoken)
    out: list[Any] = ranks[0].receive([ALL] * 2, 3, spoken=spoken)
    start = ranks[0].first_words()[0]
    votes = [
        oracle.ballot(parts.flat(its[0]), "coin", parts.zero_coins(325, start, step=3, rank=rank, seed=2))
        * np.repeat(spoken[0][rank], 65)
        for rank, its in enumerate(drawn)
    ]
    count = np.maximum(np.repeat(spoken[0].sum(0), 65), 1)
    np.testing.assert_allclose(parts.flat(out[0]), np.sum(votes, 0, dtype=int) / count, rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------------------------ messages


def scaled_sign(p: np.ndarray) -> np.ndarray:
    return float(np.float32(np.abs(p).mean())) * np.sign(p) if p.size else p


@pytest.mark.parametrize("cap", [ONE_BUCKET, ONE_SEGMENT_A_BUCKET])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_mean_of_the_voters_messages(dtype: torch.dtype, cap: float) -> None:
    voters: Voters = [(0, 1, 2), (1,), (0, 2), ()] * 2
    ranks = sides(lambda: parts.parameters(*SHAPES, dtypes=[dtype]), mpisign.ef_signsgd(), cap)
    drawn = [parts.draw_normal(ranks[0].tensors, rank) for rank in ALL]
    for rank, sender in enumerate(ranks):
        assert sender.send(drawn[rank])
    receiver = ranks[0]
    parts.give(receiver.tensors, parts.draw(receiver.tensors, 9))
    receiver.hear(ranks)
    out: list[Any] = receiver.receive(voters)
    for place, who in enumerate(voters):
        if not who:
            assert receiver.tensors[place].grad is None
            continue
        expected = np.mean([scaled_sign(parts.flat(drawn[rank][place])) for rank in who], axis=0)
        ours, exact = out[place], torch.from_numpy(expected)
        tolerance = max(torch.finfo(dtype).eps, 2.0**-22)
        torch.testing.assert_close(ours.double().flatten(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sixteen_bits_are_rounded_once(dtype: torch.dtype) -> None:
    """Many parameters, so that many means of three scales come up, which rounding in between would make others."""
    count = 50
    ranks = sides(lambda: parts.parameters(*[(7,)] * count, dtypes=[dtype]), mpisign.ef_signsgd())
    drawn = [parts.draw_normal(ranks[0].tensors, rank) for rank in ALL]
    for rank, sender in enumerate(ranks):
        sender.send(drawn[rank])
    ranks[0].hear(ranks)
    out: list[Any] = ranks[0].receive([ALL] * count)
    for place in range(count):
        exact = np.mean([scaled_sign(parts.flat(its[place])) for its in drawn], axis=0)
        assert torch.equal(out[place], torch.from_numpy(exact).float().to(dtype)), place


def test_a_rule_without_weights_is_given_decoded_messages_side_by_side() -> None:
    method = parts.method_of(ErrorFeedback(), mpisign.ef_signsgd().codec, Median())
    ranks = sides(lambda: parts.parameters((100,), (33,)), method)
    drawn = [parts.draw_normal(ranks[0].tensors, rank) for rank in ALL]
    for rank, sender in enumerate(ranks):
        sender.send(drawn[rank])
    ranks[0].hear(ranks)
    out: list[Any] = ranks[0].receive([ALL, (2,)])
    columns = [scaled_sign(parts.flat(g[0])) for g in drawn]
    np.testing.assert_allclose(parts.flat(out[0]), np.median(columns, axis=0), rtol=1e-6)
    np.testing.assert_allclose(parts.flat(out[1]), scaled_sign(parts.flat(drawn[2][1])), rtol=1e-6)


# -------------------------------------------------------------------------------------------------- every method


each_with_one_decision = parts.each_method_that(lambda method: not method.exchanges_models)


def settled(ranks: list[Side]) -> list[Side]:
    """Where Adam's second moment is 0, nothing moves: let it be 1, as if there had been steps before."""
    for receiver in ranks:
        for tensor in receiver.tensors:
            receiver.store.of(tensor).get("variance", torch.empty(0)).fill_(1.0)
    return ranks


def play(ranks: Sequence[Side], step: int, voters: Voters, absent: Sequence[int] = ()) -> list[list[Any]]:
    """A step on all sides, of which ``absent`` ones only follow; returns the ranks' gradients after it."""
    drawn: list[list[Any]] = []
    for rank, sender in enumerate(ranks):
        gradients: list[Any] = (
            [None] * len(sender.tensors) if rank in absent else parts.draw_normal(sender.tensors, step, rank)
        )
        parts.give(sender.tensors, gradients)
        drawn.append([t.grad for t in sender.tensors])
        if rank not in absent:
            assert sender.send(drawn[rank], step)
    for rank, receiver in enumerate(ranks):
        if rank not in absent:
            receiver.sent(voters)
        receiver.hear(ranks)
        receiver.decide(voters, step)
    for rank, receiver in enumerate(ranks):
        if rank in absent:
            receiver.follow(voters, step)
        else:
            receiver.receive(voters, step)
    return [[t.grad for t in receiver.tensors] for receiver in ranks]


@each_with_one_decision
def test_all_ranks_get_the_same_gradients(name: str) -> None:
    method = parts.methods_for(RANKS)[name]
    ranks = settled(sides(lambda: parts.parameters(*SHAPES), method))
    for step in range(2):
        first, *others = play(ranks, step, [ALL] * len(SHAPES))
        assert any(bool(g.any()) for g in first)
        for gradients in others:
            assert parts.same(gradients, first)


@each_with_one_decision
def test_who_only_follows_keeps_a_running_memory_like_the_others(name: str) -> None:
    """Rank 2 has joined: it has no gradients and gets none, and what the ranks share must not grow old there."""
    method = parts.methods_for(RANKS)[name]
    ranks = settled(sides(lambda: parts.parameters(*SHAPES), method))
    for step in range(2):
        play(ranks, step, [ALL] * len(SHAPES))
    before = ranks[2].memories()
    results = play(ranks, 2, [(0, 1)] * len(SHAPES), absent=[2])
    assert results[2] == [None] * len(SHAPES)
    assert parts.same(ranks[2].memories(), before) == (not method.memory.running)
    in_common = {"ef21": ("average",), "ef21_sgdm": ("average",), "one_bit_adam": ("momentum", "variance")}
    shared = in_common.get(method.memory.name, ())
    assert bool(shared) == method.memory.running, "say here what ranks share in this memory"
    for place in range(len(SHAPES)):
        for field in shared:
            assert torch.equal(ranks[2].memory(place)[field], ranks[0].memory(place)[field]), (place, field)


@pytest.mark.parametrize("smoothness", [None, [1.0, 2.0, 5.0]], ids=["ef21", "ef21_w"])
def test_a_running_memory_turns_the_decision_into_the_gradient(smoothness: list[float] | None) -> None:
    """EF21: the gradient is the average estimate, equal or weighted, which moves only where somebody voted."""
    method = mpisign.ef21(ratio=1.0) if smoothness is None else mpisign.ef21_w(smoothness, ratio=1.0)
    shares = np.array(smoothness or [1.0] * RANKS) / sum(smoothness or [1.0] * RANKS)
    ranks = sides(lambda: parts.parameters((40,), (3,), dtypes=[torch.float64]), method)
    averages = [np.zeros(40), np.zeros(3)]
    for step, voters in enumerate([[ALL, ALL], [(0, 2), ()], [(1,), ALL]]):
        estimates = [[parts.flat(s.memory(place)["estimate"]) for place in (0, 1)] for s in ranks]
        results = play(ranks, step, voters)
        for place, who in enumerate(voters):
            for rank in who:
                g = parts.flat(parts.draw_normal(ranks[0].tensors, step, rank)[place]) / (RANKS * shares[rank])
                averages[place] = averages[place] + shares[rank] * (g - estimates[rank][place])
            if who:
                np.testing.assert_allclose(parts.flat(results[0][place]), averages[place], rtol=0, atol=1e-6)
            np.testing.assert_allclose(parts.flat(ranks[1].memory(place)["average"]), averages[place], atol=1e-6)


# ------------------------------------------------------------------------------------------------------- models


def test_models_are_written_into_the_parameters_and_gradients_stay() -> None:
    """One of them lies with gaps in its storage, so that what is sent is a copy of it."""

    def make() -> list[torch.nn.Parameter]:
        return [torch.nn.Parameter(torch.zeros(5)), torch.nn.Parameter(torch.zeros(4, 6)[:, ::2])]

    ranks = sides(make, mpisign.monna(0, momentum=0.0))
    for rank, sender in enumerate(ranks):
        for tensor in sender.tensors:
            tensor.data.fill_(float(rank))
        for place, tensor in enumerate(sender.tensors):
            sender.message(place)[0].copy_(tensor.detach().flatten())
    receiver = ranks[0]
    parts.give(receiver.tensors, [torch.full((5,), 9.0), None])
    receiver.hear(ranks)
    voters = [ALL] * 2
    receiver.decide(voters)
    receiver.receive(voters)
    assert all((t == 1.0).all() for t in receiver.tensors), "the mean of 0, 1 and 2"
    assert (receiver.tensors[0].grad == 9.0).all()
    assert receiver.tensors[1].grad is None


def test_models_stay_where_nobody_votes() -> None:
    receiver = parts.side(parts.parameters((5,)), mpisign.monna(0), size=RANKS)
    receiver.tensors[0].data.fill_(3.0)
    receiver.tensors[0].grad = torch.ones(5)
    receiver.receive([()])
    assert (receiver.tensors[0] == 3.0).all()
    assert (receiver.tensors[0].grad == 1.0).all()
