"""mpisign.rules.coordinatewise: median and trimmed mean against the oracle and against what they promise."""

from __future__ import annotations

import itertools

import numpy as np
import oracle
import pytest
import torch

from mpisign.backends.host import Host
from mpisign.errors import OptionError
from mpisign.policy import Policy
from mpisign.rules import ValueRule
from mpisign.rules.coordinatewise import Median, TrimmedMean, median, trimmed_mean

VOTERS = [1, 2, 3, 4, 5, 8, 15, 33]
EXAMPLE = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]])


def some_rows(voters: int, n: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normal values of all magnitudes, a third of which occur again and again."""
    random = torch.Generator().manual_seed(voters * 1000 + n)
    rows = torch.randn(voters, n, generator=random) * 10.0 ** torch.randint(-9, 9, (voters, n), generator=random)
    few = torch.randint(-1, 2, (voters, n), generator=random)
    return torch.where(torch.rand(voters, n, generator=random) < 1 / 3, few, rows).to(dtype)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view({4: torch.int32, 8: torch.int64}[tensor.itemsize])


def test_the_rows_of_the_literature() -> None:
    assert median(EXAMPLE).tolist() == [4, 5, 6]
    assert trimmed_mean(EXAMPLE, 1).tolist() == [4, 5, 6]
    assert trimmed_mean(EXAMPLE[[0, 1]], 0).tolist() == [2.5, 3.5, 4.5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n", [0, 1, 1000])
@pytest.mark.parametrize("voters", VOTERS)
def test_they_are_the_oracles_bit_for_bit(voters: int, n: int, dtype: torch.dtype) -> None:
    rows = some_rows(voters, n, dtype)
    before = rows.clone()
    for f in {0, 1, voters // 4, (voters - 1) // 2}:
        assert torch.equal(trimmed_mean(rows, f), torch.from_numpy(oracle.trimmed_mean(rows.numpy(), f))), f
    assert torch.equal(median(rows), torch.from_numpy(np.median(rows.numpy(), axis=0).astype(rows.numpy().dtype)))
    assert torch.equal(rows, before)


@pytest.mark.parametrize("voters", range(1, 12))
def test_every_order_is_put_in_order(voters: int) -> None:
    """All columns of zeros and ones: a network that sorts these sorts everything."""
    columns = torch.tensor(list(itertools.product([0.0, 1.0], repeat=voters))).T
    ones = columns.sum(0)
    for f in range((voters + 1) // 2):
        kept = voters - 2 * f
        assert torch.equal(trimmed_mean(columns, f), (ones - f).clamp(0, kept) / kept)


@pytest.mark.parametrize("voters", [3, 4, 15])
def test_coordinates_can_be_decided_in_slices(voters: int) -> None:
    """Also across blocks, and down to the sign of a zero, whatever zeros it was the median of."""
    n = Host.rows + 1001
    rows = some_rows(voters, n)
    rows[torch.rand(rows.shape, generator=torch.Generator().manual_seed(1)) < 0.2] = -0.0
    context = Policy().context(3, 0)
    for rule in (Median(), TrimmedMean(1)):
        assert isinstance(rule, ValueRule)
        whole, sliced = torch.full((2, 1, n), torch.nan)
        assert rule.decide([row[None] for row in rows], whole, context, 0) == 0
        for lo, hi in itertools.pairwise([0, 1, 8, 1000, Host.rows + 3, n]):
            rule.decide([row[None, lo:hi] for row in rows], sliced[:, lo:hi], context, lo)
        assert torch.equal(bits(whole), bits(sliced))
        assert torch.equal(whole[0], median(rows) if rule == Median() else trimmed_mean(rows, 1))
    zeros = median(rows) == 0
    assert zeros.any()
    assert not median(rows)[zeros].signbit().any()


def test_the_order_of_the_ranks_does_not_matter() -> None:
    rows = some_rows(7, 500)
    for order in ([6, 5, 4, 3, 2, 1, 0], [3, 1, 4, 0, 5, 2, 6]):
        assert torch.equal(bits(trimmed_mean(rows[order], 2)), bits(trimmed_mean(rows, 2)))


@pytest.mark.parametrize("f", [1, 2, 3])
def test_whatever_f_ranks_send_the_honest_values_bound_the_result(f: int) -> None:
    honest = some_rows(2 * f + 2, 400)
    huge = torch.finfo(torch.float32).max
    for evil in (torch.full((f, 400), huge), torch.full((f, 400), -huge), some_rows(f, 400) * 1e9):
        rows = torch.cat([evil, honest])
        for result in (median(rows), trimmed_mean(rows, f)):
            assert (honest.amin(0) <= result).all()
            assert (result <= honest.amax(0)).all()


def test_sums_do_not_overflow_on_the_way() -> None:
    for voters in VOTERS:
        rows = torch.full((voters, 3), 2.0**127)  # two of them are too much for fp32
        assert torch.equal(trimmed_mean(rows, voters // 5), rows[0])
        assert torch.equal(median(rows), rows[0])


def test_with_few_voters_left_a_trimmed_mean_is_the_median() -> None:
    for voters in (1, 2, 3, 4):
        rows = some_rows(voters, 100)
        assert torch.equal(trimmed_mean(rows, 2), median(rows))


def test_on_signs_both_are_the_majority() -> None:
    ballots = torch.randint(0, 2, (7, 300), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    assert torch.equal(median(ballots), ballots.sum(0).sign())
    assert torch.equal(trimmed_mean(ballots, 3), ballots.sum(0).sign())
    assert torch.equal(trimmed_mean(ballots, 2).sign(), ballots.sum(0).sign())


@pytest.mark.parametrize("rule", [Median(), TrimmedMean(1)], ids=str)
def test_the_bias_on_data_that_differ(rule: Median | TrimmedMean) -> None:
    """Ranks pull x towards 1, 2 and 10: it stops at 2, where the true gradient is -7/3; the mean would reach 13/3."""
    pulls = torch.tensor([1.0, 2.0, 10.0], dtype=torch.float64)
    x, decision = torch.zeros(1, 1, dtype=torch.float64), torch.empty(1, 1, dtype=torch.float64)
    for step in range(100):
        rule.decide([x - pull for pull in pulls], decision, Policy().context(step, 0), 0)
        x -= 0.5 * decision
    assert x.item() == pytest.approx(2)
    assert (x - pulls).mean().item() == pytest.approx(-7 / 3)


@pytest.mark.parametrize("f", [-1, 1.0, True, None, "1"])
def test_an_impossible_f(f: object) -> None:
    with pytest.raises(OptionError, match=r"f=.* must be an int of 0 or more"):
        TrimmedMean(f)


def test_an_f_too_large_for_the_job() -> None:
    TrimmedMean(2).check(5)
    with pytest.raises(OptionError, match=r"f=2 needs at least 2 f \+ 1 = 5 ranks.* has 4: choose f=1, or .* -n 5"):
        TrimmedMean(2).check(4)
