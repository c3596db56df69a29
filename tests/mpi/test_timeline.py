"""mpisign.timeline on real ranks: one file of all ranks' spans, on one clock."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

import mpisign
from mpisign import talk, trace
from mpisign.session import current
from mpisign.timeline import RECORDED, VARIABLE
from mpisign.trace import CAPACITY, OTHER, PHASE_OF, PHASES

if TYPE_CHECKING:
    from mpi4py import MPI

pytestmark = pytest.mark.mpi

ROWS = [*PHASES, OTHER]


@pytest.fixture
def path(comm: MPI.Comm, tmp_path: Path) -> Path:
    """The same on all ranks."""
    shared: Path = comm.bcast(tmp_path / "trace.json")
    return shared


def written(path: Path, comm: MPI.Comm) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What says how rows are called, and the spans; and nothing else is there."""
    comm.Barrier()
    events = json.loads(path.read_text())["traceEvents"]
    beside = list(path.parent.iterdir())
    comm.Barrier()
    assert beside == [path]
    kinds = {kind: [event for event in events if event["ph"] == kind] for kind in "MX"}
    assert sum(map(len, kinds.values())) == len(events)
    return kinds["M"], kinds["X"]


def within(inner: dict[str, Any], outer: dict[str, Any]) -> bool:
    """Whether a span lies inside another."""
    begin = outer["ts"] - 1e-3  # microseconds, as they are rounded
    return bool(begin <= inner["ts"] and inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"] + 1e-3)


def train(exchange: str, steps: int, comm: MPI.Comm) -> mpisign.DistributedSignOptimizer:
    """Two buckets a step."""
    tensors = [torch.nn.Parameter(torch.zeros(n)) for n in (10_000, 20_000)]
    sgd = torch.optim.SGD(tensors, lr=1.0)
    method = mpisign.signsgd()
    optimizer = mpisign.DistributedSignOptimizer(sgd, method=method, exchange=exchange, bucket_cap_mb=0.001)
    for _ in range(steps):
        for tensor in tensors:
            tensor.grad = torch.full_like(tensor, 1.0 + comm.rank)
        optimizer.step()
    assert len(optimizer.report.exchange) == 2
    return optimizer


@pytest.mark.parametrize("exchange", ["allgather", "two_phase"])
def test_a_row_for_each_rank_and_phase(comm: MPI.Comm, path: Path, exchange: str) -> None:
    optimizer = train(exchange, 3, comm)
    mpisign.barrier()
    mpisign.timeline(path)
    names, spans = written(path, comm)

    called = {(e["pid"], e["name"], e.get("tid")): e["args"] for e in names}
    for rank in range(comm.size):
        assert called[rank, "process_name", None] == {"name": f"rank {rank}"}
        assert [called[rank, "thread_name", row]["name"] for row in range(len(ROWS))] == ROWS
    assert {e["pid"] for e in spans} == set(range(comm.size))

    for rank in range(comm.size):
        of_rank = [e for e in spans if e["pid"] == rank]
        assert all(ROWS[e["tid"]] == PHASE_OF.get(e["name"], OTHER) for e in of_rank)
        assert {"init()", "barrier()"} <= {e["name"] for e in of_rank if ROWS[e["tid"]] == OTHER}
        once = ["handshake", "count of ties"]
        twice = [
            "pack",
            "send",
            "header",
            "phase 1",
            "decide",
            "unpack",
            *(["phase 2"] if exchange == "two_phase" else []),
        ]
        for step in range(3):
            steps = [(e["name"], e["args"].get("bucket")) for e in of_rank if e["args"].get("step") == step]
            for name in once:
                assert (name, None) in steps
            for name in twice:
                assert {(name, 0), (name, 1)} <= set(steps)
        assert all("step" not in e["args"] for e in of_rank if ROWS[e["tid"]] == OTHER)
    if comm.rank == 0:
        last = [e for e in spans if e["pid"] == 0 and e["args"].get("step") == 2]
        for phase, seconds in optimizer.report.seconds.items():
            mine = [e for e in last if ROWS[e["tid"]] == phase]
            inner = [f for e in mine for f in last if f["tid"] != e["tid"] and within(f, e)]
            total = sum(e["dur"] for e in mine) - sum(f["dur"] for f in inner)
            assert total * 1e-6 == pytest.approx(seconds, abs=1e-6), "a report is read from the same spans"


def test_the_spans_of_a_step_follow_each_other(comm: MPI.Comm, path: Path) -> None:
    train("two_phase", 4, comm)
    mpisign.timeline(path)
    _, spans = written(path, comm)
    for rank in range(comm.size):
        steps = [e for e in spans if e["pid"] == rank and "step" in e["args"]]
        assert all(e["dur"] >= 0 for e in steps)
        for before, after in pairwise(steps):
            assert before["args"]["step"] <= after["args"]["step"]
            follows = before["ts"] + before["dur"] <= after["ts"] + 0.01  # microseconds
            assert follows or within(before, after) or within(after, before)
        order = [e["name"] for e in steps if e["args"]["step"] == 3]
        firsts = ["handshake", "pack", "send", "header", "phase 1", "decide", "phase 2", "unpack"]
        assert sorted(firsts, key=order.index) == firsts
        assert order[-1] == "count of ties"


@pytest.fixture(params=[1, talk.CLOCK_TRIES], ids=["once", "often"])
def odd_clock(request: pytest.FixtureRequest, comm: MPI.Comm, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every rank's clock has begun at another time, earlier or later, and runs at another speed."""
    real, begun = time.perf_counter_ns, time.perf_counter_ns()
    mpisign.shutdown()

    def clock() -> int:
        return real() + (real() - begun) * 2 * comm.rank + (1 - 2 * (comm.rank % 2)) * comm.rank * 10**15

    monkeypatch.setattr(talk, "CLOCK_TRIES", request.param)
    for module in (talk, trace):
        monkeypatch.setattr(module, "perf_counter_ns", clock)
    mpisign.init()
    yield
    mpisign.shutdown()
    monkeypatch.undo()
    mpisign.init()


@pytest.mark.long
@pytest.mark.usefixtures("odd_clock")
def test_clocks_are_aligned_although_they_drift(comm: MPI.Comm, path: Path) -> None:
    """Nobody leaves a barrier before all have come, so the spans of all ranks overlap: on one clock alone."""

    def apart() -> float:
        """By how many microseconds, at most, one seems to have come after another has left."""
        for at in range(6):
            time.sleep(0.3 if at % comm.size == comm.rank else 0.1)
            mpisign.barrier()
            if at == 3:
                mpisign.timeline(path)  # clocks are compared, and drift in another way to here than from here
        mpisign.timeline(path)
        _, spans = written(path, comm)
        barriers = [[e for e in spans if e["pid"] == rank and e["name"] == "barrier()"] for rank in range(comm.size)]
        assert {len(of_rank) % 6 for of_rank in barriers} == {0}
        latest = [of_rank[-6:] for of_rank in barriers]
        each = zip(*latest, strict=True)
        return float(max(max(e["ts"] for e in its) - min(e["ts"] + e["dur"] for e in its) for its in each))

    # Clocks are seconds apart by now; where others compute, a comparison may be off by as long as an answer took.
    assert any(apart() <= 500_000.0 for _ in range(3))


# ------------------------------------------------------------------------------------------- the variable


def again(monkeypatch: pytest.MonkeyPatch, variable: Path | str | None) -> None:
    """Leave the job and join it with the variable so on this rank."""
    mpisign.shutdown()
    if variable is None:
        monkeypatch.delenv(VARIABLE, raising=False)
    else:
        monkeypatch.setenv(VARIABLE, str(variable))
    mpisign.init()
    monkeypatch.delenv(VARIABLE, raising=False)  # later jobs are without


def test_the_variable_of_rank_0_writes_it_at_shutdown(
    comm: MPI.Comm, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again(monkeypatch, path if comm.rank == 0 else None)
    assert current().tracer.capacity == RECORDED, "on every rank"
    mpisign.barrier()
    assert not path.exists()
    mpisign.shutdown()
    _, spans = written(path, comm)
    assert {(e["pid"], e["name"]) for e in spans} >= {(rank, "barrier()") for rank in range(comm.size)}


@pytest.mark.mpi(min_size=2)
def test_the_variable_of_another_rank_does_nothing(comm: MPI.Comm, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    again(monkeypatch, path if comm.rank == comm.size - 1 else None)
    assert current().tracer.capacity == CAPACITY
    mpisign.barrier()
    mpisign.shutdown()
    comm.Barrier()
    assert list(path.parent.iterdir()) == []


# ------------------------------------------------------------------------------------------- files


def unwritable(kind: str, path: Path) -> Path | str:
    """A path of which the system, or Python, says that it is none for a file."""
    if kind == "no folder":
        return path / "trace.json"
    if kind == "a folder":
        (path / "trace.json").mkdir(parents=True, exist_ok=True)
        return path / "trace.json"
    return {"nothing": "", "the root": "/", "a zero": "trace\0.json"}[kind]


@pytest.mark.parametrize("kind", ["no folder", "a folder", "nothing", "the root", "a zero"])
def test_a_path_that_cannot_be_written_is_an_error_on_every_rank(comm: MPI.Comm, path: Path, kind: str) -> None:
    with pytest.raises(mpisign.MpisignError, match=r"timeline\(.*\): rank 0 cannot write it: \w+Error: "):
        mpisign.timeline(unwritable(kind, path))
    mpisign.barrier()
    assert not list(path.parent.rglob("*.tmp"))


def test_what_is_no_path_is_refused_on_every_rank() -> None:
    with pytest.raises(TypeError):
        mpisign.timeline(7)  # type: ignore[arg-type]
    mpisign.barrier()


@pytest.mark.parametrize("kind", ["no folder", "a folder"])
def test_such_a_path_in_the_variable_is_told_at_shutdown(
    comm: MPI.Comm, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    """Training is over, and what it has made is worth more than a trace."""
    again(monkeypatch, unwritable(kind, path))
    comm_of_job = current().group.comm
    with caplog.at_level(logging.ERROR, "mpisign"):
        mpisign.shutdown()
    assert [record.levelname for record in caplog.records if record.levelname != "WARNING"] == ["ERROR"]
    assert "rank 0 cannot write it" in caplog.text
    from mpi4py import MPI

    assert comm_of_job == MPI.COMM_NULL, "and all the rest is done"


def test_a_file_is_replaced_whole_or_not_at_all(comm: MPI.Comm, path: Path) -> None:
    mpisign.timeline(path)
    whole, spans = path.open(), len(written(path, comm)[1])
    mpisign.barrier()
    mpisign.timeline(path)
    with whole:
        assert sum(e["ph"] == "X" for e in json.load(whole)["traceEvents"]) == spans, "who reads goes on with the old"
    text = path.read_text()
    assert len(written(path, comm)[1]) > spans
    if comm.rank == 0:
        path.with_name(f"trace.json.{os.getpid()}.tmp").mkdir()  # where the new one would be written
    with pytest.raises(mpisign.MpisignError, match="rank 0 cannot write it"):
        mpisign.timeline(path)
    assert path.read_text() == text


@pytest.mark.mpi(min_size=2)
def test_each_of_several_jobs_has_a_file(comm: MPI.Comm, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mpisign.shutdown()
    monkeypatch.setenv("MPISIGN_TIMELINE", str(path))
    part = comm.Split(comm.rank > 0)
    mpisign.init(part)
    mpisign.shutdown()
    part.Free()
    comm.barrier()
    assert sorted(its.name for its in path.parent.glob("trace*")) == ["trace-0.json", "trace-1.json"]


def test_only_the_latest_spans_are_written(comm: MPI.Comm, path: Path) -> None:
    current().tracer.keep(8)
    for number in range(40):
        with current().tracer.span("pack", number):
            pass
    mpisign.barrier()
    mpisign.timeline(path)
    _, spans = written(path, comm)
    for rank in range(comm.size):
        names = [(e["name"], e["args"].get("bucket")) for e in spans if e["pid"] == rank]
        assert names == [*(("pack", number) for number in range(34, 40)), ("barrier()", None), ("timeline()", None)]
