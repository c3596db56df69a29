"""How long whole training iterations (forward, backward, step) take, against torch DDP with its overlap and hooks."""

from __future__ import annotations

import inspect
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from cards import Meter
from harness import Contender, Report, Table, Target, Times, count, few_threads, gloo, measure, parser, speedup
from models import MODELS, Task
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

import mpisign
from mpisign import DistributedSignOptimizer
from mpisign.exchange.choose import Choice

LR = 1e-4
NOTHING, DDP, BF16, POWER_SGD = "no communication", "DDP fp32", "DDP bf16 hook", "DDP PowerSGD hook"
RIVALS = (DDP, BF16, POWER_SGD)
OURS, LATER = "signum", "signum, no overlap"
OVERLAPS = {"auto": "auto", "yes": True, "no": False}
CAN_OVERLAP = "overlap" in inspect.signature(DistributedSignOptimizer.__init__).parameters
WHOLE_MODEL_MB = 4096  # one bucket: gloo mismatches the messages of PowerSGD's several buckets

WORDS = """\
One iteration is `zero_grad()`, forward, backward and `step()`, the same model and batch sizes in all rows. DDP runs
over gloo and hides communication behind backward: in fp32, with torch's bf16 hook (which casts, and which torch refuses
by name without a GPU, so that it is wrapped), and with its PowerSGD hook of rank 4 (in one bucket, as gloo mismatches
the messages of several). All of these are around `SGD(lr, momentum=0.9)`; `signum` is `DistributedSignOptimizer` around
`SGD(lr)`, with the momentum on the worker. `no communication` trains each rank by itself with
`SGD(lr, momentum=0.9)`. **Exposed** is what an iteration takes longer than that, communication and packing that
backward does not hide: the median of the differences within each repetition. Bytes are those that the operating
system's counter of the network card counts for one iteration, those of the card that sends most. The targets are for
four hosts of 1 Gbit/s, one rank on each."""


def main() -> None:
    options = parser(
        __doc__ or "",
        [
            "mpirun -n 4 python benchmarks/bench_training.py",
            "benchmarks/slow_network 4 1gbit python benchmarks/bench_training.py --report",
            "mpirun -n 2 python benchmarks/bench_training.py --model resnet50 --size 96 --batch 4",
        ],
    )
    options.add_argument("--model", choices=tuple(MODELS), default="transformer", help="what is trained")
    options.add_argument("--batch", type=count, default=4, help="sequences or images of each rank")
    options.add_argument("--size", type=count, default=64, help="length of a sequence, or pixels of an image's side")
    options.add_argument("--width", type=count, help="of the model; default: 512 for the transformer, 64 for ResNet-50")
    options.add_argument("--exchange", default="auto", help="of mpisign")
    options.add_argument("--overlap", choices=tuple(OVERLAPS), default="auto", help="of mpisign's messages")
    options.add_argument("--interface", help="network device whose bytes count; default: gloo's or the default route's")
    options.add_argument("--only", nargs="+", metavar="ROW", help="leave out the rivals that are not named")
    args = options.parse_args()
    few_threads()
    mpisign.init()

    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    meter = Meter(comm, args.interface)

    def task() -> Task:
        sizes = {} if args.width is None else {"width": args.width}
        return MODELS[args.model](args.batch, comm.rank, args.size, **sizes)

    with gloo(comm):
        runs = dict(contenders(task, args.exchange, OVERLAPS[args.overlap], args.only))
        entered = [metered(name, what, run, meter) for name, (what, run) in runs.items()]
        times = measure(entered, args.rounds, args.warmup, comm)
        sent = meter.most()
        runs.clear()
    parameters = sum(parameter.numel() for parameter in task().parameters())
    if comm.rank != 0:
        return

    names = [one.name for one in entered]
    promised = {DDP: 1.85, BF16: 1.35, POWER_SGD: 1.35}
    targets = [Target(OURS, rival, least) for rival, least in promised.items() if rival in names]
    where = f"{comm.size} rank(s) on {mpisign.num_nodes()} node(s)"
    report = Report(
        "training" if args.model == "transformer" else f"training-{args.model}",
        f"Training iterations of {args.model}, {parameters:,} parameters, {where}",
        WORDS,
        args,
        entered,
        times,
        targets,
        [iterations(times, names, sent, parameters)],
        ranks=comm.size,
        extra={"parameters": parameters, "card_bytes": sent, "exposed_seconds": exposed(times)},
    )
    report.show()
    if args.report:
        print("\n".join(f"wrote {path}" for path in report.write(args.results)))


# ------------------------------------------------------------------------------------------- contenders

Run = tuple[str, Callable[[], object]]


def contenders(
    task: Callable[[], Task], exchange: Choice, overlap: object, only: Sequence[str] | None
) -> list[tuple[str, Run]]:
    """Name, description and iteration of each row. **Collective.**"""
    bf16 = lambda state, bucket: default_hooks.bf16_compress_hook(state, bucket)  # noqa: E731, PLW0108 - torch reads annotations
    makers: dict[str, Callable[[], Run]] = {
        OURS: lambda: voting(task(), exchange, overlap),
        DDP: lambda: averaging(task(), "`DistributedDataParallel`"),
        BF16: lambda: averaging(task(), "the same with `bf16_compress_hook`", None, bf16),
        POWER_SGD: lambda: averaging(
            task(),
            "the same with `powerSGD_hook`, rank 4, from the third iteration on",
            powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=4, start_powerSGD_iter=2),
            powerSGD_hook.powerSGD_hook,
            bucket_cap_mb=WHOLE_MODEL_MB,
        ),
        NOTHING: lambda: alone(task()),
    }
    if CAN_OVERLAP and overlap is not False:
        makers[LATER] = lambda: voting(task(), exchange, False)
    always = {OURS, NOTHING}
    return [(name, make()) for name, make in makers.items() if only is None or name in {*always, *only}]


def metered(name: str, what: str, run: Callable[[], object], meter: Meter) -> Contender:
    """It, with the bytes of each run counted."""
    return Contender(name, what, run, meter.begin, lambda seconds: meter.end(name))


def averaging(task: Task, what: str, state: Any = None, hook: Any = None, **options: Any) -> Run:
    ddp = DistributedDataParallel(task, gradient_as_bucket_view=True, **options)
    if hook is not None:
        ddp.register_comm_hook(state, hook)
    optimizer = SGD(ddp.parameters(), lr=LR, momentum=0.9)

    def iterate() -> None:
        optimizer.zero_grad()
        ddp(*task.batch).backward()
        optimizer.step()

    return what, iterate


def alone(task: Task) -> Run:
    optimizer = SGD(task.parameters(), lr=LR, momentum=0.9)

    def iterate() -> None:
        optimizer.zero_grad()
        task.loss().backward()
        optimizer.step()

    return "each rank by itself, `SGD(momentum=0.9)`", iterate


def voting(task: Task, exchange: Choice, overlap: object) -> Run:
    options: dict[str, Any] = {"overlap": overlap} if CAN_OVERLAP else {}
    optimizer = DistributedSignOptimizer(
        SGD(task.parameters(), lr=LR),
        named_parameters=task.named_parameters(),
        method=mpisign.signum(momentum=0.9),
        exchange=exchange,
        **options,
    )

    def iterate() -> None:
        optimizer.zero_grad()
        task.loss().backward()
        optimizer.step()

    told = "".join(f", {name}={value!r}" for name, value in options.items())
    return f"`DistributedSignOptimizer(SGD(), method=mpisign.signum(), exchange={exchange!r}{told})`", iterate


# ----------------------------------------------------------------------------------------------- tables


def exposed(times: Times) -> dict[str, float]:
    """By row, the median of its seconds over those without communication, within each repetition."""
    floor = times[NOTHING]
    return {
        name: statistics.median(mine - its for mine, its in zip(seconds, floor, strict=True))
        for name, seconds in times.items()
    }


def iterations(times: Times, names: Sequence[str], sent: dict[str, float], parameters: int) -> Table:
    """A row for each contender."""
    rivals = [name for name in RIVALS if name in names]
    open_seconds = exposed(times)
    columns = ["", "median ms", "exposed ms", "exposed %", "bytes out of a card", "a parameter"]
    rows = []
    for name in names:
        middle = statistics.median(times[name])
        out = [f"{sent[name]:,.0f}", f"{sent[name] / parameters:.3f}"] if name in sent else ["", ""]
        shown = [f"{1e3 * middle:.1f}", f"{1e3 * open_seconds[name]:.1f}", f"{100 * open_seconds[name] / middle:.1f}"]
        ratios = [speedup(times[rival], times[name]) for rival in rivals]
        rows.append([name, *shown, *out, *(f"{median:.2f} ({fastest:.2f})" for median, fastest in ratios)])
    return Table("Iterations", [*columns, *(f"x {rival}" for rival in rivals)], rows)


if __name__ == "__main__":
    main()
