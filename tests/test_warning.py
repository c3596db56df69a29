"""mpisign.warning: what is warned of is the user's line."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

import mpisign
from mpisign.warning import warn

if TYPE_CHECKING:
    from collections.abc import Iterator


def test_it_names_the_line_that_calls() -> None:
    with pytest.warns(UserWarning, match="^look out$") as caught:
        warn("look out")
    assert (caught[0].filename, caught[0].lineno) == (__file__, sys._getframe().f_lineno - 1)


@contextmanager
def around() -> Iterator[None]:
    yield


@torch.no_grad()
@around()
def through_many(optimizer: mpisign.DistributedSignOptimizer) -> int:
    optimizer.step()
    return sys._getframe().f_lineno - 1


def test_functions_of_torch_and_the_library_lie_between(world: None) -> None:
    """Step hooks, decorators, and what lets ``torch.compile`` pass by."""
    model = nn.Linear(2, 2)
    optimizer = mpisign.DistributedSignOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), method=mpisign.dgc())
    torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    model(torch.ones(1, 2)).sum().backward()
    with pytest.warns(UserWarning, match=r"dgc changes with the epoch") as caught:
        line = through_many(optimizer)
    assert (caught[0].filename, caught[0].lineno) == (__file__, line)
