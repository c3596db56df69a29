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
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from mpisign import heartbeat, places, session
from mpisign.backends import WORD, backend_for
from mpisign.bitmap import native
from mpisign.bitmap.host import words_for
from mpisign.bitmap.kernels import import_cupy
from mpisign.encoding import printable
from mpisign.errors import GradientError, LaunchError, MpisignError
from mpisign.exchange.staging import gpu_aware
from mpisign.launch import find_launcher
from mpisign.methods import signsgd
from mpisign.optimizer import DistributedSignOptimizer
from mpisign.survival import can_survive
from mpisign.vendors import Words, words_of

__all__ = ["FAIL", "OK", "WARN", "Finding", "examine"]

ACT = "the doctor"
OK, WARN, FAIL = "ok", "warn", "FAIL"

NVIDIA = Path("/dev/nvidia0")  # what a driver makes for the first GPU
TRIAL = 30.0  # seconds that a child may take
NARROW = 2  # a rank that is bound to less than one in so many of its share of the cores is worth a warning


@dataclass(frozen=True)
class Finding:
    """One line of the report: ``status`` (ok, warn, FAIL), what was looked at, what was seen, what to type."""

    status: str
    subject: str
    seen: str
    advice: str = ""


def examine() -> list[Finding]:
    """Run every check; what all ranks have found, the same on each. **Collective.**

    Starts MPI, and joins the job if not done yet; if that fails, the findings are this rank's own.

    Raises:
        NotInitializedError: this process is a child of a rank.
    """
    findings = list(_versions())
    try:
        mine = not session.is_initialized()
        if mine:
            session.init(stall_warning=10.0, stall_timeout=60.0)
    except LaunchError as error:
        seen, _, advice = str(error).partition(" What to do: ")
        return [*findings, Finding(FAIL, "MPI", f"{type(error).__name__}: {seen}", advice)]
    checks: list[Callable[[], Iterator[Finding]]]
    checks = [_mpi, _slurm, _ranks, _binding, _ulfm, _arithmetic, _vote, _gpus]
    with session.operation(ACT):
        for check in checks:
            with session.current().telling(ACT):
                findings += check()
        findings = _of_all_ranks(findings)
    if mine:
        session.shutdown()
    return findings


def _of_all_ranks(mine: list[Finding]) -> list[Finding]:
    """Everything that any rank has found, once, with the ranks' numbers where others saw something else."""
    subjects: dict[str, dict[Finding, list[int]]] = {}
    lines = [[it.status, it.subject, it.seen, it.advice] for it in mine]
    for rank, findings in enumerate(session.current().gather_values(lines, [(str, str, str, str)], ACT)):
        for status, *said in findings:
            finding = Finding(status if status in (OK, WARN, FAIL) else FAIL, *map(printable, said))
            subjects.setdefault(finding.subject, {}).setdefault(finding, []).append(rank)
    told = []
    for found in subjects.values():
        everyone = {rank for ranks in found.values() for rank in ranks}
        for finding, ranks in found.items():
            who = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}: "
            told.append(finding if len(ranks) == len(everyone) else replace(finding, seen=who + finding.seen))
    return told


# With these a child would take itself for a rank of this job. Settings of MPI (OMPI_MCA_...) are not among them.
_OF_THIS_JOB = ("PMI", "PRTE_", "OMPI_COMM_", "MV2_COMM_")


def _versions() -> Iterator[Finding]:
    yield Finding(OK, "python", f"{platform.python_version()} ({sys.executable})")
    for package in ("mpisign", "torch", "numpy", "mpi4py"):
        try:
            yield Finding(OK, package, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            if package == "mpisign":
                yield Finding(WARN, package, "runs from source, not installed", "in the checkout: pip install .")
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
        yield Finding(WARN, "launcher", "no mpirun found", _words().install)
    levels = {
        MPI.THREAD_SINGLE: "single",
        MPI.THREAD_FUNNELED: "funneled",
        MPI.THREAD_SERIALIZED: "serialized",
        MPI.THREAD_MULTIPLE: "multiple",
    }
    level = levels.get(MPI.Query_thread(), "unknown")
    if MPI.Query_thread() >= MPI.THREAD_SERIALIZED:
        yield Finding(OK, "thread level", level)
    else:
        advice = "unset MPI4PY_RC_THREADS and MPI4PY_RC_THREAD_LEVEL, or mpi4py.rc.thread_level = 'multiple'"
        yield Finding(WARN, "thread level", f"{level}: only the main thread may call what needs other ranks", advice)


def _words() -> Words:
    from mpi4py import MPI

    return words_of(MPI.get_vendor()[0])


def _slurm() -> Iterator[Finding]:
    """Inside an allocation: which way of starting ranks works."""
    job, launcher = os.environ.get("SLURM_JOB_ID"), find_launcher(os.environ)
    if job is None or session.current().rank > 0:
        return
    if launcher is not None:
        yield Finding(OK, "SLURM", f"job {job}; {launcher.name} works")
        return
    plugin = _words().pmi
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
    here = session.current().group
    yield Finding(OK, "ranks", f"{here.size} on {here.num_nodes} node{'s' if here.num_nodes > 1 else ''}")
    mine = f"Python {platform.python_version()}, torch {torch.__version__}, NumPy {np.__version__}"
    versions = session.current().gather_values(mine, str, ACT)
    if len(set(versions)) > 1:
        yield Finding(
            FAIL, "environments", f"ranks run different versions: {sorted(set(versions))}", "use one environment"
        )


def _binding() -> Iterator[Finding]:
    here = session.current().group
    cores = frozenset(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else frozenset[int]()
    heard = session.current().gather_values([here.node_rank, sorted(cores)], (int, [int]), ACT)
    places = [(node, frozenset(its)) for node, its in heard]
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
            _words().unbind,
        )
    elif threads > 1 and here.local_size * threads > available:
        yield Finding(WARN, "CPU binding", seen, f"export OMP_NUM_THREADS={max(1, available // here.local_size)}")
    elif here.local_size > available:
        yield Finding(WARN, "CPU binding", seen + ": they take turns", _words().yield_cores)
    elif (whole := _cores_of_launcher()) > NARROW * len(cores) * here.local_size:
        seen = f"{here.local_size} ranks here, each bound to {len(cores)} of {whole} cores"
        advice = _words().unbind
        if here.local_size == here.size:
            advice = f"python -m mpisign run -n {here.size} ..., which binds each to its share; or {advice}"
        yield Finding(WARN, "CPU binding", seen, advice)
    else:
        yield Finding(OK, "CPU binding", seen)


def _cores_of_launcher() -> int:
    """Those of the parent, if it is Open MPI's mpirun, which binds each of one or two ranks to a single one; else 0."""
    if (launcher := find_launcher(os.environ)) is None or launcher.variable != "OMPI_COMM_WORLD_SIZE":
        return 0
    try:
        return len(os.sched_getaffinity(os.getppid()))
    except (AttributeError, OSError):  # this system has no binding, or the launcher is another user's
        return 0


def _gpus() -> Iterator[Finding]:
    """This rank's device, the kernels on it, MPI's way to its memory, and if all are well, a vote from there."""
    here = session.current()
    usable = torch.cuda.is_available() and torch.version.hip is None
    having = [rank for rank, has in enumerate(here.gather_values(usable, bool, ACT)) if has]
    if not usable:
        yield _no_gpu()
    device, works = places.device() if usable else torch.device("cpu"), True
    if usable:
        for finding in (_gpu(device), _kernels(device), *([_gpu_aware(device)] if here.rank == having[0] else [])):
            works = works and finding.status == OK
            yield finding
    if having and all(here.gather_values(works, bool, ACT)):
        yield from _vote(device, "a vote from GPUs")


def _gpu(device: torch.device) -> Finding:
    try:
        name = torch.cuda.get_device_name(device)
    except RuntimeError as error:
        return Finding(FAIL, "GPUs", f"{device}: {str(error).splitlines()[0]}", "see that nvidia-smi works")
    return Finding(OK, "GPUs", f"{device}, of {torch.cuda.device_count()} here: {name}")


def _no_gpu() -> Finding:
    torch_is = f"torch {torch.__version__}"
    if torch.version.hip is not None:
        advice = "with GPUs by NVIDIA: install a CUDA build of torch; with others: keep the model on the CPU"
        return Finding(WARN, "GPUs", f"{torch_is} is for ROCm, and the kernels need CUDA", advice)
    if not NVIDIA.exists():
        return Finding(OK, "GPUs", "none; voting runs on the CPU")
    if torch.version.cuda is None:
        advice = "install a CUDA build of torch: https://pytorch.org/get-started"
        return Finding(WARN, "GPUs", f"this node has some ({NVIDIA}), and {torch_is} is built without CUDA", advice)
    advice = "see that nvidia-smi works, that the job was given GPUs, and what CUDA_VISIBLE_DEVICES hides"
    return Finding(WARN, "GPUs", f"this node has some ({NVIDIA}), and {torch_is} can use none", advice)


def _kernels(device: torch.device) -> Finding:
    """Whether CuPy compiles them for this device and they work there."""
    elements = 10_007
    try:
        cupy = import_cupy()
        random = torch.Generator("cpu").manual_seed(0)
        values = torch.randn(elements, dtype=torch.float32, device="cpu", generator=random).to(device)
        words, signs = torch.zeros(words_for(elements), dtype=WORD, device=device), torch.zeros_like(values)
        backend = backend_for(device)
        backend.pack(values, words)
        backend.unpack(words, signs)
        wrong = int((signs != torch.where(values >= 0, 1.0, -1.0)).sum())
    except GradientError as error:
        return Finding(WARN, "GPU kernels", str(error))
    except Exception as error:  # whatever compilers and drivers raise
        advice = "see that nvidia-smi works, and that CuPy is for the CUDA version that torch.version.cuda shows"
        if isinstance(error, OSError):
            advice = "export CUPY_CACHE_DIR=<a folder that can be written to>, where CuPy keeps what it has compiled"
        return Finding(FAIL, "GPU kernels", f"{type(error).__name__}: {error}", advice)
    if wrong:
        return Finding(FAIL, "GPU kernels", f"{wrong} of {elements} signs are wrong", "please report this")
    return Finding(OK, "GPU kernels", f"CuPy {cupy.__version__} compiles them; {elements} signs are right")


_TELL_ONESELF = """
import sys
import torch
from mpi4py import MPI

device = torch.device(sys.argv[1])
if device.type == "cuda":
    torch.cuda.set_device(device)
sent = torch.arange(4096, dtype=torch.int64, device=device)
received = torch.zeros_like(sent)
for collective in (MPI.COMM_SELF.Iallgather, MPI.COMM_SELF.Ialltoall):
    received.zero_()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    collective(sent, received).Wait()
    if not torch.equal(sent, received):
        sys.exit(1)
"""


def _mpi_reads(device: torch.device) -> bool:
    """Whether a step's collectives reach a device's memory: tried in a child, as an MPI that cannot may crash.

    Raises:
        TimeoutExpired: it is not known.
    """
    trial = [sys.executable, "-c", _TELL_ONESELF, str(device)]
    environ = {key: value for key, value in os.environ.items() if not key.startswith(_OF_THIS_JOB)}
    try:
        return subprocess.run(trial, env=environ, capture_output=True, timeout=TRIAL, check=False).returncode == 0
    except OSError:
        return False


def _gpu_aware(device: torch.device) -> Finding:
    wanted, otherwise = gpu_aware(), "bitmaps pass through the host's"
    try:
        works = _mpi_reads(device)
    except subprocess.TimeoutExpired:
        seen = f"the trial timed out after {TRIAL:g} s"
        if not wanted:
            return Finding(OK, "GPU-aware MPI", f"{seen}; {otherwise}")
        advice = "try again (is it the file system that is slow?), or unset MPISIGN_GPU_AWARE_MPI"
        return Finding(WARN, "GPU-aware MPI", seen, advice)
    if works:
        how = "on" if wanted else "works here, and is off; to turn it on: export MPISIGN_GPU_AWARE_MPI=1"
        return Finding(OK, "GPU-aware MPI", how)
    cannot = "this MPI cannot send from GPU memory"
    if not wanted:
        return Finding(OK, "GPU-aware MPI", f"{cannot}; {otherwise}")
    advice = "unset MPISIGN_GPU_AWARE_MPI, or load an MPI module built with CUDA"
    return Finding(FAIL, "GPU-aware MPI", cannot, advice)


def _ulfm() -> Iterator[Finding]:
    from mpi4py import MPI

    here = session.current()
    with here.watchdog.guard("the doctor's copy of a communicator"):
        trial = here.group.comm.Dup()
        try:
            trial.Revoke()  # mpi4py emulates the other calls where the library lacks them, but not this one
            has = True
        except (NotImplementedError, MPI.Exception):
            has = False
        trial.Free()
    if not has:
        yield Finding(OK, "fault tolerance", "no ULFM: a failed rank ends the job")
        return
    on = "it is on in this run, and init(on_failure='continue') outlives ranks"
    if (silence := heartbeat.started_for()) is not None:
        on += f"; init(detect_links={silence}) those that are silent for so long"
    how = on if can_survive() else f"it is off in this run: {_words().survive}"
    yield Finding(OK, "fault tolerance", f"the library has ULFM; {how}")


def _arithmetic() -> Iterator[Finding]:
    """Who packs, counts and applies in the host's memory."""
    absence = native.absence()
    if absence is None:
        yield Finding(OK, "CPU arithmetic", f"C for {native.choose()} (torch.get_num_threads() = {native.threads()})")
        return
    seen = f"NumPy, at about half of C's speed: {absence}"
    if os.environ.get(native.VARIABLE) == "0":
        yield Finding(OK, "CPU arithmetic", seen)
    else:
        advice = "install a C compiler (gcc), then in the checkout: pip install --force-reinstall --no-deps ."
        yield Finding(WARN, "CPU arithmetic", seen, advice)


def _vote(device: str | torch.device = "cpu", subject: str = "a real vote") -> Iterator[Finding]:
    """One real vote over both flat exchanges, checked against plain NumPy on every rank."""
    here = session.current().group
    elements = 10_007
    mine = np.random.default_rng(here.rank).standard_normal(elements).astype(np.float32)
    votes = np.empty((here.size, elements), np.int8)
    with session.current().watchdog.guard("the doctor's vote"):
        here.comm.Allgather(np.sign(mine).astype(np.int8), votes)
    expected = -np.sign(votes.sum(axis=0))
    for exchange in ("allgather", "two_phase"):
        parameter = torch.nn.Parameter(torch.zeros(elements, dtype=torch.float32, device=device))
        parameter.grad = torch.from_numpy(mine).to(device, copy=True)
        optimizer = DistributedSignOptimizer(
            torch.optim.SGD([parameter], lr=1.0), method=signsgd(), ties="zero", exchange=exchange
        )
        seen, status = f"{exchange}: {elements} coordinates on {here.size} ranks agree with NumPy", OK
        try:
            optimizer.step()
            wrong = int((parameter.detach().cpu().numpy() != expected).sum())
            if wrong:
                status, seen = FAIL, f"{exchange}: {wrong} of {elements} coordinates differ from NumPy"
        except MpisignError as error:
            status, seen = FAIL, f"{exchange}: {type(error).__name__}: {error}"
        advice = "please report this, with the lines above" if status == FAIL else ""
        yield Finding(status, subject, seen, advice)
