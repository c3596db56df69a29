"""How long a whole optimizer step takes on one GPU on ResNet-50's parameters, and what of it is the library's."""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import prod
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from alone import job
from bench_step import LR, resnet50_shapes
from harness import Contender, Report, Table, Target, compare, count, measure, parser
from torch.optim import SGD
from torch.profiler import ProfilerActivity, profile, record_function

import mpisign
from mpisign import DistributedSignOptimizer
from mpisign.bitmap import kernels
from mpisign.bitmap.host import words_for
from mpisign.exchange.choose import CAP_MB, CAP_MB_OF_GPUS, CHOICES, Choice

if TYPE_CHECKING:
    from mpi4py import MPI

SIGNUM, MEAN, FLOOR = "signum", "mean", "SGD alone"
DEVICE_MS = HOST_MS = 0.3  # what all work of a synchronize() on the device, and in Python, may take
STEPS = 20  # of which means are taken
SMALL_MESSAGES = f", messages of {CAP_MB:g} MiB"
MARK = "the steps"

WORDS = """\
The part of a training step after backward, on one GPU: `signsgd` and `signum` are `DistributedSignOptimizer.step()`
around `SGD(lr)`, `mean` is the same wrapper with full precision around `SGD(lr, momentum=0.9)`, and `SGD alone` is
`SGD(lr, momentum=0.9).step()`, the floor. Times are from a GPU at rest to a GPU at rest. Gradients are put back before
each run, untimed.

The parts are those of `synchronize()`, which is all the library does. *Device work* is the sum of all kernels and
copies, as the profiler sees them. *From first to last*, by CUDA events, has the waits of the GPU for the host in it.
*Host* is `synchronize()` on as many tensors of few elements in as many messages, by the clock: all that is not
bandwidth. Messages grow to {cap:g} MiB, the default where every rank has a GPU, if nothing else is said."""


def main() -> None:
    options = parser(
        __doc__ or "",
        [
            "python benchmarks/bench_step_gpu.py",
            "mpirun -n 4 python benchmarks/bench_step_gpu.py --report",
        ],
    )
    options.add_argument("--width", type=count, default=64, help="channels of the first stage; 64 is ResNet-50")
    options.add_argument("--exchange", choices=CHOICES, default="auto", help="of mpisign")
    args = options.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench_step_gpu.py needs a GPU that torch can use; bench_step.py measures the host")
    with job() as comm:
        device = mpisign.device()
        torch.cuda.set_device(device)
        run(args, device, torch.cuda.get_device_name(device), comm)


def run(args: argparse.Namespace, device: torch.device, gpu: str, comm: MPI.Comm | None) -> None:
    model = Model(list(resnet50_shapes(args.width)), device)
    sgd = SGD(model.parameters, lr=LR, momentum=0.9)
    steps = [
        model.step(mpisign.signsgd(), SGD(model.parameters, lr=LR), args.exchange),
        model.step(mpisign.signum(momentum=0.9), SGD(model.parameters, lr=LR), args.exchange),
        model.step(mpisign.mean(), SGD(model.parameters, lr=LR, momentum=0.9), args.exchange),
        Contender(FLOOR, "`SGD(momentum=0.9).step()`, no exchange", at_rest(sgd.step, device), model.restore),
    ]
    times = measure(steps, args.rounds, args.warmup, comm)
    small = Model(list(resnet50_shapes(1, classes=10)), device)
    share = small.words / model.words  # with so much less a message there are as many as the model has
    parts = {
        f"{method.name}{how}": take_apart(
            model.synchronizer(method, args.exchange, cap),
            small.synchronizer(method, args.exchange, share * cap),
            device,
        )
        for how, cap in (("", CAP_MB_OF_GPUS), (SMALL_MESSAGES, CAP_MB))
        for method in (mpisign.signsgd(), mpisign.signum(momentum=0.9))
    }
    ranks = mpisign.size()
    if mpisign.rank() != 0:
        return
    report = Report(
        "step-gpu" if ranks == 1 else f"step-gpu-{ranks}-ranks",
        f"An optimizer step on {model.elements:,} parameters in {len(model.parameters)} tensors, {ranks} rank(s) "
        f"on one {gpu}",
        WORDS.format(cap=CAP_MB_OF_GPUS),
        args,
        steps,
        times,
        [Target(SIGNUM, MEAN, 2.0)],
        [
            compare("Time of a step", times, [step.name for step in steps], [FLOOR, MEAN]),
            promises({name: part for name, part in parts.items() if not name.endswith(SMALL_MESSAGES)}),
            anatomy(parts),
            *([operations(parts)] if any(part.operations for part in parts.values()) else []),
        ],
        ranks=None if comm is None else ranks,
        extra={"gpu": gpu, "parts": {name: asdict(part) for name, part in parts.items()}},
    )
    report.show()
    if args.report:
        print("\n".join(f"wrote {path}" for path in report.write(args.results)))


# ------------------------------------------------------------------------------------------------ model


class Model:
    """Parameters, the same on every rank, and this rank's gradients."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], device: torch.device) -> None:
        torch.manual_seed(mpisign.rank())
        self.elements, self.device = sum(prod(shape) for shape in shapes), device
        self.words = sum(words_for(prod(shape)) for shape in shapes)
        self.parameters = [torch.nn.Parameter(torch.zeros(shape, device=device)) for shape in shapes]
        self._backward = [torch.randn(shape, device=device) for shape in shapes]
        self._gradients = [torch.empty_like(gradient) for gradient in self._backward]

    def restore(self) -> None:
        """Put the gradients back that a step has overwritten, as backward would."""
        torch._foreach_copy_(self._gradients, self._backward)
        for parameter, gradient in zip(self.parameters, self._gradients, strict=True):
            parameter.grad = gradient
        wait_for(self.device)

    def step(self, method: mpisign.Method, wrapped: SGD, exchange: Choice) -> Contender:
        optimizer = DistributedSignOptimizer(wrapped, method=method, exchange=exchange)
        what = f"`DistributedSignOptimizer(SGD(...), method=mpisign.{method.name}(...)).step()`"
        return Contender(method.name, what, at_rest(optimizer.step, self.device), self.restore)

    def synchronizer(self, method: mpisign.Method, exchange: Choice, bucket_cap_mb: float) -> Callable[[], None]:
        """A ``synchronize()`` that may be called again at once."""
        optimizer = DistributedSignOptimizer(
            SGD(self.parameters, lr=0.0), method=method, exchange=exchange, bucket_cap_mb=bucket_cap_mb
        )
        self.restore()

        def synchronize() -> None:
            optimizer.synchronize()
            optimizer._synchronized = False  # nothing is applied: the decision stands for the next gradients

        return synchronize


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def at_rest(step: Callable[[], object], device: torch.device) -> Callable[[], None]:
    """The step until the GPU is done with it."""

    def run() -> None:
        step()
        wait_for(device)

    return run


# ------------------------------------------------------------------------------------------------ parts


@dataclass
class Parts:
    """What one ``synchronize()`` is made of, mean or median of many.

    ``device_ms``, ``device_syncs``: None where the profiler does not see the GPU; ``allocations``: of torch on the
    device, and ``cupy_bytes`` by which CuPy's pool has grown, in all.
    """

    device_ms: float | None
    span_ms: float
    host_ms: float
    launches: dict[str, float]
    operations: dict[str, float]
    allocations: int
    cupy_bytes: int
    device_syncs: int | None


def take_apart(synchronize: Callable[[], None], small: Callable[[], None], device: torch.device) -> Parts:
    """Measure a ``synchronize()``; ``small`` is the same on as many tensors of few elements. **Collective.**"""
    for _ in range(3):  # compiles, allocates
        synchronize()
        small()
    spans, hosts = [], []
    for _ in range(STEPS):
        spans.append(by_events(synchronize, device))
        wait_for(device)
        began = perf_counter()
        small()
        hosts.append(1e3 * (perf_counter() - began))
    allocations, cupy_bytes = memory(device)
    with counted() as launches:
        for _ in range(STEPS):
            synchronize()
    allocations, cupy_bytes = (now - then for now, then in zip(memory(device), (allocations, cupy_bytes), strict=True))
    operations, syncs = profiled(synchronize, device)
    return Parts(
        sum(milliseconds for _, milliseconds in operations) / STEPS if operations else None,
        statistics.median(spans),
        statistics.median(hosts),
        {name: times / STEPS for name, times in launches.items()},
        {name: times / STEPS for name, times in Counter(name for name, _ in operations).items()},
        allocations,
        cupy_bytes,
        syncs if operations else None,
    )


def by_events(synchronize: Callable[[], None], device: torch.device) -> float:
    """Milliseconds from the first to the last that the device does."""
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    wait_for(device)
    first.record()
    synchronize()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last))


def memory(device: torch.device) -> tuple[int, int]:
    """Allocations that torch has made on the device so far, and bytes that CuPy's pool holds."""
    return (
        torch.cuda.memory_stats(device)["allocation.all.allocated"],
        kernels.import_cupy().get_default_memory_pool().total_bytes(),
    )


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """The library's kernels launched inside, by name."""
    launches: Counter[str] = Counter()
    launch = kernels.launch

    def counting(name: str, blocks: int, arguments: Sequence[Any], device: torch.device) -> None:
        launches[name] += 1
        launch(name, blocks, arguments, device)

    kernels.launch = counting
    try:
        yield launches
    finally:
        kernels.launch = launch


def profiled(synchronize: Callable[[], None], device: torch.device) -> tuple[list[tuple[str, float]], int]:
    """Kernels and copies of many steps with their milliseconds, and how often the whole device was waited for."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        with record_function(MARK):
            for _ in range(STEPS):
                synchronize()
        wait_for(device)
    events = profiler.events()
    mark = next(event.time_range for event in events if event.name == MARK and event.device_type.name == "CPU")
    on_device = [
        (event.name, event.time_range.elapsed_us() / 1e3)
        for event in events
        if event.device_type.name == "CUDA" and event.name != MARK and not event.name.startswith("mpisign::")
    ]
    syncs = [
        event
        for event in events
        if event.name in ("cudaDeviceSynchronize", "cuCtxSynchronize")
        and mark.start <= event.time_range.start <= mark.end
    ]
    return on_device, len(syncs)


# ----------------------------------------------------------------------------------------------- tables


def anatomy(parts: dict[str, Parts]) -> Table:
    rows = [
        [
            name,
            "not seen" if part.device_ms is None else f"{part.device_ms:.3f}",
            f"{part.span_ms:.3f}",
            f"{part.host_ms:.3f}",
            ", ".join(f"{times:g} {kernel}" for kernel, times in sorted(part.launches.items())),
        ]
        for name, part in parts.items()
    ]
    columns = ["", "device work, ms", "from first to last, ms", "host, ms", "launches of the library's kernels"]
    return Table("The parts of synchronize()", columns, rows)


def operations(parts: dict[str, Parts]) -> Table:
    """All that the device does, other people's kernels too."""
    rows = [
        [name, f"{times:g}", operation if len(operation) < 60 else operation[:57] + "..."]
        for name, part in parts.items()
        for operation, times in sorted(part.operations.items())
    ]
    return Table("Kernels and copies of one synchronize(), by the profiler", ["", "times", "what"], rows)


def promises(parts: dict[str, Parts]) -> Table:
    rows = []
    for name, part in parts.items():
        for what, at_most, measured in (
            ("device work, ms", DEVICE_MS, part.device_ms),
            ("host, ms", HOST_MS, part.host_ms),
            ("launches to pack", 1, sum(n for name, n in part.launches.items() if name.startswith("pack_"))),
            ("launches to unpack", 1, part.launches.get("unpack_many", 0)),
            ("allocations by torch", 0, part.allocations),
            ("bytes more in CuPy's pool", 0, part.cupy_bytes),
            ("waits for the whole device", 0, part.device_syncs),
        ):
            seen = "not seen" if measured is None else f"{measured:.3g}"
            verdict = "not known" if measured is None else "met" if measured <= at_most else "missed"
            rows.append([f"{name}: {what}", f"{at_most:g}", seen, verdict])
    return Table("Targets of one synchronize() of ResNet-50's 161 tensors", ["", "at most", "measured", ""], rows)


if __name__ == "__main__":
    main()
