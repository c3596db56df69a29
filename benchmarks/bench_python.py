"""How long Python takes for a synchronize() of ResNet-50's 161 tensors: one process, tensors of few elements."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from bench_step import resnet50_shapes
from harness import Contender, Report, compare, measure, one_thread, parser
from torch.optim import SGD

import mpisign
from mpisign import DistributedSignOptimizer, backends
from mpisign.backends import cuda
from mpisign.bitmap import kernels

STUBBED, HERE = "as on a GPU", "on the host"
AGAIN = 100  # calls in a run

WORDS = f"""\
One process, `signum(0.9)`, {AGAIN} calls of `synchronize()` a run; times in the table are those of a run, so that a
millisecond is {1000 // AGAIN} us of a call. The tensors are as many as ResNet-50's and hold few elements, so nearly all
of it is Python. `{STUBBED}`: the code for CUDA tensors, whose launches do nothing: what the CUDA driver takes comes on
top. `{HERE}`: the code for the host's, with its arithmetic. Gradients are the same tensors each time, or, where a row
says so, new ones, as after `zero_grad()`."""


def main() -> None:
    args = parser(__doc__ or "", ["python benchmarks/bench_python.py --report"]).parse_args()
    one_thread()
    mpisign.init()
    contenders = [*synchronizers(HERE), *as_on_a_gpu()]
    times = measure(contenders, args.rounds, args.warmup)
    table = compare(f"{AGAIN} calls of synchronize()", times, list(times), [])
    report = Report("python", "Python of a step", WORDS, args, contenders, times, [], [table])
    report.show()
    if args.report:
        print("\n".join(f"wrote {path}" for path in report.write(args.results)))


@contextmanager
def stubbed() -> Iterator[None]:
    """The host's tensors are taken for CUDA's inside, and nobody launches kernels."""
    with (
        patch.dict(backends.BACKENDS, {"cpu": backends.BACKENDS["cuda"]}),
        patch.object(kernels, "launch", lambda *launched: None),
        patch.object(cuda, "import_cupy", lambda: None),
    ):
        yield


def as_on_a_gpu() -> list[Contender]:
    with stubbed():
        contenders = synchronizers(STUBBED)
    return [Contender(one.name, one.what, stubbed()(one.run)) for one in contenders]


def synchronizers(name: str) -> list[Contender]:
    shapes = list(resnet50_shapes(1, classes=10))
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    optimizer = DistributedSignOptimizer(SGD(parameters, lr=0.0), method=mpisign.signum(0.9))
    drawn = [torch.randn(shape) for shape in shapes]

    def give() -> None:
        for parameter, gradient in zip(parameters, drawn, strict=True):
            parameter.grad = gradient.detach()

    def calls(before: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(AGAIN):
                before()
                optimizer.synchronize()
                optimizer._synchronized = False  # nothing is applied: the decision stands for the next gradients

        return run

    give()
    return [
        Contender(name, "`synchronize()`, the same gradients each time", calls(lambda: None)),
        Contender(f"{name}, new gradients", "with new tensors as gradients each time, which is timed too", calls(give)),
    ]


if __name__ == "__main__":
    main()
