"""How long one bit a coordinate takes to cross MPI and be decided, against all-reducing the same gradient."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from harness import Contender, Report, Table, Target, compare, count, gloo, measure, mib, one_thread, parser, ring_bytes

import mpisign
from mpisign.bitmap import host
from mpisign.exchange.choose import Exchange, choose
from mpisign.policy import Policy
from mpisign.session import current
from mpisign.watchdog import Pending

if TYPE_CHECKING:
    from mpi4py import MPI

ALLREDUCE, OUT_OF_PLACE = "Allreduce fp32", "Allreduce, not in place"
GLOO_FP32, GLOO_BF16 = "gloo fp32", "gloo bf16"
TWO_PHASE, ALLGATHER = "two_phase", "allgather"

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
    one_thread()
    mpisign.init()

    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    bits = {
        option: BitExchange(option, args.elements, int(args.bucket_mb * 2**20)) for option in (TWO_PHASE, ALLGATHER)
    }
    two_phase, allgather = (torch.cat(exchange.run(), dim=1) for exchange in bits.values())
    if not comm.allreduce(torch.equal(two_phase, allgather), MPI.LAND):
        raise RuntimeError("the two exchanges decided different bits")
    contenders = [
        Contender(TWO_PHASE, "all-to-all, each rank decides a shard, all-gather", bits[TWO_PHASE].run),
        Contender(ALLGATHER, "all-gather, each rank decides everything", bits[ALLGATHER].run),
        *reductions(comm, args.elements),
    ]
    if args.gloo:
        contenders += gloo_reductions(comm.rank, args.elements)
    with gloo(comm) if args.gloo else nullcontext():
        times = measure(contenders, args.rounds, args.warmup, comm)
    if comm.rank != 0:
        return

    names = [one.name for one in contenders]
    references = [name for name in names if name not in (TWO_PHASE, ALLGATHER)]
    sent = {option: sum(one.bytes_sent for one in exchange.exchanges) for option, exchange in bits.items()}
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
        self.rule = method.rule
        self.context = Policy().context(step=0, rank=self.session.rank)
        words, cap = host.words_for(elements), max(1, bucket_bytes // 4)
        self.starts = list(range(0, words, cap))
        self.exchanges: list[Exchange] = [
            choose(option, method, min(cap, words - start), torch.int32, 1, 1, self.session.group, torch.device("cpu"))
            for start in self.starts
        ]
        seeded = torch.Generator().manual_seed(self.session.rank)
        ballot = torch.randint(-(2**31), 2**31, (words,), dtype=torch.int32, generator=seeded)
        for start, exchange in zip(self.starts, self.exchanges, strict=True):
            exchange.message[0] = ballot[start : start + cap]

    def decide(self, first_word: int, messages: Sequence[torch.Tensor], out: torch.Tensor, start: int) -> None:
        self.rule.decide(messages, out, self.context, first_word + start)

    def run(self) -> list[torch.Tensor]:
        """Send everything, then decide, then collect, in the order of the library's own rounds."""
        on_the_way: list[Pending | None] = []
        for exchange in self.exchanges:
            exchange.push()
            on_the_way.append(exchange.post(self.session))
        phase = 0
        while any(pending is not None for pending in on_the_way):
            for place, (first_word, exchange) in enumerate(zip(self.starts, self.exchanges, strict=True)):
                if (pending := on_the_way[place]) is not None:
                    self.session.wait(pending)
                    on_the_way[place] = exchange.go_on(self.session, phase, functools.partial(self.decide, first_word))
            phase += 1
        return [exchange.decision for exchange in self.exchanges]


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
