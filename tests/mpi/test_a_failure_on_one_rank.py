"""Whatever fails on one rank alone, before or after it has talked to the others, is an error on all of them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pytest
import torch
from resumable import Job

import mpisign
from mpisign import CheckpointError, ConsistencyError, GradientError, MpisignError, OptionError, checkpoint, doctor
from mpisign.checkpoint import directory, loading
from mpisign.session import current

if TYPE_CHECKING:
    from mpi4py import MPI

pytestmark = pytest.mark.mpi(min_size=2)


class Unpicklable:
    def __reduce__(self) -> NoReturn:
        raise RuntimeError("not by mail")


def _break() -> NoReturn:
    raise RuntimeError("arrived broken")


class Fragile:
    """Can be sent, and not be received."""

    def __reduce__(self) -> tuple[object, ...]:
        return _break, ()


class OnlyReads:
    """An optimizer whose state can be asked for, and not be loaded."""

    def __init__(self, wrapped: torch.optim.Optimizer) -> None:
        self.param_groups, self.defaults, self.state_dict = wrapped.param_groups, wrapped.defaults, wrapped.state_dict

    def load_state_dict(self, state_dict: object) -> NoReturn:
        raise MemoryError("no room for a state")


def linear() -> torch.nn.Linear:
    return torch.nn.Linear(2, 2)


def optimizer_of(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def voting(gradient: torch.Tensor) -> mpisign.DistributedSignOptimizer:
    parameter = torch.nn.Parameter(torch.zeros(3, 2))
    optimizer = mpisign.DistributedSignOptimizer(torch.optim.SGD([parameter], lr=1.0))
    parameter.grad = gradient
    return optimizer


def two_reports() -> list[mpisign.StepReport]:
    optimizer, reports = voting(torch.ones(3, 2)), []
    for _ in range(2):
        optimizer.step()
        reports.append(optimizer.report)
        optimizer.param_groups[0]["params"][0].grad = torch.ones(3, 2)
    return reports


def synchronized_twice(odd: bool) -> None:
    optimizer = voting(torch.ones(3, 2))
    optimizer.synchronize()
    if not odd:
        optimizer.zero_grad()
    optimizer.synchronize()


def examined(odd: bool) -> None:
    with pytest.MonkeyPatch.context() as here:
        if odd:
            here.setattr(doctor, "_binding", lambda: iter([1 // 0]))
        doctor.examine()


# By name: what all ranks do and what the odd one does instead, its error, the others', and what all are told.
Case = tuple[Callable[[bool, Path], Any], type[Exception], type[MpisignError], str]
CASES: dict[str, Case] = {
    "an object that cannot be sent": (
        lambda odd, _: mpisign.allgather_object(Unpicklable() if odd else 1),
        RuntimeError,
        ConsistencyError,
        "not by mail",
    ),
    "an object that cannot be received": (
        lambda odd, _: mpisign.broadcast_object([Fragile()] if not mpisign.rank() else None),
        RuntimeError,
        ConsistencyError,
        "arrived broken",
    ),
    "a root that is none": (
        lambda odd, _: mpisign.broadcast_object(1, 99 if odd else 0),
        OptionError,
        OptionError,
        "root_rank=99",
    ),
    "parameters that are none": (
        lambda odd, _: mpisign.broadcast_parameters({"it": 3} if odd else linear().state_dict()),  # type: ignore[dict-item]
        OptionError,
        OptionError,
        "'it' is a int",
    ),
    "an optimizer that is none": (
        lambda odd, _: mpisign.broadcast_optimizer_state(None if odd else optimizer_of(linear())),  # type: ignore[arg-type]
        OptionError,
        OptionError,
        "has no state_dict()",
    ),
    "a state that does not load": (
        lambda odd, _: mpisign.broadcast_optimizer_state(OnlyReads(optimizer_of(linear()))),
        ConsistencyError,
        ConsistencyError,
        "no room for a state",
    ),
    "a model that is none": (
        lambda odd, _: mpisign.check_consistency(None if odd else linear()),  # type: ignore[arg-type]
        AttributeError,
        ConsistencyError,
        "named_parameters",
    ),
    "a gradient that cannot be sent": (
        lambda odd, _: voting(torch.ones(3, 2).to_sparse() if odd else torch.ones(3, 2)).step(),
        GradientError,
        GradientError,
        "densify it",
    ),
    "a second synchronize()": (
        lambda odd, _: synchronized_twice(odd),
        mpisign.SynchronizationError,
        mpisign.SynchronizationError,
        "would vote on votes",
    ),
    "a report of an earlier step": (
        lambda odd, _: two_reports()[0 if odd else 1].agreement(),
        MpisignError,
        MpisignError,
        "the bitmaps of step 0 are gone",
    ),
    "a check of the doctor's that breaks": (
        lambda odd, _: examined(odd),
        ZeroDivisionError,
        ConsistencyError,
        "division",
    ),
    "a path that is none, for a timeline": (
        lambda odd, folder: mpisign.timeline(None if odd else folder / "trace.json"),  # type: ignore[arg-type]
        TypeError,
        ConsistencyError,
        "NoneType",
    ),
    "a path that is none, to load from": (
        lambda odd, folder: checkpoint.load(None if odd else folder, model=linear()),  # type: ignore[arg-type]
        TypeError,
        ConsistencyError,
        "NoneType",
    ),
    "a path that is none, to look at": (
        lambda odd, folder: checkpoint.newest(None if odd else folder),  # type: ignore[arg-type]
        TypeError,
        ConsistencyError,
        "NoneType",
    ),
    "a step that is none": (
        lambda odd, folder: Job().save(folder, step=True if odd else 1),
        OptionError,
        OptionError,
        "step=True must be an int of 0",
    ),
}


def outcome(call: Callable[[], Any]) -> Exception | None:
    try:
        call()
    except Exception as error:
        return error
    return None


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("where", ["first", "last"])
def test_all_are_told(comm: MPI.Comm, folder: Path, name: str, where: str) -> None:
    call, own, others, says = CASES[name]
    received = name in ("an object that cannot be received", "a state that does not load")  # by all but the root
    odd = 0 if where == "first" else comm.size - 1
    mine = outcome(lambda: call(comm.rank == odd, folder))
    failed = comm.rank != 0 if received else comm.rank == odd
    assert type(mine) is (own if failed else others)
    assert says in str(mine)
    if not failed and not received:
        assert f"on rank {odd} on " in str(mine)
        assert f"(this is rank {comm.rank})" in str(mine)
    assert mpisign.allgather_object(comm.rank) == list(range(comm.size)), "and all can go on"


@pytest.mark.parametrize("options", [{"node_of": [-1]}, {"stall_timeout": -1.0}], ids=str)
def test_options_of_init_that_cannot_be(comm: MPI.Comm, options: dict[str, Any]) -> None:
    mpisign.shutdown()
    odd = comm.size - 1
    mine = outcome(lambda: mpisign.init(**(options if comm.rank == odd else {})))
    assert type(mine) is (OptionError if comm.rank == odd else ConsistencyError)
    assert comm.rank == odd or f"ranks [{odd}] were given options that cannot be" in str(mine)
    assert not mpisign.is_initialized()
    mpisign.init()
    assert mpisign.allgather_object(comm.rank) == list(range(comm.size))


def test_what_fails_on_all_is_everyones_own_error(comm: MPI.Comm) -> None:
    with pytest.raises(RuntimeError, match="not by mail"):
        mpisign.allgather_object(Unpicklable())
    mpisign.barrier()


def test_a_rank_that_fails_meets_the_others_wherever_they_are(comm: MPI.Comm) -> None:
    """Also in something else, in a step, or on their way out."""
    for others in (mpisign.barrier, voting(torch.ones(3, 2)).step):
        call = (lambda: mpisign.broadcast_object(1, 99)) if comm.rank == 0 else others
        assert "root_rank=99" in str(outcome(call))
    if comm.rank == 0:
        with pytest.raises(OptionError, match="root_rank=99"):
            mpisign.broadcast_object(1, 99)
        with pytest.raises(ConsistencyError, match="it can only end now"):
            mpisign.barrier()
    mpisign.shutdown()
    mpisign.init()


def test_an_account_is_short_and_fit_for_a_terminal(comm: MPI.Comm) -> None:
    said = ""
    try:
        with current().telling("barrier()"):
            if comm.rank == 0:
                raise ValueError("\x1b[31m" + "x" * 10_000_000)
        mpisign.barrier()
    except (ValueError, ConsistencyError) as error:
        said = str(error)
    assert ("\x1b" in said) == (comm.rank == 0)
    assert comm.rank == 0 or 1000 < len(said) < 3000


# ------------------------------------------------------------------------------------------------------ checkpoints


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), MemoryError("gone"), RecursionError("deep")])
def test_whatever_rank_0_meets_in_a_directory(
    comm: MPI.Comm, folder: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job().train(1)
    job.save(folder)

    def fail(*_: object) -> NoReturn:
        raise error

    if comm.rank == 0:
        monkeypatch.setattr(directory, "find", fail)
    for call in (lambda: job.load(folder), lambda: checkpoint.newest(folder)):
        with pytest.raises(CheckpointError, match=f"rank 0 on .*{type(error).__name__}"):
            call()
    monkeypatch.undo()
    assert job.load(folder).step == 1


@pytest.mark.parametrize("named", ["damage", "read_tensors", "set_random_state"])
def test_whatever_the_last_rank_meets_in_a_file(
    comm: MPI.Comm, folder: Path, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job().train(1)
    job.save(folder)
    odd = comm.size - 1

    def fail(*_: object) -> NoReturn:
        raise MemoryError("gone")

    if comm.rank == odd:
        monkeypatch.setattr(loading, named, fail)
    mine = outcome(lambda: job.load(folder))
    assert isinstance(mine, (MpisignError, MemoryError) if comm.rank == odd else MpisignError)
    assert f"rank {odd} on " in str(mine) or comm.rank == odd
    monkeypatch.undo()
    assert job.load(folder).step == 1


def test_a_warning_that_is_an_error_on_rank_0(comm: MPI.Comm, folder: Path) -> None:
    """As python -W error makes it."""
    job = Job().train(1)
    job.save(folder)
    job.train(2).save(folder)
    if comm.rank == 0:
        os.truncate(folder / "step-00000002" / "shared.pt", 10)
    comm.Barrier()
    with pytest.raises(CheckpointError, match=r"rank 0 on .*UserWarning: training goes on from"):
        job.load(folder)


def test_one_checkpoint_by_another_name_on_another_rank(comm: MPI.Comm, folder: Path) -> None:
    """Rank 0's may be called anything; where another rank's is called otherwise, it cannot know which is meant."""
    job = Job().train(1)
    saved = job.save(folder)
    if comm.rank == 0:
        saved.rename(folder / "best")
    comm.Barrier()
    assert job.load(folder / "best").step == 1
    with pytest.raises(ConsistencyError, match=r"rank 0 has told 'best'|ranks do different things"):
        job.load(folder / ("best" if comm.rank == 0 else "other"))
    mpisign.barrier()


@pytest.mark.parametrize("thread", [False, True], ids=["the files", "the thread"])
def test_a_save_in_the_background_that_cannot_begin(
    comm: MPI.Comm, folder: Path, thread: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import threading

    from mpisign.checkpoint import saving

    def fail(*_: object) -> NoReturn:
        raise RuntimeError("can't start new thread") if thread else MemoryError("no room for a copy")

    if comm.rank == 1:
        monkeypatch.setattr(threading.Thread if thread else saving, "start" if thread else "write_tensors", fail)
    job = Job().train(1)
    job.save(folder, asynchronous=True)
    mine = outcome(checkpoint.wait)
    monkeypatch.undo()
    assert type(mine) is CheckpointError
    assert "rank 1 on " in str(mine)
    assert mpisign.allgather_object(comm.rank) == list(range(comm.size))


def test_a_timeline_in_the_place_of_a_pipe(comm: MPI.Comm, folder: Path) -> None:
    pipe = folder / "trace.json"
    if comm.rank == 0:
        os.mkfifo(pipe)
    comm.Barrier()
    with pytest.raises(MpisignError, match=r"rank 0 cannot write it: .*no regular file"):
        mpisign.timeline(pipe)
    assert pipe.is_fifo()
    mpisign.timeline(folder / "other.json")
    assert comm.rank or json.loads((folder / "other.json").read_text())
