"""Train a model of handwritten digits by one-bit majority vote, and again with full-precision mean gradients.

Both trainings have the same ranks, batches and initial weights; only what the ranks send each other differs.
Prints a table that compares them and draws their loss curves.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # a file, never a window
import matplotlib.pyplot as plt
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from tqdm import tqdm

import mpisign

EXAMPLES = """
examples:
  mpirun -n 4 python scripts/train_digits.py
  mpirun -n 4 python scripts/train_digits.py --seeds 0 1 2 --json out/digits.json
  mpirun -n 4 python scripts/train_digits.py --method lion --zeros abstain
  python scripts/train_digits.py --epochs 5          (one rank, voting alone)
"""

METHODS = {"signsgd": mpisign.signsgd, "signum": mpisign.signum, "lion": mpisign.lion}


@dataclass(frozen=True)
class Result:
    """What one training gave.

    Attributes:
        exchange: how the messages crossed MPI.
        accuracy: share of the test images that are classified right.
        bytes_sent: by rank 0 in one step.
        seconds_per_step: median on rank 0.
        losses: of each step, averaged over the ranks.
    """

    seed: int
    method: str
    exchange: str
    accuracy: float
    bytes_sent: int
    seconds_per_step: float
    losses: list[float]


def main() -> None:
    mpisign.init()
    args = parse_arguments()
    if "OMP_NUM_THREADS" not in os.environ:  # torch would start a thread per core in each rank
        torch.set_num_threads(max(1, torch.get_num_threads() // mpisign.local_size()))

    votes, means = [], []
    for seed in args.seeds:
        votes.append(run(args, seed, METHODS[args.method](), args.lr))
        # The mean of the ranks' momenta is the momentum of their mean, so here SGD itself may keep it.
        means.append(run(args, seed, mpisign.mean(), args.lr_mean, momentum=0.9))

    if mpisign.rank() == 0:
        report(args, votes, means)


def run(args: argparse.Namespace, seed: int, method: mpisign.Method, lr: float, momentum: float = 0.0) -> Result:
    """Train a new model by ``method`` and test it. **Collective.**"""
    train_set, test_set = load_data(seed)
    sampler = DistributedSampler(train_set, mpisign.size(), mpisign.rank(), seed=seed)
    loader = DataLoader(train_set, args.batch_size, sampler=sampler)
    torch.manual_seed(seed)
    model = build_model(args.hidden)

    optimizer = mpisign.DistributedSignOptimizer(
        torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum, weight_decay=1e-4),
        named_parameters=model.named_parameters(),
        method=method,
        zeros=args.zeros,
        ties=args.ties,
        exchange=args.exchange,
        seed=seed,
    )
    mpisign.broadcast_parameters(model.state_dict())
    mpisign.broadcast_optimizer_state(optimizer)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=args.epochs * len(loader))

    steps = args.epochs * len(loader)
    silent = args.quiet or mpisign.rank() > 0
    with tqdm(total=steps, desc=f"{method.name:7} seed {seed}", unit="step", disable=silent) as progress:
        losses, seconds = train(model, optimizer, scheduler, loader, args.epochs, progress)
    mpisign.check_consistency(model, optimizer)
    report = optimizer.report
    assert report is not None  # there was a step
    return Result(
        seed=seed,
        method=method.name,
        exchange="/".join(sorted(set(report.exchange))),
        accuracy=test(model, test_set),
        bytes_sent=report.bytes_sent,
        seconds_per_step=statistics.median(seconds),
        losses=np.mean(mpisign.allgather_object(losses), axis=0).tolist(),
    )


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    loader: DataLoader,
    epochs: int,
    progress: tqdm,
) -> tuple[list[float], list[float]]:
    """The training loop of any torch program. Returns the loss and the seconds of each step on this rank."""
    losses, seconds = [], []
    for epoch in range(epochs):
        loader.sampler.set_epoch(epoch)
        for images, labels in loader:
            began = time.perf_counter()
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            scheduler.step()
            seconds.append(time.perf_counter() - began)
            losses.append(loss.item())
            progress.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
            progress.update()
    return losses, seconds


@torch.no_grad()
def test(model: nn.Module, dataset: TensorDataset) -> float:
    """The share of the images that are classified right."""
    images, labels = dataset.tensors
    return (model(images).argmax(dim=1) == labels).double().mean().item()


def load_data(seed: int) -> tuple[TensorDataset, TensorDataset]:
    """1437 images to train on and 360 to test on, as (n, 64) fp32 pixels, standardised, and labels."""
    pixels, labels = load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(
        pixels, labels, test_size=0.2, stratify=labels, random_state=seed
    )
    scaler = StandardScaler().fit(train_x)

    def dataset(x: np.ndarray, y: np.ndarray) -> TensorDataset:
        return TensorDataset(torch.tensor(scaler.transform(x), dtype=torch.float32), torch.tensor(y))

    return dataset(train_x, train_y), dataset(test_x, test_y)


def build_model(hidden: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 10)
    )


# ------------------------------------------------------------------------------------------------- reporting


def report(args: argparse.Namespace, votes: Sequence[Result], means: Sequence[Result]) -> None:
    """Print the table, draw the curves, write the numbers."""
    Console().print(compare(votes, means))
    draw(votes, means, args.epochs, args.out)
    print(f"loss curves: {args.out}")
    if args.json is not None:
        options = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
        numbers = {
            "ranks": mpisign.size(),
            "options": options,
            "bytes_ratio": ratio(means[0].bytes_sent, votes[0].bytes_sent),
            "runs": [asdict(result) for pair in zip(votes, means, strict=True) for result in pair],
        }
        args.json.write_text(json.dumps(numbers, indent=1) + "\n")
        print(f"numbers: {args.json}")


def compare(votes: Sequence[Result], means: Sequence[Result]) -> Table:
    ranks, cores = mpisign.size(), len(os.sched_getaffinity(0))
    table = Table(title=f"Handwritten digits, ranks: {ranks}, seeds: {len(votes)}")
    table.add_column("gradients")
    for column in ("test accuracy", "bytes sent\nper rank and step", "seconds\nper step", "exchange"):
        table.add_column(column, justify="right")
    for label, results in ((f"one-bit vote ({votes[0].method})", votes), ("full-precision mean", means)):
        table.add_row(
            label,
            spread([100 * result.accuracy for result in results], 2) + " %",
            f"{results[0].bytes_sent:,}",
            spread([result.seconds_per_step for result in results], 4),
            results[0].exchange,
        )
    return table


def spread(values: Sequence[float], digits: int) -> str:
    """``mean``, or ``mean +- standard deviation`` of several values."""
    text = f"{statistics.fmean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {statistics.stdev(values):.{digits}f}"


def ratio(above: float, below: float) -> float | None:
    return above / below if below else None  # one rank sends nothing


def draw(votes: Sequence[Result], means: Sequence[Result], epochs: int, path: Path) -> None:
    """Training loss by epoch: the mean of each epoch's steps, over all seeds, and their 10 to 90 % band."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for label, results in ((f"one-bit vote ({votes[0].method})", votes), ("full-precision mean", means)):
        steps = np.array([result.losses for result in results]).reshape(len(results), epochs, -1)
        by_epoch = steps.swapaxes(0, 1).reshape(epochs, -1)
        x = np.arange(1, epochs + 1)
        low, high = np.percentile(by_epoch, [10, 90], axis=1)
        axes.plot(x, by_epoch.mean(axis=1), label=label)
        axes.fill_between(x, low, high, alpha=0.2)
    axes.set(xlabel="epoch", ylabel="training loss", yscale="log")
    axes.legend()
    figure.savefig(path, dpi=150)


# ------------------------------------------------------------------------------------------------- arguments


def parse_arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--epochs", type=int, default=30)
    p.add_argument("--batch-size", type=int, default=32)
    p.add_argument("--method", choices=METHODS, default="signum")
    p.add_argument("--lr", type=float, default=1e-3)
    p.add_argument("--lr-mean", type=float, default=0.1)
    p.add_argument("--zeros", default="coin")
    p.add_argument("--ties", default="coin")
    p.add_argument("--exchange", default="auto")
    p.add_argument("--seeds", type=int, nargs="+", default=[0])
    p.add_argument("--hidden", type=int, default=640)
    p.add_argument("--out", type=Path, default=Path("out/digits.png"))
    p.add_argument("--json", type=Path)
    p.add_argument("--quiet", action="store_true")
    args = p.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    return args


if __name__ == "__main__":
    main()
