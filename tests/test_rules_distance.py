"""mpisign.rules.distance and geometry: each rule against the oracle, its closed forms, and what it promises."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
import oracle
import pytest
import torch

from mpisign.backends.host import Host
from mpisign.errors import OptionError
from mpisign.rules import VectorRule
from mpisign.rules.distance import (
    CenteredClipping,
    GeometricMedian,
    Krum,
    MultiKrum,
    NearestNeighbourAveraging,
    centered_clipping,
    geometric_median,
    krum,
    multi_krum,
    nearest_neighbour_averaging,
)
from mpisign.rules.geometry import combine, squared_distances

VOTERS = [1, 2, 3, 4, 5, 9, 15]
EXAMPLE = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]])
RULES = [Krum(1), MultiKrum(1), MultiKrum(1, m=2), GeometricMedian(), CenteredClipping(), NearestNeighbourAveraging(1)]

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
voters = pytest.mark.parametrize("voters", VOTERS)
rules = pytest.mark.parametrize("rule", RULES, ids=str)


@dataclass(frozen=True)
class StepContext:
    """What these rules read of a context."""

    voters: tuple[int, ...]
    rank: int = 0
    previous: torch.Tensor | None = None


@pytest.fixture(params=[64, 1 << 19], ids=["many blocks", "one block"], autouse=True)
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Host, "work", request.param)


def some_rows(count: int, n: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(count, n, generator=torch.Generator().manual_seed(100 * count + n), dtype=torch.float64).to(
        dtype
    )


def whole_rows(count: int, n: int) -> torch.Tensor:
    """Small integers: distances are exact and many are equal."""
    return torch.randint(-1, 2, (count, n), generator=torch.Generator().manual_seed(count)).float()


def assert_close(mine: torch.Tensor, expected: np.ndarray) -> None:
    torch.testing.assert_close(mine, torch.from_numpy(expected).to(mine.dtype), rtol=4e-7, atol=4e-7)


def decide(rule: object, rows: torch.Tensor, context: StepContext | None = None) -> torch.Tensor:
    messages = [row[None] for row in rows.clone()]
    out = torch.full((1, rows.shape[1]), torch.nan, dtype=rows.dtype)
    assert rule.decide(messages, out, context or StepContext(tuple(range(len(rows)))), 0) == 0
    assert torch.equal(torch.cat(messages), rows)
    return out[0]


# ------------------------------------------------------------------------------------------------ geometry


@dtypes
@voters
@pytest.mark.parametrize("n", [0, 1, 63, 1000])
def test_squared_distances(n: int, voters: int, dtype: torch.dtype) -> None:
    rows = some_rows(voters, n, dtype)
    measured = squared_distances(rows)
    assert measured.dtype == torch.float64
    expected = [[math.fsum(((a.double() - b.double()) ** 2).tolist()) for b in rows] for a in rows]
    torch.testing.assert_close(measured, torch.tensor(expected, dtype=torch.float64), rtol=1e-13, atol=0)
    assert torch.equal(measured, measured.T)


def test_distances_do_not_cancel() -> None:
    """Rows whose length is 10^7 times their distance: inner products in fp32 know nothing of it."""
    steps = torch.randint(0, 4, (4, 500), generator=torch.Generator().manual_seed(0))
    rows = 1e8 + 8.0 * steps  # neighbours in fp32
    exact = 64 * (steps[:, None] - steps[None]).square().sum(-1)
    assert squared_distances(rows).tolist() == exact.tolist()


def test_the_bits_do_not_depend_on_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Host, "work", 1 << 22)  # enough for torch to share it out
    rows = some_rows(5, 200_000)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append((squared_distances(rows), geometric_median(rows)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_rows_without_weight_are_not_read() -> None:
    rows = EXAMPLE.clone()
    rows[1] = torch.inf
    assert combine(rows, [1.0, 0.0, 3.0], 2.0).tolist() == [11, 13, 15]
    assert combine(rows, [0.0, 0.0, 0.0]).tolist() == [0, 0, 0]


# ------------------------------------------------------------------------------------- the same rows for all


def test_the_rows_of_the_literature() -> None:
    assert krum(EXAMPLE, 1).tolist() == [1, 2, 3]
    assert multi_krum(EXAMPLE, 1).tolist() == [2.5, 3.5, 4.5]
    assert nearest_neighbour_averaging(EXAMPLE, 1, pivot=0).tolist() == [2.5, 3.5, 4.5]
    median = geometric_median(EXAMPLE.double(), nu=0.1, steps=3)
    assert median.tolist() == pytest.approx([3.78788764, 4.78788764, 5.78788764], abs=5e-9)


@rules
def test_they_decide_on_whole_vectors(rule: Krum) -> None:
    assert isinstance(rule, VectorRule)


@dtypes
@voters
@rules
def test_a_single_opinion_wins(rule: Krum, voters: int, dtype: torch.dtype) -> None:
    row = some_rows(1, 200, dtype)
    if rule == CenteredClipping():
        row /= row.norm()  # within its radius
    torch.testing.assert_close(decide(rule, row.expand(voters, -1)), row[0])


@rules
def test_no_coordinates_at_all(rule: Krum) -> None:
    assert decide(rule, torch.empty(5, 0)).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@rules
def test_the_longest_possible_vector_does_no_harm(rule: Krum, dtype: torch.dtype) -> None:
    """In fp64 its distance is beyond all numbers."""
    honest = some_rows(5, 100, dtype)
    evil = torch.full((1, 100), torch.finfo(dtype).max, dtype=dtype)
    for rows in (torch.cat([honest, evil]), torch.cat([honest[:3], -evil, honest[3:]])):
        assert decide(rule, rows).norm() < 2 * honest.norm(dim=1).max()


# ---------------------------------------------------------------------------------------------------- Krum


@dtypes
@voters
@pytest.mark.parametrize("f", [0, 1, 2, 6])
def test_krum_is_the_oracles(f: int, voters: int, dtype: torch.dtype) -> None:
    rows = some_rows(voters, 130, dtype)
    assert torch.equal(krum(rows, f), rows[int(np.argmin(oracle.krum_scores(rows.numpy(), f)))])
    assert torch.equal(decide(Krum(f), rows), krum(rows, f))
    for m in {1, 2, voters}:
        assert_close(multi_krum(rows, f, m), oracle.multi_krum(rows.numpy(), f, m))
        assert torch.equal(decide(MultiKrum(f, m), rows), multi_krum(rows, f, m))
    assert_close(decide(MultiKrum(f), rows), oracle.multi_krum(rows.numpy(), f, max(1, voters - f)))


@voters
def test_of_equal_scores_the_lowest_rank_is_elected(voters: int) -> None:
    rows = whole_rows(voters, 4)
    scores = oracle.krum_scores(rows.numpy(), 1)
    assert torch.equal(krum(rows, 1), rows[scores.index(min(scores))])
    assert_close(multi_krum(rows, 1, 2), oracle.multi_krum(rows.numpy(), 1, 2))


def test_krum_sums_squares() -> None:
    """By plain distances 100.1 would win, with 0.1 + 3.4 against 2 + 2; squared, 11.57 stands against 8."""
    rows = torch.tensor([[2.0], [0.0], [-2.0], [100.0], [100.1], [103.5]])
    assert krum(rows, 2).item() == 0


@pytest.mark.parametrize("f", [1, 2, 3])
def test_krum_elects_no_one_far_away(f: int) -> None:
    honest = some_rows(f + 3, 50)
    evil = 100 + some_rows(f, 50)  # they agree nearly, but are too few to be each other's neighbours
    elected = krum(torch.cat([evil, honest]), f)
    assert any(torch.equal(elected, row) for row in honest)


# ---------------------------------------------------------------------------------------- geometric median


@dtypes
@voters
@pytest.mark.parametrize(("nu", "steps"), [(0.1, 1), (0.1, 3), (1e-6, 10), (50.0, 3)])
def test_geometric_median_is_the_oracles(nu: float, steps: int, voters: int, dtype: torch.dtype) -> None:
    rows = some_rows(voters, 130, dtype)
    expected = oracle.geometric_median(rows.numpy(), nu, steps)
    assert_close(geometric_median(rows, nu, steps), expected)
    assert torch.equal(decide(GeometricMedian(nu, steps), rows), geometric_median(rows, nu, steps))


def test_it_converges_to_the_least_sum_of_distances() -> None:
    """There, unit vectors towards the rows add up to 0."""
    rows = some_rows(6, 3, torch.float64)
    differences = rows - geometric_median(rows, nu=1e-9, steps=2000)
    torch.testing.assert_close(
        (differences / differences.norm(dim=1, keepdim=True)).sum(0), torch.zeros(3).double(), rtol=0, atol=1e-6
    )


def test_where_all_distances_are_beyond_fp64_it_stays_at_the_start() -> None:
    assert geometric_median(torch.full((3, 4), 1e200, dtype=torch.float64)).tolist() == [0] * 4


def test_far_above_the_distances_nu_makes_it_the_mean() -> None:
    rows = some_rows(5, 100)
    torch.testing.assert_close(geometric_median(rows, nu=1e6), rows.mean(0))


# --------------------------------------------------------------------------------------- centered clipping


@dtypes
@voters
@pytest.mark.parametrize(("radius", "steps"), [(0.5, 1), (8.0, 1), (8.0, 4), (1e9, 1)])
def test_centered_clipping_is_the_oracles(radius: float, steps: int, voters: int, dtype: torch.dtype) -> None:
    rows = some_rows(voters, 130, dtype)
    for center in (None, some_rows(1, 130, dtype)[0]):
        start = np.zeros(130) if center is None else center.numpy()
        result = centered_clipping(rows, radius, center, steps)
        assert_close(result, oracle.centered_clipping(rows.numpy(), radius, start, steps))
        context = StepContext(tuple(range(voters)), previous=None if center is None else center[None])
        assert torch.equal(decide(CenteredClipping(radius, steps), rows, context), result)


def test_the_exchange_is_told_to_keep_the_previous_decision() -> None:
    assert CenteredClipping().remembers
    assert not any(getattr(rule, "remembers", False) for rule in RULES if rule != CenteredClipping())


@pytest.mark.parametrize("radius", [1e3, math.inf])
def test_within_the_radius_it_is_the_mean(radius: float) -> None:
    rows = some_rows(4, 100)
    torch.testing.assert_close(centered_clipping(rows, radius, some_rows(1, 100)[0]), rows.mean(0))


def test_an_adversary_moves_the_center_by_a_share_of_the_radius() -> None:
    honest, center = some_rows(4, 100), some_rows(1, 100)[0]
    for evil in (torch.full((1, 100), 1e30), -1e9 * honest[:1]):
        with_it = centered_clipping(torch.cat([honest, evil]), 3.0, center)
        without_it = center + (centered_clipping(honest, 3.0, center) - center) * 4 / 5
        assert (with_it - without_it).norm().item() == pytest.approx(3.0 / 5, rel=1e-5)


# ------------------------------------------------------------------------------ nearest-neighbour averaging


@dtypes
@voters
@pytest.mark.parametrize("f", [0, 1, 3])
def test_nearest_neighbour_averaging_is_the_oracles(f: int, voters: int, dtype: torch.dtype) -> None:
    ranks = tuple(range(10, 10 + voters))
    for rows in (some_rows(voters, 130, dtype), whole_rows(voters, 4).to(dtype)):
        for pivot in range(voters):
            result = nearest_neighbour_averaging(rows, f, pivot)
            assert_close(result, oracle.nearest_neighbour_averaging(rows.numpy(), f, pivot))
            assert torch.equal(decide(NearestNeighbourAveraging(f), rows, StepContext(ranks, rank=10 + pivot)), result)


def test_it_stays_within_the_honest_distances_whatever_is_sent() -> None:
    honest = some_rows(5, 60)
    for evil in (torch.full((2, 60), 1e30), -honest[:2], honest[:2] * 1.01, honest.mean(0).expand(2, -1) + 0.1):
        rows = torch.cat([honest, evil])
        for pivot in range(5):
            furthest = (honest - honest[pivot]).norm(dim=1).max()
            assert (nearest_neighbour_averaging(rows, 2, pivot) - honest[pivot]).norm() <= furthest * (1 + 1e-6)


def test_each_rank_decides_for_itself() -> None:
    assert NearestNeighbourAveraging(1).personal
    assert not any(getattr(rule, "personal", False) for rule in RULES if rule != NearestNeighbourAveraging(1))
    assert decide(NearestNeighbourAveraging(1), EXAMPLE, StepContext((0, 1, 2), rank=2)).tolist() == [5.5, 6.5, 7.5]


def test_a_rank_that_abstains_takes_the_neighbours_of_the_one_krum_elects() -> None:
    rows = torch.tensor([[100.0], [0.0], [1.0], [2.0], [4.0]])
    assert krum(rows, 1).item() == 1
    assert decide(NearestNeighbourAveraging(1), rows, StepContext((0, 1, 2, 3, 5), rank=4)).item() == 7 / 4


# ------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize("rule", [Krum(1), MultiKrum(1), NearestNeighbourAveraging(1)], ids=lambda rule: rule.name)
@pytest.mark.parametrize("f", [-1, 0.5, True])
def test_an_impossible_f(rule: Krum, f: object) -> None:
    with pytest.raises(OptionError, match=r"f=.* must be an int of 0 or more"):
        dataclasses.replace(rule, f=f)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MultiKrum(1, m=0), "m=0 must be an int of 1 or more"),
        (lambda: GeometricMedian(nu=0), "nu=0 must be a positive number"),
        (lambda: GeometricMedian(steps=0), "steps=0 must be an int of 1 or more"),
        (lambda: CenteredClipping(radius=-1.0), "radius=-1.0 must be a positive number"),
        (lambda: CenteredClipping(steps=1.5), "steps=1.5 must be an int of 1 or more"),
        (lambda: Krum(2).check(6), r"krum with f=2 needs at least 2 f \+ 3 = 7 ranks.* has 6: choose f=1, or .* -n 7"),
        (lambda: Krum(0).check(2), "krum with f=0 needs .* 3 ranks.* has 2: choose another rule, or start"),
        (lambda: MultiKrum(1).check(4), "multi_krum with f=1 needs"),
        (lambda: MultiKrum(1, m=6).check(5), "cannot average m=6 of 5 ranks: choose m=4 or less"),
        (lambda: NearestNeighbourAveraging(2).check(4), r"needs at least 2 f \+ 1 = 5 ranks"),
    ],
)
def test_impossible_options(make: object, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make()


def test_enough_ranks() -> None:
    Krum(2).check(7)
    MultiKrum(2, m=7).check(7)
    NearestNeighbourAveraging(2).check(5)
