"""What hostile ranks do to each method: methods x attacks x numbers of adversaries, on the handwritten digits.

Every cell is a training of a small network on real MPI ranks, of which the first f are adversaries; its number is the
accuracy on test images. The worst case of a method is its lowest cell: whoever attacks may choose how. Beside it, the
signSGD paper's experiment: ever more ranks that send the negation of what they should.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

import torch
from experiments import (
    Attack,
    LabelFlip,
    Outcome,
    Recipe,
    make_parser,
    markdown_table,
    parse,
    train_fresh,
    write_report,
)
from flags import end, progress_bar, said_once, whole
from rich.console import Console
from rich.table import Table

import mpisign
from mpisign import attacks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EXAMPLES = """\
examples:
  mpirun -n 15 --oversubscribe python scripts/experiment_byzantine.py
  mpirun -n 5 --oversubscribe python scripts/experiment_byzantine.py --quick
  mpirun -n 15 --oversubscribe python scripts/experiment_byzantine.py --methods signum median --f 1 4 7
  mpirun -n 15 --oversubscribe python scripts/experiment_byzantine.py --attacks none --lr-scale 2 --seeds 100 101
"""

# Learning rates: one for each family, the best of those tried in steps of a factor of 2, by the mean test accuracy of
# the family's methods without adversaries on seed 100, 15 ranks, 30 steps (see the last example).
VOTE, DENSE, FEEDBACK, ADAMW = 0.04, 4.0, 2.0, 0.04

METHODS: dict[str, Callable[[int], Recipe]] = {
    "signsgd": lambda f: Recipe(mpisign.signsgd(), VOTE),
    "signum": lambda f: Recipe(mpisign.signum(), VOTE),
    "lion": lambda f: Recipe(mpisign.lion(), VOTE),
    "scaled_vote_every_8": lambda f: Recipe(mpisign.scaled_vote(), ADAMW, every=8),
    "sto_sign": lambda f: Recipe(mpisign.sto_sign(), VOTE),
    "ternary_vote": lambda f: Recipe(mpisign.ternary_vote(A=0.05, B=0.1), VOTE),
    "ef_signsgd": lambda f: Recipe(mpisign.ef_signsgd(), FEEDBACK, momentum=0.9),
    "double_squeeze": lambda f: Recipe(mpisign.double_squeeze(), FEEDBACK, momentum=0.9),
    "mean": lambda f: Recipe(mpisign.mean(), DENSE, momentum=0.9),
    "median": lambda f: Recipe(mpisign.median(), DENSE),
    "trimmed_mean": lambda f: Recipe(mpisign.trimmed_mean(f), DENSE),
    "krum": lambda f: Recipe(mpisign.krum(f), DENSE),
    "multi_krum": lambda f: Recipe(mpisign.multi_krum(f), DENSE),
    "geometric_median": lambda f: Recipe(mpisign.geometric_median(), DENSE),
    "centered_clipping": lambda f: Recipe(mpisign.centered_clipping(radius=1.0), DENSE),
    "nearest_neighbour_mixing": lambda f: Recipe(mpisign.nearest_neighbour_mixing(f), DENSE),
    "monna": lambda f: Recipe(mpisign.monna(f, momentum=0.9), DENSE),
}
BLIND: dict[str, Attack] = {
    "zero": attacks.Constant(0.0),
    "nan": attacks.Constant(float("nan")),
    "inf": attacks.Constant(float("inf")),
    "random_signs": attacks.RandomSigns(),
    "gaussian": attacks.Gaussian(),
    "label_flip": LabelFlip(),
    "sign_flip": attacks.SignFlip(),
    "scaled": attacks.Scaled(),
}
OMNISCIENT: dict[str, Attack] = {
    "sign_flip_omniscient": attacks.SignFlip(omniscient=True),
    "inner_product": attacks.InnerProduct(),
    "little_is_enough": attacks.ALittleIsEnough(),
    "mimic": attacks.Mimic(),
    "colluding_signs": attacks.ColludingSigns(),
}
ATTACKS: dict[str, Attack | None] = {"none": None, **BLIND, **OMNISCIENT}
QUICK = {
    "methods": ["signum", "mean", "median", "multi_krum"],
    "attacks": ["none", "sign_flip", "scaled", "colluding_signs"],
    "seeds": [0],
}
INVERTED = [("signsgd", "sign_flip"), ("signum", "sign_flip"), ("mean", "sign_flip"), ("mean", "scaled")]
INVERTED_LABELS = ["signsgd", "signum", "mean", "mean; adversaries send -100 g"]


@dataclass(frozen=True)
class Cell:
    """A method under an attack.

    Attributes:
        accuracies: on the test images, one a seed.
        diverged: of how many seeds the parameters are no numbers any more.
        losses: of each step, for each seed.
        reason: why there is nothing else, where the method cannot run.
    """

    method: str
    attack: str
    f: int
    accuracies: list[float]
    diverged: int
    losses: list[list[float]]
    reason: str = ""

    @property
    def accuracy(self) -> float:
        return statistics.fmean(self.accuracies)


def main() -> None:
    mpisign.init()
    torch.set_num_threads(1)
    logging.getLogger("mpisign.attacks").setLevel(logging.ERROR)  # every training would say who is an adversary
    args = parse_arguments()
    grid, inverted = run(args)
    if mpisign.rank() == 0:
        show(args, grid, inverted)


def run(args: argparse.Namespace) -> tuple[list[Cell], list[Cell]]:
    """All trainings: the grid's cells and those of the inverted workers. **Collective.**"""
    keys = list(itertools.product(args.f, args.methods, args.attacks))
    most = (mpisign.size() - 1) // 2
    more = [] if args.no_inverted else [(f, *pair) for pair in INVERTED for f in range(most + 1)]

    @cache  # the two share some, and many are the same for every f
    def train(recipe: Recipe, attack: str, adversaries: int, seed: int) -> Outcome | str:
        try:
            return train_fresh(
                recipe,
                seed=seed,
                steps=args.steps,
                batch_size=args.batch_size,
                hidden=args.hidden,
                attack=ATTACKS[attack],
                adversaries=range(adversaries),
            )
        except mpisign.OptionError as error:
            return str(error)

    cells = []
    for f, method, attack in progress_bar(keys + more, unit="cell", quiet=args.quiet):
        recipe = METHODS[method](f)
        recipe = replace(recipe, lr=args.lr_scale * recipe.lr)
        attacked = ("none", 0) if attack == "none" or f == 0 else (attack, f)
        outcomes = [train(recipe, *attacked, seed) for seed in args.seeds]
        done = [outcome for outcome in outcomes if isinstance(outcome, Outcome)]
        cells.append(
            Cell(
                method,
                attack,
                f,
                [outcome.accuracy for outcome in done],
                sum(not outcome.finite for outcome in done),
                [outcome.losses for outcome in done],
                "".join(outcome for outcome in outcomes[:1] if isinstance(outcome, str)),
            )
        )
    return cells[: len(keys)], cells[len(keys) :]


# ------------------------------------------------------------------------------------------------- the results


def show(args: argparse.Namespace, grid: Sequence[Cell], inverted: Sequence[Cell]) -> None:
    """Print the tables and write the report."""
    # mpirun's terminal has no size, and its colours would go to a file in the end.
    console = Console(color_system=None, width=60 + 9 * len(args.attacks))
    for f in args.f:
        table = Table(title=f"test accuracy in %, {f} of {mpisign.size()} ranks hostile, seeds: {len(args.seeds)}")
        table.add_column("method")
        for attack in (*args.attacks, "worst"):
            table.add_column(attack.replace("_", "\n"), justify="right")
        for method in args.methods:
            row = row_of(grid, method, f)
            table.add_row(method, *(said(row[attack]) for attack in args.attacks), said(worst(row)))
        console.print(table)
    figures = {"heat-map": lambda: heat_map(args, grid)}
    if inverted:
        figures["inverted"] = lambda: inverted_figure(args, inverted)
    data = {
        "options": vars(args),
        "seeds": args.seeds,
        "learning_rates": {name: args.lr_scale * METHODS[name](1).lr for name in METHODS},
        "cells": [asdict(cell) for cell in grid],
        "inverted": [asdict(cell) for cell in inverted],
    }
    print(f"report: {write_report(args.out, 'byzantine', describe(args, grid, inverted), data, figures)}")


def row_of(grid: Sequence[Cell], method: str, f: int) -> dict[str, Cell]:
    return {cell.attack: cell for cell in grid if (cell.method, cell.f) == (method, f)}


def worst(row: Mapping[str, Cell]) -> Cell:
    """The cell of the attack that does most harm."""
    return min(row.values(), key=lambda cell: 1.0 if cell.reason else cell.accuracy)


def said(cell: Cell) -> str:
    if cell.reason:
        return "-"
    return f"{100 * cell.accuracy:.0f}" + ("†" if cell.diverged else "")


def describe(args: argparse.Namespace, grid: Sequence[Cell], inverted: Sequence[Cell]) -> str:
    """The report's text."""
    size = mpisign.size()
    summary, tables, reasons = [], [], []
    for f in args.f:
        rows = {method: row_of(grid, method, f) for method in args.methods}
        lowest = {method: worst(row) for method, row in rows.items() if not worst(row).reason}
        ranked = sorted(lowest, key=lambda method: -lowest[method].accuracy)
        named = ", ".join(f"`{method}` {100 * lowest[method].accuracy:.0f} %" for method in ranked)
        summary.append(f"With {f} of {size} ranks hostile the worst cases are: {named}.")
        lines = []
        for method, cell in ((method, lowest[method]) for method in ranked):
            deviation = statistics.stdev(cell.accuracies) if len(cell.accuracies) > 1 else 0.0
            alone = rows[method].get("none")
            without = f"{100 * alone.accuracy:.1f}" if alone else ""
            lines.append([f"`{method}`", without, f"{100 * cell.accuracy:.1f} ± {100 * deviation:.1f}", cell.attack])
        columns = ["method", "no attack, %", "worst case, %", "by"]
        tables.append(f"## Worst cases, {f} of {size} ranks hostile\n\n{markdown_table(columns, lines)}")
        reasons += [
            f"- `{method}`, f = {f}: {row[attack].reason}"
            for method, row in rows.items()
            for attack in args.attacks[:1]
            if row[attack].reason
        ]
    parts = [f"# Hostile ranks: {len(args.methods)} methods under attack", " ".join(summary), *tables]
    if reasons:
        parts.append("## Cells that are empty\n\n" + "\n".join(reasons))
    if inverted:
        columns = ["ranks that invert", *INVERTED_LABELS]
        lines = []
        for f in range((size - 1) // 2 + 1):
            cells = [
                cell for pair in INVERTED for cell in inverted if (cell.f, (cell.method, cell.attack)) == (f, pair)
            ]
            lines.append([str(f), *(said(cell) for cell in cells)])
        parts.append(f"## The paper's inverted workers: test accuracy in %\n\n{markdown_table(columns, lines)}")
    rates = ", ".join(f"{name} {args.lr_scale * METHODS[name](1).lr:g}" for name in args.methods)
    parts.append(
        "## How to read it\n\n"
        "- A number is the accuracy on 360 test images, the mean over the seeds; guessing gives 10 %. † marks "
        "trainings after which parameters are no numbers: such a model names every image alike.\n"
        "- The first f ranks are hostile, and each method that takes f is told the right one. They replace what leaves "
        "their momentum; other memories (noise, error feedback) get their vector as the gradient. `monna` sends "
        "parameters, so those are what its adversaries replace; the worst honest rank is measured. "
        "`scaled_vote_every_8` is AdamW on each rank's own gradients, and differences of parameters that are exchanged "
        "after every eighth step and at the end: those are replaced.\n"
        "- Data are dealt at random. A rank that sends NaN or Inf abstains: the library sees to it.\n"
        f"- {args.steps} steps, {args.batch_size} images a rank and step, {args.hidden} hidden units, cosine schedule "
        f"from these learning rates: {rates}. There is one for each family of methods, tuned without adversaries on "
        "other seeds: the best of those tried in steps of a factor of 2."
    )
    return "\n\n".join(parts)


def heat_map(args: argparse.Namespace, grid: Sequence[Cell]) -> Figure:
    """Methods x attacks, a panel for each f, and the worst case at the end."""
    from matplotlib.figure import Figure  # slow to import, and one rank needs it

    columns = [*args.attacks, "worst case"]
    height = 1.6 + 0.3 * len(args.methods)
    figure = Figure(figsize=(4 + 0.62 * len(columns), height * len(args.f) + 0.9), layout="constrained")
    panels = figure.subplots(len(args.f), squeeze=False)[:, 0]
    for axes, f in zip(panels, args.f, strict=True):
        values = []
        for y, method in enumerate(args.methods):
            row = row_of(grid, method, f)
            cells = [*(row[attack] for attack in args.attacks), worst(row)]
            values.append([float("nan") if cell.reason else 100 * cell.accuracy for cell in cells])
            for x, cell in enumerate(cells):
                shade = "black" if cell.reason or 30 < 100 * cell.accuracy < 88 else "white"
                weight = "bold" if x == len(args.attacks) else "normal"
                axes.text(x, y, said(cell), ha="center", va="center", color=shade, weight=weight, size=9)
        axes.set_facecolor("lightgrey")
        axes.imshow(values, vmin=10, vmax=100, cmap="RdYlBu", aspect="auto")
        axes.axvline(len(args.attacks) - 0.5, color="white", linewidth=6)
        for group, members in (("blind", BLIND), ("they see what the honest send, or collude", OMNISCIENT)):
            places = [x for x, name in enumerate(args.attacks) if name in members]
            if places:
                axes.axvline(places[0] - 0.5, color="white", linewidth=3)
                axes.text(statistics.fmean(places), -0.65, group, ha="center", va="bottom", size=9, style="italic")
        axes.set_title(f"{f} of {mpisign.size()} ranks hostile", weight="bold", loc="left", pad=20)
        axes.set_xticks(range(len(columns)), [name.replace("_", "\n") for name in columns], size=8)
        axes.set_yticks(range(len(args.methods)), args.methods)
        axes.tick_params(length=0)
    figure.colorbar(panels[0].images[0], ax=panels, label="test accuracy, %", shrink=0.5)
    return figure


def inverted_figure(args: argparse.Namespace, cells: Sequence[Cell]) -> Figure:
    """Bernstein et al. 2018: accuracy by the number of inverted workers, and how signum's loss falls with each."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for (method, attack), label in zip(INVERTED, INVERTED_LABELS, strict=True):
        line = [cell for cell in cells if (cell.method, cell.attack) == (method, attack)]
        x = [cell.f for cell in line]
        y = [100 * cell.accuracy for cell in line]
        low, high = ([100 * pick(cell.accuracies) for cell in line] for pick in (min, max))
        (drawn,) = left.plot(x, y, marker="o", label=label, linestyle="-" if attack == "sign_flip" else "--")
        left.fill_between(x, low, high, color=drawn.get_color(), alpha=0.15, linewidth=0)
    left.set(xlabel=f"ranks of {mpisign.size()} that invert what they send", ylabel="test accuracy, %", ylim=(0, 102))
    left.set_title("Accuracy; bands: all seeds")
    left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncol=2)
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.grid(alpha=0.3)
    curves = [cell for cell in cells if cell.method == "signum"]
    for cell in curves:
        mean = torch.tensor(cell.losses).mean(0)
        color = colormaps["viridis"](0.9 * cell.f / max(1, len(curves) - 1))
        right.plot(range(1, len(mean) + 1), mean, color=color, label=f"{cell.f} inverted")
    right.set(xlabel="step", ylabel="training loss of the honest ranks", yscale="log", title="signum")
    right.legend(fontsize=8)
    right.grid(alpha=0.3)
    return figure


# ------------------------------------------------------------------------------------------------- the options


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__, EXAMPLES)
    size = mpisign.size()
    f = sorted({max(1, size // 5), max(1, (size - 2) // 2)})
    add = parser.add_argument
    add("--methods", nargs="+", choices=METHODS, metavar="METHOD", default=list(METHODS), help=", ".join(METHODS))
    add("--attacks", nargs="+", choices=ATTACKS, metavar="ATTACK", default=list(ATTACKS), help=", ".join(ATTACKS))
    add(
        "--f",
        type=whole,
        nargs="+",
        default=f,
        help="numbers of hostile ranks; by default a fifth, and just under half",
    )
    add("--no-inverted", action="store_true", help="leave out the paper's inverted workers")
    with said_once():
        args = parse(parser, QUICK | {"f": f[-1:]})
    if size == 1:
        end("one rank has nobody to be attacked by: start with mpirun -n 15 --oversubscribe")
    if max(args.f) >= size:
        end(f"--f {max(args.f)} leaves no honest rank of {size}: choose {size - 1} at most")
    return args


if __name__ == "__main__":
    main()
