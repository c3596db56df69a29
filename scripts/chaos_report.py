"""What scripts/chaos has found, as tables and figures."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple

from chaos_checks import CHECKS, Problem, Training, final_loss
from chaos_faults import DEADLY, KINDS
from chaos_run import Goodput, Spread
from chaos_times import Times, redone, times
from chaos_training import VARIATIONS
from experiments import markdown_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Found", "Where", "data", "describe", "figures", "summary"]

Found = Sequence[tuple[Training, Sequence[Problem]]]

READING = """\
- A fault strikes when all ranks are back from the last one, after a time drawn as a Poisson process has it. Found: from
  a death to when the first rank has begun to recover. Back: from a death (of two the second, in a stretch without MPI
  its end if that is later, of a SIGSTOP its SIGCONT) to when all ranks that live have made a step. All ranks and the
  tool share this machine's cores.
- "On time" are deaths that were aimed at a recovery, or at a save that ranks wait for, and came before it was over; the
  others came after it, as kills at any moment.
- A relaunch is a start of the whole job from its last checkpoint, where too few ranks were left (fewer than 2, or no
  quorum); steps after that checkpoint are made again, and are no lost steps.
- Every rank writes down each step when it has made it. The checks go by these lines alone, but for the exit code,
  processes and files."""
HERE = """\
- Cut links and lost nodes are not among the faults, nor is a stop for longer: trainings do without `detect_links=`."""
ON_HOSTS = """\
- Ranks are on {} hosts, network namespaces of this machine with a card each, as many on each as on the others or one
  more. Links are cut at the port of the switch between them."""
SILENCE = """\
- Who is silent for {:g} s counts as dead (`detect_links=`): these seconds are a part of what is said of `cut` and
  `silence`, once for each rank of a host in turn. A stretch without MPI takes longer, and nobody is lost by it."""

GOODPUT = """\
Samples that have counted in the end, of {:g} s from the first step on, where ranks die one at a time. In a step each
rank computes for 30 ms without a core, as with a GPU. "Goes on": with those that are left, until fewer than 2 are; then
a relaunch gives all ranks back. "Begins anew": a relaunch from the last checkpoint, 24 steps ago at most, at
each death."""


def _all_times(found: Found) -> dict[str, list[Times]]:
    """By kind."""
    by_kind: dict[str, list[Times]] = {}
    for training, _ in found:
        for struck in training.struck:
            by_kind.setdefault(struck.fault.kind, []).append(times(training.launches[struck.launch], struck))
    return {kind: by_kind[kind] for kind in KINDS if kind in by_kind}


def kinds_table(found: Found) -> str:
    """A row for each kind of fault."""
    stopped = Counter(
        one.fault.kind
        for training, _ in found
        for launch in training.launches[:-1]
        for one in [one for one in training.struck if one.launch == launch.number][-1:]
    )
    rows = []
    for kind, its in _all_times(found).items():
        aimed = [one.on_time for one in its if one.on_time is not None]
        rows.append(
            [
                f"`{kind}`: {KINDS[kind]}",
                str(len(its)),
                f"{sum(aimed)}" if aimed else "",
                *_both([one.found for one in its if one.found is not None]),
                *_both([one.back for one in its if one.back is not None]),
                str(stopped[kind]) if kind in DEADLY else "",
            ]
        )
    columns = ["fault", "struck", "on time", "found, ms", "worst", "back, ms", "worst", "relaunches"]
    return markdown_table(columns, rows)


def _both(seconds: Sequence[float]) -> tuple[str, str]:
    if not seconds:
        return "", ""
    return f"{1e3 * statistics.median(seconds):.0f}", f"{1e3 * max(seconds):.0f}"


def checks_table(found: Found, calm: dict[str, Spread]) -> str:
    """A row for each check."""
    wrong = Counter(problem.check for _, problems in found for problem in problems)
    told = {name: str(wrong[name]) if calm or name != "loss" else "not checked" for name in CHECKS}
    return markdown_table(["check", "violations"], [[text, told[name]] for name, text in CHECKS.items()])


def variations_table(found: Found, calm: dict[str, Spread]) -> str:
    """A row for each way to train."""
    rows = []
    for name in VARIATIONS:
        its = [training for training, _ in found if training.variation == name]
        if not its:
            continue
        losses = [loss for one in its if (loss := final_loss(one)) is not None]
        rows.append(
            [
                f"`{name}`: {VARIATIONS[name].what}",
                str(len(its)),
                str(sum(len(one.struck) for one in its)),
                str(sum(len(one.launches) - 1 for one in its)),
                str(sum(redone(one) for one in its)),
                _range(losses),
                *(map(_range, calm[name].losses) if name in calm else ("", "")),
            ]
        )
    columns = ["training", "times", "faults", "relaunches", "steps made again", "loss at the end"]
    columns += ["without faults", "on 2 ranks"]
    return markdown_table(columns, rows)


def _range(values: Sequence[float]) -> str:
    return f"{min(values):.3f} to {max(values):.3f}" if values else ""


def goodput_table(measured: Sequence[Goodput]) -> str:
    """A row for each mean time between deaths."""
    rows = []
    best = {one.survives: one.samples for one in measured if one.between is None}
    for between in dict.fromkeys(one.between for one in measured):
        row = ["none" if between is None else f"{between:g}"]
        for survives in (True, False):
            its = [one for one in measured if (one.between, one.survives) == (between, survives)]
            for one in its:
                share = f"{100 * one.samples / best[survives]:.0f} %" if survives in best else ""
                row += [f"{one.samples:.0f}", share, str(one.deaths), str(one.relaunches)]
        rows.append(row)
    both = len({one.survives for one in measured}) == 2
    columns = ["mean s between deaths", "goes on: samples/s", "share", "deaths", "relaunches"]
    return markdown_table(columns + (["begins anew: samples/s", "share", "deaths", "relaunches"] if both else []), rows)


def summary(found: Found) -> str:
    """A paragraph."""
    struck = [one for training, _ in found for one in training.struck]
    wrong = Counter(problem.check for _, problems in found for problem in problems)
    deaths = sum(len(one.victims) for one in struck)
    relaunches = sum(len(training.launches) - 1 for training, _ in found)
    by_kind = _all_times(found)
    back = [one.back for kind in ("kill", "segfault", "exception") for one in by_kind.get(kind, []) if one.back]
    text = (
        f"{len(struck)} faults, of which {deaths} ranks have died, in {len(found)} trainings with {relaunches} "
        f"relaunches: {wrong['hang']} hangs, {wrong['steps']} lost or repeated steps, {wrong['replicas']} differences "
        f"between replicas; {sum(wrong.values())} violations in all. "
    )
    if back:
        text += (
            f"After the death of one rank all others had made a step again in {1e3 * statistics.median(back):.0f} ms "
            f"(median; worst {1e3 * max(back):.0f} ms)."
        )
    return text


class Where(NamedTuple):
    """The trainings' ranks, drawn from these; their hosts, 0 for this machine; the silence that counts as death."""

    ranks: Sequence[int]
    hosts: int
    silence: float | None


def describe(found: Found, calm: dict[str, Spread], measured: Sequence[Goodput], where: Where) -> str:
    """The report's text."""
    struck = sum(len(training.struck) for training, _ in found)
    ranks = ", ".join(map(str, sorted(set(where.ranks))))
    wrong = [f"- seed {training.seed}: {its.check}: {its.text}" for training, problems in found for its in problems]
    parts = [
        f"# {struck} faults in trainings of {ranks} ranks",
        summary(found),
        f"## By fault\n\n{kinds_table(found)}",
        f"## What was checked\n\n{checks_table(found, calm)}",
        f"## By training\n\n{variations_table(found, calm)}",
    ]
    if wrong:
        parts.append("## Violations\n\n" + "\n".join(wrong))
    if measured:
        parts.append(f"## Goodput\n\n{goodput_table(measured)}\n\n{GOODPUT.format(measured[0].seconds)}")
    notes = [ON_HOSTS.format(where.hosts)] if where.hosts else []
    notes += [] if where.silence is None else [SILENCE.format(where.silence)]
    parts.append("## How to read it\n\n" + "\n".join([READING, *(notes or [HERE])]))
    return "\n\n".join(parts)


def data(found: Found, calm: dict[str, Spread], measured: Sequence[Goodput]) -> dict[str, Any]:
    """All raw numbers."""
    trainings = []
    for training, problems in found:
        struck = [
            {
                "kind": one.fault.kind,
                "launch": one.launch,
                "living": one.living,
                "struck": one.struck,
                **asdict(times(training.launches[one.launch], one)),
            }
            for one in training.struck
        ]
        trainings.append(
            {
                "seed": training.seed,
                "variation": training.variation,
                "ranks": training.ranks,
                "asynchronous": training.asynchronous,
                "launches": len(training.launches),
                "exit codes": [launch.code for launch in training.launches],
                "seconds": [launch.ended - launch.began for launch in training.launches],
                "steps made again": redone(training),
                "loss": final_loss(training),
                "faults": struck,
                "problems": [list(problem) for problem in problems],
            }
        )
    return {
        "trainings": trainings,
        "without faults": {name: its.losses for name, its in calm.items()},
        "goodput": [asdict(one) for one in measured],
    }


def figures(found: Found, measured: Sequence[Goodput]) -> dict[str, Callable[[], Figure]]:
    """What draws them, by their names in the report."""
    drawn: dict[str, Callable[[], Figure]] = {}
    if any(training.struck for training, _ in found):
        drawn["recovery"] = lambda: _recovery_figure(_all_times(found))
    if measured:
        drawn["goodput"] = lambda: _goodput_figure(measured)
    return drawn


def _recovery_figure(by_kind: dict[str, list[Times]]) -> Figure:
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(8, 4.4), layout="constrained")
    axes = figure.subplots()
    shown = [kind for kind in by_kind if any(one.back for one in by_kind[kind])]
    for place, kind in enumerate(shown):
        seconds = ([one.found for one in by_kind[kind]], [one.back for one in by_kind[kind]])
        for its, offset, colour, label in zip(seconds, (-0.15, 0.15), ("C1", "C0"), ("found", "all back"), strict=True):
            points = [one for one in its if one]
            height = [place + offset] * len(points)
            axes.plot(points, height, "o", color=colour, alpha=0.4, markersize=4, label=None if place else label)
    axes.set_yticks(range(len(shown)), shown)
    axes.invert_yaxis()
    axes.axvline(0.5, color="grey", linestyle=":")
    axes.set(xscale="log", xlabel="seconds after the fault", title="How long it takes, one point a fault")
    axes.set_xticks(ticks := [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0], [f"{tick:g}" for tick in ticks], minor=False)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _goodput_figure(measured: Sequence[Goodput]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.4), layout="constrained")
    axes = figure.subplots()
    between = sorted({one.between for one in measured if one.between is not None})
    ticks = [*between, None]
    for survives, label in ((True, 'on_failure="continue"'), (False, "a relaunch at each death")):
        its = {one.between: one.samples for one in measured if one.survives == survives}
        if None in its:
            axes.plot(range(len(ticks)), [100 * its[tick] / its[None] for tick in ticks], marker="o", label=label)
    axes.set_xticks(range(len(ticks)), [*(f"{its:g}" for its in between), "none"])
    axes.set(xlabel="mean seconds between deaths", ylabel="goodput, % of that without faults", ylim=(0, 105))
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
