"""mpisign.overlap on a rank alone: options, and that there is nothing to hide; what it does among several is in mpi."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from mpirun import mpirun

import mpisign
from mpisign.memory import Momentum
from mpisign.memory.store import MemoryStore
from mpisign.overlap import OVERLAP, Overlap, check_overlap
from mpisign.session import current

pytestmark = pytest.mark.usefixtures("world")


def wrap(model: torch.nn.Module, **options: Any) -> mpisign.DistributedSignOptimizer:
    return mpisign.DistributedSignOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), **options)


def train(optimizer: mpisign.DistributedSignOptimizer, model: torch.nn.Module, steps: int = 5) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()


@pytest.mark.parametrize("option", OVERLAP)
def test_known_options(option: bool | str) -> None:
    assert check_overlap(option) is option
    assert wrap(torch.nn.Linear(4, 2), overlap=option).overlap is option


@pytest.mark.parametrize("option", [1, 0, None, "yes", "True", 1.0, [], ["auto"]])
def test_an_unknown_option_is_an_error_when_the_optimizer_is_built(option: Any) -> None:
    with pytest.raises(mpisign.OptionError, match=r"overlap=.* is not known: choose one of True, False, 'auto'"):
        wrap(torch.nn.Linear(4, 2), overlap=option)


def test_what_needs_all_gradients_cannot_be_sent_early() -> None:
    with pytest.raises(mpisign.OptionError, match="clip_grad_norm= needs all of them first"):
        wrap(torch.nn.Linear(4, 2), overlap=True, clip_grad_norm=1.0)
    with pytest.raises(mpisign.OptionError, match="dp_sign needs all of them first"):
        wrap(torch.nn.Linear(4, 2), overlap=True, method=mpisign.dp_sign(1.0, noise=0.1))
    wrap(torch.nn.Linear(4, 2), overlap="auto", clip_grad_norm=1.0)


@pytest.mark.parametrize("passes", [0, -1, 1.5, True, None, "2"])
def test_passes_are_a_number_above_0(passes: Any) -> None:
    with pytest.raises(mpisign.OptionError, match="backward_passes_per_step="):
        wrap(torch.nn.Linear(4, 2), backward_passes_per_step=passes)


@pytest.mark.parametrize("option", OVERLAP)
def test_alone_there_are_no_hooks_and_nothing_leaves_early(option: bool | str) -> None:
    model = torch.nn.Linear(4, 2)
    optimizer = wrap(model, overlap=option, bucket_cap_mb=1e-6)
    train(optimizer, model)
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    mark = current().tracer.mark()
    optimizer.zero_grad()
    with optimizer.no_sync():
        model(torch.ones(2, 4)).sum().backward()
    model(torch.ones(2, 4)).sum().backward()
    assert current().tracer.spans(mark) == []
    optimizer.step()
    assert optimizer.report is not None
    assert optimizer.report.exposed_seconds >= 0.0


def test_no_sync_ends_with_its_block_also_by_an_exception() -> None:
    overlap = Overlap(True, 1)
    with pytest.raises(ZeroDivisionError), overlap.paused(), overlap.paused():
        raise ZeroDivisionError
    assert overlap._paused == 0


@pytest.mark.parametrize("option", OVERLAP)
def test_a_copy_has_the_options(option: bool | str) -> None:
    model = torch.nn.Linear(4, 2)
    optimizer = wrap(model, overlap=option, backward_passes_per_step=3)
    train(optimizer, model)
    copied_model, copied = copy.deepcopy((model, optimizer))
    assert (copied.overlap, copied.backward_passes_per_step) == (option, 3)
    train(copied, copied_model)
    train(optimizer, model)
    assert all(map(torch.equal, model.parameters(), copied_model.parameters()))


# ------------------------------------------------------------------------- what a round that is not over leaves alone


def drafted() -> tuple[torch.nn.Parameter, MemoryStore]:
    """A store in the middle of a round that has written ones, and has begun a second piece beside one of twos."""
    parameter, store = torch.nn.Parameter(torch.zeros(8)), MemoryStore(Momentum(0.9))
    store.of(parameter)["momentum"].fill_(3.0)
    store.piece(parameter, 0, 4).fill_(2.0)
    store.draft()
    store.of(parameter)["momentum"].fill_(1.0)
    store.piece(parameter, 0, 4).fill_(1.0)
    store.piece(parameter, 4, 8).fill_(1.0)
    return parameter, store


def kept(store: MemoryStore, parameter: torch.nn.Parameter) -> Any:
    state = store.state_dict([parameter], 0, None, "")
    pieces = state["pieces"][0]
    return state["memory"][0]["momentum"].tolist(), {lo: piece.tolist() for lo, piece in pieces.items()}


BEFORE = [3.0] * 8, {0: [2.0] * 4}


def test_a_round_that_is_dropped_leaves_no_piece() -> None:
    parameter, store = drafted()
    store.drop()
    assert kept(store, parameter) == BEFORE


def test_a_round_that_is_committed_leaves_all() -> None:
    parameter, store = drafted()
    store.commit()
    assert kept(store, parameter) == ([1.0] * 8, {0: [1.0] * 4, 4: [1.0] * 4})


def test_a_copy_in_the_middle_of_a_round_has_nothing_of_it() -> None:
    parameter, store = drafted()
    its, copied = copy.deepcopy((parameter, store))
    assert kept(copied, its) == BEFORE
    copied.of(its)["momentum"].add_(1.0)  # at once, as there is no round
    assert kept(copied, its) == ([4.0] * 8, {0: [2.0] * 4})
    store.commit()
    assert kept(store, parameter)[0] == [1.0] * 8


def test_what_a_round_has_written_goes_with_the_layout_that_it_was_written_in() -> None:
    parameter, store = drafted()
    store.follow([parameter], {parameter: Momentum(0.9)}, current().group)
    store.piece(parameter, 2, 6).fill_(5.0)  # of what is left of the round
    store.drop()
    assert kept(store, parameter)[0] == BEFORE[0]
    assert store.piece(parameter, 0, 8).tolist()[:4] == [2.0] * 4


IN_A_THREAD = """
import threading, warnings, torch, mpisign
from mpi4py import MPI
mpisign.init(node_of=range(MPI.COMM_WORLD.size))
model = torch.nn.Linear(4, 2)
optimizer = mpisign.DistributedSignOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), overlap=True)
with warnings.catch_warnings(record=True) as heard:
    warnings.simplefilter("always")
    for _ in range(4):
        optimizer.zero_grad()
        backward = threading.Thread(target=lambda: model(torch.ones(2, 4)).sum().backward())
        backward.start()
        backward.join()
        optimizer.step()
hooks = sum(len(p._post_accumulate_grad_hooks or {}) for p in model.parameters())
print(f"rank {mpisign.rank()}: {hooks} hooks; {[str(one.message) for one in heard]}", flush=True)
"""


@pytest.mark.long
def test_backward_in_a_thread_for_which_mpi_was_not_started(tmp_path: Path) -> None:
    """There is no overlap then, which is said once; with MPI for all threads there is."""
    script = tmp_path / "train.py"
    script.write_text(IN_A_THREAD)
    alone = mpirun(2, script, env={"MPI4PY_RC_THREADS": "0"})
    assert alone.returncode == 0, alone.text
    for rank in range(2):
        assert f"rank {rank}: 0 hooks; ['no overlap: backward runs in another thread" in alone.text
    every = mpirun(2, script)
    assert every.returncode == 0, every.text
    for rank in range(2):
        assert f"rank {rank}: 2 hooks; []" in every.text
