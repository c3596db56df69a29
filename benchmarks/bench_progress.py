"""Whether an exchange progresses beside computing: by itself, polled as hooks of backward would, or by a thread."""

from __future__ import annotations

import argparse
import functools
import statistics
import threading
import time
from collections.abc import Callable
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
from harness import Contender, Report, Table, Target, count, few_threads, measure, parser

import mpisign

if TYPE_CHECKING:
    from mpi4py import MPI

ALONE, NEVER, OFTEN, SELDOM, THREAD = "computing alone", "not polled", "every 2 ms", "every 10 ms", "thread"
INTERVALS = {OFTEN: 0.002, SELDOM: 0.010}  # ResNet-50 has 161 hooks: in 250 ms of backward one each 1.6 ms
FIRST_NAP, LAST_NAP = 50e-6, 1e-3  # seconds between two looks of the thread; doubled while nothing has changed
SIDE = 250  # of the matrices whose products are the computing

WORDS = """\
Two phases, as of a vote: a nonblocking all-to-all of one bit a coordinate, and when that is over a nonblocking
all-gather on another communicator, in messages of --message-mb that all start at once. Beside them each rank multiplies
small matrices, a fixed number of times (`computing alone`), and does what the row says: nothing until the computing is
over; polls (`Test`) between two products when 2 or 10 ms have passed, as the hooks of backward would; or lets a thread
of Python's poll, with naps that grow from 50 us to 1 ms. Communicators belong to the row. **Exposed** is the time from
the end of the computing to the end of the exchange, **slowed** is how much longer the computing took than alone, both
of the slowest rank, medians of the repetitions. The sum is what an iteration would take longer."""


def main() -> None:
    options = parser(
        __doc__ or "",
        [
            "benchmarks/slow_network 4 1gbit python benchmarks/bench_progress.py --report",
            "benchmarks/slow_network 2x2 100mbit python benchmarks/bench_progress.py --seconds 0.5",
        ],
    )
    options.add_argument("--elements", type=count, default=25_600_000, help="coordinates, one bit each")
    options.add_argument("--message-mb", type=float, default=1.0, help="MiB a message")
    options.add_argument("--seconds", type=float, default=0.25, help="of computing")
    args = options.parse_args()
    few_threads()
    mpisign.init()

    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    work = Work(comm, args.seconds)
    rows = {name: Row(name, comm, work, args) for name in (NEVER, OFTEN, SELDOM, THREAD)}
    contenders = [Contender(ALONE, f"{work.products} products of {SIDE} x {SIDE} matrices", work.run)]
    for name, what in (
        (NEVER, "started before the computing, waited for after it"),
        (OFTEN, "polled between two products when 2 ms have passed"),
        (SELDOM, "polled when 10 ms have passed"),
        (THREAD, "polled by a thread with naps of 50 us to 1 ms"),
    ):
        contenders.append(Contender(name, what, rows[name].run, observe=rows[name].observe))
    times = measure(contenders, args.rounds, args.warmup, comm)
    if comm.rank != 0:
        return

    alone = statistics.median(times[ALONE])
    report = Report(
        "progress",
        f"Two phases of {args.elements:,} bits beside {args.seconds:g} s of computing, {comm.size} rank(s) on "
        f"{mpisign.num_nodes()} node(s)",
        WORDS,
        args,
        contenders,
        times,
        [Target(OFTEN, NEVER, 1.0), Target(OFTEN, THREAD, 1.0)],
        [
            Table(
                "Beside computing",
                ["", "exposed ms", "slowed ms", "together ms"],
                [[ALONE, *["0.0"] * 3], *(row.line(alone) for row in rows.values())],
            )
        ],
        ranks=comm.size,
        extra={name: {"exposed": row.exposed, "computing": row.computing} for name, row in rows.items()},
    )
    report.show()
    if args.report:
        print("\n".join(f"wrote {path}" for path in report.write(args.results)))


class Work:
    """So many products of small matrices that they take ``seconds`` on the slowest rank when all compute at once."""

    def __init__(self, comm: MPI.Comm, seconds: float) -> None:
        from mpi4py import MPI

        self._matrix = np.random.default_rng(0).random((SIDE, SIDE), np.float32)
        self.products = 50
        self.run()
        comm.Barrier()
        began = perf_counter()
        self.run()
        slowest = comm.allreduce((perf_counter() - began) / self.products, MPI.MAX)
        self.products = max(1, round(seconds / slowest))

    def run(self, poll: Callable[[], object] | None = None, interval: float = 0.0) -> None:
        """Compute; call ``poll`` between two products when ``interval`` seconds have passed since the last time."""
        due = perf_counter() + interval
        for _ in range(self.products):
            self._matrix @ self._matrix
            if poll is not None and perf_counter() >= due:
                poll()
                due = perf_counter() + interval


class Message:
    """Its two phases."""

    def __init__(self, phases: tuple[MPI.Comm, MPI.Comm], words: int) -> None:
        ranks = phases[0].size
        shard = -(-words // ranks)
        self._phases = phases
        self._sent, self._received = np.zeros(shard * ranks, np.uint32), np.zeros(shard * ranks, np.uint32)
        self._decided, self._spread = np.zeros(shard, np.uint32), np.zeros(shard * ranks, np.uint32)
        self._pending: MPI.Request | None = None
        self.phase = 0

    def start(self) -> None:
        self._pending, self.phase = self._phases[0].Ialltoall(self._sent, self._received), 1

    def advance(self) -> bool:
        """Go on without waiting; whether a phase was over."""
        if self._pending is None or not self._pending.Test():
            return False
        self._pending = None
        if self.phase == 1:
            self._pending = self._phases[1].Iallgather(self._decided, self._spread)
        self.phase += 1
        return True


class Row:
    """An exchange on communicators of its own, and how it is brought on."""

    def __init__(self, name: str, comm: MPI.Comm, work: Work, args: argparse.Namespace) -> None:
        self._name, self._comm, self._work = name, comm, work
        words, cap = -(-args.elements // 32), max(1, int(args.message_mb * 2**20) // 4)
        phases = comm.Dup(), comm.Dup()
        self._messages = [Message(phases, min(cap, words - start)) for start in range(0, words, cap)]
        self.exposed: list[float] = []
        self.computing: list[float] = []
        self._last = 0.0, 0.0

    def run(self) -> None:
        began = perf_counter()
        for message in self._messages:
            message.start()
        if self._name == THREAD:
            helper = threading.Thread(target=self._in_thread)
            helper.start()
            self._work.run()
            computed = perf_counter()
            helper.join()
        else:
            interval = INTERVALS.get(self._name)
            self._work.run(None if interval is None else self._poll, interval or 0.0)
            computed = perf_counter()
            while not self._poll():
                time.sleep(FIRST_NAP)
        self._last = perf_counter() - computed, computed - began

    def _poll(self) -> bool:
        """Bring each phase on in the order of the messages; whether all are over."""
        for phase in (1, 2):
            for message in self._messages:
                if message.phase <= phase and not message.advance():
                    break
        return self._messages[-1].phase > 2

    def _in_thread(self) -> None:
        nap, reached = FIRST_NAP, -1
        while not self._poll():
            now = sum(message.phase for message in self._messages)
            nap, reached = (FIRST_NAP if now > reached else min(2 * nap, LAST_NAP)), now
            time.sleep(nap)

    def observe(self, seconds: float) -> None:
        """Note the slowest rank's two times."""
        from mpi4py import MPI

        slowest = functools.partial(self._comm.allreduce, op=MPI.MAX)
        self.exposed.append(slowest(self._last[0]))
        self.computing.append(slowest(self._last[1]))

    def line(self, alone: float) -> list[str]:
        exposed, slowed = statistics.median(self.exposed), statistics.median(self.computing) - alone
        return [self._name, *(f"{1e3 * value:.1f}" for value in (exposed, slowed, exposed + slowed))]


if __name__ == "__main__":
    main()
