"""How fast a checkpoint is written, against the disk's plain rate, and what an asynchronous one costs training."""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from bench_step import resnet50_shapes
from harness import Contender, Report, Table, Target, Times, compare, count, few_threads, measure, mib, parser

import mpisign
from mpisign import DistributedSignOptimizer, checkpoint

if TYPE_CHECKING:
    from mpi4py import MPI

PLAIN, SAVE, CALL = "plain write", "save", "save(asynchronous=True)"
BY_HAND = "torch.save by hand"
TRAIN, TRAIN_AND_WRITE = "training", "training while writing"

WORDS = """\
`save` is `mpisign.checkpoint.save()`: parameters once, each rank's momentum, checksums, all of it on the disk when it
returns. `plain write` writes as many bytes, from memory, into as many files on the same disk, with `os.fsync`: all
that the disk gives. `torch.save by hand` is what users write without it, `torch.save` of the same state, a file a rank,
by no means on the disk when it returns. `save(asynchronous=True)` is how long that call keeps a training step waiting.
`training` is some steps on made-up gradients, and `training while writing` the same steps beginning with such a call:
there the threads that write also compete for the cores. The disk is that of the folder given."""


def main() -> None:
    options = parser(
        __doc__ or "",
        [
            "mpirun -n 4 python benchmarks/bench_checkpoint.py",
            "mpirun -n 4 --oversubscribe --mca mpi_yield_when_idle 1 python benchmarks/bench_checkpoint.py --report",
            "mpirun -n 4 python benchmarks/bench_checkpoint.py --folder /scratch/me",
        ],
    )
    options.add_argument("--width", type=count, default=64, help="channels of the first stage; 64 is ResNet-50")
    options.add_argument("--steps", type=count, default=10, help="steps of a training; should take longer than a save")
    options.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="shared by all ranks")
    args = options.parse_args()
    few_threads()
    mpisign.init()

    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    folder = Path(mpisign.broadcast_object(tempfile.mkdtemp(dir=args.folder) if comm.rank == 0 else None))
    try:
        job = Job(args.width, args.steps, folder, comm)
        times = measure(job.contenders, args.rounds, args.warmup, comm)
        checkpoint.wait()
    finally:
        comm.Barrier()
        if comm.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
    if comm.rank != 0:
        return
    args.folder = "a folder"  # what it is called here says nothing
    report = Report(
        "checkpoint",
        f"Saving {job.elements:,} parameters with momentum, {comm.size} rank(s)",
        WORDS,
        args,
        job.contenders,
        times,
        [Target(SAVE, PLAIN, 0.5), Target(CALL, SAVE, 10.0)],
        [
            compare("Time", times, [one.name for one in job.contenders], [PLAIN, SAVE]),
            rates(times, job.bytes),
            delays(times),
        ],
        ranks=comm.size,
        extra={"parameters": job.elements, "bytes": job.bytes},
    )
    report.show()
    if args.report:
        print("\n".join(f"wrote {path}" for path in report.write(args.results)))


class Job:
    """A model after its first step, so that there is a momentum, and what is done with it."""

    def __init__(self, width: int, steps: int, folder: Path, comm: MPI.Comm) -> None:
        generator = torch.Generator().manual_seed(1 + comm.rank)
        self.model = torch.nn.ParameterList(torch.randn(shape) for shape in resnet50_shapes(width))
        mpisign.broadcast_parameters(self.model.state_dict())
        self.optimizer = DistributedSignOptimizer(torch.optim.SGD(self.model.parameters(), lr=1e-4))
        for parameter in self.model:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        self.elements = sum(parameter.numel() for parameter in self.model)
        self.folder, self.steps, self.rank, self.saves = folder, steps, comm.rank, 0
        self.train()

        saved = self.save()
        self.bytes = sum(path.stat().st_size for path in saved.glob("*.pt"))
        names = [f"rank-{comm.rank:05d}.pt", *(["shared.pt"] if comm.rank == 0 else [])]
        random = np.random.default_rng(comm.rank)
        self.payload = [random.integers(0, 256, (saved / name).stat().st_size, np.uint8) for name in names]
        self.contenders = [
            Contender(PLAIN, "`write` and `fsync` of as many bytes and files", self.write, self.begin),
            Contender(BY_HAND, "`torch.save` of the same state, a file a rank", self.save_by_hand, self.begin),
            Contender(SAVE, "`mpisign.checkpoint.save(keep=1)`", self.save, self.begin),
            Contender(CALL, "the same in the background: only the call", self.save_meanwhile, self.begin),
            Contender(TRAIN, f"{steps} x `optimizer.step()`", self.train, self.begin),
            Contender(TRAIN_AND_WRITE, "the same, after such a call", self.train_and_write, self.begin),
        ]

    def begin(self) -> None:
        """Let the disk be at rest, and empty of what the last contender has written."""
        checkpoint.wait()
        for file in self.folder.glob(f"*-{self.rank}"):
            file.unlink()

    def write(self) -> None:
        for at, content in enumerate(self.payload):
            with open(self.folder / f"plain{at}-{self.rank}", "xb", buffering=0) as file:
                file.write(content.data)
                os.fsync(file.fileno())

    def save_by_hand(self) -> None:
        own = {"optimizer": self.optimizer.state_dict(), "rng": torch.get_rng_state()}
        shared = {"model": self.model.state_dict()} if self.rank == 0 else {}
        torch.save(own | shared, self.folder / f"hand-{self.rank}")

    def save(self, asynchronous: bool = False) -> Path:
        self.saves += 1
        return checkpoint.save(
            self.folder, model=self.model, optimizer=self.optimizer, step=self.saves, keep=1, asynchronous=asynchronous
        )

    def save_meanwhile(self) -> None:
        self.save(asynchronous=True)

    def train(self) -> None:
        for _ in range(self.steps):
            self.optimizer.step()

    def train_and_write(self) -> None:
        self.save(asynchronous=True)
        self.train()


def rates(times: Times, size: int) -> Table:
    rows = [
        [name, f"{size / statistics.median(times[name]) / 2**20:.0f}", f"{size / min(times[name]) / 2**20:.0f}"]
        for name in (PLAIN, BY_HAND, SAVE)
    ]
    return Table(f"{mib(size)} written by all ranks together", ["", "median MiB/s", "fastest MiB/s"], rows)


def delays(times: Times) -> Table:
    """What of a save's time training waits for, by the call and in all."""

    def share(waits: list[float]) -> list[str]:
        shares = [wait / save for wait, save in zip(waits, times[SAVE], strict=True)]
        return [f"{1e3 * statistics.median(waits):.1f}", f"{100 * statistics.median(shares):.0f} %"]

    more = [there - here for here, there in zip(times[TRAIN], times[TRAIN_AND_WRITE], strict=True)]
    rows = [["the call", *share(times[CALL])], ["the call and the steps beside the writing", *share(more)]]
    return Table("An asynchronous save delays training by", ["", "median ms", "of a save's time"], rows)


if __name__ == "__main__":
    main()
