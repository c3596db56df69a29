"""How long one bit a coordinate takes to cross MPI and be decided, against all-reducing the same gradient."""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from harness import (
    Contender,
    Report,
    Table,
    Target,
    compare,
    count,
    few_threads,
    gloo,
    hierarchical_bytes,
    measure,
    mib,
    parser,
    ring_bytes,
)

import mpisign
from mpisign.exchange.decider import Deciding
from mpisign.exchange.header import VOTES, Heard
from mpisign.exchange.plan import make_plan
from mpisign.exchange.settling import settled
from mpisign.memory.store import MemoryStore
from mpisign.policy import Policy
from mpisign.session import current
from mpisign.watchdog import Pending

if TYPE_CHECKING:
    from mpi4py import MPI

ALLREDUCE, OUT_OF_PLACE = "Allreduce fp32", "Allreduce, not in place"
GLOO_FP32, GLOO_BF16 = "gloo fp32", "gloo bf16"
EXCHANGES = TWO_PHASE, ALLGATHER, HIERARCHICAL = "two_phase", "allgather", "hierarchical"

WORDS = """\
One gradient, already in the form each scheme sends: packed words for mpisign, bf16 for gloo in bf16. `two_phase`
and `allgather` are the library's own exchanges with the real majority vote in between; both decided the same
bits, which was checked. `Allreduce` is MPI's own sum through mpi4py, in the algorithm this MPI chooses by itself
or was told to take (its settings are listed below). `gloo` is what torch DDP uses on CPUs. Packing and unpacking
are not in here: `bench_step.py` times whole steps."""


def main() -> None:
    options = parser(
        __doc__ or "",
        [
            "mpirun -n 4 python benchmarks/bench_exchange.py",
            "mpirun -n 4 --oversubscribe --mca mpi_yield_when_idle 1 python benchmarks/bench_exchange.py --report",
            "mpirun -n 4 --mca coll_tuned_use_dynamic_rules 1 --mca coll_tuned_allreduce_algorithm 4 \\\n"
            "      python benchmarks/bench_exchange.py     # Allreduce as a ring",
        ],
    )
    options.add_argument("--elements", type=count, default=25_600_000, help="coordinates of the gradient")
    options.add_argument("--bucket-mb", type=float, default=1.0, help="MiB a message, as the optimizer's bucket_cap_mb")
    options.add_argument("--gloo", action=argparse.BooleanOptionalAction, default=True, help="time gloo too")
    args = options.parse_args()
    few_threads()
    mpisign.init()

    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    bits = {option: BitExchange(option, args.elements, int(args.bucket_mb * 2**20)) for option in EXCHANGES}
    first, *others = (torch.cat(exchange.run(), dim=1) for exchange in bits.values())
    if not comm.allreduce(all(torch.equal(first, other) for other in others), MPI.LAND):
        raise RuntimeError("the exchanges decided different bits")
    contenders = [
        Contender(TWO_PHASE, "all-to-all, each rank decides a shard, all-gather", bits[TWO_PHASE].run),
        Contender(ALLGATHER, "all-gather, each rank decides everything", bits[ALLGATHER].run),
        Contender(HIERARCHICAL, "counted in each node's memory, then across in two phases", bits[HIERARCHICAL].run),
        *reductions(comm, args.elements),
    ]
    if args.gloo:
        contenders += gloo_reductions(comm.rank, args.elements)
    with gloo(comm) if args.gloo else nullcontext():
        times = measure(contenders, args.rounds, args.warmup, comm)
    if comm.rank != 0:
        return

    names = [one.name for one in contenders]
    references = [name for name in names if name not in EXCHANGES]
    sent = {option: exchange.bytes_sent for option, exchange in bits.items()}
    report = Report(
        "exchange",
        f"Exchanging {args.elements:,} coordinates, {comm.size} rank(s)",
        WORDS,
        args,
        contenders,
        times,
        [Target(TWO_PHASE, ALLREDUCE, 10.0)],
        [compare("Time", times, names, references), traffic(args.elements, comm.size, sent)],
        ranks=comm.size,
        extra={"bytes_sent": sent},
    )
    report.show()
    if args.report:
        print("\n".join(f"wrote {path}" for path in report.write(args.results)))


class BitExchange:
    """A gradient's bits, packed and cut into messages, and their way through one of the library's exchanges."""

    def __init__(self, option: str, elements: int, bucket_bytes: int) -> None:
        self.session, method = current(), mpisign.signsgd()
        self.context = Policy().context(step=0, rank=self.session.rank, size=self.session.size)
        each = 32 * max(1, bucket_bytes // 4)
        tensors = [torch.empty(min(each, elements - at)) for at in range(0, elements, each)]
        named = [(str(number), tensor) for number, tensor in enumerate(tensors)]
        options: Any = (Policy(), option, 1e-6, MemoryStore(method.memory), self.session.group, 1)  # a message each
        self.plan = settled(make_plan(named, [method] * len(named), *options), self.session, None)
        seeded = torch.Generator().manual_seed(self.session.rank)
        for exchange in self.plan.exchanges:
            exchange.message.random_(-(2**31), 2**31, generator=seeded)

    def run(self) -> list[torch.Tensor]:
        """Send everything, then go through all phases, in the order of the library's own rounds."""
        session, plan, channels = self.session, self.plan, self.session.group.channels
        everybody = np.ones((session.size, 1), np.bool_)
        heard = Heard((VOTES,) * session.size, everybody, (-1,) * session.size, ~everybody, {})
        on_the_way: list[Pending | None] = []
        for exchange in plan.exchanges:
            exchange.push()
            on_the_way.append(exchange.post(session, channels))
        deciding = [Deciding(one, heard, self.context, None, nullcontext) for one in plan.deciders]
        phase = 0
        while any(pending is not None for pending in on_the_way):
            for place, exchange in enumerate(plan.exchanges):
                if (pending := on_the_way[place]) is not None:
                    session.wait(pending)
                    on_the_way[place] = exchange.go_on(session, channels, phase, deciding[place])
            phase += 1
        return [exchange.decision for exchange in plan.exchanges]

    @property
    def bytes_sent(self) -> int:
        return sum(exchange.bytes_sent for exchange in self.plan.exchanges)


def gradient(rank: int, elements: int) -> torch.Tensor:
    return torch.randn(elements, generator=torch.Generator().manual_seed(rank))


def reductions(comm: MPI.Comm, elements: int) -> list[Contender]:
    """MPI's own sum of the gradient, in fp32."""
    from mpi4py import MPI

    mine = gradient(comm.rank, elements).numpy()
    total = mine.copy()
    return [
        Contender(
            ALLREDUCE,
            "`comm.Allreduce(MPI.IN_PLACE, gradient)`",
            lambda: comm.Allreduce(MPI.IN_PLACE, total),
            prepare=lambda: np.copyto(total, mine),
        ),
        Contender(OUT_OF_PLACE, "`comm.Allreduce(gradient, total)`", lambda: comm.Allreduce(mine, total)),
    ]


def gloo_reductions(rank: int, elements: int) -> list[Contender]:
    """torch.distributed's sum, in fp32 and, as DDP's bf16 hook sends it, in bf16 (already cast)."""
    wide = gradient(rank, elements)
    total, narrow = wide.clone(), wide.bfloat16()
    narrow_total = narrow.clone()
    return [
        Contender(
            GLOO_FP32,
            "`dist.all_reduce(gradient)`",
            lambda: dist.all_reduce(total),
            prepare=lambda: total.copy_(wide),
        ),
        Contender(
            GLOO_BF16,
            "`dist.all_reduce(gradient.bfloat16())`, the cast not timed",
            lambda: dist.all_reduce(narrow_total),
            prepare=lambda: narrow_total.copy_(narrow),
        ),
    ]


def traffic(elements: int, ranks: int, sent: dict[str, int]) -> Table:
    """Bytes a rank sends: by formula, and for the library's exchanges as they count them."""
    fp32 = ring_bytes(elements, 4, ranks)
    formulas = [
        ("fp32 ring (Allreduce, gloo)", "2 (M-1)/M 4d", fp32),
        ("bf16 ring (gloo)", "2 (M-1)/M 2d", fp32 / 2),
        (TWO_PHASE, "2 (M-1)/M d/8", fp32 / 32),
        (ALLGATHER, "(M-1) d/8", (ranks - 1) * elements / 8),
        (HIERARCHICAL, "(N-1)/N (ceil(log2(G+1)) + 1) d/8G", hierarchical_bytes(elements)),
    ]
    rows = [
        [
            name,
            formula,
            mib(size),
            mib(sent[name]) if name in sent else "",
            f"{fp32 / size:.2f}" if size else "",
        ]
        for name, formula, size in formulas
    ]
    columns = ["", "formula", "by formula", "counted", "times less than an fp32 ring"]
    return Table("Bytes sent by each rank, M ranks, d coordinates", columns, rows)


if __name__ == "__main__":
    main()
