"""Small problems on which compressed training is known to go wrong, and what repairs it, beside their closed forms.

Each is a function of one to three numbers. It is minimised by the library as any model is, on one to three ranks; what
must come out is computed apart from that, and drawn over it. Ends with exit code 1 if any prediction fails.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from closed_forms import Curve, so_far
from counterexamples import RANKS, Counterexample, Run, counterexamples
from experiments import RESULTS, markdown_table, parse, write_report
from flags import HelpFormatter, count, end, progress_bar, said_once, whole
from rich.console import Console
from rich.table import Table
from torch import nn

import mpisign

EXAMPLES = """\
examples:
  mpirun -n 3 python scripts/experiment_counterexamples.py
  mpirun -n 3 python scripts/experiment_counterexamples.py --quick
  mpirun -n 3 python scripts/experiment_counterexamples.py --only ce1 pull --copies 16
  mpirun -n 3 python scripts/experiment_counterexamples.py --report
"""
QUICK = {"only": ["ce1", "ce3", "pull"], "copies": 4}
EVERY = 5  # steps from one number of a path in the report to the next
DEVIATIONS = 5.0  # by how many of the path's largest standard errors a mean of random runs may be off at any step
ROUNDING = 1e-4  # of a number that is not random: messages are in fp32


@dataclass(frozen=True)
class Seen:
    """What a run gave: (steps + 1,) each, the mean over its copies, that mean's standard error, and the middle 80 %."""

    mean: Curve
    error: Curve
    low: Curve
    high: Curve

    def holds(self, run: Run) -> bool:
        slack = DEVIATIONS * self.error.max() + ROUNDING * (1.0 + np.abs(run.predicted))
        off = self.mean - run.predicted
        return bool(np.all({"=": np.abs(off), "<=": off, ">=": -off}[run.relation] <= slack))


# ----------------------------------------------------------------------------------------------- the library


@contextmanager
def first_ranks(number: int) -> Iterator[bool]:
    """A job of the first ranks only, and whether this process is one of them. **Collective** over all."""
    from mpi4py import MPI  # importing it starts MPI

    mine = MPI.COMM_WORLD.rank < number
    comm = MPI.COMM_WORLD.Split(int(mine))
    mpisign.shutdown()
    mpisign.init(comm)
    try:
        yield mine
    finally:
        mpisign.shutdown()
        comm.Free()
        mpisign.init()


def follow(example: Counterexample, run: Run, copies: int, seed: int) -> Seen:
    """Minimise by the library: each copy is a parameter of its own. **Collective.**"""
    parameters = [nn.Parameter(torch.tensor(example.start, dtype=torch.float64)) for _ in range(copies)]
    sgd = torch.optim.SGD(parameters, lr=example.lr)
    optimizer = mpisign.DistributedSignOptimizer(sgd, method=run.method, ties=run.ties, seed=seed)
    random = torch.Generator().manual_seed(seed * RANKS + mpisign.rank())
    values = []
    for step in range(example.steps + 1):
        x = torch.stack([parameter.detach() for parameter in parameters])
        values.append(example.shown(x).numpy())
        if step == example.steps:
            break
        for parameter, gradient in zip(parameters, example.gradient(x, mpisign.rank(), random), strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
        if example.box is not None:
            for parameter in parameters:
                parameter.data.clamp_(-example.box, example.box)
    curves = np.apply_along_axis(so_far, 0, np.array(values)) if example.averaged else np.array(values)
    error = curves.std(axis=1, ddof=1) / copies**0.5 if copies > 1 else np.zeros(len(curves))
    low, high = np.percentile(curves, [10, 90], axis=1)
    return Seen(curves.mean(axis=1), error, low, high)


def main() -> None:
    mpisign.init()
    args = parse_arguments()
    torch.set_num_threads(1)
    chosen = [example for example in counterexamples() if example.name in args.only]
    runs = [(example, run) for example in chosen for run in example.runs]
    results: list[tuple[Counterexample, Run, Seen]] = []
    bar = progress_bar(runs, unit="run", quiet=args.quiet)
    for ranks, group in groupby(bar, key=lambda pair: pair[1].ranks or pair[0].ranks):
        with first_ranks(ranks) as mine:
            for example, run in group:
                if mine:
                    results.append((example, run, follow(example, run, example.copies or args.copies, args.seed)))
    wrong = mpisign.broadcast_object(show(args, results) if mpisign.rank() == 0 else None)
    if wrong:
        end(f"what was predicted did not happen: {'; '.join(wrong)}", 1)


# ------------------------------------------------------------------------------------------------- the results


def show(args: argparse.Namespace, results: Sequence[tuple[Counterexample, Run, Seen]]) -> list[str]:
    """Print the table, write the report; returns which predictions failed."""
    columns = ["counterexample", "method", "ranks", "predicted", "seen", "holds"]
    lines, facts, wrong = [], [], []
    for example, run, seen in results:
        holds = seen.holds(run)
        if not holds:
            wrong.append(f"{example.name}, {run.label}")
        sign_of = "" if run.relation == "=" else f"{run.relation} "
        spread = f" ± {seen.error[-1]:.3f}" if seen.error[-1] > ROUNDING else ""
        ranks = run.ranks or example.ranks
        cells = [f"{sign_of}{run.predicted[-1]:.3f}", f"{seen.mean[-1]:.3f}{spread}", "yes" if holds else "NO"]
        lines.append([example.name, run.label, str(ranks), *cells])
        kept = [*range(0, example.steps, EVERY), example.steps]
        curves = {"predicted": run.predicted, "seen": seen.mean, "standard_error": seen.error}
        facts.append(
            {
                "counterexample": example.name,
                "source": example.source,
                "shown": example.quantity,
                "best": example.best,
                "method": str(run.method),
                "label": run.label,
                "ranks": ranks,
                "lr": example.lr,
                "copies": example.copies or args.copies,
                "relation": run.relation,
                "holds": holds,
                "steps": kept,
                **{name: curve[kept].tolist() for name, curve in curves.items()},
            }
        )
    table = Table(title="At the last step")
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place < 2 else "right")
    for line in lines:
        table.add_row(*line)
    # mpirun gives each rank a terminal of its own, so rich would colour what goes to a file in the end.
    Console(color_system=None, width=110).print(table)
    text = f"""# Counterexamples, beside their closed forms

{len(results) - len(wrong)} of {len(results)} predictions hold, at all steps. Lines are what the library did, the mean
of {args.copies} runs where there is chance, with their middle 80 %. Black dashes are what was computed apart from it;
coloured dashes are what it may be at most.

{markdown_table(columns, lines)}

A prediction that is no bound is of the mean path at every step: it may be off by {DEVIATIONS:g} of the path's largest
standard errors, or by {ROUNDING:g} where there is no chance. `scripts/counterexamples.py` and
`scripts/closed_forms.py` have the formulas and their sources."""
    data = {"seeds": [args.seed], "runs": facts}
    print(f"report: {write_report(args.out, 'counterexamples', text, data, {'': lambda: draw(results)})}")
    return wrong


def draw(results: Sequence[tuple[Counterexample, Run, Seen]]) -> Any:
    """A panel for each counterexample."""
    from matplotlib.figure import Figure  # slow to import, and one rank needs it

    panels = [(example, list(group)) for example, group in groupby(results, key=lambda result: result[0])]
    width = min(3, len(panels))
    height = -(-len(panels) // width)
    figure = Figure(figsize=(4.4 * width, 3.3 * height), layout="constrained")
    grid = figure.subplots(height, width, squeeze=False).flat
    for (example, runs), axes in zip(panels, grid, strict=False):  # panels first: the rest of the grid is removed
        steps = np.arange(example.steps + 1)
        others = iter(("C0", "C1", "C4"))
        for _, run, seen in runs:
            colour = "C2" if "error feedback" in run.label else next(others)
            axes.plot(steps, seen.mean, color=colour, linewidth=2.5, label=run.label)
            axes.fill_between(steps, seen.low, seen.high, color=colour, alpha=0.15, linewidth=0)
            computed = "k" if run.relation == "=" else colour
            axes.plot(steps, run.predicted, color=computed, linewidth=1, linestyle="--")
        largest = max(max(seen.high.max(), seen.mean.max()) for _, _, seen in runs)
        if example.log:
            axes.set_yscale("log")
        elif any(run.relation != "=" for _, run, _ in runs):
            axes.set_ylim(0, 1.25 * largest)  # bounds begin high
        if not example.log:
            axes.axhline(example.best, color="0.6", linewidth=1, linestyle=":", label="best")
        axes.set_title(example.title, fontsize=10)
        axes.set_xlabel("step", fontsize=8)
        axes.set_ylabel(example.quantity, fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    for axes in list(grid):
        axes.remove()
    figure.suptitle(
        "lines: the library; black dashes: computed, and equal; coloured dashes: computed, at most", fontsize=9
    )
    return figure


# ------------------------------------------------------------------------------------------------- the options


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage="%(prog)s [OPTIONS]", description=__doc__, epilog=EXAMPLES, formatter_class=HelpFormatter
    )
    add = parser.add_argument
    names = [example.name for example in counterexamples()]
    add("--only", nargs="+", choices=names, default=names, metavar="NAME", help="of %(choices)s")
    add("--copies", type=whole, default=64, metavar="N", help="independent runs at a time, where there is chance")
    add("--seed", type=count, default=0, help="of gradients, noise and coins")
    add("--quick", action="store_true", help="takes seconds: other defaults, for few counterexamples and copies")
    add("--out", type=Path, default=Path("out"), metavar="FOLDER", help="where the report goes: .md, .json and .png")
    add("--report", action="store_true", help=f"write it to {RESULTS} instead")
    add("--quiet", action="store_true", help="no progress bar")
    with said_once():
        args = parse(parser, QUICK)
        if mpisign.size() < RANKS:
            parser.error(f"this needs {RANKS} ranks, and there are {mpisign.size()}: mpirun -n {RANKS} python ...")
        if args.copies < 2:
            parser.error("--copies 1 has no standard error: take two or more, such as --copies 16")
    return args


if __name__ == "__main__":
    main()
