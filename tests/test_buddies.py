"""mpisign.buddies: what error feedback owes is not lost with a rank, in jobs of their own; see surviving.py."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from mpi4py import MPI
from mpirun import outlived

import mpisign


def run(ranks: int, **scenario: Any) -> list[Any]:
    """Who has taken over whose, as all ranks say alike that are left."""
    result = outlived(ranks, "surviving.py", [{**scenario, "kind": "owed", "name": "owed"}])
    told = [json.loads(its) for its in re.findall(r"rank \d+: owed: (.*)", result.text)]
    assert len(told) == ranks - len({event["rank"] for event in scenario["events"]}), result.text
    assert all(its == told[0] for its in told), result.text
    return list(told[0])


@pytest.mark.few
@pytest.mark.skipif(MPI.get_vendor()[0] != "Open MPI", reason="no ULFM")
@pytest.mark.parametrize(
    ("method", "dead", "where", "told_at"),
    [
        ("ef_signsgd", 2, "before", None),
        pytest.param("double_squeeze", 0, "close", None, marks=pytest.mark.long),
        pytest.param("ef_signsgd", 2, "before", 4, marks=pytest.mark.long),
    ],
)
def test_the_next_rank_takes_over(method: str, dead: int, where: str, told_at: int | None) -> None:
    """In the units of the present learning rate, which has halved since; rank 0 of three is the buddy of rank 2.

    Also where rank 0 has told its optimizer's state in a step before the last copy.
    """
    events = [{"rank": dead, "step": 8, "where": where, "what": "kill"}]
    told = run(3, method=method, buddy_every=3, steps=11, events=events, told_at=told_at)
    assert told == [[(dead + 1) % 3, [dead]]]


@pytest.mark.long
@pytest.mark.skipif(MPI.get_vendor()[0] != "Open MPI", reason="no ULFM")
def test_one_that_dies_before_a_second_copy_and_one_later() -> None:
    events = [{"rank": 1, "step": 1, "where": "before", "what": "kill"}]
    assert run(4, method="ef_signsgd", buddy_every=5, steps=4, events=events) == [[2, [1]]]


@pytest.mark.usefixtures("world")
def test_bad_options() -> None:
    layer = torch.nn.Linear(2, 2)
    sgd = torch.optim.SGD(layer.parameters(), lr=0.1)
    with pytest.raises(mpisign.OptionError, match="has no error feedback: leave it out"):
        mpisign.DistributedSignOptimizer(sgd, method=mpisign.signum(), buddy_every=2)
    with pytest.raises(mpisign.OptionError, match="on_failure='continue'"):
        mpisign.DistributedSignOptimizer(sgd, method=mpisign.ef_signsgd(), buddy_every=2)
