"""What the benchmarks share: fair timing, a description of the machine, tables, dated reports, gloo.

Contenders take turns: one repetition runs every one of them once, so that whatever else the machine does hits
all alike, and a ratio is taken *within* a repetition. The headline is the median of these ratios; the ratio of the
fastest times stands beside it. With several ranks, all start from a barrier and the slowest rank's time counts.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

import mpisign
from mpisign import cost
from mpisign.session import current

if TYPE_CHECKING:
    import rich.table
    from mpi4py import MPI

__all__ = [
    "Contender",
    "Report",
    "Table",
    "Target",
    "compare",
    "count",
    "few_threads",
    "gloo",
    "measure",
    "mib",
    "one_thread",
    "parser",
    "ring_bytes",
    "speedup",
]

RESULTS = Path(os.path.relpath(Path(__file__).parent / "results"))

# Settings of MPI, gloo and the thread pools that decide timings; the report repeats those that are set.
_KNOBS = ("OMPI_MCA_", "PRTE_MCA_", "MPIR_CVAR_", "I_MPI_", "UCX_", "GLOO_", "OMP_", "OPENBLAS_", "MKL_", "MPISIGN_")
_NOT_KNOBS = ("OMPI_MCA_PREFIXES", "OMPI_MCA_num_procs", "OMPI_MCA_initial_wdir", "OMPI_MCA_cpu_type")

_LAUNCHERS = ("mpirun", "mpiexec", "mpiexec.hydra", "prterun", "srun")

Times = dict[str, list[float]]
"""Seconds of every repetition, by the contender's name."""


# ------------------------------------------------------------------------------------------ command line


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and leaves the examples as they are written."""


def count(text: str, least: int = 1) -> int:
    """A number as people write it: ``"25.6M"``, ``"4k"``, ``"1000"``."""
    factor = {"k": 10**3, "M": 10**6, "G": 10**9}.get(text[-1:], 1)
    try:
        value = round(float(text[:-1] if factor > 1 else text) * factor)
    except (ValueError, OverflowError):
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least {least}, such as 25.6M, 4k or 1000")
    return value


def parser(description: str, examples: Sequence[str]) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks have."""
    parser = argparse.ArgumentParser(
        description=description,
        epilog="examples:\n" + "\n".join(f"  {example}" for example in examples),
        formatter_class=_HelpFormatter,
    )
    parser.add_argument("--rounds", type=count, default=15, help="timed repetitions; each runs every contender once")
    parser.add_argument(
        "--warmup", type=partial(count, least=0), default=2, help="repetitions before them that are not counted"
    )
    parser.add_argument("--report", action="store_true", help="write YYYY-MM-DD-NAME.md and .json")
    parser.add_argument("--results", type=Path, metavar="FOLDER", default=RESULTS, help="where to write them")
    return parser


def one_thread() -> None:
    """Let this process compute on one thread."""
    _compute_on(1)


def few_threads() -> None:
    """Let this rank compute on ``OMP_NUM_THREADS`` threads or, unless that is set, on one: ranks share a machine."""
    said = os.environ.get("OMP_NUM_THREADS", "")
    _compute_on(int(said) if said.isdecimal() and int(said) else 1)


def _compute_on(threads: int) -> None:
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]  # a GPU's benchmarks do not need it

    threadpool_limits(threads)
    torch.set_num_threads(threads)


# ---------------------------------------------------------------------------------------------- timing


@dataclass(frozen=True)
class Contender:
    """One thing to time.

    ``what``: it in plain words, for the report; ``run``: the timed call; ``prepare``: puts back what a run
    overwrites, untimed; ``observe``: called after a timed run with this rank's own seconds, untimed.
    """

    name: str
    what: str
    run: Callable[[], object]
    prepare: Callable[[], object] = lambda: None
    observe: Callable[[float], object] = lambda seconds: None


def measure(contenders: Sequence[Contender], rounds: int, warmup: int, comm: MPI.Comm | None = None) -> Times:
    """Time the contenders in turns. **Collective** over ``comm``, and the same result on every rank.

    Args:
        rounds: counted repetitions.
        warmup: repetitions before them that are thrown away: first touches of memory, connections, caches.
        comm: the ranks that run together, or None for this process alone.

    Returns:
        Seconds of every repetition: of the slowest rank, from a barrier on.
    """
    if comm is not None:
        from mpi4py import MPI
    times: Times = {contender.name: [] for contender in contenders}
    rank = 0 if comm is None else comm.rank
    with _progress((warmup + rounds) * len(contenders), shown=rank == 0) as step:
        for repetition in range(-warmup, rounds):
            for contender in contenders:
                contender.prepare()
                if comm is not None:
                    comm.Barrier()
                began = perf_counter()
                contender.run()
                seconds = perf_counter() - began
                slowest = seconds if comm is None else comm.allreduce(seconds, MPI.MAX)
                if repetition >= 0:
                    times[contender.name].append(slowest)
                    contender.observe(seconds)
                step(contender.name)
    return times


@contextmanager
def _progress(total: int, shown: bool) -> Iterator[Callable[[str], object]]:
    """A progress bar, where tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield lambda name: None
        return
    tqdm.monitor_interval = 0  # no thread of its own beside what is timed
    with tqdm(total=total, disable=not shown, leave=False, unit="run") as bar:

        def step(name: str) -> None:
            bar.set_description(name, refresh=False)
            bar.update()

        yield step


def speedup(reference: Sequence[float], mine: Sequence[float]) -> tuple[float, float]:
    """How many times faster ``mine`` is: (median of the per-repetition ratios, ratio of the fastest times)."""
    ratios = [theirs / ours for theirs, ours in zip(reference, mine, strict=True)]
    return statistics.median(ratios), min(reference) / min(mine)


# ------------------------------------------------------------------------------------- tables and reports


@dataclass(frozen=True)
class Table:
    """Cells as text, for the terminal and for the report."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def on_terminal(self) -> rich.table.Table:
        import rich.box
        import rich.table

        table = rich.table.Table(title=self.title, title_justify="left", box=rich.box.SIMPLE_HEAD)
        for place, column in enumerate(self.columns):
            table.add_column(column, justify="right" if place else "left", no_wrap=not place)
        for row in self.rows:
            table.add_row(*row)
        return table

    def in_markdown(self) -> str:
        lines = [self.columns, ["---"] + ["---:"] * (len(self.columns) - 1), *self.rows]
        return f"### {self.title}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines)


@dataclass(frozen=True)
class Target:
    """A promise: ``contender`` is at least ``at_least`` times as fast as ``reference``."""

    contender: str
    reference: str
    at_least: float


def compare(title: str, times: Times, names: Sequence[str], references: Sequence[str]) -> Table:
    """A row for each of ``names``: its times, and how many times faster than each reference it is."""
    columns = ["", "median ms", "fastest ms", *(f"x {reference}" for reference in references)]
    rows = []
    for name in names:
        seconds = times[name]
        ratios = [speedup(times[reference], seconds) for reference in references]
        shown = [f"{1e3 * statistics.median(seconds):.2f}", f"{1e3 * min(seconds):.2f}"]
        rows.append([name, *shown, *(f"{median:.2f} ({fastest:.2f})" for median, fastest in ratios)])
    return Table(title, columns, rows)


def mib(size: float) -> str:
    """Bytes for people."""
    return f"{size / 2**20:.3f} MiB"


@dataclass
class Report:
    """What a benchmark found, for the terminal and for ``benchmarks/results/``.

    ``name``: of the file; ``words``: what was compared, in plain words; ``settings``: the command line's;
    ``ranks``: how many took part, or None for a benchmark without MPI; ``extra``: more raw numbers for the JSON.
    """

    name: str
    title: str
    words: str
    settings: argparse.Namespace
    contenders: Sequence[Contender]
    times: Times
    targets: Sequence[Target]
    tables: list[Table]
    ranks: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def promises(self) -> Table:
        """Each target and whether this run met it."""
        rows = []
        for target in self.targets:
            median, fastest = self._speedup(target)
            rows.append(
                [
                    f"{target.contender} against {target.reference}",
                    f"{target.at_least:g}",
                    f"{median:.2f} ({fastest:.2f})",
                    "met" if median >= target.at_least else "missed",
                ]
            )
        return Table("Targets (times faster; stated for the default settings)", ["", "at least", "measured", ""], rows)

    def show(self) -> None:
        """Print the tables; as they are in the report, where rich is not installed."""
        try:
            from rich.console import Console
        except ImportError:
            print(self.title, self._reading(), *(table.in_markdown() for table in self._tables()), sep="\n\n")
            return
        console = Console(highlight=False)
        console.width = max(console.width, 120)  # mpirun's terminal has no size, and rich would take 80
        console.print(f"[bold]{self.title}[/bold]")
        console.print(f"{self._reading()}\n")
        for table in self._tables():
            console.print(table.on_terminal())

    def write(self, folder: Path) -> list[Path]:
        """Write ``YYYY-MM-DD-NAME.md`` and ``.json``; a report of the same day and name is replaced."""
        now = datetime.now().astimezone()
        about = {
            "command": _command(),
            "machine": {**_machine(), "threads of a process": torch.get_num_threads()},
            "versions": _versions(self.ranks is not None),
            "environment": _environment(),
        }
        raw = {
            "benchmark": self.name,
            "date": now.isoformat(timespec="seconds"),
            **about,
            "ranks": self.ranks or 1,
            "settings": {key: value for key, value in vars(self.settings).items() if key not in ("report", "results")},
            "contenders": [
                {"name": one.name, "what": one.what, "seconds": self.times[one.name]} for one in self.contenders
            ],
            "targets": [
                {
                    **asdict(target),
                    **dict(zip(("median_of_ratios", "ratio_of_fastest"), self._speedup(target), strict=True)),
                }
                for target in self.targets
            ],
            **self.extra,
        }
        folder.mkdir(parents=True, exist_ok=True)
        stem = f"{now:%Y-%m-%d}-{self.name}"
        paths = [folder / f"{stem}.md", folder / f"{stem}.json"]
        paths[0].write_text(self._in_markdown(f"{now:%Y-%m-%d}", about))
        paths[1].write_text(json.dumps(raw, indent=1) + "\n")
        return paths

    def _tables(self) -> list[Table]:
        return [*self.tables, self.promises()]

    def _speedup(self, target: Target) -> tuple[float, float]:
        return speedup(self.times[target.reference], self.times[target.contender])

    def _reading(self) -> str:
        return (
            f"{self.settings.rounds} repetitions, contenders taking turns. "
            '"x NAME" is how many times faster than NAME a row is: the median of the ratios taken within each '
            "repetition, which a noisy machine disturbs least, and in brackets the ratio of the fastest times."
        )

    def _in_markdown(self, date: str, about: dict[str, Any]) -> str:
        facts = [f"- **{key}**: {value}" for part in ("machine", "versions") for key, value in about[part].items()]
        facts += [f"- `{key}={value}`" for key, value in about["environment"].items()]
        parts = [
            f"# {self.title}, {date}",
            f"```\n{about['command']}\n```",
            self.words,
            self._reading(),
            *(table.in_markdown() for table in (self.promises(), *self.tables)),
            "### What ran\n\n" + "\n".join(f"- **{one.name}**: {one.what}" for one in self.contenders),
            "### Where\n\n" + "\n".join(facts),
            f"The seconds of every repetition are in `{date}-{self.name}.json`.",
        ]
        return "\n\n".join(parts) + "\n"


def _command() -> str:
    """What was typed: this process's command line, or that of the launcher above it, without absolute paths."""
    typed = ["python", *sys.argv]
    parent = [""]
    with suppress(OSError):  # some systems hide others' processes, and srun's ranks are root's
        parent = Path(f"/proc/{os.getppid()}/cmdline").read_text().rstrip("\0").split("\0")
    if Path(parent[0]).name in _LAUNCHERS:
        typed = ["mpirun" if Path(parent[0]).name == "prterun" else parent[0], *parent[1:]]  # prterun is mpirun inside
    root = RESULTS.parent.parent.resolve()
    shown = (Path(word) if Path(word).is_absolute() else None for word in typed)
    return shlex.join(
        word if path is None else str(path.relative_to(root)) if path.is_relative_to(root) else path.name
        for word, path in zip(typed, shown, strict=True)
    )


def _machine() -> dict[str, Any]:
    models = {
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    }
    cache = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    return {
        "cpu": ", ".join(sorted(models)) or platform.machine(),
        "cores": os.cpu_count(),
        "cores this process may use": len(os.sched_getaffinity(0)),
        "last-level cache": cache.read_text().strip() if cache.exists() else "unknown",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB",
        "system": platform.platform(),
        "load average of the last minute": round(os.getloadavg()[0], 2),
        "nodes": mpisign.num_nodes() if mpisign.is_initialized() else 1,
    }


def _versions(with_mpi: bool) -> dict[str, str]:
    packages = ("mpisign", "numpy", "torch", "mpi4py") if with_mpi else ("mpisign", "numpy", "torch")
    versions = {name: mpisign.__version__ if name == "mpisign" else version(name) for name in packages}
    if with_mpi:
        from mpi4py import MPI

        versions["MPI library"] = MPI.Get_library_version().splitlines()[0].split(", package")[0].strip("\0 ")
    return {"python": platform.python_version(), **versions}


def _environment() -> dict[str, str]:
    return {
        key: value
        for key, value in sorted(os.environ.items())
        if key.startswith(_KNOBS) and key not in _NOT_KNOBS and "/" not in value
    }


# ----------------------------------------------------------------------------------------------- rivals


def ring_bytes(elements: int, item: int, ranks: int) -> float:
    """Bytes a rank sends in a ring all-reduce of ``elements`` items: ``2 (M - 1)/M * item * d``."""
    return 2 * (ranks - 1) / ranks * item * elements


def hierarchical_bytes(elements: int) -> float:
    """Bytes a rank with a lane sends in this job for a vote of ``elements``: its part of what leaves the card."""
    nodes = current().group.nodes
    return cost.card_bytes("hierarchical", nodes, cost.Message(elements / 8)) / nodes.lanes


@contextmanager
def gloo(comm: MPI.Comm) -> Iterator[None]:
    """torch.distributed with gloo, among the same ranks. **Collective.**

    The ranks meet through a file in a temporary folder (several nodes: set ``TMPDIR`` to one they share). On a
    single node gloo talks over loopback, unless ``GLOO_SOCKET_IFNAME`` says otherwise.
    """
    if mpisign.num_nodes() == 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    folder: str = comm.bcast(tempfile.mkdtemp() if comm.rank == 0 else None)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=comm.rank, world_size=comm.size)
    try:
        yield
        dist.destroy_process_group()
        comm.Barrier()
    finally:
        if comm.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
