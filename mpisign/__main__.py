"""The command line: ``python -m mpisign run``, ``doctor`` and ``predict``."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpisign import __version__, quantities
from mpisign.cost import Links, Nodes, Rates
from mpisign.errors import LaunchError, OptionError

if TYPE_CHECKING:
    from mpisign.prediction import Row, Scenario

FORWARD_SHARE = 0.5  # of backward, which does about twice the work
EXAMPLES = """\
examples:
  python -m mpisign predict --parameters 25.6M --nodes 16 --ranks-per-node 8 --bandwidth 10Gbit --backward 100ms
  python -m mpisign predict --parameters 7B --nodes 64 --bandwidth 100Gbit --latency 5us --backward 1.5s --plot 7B.svg
  mpirun -n 4 python -m mpisign predict --calibrate --parameters 25.6M --backward 200ms
"""
RUN_EXAMPLES = """\
examples:
  python -m mpisign run train.py --lr 1e-3                    one rank a GPU, or else a core
  python -m mpisign run -n 8 train.py                         eight ranks, however few cores there are
  python -m mpisign run --hosts a:4,b:4 -n 8 train.py         on two machines, by ssh
  python -m mpisign run -n 4 --continue-on-failure train.py   a rank that dies does not end the job
  python -m mpisign run -n 4 -m package.train --lr 1e-3       a module
  python -m mpisign run -n 4 --print train.py                 what would be started

exit code:
  0 only if every rank has ended with 0; with --continue-on-failure, at least one and every rank that was in its last
  group. 85 (mpisign.REQUEUE_EXIT_CODE) if ranks have stopped because they were asked to. Else that of the launcher or
  of the first rank that has failed, never 0. Each rank's is written down by the shell that runs it, as launchers have
  been seen to exit with 0 after jobs that had failed.

signals:
  SIGINT, SIGTERM, SIGUSR1 and SIGUSR2 are passed on to the launcher. Open MPI's gives the ranks the latter two, and
  ends the job at the others.

root:
  Open MPI starts nothing for root unless it is told twice; this command tells it, and says so.
"""


def main() -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m mpisign", description="mpisign: training by majority vote")
    parser.add_argument("--version", action="version", version=f"mpisign {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser(
        "doctor",
        help="check this installation; best under the launcher you train with: mpirun -n 4 python -m mpisign doctor",
        description="Checks versions, the MPI library and its launcher, ranks and nodes, CPU binding, GPUs, fault "
        "tolerance, and one real vote against NumPy on all ranks. Exit code 1 if anything fails.",
    )
    predict = commands.add_parser(
        "predict",
        help="what a step will cost, by each exchange and by all-reduce, on machines that you have or not",
        description="Predicts the milliseconds of a step by the formulas of mpisign/cost.py, from numbers that you "
        "type or, with --calibrate under mpirun, from what this job's network does. Exposed is what a step adds to an "
        "iteration when messages leave during backward. It says so where the library does not pay.",
        epilog=EXAMPLES,
        formatter_class=_HelpFormatter,
    )
    _add_predict(predict)
    start = commands.add_parser(
        "run",
        help="start a training on several ranks, by the launcher of the MPI in use and with the flags it needs",
        description="Starts PROGRAM on several ranks: with mpirun or mpiexec of the MPI that mpi4py uses, each rank "
        "bound to cores of its own, or, where ranks outnumber cores, to none and yielding; with OMP_NUM_THREADS, "
        "unless it is set, so that ranks share the cores evenly. The exit code is the ranks' own.",
        epilog=RUN_EXAMPLES,
        formatter_class=_HelpFormatter,
        usage="python -m mpisign run [OPTIONS] [--] PROGRAM [ARGUMENTS OF THE PROGRAM]",
    )
    _add_run(start)
    args = parser.parse_args()
    if args.command == "run":
        return _run(start, args)
    return _doctor() if args.command == "doctor" else _predict(predict, args)


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and leaves the examples as they are written; wraps the rest."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith("examples:"):
            return super()._fill_text(text, width, indent)
        return argparse.HelpFormatter._fill_text(self, text, width, indent)


def _doctor() -> int:
    from mpisign import doctor

    findings = doctor.examine()
    if _rank() == 0:
        width = max(len(finding.subject) for finding in findings)
        for finding in findings:
            print(f"{finding.status:>4}  {finding.subject:<{width}}  {finding.seen}")
            if finding.advice:
                print(f"{'':>4}  {'':<{width}}  -> {finding.advice}")
    return int(any(finding.status == doctor.FAIL for finding in findings))


def _rank() -> int:
    """This process's rank, also where MPI cannot even be imported."""
    from mpisign.errors import LaunchError
    from mpisign.launch import import_mpi

    try:
        return int(import_mpi().COMM_WORLD.Get_rank())
    except LaunchError:
        return 0


# ----------------------------------------------------------------------------------------------------- run


def _add_run(parser: argparse.ArgumentParser) -> None:
    add, unset = parser.add_argument, argparse.SUPPRESS
    add(
        *("-n", "--ranks", "-np", "--np"),
        type=_typed(quantities.count),
        default=unset,
        metavar="N",
        help="how many (default: one a GPU, else a core)",
    )
    add("--hosts", default=unset, metavar="A:2,B:2", help="machines and their slots, as the launcher takes them")
    add("--hostfile", type=Path, default=unset, metavar="FILE", help="the same in a file")
    add(
        "--bind",
        choices=("auto", "cores", "none"),
        default="auto",
        help="each rank to cores of its own, or to none; auto: to cores where there are enough on this machine alone. "
        "Two jobs on one machine need none",
    )
    add(
        "--continue-on-failure",
        action="store_true",
        help="start MPI so that init(on_failure='continue') can go on without ranks that die (Open MPI's ULFM)",
    )
    add(
        "--detect-links",
        type=_typed(quantities.seconds),
        default=unset,
        metavar="TIME",
        help="with --continue-on-failure: also go on without ranks that are silent for so long, as a link is cut or "
        "they are stopped; for init(detect_links=seconds)",
    )
    add(
        "--shared-dir",
        type=Path,
        default=unset,
        metavar="DIR",
        help="which all hosts share: ranks leave their exit codes in a private folder there (default: the present "
        "directory where there are several hosts, else the system's for temporary files)",
    )
    add("--launcher-options", default="", metavar="WORDS", help="more of them, as they are: '--mca btl tcp,self'")
    add("--print", action="store_true", help="print the command, but for the shell around PROGRAM; start nothing")
    add("-m", "--module", action="store_true", help="PROGRAM is a module")
    add("program", nargs=argparse.REMAINDER, metavar="PROGRAM", help="a script (.py) for this Python, or a command")


def _run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    from mpisign import starting

    given = vars(args)
    try:
        wanted = starting.Wanted(
            starting.program(args.program, module=args.module),
            given.get("ranks"),
            given.get("hosts"),
            given.get("hostfile"),
            args.bind,
            args.continue_on_failure,
            given.get("detect_links"),
            shlex.split(args.launcher_options),
        )
        machine = starting.look_around()
        if args.print:
            words, settings = starting.command(wanted, machine)
            print(shlex.join([*(f"{name}={value}" for name, value in settings.items()), *words]))
            return 0
        if machine.root and machine.vendor == "Open MPI":
            print("mpisign run: started by root, which Open MPI is told to allow", file=sys.stderr)
        code, said = starting.run(wanted, machine, given.get("shared_dir"))
    except (OptionError, LaunchError) as error:
        parser.error(str(error))
    if said:
        print(f"mpisign run: {said}", file=sys.stderr)
    return code


# ------------------------------------------------------------------------------------------------- predict


def _typed(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """A reader of quantities as argparse wants it: what it raises is the message."""

    def reader(text: str) -> Any:
        try:
            return read(text)
        except OptionError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return reader


_TYPED_LINKS = ("nodes", "ranks_per_node", "bandwidth", "latency", "overhead", "node_bandwidth", "node_latency")
_RATES = ("pack_rate", "apply_rate", "count_rate", "reduce_rate", "sgd_rate")


def _add_predict(parser: argparse.ArgumentParser) -> None:
    """The options. Those that a calibration measures have no default here, so that one sees which were typed."""
    number, seconds, bandwidth = map(_typed, (quantities.number, quantities.seconds, quantities.bandwidth))
    add, unset = parser.add_argument, argparse.SUPPRESS
    add("--parameters", type=number, default="25.6M", metavar="N", help="of the model")
    add("--nodes", type=number, default=unset, metavar="N", help="machines (default: 16)")
    add("--ranks-per-node", type=number, default=unset, metavar="N", help="which share its network card (default: 8)")
    add("--bandwidth", type=bandwidth, default=unset, metavar="RATE", help="of a node's network card (default: 10Gbit)")
    add("--latency", type=seconds, default=unset, metavar="TIME", help="between two nodes (default: 20us)")
    add("--overhead", type=seconds, default=unset, metavar="TIME", help="of a rank for each message (default: 1us)")
    add("--node-bandwidth", type=bandwidth, default=unset, metavar="RATE", help="inside a node (default: 20GB/s)")
    add("--node-latency", type=seconds, default=unset, metavar="TIME", help="inside a node (default: 1us)")
    add("--backward", type=seconds, default="100ms", metavar="TIME", help="of an iteration without communication")
    add("--forward", type=seconds, default=unset, metavar="TIME", help="of it (default: half of --backward)")
    add("--planes", type=int, choices=(1, 2), default=1, help="bits of a vote: 1 for signs, 2 for ternary votes")
    add("--pack-rate", type=number, default=unset, metavar="N", help="coordinates packed a second (default: 2.4G)")
    add("--apply-rate", type=number, default=unset, metavar="N", help="coordinates applied a second (default: 4.7G)")
    add("--count-rate", type=bandwidth, default=unset, metavar="RATE", help="of ballots counted (default: 6GB/s)")
    add(
        "--reduce-rate", type=bandwidth, default=unset, metavar="RATE", help="of adding in all-reduces (default: 4GB/s)"
    )
    add("--sgd-rate", type=number, default=unset, metavar="N", help="of SGD with momentum after them (default: 1G)")
    add("--calibrate", action="store_true", help="measure this job's links and rates instead; under mpirun")
    add(
        "--plot", type=Path, default=unset, metavar="FILE", help="draw speed-up over bandwidth and over nodes, 1 to 10k"
    )


def _predict(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    from mpisign import places, prediction, session

    given = vars(args)
    if args.calibrate:
        typed = [f"--{name.replace('_', '-')}" for name in (*_TYPED_LINKS, *_RATES) if name in given]
        if typed:
            parser.error(f"--calibrate measures what {typed[0]} says: leave out one of them")
        session.init()
        nodes, links, rates = prediction.measured()
        rank = places.rank()
        session.shutdown()
        if rank:
            return 0
    else:
        nodes = Nodes.even(given.get("nodes", 16), given.get("ranks_per_node", 8))
        overhead = given.get("overhead", 1e-6)
        links = Links(
            given.get("node_latency", 1e-6),
            given.get("node_bandwidth", 20e9),
            given.get("latency", 20e-6),
            given.get("bandwidth", 1.25e9),
            overhead / 10,
            overhead,
        )
        usual = Rates()
        rates = replace(
            usual,
            pack=given.get("pack_rate", usual.pack),
            unpack=given.get("apply_rate", usual.unpack),
            count=given.get("count_rate", usual.count),
            reduce=given.get("reduce_rate", usual.reduce),
            sgd=given.get("sgd_rate", usual.sgd),
        )
    forward = given.get("forward", FORWARD_SHARE * args.backward)
    scenario = prediction.Scenario(args.parameters, nodes, links, rates, forward, args.backward, args.planes)
    found = prediction.rows(scenario)
    print("\n".join(_introduced(scenario)), "\n".join(_table(found)), prediction.verdict(scenario, found), sep="\n\n")
    if "plot" in given:
        try:
            prediction.plot(scenario, args.plot)
        except OptionError as error:
            parser.error(str(error))
        print(f"wrote {args.plot}")
    return 0


def _introduced(scenario: Scenario) -> list[str]:
    """What the prediction is of."""
    links, rates, nodes = scenario.links, scenario.rates, scenario.nodes
    sizes = sorted(set(nodes.sizes))
    per_node = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    lines = [
        f"{quantities.spoken_number(scenario.parameters)} parameters, {nodes.number} node(s) of {per_node} rank(s)"
    ]
    if nodes.number > 1:
        lines.append(
            f"across nodes: {quantities.spoken_bandwidth(links.network_bandwidth)} a card, latency "
            f"{1e6 * links.network_latency:.3g} us, {1e6 * links.network_overhead:.3g} us a message"
        )
    if nodes.fullest > 1:
        lines.append(
            f"inside a node: {links.node_bandwidth / 1e9:.3g} GB/s, latency {1e6 * links.node_latency:.3g} us, "
            f"{1e6 * links.node_overhead:.3g} us a message"
        )
    lines.append(
        f"a second: {quantities.spoken_number(rates.pack)} coordinates packed, "
        f"{quantities.spoken_number(rates.unpack)} applied, {rates.count / 1e9:.3g} GB of ballots counted, "
        f"{rates.reduce / 1e9:.3g} GB of floats added, {quantities.spoken_number(rates.sgd)} coordinates through SGD"
    )
    lines.append(f"forward {1e3 * scenario.forward:.4g} ms, backward {1e3 * scenario.backward:.4g} ms")
    return lines


def _table(found: list[Row]) -> list[str]:
    """The rows, aligned; the best exchange has an arrow."""
    from mpisign import prediction

    chosen = prediction.best(found)
    rivals = list(found[0].speedups)
    heads = ["", "step ms", "exposed ms", "MB a card", "iteration ms", *(f"x {rival}" for rival in rivals), ""]
    lines = [heads]
    for row in found:
        numbers = (1e3 * row.step.total, 1e3 * row.step.exposed, row.step.card_bytes / 1e6, 1e3 * row.seconds)
        speedups = (f"{row.speedups[rival]:.2f}" for rival in rivals)
        lines.append([row.way, *(f"{value:.2f}" for value in numbers), *speedups, "<- best" * (row is chosen)])
    widths = [max(len(line[place]) for line in lines) for place in range(len(heads))]
    return [
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        ).rstrip()
        for line in lines
    ]


if __name__ == "__main__":
    sys.exit(main())
