"""mpisign.heartbeat: who is silent counts as dead, and who only computes does not; see silent.py for what ranks do."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mpi4py import MPI
from mpirun import patient, started, wait_until
from namespaces import needs_namespaces, slow_network

from mpisign import heartbeat, joining
from mpisign.errors import OptionError
from mpisign.links import Links
from mpisign.membership import Membership
from mpisign.vendors import flags_of

HERE = Path(__file__).parent
SILENCE = 8.0  # seconds, on a machine that tests share

needs_ulfm = pytest.mark.skipif(MPI.get_vendor()[0] != "Open MPI", reason="no ULFM")


def options(silence: float = SILENCE) -> tuple[str, ...]:
    flags = flags_of("Open MPI")
    assert flags is not None
    return flags.outlive(silence)


def test_flags_for_so_long_a_silence() -> None:
    flags = flags_of("Open MPI")
    assert flags is not None
    words = " ".join(flags.outlive(6.0))
    assert words.startswith(" ".join(flags.survive))
    assert "mpi_ft_detector 1 --mca mpi_ft_detector_timeout 6 --mca mpi_ft_detector_period 1.2" in words
    assert flags.outlive() == flags.survive


@pytest.mark.parametrize(
    ("seconds", "environ", "said"),
    [
        (5.0, {}, "off in this run: start it with python -m mpisign run --continue-on-failure --detect-links 5s, or"),
        (5.0, {heartbeat.DETECTOR: "0", heartbeat.TIMEOUT: "5"}, "off in this run"),
        (5.0, {heartbeat.DETECTOR: "1", heartbeat.TIMEOUT: "10"}, "started with OMPI_MCA_mpi_ft_detector_timeout='10'"),
        (5.0, {heartbeat.DETECTOR: "1"}, "mpi_ft_detector_timeout=''"),
        (0.0, {heartbeat.DETECTOR: "1", heartbeat.TIMEOUT: "0"}, "detect_links"),
        (float("nan"), {heartbeat.DETECTOR: "1", heartbeat.TIMEOUT: "nan"}, "detect_links"),
    ],
)
def test_runs_that_were_started_otherwise(
    seconds: float, environ: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (heartbeat.DETECTOR, heartbeat.TIMEOUT):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(OptionError, match=re.escape(said)):
        heartbeat.check(seconds)


def test_ranks_that_pass_different_seconds_are_told() -> None:
    codes = [
        joining.coded_options(True, "warn", joining.Failure("continue", ranks, seconds))
        for ranks, seconds in ((2, 4.5), (2, None), (3, 4.5))
    ]
    assert joining.told_options(codes[0], codes[1]) == "detect_links=4.5"
    assert joining.told_options(codes[1], codes[0]) == "detect_links=None"
    assert joining.told_options(codes[2], codes[0]) == "min_ranks=3"


# ------------------------------------------------------------------------------------------- who ends by itself


class Ranks(Membership):
    """Ranks 0 to 3, of which this process is one: two machines of two. The last may be spares."""

    def __init__(self, min_ranks: int, spares: int, left: bool) -> None:
        self._min_ranks, self.said = min_ranks, list[str]()
        self._good: Any = SimpleNamespace(identities=(0, 1, 2, 3)[: 4 - spares * left])
        self.spares: Any = SimpleNamespace(identities=(0, 1, 2, 3)[4 - spares :], is_one_that_waits=False)

    def stop(self, why: str) -> None:  # type: ignore[override]
        self.said.append(why)


@pytest.mark.parametrize(("spares", "left"), [(0, True), (1, True), (1, False)])
@pytest.mark.parametrize(
    ("machine", "min_ranks", "why"),
    [
        ({0, 1}, 1, "that is no majority"),
        ({0, 1}, 4, "that is no majority"),
        ({2, 3}, 2, ""),
        ({2, 3}, 3, "ranks [0, 1] are left, and min_ranks=3"),
        ({2}, 3, ""),
        ({0, 1, 2, 3}, 1, "that is no majority"),
        (set(), 1, ""),
    ],
)
def test_who_may_not_go_on_ends_and_says_why(
    machine: set[int], min_ranks: int, why: str, spares: int, left: bool
) -> None:
    """Of three that train and one spare, too: it counts for ``min_ranks``, before it has left the others and after."""

    class Silent(Links):
        def silent(self, seconds: float) -> set[int]:
            return machine if seconds == 3.0 else set()

    ranks = Ranks(min_ranks, spares, left)
    heartbeat.look(ranks, Silent([], []), 3.0)
    assert len(ranks.said) == bool(why), ranks.said
    assert not why or f"machines of ranks {sorted(machine)} have not answered for 3 s: " in ranks.said[0]
    assert not why or ranks.said[0].endswith(why), ranks.said


def number_of(folder: Path, rank: int) -> int:
    path = folder / f"{rank}.pid"
    wait_until(path.exists, 240.0)  # other tests run beside this one
    return int(path.read_text())


def ended(pid: int) -> Callable[[], bool]:
    def it_has() -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except OSError:
            return True

    return it_has


@pytest.mark.long
@needs_ulfm
def test_who_is_stopped_is_counted_out_and_who_computes_is_not(tmp_path: Path) -> None:
    with started(3, HERE / "silent.py", str(SILENCE), str(tmp_path), options=options()) as job:
        stopped = number_of(tmp_path, 1)
        os.kill(stopped, signal.SIGSTOP)
        job.wait_for("rank 0: goes on after [[1]]", 60.0)
        job.wait_for("rank 2: goes on after [[1]]", 60.0)
        assert job.text().count("all have waited") == 3
        os.kill(stopped, signal.SIGCONT)  # it ends itself, and touches no other
        wait_until(ended(stopped), patient(30.0))
        assert ended(stopped)()
        job.wait(60.0)
        assert job.orphans() == []


@needs_ulfm
@needs_namespaces
@pytest.mark.long
def test_a_cut_link_leaves_the_larger_side(tmp_path: Path) -> None:
    silence = 2 * SILENCE  # the network's processes want cores, too
    words = ["--mpirun", " ".join(options(silence)), "3", "1gbit"]
    job = slow_network(*words, sys.executable, str(HERE / "silent.py"), str(silence), str(tmp_path))
    try:
        lonely = number_of(tmp_path, 2)
        time.sleep(0.5)
        subprocess.run(["ip", "-n", f"mpisign{job.pid}-2", "link", "set", "eth0", "down"], check=True)
        wait_until(ended(lonely), patient(60.0))
        assert ended(lonely)()
        text = job.communicate(timeout=patient(60.0))[0]
    finally:
        job.terminate()
        job.communicate(timeout=60.0)
    assert "rank 0: goes on after [[2]]" in text
    assert "rank 1: goes on after [[2]]" in text
    assert "rank 2: goes on" not in text
    assert "rank 2 stops: the machines of ranks [0, 1] have not answered" in text
