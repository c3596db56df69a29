"""init(pickle=False) on real ranks: nothing is unpickled, and nothing of the library's own needs it."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import pytest
import torch

import mpisign
from mpisign import doctor

if TYPE_CHECKING:
    from mpi4py import MPI

pytestmark = pytest.mark.mpi


@pytest.fixture
def folder(comm: MPI.Comm, tmp_path: Path) -> Path:
    """The same on all ranks."""
    shared: Path = comm.bcast(tmp_path)
    return shared


@pytest.fixture
def unpickled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A job without pickles, where neither the library nor mpi4py for it can make any or read them."""
    from mpi4py import MPI

    def refuse(*_: object, **__: object) -> NoReturn:
        raise AssertionError("pickled")

    mpisign.shutdown()
    mpisign.init(pickle=False)
    for name in ("dumps", "loads"):
        monkeypatch.setattr(pickle, name, refuse)
    MPI.pickle.__init__(refuse, refuse)
    yield
    monkeypatch.undo()
    MPI.pickle.__init__()


@pytest.mark.usefixtures("unpickled")
@pytest.mark.parametrize(
    ("send", "name"),
    [(mpisign.allgather_object, "allgather_object"), (mpisign.broadcast_object, "broadcast_object")],
)
def test_objects_are_refused_on_every_rank_before_anything_is_sent(send: Callable[[object], object], name: str) -> None:
    with pytest.raises(
        mpisign.OptionError, match=rf"rank {mpisign.rank()}: {name}\(\) pickles, .*init\(pickle=False\)"
    ):
        send({"any": "thing"})
    mpisign.barrier()


@pytest.mark.mpi(min_size=2)
@pytest.mark.usefixtures("unpickled")
def test_one_rank_may_be_refused_alone() -> None:
    """It has sent nothing, so the others are where they were."""
    if mpisign.rank() == 0:
        with pytest.raises(mpisign.OptionError):
            mpisign.allgather_object(1)
    mpisign.barrier()


def test_the_library_itself_needs_no_pickles(folder: Path, unpickled: None) -> None:
    torch.manual_seed(mpisign.rank())
    unlike = torch.nn.Linear(1, 1)
    model = torch.nn.Sequential(torch.nn.Linear(6, 3), torch.nn.BatchNorm1d(3))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1 * (1 + mpisign.rank()), momentum=0.9)
    optimizer = mpisign.DistributedSignOptimizer(sgd, model.named_parameters())
    mpisign.broadcast_parameters(model.state_dict())
    mpisign.broadcast_optimizer_state(optimizer)
    for _ in range(2 + mpisign.rank()):
        optimizer.zero_grad()
        model(torch.randn(8, 6)).square().sum().backward()
        optimizer.step()
    optimizer.join()
    mpisign.check_consistency(model, optimizer, buffers=False)
    weight = model[0].weight.detach().clone()

    mpisign.checkpoint.save(folder, model=model, optimizer=optimizer, step=7, extra={"epoch": 3})
    mpisign.checkpoint.save(folder, model=model, optimizer=optimizer, step=8, asynchronous=True)
    mpisign.checkpoint.wait()
    with torch.no_grad():
        model[0].weight.zero_()
    resumed = mpisign.checkpoint.load(folder, model=model, optimizer=optimizer)
    assert resumed.step == 8
    assert torch.equal(model[0].weight, weight)
    assert mpisign.checkpoint.newest(folder) == resumed.path

    if mpisign.size() > 1:
        with pytest.raises(mpisign.ConsistencyError, match=r"ranks \[1.*\] differ .* 'weight' \(1, 1\)"):
            mpisign.check_consistency(unlike)
    findings = doctor.examine()
    assert not [finding for finding in findings if finding.status == doctor.FAIL]
    mpisign.timeline(folder / "trace.json")
    assert (folder / "trace.json").exists()


@pytest.mark.mpi(min_size=2)
def test_ranks_that_differ_are_refused_and_may_try_again(comm: MPI.Comm) -> None:
    mpisign.shutdown()
    odd = comm.size - 1
    with pytest.raises(
        mpisign.ConsistencyError,
        match=rf"ranks \[{odd}\] have called init\(pickle=False\) and the others init\(pickle=True\) \(this is rank "
        rf"{comm.rank}\)",
    ):
        mpisign.init(pickle=comm.rank != odd)
    assert not mpisign.is_initialized()
    mpisign.init(pickle=False)
    mpisign.barrier()
    mpisign.shutdown()
    mpisign.init()
    assert mpisign.allgather_object(comm.rank) == list(range(comm.size))
