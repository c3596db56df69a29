"""mpisign.exchange.encoder: what a rank sends, word for word, and what its memory keeps of a gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import oracle
import parts
import pytest
import torch
from parts import DTYPES, ONE_BUCKET, ONE_SEGMENT_A_BUCKET, SHAPES, Side

import mpisign
from mpisign.backends.host import as_words
from mpisign.bitmap.host import words_for
from mpisign.codecs import Codec, SignBits
from mpisign.exchange import encoder
from mpisign.memory import Memory
from mpisign.memory.memory import State
from mpisign.policy import Policy, StepContext

BAD = [float("nan"), float("inf"), -float("inf")]
UNWRITTEN = 0x55555555


def expected_words(gradient: torch.Tensor, first_word: int, policy: Policy, step: int, rank: int) -> np.ndarray:
    """What ``gradient`` is on the wire, by the oracle."""
    values = parts.flat(gradient)
    coins = parts.zero_coins(values.size, first_word, step=step, rank=rank, seed=policy.seed)
    return parts.planes(oracle.ballot(values, policy.zeros, coins), 2 if policy.zeros == "abstain" else 1)


# ------------------------------------------------------------------------------------------------------ the words


@pytest.mark.parametrize("cap", [ONE_BUCKET, ONE_SEGMENT_A_BUCKET])
@pytest.mark.parametrize("zeros", ["rows", "coin", "abstain", "positive"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_words_are_the_oracles(dtype: torch.dtype, zeros: str, cap: float) -> None:
    tensors, policy = parts.parameters(*SHAPES, dtypes=[dtype]), Policy(zeros, seed=3)
    sender = parts.side(tensors, policy=policy, cap=cap, rank=2, size=4)
    starts = oracle.first_words([t.numel() for t in tensors])
    assert sender.first_words() == starts
    for step in range(2):
        gradients = parts.draw(tensors, step)
        assert sender.send(gradients, step)
        for place, gradient in enumerate(gradients):
            assert np.array_equal(sender.words(place), expected_words(gradient, starts[place], policy, step, 2)), place


def test_parameters_of_several_types_share_a_message() -> None:
    tensors = parts.parameters(*SHAPES, dtypes=DTYPES)
    sender, gradients = parts.side(tensors), parts.draw(tensors, 1)
    assert len(sender.layout.buckets) == 1
    assert sender.send(gradients)
    for place, (gradient, start) in enumerate(zip(gradients, sender.first_words(), strict=True)):
        assert np.array_equal(sender.words(place), expected_words(gradient, start, Policy("coin"), 0, 0)), place


def test_the_last_registered_parameter_is_the_first_on_the_wire() -> None:
    tensors = parts.parameters((32,), (64,), (5,))
    sender = parts.side(tensors)
    sender.send([torch.ones(32), -torch.ones(64), torch.ones(5)])
    assert sender.exchanges[0].message.tolist() == [[0b11111, 0, 0, -1]]


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_both_zeros_toss_the_same_coins(zero: float) -> None:
    tensors = parts.parameters((100,))
    sender = parts.side(tensors, rank=1, size=2)
    sender.send([torch.full((100,), zero)], step=4)
    coins = parts.zero_coins(100, 0, step=4, rank=1)
    assert np.array_equal(sender.words(0), parts.planes(coins, 1))
    assert 30 < (coins > 0).sum() < 70


def test_channels_last_goes_in_the_order_of_the_memory() -> None:
    weight = torch.nn.Parameter(torch.zeros(6, 7, 2, 3).to(memory_format=torch.channels_last))
    (gradient,) = parts.draw([weight], 0)
    sender = parts.side([weight])
    sender.send([gradient.to(memory_format=torch.channels_last)])
    in_memory = gradient.permute(0, 2, 3, 1).contiguous()
    assert np.array_equal(sender.words(0), expected_words(in_memory, 0, Policy("coin"), 0, 0))


def test_a_gradient_may_lie_in_the_middle_of_its_storage() -> None:
    tensors = parts.parameters((33,))
    storage = torch.cat([torch.full((7,), -1.0), torch.ones(33), torch.full((9,), -1.0)])
    sender = parts.side(tensors)
    sender.send([storage[7:40]])
    assert sender.words(0).tolist() == [[0xFFFFFFFF, 1]]


def test_words_of_a_parameter_without_gradient_stay() -> None:
    """Nobody reads them: the header says so."""
    tensors = parts.parameters((40,), (33,), (5,))
    sender = parts.side(tensors)
    sender.exchanges[0].message.fill_(UNWRITTEN)
    assert sender.send([torch.ones(40), None, torch.ones(5)])
    assert sender.words(1).tolist() == [[UNWRITTEN] * 2]
    assert sender.words(0).tolist() == [[0xFFFFFFFF, 0xFF]]


def test_for_whole_vectors_a_parameter_without_gradient_is_zero() -> None:
    tensors = parts.parameters((3,), (2,))
    sender = parts.side(tensors, mpisign.krum(0, momentum=0.0))
    sender.exchanges[0].message.fill_(7.0)
    assert sender.send([torch.ones(3), None])
    assert sender.message(1).tolist() == [[0.0, 0.0]]
    assert sender.message(0).tolist() == [[1.0, 1.0, 1.0]]


@parts.each_method
def test_where_messages_are_cut_changes_nothing(name: str) -> None:
    """Coins and noise are of a place among all parameters, not in a message."""
    method = parts.methods_for(2)[name]
    sent = []
    for cap in (ONE_BUCKET, ONE_SEGMENT_A_BUCKET):
        tensors = parts.parameters(*SHAPES)
        sender = parts.side(tensors, method, cap=cap, rank=1, size=2)
        for step in range(3):
            assert sender.send(parts.draw_normal(tensors, step), step)
        sent.append(([sender.message(place).clone() for place in range(len(tensors))], sender.memories()))
    (messages, memories), (others, their_memories) = sent
    assert parts.same(messages, others)
    assert parts.same(memories, their_memories)


# ------------------------------------------------------------------------------------------------ memory and scale


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["signum", "lion"])
def test_averages_against_the_oracle(name: str, dtype: torch.dtype) -> None:
    tensors = parts.parameters(*SHAPES, dtypes=[dtype])
    sender = parts.side(tensors, parts.methods_for(1)[name])
    kept = [np.zeros(t.numel()) for t in tensors]
    for step in range(3):
        gradients = parts.draw_normal(tensors, step)
        assert sender.send(gradients, step)
        for place, gradient in enumerate(gradients):
            g = parts.flat(gradient)
            sent, kept[place] = (
                oracle.momentum(kept[place], g, 0.9) if name == "signum" else oracle.lion(kept[place], g, 0.9, 0.99)
            )
            assert np.array_equal(sender.words(place), parts.planes(np.sign(sent).astype(np.int8), 1))
            (momentum,) = sender.memory(place).values()
            assert momentum.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert momentum.shape == (tensors[place].numel(),)
            np.testing.assert_allclose(parts.flat(momentum), kept[place], rtol=0, atol=1e-6)


@parts.each_method
@pytest.mark.parametrize("unscale", [1.0, 2.0**-10])
def test_gradients_are_left_alone(name: str, unscale: float) -> None:
    tensors = parts.parameters(*SHAPES, dtypes=DTYPES)
    method = parts.methods_for(1)[name]
    sender, gradients = parts.side(tensors, method), parts.draw_normal(tensors, 5)
    before = parts.copies(gradients)
    assert sender.send(gradients, 0, unscale)
    assert parts.same(gradients, before)


@parts.each_method
def test_a_loss_scale_is_taken_out_before_the_memory(name: str) -> None:
    method = parts.methods_for(1)[name]
    plain, scaled = (parts.side(parts.parameters(*SHAPES), method) for _ in range(2))
    for step in range(2):
        gradients = parts.draw_normal(plain.tensors, step)
        assert plain.send(gradients, step)
        assert scaled.send([g * 2.0**12 for g in gradients], step, 2.0**-12)
    for place in range(len(SHAPES)):
        assert np.array_equal(plain.words(place), scaled.words(place)), place
    assert parts.same(plain.memories(), scaled.memories())


@pytest.mark.parametrize("name", ["signsgd", "signum", "lion", "mean"])
def test_a_tiny_16_bit_gradient_keeps_its_sign_under_a_loss_scale(name: str) -> None:
    tiny = torch.finfo(torch.float16).smallest_normal / 512
    tensors = parts.parameters((64,), dtypes=[torch.float16])
    sender = parts.side(tensors, parts.methods_for(1)[name], policy=Policy(zeros="positive"))
    assert sender.send([torch.full((64,), -tiny, dtype=torch.float16)], 0, 2.0**-16)
    if name == "mean":
        assert sender.message(0).tolist() == [[-tiny * 2.0**-16] * 64]
    else:
        assert sender.words(0).tolist() == [[0, 0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_sign_needs_no_scale_so_that_the_smallest_number_keeps_it(dtype: torch.dtype) -> None:
    """Divided by the loss scale it would be 0."""
    sender = parts.side(parts.parameters((64,), dtypes=[dtype]), policy=Policy(zeros="positive"))
    assert sender.send([torch.full((64,), -torch.finfo(dtype).tiny, dtype=dtype)], 0, 2.0**-60)
    assert sender.words(0).tolist() == [[0, 0]]


@pytest.mark.parametrize("name", ["signsgd", "signum", "lion", "mean"])
def test_a_large_parameter_is_encoded_in_pieces_that_nobody_sees(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, method = parts.parameters((1000,), (64,), (7,)), parts.methods_for(1)[name]
    whole = parts.side(tensors, method)
    monkeypatch.setattr(encoder, "PIECE", 64)
    pieces = parts.side(tensors, method)
    for step in range(2):
        gradients = parts.draw(tensors, step)
        assert whole.send(gradients, step, 0.5)
        assert pieces.send(gradients, step, 0.5)
        for place in range(3):
            assert np.array_equal(whole.words(place), pieces.words(place)), place
    assert parts.same(whole.memories(), pieces.memories())


def test_a_memory_is_changed_in_place() -> None:
    tensors = parts.parameters((40,), (3, 4))
    sender = parts.side(tensors, mpisign.signum(0.5))
    kept = [sender.store.of(tensor)["momentum"] for tensor in tensors]
    sender.send(parts.draw_normal(tensors, 0))
    (encoder_of,) = [batch.encoder for batch in sender.plan.batches]
    for place, tensor in enumerate(tensors):
        assert sender.store.of(tensor)["momentum"] is kept[place]
        assert kept[place].any()
        view = encoder_of.state(sender.segments()[place][1])["momentum"]
        assert (view.shape, view.data_ptr()) == ((tensor.numel(),), kept[place].data_ptr())
    plain = parts.side(tensors)
    assert plain.plan.batches[0].encoder.state(plain.segments()[0][1]) == {}


@pytest.mark.parametrize("zeros", ["rows", "coin"])
def test_where_rows_count_a_plane_that_is_not_sent_says_what_is_zero(zeros: str) -> None:
    tensors = parts.parameters(*SHAPES)
    sender = parts.side(tensors, policy=Policy(zeros))
    gradients = parts.draw(tensors, 0)
    assert sender.send(gradients)
    assert [len(exchange.message) for exchange in sender.exchanges] == [1]
    if zeros != "rows":
        assert sender.plan.spoken == (None,)
        return
    for place, (_, segment) in enumerate(sender.segments()):
        words = as_words(sender.plan.spoken[0][segment.start : segment.stop])
        assert np.array_equal(words, oracle.to_words(parts.flat(gradients[place]) != 0)), place


# -------------------------------------------------------------------------------------------------- error feedback


def scaled_sign(p: np.ndarray) -> np.ndarray:
    return float(np.float32(np.abs(p).mean())) * np.sign(p) if p.size else p


def test_only_what_was_voted_counts_as_sent() -> None:
    tensors = parts.parameters((40,), (33,), (5,), dtypes=[torch.float64])
    sender = parts.side(tensors, mpisign.ef_signsgd(), rank=1, size=3)
    errors = [np.zeros(t.numel()) for t in tensors]
    voters: list[Sequence[tuple[int, ...]]] = [
        [(0, 1, 2), (0, 2), (1,)],
        [(), (1,), (0, 1)],
        [(0, 2), (0, 1, 2), (0, 2)],
    ]
    for step, who in enumerate(voters):
        gradients: list[Any] = parts.draw_normal(tensors, step)
        if step == 2:
            gradients[2] = None
        assert sender.send(gradients, step)
        sender.sent(who)
        for place, gradient in enumerate(gradients):
            if gradient is not None:
                errors[place] = errors[place] + parts.flat(gradient)
                if 1 in who[place]:
                    errors[place] = errors[place] - scaled_sign(errors[place])
            np.testing.assert_allclose(parts.flat(sender.memory(place)["error"]), errors[place], rtol=0, atol=1e-7)


def test_each_piece_of_a_cut_parameter_has_a_scale_of_its_own() -> None:
    tensors = parts.parameters((100,), (10,), dtypes=[torch.float64])
    sender = parts.side(tensors, mpisign.double_squeeze(), exchange="two_phase", size=3)
    gradients = parts.draw_normal(tensors, 0)
    assert sender.send(gradients)
    cuts = [[(piece.lo, piece.hi) for piece in segment.pieces] for _, segment in sender.segments()]
    assert len(cuts[0]) > 1
    sender.sent([(0,)] * 2)
    for place, gradient in enumerate(gradients):
        p = parts.flat(gradient)
        sent = np.concatenate([scaled_sign(p[lo:hi]) for lo, hi in cuts[place]])
        np.testing.assert_allclose(parts.flat(sender.memory(place)["error"]), p - sent, rtol=0, atol=1e-7)


def test_zeros_of_each_piece_toss_the_coins_of_its_own_place() -> None:
    """Its first item is the scale, so that the words of its signs begin one later."""
    sender = parts.side(parts.parameters((200,)), mpisign.double_squeeze(), exchange="two_phase", rank=1, size=3)
    assert sender.send([torch.zeros(200)], 6)
    ((_, segment),) = sender.segments()
    assert len(segment.pieces) == 3
    for piece in segment.pieces:
        coins = parts.zero_coins(piece.hi - piece.lo, piece.first_word + 1, step=6, rank=1)
        words = sender.words(0)[0, piece.start - segment.start : piece.stop - segment.start]
        assert words[0] == 0
        signs, silent = np.split(words[1:], [words_for(piece.hi - piece.lo)])
        assert np.array_equal(signs, parts.planes(coins, 1)[0])
        assert silent.tolist() == [(1 << len(signs)) - 1], "none is, as the policy says coin"


def test_a_memory_without_feedback_is_told_nothing() -> None:
    tensors = parts.parameters((40,))
    sender, gradients = parts.side(tensors, mpisign.signum()), parts.draw_normal(tensors, 0)
    sender.send(gradients)
    before = sender.memories()
    sender.sent([(0,)])
    assert parts.same(sender.memories(), before)


# ------------------------------------------------------------------------------------------------ the order of calls


@dataclass(frozen=True)
class Noted(Memory):
    """Notes what it is asked, and sends the gradient."""

    log: list[Any] = field(default_factory=list, repr=False, compare=False)
    elementwise = False

    def prepare(self, gradients: Sequence[torch.Tensor], context: StepContext) -> Any:
        self.log.append(("prepare", [g.tolist() for g in gradients]))
        return len(gradients)

    def __call__(
        self, gradient: torch.Tensor, state: State, scratch: torch.Tensor, context: StepContext, first_word: int
    ) -> torch.Tensor:
        self.log.append(("memory", gradient.tolist(), context.prepared, first_word))
        return gradient


@dataclass(frozen=True)
class NotedBits(SignBits):
    log: list[Any] = field(default_factory=list, repr=False, compare=False)

    def encode(self, values: torch.Tensor, message: torch.Tensor, context: StepContext, first_word: int) -> Any:
        self.log.append(("codec", values.tolist(), context.prepared, first_word))
        return super().encode(values, message, context, first_word)


@pytest.mark.parametrize("method", [mpisign.signsgd(), mpisign.signum()], ids=["signs", "average"])
def test_a_codec_that_encodes_in_its_own_way_is_asked(method: Any) -> None:
    """Plain signs are packed past it, of many parameters at once."""
    log: list[Any] = []
    sender = parts.side(parts.parameters((2,)), parts.method_of(method.memory, NotedBits(log)))
    assert sender.send([torch.ones(2)])
    assert [entry[0] for entry in log] == ["codec"]


def noted(*shapes: tuple[int, ...]) -> tuple[Side, list[Any]]:
    log: list[Any] = []
    codec: Codec = NotedBits(log)
    return parts.side(parts.parameters(*shapes), parts.method_of(Noted(log), codec)), log


def test_all_gradients_are_seen_before_any_is_taken_in_and_each_is_encoded_at_once() -> None:
    sender, log = noted((2,), (33,), (1,))
    assert sender.send([torch.tensor([8.0, 4.0]), None, torch.tensor([-2.0])], unscale=0.5)
    assert log == [
        ("prepare", [[-1.0], [4.0, 2.0]]),
        ("memory", [-1.0], 2, 0),
        ("codec", [-1.0], 2, 0),
        ("memory", [4.0, 2.0], 2, 1 + words_for(33)),
        ("codec", [4.0, 2.0], 2, 1 + words_for(33)),
    ]


def test_where_a_gradient_is_bad_such_a_memory_hears_of_none() -> None:
    sender, log = noted((2,), (3,))
    assert not sender.send([torch.ones(2), torch.tensor([1.0, torch.nan, 1.0])])
    assert log == []


# -------------------------------------------------------------------------------------------- a step of one's own


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_local_update_puts_the_momentum_into_the_gradients(dtype: torch.dtype) -> None:
    tensors = parts.parameters(*SHAPES, dtypes=[dtype])
    sender = parts.side(tensors, mpisign.monna(0, momentum=0.5))
    sender.exchanges[0].message.fill_(7.0)
    gradients: list[Any] = [torch.full_like(t, 8.0) for t in tensors]
    gradients[1] = None
    assert sender.local_update(gradients, 0.5)
    assert gradients[1] is None
    assert all((g == 2.0).all() for g in gradients if g is not None)
    assert [float(sender.memory(place)["momentum"].sum()) for place in (0, 1)] == [2.0 * 105, 0.0]
    assert (sender.exchanges[0].message == 7.0).all(), "nothing is sent"


@pytest.mark.parametrize("bad", BAD)
def test_a_local_update_protects_the_memory(bad: float) -> None:
    tensors = parts.parameters((40,), (3,))
    sender = parts.side(tensors, mpisign.monna(0, momentum=0.5))
    gradients = [torch.ones(40), torch.ones(3)]
    gradients[0][7] = bad
    assert not sender.local_update(gradients)
    assert sender.memory(0)["momentum"].tolist() == [0.0 if i == 7 else 0.5 for i in range(40)]
