"""mpisign.rules.mixing: neighbourhoods against the oracle, and every kind of rule behind them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import oracle
import pytest
import torch

from mpisign.backends.host import Host
from mpisign.errors import OptionError
from mpisign.rules import MajorityVote, ValueRule, VectorRule
from mpisign.rules.coordinatewise import Median, TrimmedMean, median
from mpisign.rules.distance import CenteredClipping, Krum, NearestNeighbourAveraging, centered_clipping, krum
from mpisign.rules.mixing import NearestNeighbourMixing, nearest_neighbour_mixing


@dataclass(frozen=True)
class StepContext:
    """What these rules read of a context."""

    voters: tuple[int, ...] = (0, 1, 2, 3, 4)
    rank: int = 0
    previous: torch.Tensor | None = None


@dataclass(frozen=True)
class Recorder(ValueRule):
    """Decides on nothing, but remembers where it was asked to."""

    name = "recorder"
    places: list[tuple[int, int]] = field(default_factory=list, compare=False)

    def decide(self, messages: Sequence[torch.Tensor], out: torch.Tensor, context: Any, first_word: int) -> int:
        assert all(message.shape == out.shape for message in messages)
        self.places.append((first_word, out.shape[-1]))
        return 0


def some_rows(count: int, n: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(count, n, generator=torch.Generator().manual_seed(count + n), dtype=dtype)


def decide(rule: Any, rows: torch.Tensor, context: StepContext | None = None) -> torch.Tensor:
    out = torch.full((1, rows.shape[1]), torch.nan, dtype=rows.dtype)
    assert rule.decide([row[None] for row in rows], out, context or StepContext(), 0) == 0
    return out[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("f", [0, 1, 2, 9])
@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_each_row_becomes_the_mean_of_its_neighbourhood(count: int, f: int, dtype: torch.dtype) -> None:
    few = torch.randint(-1, 2, (count, 3), generator=torch.Generator().manual_seed(count)).to(dtype)  # many are equal
    for rows in (some_rows(count, 70, dtype), few):
        mixed = nearest_neighbour_mixing(rows, f)
        assert mixed.dtype == dtype
        np.testing.assert_allclose(mixed, oracle.nearest_neighbour_mixing(rows.numpy(), f), rtol=4e-7, atol=4e-7)


def test_a_closed_form() -> None:
    rows = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]])
    assert nearest_neighbour_mixing(rows, 1).tolist() == [[2.5, 3.5, 4.5], [2.5, 3.5, 4.5], [5.5, 6.5, 7.5]]


def test_it_takes_the_bias_off_the_median_of_ranks_that_differ() -> None:
    """Ranks pull x towards 1, 2 and 10; with f = 0 all neighbourhoods are everybody, and x goes to the mean 13/3."""
    pulls = torch.tensor([[1.0], [2.0], [10.0]], dtype=torch.float64)
    x = torch.zeros(1, dtype=torch.float64)
    for _ in range(100):
        x -= 0.5 * decide(NearestNeighbourMixing(Median(), 0), x - pulls)
    assert x.item() == pytest.approx(13 / 3)


def test_honest_rows_come_closer_and_far_ones_stay_out() -> None:
    honest = some_rows(8, 100)
    mixed = nearest_neighbour_mixing(torch.cat([honest, torch.full((2, 100), 1e9)]), 2)[:8]
    assert (mixed - honest.mean(0)).norm() < 0.5 * (honest - honest.mean(0)).norm()


@pytest.mark.parametrize("n", [0, 1, Host.rows, 2 * Host.rows + 77])
def test_a_coordinatewise_rule_behind_it(n: int) -> None:
    rows = some_rows(5, n)
    assert torch.equal(decide(NearestNeighbourMixing(Median(), 1), rows), median(nearest_neighbour_mixing(rows, 1)))


def test_a_rule_of_whole_vectors_behind_it() -> None:
    rows, center = some_rows(5, 100_000), some_rows(1, 100_000)
    mixed = nearest_neighbour_mixing(rows, 1)
    assert torch.equal(decide(NearestNeighbourMixing(Krum(1), 1), rows), krum(mixed, 1))
    clipped = decide(NearestNeighbourMixing(CenteredClipping(2.0), 1), rows, StepContext(previous=center))
    assert torch.equal(clipped, centered_clipping(mixed, 2.0, center[0]))


class WholeRecorder(VectorRule):
    """The same on whole vectors."""

    def __init__(self) -> None:
        self.places: list[tuple[int, int]] = []

    decide = Recorder.decide  # type: ignore[assignment]


@pytest.mark.parametrize("shardable", [True, False])
def test_the_rule_behind_gets_blocks_if_it_can(shardable: bool) -> None:
    n, width = Host.rows + 5, Host.rows
    rule = NearestNeighbourMixing(Recorder() if shardable else WholeRecorder(), 1)
    rule.decide([row[None] for row in some_rows(3, n)], torch.empty(1, n), StepContext(), 1000)
    assert rule.rule.places == ([(1000, width), (1000 + width, 5)] if shardable else [(1000, n)])


def test_what_it_says_about_itself() -> None:
    plain = NearestNeighbourMixing(TrimmedMean(1), 1)
    assert isinstance(plain, VectorRule)
    assert (plain.remembers, plain.personal) == (False, False)
    assert NearestNeighbourMixing(CenteredClipping(), 1).remembers
    assert NearestNeighbourMixing(NearestNeighbourAveraging(1), 1).personal
    assert repr(plain) == "NearestNeighbourMixing(rule=TrimmedMean(f=1), f=1)"


def test_impossible_options() -> None:
    with pytest.raises(OptionError, match=r"MajorityVote\(\) decides on signs"):
        NearestNeighbourMixing(MajorityVote(), 1)
    with pytest.raises(OptionError, match="f=-1 must be an int of 0 or more"):
        NearestNeighbourMixing(Median(), -1)
    with pytest.raises(OptionError, match="nearest_neighbour_mixing with f=2 needs at least"):
        NearestNeighbourMixing(Median(), 2).check(4)
    with pytest.raises(OptionError, match="krum with f=1 needs at least"):
        NearestNeighbourMixing(Krum(1), 1).check(4)
    NearestNeighbourMixing(Krum(1), 1).check(5)
    NearestNeighbourMixing(Median(), 1).check(3)
