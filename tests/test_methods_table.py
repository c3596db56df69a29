"""The table that tests walk has every method, and says what one lacks."""

from __future__ import annotations

import pytest
import torch
from methods_table import ALONE, ARGUMENTS, FOUR, MAKERS, MISSING, TABLE, among, exchanges, needs_arguments

import mpisign
from mpisign import DistributedSignOptimizer, Method, methods


def test_every_method_is_walked() -> None:
    advice = [
        f'give {name} its {", ".join(needed)}: "{name}": {{"": lambda size: mpisign.{name}(...)}} in ARGUMENTS of '
        f"tests/methods_table.py"
        for name, needed in MISSING.items()
    ]
    assert not advice
    assert {name.split()[0] for name in TABLE} == set(MAKERS)


def test_no_entry_is_of_a_method_that_is_gone() -> None:
    assert ARGUMENTS.keys() <= MAKERS.keys()


def test_every_method_is_public() -> None:
    assert set(MAKERS) == {name for name in methods.__all__ if not isinstance(getattr(methods, name), type)}
    assert all(getattr(mpisign, name) is make for name, make in MAKERS.items())


def test_a_job_of_five_can_have_them_all() -> None:
    assert among(5).keys() == TABLE.keys()
    assert {method.name.split("(")[0] for method in among(5).values()} == set(MAKERS)


def test_every_name_is_of_a_method_of_its_own() -> None:
    """So that no test runs twice."""
    seen = [(str(method), method.by_step, method.by_epoch) for method in among(5).values()]
    assert len(set(map(repr, seen))) == len(seen)


def test_there_are_four_kinds() -> None:
    assert [bool(method.memory.fields) for method in FOUR] == [False, True, True, False]
    assert [method.elects for method in FOUR] == [True, True, True, False]


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("method", ALONE.values(), ids=ALONE)
def test_the_exchanges_it_allows(method: Method) -> None:
    for exchange in ("allgather", "two_phase"):
        sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(3))], lr=1.0)
        if exchange in exchanges(method):
            DistributedSignOptimizer(sgd, method=method, exchange=exchange)
        else:
            with pytest.raises(mpisign.OptionError, match=f"exchange={exchange!r}"):
                DistributedSignOptimizer(sgd, method=method, exchange=exchange)


def test_what_an_entry_is_needed_for() -> None:
    assert needs_arguments(lambda f, *rest, nu=0.1, **more: mpisign.mean()) == ["f"]
    assert needs_arguments(mpisign.signum) == []
    assert needs_arguments(mpisign.nearest_neighbour_mixing) == ["f"]
