"""A SLURM of its own on this machine: munge, slurmctld and a slurmd for each node, all below one folder."""

from __future__ import annotations

import contextlib
import getpass
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mpirun import environment, forget, patient, wait_until

SLURM = Path(__file__).parents[2] / "slurm"
SMALL = Path(__file__).with_name("train_small.py")

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun")
CGROUPS = Path("/sys/fs/cgroup")
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}
SEARCH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"

CONFIGURATION = """\
ClusterName=mpisign
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# A requeued job waits until its credential has expired, by default for two minutes.
AuthInfo=socket={root}/munge.socket,cred_expire=12
StateSaveLocation={root}/state
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/%n.pid
SlurmdSpoolDir={root}/spool-%n
# PMIx has its sockets there; nodes that share the machine must not share them.
TmpFS={root}/tmp-%n
ProctrackType=proctrack/{proctrack}
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
KillWait=5
MinJobAge=3600
"""


def missing() -> str:
    """What SLURM lacks on this machine; empty if nothing."""
    return " ".join(program for program in PROGRAMS if shutil.which(program, path=SEARCH) is None)


class Cluster:
    """SLURM with nodes of two CPUs each. A context: leaving it ends every process and removes every trace."""

    def __init__(self, nodes: int, plugins: Path | None = None) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="mpisign-slurm-", dir="/tmp"))  # short: sockets are in it
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        # Nothing of a job in which these tests may run, or of somebody's settings.
        theirs = re.compile("SLURM|SBATCH_|SALLOC_|MPISIGN_")
        self._environment = {name: value for name, value in environment().items() if not theirs.match(name)}
        self._environment |= {"PATH": SEARCH, "SLURM_CONF": str(self.root / "slurm.conf")}
        # Ranks share this machine's few cores: they take turns, and none is bound.
        self._environment |= {"OMPI_MCA_mpi_yield_when_idle": "1", "MPISIGN_BIND": "none"}
        # An mpirun that is killed leaves a folder there, which would stop a later one of the same process number.
        self._environment["TMPDIR"] = str(self.root / "tmp")
        controller, *ports = free_ports(1 + nodes)
        self.nodes = [f"p{controller}n{i}" for i in range(nodes)]  # names of cgroups, too: no other cluster has them
        self._configure(controller, ports, plugins)

    def _configure(self, controller: int, ports: Sequence[int], plugins: Path | None) -> None:
        host, user = socket.gethostname(), getpass.getuser()
        # Without cgroups a process that leaves its session outlives its job.
        proctrack = "cgroup" if os.access(CGROUPS / "freezer", os.W_OK) else "linuxproc"
        lines = [CONFIGURATION.format(host=host, port=controller, user=user, root=self.root, proctrack=proctrack)]
        if plugins:
            lines.append(f"PluginDir={plugins}\n")
        for node, port in zip(self.nodes, ports, strict=True):
            lines.append(f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=1000\n")
        names = ",".join(self.nodes)
        lines.append(f"PartitionName=main Nodes={names} Default=YES PriorityTier=1 GraceTime=60\n")
        lines.append(f"PartitionName=urgent Nodes={names} PriorityTier=2\n")
        (self.root / "slurm.conf").write_text("".join(lines))
        (self.root / "cgroup.conf").write_text("")
        (self.root / "state").mkdir()
        (self.root / "tmp").mkdir()
        (self.root / "munge").mkdir(mode=0o700)
        key = self.root / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)

    def __enter__(self) -> Cluster:
        try:
            files = [f"--{name}={self.root}/munge/{name}" for name in ("pid-file", "log-file", "seed-file")]
            self._start("munged", "--foreground", "--force", f"--key-file={self.root}/munge/key", *files,
                        f"--socket={self.root}/munge.socket")  # fmt: skip
            wait_until((self.root / "munge.socket").exists, 60.0)
            self._start("slurmctld", "-D")
            for node in self.nodes:
                self.start_node(node)
            self.wait_for_nodes()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(subprocess.SubprocessError):  # slurmctld may not be there, if it did not start
            self.run("scancel", "--state=RUNNING", "--state=PENDING", f"--user={getpass.getuser()}")
            wait_until(lambda: not self.run("squeue", "-h"), 10.0)
        for name in reversed(self._daemons):  # munge last: the others need it to end
            self._stop(name)
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not self.processes(), 5.0)
        for node in self.nodes:
            with contextlib.suppress(OSError):  # others' come and go meanwhile
                for folder in CGROUPS.glob(f"*/*slurm_{node}"):
                    remove_cgroup(folder)
        shutil.rmtree(self.root, ignore_errors=True)

    def _stop(self, name: str) -> None:
        daemon = self._daemons[name]
        daemon.terminate()
        try:
            daemon.wait(10.0)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()

    def _start(self, program: str, *options: str) -> None:
        name = options[-1] if program == "slurmd" else program
        with open(self.root / f"{name}.log", "ab") as log:
            self._daemons[name] = subprocess.Popen(
                [program, *options], env=self._environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip

    # ------------------------------------------------------------------------------------------------- nodes

    def start_node(self, node: str) -> None:
        """Start its slurmd; as after a boot, it has nothing on its disk."""
        for kind in ("tmp", "spool"):  # PMIx starts no task where it finds the socket of one that crashed
            shutil.rmtree(self.root / f"{kind}-{node}", ignore_errors=True)
            (self.root / f"{kind}-{node}").mkdir()
        self._start("slurmd", "-D", "-N", node)

    def wait_for_nodes(self) -> None:
        """Wait until every node is ready for jobs."""
        wait_until(lambda: self._ready() == len(self.nodes), patient(120.0))
        assert self._ready() == len(self.nodes), self.run("sinfo", "-N", "-l") + self.logs()

    def _ready(self) -> int:
        with contextlib.suppress(subprocess.CalledProcessError):  # slurmctld is not yet there
            return self.run("sinfo", "-h", "-N", "-p", "main", "-t", "idle,mix", "-o", "%N").count("\n")
        return 0

    def crash(self, node: str, *, noticed: bool = True) -> None:
        """As if somebody had pulled the plug: its slurmd and everything that it has started are gone at once."""
        daemon = self._daemons.pop(node)
        daemon.kill()
        daemon.wait()
        self.kill_on(node)
        if noticed:
            self.mark_down(node)

    def mark_down(self, node: str) -> None:
        """As a health check would; SLURM itself notices after SlurmdTimeout."""
        self.run("scontrol", "update", f"nodename={node}", "state=down", "reason=crashed")

    def kill_on(self, node: str, program: str = "") -> None:
        """Kill what SLURM runs on a node, or only the processes of one program."""
        for pid in sorted(self.processes(), reverse=True):  # srun has a child that cancels its step when it dies
            here = f"SLURMD_NODENAME={node}\0" in read(pid, "environ") or f"slurm_{node}/" in read(pid, "cgroup")
            if here and program in read(pid, "comm"):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                forget(pid, within=self.root / "tmp")

    # ------------------------------------------------------------------------------------------------- jobs

    def run(self, *command: str | Path, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> str:
        """Run a command of SLURM's and return what it prints. Raises CalledProcessError."""
        done = subprocess.run(
            [str(word) for word in command], env=self._environment | (env or {}), cwd=cwd, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
        return done.stdout

    def ask(self, *command: str | Path) -> str:
        """Run a command that changes nothing; again, where slurmctld is too busy to answer."""
        for _ in range(2):
            with contextlib.suppress(subprocess.SubprocessError):
                return self.run(*command)
            time.sleep(1.0)
        return self.run(*command)

    def submit(self, folder: Path, *command: str | Path, **variables: str | Path) -> Job:
        """``sbatch command...`` in ``folder``, with these variables besides the usual environment."""
        text = self.run("sbatch", "--parsable", *command, cwd=folder, env={k: str(v) for k, v in variables.items()})
        return Job(self, int(text), folder)

    def processes(self, job: int | None = None) -> list[int]:
        """Every process of a job that lives; without one: of any job, and all that SLURM runs for it."""
        ours = f"SLURM_CONF={self.root}/slurm.conf"
        wanted = {ours} if job is None else {ours, f"SLURM_JOB_ID={job}"}
        daemons = {daemon.pid for daemon in self._daemons.values()}
        found = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
        return [pid for pid in found if pid not in daemons and wanted <= set(read(pid, "environ").split("\0"))]

    def logs(self) -> str:
        return "".join(f"\n--- {path.name}\n{path.read_text()}" for path in sorted(self.root.glob("*.log")))


class Job:
    """A job in the queue."""

    def __init__(self, cluster: Cluster, number: int, folder: Path) -> None:
        self.cluster, self.number, self.folder = cluster, number, folder

    def text(self) -> str:
        """What it has written into the folder it was submitted from."""
        names = f"*-{self.number}.out", f"*-{self.number}_*.out"
        return "".join(path.read_text() for name in names for path in sorted(self.folder.glob(name)))

    def shown(self, field: str) -> list[str]:
        """A field of ``scontrol show job``, for each task of an array."""
        return re.findall(rf"\b{field}=(\S+)", self.cluster.ask("scontrol", "show", "job", "-o", str(self.number)))

    def wait_for(self, text: str, timeout: float = 60.0) -> None:
        """Wait until it has written ``text``."""
        wait_until(lambda: text in self.text() or self.ended(), patient(timeout))
        assert text in self.text(), f"{self.shown('JobState')}, and not {text!r} in:\n{self.text()}"

    def ended(self) -> bool:
        return set(self.shown("JobState")) <= ENDED

    def warn(self, task: str = "") -> None:
        """The signal that SLURM sends to the batch script before the job's time is up; ``task``: only to ``_0``."""
        self.cluster.run("scancel", "--batch", "--signal=USR1", f"{self.number}{task}")

    def cancel(self) -> None:
        with contextlib.suppress(subprocess.CalledProcessError):  # it may have ended
            self.cluster.run("scancel", str(self.number))

    def wait(self, state: str = "COMPLETED", timeout: float = 120.0) -> str:
        """Wait until it, and each task of an array, has ended like this; returns what it has written."""
        wait_until(self.ended, patient(timeout))
        assert set(self.shown("JobState")) == {state}, f"{self.shown('JobState')}:\n{self.text()}"
        return self.text()


Submit = Callable[..., Job]


def on(nodes: int) -> tuple[str, ...]:
    """Options of sbatch: so many nodes, and a rank on each."""
    return f"--nodes={nodes}", "--ntasks-per-node=1", "--cpus-per-task=1"


def free_ports(count: int) -> list[int]:
    """Below those that the system gives to whoever asks for any."""
    found: list[int] = []
    for port in random.SystemRandom().sample(range(20_000, 32_000), 1_000):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            found.append(port)
        if len(found) == count:
            return found
    raise OSError(f"no {count} ports are free from 20000 to 32000")


def read(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes().decode(errors="replace")
    except OSError:  # it has ended since, or is not ours
        return ""


def remove_cgroup(folder: Path) -> None:
    for inner in [path for path in folder.iterdir() if path.is_dir()]:
        remove_cgroup(inner)
    with contextlib.suppress(OSError):  # a dying process keeps it a moment longer
        folder.rmdir()
