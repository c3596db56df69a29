"""How many bytes leave each node's network card in a step, by the card's own counter, against all-reduces."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from cards import Meter
from harness import Contender, Report, Table, Target, count, few_threads, gloo, measure, parser

import mpisign
from mpisign import DistributedSignOptimizer, cost
from mpisign.cost import Links, Nodes
from mpisign.exchange import choose
from mpisign.session import current

if TYPE_CHECKING:
    from mpi4py import MPI

LR = 1e-4
ALLREDUCE, GLOO_FP32, GLOO_BF16 = "Allreduce fp32", "gloo fp32", "gloo bf16"
EXCHANGES = tuple(name for name in choose.CHOICES if name != "auto")
TENSORS = 8

WORDS = """\
Each row is one step's exchange of one gradient: `DistributedSignOptimizer(SGD(lr), method=signsgd()).step()` by each
exchange, packing and handshake included; MPI's own `Allreduce` in the algorithm that this MPI chooses; gloo's
all-reduce in fp32 and, already cast, in bf16. Bytes are what the operating system counts out of a node's card during
the step, frames and acknowledgements included: the mean of the repetitions, of the node out of which most comes, by the
number of parameters. `by formula` is mpisign/cost.py's, of the messages alone; for all-reduces that of a ring."""


def main() -> None:
    options = parser(
        __doc__ or "",
        [
            "benchmarks/slow_network 2x4 1gbit python benchmarks/bench_card.py --report",
            "mpirun -n 32 --map-by ppr:8:node python benchmarks/bench_card.py --interface eth0",
        ],
    )
    options.add_argument("--elements", type=count, default=25_600_000, help="parameters")
    options.add_argument("--interface", help="network device whose bytes count; default: gloo's or the default route's")
    options.add_argument("--gloo", action="store_true", default=True, help="measure gloo too")
    options.add_argument("--no-gloo", dest="gloo", action="store_false")
    args = options.parse_args()
    few_threads()
    mpisign.init()

    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    meter = Meter(comm, args.interface)
    if meter.card is None and comm.rank == 0:
        print("no bytes are counted: there is one node, or --interface must name the network device of each")
    elements = args.elements // TENSORS * TENSORS
    contenders = [vote(exchange, elements, comm.rank, meter) for exchange in EXCHANGES]
    with gloo(comm) if args.gloo else nullcontext():
        contenders += reductions(comm, elements, meter, args.gloo)
        times = measure(contenders, args.rounds, args.warmup, comm)
        sent = meter.most()
    nodes = current().group.nodes
    if comm.rank != 0:
        return

    report = Report(
        "card",
        f"Bytes out of a network card, {elements:,} parameters, {comm.size} rank(s) on {nodes.number} node(s)",
        WORDS,
        args,
        contenders,
        times,
        [Target(exchange, ALLREDUCE, 1.0) for exchange in EXCHANGES],
        [traffic([one.name for one in contenders], sent, times, nodes, elements)],
        ranks=comm.size,
        extra={"card_bytes": sent, "elements": elements, "node_sizes": list(nodes.sizes)},
    )
    report.show()
    if args.report:
        print("\n".join(f"wrote {path}" for path in report.write(args.results)))


def metered(name: str, what: str, run: Callable[[], object], meter: Meter) -> Contender:
    """It, with the bytes of each run counted."""
    return Contender(name, what, run, meter.begin, lambda seconds: meter.end(name))


def vote(exchange: choose.Choice, elements: int, rank: int, meter: Meter) -> Contender:
    """A step of mpisign."""
    own = torch.Generator().manual_seed(1 + rank)
    parameters = [torch.nn.Parameter(torch.zeros(elements // TENSORS)) for _ in range(TENSORS)]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=own)
    optimizer = DistributedSignOptimizer(
        torch.optim.SGD(parameters, lr=LR), method=mpisign.signsgd(), exchange=exchange
    )
    return metered(exchange, f"`DistributedSignOptimizer(..., exchange={exchange!r}).step()`", optimizer.step, meter)


def reductions(comm: MPI.Comm, elements: int, meter: Meter, with_gloo: bool) -> list[Contender]:
    """MPI's sum, and gloo's two."""
    wide = torch.randn(elements, generator=torch.Generator().manual_seed(comm.rank))
    mine, total = wide.numpy(), np.empty(elements, np.float32)
    found = [metered(ALLREDUCE, "`comm.Allreduce(gradient, total)`", lambda: comm.Allreduce(mine, total), meter)]
    if with_gloo:
        whole, narrow = wide.clone(), wide.bfloat16()
        for name, what, vector in (
            (GLOO_FP32, "`dist.all_reduce(gradient)`", whole),
            (GLOO_BF16, "`dist.all_reduce(gradient.bfloat16())`, the cast not timed", narrow),
        ):
            found.append(metered(name, what, lambda its=vector: dist.all_reduce(its), meter))  # type: ignore[misc]
    return found


def traffic(
    names: Sequence[str], sent: dict[str, float], times: dict[str, list[float]], nodes: Nodes, elements: int
) -> Table:
    """A row for each contender, most bytes last."""
    columns = ["", "median ms", "bytes a parameter", "by formula", *(f"times less than {name}" for name in RIVALS)]
    rows = []
    for name in names:
        way = FORMULAS.get(name, name)
        formula = cost.step(way, Links(), nodes, elements).card_bytes / elements
        counted = f"{sent[name] / elements:.3f}" if name in sent else ""
        less = [f"{sent[rival] / sent[name]:.2f}" if rival in sent and sent.get(name) else "" for rival in RIVALS]
        rows.append([name, f"{1e3 * float(np.median(times[name])):.1f}", counted, f"{formula:.3f}", *less])
    return Table("Out of the busiest card in a step", columns, rows)


RIVALS = (ALLREDUCE, GLOO_FP32, GLOO_BF16)
FORMULAS = {ALLREDUCE: "ring fp32", GLOO_FP32: "ring fp32", GLOO_BF16: "ring bf16"}

if __name__ == "__main__":
    main()
