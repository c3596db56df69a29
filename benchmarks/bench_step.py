"""How long a whole optimizer step takes on ResNet-50's parameters, against the steps users take without mpisign."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from math import prod
from typing import TYPE_CHECKING

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
from torch.optim import SGD

import mpisign
from mpisign import DistributedSignOptimizer, StepReport, backends
from mpisign import session as sessions
from mpisign.bitmap import native
from mpisign.exchange.choose import CHOICES, Choice
from mpisign.session import Session, current
from mpisign.survival import can_survive

if TYPE_CHECKING:
    from mpi4py import MPI

LR = 1e-4
HOST = "mpisign.backends.host"
DDP_BUCKET = 25 * 2**20  # bytes; torch DDP's bucket_cap_mb

ALLREDUCE, GLOO_FP32, GLOO_BF16 = "Allreduce fp32 + SGD", "gloo fp32 + SGD", "gloo bf16 + SGD"
SIGNUM, MEAN, FLOOR = "signum", "mean", "SGD alone"
NUMPY = "by NumPy"
OUTLIVES, AUDITED = "signum, continues", "signum, audited"
PHASES = ("pack", "exchange", "decide", "unpack")

WORDS = """\
The part of a training step after backward: from each rank's gradients to updated parameters. `signum`, `signsgd` and
`lion` are `DistributedSignOptimizer.step()` around `SGD(lr)`; their momentum is on the worker; `by NumPy` says how
fast they are where no compiler was found at installation; `continues` what `init(on_failure="continue")` costs while
nobody dies, in runs where MPI has ULFM switched on; `audited` what `audit=1` does. `mean` is the same wrapper around
`SGD(lr, momentum=0.9)` with the full-precision baseline method. The rivals sum the gradients, which are views of one
flat buffer, divide by the number of ranks, and take a step of `SGD(lr, momentum=0.9)`: with MPI's Allreduce, and with
gloo in torch DDP's way (buckets of 25 MiB, all on their way at once; for bf16 cast, reduce, cast back, as DDP's bf16
hook does). `SGD alone` sends nothing: the floor of all that use momentum. No scheme overlaps with backward here.
Gradients are put back before each run, untimed."""


def main() -> None:
    options = parser(
        __doc__ or "",
        [
            "mpirun -n 4 python benchmarks/bench_step.py",
            "mpirun -n 4 --oversubscribe --mca mpi_yield_when_idle 1 python benchmarks/bench_step.py --report",
            "mpirun -n 2 python benchmarks/bench_step.py --width 16 --exchange allgather --no-gloo",
            "python -m mpisign run -n 4 --continue-on-failure benchmarks/bench_step.py --no-gloo",
        ],
    )
    options.add_argument("--width", type=count, default=64, help="channels of the first stage; 64 is ResNet-50")
    options.add_argument("--exchange", choices=CHOICES, default="auto", help="of mpisign")
    options.add_argument("--gloo", action=argparse.BooleanOptionalAction, default=True, help="time gloo too")
    args = options.parse_args()
    few_threads()
    mpisign.init()

    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    model = Model(list(resnet50_shapes(args.width)), comm.rank)
    sgd = SGD(model.parameters, lr=LR, momentum=0.9)
    steps = [
        WrappedStep(method, wrapped, args.exchange, model, comm)
        for method, wrapped in (
            (mpisign.signum(momentum=0.9), SGD(model.parameters, lr=LR)),
            (mpisign.signsgd(), SGD(model.parameters, lr=LR)),
            (mpisign.lion(), SGD(model.parameters, lr=LR)),
            (mpisign.mean(), SGD(model.parameters, lr=LR, momentum=0.9)),
        )
    ]
    if native.library() is not None:
        methods = (mpisign.signum(momentum=0.9), mpisign.signsgd())
        plain = (SGD(model.parameters, lr=LR) for _ in methods)
        pairs = zip(methods, plain, strict=True)
        steps += [WrappedStep(method, wrapped, args.exchange, model, comm, HOST) for method, wrapped in pairs]
    wrapped, method = SGD(model.parameters, lr=LR), mpisign.signum(momentum=0.9)
    steps.append(WrappedStep(method, wrapped, args.exchange, model, comm, audit=1, name=AUDITED))
    survives = can_survive()
    if survives:
        wrapped, method = SGD(model.parameters, lr=LR), mpisign.signum(momentum=0.9)
        steps.append(WrappedStep(method, wrapped, args.exchange, model, comm, session=outliving(), name=OUTLIVES))
    contenders = [step.contender for step in steps]
    contenders.append(allreduce_step(comm, model, sgd))
    if args.gloo:
        contenders += gloo_steps(comm.size, model, sgd)
    contenders.append(Contender(FLOOR, "`SGD(momentum=0.9).step()`, no exchange", sgd.step, model.restore))
    with gloo(comm) if args.gloo else nullcontext():
        times = measure(contenders, args.rounds, args.warmup, comm)
    sessions._session = steps[0].session
    if comm.rank != 0:
        return

    names = [one.name for one in contenders]
    references = [name for name in (ALLREDUCE, GLOO_FP32, GLOO_BF16, MEAN, SIGNUM) if name in names]
    reports = {step.contender.name: step.report for step in steps if NUMPY not in step.contender.name}
    targets = [Target(SIGNUM, ALLREDUCE, 3.0), Target("signsgd", ALLREDUCE, 3.5)]
    targets += [Target(SIGNUM, GLOO_BF16, 2.5)] if args.gloo else []
    targets += [Target(AUDITED, SIGNUM, 0.95)]
    targets += [Target(OUTLIVES, SIGNUM, 0.98)] if survives else []
    report = Report(
        "step",
        f"An optimizer step on {model.elements:,} parameters in {len(model.parameters)} tensors, {comm.size} rank(s)",
        WORDS,
        args,
        contenders,
        times,
        targets,
        [compare("Time", times, names, references), breakdown(steps), traffic(model.elements, comm.size, reports)],
        ranks=comm.size,
        extra={
            "parameters": model.elements,
            "tensors": len(model.parameters),
            "phases": {step.contender.name: step.phases for step in steps},
            "bytes_sent": {name: one.bytes_sent for name, one in reports.items()},
            "header_bytes": {name: one.header_bytes for name, one in reports.items()},
        },
    )
    report.show()
    if args.report:
        print("\n".join(f"wrote {path}" for path in report.write(args.results)))


# ------------------------------------------------------------------------------------------------ model


def resnet50_shapes(width: int = 64, classes: int = 1000) -> Iterator[tuple[int, ...]]:
    """Shapes of the parameters of a ResNet-50, in order of registration; 161 of them.

    He et al., "Deep residual learning for image recognition", 2015, Table 1: bottlenecks of 1x1, 3x3 and 1x1
    convolutions, each followed by a batch norm (two vectors).
    """

    def convolution(outputs: int, inputs: int, kernel: int) -> list[tuple[int, ...]]:
        return [(outputs, inputs, kernel, kernel), (outputs,), (outputs,)]

    yield from convolution(width, 3, 7)
    inputs = width
    for stage, blocks in enumerate((3, 4, 6, 3)):
        inner = width << stage
        for block in range(blocks):
            yield from convolution(inner, inputs, 1)
            yield from convolution(inner, inner, 3)
            yield from convolution(4 * inner, inner, 1)
            if block == 0:  # the shortcut changes the number of channels
                yield from convolution(4 * inner, inputs, 1)
            inputs = 4 * inner
    yield from [(classes, inputs), (classes,)]


class Model:
    """Parameters, the same on every rank, and this rank's gradients: views of one flat buffer, as in DDP."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], rank: int) -> None:
        self.elements = sum(prod(shape) for shape in shapes)
        same, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1 + rank)
        self.parameters = [torch.nn.Parameter(torch.randn(shape, generator=same)) for shape in shapes]
        self._backward = torch.randn(self.elements, generator=own)
        self.gradients = self._backward.clone()
        views = self.gradients.split([prod(shape) for shape in shapes])
        for parameter, view in zip(self.parameters, views, strict=True):
            parameter.grad = view.view(parameter.shape)

    def restore(self) -> None:
        """Put the gradients back that a step has overwritten, as backward would."""
        self.gradients.copy_(self._backward)


# ------------------------------------------------------------------------------------------- contenders


def outliving() -> Session:
    """A second session of the same ranks, whose job would outlive them; the first stays in use. **Collective.**"""
    first, sessions._session = current(), None
    mpisign.init(on_failure="continue")
    second, sessions._session = current(), first
    return second


class WrappedStep:
    """A step of mpisign, and where its time went: seconds in each phase, mean over the ranks, every repetition."""

    def __init__(
        self,
        method: mpisign.Method,
        wrapped: SGD,
        exchange: Choice,
        model: Model,
        comm: MPI.Comm,
        backend: str = backends.BACKENDS["cpu"],
        session: Session | None = None,
        audit: int = 0,
        name: str = "",
    ) -> None:
        self._model, self._backend, self._comm, self.session = model, backend, comm, session or current()
        self._select()
        self._optimizer = DistributedSignOptimizer(wrapped, method=method, exchange=exchange, audit=audit)
        self.phases: list[dict[str, float]] = []
        inner = f"SGD({'momentum=0.9' if wrapped.defaults['momentum'] else ''})"
        by = f" {NUMPY}" if backend == HOST else ""
        self.contender = Contender(
            name or method.name + by,
            f"`DistributedSignOptimizer({inner}, method=mpisign.{method.name}(...)"
            f"{f', audit={audit}' if audit else ''}).step()`{by}"
            + (', after `init(on_failure="continue")`' if session else ""),
            self._optimizer.step,
            self._prepare,
            self._observe,
        )

    def _select(self) -> None:
        backends.BACKENDS["cpu"] = self._backend
        sessions._session = self.session

    def _prepare(self) -> None:
        self._select()
        self._model.restore()

    @property
    def report(self) -> StepReport:
        """Of the last step."""
        assert self._optimizer.report is not None
        return self._optimizer.report

    def _observe(self, seconds: float) -> None:
        phases = [self.report.seconds[phase] for phase in PHASES]
        mine = np.array([*phases, seconds - sum(phases), seconds])
        mean = self._comm.allreduce(mine) / self._comm.size
        self.phases.append(dict(zip((*PHASES, "rest", "step"), mean.tolist(), strict=True)))


def allreduce_step(comm: MPI.Comm, model: Model, sgd: SGD) -> Contender:
    """What one writes with mpi4py."""
    from mpi4py import MPI

    flat = model.gradients.numpy()

    def step() -> None:
        comm.Allreduce(MPI.IN_PLACE, flat)
        model.gradients.div_(comm.size)
        sgd.step()

    return Contender(
        ALLREDUCE, "`comm.Allreduce(MPI.IN_PLACE, flat)`, divide by M, `SGD(momentum=0.9).step()`", step, model.restore
    )


def gloo_steps(ranks: int, model: Model, sgd: SGD) -> list[Contender]:
    """What torch DDP does on CPUs, in fp32 and with its bf16 hook. The last gradients go first, as in backward."""
    buckets = model.gradients.split(DDP_BUCKET // 4)[::-1]
    halves = [bucket.bfloat16() for bucket in buckets]

    def step_fp32() -> None:
        works = [dist.all_reduce(bucket.div_(ranks), async_op=True) for bucket in buckets]
        for work in works:
            work.wait()
        sgd.step()

    def step_bf16() -> None:
        works = [
            dist.all_reduce(half.copy_(bucket).div_(ranks), async_op=True)
            for half, bucket in zip(halves, buckets, strict=True)
        ]
        for work, half, bucket in zip(works, halves, buckets, strict=True):
            work.wait()
            bucket.copy_(half)
        sgd.step()

    return [
        Contender(GLOO_FP32, "`dist.all_reduce` in buckets of 25 MiB, then the same SGD", step_fp32, model.restore),
        Contender(GLOO_BF16, "the same, cast to bf16 before and back after", step_bf16, model.restore),
    ]


# ----------------------------------------------------------------------------------------------- tables


def breakdown(steps: Sequence[WrappedStep]) -> Table:
    """Where a step's time goes."""
    columns = [*PHASES, "rest", "step"]
    rows = []
    for step in steps:
        medians = [1e3 * float(np.median([phases[column] for phases in step.phases])) for column in columns]
        rows.append([step.contender.name, *(f"{median:.2f}" for median in medians)])
    title = (
        "Phases in ms, mean over the ranks, medians (exchange: with waiting for others; rest: mostly the SGD inside)"
    )
    return Table(title, ["", *columns], rows)


def traffic(elements: int, ranks: int, reports: dict[str, StepReport]) -> Table:
    """Bytes a rank sends: by formula, and as the report counts them."""
    fp32 = ring_bytes(elements, 4, ranks)
    rows = [
        ["fp32 ring", "", "2 (M-1)/M 4d", mib(fp32), "", "", less(fp32, fp32)],
        ["bf16 ring", "", "2 (M-1)/M 2d", mib(fp32 / 2), "", "", less(fp32, fp32 / 2)],
    ]
    for name, report in reports.items():
        coordinate, symbol = (4.0, "4d") if name == MEAN else (1 / 8, "d/8")
        if "hierarchical" in report.exchange:
            formula, size = "(N-1)/N (k+1) d/8L", hierarchical_bytes(elements)
        elif "two_phase" in report.exchange:
            formula, size = f"2 (M-1)/M {symbol}", ring_bytes(elements, 1, ranks) * coordinate
        else:
            formula, size = f"(M-1) {symbol}", (ranks - 1) * elements * coordinate
        exchanges = ", ".join(f"{times} {exchange}" for exchange, times in Counter(report.exchange).items())
        sent = report.bytes_sent
        share = f"{100 * report.header_bytes / sent:.4f} %" if sent else ""
        rows.append([name, exchanges, formula, mib(size), mib(sent), share, less(fp32, sent)])
    columns = ["", "buckets", "formula", "by formula", "counted", "headers", "times less than an fp32 ring"]
    return Table("Bytes sent by each rank and step, M ranks, d coordinates", columns, rows)


def less(reference: float, size: float) -> str:
    return f"{reference / size:.2f}" if size else ""


if __name__ == "__main__":
    main()
