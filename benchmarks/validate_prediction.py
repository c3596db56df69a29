"""How well the cost model predicts: calibrated on hosts of a slow network, against steps that are measured there."""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from time import perf_counter
from typing import Any

import harness
import mpi4py
import torch
import torch.distributed as dist
from harness import Contender, Table, count, few_threads, gloo, measure

import mpisign
from mpisign import DistributedSignOptimizer, cost, prediction
from mpisign.cost import Links, Nodes, Rates
from mpisign.exchange import choose
from mpisign.quantities import spoken_bandwidth

HERE = Path(__file__).parent
SHAPES, RATES = ("2", "4", "8", "2x2", "2x4", "4x2"), ("100mbit", "1gbit", "none")
EXCHANGES = tuple(name for name in choose.CHOICES if name != "auto")
REDUCTIONS = {"ring fp32": torch.float32, "ring bf16": torch.bfloat16}
TENSORS = 8
MESSAGE_MB = 1.0
TAIL = 2000  # bytes of what a case that fails has said last
LR = 1e-4

WORDS = """\
On hosts of `benchmarks/slow_network`, `mpisign.calibration` measures the links and `predict --calibrate` the rates of
computing; `mpisign/cost.py` predicts a step from these; then the steps are measured, in turns:
`DistributedSignOptimizer(SGD(lr), method=signum()).step()` by each exchange in messages of 1 MiB, after backward and
without overlap, and gloo's all-reduce, which is a ring, in fp32 and bf16, with `SGD(lr, momentum=0.9).step()` on as
many parameters. Seconds are of the slowest rank. The error is the prediction over the median measurement, less one,
and in brackets over the fastest one; a speed-up is a ring's time over that of the vote which is the fastest, by
prediction or by median measurement. The hosts share the cores of one machine: where ranks outnumber them, or the
network is free, it is computing that is predicted, and whatever else this machine does (its load is below) disturbs
measurement and calibration, not always alike. The card's bandwidth is calibrated by MPI's all-to-alls, as votes need
them; gloo's ring of neighbours may get more out of a card on these hosts, so that it is predicted too slow. Where
latencies have used up a calibration's time, the card's bandwidth can come out above the rate, as a switch lets short
transfers through at once."""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--elements", type=count, default=8_000_000, help="parameters (default: 8M)")
    options.add_argument("--rounds", type=count, default=5, help="measured steps by each exchange (default: 5)")
    options.add_argument("--shapes", nargs="+", default=SHAPES, help="of hosts, as slow_network takes them")
    options.add_argument("--rates", nargs="+", default=RATES, help="of their networks")
    options.add_argument("--patience", type=count, default=600, help="seconds a case may take (default: 600)")
    options.add_argument("--results", type=Path, default=harness.RESULTS, metavar="FOLDER", help="for the report")
    options.add_argument("--again", type=Path, metavar="FILE", help="predict from the raw numbers of an earlier report")
    options.add_argument("--measure", type=Path, metavar="FILE", help="be a rank, and let rank 0 write what it found")
    args = options.parse_args()
    if args.measure:
        measure_here(args)
        return
    args.results.mkdir(parents=True, exist_ok=True)
    if args.again:
        again(args)
        return
    mpi4py.rc.initialize = False  # reports, between jobs of mpirun, ask MPI for its name alone
    cases: list[dict[str, Any]] = []
    files: list[Path] = []
    failed: dict[str, str] = {}
    today = {"date": _today()}
    for shape in args.shapes:
        for rate in args.rates:
            try:
                case = run(args, shape, rate)
            except FailedError as error:
                failed[f"{shape} at {rate}"] = str(error)
                print(f"{shape} at {rate} {error}", file=sys.stderr, flush=True)
            else:
                cases.append(case)
                print(table([case]).in_markdown(), flush=True)
            if cases:  # each time, as what comes next may end this
                files = write(cases, args, today, failed)
    print("\n".join(f"wrote {path}" for path in files))
    sys.exit(bool(failed))


class FailedError(Exception):
    """Why a case was not measured."""


def run(args: argparse.Namespace, shape: str, rate: str) -> dict[str, Any]:
    """One case, in a job of its own. Raises :class:`FailedError`."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as said:
        file = Path(folder) / "found.json"
        # fmt: off
        command = [str(HERE / "slow_network"), shape, rate, sys.executable, __file__, "--measure", str(file),
                   "--elements", str(args.elements), "--rounds", str(args.rounds)]
        # fmt: on
        job = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said)
        try:
            job.wait(args.patience)
            how = f"ended with exit code {job.returncode}"
        except subprocess.TimeoutExpired:
            how = f"took longer than {args.patience} s"
        finally:
            job.terminate()  # not killed: it has its hosts to remove
            job.wait(60)
        if job.returncode:
            said.seek(0)
            raise FailedError(f"{how}: {said.read()[-TAIL:].decode(errors='replace').strip()}")
        found: dict[str, Any] = json.loads(file.read_text())
    return {"shape": shape, "rate": rate, **found}


def again(args: argparse.Namespace) -> None:
    """Write an earlier report anew, with the predictions of today's model for what was calibrated then."""
    raw = json.loads(args.again.read_text())
    args.elements = raw["elements"]
    for case in raw["cases"]:
        links = Links(**{key: float("inf") if value is None else value for key, value in case["links"].items()})
        nodes, rates = Nodes(tuple(case["nodes"])), Rates(**case["rates"])
        case["predicted"] = {way: predict(way, links, nodes, args.elements, rates) for way in case["seconds"]}
        case["choice"] = choice(links, nodes, rates)
    print("\n".join(f"wrote {path}" for path in write(raw["cases"], args, raw, raw.get("failed"))))


# --------------------------------------------------------------------------------------------- on the hosts


def measure_here(args: argparse.Namespace) -> None:
    """Calibrate, predict and measure. **Collective.**"""
    few_threads()
    mpisign.init()

    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    elements = args.elements // TENSORS * TENSORS
    optimizers = {exchange: steps(exchange, elements, comm.rank) for exchange in EXCHANGES}
    contenders = [Contender(name, "", optimizer.step) for name, optimizer in optimizers.items()]
    measure(contenders, 1, 0, comm)  # connections and first touches
    began = perf_counter()
    nodes, links, rates = prediction.measured()
    calibrating = perf_counter() - began
    times = measure(contenders, args.rounds, 1, comm)
    with gloo(comm):
        rings = [ring(name, dtype, elements) for name, dtype in REDUCTIONS.items()]
        times.update(measure(rings, args.rounds, 1, comm))
    if comm.rank != 0:
        return
    predicted = {way: predict(way, links, nodes, elements, rates) for way in times}
    found = {
        "nodes": list(nodes.sizes),
        "links": vars(links) | {key: None for key, value in vars(links).items() if value == float("inf")},
        "rates": vars(rates),
        "calibrating_seconds": calibrating,
        "choice": choice(links, nodes, rates),
        "seconds": times,
        "predicted": predicted,
    }
    args.measure.write_text(json.dumps(found))


def choice(links: Links, nodes: Nodes, rates: Rates) -> str:
    """The exchange that the model would choose for a message."""
    return cost.choose(links, nodes, cost.Message(MESSAGE_MB * 2**20), EXCHANGES, rates)[0]


def predict(way: str, links: Links, nodes: Nodes, elements: int, rates: Rates) -> float:
    """Seconds of a step; of a ring all its computing."""
    size = MESSAGE_MB * 2**20 if way in EXCHANGES else None
    return cost.step(way, links, nodes, elements, message_bytes=size, rates=rates).total


def steps(exchange: choose.Choice, elements: int, rank: int) -> DistributedSignOptimizer:
    own = torch.Generator().manual_seed(1 + rank)
    parameters = [torch.nn.Parameter(torch.zeros(elements // TENSORS)) for _ in range(TENSORS)]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=own)
    sgd = torch.optim.SGD(parameters, lr=LR)
    return DistributedSignOptimizer(sgd, method=mpisign.signum(), exchange=exchange, bucket_cap_mb=MESSAGE_MB)


def ring(name: str, dtype: torch.dtype, elements: int) -> Contender:
    parameter, vector = torch.nn.Parameter(torch.zeros(elements)), torch.zeros(elements, dtype=dtype)
    parameter.grad = vector if dtype == torch.float32 else torch.zeros(elements)
    sgd = torch.optim.SGD([parameter], lr=LR, momentum=0.9)

    def step() -> None:
        dist.all_reduce(vector)
        sgd.step()

    return Contender(name, "", step)


# ---------------------------------------------------------------------------------------------- the report


def table(cases: Sequence[dict[str, Any]]) -> Table:
    """A row for each case and way."""
    rows = []
    for case in cases:
        for way, seconds in case["seconds"].items():
            times = statistics.median(seconds), min(seconds), case["predicted"][way]
            error = f"{error_of(case, way):+.0%} ({case['predicted'][way] / min(seconds) - 1:+.0%})"
            rows.append([f"{case['shape']} at {case['rate']}", way, *(f"{1e3 * it:.1f}" for it in times), error])
    return Table("Steps", ["hosts", "by", "median ms", "fastest ms", "predicted ms", "error"], rows)


def error_of(case: dict[str, Any], way: str) -> float:
    """The prediction over the median of what was measured, less one."""
    return float(case["predicted"][way] / statistics.median(case["seconds"][way]) - 1)


def errors(cases: Sequence[dict[str, Any]]) -> Table:
    """How large the errors are, by way and rate."""
    rows = []
    for rate in dict.fromkeys(case["rate"] for case in cases):
        for way in cases[0]["seconds"]:
            found = [error_of(case, way) for case in cases if case["rate"] == rate]
            rows.append(
                [rate, way, f"{statistics.median(map(abs, found)):.0%}", f"{min(found):+.0%}", f"{max(found):+.0%}"]
            )
    return Table("Errors", ["rate", "by", "median of sizes", "lowest", "highest"], rows)


def speedups(cases: Sequence[dict[str, Any]]) -> Table:
    """By rate: a predicted speed-up by voting over the measured one, of the vote that is the fastest in each."""
    rows = []
    for rate in dict.fromkeys(case["rate"] for case in cases):
        here = [case for case in cases if case["rate"] == rate]
        for rival in REDUCTIONS:
            found = [
                speedup(case["predicted"], rival)
                / speedup({way: statistics.median(its) for way, its in case["seconds"].items()}, rival)
                for case in here
            ]
            worst = max(found, key=lambda ratio: abs(math.log(ratio)))
            rows.append([rate, rival, f"{statistics.median(found):.2f}", f"{worst:.2f}"])
    return Table("Speed-ups: predicted over measured", ["rate", "against", "median", "worst"], rows)


def speedup(seconds: Mapping[str, float], rival: str) -> float:
    """How many times faster the fastest vote is than a ring."""
    return seconds[rival] / min(seconds[way] for way in EXCHANGES if way in seconds)


def calibrations(cases: Sequence[dict[str, Any]]) -> Table:
    """What was calibrated, and whether the exchange that it would choose was the fastest."""
    rows = []
    for case in cases:
        links, medians = case["links"], {way: statistics.median(its) for way, its in case["seconds"].items()}
        fastest = min(EXCHANGES, key=lambda way: medians.get(way, float("inf")))
        node = "" if links["node_bandwidth"] is None else f"{links['node_bandwidth'] / 1e9:.2f} GB/s"
        lost = medians[case["choice"]] / medians[fastest] - 1
        waits = f"{1e6 * links['network_latency']:.0f} + {1e6 * links['network_overhead']:.0f}"
        row = [f"{case['shape']} at {case['rate']}", spoken_bandwidth(links["network_bandwidth"]), waits, node]
        rows.append([*row, case["choice"], fastest, f"{lost:.0%}"])
    columns = ["hosts", "card", "latency + overhead, us", "inside a node", "chosen", "fastest", "lost by the choice"]
    return Table("Calibrations and choices", columns, rows)


def _today() -> str:
    return f"{datetime.now().astimezone():%Y-%m-%d}"


def write(
    cases: Sequence[dict[str, Any]],
    args: argparse.Namespace,
    earlier: Mapping[str, Any] | None = None,
    failed: Mapping[str, str] | None = None,
) -> list[Path]:
    """The report and its raw numbers; of an ``earlier`` one that is written anew, where and when it was measured.

    ``failed``: why others were not.
    """
    about: dict[str, Any] = {
        "date": _today(),
        "command": harness._command(),
        "where": {**harness._machine(), **harness._versions(True)},
    }
    about |= {key: value for key, value in (earlier or {}).items() if key in about}
    date, stem = about["date"], args.results / f"{about['date']}-prediction"
    title = f"Predicted against measured steps of {args.elements:,} parameters"
    parts = [
        f"# {title}, {date}",
        f"```\n{about['command']}\n```",
        WORDS,
        *([f"Not measured: {', '.join(failed)}."] if failed else []),
        *(one.in_markdown() for one in (speedups(cases), errors(cases), calibrations(cases), table(cases))),
        "### Where\n\n" + "\n".join(f"- **{key}**: {value}" for key, value in about["where"].items()),
        f"The seconds of every repetition are in `{stem.name}.json`.",
    ]
    files = [stem.with_suffix(".md"), stem.with_suffix(".json")]
    files[0].write_text("\n\n".join(parts) + "\n")
    raw = {**about, "elements": args.elements, "cases": list(cases), "failed": dict(failed or {})}
    files[1].write_text(json.dumps(raw, indent=1) + "\n")
    return files


if __name__ == "__main__":
    main()
