"""mpisign.rules.ScaledVote: the median of scales, and messages that say what no honest rank would."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from gpu_branch import gpu_branch, needs_compiler

from mpisign.codecs import ScaledRows
from mpisign.policy import Policy
from mpisign.rules import ScaledVote
from mpisign.rules.scaled_vote import median_of_scales

NAN, INF = math.nan, math.inf
on = pytest.mark.parametrize("gpu", [False, pytest.param(True, marks=needs_compiler)], ids=["host", "kernels"])


@pytest.mark.parametrize(
    ("said", "median"),
    [
        ([3.0], 3.0),
        ([1.0, 2.0], 1.5),
        ([5.0, 1.0, 2.0], 2.0),
        ([1.0, 7.0, 2.0, 4.0], 3.0),
        ([0.0, 0.0, 9.0], 0.0),
        ([0.0, 4.0], 2.0),
        ([NAN, 1.0, 2.0], 1.5),
        ([-1.0, INF, 3.0], 3.0),
        ([-INF, NAN], 0.0),
        ([-0.0, -0.0], 0.0),
        ([3e38, 3.2e38], 3.1e38),
    ],
)
def test_the_median_of_the_scales_that_are_some(said: list[float], median: float) -> None:
    """Of an even number, the mean of the two in the middle; negative ones, NaN and Inf abstain, and 0 counts."""
    for order in itertools.permutations(said):
        found, speak = median_of_scales(torch.tensor([order, order]).T.contiguous())
        assert found.tolist() == pytest.approx([median, median])
        assert not found.signbit().any()
        assert speak[:, 0].tolist() == [math.isfinite(scale) and scale > 0 for scale in order]


def messages(
    signs: list[list[float]], said: list[list[float]], policy: Policy
) -> tuple[ScaledRows, list[torch.Tensor]]:
    """Of each rank, for 64 columns: in each row the signs are alike, and the scales are what it ``said``."""
    codec, sent = ScaledRows().of(torch.empty(len(signs[0]), 64)), []
    for rank, (its, scales) in enumerate(zip(signs, said, strict=True)):
        values = torch.tensor(its).repeat_interleave(64)
        message = torch.zeros((codec.planes(policy), codec.length(values.numel())), dtype=torch.int32)
        codec.encode(values, message, policy.context(0, rank), 0)
        codec.split(message[0])[0].copy_(torch.tensor(scales))
        sent.append(message)
    return codec, sent


@on
@pytest.mark.parametrize("zeros", ["rows", "abstain"])
@pytest.mark.parametrize("ties", ["positive", "zero"])
def test_whoever_says_no_scale_has_no_vote_on_that_row(ties: str, zeros: str, gpu: bool) -> None:
    policy = Policy(zeros, ties)
    signs = [[1.0, 1.0, 1.0, 1.0, -1.0], [-1.0, -1.0, -1.0, 1.0, 1.0], [-1.0, -1.0, -1.0, -1.0, -1.0]]
    said = [[2.0, NAN, 2.0, 0.0, NAN], [3.0, 3.0, -3.0, 1.0, -1.0], [INF, 5.0, 4.0, 8.0, -INF]]
    tied = 1.0 if ties == "positive" else 0.0  # rows 0, 2 and 3: one against one
    expected = [tied * 2.5, -4.0, tied * 3.0, tied * 1.0, 0.0]
    with gpu_branch(gpu):
        codec, sent = messages(signs, said, policy)
        down = ScaledVote().down(codec, policy, 3)
        out = torch.full((down.planes(policy), sent[0].shape[1]), 0x25A5A5A5, dtype=torch.int32)
        ScaledVote().recode(sent, torch.empty(0), out, codec, policy.context(0, 0), 0)
        decision = torch.empty(5 * 64)
        codec.decode(out, decision)
    np.testing.assert_array_equal(decision.view(5, 64), np.repeat(np.array(expected)[:, None], 64, 1))


def test_half_of_the_ranks_can_say_anything_as_long_as_one_more_is_honest() -> None:
    random = torch.Generator().manual_seed(0)
    for hostile in range(1, 6):
        honest = torch.rand(hostile + 1, 50, generator=random)
        for said in (1e38, 0.0, NAN, -5.0, INF, 1e-30):
            median, _ = median_of_scales(torch.cat([torch.full((hostile, 50), said), honest]))
            assert bool((median >= honest.min(0).values).all())
            assert bool((median <= honest.max(0).values).all())
