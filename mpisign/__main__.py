"""The command line: ``python -m mpisign doctor``."""

from __future__ import annotations

import argparse
import sys

from mpisign import __version__


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
    parser.parse_args()

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


if __name__ == "__main__":
    sys.exit(main())
