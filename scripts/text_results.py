"""What trainings of train_text.py gave: tables, plots and reports, of several runs of the script too."""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from experiments import markdown_table, shown, write_report
from flags import end
from rich.console import Console
from rich.table import Table
from text_contenders import SAME_LOSSES

import mpisign

__all__ = ["Result", "gather", "show", "timed"]

ALIKE = (
    *("layers", "width", "heads", "context", "megabytes", "batch_size", "eval_windows", "decay", "warmup"),
    *("precision", "dgc_ratio", "dgc_clip"),
)
"""Options that reports must have in common to be compared."""

TRAINED = ("epochs", "epoch_windows", "data")
"""The same, but not where steps are only timed here, for which a few on any text will do."""

MANY = 4  # contenders, of which a report says more than their last losses
SETTLED = 2  # steps after which a step takes as long as the others


@dataclass(frozen=True)
class Result:
    """What one training gave.

    Attributes:
        lr: the highest learning rate.
        parameters: how many the model has.
        losses: of each step, in nats, averaged over the ranks. Empty where runs were gathered.
        seconds, bytes_sent: of each step, on rank 0, without evaluations. No seconds where runs were gathered.
        steps, bits: when the model was evaluated, and the bits it needed for a byte of the validation text.
    """

    contender: str
    label: str
    seed: int
    lr: float
    parameters: int
    exchange: str
    losses: list[float]
    seconds: list[float]
    bytes_sent: list[int]
    steps: list[int]
    bits: list[float]

    def curve(self, by: str) -> list[float]:
        """What had been spent in all, ``steps``, ``bytes_sent`` or ``seconds``, at each evaluation."""
        if by == "steps":
            return list(map(float, self.steps))
        spent = list(accumulate(getattr(self, by)))
        return [spent[step - 1] for step in self.steps]

    def until(self, bits: float, by: str) -> float:
        """What had been spent when the loss first was ``bits`` or less, between evaluations on a line; inf: never."""
        at = next((i for i, value in enumerate(self.bits) if value <= bits), None)
        if at is None:
            return math.inf
        spent = self.curve(by)
        if at == 0:
            return spent[0]
        share = (self.bits[at - 1] - bits) / (self.bits[at - 1] - self.bits[at])
        return spent[at - 1] + share * (spent[at] - spent[at - 1])


# ------------------------------------------------------------------------------------------- of several reports


def gather(args: argparse.Namespace, paths: Sequence[Path]) -> tuple[list[Result], dict[str, int]]:
    """The runs of several reports' JSON files, and the bytes of their text. Ends the job if they do not fit.

    What an old report does not say of its options is not compared.
    """
    names = ALIKE if args.losses else ALIKE + TRAINED
    now = {"ranks": mpisign.size(), **{name: getattr(args, name) for name in names}}
    now |= {"data": shown(args.data)} if "data" in now else {}
    results: list[Result] = []
    sizes: dict[str, int] = {}
    for path in paths:
        try:
            data = json.loads(path.read_text())
            runs = [Result(**{field.name: run[field.name] for field in fields(Result)}) for run in data["runs"]]
            was = {"ranks": data["ranks"], **{name: data["options"].get(name, now[name]) for name in names}}
            sizes = data["text_bytes"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            end(f"{path} is no report of train_text.py: {error}")
        for name, value in was.items():
            if value != now[name]:
                option = "" if name == "ranks" else f", or add --{name.replace('_', '-')} {value} if it is so in all"
                end(f"{path} was made with {name} {value}, and now it is {now[name]}: leave it out{option}")
        for run in runs:
            if results and run.steps != results[0].steps:
                end(
                    f"{path} has {run.contender} on seed {run.seed} evaluated after steps {_few(run.steps)}, and "
                    f"{results[0].contender} of an earlier run was after {_few(results[0].steps)}: leave one out"
                )
            if any((run.contender, run.seed) == (other.contender, other.seed) for other in results):
                end(f"{path} has {run.contender} on seed {run.seed}, which an earlier file has, too: leave one out")
            results.append(replace(run, losses=[], seconds=[]))
    return results, sizes


def _few(steps: Sequence[int]) -> str:
    return " ".join(map(str, steps if len(steps) < MANY else (steps[0], "...", steps[-1])))


def timed(results: Sequence[Result], measured: Sequence[Result]) -> list[Result]:
    """Runs with the seconds that their steps would have taken where others were ``measured``.

    A step takes as long as the median one of the same contender which sent about as much.
    """
    by_name = {run.contender: run for run in results}
    composed = []
    for its in measured:
        costs = list(zip(its.bytes_sent, its.seconds, strict=True))[SETTLED:]
        name = SAME_LOSSES.get(its.contender, its.contender)
        if name not in by_name:
            end(f"--losses has no training by {name}, whose seconds were to be added: give --only what it has")
        for run in (run for run in results if run.contender == name):
            sent = run.bytes_sent
            if name != its.contender:
                sent = [round(statistics.median(cost[0] for cost in costs))] * len(sent)
            known = {bytes_sent: _seconds(bytes_sent, costs) for bytes_sent in set(sent)}
            seconds = [known[bytes_sent] for bytes_sent in sent]
            composed.append(replace(run, contender=its.contender, label=its.label, bytes_sent=sent, seconds=seconds))
    return composed


def _seconds(bytes_sent: int, costs: Sequence[tuple[int, float]]) -> float:
    nearest = min((cost[0] for cost in costs), key=lambda its: abs(its - bytes_sent))
    return statistics.median(seconds for its, seconds in costs if abs(its - nearest) <= 0.1 * nearest)


# ------------------------------------------------------------------------------------------------- what is shown


def show(args: argparse.Namespace, results: Sequence[Result], sizes: Mapping[str, int]) -> None:
    """Print the table; write the report. For one rank to call."""
    groups = {result.label: [other for other in results if other.label == result.label] for result in results}
    seeds = sorted({result.seed for result in results})
    title = (
        f"Python's library: {results[0].parameters:,} parameters, ranks: {mpisign.size()}, "
        f"steps: {results[0].steps[-1]}, seeds: {len(seeds)}"
    )
    columns, rows = compare(groups, args.within)
    table = Table(title=title)
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left")
    for row in rows:
        table.add_row(*row)
    # mpirun gives each rank a terminal of its own, so rich would colour what goes to a file in the end.
    Console(color_system=None, width=120).print(table)
    data = {
        "seeds": seeds,
        "options": vars(args),
        "text_bytes": sizes,
        "runs": [asdict(result) for result in results],
    }
    print(f"report: {write_report(args.out, 'text', report(groups, args, sizes), data, {'': lambda: draw(groups)})}")


def target_of(groups: Mapping[str, Sequence[Result]], within: float | None) -> float:
    """Bits per byte to compare at: so much over AdamW's mean at the end, or else what all trainings reached."""
    results = [result for its in groups.values() for result in its]
    adamw = [result.bits[-1] for result in results if result.contender in ("adamw", *SAME_LOSSES)]
    if within is not None and adamw:
        return statistics.fmean(adamw) + within
    return max(min(result.bits) for result in results)


def compare(groups: Mapping[str, Sequence[Result]], within: float | None) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: means over the seeds; of several, the range of the last loss."""
    target = target_of(groups, within)
    several = any(len(results) > 1 for results in groups.values())
    columns = ["", "bits per byte", *(["range"] if several else []), "bits sent", "MB sent", "s a step"]
    columns += [f"until {target:.2f} bits: steps", "MB", "s"]
    rows = []
    for label, results in groups.items():
        bits = [result.bits[-1] for result in results]
        seconds = [second for result in results for second in result.seconds]
        sent = statistics.fmean(sum(result.bytes_sent) for result in results)
        a_step = statistics.fmean(8 * sum(r.bytes_sent) / len(r.bytes_sent) / r.parameters for r in results)
        until = {by: statistics.fmean(r.until(target, by) for r in results) for by in ("steps", "bytes_sent")}
        waited = statistics.fmean(result.until(target, "seconds") for result in results) if seconds else math.inf
        rows.append(
            [
                label,
                f"{statistics.fmean(bits):.3f}",
                *([f"{min(bits):.3f} to {max(bits):.3f}"] if several else []),
                f"{a_step:.3g}",
                f"{sent / 1e6:,.1f}",
                _said(statistics.fmean(seconds) if seconds else math.inf, ".3f"),
                _said(until["steps"], ".0f"),
                _said(until["bytes_sent"] / 1e6, ",.1f"),
                _said(waited, ".1f"),
            ]
        )
    return columns, rows


def _said(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "-"


def report(groups: Mapping[str, Sequence[Result]], args: argparse.Namespace, sizes: Mapping[str, int]) -> str:
    """What was found, in Markdown."""
    columns, rows = compare(groups, args.within)
    everything = [result for results in groups.values() for result in results]
    text, validation = (f"{size / 1e6:.2f}" for size in sizes.values())
    rates = ", ".join(f"{label} {results[0].lr:g}" for label, results in groups.items())
    return f"""# Python's own library by a transformer, on {mpisign.size()} ranks

{found(groups, target_of(groups, args.within))}

{markdown_table(columns, rows)}

The model has {everything[0].parameters:,} parameters ({args.layers} layers of width {args.width}) and sees
{args.context} bytes; {text} MB of source files to train on, {validation} MB of others to validate, of Python's library.
A step takes {args.batch_size} windows on each rank. Bytes are those that rank 0 sends, up and down; `bits sent` is how
many that is a parameter and step. {clock(args)}

Highest learning rates: {rates}. `--help` says how they were found."""


def clock(args: argparse.Namespace) -> str:
    """What the seconds are."""
    if args.losses:
        return (
            "Losses and bytes are those of an earlier report, and a step takes as long as the median one measured here "
            "of the same contender which sent about as much."
        )
    if args.gather:
        return "The trainings were run one after another beside others' work, so that their seconds say nothing."
    return "Seconds are rank 0's, without evaluations and checkpoints."


def found(groups: Mapping[str, Sequence[Result]], target: float) -> str:
    """A paragraph."""
    if len(groups) == 1 or mpisign.size() == 1:
        return "One training, or one rank: nothing to compare."
    last = {label: statistics.fmean(result.bits[-1] for result in results) for label, results in groups.items()}
    if len(groups) > MANY or not all(result.seconds for results in groups.values() for result in results):
        named = ", ".join(f"{label} {last[label]:.3f}" for label in sorted(last, key=last.__getitem__))
        return f"Bits a byte at the end, means over the seeds: {named}."

    def mean(label: str, by: str) -> float:
        return statistics.fmean(result.until(target, by) for result in groups[label])

    first, *others = groups
    return " ".join(
        f"To {target:.2f} bits a byte, {other} sends {mean(other, 'bytes_sent') / mean(first, 'bytes_sent'):.2g} times "
        f"the bytes of {first}, in {mean(other, 'steps') / mean(first, 'steps'):.2g} times its steps and "
        f"{mean(other, 'seconds') / mean(first, 'seconds'):.2g} times its seconds."
        for other in others
    )


def draw(groups: Mapping[str, Sequence[Result]]) -> Any:
    """Validation loss by step, by byte sent and by second: the mean over the seeds, in a band of their range."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure  # slow to import, and one rank needs it

    ways = {"steps": "steps", "bytes_sent": "megabytes sent by a rank", "seconds": "seconds"}
    if not all(result.seconds for results in groups.values() for result in results):
        del ways["seconds"]
    figure = Figure(figsize=(12, 4.2 if len(groups) <= MANY else 5.6), layout="constrained")
    panels = figure.subplots(1, len(ways), sharey=True)
    colors = colormaps["tab10" if len(groups) <= 10 else "tab20"]
    for axes, (by, heading) in zip(panels, ways.items(), strict=True):
        for place, (label, results) in enumerate(groups.items()):
            spent = np.mean([result.curve(by) for result in results], axis=0) / (1e6 if by == "bytes_sent" else 1.0)
            bits = np.array([result.bits for result in results])
            axes.plot(spent, bits.mean(0), color=colors(place), marker=".", markersize=3, linewidth=1.3, label=label)
            axes.fill_between(spent, bits.min(0), bits.max(0), color=colors(place), alpha=0.15, linewidth=0)
        axes.set_xlabel(heading)
        axes.grid(alpha=0.3)
    if mpisign.size() > 1:
        panels[1].set_xscale("log")
    panels[0].set_ylabel("validation loss, bits per byte")
    panels[0].legend(fontsize=None if len(groups) <= MANY else 8)
    return figure
