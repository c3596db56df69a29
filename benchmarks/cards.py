"""How many bytes leave a node's network card, from the operating system's own counters."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import mpisign

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["Meter", "find_card"]

COUNTERS = Path("/proc/self/net/dev")  # of this process's network namespace, as /sys/class/net may not be
TRANSMITTED = 8  # the column after a device's name


def counters() -> dict[str, int]:
    """Bytes that each network device has sent so far."""
    if not COUNTERS.exists():
        return {}
    lines = (line.partition(":") for line in COUNTERS.read_text().splitlines() if ":" in line)
    return {name.strip(): int(numbers.split()[TRANSMITTED]) for name, _, numbers in lines}


def find_card(named: str | None = None) -> str | None:
    """The device whose bytes count: ``named``, else gloo's, else that of the default route; None if there is none."""
    known = counters()
    routes = Path("/proc/self/net/route")
    words = [line.split() for line in routes.read_text().splitlines()[1:]] if routes.exists() else []
    of_route = [its[0] for its in words if len(its) > 1 and its[1] == "00000000"]
    if named is not None and named not in known:
        raise SystemExit(f"there is no network device {named!r} here, but {', '.join(sorted(known))}")
    candidates = (named, os.environ.get("GLOO_SOCKET_IFNAME"), *of_route)
    return next((card for card in candidates if card in known), None)


class Meter:
    """Counts the bytes that leave this node's card between two moments.

    Attributes:
        card: the device, or None if the job has one node, or some node has no device to look at: then nothing counts.
    """

    def __init__(self, comm: MPI.Comm, named: str | None = None) -> None:
        card = find_card(named) if mpisign.num_nodes() > 1 else None
        self.card = card if all(comm.allgather(card is not None)) else None
        self._comm, self._from, self._sums = comm, 0, dict[str, list[int]]()

    def begin(self) -> None:
        """From here on."""
        self._from = counters()[self.card] if self.card else 0

    def end(self, name: str) -> None:
        """To here it was for ``name``."""
        if self.card:
            self._sums.setdefault(name, []).append(counters()[self.card] - self._from)

    def most(self) -> dict[str, float]:
        """By name, the mean of a run's bytes out of the card from which most came. **Collective.**"""
        mine = {name: sum(sent) / len(sent) for name, sent in self._sums.items()}
        heard = self._comm.allgather(mine)
        return {name: max(its[name] for its in heard) for name in mine}
