"""Resuming is exact, at one rank: by every method and exchange, from any kind of save. ``mpi/`` has more ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from methods_table import ALONE, FOUR, Make, walk_exchanges
from resumable import Job, assert_resuming_is_exact, assert_states_are_enough, at_once, in_the_background

from mpisign import Method

pytestmark = pytest.mark.usefixtures("world")

each_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.long)], ids=str
)


@walk_exchanges(size=1)
@each_dtype
def test_resuming_is_exact(tmp_path: Path, make: Make, exchange: str, dtype: torch.dtype) -> None:
    method = make(1)
    assert_resuming_is_exact(tmp_path, lambda: Job(method, exchange=exchange, dtype=dtype, seed=4))


@pytest.mark.parametrize("method", FOUR, ids=lambda method: method.name)
def test_from_a_save_in_the_background(tmp_path: Path, method: Method) -> None:
    assert_resuming_is_exact(tmp_path, lambda: Job(method), in_the_background, until=11)


@pytest.mark.parametrize("save", [at_once, in_the_background])
def test_of_a_plain_optimizer(tmp_path: Path, save: Callable[[Job, Path], Path]) -> None:
    assert_resuming_is_exact(tmp_path, lambda: Job(plain=True), save)


@each_dtype
@pytest.mark.parametrize("method", ALONE.values(), ids=ALONE)
def test_from_state_dicts(tmp_path: Path, method: Method, dtype: torch.dtype) -> None:
    assert_states_are_enough(tmp_path / "rank0.pt", lambda: Job(method, dtype=dtype, zeros="abstain"))
