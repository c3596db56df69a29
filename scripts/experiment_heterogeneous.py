"""What each method learns if every rank holds one class of the handwritten digits: data as different as they get.

A vote asks how many ranks gain, not how much, and nine of ten lose by what a rank with a class of its own wants. Beside
it, the remedy of noisy signSGD: noise makes the share of votes follow the magnitude, and too much of it is just noise.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import torch
from experiments import Recipe, make_parser, markdown_table, parse, train_fresh, write_report
from flags import amount, end, progress_bar, said_once
from rich.console import Console
from rich.table import Table

import mpisign

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

EXAMPLES = """\
examples:
  mpirun -n 10 --oversubscribe python scripts/experiment_heterogeneous.py
  mpirun -n 5 --oversubscribe python scripts/experiment_heterogeneous.py --quick
  mpirun -n 10 --oversubscribe python scripts/experiment_heterogeneous.py --methods signum dgc --steps 500
  mpirun -n 10 --oversubscribe python scripts/experiment_heterogeneous.py --noise 0 0.01 0.1 --seeds 0 1 2 3 4
"""

# Learning rates: one for each family, the best of those tried in steps of a factor of 2 (votes 4), by the mean test
# accuracy of the family's methods on seed 100, 10 ranks with a class each, 150 steps.
VOTE, DENSE, ADAMW = 0.02, 1.0, 0.005
NOISE = 0.03

METHODS: dict[str, Recipe] = {
    "signsgd": Recipe(mpisign.signsgd(), VOTE),
    "signum": Recipe(mpisign.signum(), VOTE),
    "lion": Recipe(mpisign.lion(), VOTE),
    "scaled_vote_every_8": Recipe(mpisign.scaled_vote(), ADAMW, every=8),
    "noisy_signsgd": Recipe(mpisign.noisy_signsgd(NOISE), VOTE),
    "sto_sign": Recipe(mpisign.sto_sign(), VOTE),
    "ternary_vote": Recipe(mpisign.ternary_vote(A=0.1, B=0.1), VOTE),
    "sparsign": Recipe(mpisign.sparsign(budget=10.0), VOTE),
    "ef_signsgd": Recipe(mpisign.ef_signsgd(), DENSE, momentum=0.9),
    "double_squeeze": Recipe(mpisign.double_squeeze(), DENSE, momentum=0.9),
    "ef21_sgdm": Recipe(mpisign.ef21_sgdm(ratio=0.1), DENSE),
    "top_k": Recipe(mpisign.top_k(ratio=0.1), DENSE, momentum=0.9),
    "dgc": Recipe(
        mpisign.dgc(ratio=0.1, warmup_epochs=0, sample=None), DENSE / 10
    ),  # its momentum is a sum, not a mean
    "mean": Recipe(mpisign.mean(), DENSE, momentum=0.9),
    "median": Recipe(mpisign.median(), DENSE),
}
FAMILIES = {
    "plain votes, and the median": ("signsgd", "signum", "lion", "scaled_vote_every_8", "median"),
    "votes in proportion to the gradient": ("noisy_signsgd", "sto_sign", "ternary_vote", "sparsign"),
    "means, compressed or not": ("ef_signsgd", "double_squeeze", "ef21_sgdm", "top_k", "dgc", "mean"),
}
SWEPT: dict[str, Callable[[float], Recipe]] = {
    "noisy_signsgd": lambda b: Recipe(mpisign.noisy_signsgd(b) if b else mpisign.signsgd(), VOTE),
    "noisy_median": lambda b: Recipe(
        mpisign.noisy_median(b) if b else mpisign.median(momentum=0.0), DENSE, momentum=0.9
    ),
}
QUICK = {
    "methods": ["signsgd", "noisy_signsgd", "ef_signsgd", "mean"],
    "noise": [0.0, 0.03, 1.0],
    "seeds": [0],
    "steps": 100,
}


@dataclass(frozen=True)
class Curve:
    """Trainings by one method, on all seeds.

    Attributes:
        name: of the method.
        noise: the standard deviation of what it adds to each coordinate, in the sweep; else None.
        accuracies: on the test images, one a seed.
        losses: of each step, for each seed.
    """

    name: str
    noise: float | None
    accuracies: list[float]
    losses: list[list[float]]

    @property
    def accuracy(self) -> float:
        return statistics.fmean(self.accuracies)


def main() -> None:
    mpisign.init()
    torch.set_num_threads(1)
    args = parse_arguments()
    methods, sweep = run(args)
    if mpisign.rank() == 0:
        show(args, methods, sweep)


def run(args: argparse.Namespace) -> tuple[list[Curve], list[Curve]]:
    """All trainings: of the methods, and of the sweep over the noise. **Collective.**"""
    jobs: list[tuple[str, float | None, Recipe]] = [(name, None, METHODS[name]) for name in args.methods]
    jobs += [(name, noise, recipe(noise)) for name, recipe in SWEPT.items() for noise in args.noise]
    curves = []
    for name, noise, recipe in progress_bar(jobs, unit="method", quiet=args.quiet):
        scaled = replace(recipe, lr=args.lr_scale * recipe.lr)
        outcomes = [
            train_fresh(
                scaled, seed=seed, steps=args.steps, batch_size=args.batch_size, hidden=args.hidden, by_class=True
            )
            for seed in args.seeds
        ]
        curves.append(Curve(name, noise, [one.accuracy for one in outcomes], [one.losses for one in outcomes]))
    return curves[: len(args.methods)], curves[len(args.methods) :]


# ------------------------------------------------------------------------------------------------- the results


def show(args: argparse.Namespace, methods: Sequence[Curve], sweep: Sequence[Curve]) -> None:
    """Print the tables and write the report."""
    # mpirun's terminal has no size, and its colours would go to a file in the end.
    console = Console(color_system=None, width=100)
    console.print(
        on_terminal(f"one class a rank, ranks: {mpisign.size()}, seeds: {len(args.seeds)}", methods_table(methods))
    )
    console.print(on_terminal("noise against accuracy in %", noise_table(args, sweep)))
    figures = {"methods": lambda: methods_figure(methods), "noise": lambda: noise_figure(args, sweep)}
    data = {
        "options": vars(args),
        "seeds": args.seeds,
        "learning_rates": {name: args.lr_scale * recipe.lr for name, recipe in METHODS.items()},
        "methods": [asdict(curve) for curve in methods],
        "sweep": [asdict(curve) for curve in sweep],
    }
    print(f"report: {write_report(args.out, 'heterogeneous', describe(args, methods, sweep), data, figures)}")


Cells = tuple[list[str], list[list[str]]]
"""The columns of a table, and its rows."""


def methods_table(methods: Sequence[Curve]) -> Cells:
    rows = []
    for curve in sorted(methods, key=lambda curve: -curve.accuracy):
        first, last = (statistics.fmean(losses[at] for losses in curve.losses) for at in (0, -1))
        rows.append([curve.name, spread(curve), f"{first:.2f}", f"{last:.2f}"])
    return ["method", "test accuracy, %", "loss at first", "loss at last"], rows


def noise_table(args: argparse.Namespace, sweep: Sequence[Curve]) -> Cells:
    rows = []
    for noise in args.noise:
        found = {curve.name: curve for curve in sweep if curve.noise == noise}
        rows.append([f"{noise:g}", *(spread(found[name]) for name in SWEPT)])
    return ["noise", *SWEPT], rows


def spread(curve: Curve) -> str:
    deviation = f" ± {100 * statistics.stdev(curve.accuracies):.1f}" if len(curve.accuracies) > 1 else ""
    return f"{100 * curve.accuracy:.1f}{deviation}"


def on_terminal(title: str, cells: Cells) -> Table:
    columns, rows = cells
    table = Table(title=title)
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left")
    for row in rows:
        table.add_row(*row)
    return table


def describe(args: argparse.Namespace, methods: Sequence[Curve], sweep: Sequence[Curve]) -> str:
    """The report's text."""
    ranked = sorted(methods, key=lambda curve: -curve.accuracy)
    named = ", ".join(f"`{curve.name}` {100 * curve.accuracy:.0f} %" for curve in ranked)
    summary = [f"Test accuracy if the classes are dealt to {mpisign.size()} ranks: {named}."]
    for name in SWEPT:
        line = [curve for curve in sweep if curve.name == name]
        best = max(line, key=lambda curve: curve.accuracy)
        summary.append(
            f"`{name}` does best with noise {best.noise:g}: {100 * best.accuracy:.0f} %, against "
            f"{100 * line[0].accuracy:.0f} % with {line[0].noise:g} and {100 * line[-1].accuracy:.0f} % with "
            f"{line[-1].noise:g}."
        )
    rates = ", ".join(f"{name} {args.lr_scale * METHODS[name].lr:g}" for name in args.methods)
    return "\n\n".join(
        [
            f"# One class a rank: {len(methods)} methods on data of different kinds",
            " ".join(summary),
            f"## Methods\n\n{markdown_table(*methods_table(methods))}",
            f"## Accuracy by the noise\n\n{markdown_table(*noise_table(args, sweep))}",
            "## How to read it\n\n"
            "- Class c is with rank c modulo the number of ranks. The loss is the mean over the ranks, so over all "
            "classes, of their batches; log 10 = 2.30 is that of guessing, whose accuracy is 10 %. Numbers are means "
            "over the seeds, ± their standard deviation; bands in the figures are their range.\n"
            "- Noise is the standard deviation of what is added to each coordinate of a gradient. Without it, "
            "`noisy_signsgd` is `signsgd` and `noisy_median` is `median`.\n"
            "- `scaled_vote_every_8` is AdamW on each rank's own gradients; after every eighth step the ranks vote on "
            "how far their parameters have moved.\n"
            f"- {args.steps} steps, {args.batch_size} images a rank and step, {args.hidden} hidden units, cosine "
            f"schedule from these learning rates: {rates}. There is one for each family, tuned on other seeds: the "
            "best of those tried in steps of a factor of 2.",
        ]
    )


def methods_figure(methods: Sequence[Curve]) -> Figure:
    """Loss by step, a panel for each family."""
    from matplotlib.figure import Figure  # slow to import, and one rank needs it

    figure = Figure(figsize=(13, 4.4), layout="constrained")
    panels = figure.subplots(1, len(FAMILIES), sharey=True)
    found: Mapping[str, Curve] = {curve.name: curve for curve in methods}
    for axes, (family, members) in zip(panels, FAMILIES.items(), strict=True):
        curves = [found[name] for name in members if name in found]
        for curve in curves:
            losses = torch.tensor(curve.losses)
            window = max(1, losses.shape[1] // 40)
            smooth = losses.unfold(1, window, 1).mean(-1)  # (seeds, steps - window + 1)
            band(axes, range(window, losses.shape[1] + 1), smooth, f"{curve.name}: {100 * curve.accuracy:.0f} %")
        axes.axhline(2.303, color="grey", linestyle=":")
        axes.set(xlabel="step", title=family)
        axes.grid(alpha=0.3)
        if curves:
            axes.legend(title="test accuracy", fontsize=8, title_fontsize=8, loc="lower left")
    panels[0].set(ylabel="training loss over all classes", yscale="log", ylim=(0.002, 4))
    panels[0].text(1, 2.4, "guessing", color="grey", size=8)
    return figure


def noise_figure(args: argparse.Namespace, sweep: Sequence[Curve]) -> Figure:
    """Accuracy by noise, with none at the left."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.4), layout="constrained")
    axes = figure.subplots()
    for name in SWEPT:
        line = [curve for curve in sweep if curve.name == name]
        accuracies = 100 * torch.tensor([curve.accuracies for curve in line]).T
        band(axes, range(len(line)), accuracies, name, marker="o")
    axes.set_xticks(range(len(args.noise)), [f"{noise:g}" for noise in args.noise])
    axes.set(xlabel="standard deviation of the noise on each coordinate", ylabel="test accuracy, %", ylim=(0, 102))
    axes.set_title(f"One class a rank, {mpisign.size()} ranks: some noise helps a vote, too much drowns it")
    axes.axhline(10, color="grey", linestyle=":")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def band(axes: Axes, x: range, values: torch.Tensor, label: str, marker: str | None = None) -> None:
    """The mean of ``values``, (seeds, len(x)), and their range."""
    (drawn,) = axes.plot(x, values.mean(0), label=label, marker=marker)
    axes.fill_between(x, values.amin(0), values.amax(0), color=drawn.get_color(), alpha=0.15, linewidth=0)


# ------------------------------------------------------------------------------------------------- the options


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__, EXAMPLES)
    parser.set_defaults(steps=150)
    add = parser.add_argument
    add("--methods", nargs="+", choices=METHODS, metavar="METHOD", default=list(METHODS), help=", ".join(METHODS))
    noise = [0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0]
    add("--noise", type=amount, nargs="+", metavar="B", default=noise, help="the sweep's, in the gradient's units")
    with said_once():
        args = parse(parser, QUICK)
    if mpisign.size() == 1:
        end("one rank holds all classes, so nothing differs: start with mpirun -n 10 --oversubscribe")
    args.noise.sort()
    return args


if __name__ == "__main__":
    main()
