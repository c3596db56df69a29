"""Whose a directory of checkpoints is: of one job at a time, as each removes what others have left unfinished.

Rank 0 writes who it is into ``owner.json`` before its job first saves there, touches it every half minute, and removes
it when the job ends. The file is made by a link, and taken away by a rename: each succeeds for one of several jobs,
also over NFS. Times are the file system's own; the hosts' clocks may be wrong.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import platform
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from mpisign.checkpoint.files import read_json, write_json
from mpisign.encoding import fits, printable
from mpisign.errors import CheckpointError

__all__ = ["OWNER", "Owner", "check", "claim", "me", "release_all"]

OWNER = "owner.json"
HEARTBEAT_SECONDS = 30.0
SILENT_SECONDS = 300.0  # after which an owner on another host is gone
TRIES = 5
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)  # of a file system that has none

logger = logging.getLogger(__name__)

_held: dict[Path, Owner] = {}  # by directory, this process's claims
_let_go = threading.Event()


@dataclass(frozen=True)
class Owner:
    """A job, by its rank 0.

    Attributes:
        token: of the job, a random number.
        host: its name, for messages.
        machine: which boot of which machine, and which of its spaces of process numbers, where Linux tells.
        pid, started: the process, and when it was started, so that a later one with its number is another.
        slurm: cluster and number of the SLURM job, or "". A requeued job keeps its number.
    """

    token: str
    host: str
    machine: str
    pid: int
    started: str
    slurm: str

    def __str__(self) -> str:
        job = f", SLURM job {self.slurm.rpartition(' ')[2]}" if self.slurm else ""
        return printable(f"process {self.pid} on {self.host}{job}")


SCHEMA = {"token": str, "host": str, "machine": str, "pid": int, "started": str, "slurm": str}


def me(token: str, environ: Mapping[str, str] = os.environ) -> Owner:
    """This process, in the job that ``token`` names."""
    machine = platform.node()
    with contextlib.suppress(OSError):  # not on Linux
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        machine = f"{boot} {os.readlink('/proc/self/ns/pid')}"
    job = environ.get("SLURM_JOB_ID", "")
    slurm = f"{environ.get('SLURM_CLUSTER_NAME', '')} {job}" if job else ""
    return Owner(token, platform.node(), machine, os.getpid(), _started(os.getpid()), slurm)


def claim(directory: Path, mine: Owner) -> None:
    """Make the directory this job's, unless it is another's that runs.

    Raises:
        CheckpointError: it is; names the job and its host.
        OSError: the file system fails.
    """
    path = directory / OWNER
    for _ in range(TRIES):
        found = _read(path)
        if found == mine or (found is None and _made(path, mine)):
            _hold(directory, mine)
            return
        if found is None:
            continue  # another job was faster
        if found.token == mine.token:  # of this job, whose rank 0 was another
            write_json(path, asdict(mine))
            continue
        sign = _sign_of_life(path, found, mine)
        if sign:
            raise CheckpointError(
                f"{directory} is the directory of another job, {found}, {sign}: two jobs would remove each other's "
                f"checkpoints. Give each a directory of its own; if that job has ended, remove {path}"
            )
        logger.info("%s was left by a job that has ended, %s", directory, found)
        _take_away(path, found, mine)
    raise CheckpointError(f"{directory}: other jobs come and go in {path}: give each job a directory of its own")


def check(directory: Path, token: str) -> None:
    """Raise CheckpointError if another job has taken the directory over since :func:`claim`."""
    found = _read(directory / OWNER)
    if found is None:
        claim(directory, me(token))
    elif found.token != token:
        raise CheckpointError(
            f"{directory} has been taken over by another job, {found}, as this one had given no sign of life for "
            f"long, or {OWNER} was removed: give each job a directory of its own"
        )


def release_all() -> None:
    """Leave all directories that this process has claimed."""
    _let_go.set()
    for directory, mine in _held.items():
        with contextlib.suppress(OSError, CheckpointError):
            if _read(directory / OWNER) == mine:
                (directory / OWNER).unlink()
    _held.clear()


def _read(path: Path) -> Owner | None:
    """Whose the directory is; None if it is nobody's. Raises OSError.

    What cannot be read stands for a job of which nothing is known but when the file was last touched.
    """
    try:
        content = read_json(path)
    except FileNotFoundError:
        return None
    except ValueError:
        content = {}
    return Owner(**content) if fits(content, SCHEMA) else Owner("", "an unknown host", "", 0, "", "")


def _made(path: Path, mine: Owner) -> bool:
    """Whether a new file could be made: of several who try, one can."""
    own = path.with_name(f"{OWNER}.{mine.token}.tmp")
    write_json(own, asdict(mine))
    try:
        os.link(own, path)
    except FileExistsError:
        return os.stat(own).st_nlink == 2  # over NFS it may have succeeded, and been tried again
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            return False
        own.replace(path)
    finally:
        own.unlink(missing_ok=True)
    return True


def _take_away(path: Path, found: Owner, mine: Owner) -> None:
    """Remove the file of a job that is gone; if it is another's by now, put it back."""
    taken = path.with_name(f"{OWNER}.{mine.token}.gone")
    try:
        path.rename(taken)
        if _read(taken) != found:
            os.link(taken, path)
    except (FileNotFoundError, FileExistsError):
        pass
    finally:
        taken.unlink(missing_ok=True)


def _sign_of_life(path: Path, found: Owner, mine: Owner) -> str:
    """How it is known that another job still runs; "" if it does not."""
    if found.machine and found.machine == mine.machine:
        same = (found.pid, found.started) == (mine.pid, mine.started)  # an earlier job of this process
        return "" if same or _started(found.pid) != found.started else "which runs"
    if found.slurm and found.slurm == mine.slurm:
        return ""  # it was requeued, or has started its ranks anew
    beside = path.with_name(f"{OWNER}.{mine.token}.tmp")
    try:
        beside.touch()
        os.utime(beside)  # without a time: the server's
        silent = os.stat(beside).st_mtime - os.stat(path).st_mtime
    except FileNotFoundError:
        return ""
    finally:
        beside.unlink(missing_ok=True)
    if silent > SILENT_SECONDS:
        return ""
    return f"which gave a sign of life {max(0.0, silent):.0f} s ago (after {SILENT_SECONDS:.0f} s it counts as ended)"


def _started(pid: int) -> str:
    """When a process was started, by its machine's clock; "" if there is none such."""
    if not Path("/proc/self/stat").exists():
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return ""
        return "at some time"
    try:
        # The name, in parentheses, may hold anything; the state follows it, and after 18 more the time.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def _hold(directory: Path, mine: Owner) -> None:
    global _let_go
    if not _held:
        _let_go = threading.Event()
        threading.Thread(target=_beat, args=(_let_go,), name="mpisign owner", daemon=True).start()
    _held[directory] = mine


def _beat(let_go: threading.Event) -> None:
    """Touch what this process holds, until it lets go."""
    while not let_go.wait(HEARTBEAT_SECONDS):
        for directory, mine in list(_held.items()):
            with contextlib.suppress(OSError):
                if _read(directory / OWNER) == mine:
                    os.utime(directory / OWNER)
