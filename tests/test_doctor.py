"""``python -m mpisign doctor``, run as a user runs it."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from gpu_branch import gpu_branch, needs_compiler
from mpirun import environment, mpirun, patient

from mpisign import doctor
from mpisign.__main__ import main
from mpisign.bitmap import kernels, native


def run_alone(**env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mpisign", "doctor"]
    return subprocess.run(
        command, env=environment(env), capture_output=True, text=True, timeout=patient(60.0), check=False
    )


def test_alone_it_finds_everything_in_place():
    seen = run_alone()
    assert seen.returncode == 0, seen.stdout + seen.stderr
    for subject in ("python", "torch", "mpi4py", "MPI library", "thread level", "GPUs", "fault tolerance"):
        assert subject in seen.stdout
    assert "FAIL" not in seen.stdout


@pytest.mark.long
def test_an_allocation_in_which_srun_does_not_work(tmp_path):
    """tests/slurm has those in which it does."""
    seen = run_alone(SLURM_JOB_ID="7", PATH=str(tmp_path))
    assert seen.returncode == 0, seen.stdout + seen.stderr
    assert re.search(r"warn +SLURM +job 7; srun --mpi=pmix does not work: .*No such file.*'srun'", seen.stdout)
    assert "MPISIGN_LAUNCHER=mpirun" in seen.stdout


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.long)])
def test_under_mpirun_rank_0_reports_a_vote_of_all(ranks: int):
    result = mpirun(ranks, "-m", "mpisign", "doctor")
    assert result.returncode == 0, result.text
    for exchange in ("allgather", "two_phase"):
        assert result.text.count(f"{exchange}: 10007 coordinates on {ranks} ranks agree with NumPy") == 1
    assert f"{ranks} on 1 node" in result.text
    assert f"Open MPI's mpirun, {ranks} processes" in result.text


def test_separate_worlds_fail_with_the_fix():
    seen = run_alone(OMPI_COMM_WORLD_SIZE="4")
    assert seen.returncode == 1
    assert "FAIL" in seen.stdout
    assert "LaunchError" in seen.stdout
    assert "mpirun" in seen.stdout


@pytest.mark.long
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system cannot bind a process to a core")
def test_ranks_on_one_core_are_warned(tmp_path):
    script = tmp_path / "bound.py"
    script.write_text("import os, runpy, sys\nos.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
                      "sys.argv[1:] = ['doctor']\nrunpy.run_module('mpisign', run_name='__main__')\n")  # fmt: skip
    result = mpirun(2, script)
    assert result.returncode == 0, result.text
    assert "ranks 0 and 1 are bound to the same single core" in result.text
    assert "--bind-to none" in result.text


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system cannot bind a process to a core")
@pytest.mark.parametrize(("cores", "status"), [(64, "warn"), pytest.param(2, "ok", marks=pytest.mark.long)])
def test_ranks_on_few_of_many_cores_are_warned(cores: int, status: str, tmp_path: Path):
    """Each is bound to one, as Open MPI binds one or two; how many the launcher has is pretended."""
    script = tmp_path / "bound.py"
    script.write_text(
        "import os, sys\nfrom mpisign import doctor\nfrom mpisign.__main__ import main\n"
        "os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[-1]})\nitself = os.sched_getaffinity\n"
        f"os.sched_getaffinity = lambda which: range({cores}) if which else itself(0)\n"
        "sys.argv[1:] = ['doctor']\nsys.exit(main())\n"
    )
    result = mpirun(1, script)
    assert result.returncode == 0, result.text
    assert re.search(rf"{status} +CPU binding ", result.text), result.text
    warned = "1 ranks here, each bound to 1 of 64 cores" in result.text
    assert warned == ("python -m mpisign run -n 1 ..., which binds" in result.text) == (status == "warn")


@pytest.mark.long
@pytest.mark.parametrize("variable", ["0", "1"])
def test_who_does_the_arithmetic(variable: str):
    told = run_alone(MPISIGN_NATIVE=variable).stdout
    if variable == "1" and native.library() is not None:
        assert f"C for {native.choose()}" in told
    else:
        assert "NumPy, at about half of C's speed: " in told


@pytest.mark.long
def test_a_wrong_vote_fails(tmp_path):
    script = tmp_path / "broken.py"
    script.write_text(
        "import sys\nfrom mpisign.rules import MajorityVote\nfrom mpisign.__main__ import main\n"
        "honest = MajorityVote.decide\n"
        "def inverted(self, messages, out, context, first_word):\n"
        "    ties = honest(self, messages, out, context, first_word)\n"
        "    out[0] ^= 1\n"
        "    return ties\n"
        "MajorityVote.decide = inverted\nsys.argv[1:] = ['doctor']\nsys.exit(main())\n"
    )
    result = mpirun(2, script)
    assert result.returncode != 0
    assert "coordinates differ from NumPy" in result.text


@pytest.mark.long
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_said_of_what_gpus_need():
    seen = run_alone(MPISIGN_GPU_AWARE_MPI="1").stdout
    assert "none; voting runs on the CPU" in seen
    assert "GPU-aware" not in seen
    assert "GPU kernels" not in seen


GPUS = """
import sys
from types import SimpleNamespace
import torch
sys.path.insert(0, {tests!r})
from gpu_branch import gpu_branch
from mpi4py import MPI
from mpisign import doctor, places
from mpisign.__main__ import main

rank = MPI.COMM_WORLD.rank
torch.cuda.is_available = lambda: rank != 0
torch.cuda.get_device_name = lambda device: "H" + str(100 * (rank % 2 + 1))
torch.cuda.device_count = lambda: 2
places.device = lambda: torch.device("cpu")
doctor.import_cupy = lambda: [].pop() if rank == {broken} else SimpleNamespace(__version__="14.2")
doctor._mpi_reads = lambda device: False
sys.argv[1:] = ["doctor"]
with gpu_branch(rank != 0):
    sys.exit(main())
"""


@pytest.mark.long
@needs_compiler
@pytest.mark.parametrize("broken", [None, 2])
def test_what_only_some_ranks_have_is_told_with_their_numbers(broken: int | None, tmp_path: Path):
    """Rank 0 has no GPU, and the others' are pretended: their kernels run in the shim."""
    script = tmp_path / "gpus.py"
    script.write_text(GPUS.format(tests=str(Path(__file__).parent), broken=broken))
    result = mpirun(4, script)
    lines = [" ".join(line.split()) for line in result.text.splitlines()]
    assert "ok GPUs rank 0: none; voting runs on the CPU" in lines, result.text
    assert "ok GPUs ranks 1, 3: cpu, of 2 here: H200" in lines
    assert "ok GPUs rank 2: cpu, of 2 here: H100" in lines
    assert "ok GPU-aware MPI this MPI cannot send from GPU memory; bitmaps pass through the host's" in lines
    votes = [line for line in lines if "a vote from GPUs" in line]
    if broken is None:
        assert result.returncode == 0, result.text
        assert "ok GPU kernels CuPy 14.2 compiles them; 10007 signs are right" in lines
        agree = "10007 coordinates on 4 ranks agree with NumPy"
        assert votes == [f"ok a vote from GPUs {exchange}: {agree}" for exchange in ("allgather", "two_phase")]
    else:
        assert result.returncode != 0
        assert "ok GPU kernels ranks 1, 3: CuPy 14.2 compiles them; 10007 signs are right" in lines
        assert "FAIL GPU kernels rank 2: IndexError: pop from empty list" in lines
        assert not votes, "a rank that cannot take part would keep the others waiting"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpus_that_torch_cannot_use(monkeypatch, tmp_path):
    def seen() -> tuple[str, str, str]:
        finding = doctor._no_gpu()
        return finding.status, finding.seen, finding.advice

    monkeypatch.setattr(doctor, "NVIDIA", tmp_path)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.version, "cuda", None)
    status, what, advice = seen()
    assert (status, "is built without CUDA" in what, "pytorch.org" in advice) == (doctor.WARN, True, True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    status, what, advice = seen()
    assert (status, "can use none" in what, "CUDA_VISIBLE_DEVICES" in advice) == (doctor.WARN, True, True)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    status, what, advice = seen()
    assert (status, "ROCm" in what, "a CUDA build of torch" in advice) == (doctor.WARN, True, True)


def test_a_gpu_that_does_not_answer(monkeypatch):
    def broken(device: torch.device) -> str:
        raise RuntimeError("CUDA error: unknown error\nCUDA kernel errors might be ...")

    monkeypatch.setattr(torch.cuda, "get_device_name", broken)
    finding = doctor._gpu(torch.device("cuda", 1))
    assert (finding.status, finding.seen) == (doctor.FAIL, "cuda:1: CUDA error: unknown error")


@pytest.mark.skipif(find_spec("cupy") is None, reason="needs CuPy")
def test_where_cupy_can_keep_nothing(tmp_path):
    (tmp_path / "file").touch()
    program = "import torch; from mpisign import doctor; print(doctor._kernels(torch.device('cpu')))"
    variables = environment({"CUPY_CACHE_DIR": str(tmp_path / "file" / "cache")})
    command = [sys.executable, "-c", program]
    seen = subprocess.run(
        command, env=variables, capture_output=True, text=True, timeout=patient(60.0), check=True
    ).stdout
    assert seen.startswith("Finding(status='warn', subject='GPU kernels'")
    assert "export CUPY_CACHE_DIR=" in seen


@needs_compiler
def test_the_kernels_are_tried(monkeypatch):
    """Here on the host, in the shim."""
    cpu = torch.device("cpu")
    monkeypatch.setattr(doctor, "import_cupy", lambda: SimpleNamespace(__version__="14.2"))
    with gpu_branch() as launches:
        assert doctor._kernels(cpu) == doctor.Finding(
            doctor.OK, "GPU kernels", "CuPy 14.2 compiles them; 10007 signs are right"
        )
        assert launches == ["pack_one", "unpack_one"]
        monkeypatch.setattr(kernels, "launch", lambda *launch: None)
        idle = doctor._kernels(cpu)
        assert (idle.status, "signs are wrong" in idle.seen) == (doctor.FAIL, True)
        monkeypatch.setattr(kernels, "launch", lambda *launch: [].pop())
        assert doctor._kernels(cpu).seen == "IndexError: pop from empty list"
        monkeypatch.setattr(kernels, "launch", lambda *launch: Path("/nowhere/cubin").read_text())
        assert doctor._kernels(cpu).advice.startswith("export CUPY_CACHE_DIR=")
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert doctor._kernels(cpu).status == doctor.WARN


@pytest.mark.long
def test_whether_mpi_reads_a_device_is_tried_where_a_crash_hurts_nobody(monkeypatch):
    monkeypatch.setattr(doctor, "TRIAL", 300)
    assert doctor._mpi_reads(torch.device("cpu"))
    assert not doctor._mpi_reads(torch.device("cuda", 99))
    monkeypatch.setattr(doctor, "_TELL_ONESELF", "import os; os.abort()")
    assert not doctor._mpi_reads(torch.device("cpu"))


def test_a_trial_that_takes_too_long_is_no_refusal(monkeypatch):
    monkeypatch.setattr(doctor, "TRIAL", 0.01)
    cpu, late = torch.device("cpu"), "the trial timed out after 0.01 s"
    monkeypatch.delenv("MPISIGN_GPU_AWARE_MPI", raising=False)
    assert doctor._gpu_aware(cpu).seen == f"{late}; bitmaps pass through the host's"
    monkeypatch.setenv("MPISIGN_GPU_AWARE_MPI", "1")
    wanted = doctor._gpu_aware(cpu)
    assert (wanted.status, wanted.seen) == (doctor.WARN, late)


@pytest.mark.long
def test_a_rank_can_try_it_too(tmp_path):
    """Its child must not take itself for a rank of the job."""
    script = tmp_path / "probe.py"
    script.write_text(
        "import torch, mpisign\nfrom mpisign import doctor\ndoctor.TRIAL = 300\nmpisign.init()\n"
        "print('works' if doctor._mpi_reads(torch.device('cpu')) else 'fails')\nmpisign.shutdown()\n"
    )
    result = mpirun(2, script)
    assert result.returncode == 0, result.text
    assert result.text.count("works") == 2


def test_cupy_is_found_under_the_names_of_its_wheels(monkeypatch):
    packages = doctor.importlib.metadata.packages_distributions()
    names = sorted(set(packages.get("cupy", ())))
    found = [finding for finding in doctor._versions() if finding.subject.startswith("cupy")]
    assert [(one.subject, one.status) for one in found] == [(name, doctor.OK) for name in names]
    monkeypatch.setattr(doctor.importlib.metadata, "packages_distributions", lambda: {"cupy": ["torch", "numpy"]})
    both = [
        finding for finding in doctor._versions() if finding.status == doctor.WARN and "uninstall" in finding.advice
    ]
    assert [finding.subject for finding in both] == ["numpy", "torch"]


def test_help_and_version(capsys, monkeypatch):
    for option, wanted in (("--help", "doctor"), ("--version", "mpisign 0.")):
        monkeypatch.setattr(sys, "argv", ["mpisign", option])
        with pytest.raises(SystemExit, match="0"):
            main()
        assert wanted in capsys.readouterr().out
