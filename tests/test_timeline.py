"""mpisign.timeline: clocks, what another rank may send, and the file that a job leaves."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from mpirun import mpirun

import mpisign
from mpisign import encoding
from mpisign.timeline import _aligned, _events
from mpisign.trace import Span

SECOND = 10**9
FAR = 3 * 365 * 86400 * SECOND  # a clock may have begun years ago


def at(begin: int, duration: int = 5) -> Span:
    return Span("barrier()", -1, -1, begin, begin + duration)


@pytest.mark.parametrize("begun", [0, FAR])
@pytest.mark.parametrize("ahead", [0, -17, FAR])
def test_between_two_comparisons_drift_is_a_straight_line(begun: int, ahead: int) -> None:
    clocks = [(begun, ahead), (begun + 10 * SECOND, ahead + 1000), (begun + 20 * SECOND, ahead - 500)]
    seconds_and_shifts = [(0, 0), (5, 500), (10, 1000), (14, 400), (20, -500)]
    outside = [(-3, 0), (25, -500)]  # where nothing else is known
    for seconds, shift in seconds_and_shifts + outside:
        begin = begun + seconds * SECOND
        row = _aligned([at(begin)], ["barrier()"], clocks)[0].tolist()
        assert row == [0, -1, -1, begin + ahead + shift, begin + ahead + shift + 5]


def test_rows_of_several_spans_and_of_none() -> None:
    names = ["pack", "barrier()"]
    spans = [Span("pack", 3, 1, 100, 200), at(300)]
    assert _aligned(spans, names, [(0, 7)]).tolist() == [[0, 3, 1, 107, 207], [1, -1, -1, 307, 312]]
    assert _aligned([], [], [(0, 7)]).shape == (0, 5)


@pytest.mark.parametrize(
    ("names", "table"),
    [
        (b"no json", b""),
        (encoding.encode([1]), b""),
        (encoding.encode(["pack"]), bytes(39)),
        (encoding.encode(["pack"]), np.array([1, 0, 0, 0, 0]).tobytes()),
        (encoding.encode(["pack"]), np.array([-1, 0, 0, 0, 0]).tobytes()),
    ],
    ids=["no names", "numbers", "part of a row", "no such name", "a negative one"],
)
def test_what_another_rank_sends_is_checked(names: bytes, table: bytes) -> None:
    with pytest.raises(mpisign.MpisignError, match="rank 2 has sent"):
        list(_events(2, names, table))


@pytest.mark.long
@pytest.mark.parametrize("end", ["mpisign.shutdown()", ""], ids=["shutdown", "end"])
def test_the_variable_leaves_a_trace_of_the_whole_job(tmp_path: Path, end: str) -> None:
    path = tmp_path / "trace.json"
    script = f"import mpisign; mpisign.init(); mpisign.barrier(); {end}"
    result = mpirun(2, "-c", script, env={"MPISIGN_TIMELINE": str(path)})
    assert result.returncode == 0, result.text
    spans = [event for event in json.loads(path.read_text())["traceEvents"] if event["ph"] == "X"]
    for rank in range(2):
        assert {"init()", "barrier()", "exit"} <= {span["name"] for span in spans if span["pid"] == rank}


def test_a_trace_that_cannot_be_written_does_not_fail_the_job(tmp_path: Path) -> None:
    path = tmp_path / "no folder" / "trace.json"
    result = mpirun(2, "-c", "import mpisign; mpisign.init()", env={"MPISIGN_TIMELINE": str(path)})
    assert result.returncode == 0, result.text
    assert result.text.count("rank 0 cannot write it: FileNotFoundError: ") == 2, "each rank logs it"
    assert result.text.count("is no folder that rank 0 may write to") == 1, "and rank 0 before"
