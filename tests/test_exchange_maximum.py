"""mpisign.exchange.maximum on a rank alone: magnitudes without a loss scale, by segment."""

from __future__ import annotations

from typing import Any

import parts
import pytest
import rounds
import torch
from parts import DTYPES, ONE_BUCKET, ONE_SEGMENT_A_BUCKET

pytestmark = pytest.mark.usefixtures("world")

SHAPES = ((3, 5, 7), (31,), (), (33, 2), (127,))


@pytest.mark.parametrize("cap", [ONE_BUCKET, ONE_SEGMENT_A_BUCKET])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_magnitudes_by_first_word(dtype: torch.dtype, cap: float) -> None:
    tensors = parts.parameters(*SHAPES, dtypes=[dtype])
    its, over_ranks = rounds.maximum_of(tensors, cap)
    starts = parts.side(tensors, cap=cap).first_words()
    assert its.bytes_sent == 0, "there is nobody to send it to"
    for step in range(2):
        gradients = parts.draw_normal(tensors, step)
        before = parts.copies(gradients)
        bounds = over_ranks(gradients, 0.25)
        assert set(bounds) == set(starts)
        for start, gradient in zip(starts, gradients, strict=True):
            assert bounds[start].dtype == torch.float32
            assert torch.equal(bounds[start], gradient.float().abs().flatten() * 0.25)
        assert parts.same(gradients, before)


def test_without_a_gradient_it_is_zero_also_after_a_step_with_one() -> None:
    tensors = parts.parameters((40,), (3,))
    _, over_ranks = rounds.maximum_of(tensors)
    everything: list[Any] = [torch.full((40,), -2.0), torch.ones(3)]
    over_ranks(everything)
    bounds = over_ranks([None, everything[1]])
    first, second = (bounds[start] for start in parts.side(tensors).first_words())
    assert not first.any()
    assert (second == 1.0).all()


def test_an_empty_parameter_takes_nothing_from_the_next_on_the_wire() -> None:
    """Both begin at the same word."""
    tensors = parts.parameters((40,), (0,), (5,))
    _, over_ranks = rounds.maximum_of(tensors)
    bounds = over_ranks([torch.full((40,), 2.0), torch.zeros(0), torch.ones(5)])
    starts = parts.side(tensors).first_words()
    assert starts[0] == starts[1]
    assert bounds[starts[0]].tolist() == [2.0] * 40
    assert bounds[starts[2]].tolist() == [1.0] * 5
