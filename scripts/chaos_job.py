"""A training that scripts/chaos has started: its processes, what its ranks have written so far, and what it leaves."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import chaos_hosts
from chaos_faults import Fault
from chaos_hosts import Hosts

from mpisign.endings import judge, read
from mpisign.exit_words import shell

__all__ = ["HangError", "Job", "Launch", "Outcome", "Record", "Struck"]

Record = dict[str, Any]
"""What a rank has written: ``what`` it is about, when (``at``), and more; see :mod:`chaos_training`."""

POLL_SECONDS = 0.01
LEAVING_SECONDS = 30.0  # for what a launcher leaves behind to be gone
STACKS_SECONDS = 2.0
SHARED_MEMORY = "/dev/shm/"
TORCHS = "torchinductor_"  # a cache that it makes for itself


class HangError(Exception):
    """Something that had to happen has not, for longer than anything may take."""


@dataclass(frozen=True)
class Job:
    """What is trained, and how; as :mod:`chaos_training` reads it."""

    variation: str
    ranks: int
    spares: int
    min_ranks: int
    seeds: list[int]
    epochs: int
    batch_size: int
    save_every: int
    asynchronous: bool
    compute: float
    data: str
    checkpoints: str
    nodes: bool
    hosts: int = 0
    detect_links: float | None = None


@dataclass
class Struck:
    """A fault that has come about.

    Attributes:
        launch: the number of the job's start.
        living: how many ranks there were.
        at: when, by the machine's monotonic clock; of two deaths the first, and ``last`` the other.
        struck: which rank, and what it has done to it; of several the victim first.
        victims: those who have died of it.
    """

    fault: Fault
    launch: int
    living: int
    at: float
    struck: list[int]
    victims: list[int]
    last: float = 0.0


@dataclass
class Outcome:
    """How a launch has gone.

    Attributes:
        code: the exit code of ``python -m mpisign run``.
        records: by rank, what each has written.
        killed: those whom faults have ended.
        hang: what has not happened in time, or "".
        left: processes, and files in shared memory and among the temporary ones, that were left behind.
        text: what was printed.
        codes: by rank, how it has ended; on hosts, whose last words are lost at times.
        kept: the step of the checkpoint from which the next launch has gone on, by which that step has counted.
    """

    number: int
    ranks: int
    min_ranks: int
    began: float
    ended: float
    code: int
    records: dict[int, list[Record]]
    killed: list[int] = field(default_factory=list)
    hang: str = ""
    left: list[str] = field(default_factory=list)
    text: str = ""
    codes: dict[int, int | None] = field(default_factory=dict)
    kept: int = 0


class Launch:
    """One start of a job. Use it as a context: whatever is left of it at the end is killed.

    Args:
        folder: a new one, for all that it writes.
        patience: seconds after which what has not happened is a hang.

    Attributes:
        records: by rank, what has been read so far.
        killed: those whom faults have ended, in that order.
    """

    def __init__(self, job: Job, number: int, folder: Path, patience: float) -> None:
        self.job, self.number, self._folder, self.patience = job, number, folder, patience
        self.records: dict[int, list[Record]] = {rank: [] for rank in range(job.ranks + job.spares)}
        self.killed: list[int] = []
        self.hosts = Hosts(job.hosts, len(self.records)) if job.hosts else None
        self._at_last: Callable[[], None] | None = None  # lets those go on who were counted out
        self._counted_out: list[int] = []
        self._read_to = dict.fromkeys(self.records, 0)
        self._shared: set[str] = set()
        self._temporary, self._exits = folder / "tmp", folder / "exits"
        self._temporary.mkdir(parents=True)
        self._exits.mkdir()
        path = folder / "job.json"
        path.write_text(json.dumps({**vars(job), "folder": str(folder)}))
        self._output = open(folder / "output.txt", "wb")  # noqa: SIM115 - closed in __exit__
        program = [str(Path(__file__).with_name("chaos_training.py")), str(path)]
        if self.hosts is None:
            command = [sys.executable, "-m", "mpisign", "run", "-n", str(len(self.records)), "--bind", "none"]
            links = [] if job.detect_links is None else ["--detect-links", f"{job.detect_links:g}s"]
            command += ["--continue-on-failure", *links, *program]
        else:
            assert job.detect_links is not None
            words = shell(str(self._exits), outlives=True)
            command = chaos_hosts.start(self.hosts, job.detect_links, [*words, sys.executable, *program])
        self.began = time.monotonic()
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            env=_environment(self._temporary, job),
            start_new_session=True,
        )

    def __enter__(self) -> Launch:
        return self

    def __exit__(self, *_: object) -> None:
        if self.runs:
            self.end()  # so that it tidies up
        self._kill_all()
        if self.hosts:
            chaos_hosts.remove(self._process.pid)
        for path in self._shared:
            Path(path).unlink(missing_ok=True)
        self._output.close()

    # ------------------------------------------------------------------------------------------- reading

    @property
    def runs(self) -> bool:
        """Whether the launcher is there."""
        return self._process.poll() is None

    def read(self) -> None:
        """Read what ranks have written since the last time."""
        for rank, records in self.records.items():
            with contextlib.suppress(FileNotFoundError), open(self._folder / f"rank-{rank}.jsonl", "rb") as file:
                file.seek(self._read_to[rank])
                whole = file.read().rpartition(b"\n")[0]
                if whole:
                    self._read_to[rank] += len(whole) + 1
                    records.extend(map(json.loads, whole.split(b"\n")))

    def living(self) -> list[int]:
        """The ranks that no fault has ended, and that have begun to train."""
        return [rank for rank in self.records if rank not in self.killed and self.has(rank, "begin")]

    def waiting(self) -> list[int]:
        """The spares that no fault has ended, and that have not stepped in."""
        return [rank for rank in self.records if rank not in self.killed and not self.has(rank, "begin")]

    def has(self, rank: int, what: str, since: float = 0.0) -> bool:
        """Whether a rank has written of something since then."""
        for record in reversed(self.records[rank]):
            if record["at"] < since:
                return False
            if record["what"] == what:
                return True
        return False

    def epoch(self) -> int:
        """That which some rank has come to."""
        last = (
            next((r["epoch"] for r in reversed(its) if r["what"] in ("begin", "deal")), 0)
            for its in self.records.values()
        )
        return max(last)

    # -------------------------------------------------------------------------------------------- hosts

    def beside(self, rank: int) -> list[int]:
        """The ranks that train on this one's host, it first."""
        return [rank, *(its for its in self.living() if its != rank and self._together(its, rank))]

    def waiting_beside(self, rank: int) -> list[int]:
        """The spares that wait on its host."""
        return [its for its in self.waiting() if self._together(its, rank)]

    def _together(self, one: int, other: int) -> bool:
        return self.hosts is None or self.hosts.of(one) == self.hosts.of(other)

    def hosts_of_the_living(self) -> set[int]:
        """Where ranks train."""
        return self.hosts.among(self.living()) if self.hosts else {0}

    def set_link(self, rank: int, state: str) -> None:
        """Let the link of its host be ``down``, or ``up``."""
        assert self.hosts is not None
        if self.runs:
            chaos_hosts.set_link(self._process.pid, self.hosts.of(rank), state)

    def count_out(self, ranks: list[int], at_last: Callable[[], None]) -> None:
        """These will count as dead; afterwards, do this, and they end."""
        self.killed += ranks
        self._counted_out, self._at_last = ranks, at_last

    def let_them_end(self, later: float) -> None:
        """So many seconds later, let those go on who were counted out, and wait until they have ended."""
        if self._at_last is None:
            return
        self.pause(later)
        self._at_last()
        gone, self._at_last = self._counted_out, None
        self.wait(lambda: not any(map(self._lives, gone)), f"ranks {gone}, which were counted out, do not end")

    # ------------------------------------------------------------------------------------------- waiting

    def wait(self, condition: Callable[[], bool], what: str, seconds: float | None = None) -> bool:
        """Until it holds, which returns True, or the job is over. Raises :class:`HangError`."""
        seconds = self.patience if seconds is None else seconds
        end = time.monotonic() + seconds
        while True:
            over = not self.runs  # before reading: what is written last is read
            self.read()
            if condition():
                return True
            if over:
                return False
            if time.monotonic() > end:
                raise HangError(f"{what}, for {seconds:g} s")
            time.sleep(POLL_SECONDS)

    def pause(self, seconds: float) -> bool:
        """Let it run for so long. Returns whether it still runs."""
        end = time.monotonic() + seconds
        while self.runs and time.monotonic() < end:
            time.sleep(min(POLL_SECONDS, seconds))
        self.read()
        return self.runs

    def wait_for_steps(self, since: float, what: str) -> bool:
        """Until all that live have made a step that has begun since then, or have ended."""

        def back() -> bool:
            return all(self._has_stepped(rank, since, self.killed) or not self._lives(rank) for rank in self.living())

        return self.wait(back, what)

    def _has_stepped(self, rank: int, since: float, lost: list[int]) -> bool:
        missing, taken = {its for its in lost if self.has(its, "begin")}, False
        for record in self.records[rank]:
            if record["what"] == "begin":
                missing &= set(record["members"])
                taken = taken or record["at"] >= since
            elif record["what"] == "change":
                missing -= set(record["lost"])
                taken = taken or record["at"] >= since
            elif record["what"] == "take":
                taken = taken or record["at"] >= since
            elif record["what"] in ("commit", "end") and taken and not missing and record["at"] >= since:
                return True
        return False

    def wait_until_ready(self, seconds: float) -> bool:
        """Until all ranks have made a step; then it is known what they share."""
        ready = self.wait(
            lambda: all(self.has(rank, "commit") for rank in range(self.job.ranks)), "no first step", seconds
        )
        for rank in self.records if ready else ():
            with contextlib.suppress(OSError, StopIteration):
                lines = Path(f"/proc/{self._pid(rank)}/maps").read_text().splitlines()
                paths = (line.partition("/")[2] for line in lines if SHARED_MEMORY in line)
                self._shared |= {f"/{path}" for path in paths if not path.endswith("(deleted)")}
        return ready

    def finish(self, *, hang: str = "") -> Outcome:
        """Wait for its end, as long as ranks make steps, and look for what it leaves. A hang ends it here."""
        while not hang and self.runs:
            now = time.monotonic()
            try:
                self.wait(lambda since=now: self._any_since(since), "nobody makes a step, and the job does not end")  # type: ignore[misc]
            except HangError as error:
                hang = str(error)
        if hang:
            self._ask_for_stacks()
        elif self._at_last:
            self._at_last()
        code = self._process.poll()
        if code is None:
            self._kill_all()
            code = self._process.wait()
        left = self._left() if not hang else []
        self.read()
        codes: dict[int, int | None] = {}
        if self.hosts:
            endings = read(self._exits)
            code, _ = judge(endings, code, outlives=True)
            codes = {rank: ending.code for rank, ending in endings.items()}
        self._output.flush()
        text = (self._folder / "output.txt").read_text(errors="replace")
        return Outcome(
            self.number,
            self.job.ranks,
            self.job.min_ranks,
            self.began,
            time.monotonic(),
            code,
            self.records,
            self.killed,
            hang and f"{hang}\n{self._stacks()}",
            left,
            text,
            codes,
        )

    def end(self) -> None:
        """Let the launcher end it, as a user would."""
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(LEAVING_SECONDS)

    def _any_since(self, since: float) -> bool:
        return any(its and its[-1]["at"] >= since for its in self.records.values())

    # ---------------------------------------------------------------------------------------- processes

    def _pid(self, rank: int) -> int:
        return int(next(record["pid"] for record in self.records[rank] if record["what"] == "here"))

    def _lives(self, rank: int) -> bool:
        try:
            return Path(f"/proc/{self._pid(rank)}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False

    def signal(self, rank: int, number: int) -> None:
        """Send it to a rank, if it is still there."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid(rank), number)

    def kill(self, rank: int) -> float:
        """End a rank by SIGKILL. Returns when."""
        self.killed.append(rank)
        self.signal(rank, signal.SIGKILL)
        return time.monotonic()

    def order(self, rank: int, **order: Any) -> None:
        """Tell a rank to harm itself."""
        path = self._folder / f"rank-{rank}.order"
        new = path.with_suffix(".new")
        new.write_text(json.dumps(order))
        new.replace(path)

    def _processes(self) -> Iterator[tuple[int, str]]:
        """Every process of the job that lives, and its name: they keep their temporary files in its folder."""
        mark = os.fsencode(f"TMPDIR={self._temporary}")
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                name, _, rest = (entry / "stat").read_text().rpartition(")")
                its = mark in (entry / "environ").read_bytes().split(b"\0")
            except OSError:  # it has ended since, or is another user's
                continue
            if its and rest.split()[0] != "Z":
                yield int(entry.name), name.partition("(")[2]

    def _kill_all(self) -> None:
        for process, _ in self._processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self._process.wait()

    def _left(self) -> list[str]:
        end = time.monotonic() + LEAVING_SECONDS
        while (left := self._leftovers()) and time.monotonic() < end:
            time.sleep(0.1)
        return left

    def _leftovers(self) -> list[str]:
        processes = [f"process {process} ({name})" for process, name in self._processes()]
        shared = [path for path in sorted(self._shared) if os.path.exists(path)]
        names = (path.name for path in self._temporary.iterdir())
        temporary = [f"{name} among the temporary files" for name in names if not name.startswith(TORCHS)]
        namespaces = chaos_hosts.left(self._process.pid) if self.hosts else []
        return processes + shared + temporary + namespaces

    def _ask_for_stacks(self) -> None:
        for rank in self.living():
            self.signal(rank, signal.SIGUSR2)
        time.sleep(STACKS_SECONDS)

    def _stacks(self) -> str:
        told = []
        for rank in self.living():
            with contextlib.suppress(OSError):
                told.append(f"rank {rank}: {(self._folder / f'rank-{rank}.stacks').read_text()}")
        return "\n".join(told)


def _environment(temporary: Path, job: Job) -> Mapping[str, str]:
    root = str(Path(__file__).parents[1])
    before = os.environ.get("PYTHONPATH")
    nodes = [rank * 2 // job.ranks % 2 for rank in range(job.ranks + job.spares)]
    return {
        **os.environ,
        "PYTHONPATH": f"{root}:{before}" if before else root,
        "OMP_NUM_THREADS": "1",
        "MPISIGN_CALIBRATE": "0",
        "TMPDIR": str(temporary),
        **({"MPISIGN_NODE_OF": ",".join(map(str, nodes))} if job.nodes and not job.hosts else {}),
    }
