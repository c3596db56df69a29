"""The hosts of a training of scripts/chaos: network namespaces with a card each, whose links can be cut and mended."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

from mpisign.vendors import flags_of

__all__ = ["Hosts", "left", "missing", "remove", "set_link", "start"]

SLOW_NETWORK = Path(__file__).parents[1] / "benchmarks" / "slow_network"
TOOLS = ("ip", "tc", "nsenter", "unshare")


class Hosts:
    """Where the ranks of a training are: as many on each host as on the others, or one more."""

    def __init__(self, number: int, ranks: int) -> None:
        self.ranks_by_host = [range(at * ranks // number, (at + 1) * ranks // number) for at in range(number)]

    @property
    def shape(self) -> str:
        """As benchmarks/slow_network takes it."""
        return "+".join(str(len(its)) for its in self.ranks_by_host)

    def of(self, rank: int) -> int:
        """Its host."""
        return next(host for host, its in enumerate(self.ranks_by_host) if rank in its)

    def among(self, ranks: Iterable[int]) -> set[int]:
        """The hosts of these."""
        return {self.of(rank) for rank in ranks}


def start(hosts: Hosts, silence: float, program: Sequence[str]) -> list[str]:
    """The command that runs a program on these hosts, in which a rank that is silent for so many seconds is dead."""
    flags = flags_of("Open MPI")
    assert flags is not None
    return [str(SLOW_NETWORK), "--mpirun", " ".join(flags.outlive(silence)), hosts.shape, "none", *program]


def set_link(process: int, host: int, state: str) -> None:
    """Let the switch's port of a host of that slow_network be ``down``, or ``up``."""
    _ip("-n", f"{_prefix(process)}switch", "link", "set", f"p{host}", state)


def left(process: int) -> list[str]:
    """The namespaces of that slow_network that are still there."""
    lines = _ip("netns", "list").splitlines()
    return [name for line in lines for name in line.split()[:1] if name.startswith(_prefix(process))]


def remove(process: int) -> None:
    """Delete them."""
    for name in left(process):
        _ip("netns", "del", name)


def missing() -> str:
    """Why there can be no hosts on this machine, or ""."""
    if os.geteuid() != 0:
        return "making network namespaces needs root: run it with sudo -E"
    lacking = [tool for tool in TOOLS if shutil.which(tool) is None]
    return f"{', '.join(lacking)} missing: apt install iproute2" if lacking else ""


def _prefix(process: int) -> str:
    return f"mpisign{process}-"


def _ip(*words: str) -> str:
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=True).stdout
