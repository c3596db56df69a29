"""mpisign.exchange.encoder and NaN or Inf: which is told, what is sent before it, what the memory takes in."""

from __future__ import annotations

from typing import Any

import numpy as np
import parts
import pytest
import torch
from parts import DTYPES, ONE_BUCKET, ONE_SEGMENT_A_BUCKET

import mpisign
from mpisign.memory import ErrorFeedback
from mpisign.rules import Mean

BAD = [float("nan"), float("inf"), -float("inf")]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("at", [0, 31, 32, 50, 99])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_first_that_is_bad_on_the_wire_is_told(dtype: torch.dtype, at: int, bad: float) -> None:
    tensors = parts.parameters((10,), (100,), (10,), (100,), dtypes=[dtype])
    for method in (mpisign.signsgd(), mpisign.signum(), mpisign.lion(), mpisign.mean(), mpisign.ef_signsgd()):
        for cap in (ONE_BUCKET, ONE_SEGMENT_A_BUCKET):
            sender = parts.side(tensors, method, cap=cap)
            gradients: list[Any] = parts.draw_normal(tensors, 0)
            for place, ends in ((None, None), (1, 1), (3, 3)):
                if place is not None:
                    gradients[place][at] = bad
                assert sender.send(gradients) == (ends is None), method.name
                assert sender.ended == ends, method.name
            gradients[3] = None
            assert not sender.send(gradients)
            assert sender.ended == 1, method.name


@pytest.mark.parametrize("bad", BAD)
def test_what_stands_before_a_bad_gradient_on_the_wire_is_written_all_the_same(bad: float) -> None:
    tensors = parts.parameters((64,), (64,), (64,))
    gradients = parts.draw_normal(tensors, 0)
    gradients[1][7] = bad
    for method in (mpisign.signsgd(), mpisign.signum(), mpisign.mean(), mpisign.ef_signsgd()):
        sender, whole = parts.side(tensors, method), parts.side(tensors, method)
        assert not sender.send(gradients)
        assert whole.send([g.nan_to_num(1.0, 1.0, 1.0) for g in gradients])
        assert np.array_equal(sender.words(2), whole.words(2)), method.name


@parts.each_method
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("cap", [ONE_BUCKET, ONE_SEGMENT_A_BUCKET])
def test_a_memory_takes_in_all_that_is_finite_and_nothing_else(name: str, bad: float, cap: float) -> None:
    """As if the gradient had been finite: all but the bad element is what it would be then, of all parameters.

    Memories that must see all gradients before hear of none.
    """
    method = parts.methods_for(1)[name]
    tensors = parts.parameters((40,), (100,), (33,))
    sender, whole = (parts.side(tensors, method, cap=cap) for _ in range(2))
    for one in (sender, whole):
        assert one.send(parts.draw_normal(tensors, 0))
        one.sent([(0,)] * 3)
    before = [sender.memory(place) for place in range(3)]
    gradients = parts.draw_normal(tensors, 1)
    assert whole.send(gradients, 1)
    gradients[1][50] = bad
    assert not sender.send(gradients, 1)
    assert sender.ended == 1
    for place, fields in enumerate(before):
        for key, value in fields.items():
            now, expected = sender.memory(place)[key], whole.memory(place)[key]
            if method.memory.needs_all:
                expected = value
            elif place == 1:
                expected[50] = value[50]
            assert torch.equal(now, expected), (place, key)


def test_an_overflown_memory_is_cleared_where_it_is_and_nowhere_else() -> None:
    tensors = parts.parameters((40,), (3,))
    method = parts.method_of(ErrorFeedback(), mpisign.ef_signsgd().codec, Mean())
    sender = parts.side(tensors, method)
    huge = torch.ones(40)
    huge[7] = 3e38
    for step in range(2):
        finite = sender.send([huge, torch.ones(3)], step)
    assert not finite
    assert sender.memory(0)["error"][7] == torch.inf
    sender.recover()
    expected = torch.full((40,), 2.0)
    expected[7] = 0
    assert torch.equal(sender.memory(0)["error"], expected)
    assert sender.memory(1)["error"].tolist() == [2.0] * 3
