"""Learn handwritten digits twice: by one-bit majority vote, and with the full-precision mean of the gradients.

Both trainings have the same ranks, batches and initial weights; what the ranks send each other differs.
Prints a table that compares them, and draws their loss curves.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

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

EXAMPLES = """\
examples:
  mpirun -n 4 python scripts/train_digits.py
  mpirun -n 4 python scripts/train_digits.py --seeds 0 1 2 --json out/digits.json
  mpirun -n 4 python scripts/train_digits.py --method signsgd --zeros abstain --exchange allgather
  python scripts/train_digits.py --epochs 5          one rank, which votes alone
"""

METHODS = {"signsgd": mpisign.signsgd, "signum": mpisign.signum, "lion": mpisign.lion}


@dataclass(frozen=True)
class Result:
    """What one training gave.

    Attributes:
        parameters: how many the model has.
        exchange: how its messages crossed MPI.
        accuracy: the share of the test images it names right.
        bytes_sent: by rank 0 in one step.
        seconds_per_step: the median on rank 0.
        losses: of each step, averaged over the ranks.
    """

    seed: int
    method: str
    parameters: int
    exchange: str
    accuracy: float
    bytes_sent: int
    seconds_per_step: float
    losses: list[float]


def main() -> None:
    mpisign.init()
    args = parse_arguments()
    if "OMP_NUM_THREADS" not in os.environ:  # torch would start a thread a core on each rank
        torch.set_num_threads(max(1, torch.get_num_threads() // mpisign.local_size()))

    votes, means = [], []
    for seed in args.seeds:
        votes.append(run(args, seed, METHODS[args.method](), args.lr))
        # SGD may keep the momentum here: it is linear, so before or after the mean is all the same.
        means.append(run(args, seed, mpisign.mean(), args.lr_mean, momentum=0.9))
    if mpisign.rank() == 0:
        show(args, votes, means)


def run(args: argparse.Namespace, seed: int, method: mpisign.Method, lr: float, momentum: float = 0.0) -> Result:
    """Train a new model by ``method`` and test it. **Collective.**"""
    train_set, test_set = load_data(seed)
    sampler: DistributedSampler = DistributedSampler(train_set, mpisign.size(), mpisign.rank(), seed=seed)
    loader = DataLoader(train_set, args.batch_size, sampler=sampler)
    steps = args.epochs * len(loader)

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
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    mpisign.broadcast_parameters(model.state_dict())
    mpisign.broadcast_optimizer_state(optimizer)

    silent = args.quiet or mpisign.rank() > 0
    with tqdm(total=steps, desc=f"seed {seed}, {method.name}", unit="step", disable=silent) as progress:
        losses, seconds = train(model, optimizer, scheduler, loader, sampler, args.epochs, progress)
    mpisign.check_consistency(model, optimizer)

    report = optimizer.report
    assert report is not None  # there has been a step
    return Result(
        seed=seed,
        method=method.name,
        parameters=sum(p.numel() for p in model.parameters()),
        exchange="/".join(sorted(set(report.exchange))),
        accuracy=measure_accuracy(model, test_set),
        bytes_sent=report.bytes_sent,
        seconds_per_step=statistics.median(seconds),
        losses=np.mean(mpisign.allgather_object(losses), axis=0).tolist(),
    )


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    loader: DataLoader,
    sampler: DistributedSampler,
    epochs: int,
    progress: tqdm,
) -> tuple[list[float], list[float]]:
    """The training loop of any torch program. Returns this rank's loss and seconds of each step."""
    losses, seconds = [], []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
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
def measure_accuracy(model: nn.Module, dataset: TensorDataset) -> float:
    images, labels = dataset.tensors
    return float((model(images).argmax(dim=1) == labels).double().mean())


def load_data(seed: int) -> tuple[TensorDataset, TensorDataset]:
    """1437 images to train on and 360 to test on: 64 standardised pixels in fp32, and the digit."""
    pixels, digits = load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(
        pixels, digits, test_size=0.2, stratify=digits, random_state=seed
    )
    scaler = StandardScaler().fit(train_x)

    def dataset(x: np.ndarray, y: np.ndarray) -> TensorDataset:
        return TensorDataset(torch.tensor(scaler.transform(x), dtype=torch.float32), torch.tensor(y))

    return dataset(train_x, train_y), dataset(test_x, test_y)


def build_model(hidden: int) -> nn.Module:
    return nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 10))


# ------------------------------------------------------------------------------------------------- the results


def show(args: argparse.Namespace, votes: Sequence[Result], means: Sequence[Result]) -> None:
    """Print the table, write the figure and the numbers."""
    # mpirun gives each rank a terminal of its own, so rich would colour what goes to a file in the end.
    Console(color_system=None).print(compare(votes, means))
    draw(votes, means, args.epochs, args.out)
    print(f"loss curves: {args.out}")
    if args.json is not None:
        options = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
        runs = [asdict(result) for pair in zip(votes, means, strict=True) for result in pair]
        bytes_ratio = ratio(means[0].bytes_sent, votes[0].bytes_sent)
        numbers = {"ranks": mpisign.size(), "options": options, "bytes_ratio": bytes_ratio, "runs": runs}
        args.json.write_text(json.dumps(numbers, indent=1) + "\n")
        print(f"all numbers: {args.json}")


def compare(votes: Sequence[Result], means: Sequence[Result]) -> Table:
    vote, mean = votes[0], means[0]
    title = f"Handwritten digits: {vote.parameters:,} parameters, ranks: {mpisign.size()}, seeds: {len(votes)}"
    table = Table(title=title, caption=f"exchange: {vote.exchange} (vote), {mean.exchange} (mean)")
    table.add_column()
    for heading in ("test accuracy", "bytes sent per\nrank and step", "seconds\nper step"):
        table.add_column(heading, justify="right")
    seconds = []
    for label, results in ((f"one-bit vote ({vote.method})", votes), ("full-precision mean", means)):
        seconds.append([result.seconds_per_step for result in results])
        accuracies = [100 * result.accuracy for result in results]
        table.add_row(label, f"{spread(accuracies, 2)} %", f"{results[0].bytes_sent:,}", spread(seconds[-1], 4))
    times_bytes = ratio(mean.bytes_sent, vote.bytes_sent)
    times_seconds = statistics.fmean(seconds[1]) / statistics.fmean(seconds[0])
    table.add_section()
    table.add_row("mean / vote", "", f"{times_bytes:.1f} x" if times_bytes else "-", f"{times_seconds:.2f} x")
    return table


def ratio(above: float, below: float) -> float | None:
    return above / below if below else None  # one rank alone sends nothing


def spread(values: Sequence[float], digits: int) -> str:
    """The mean; of several values, with their standard deviation."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def draw(votes: Sequence[Result], means: Sequence[Result], epochs: int, path: Path) -> None:
    """Training loss by epoch, as the median and the middle 80 % of its steps on all seeds."""
    # Slow to import, and one rank needs them.
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    x = range(1, epochs + 1)
    for label, results in ((f"one-bit vote ({votes[0].method})", votes), ("full-precision mean", means)):
        losses = np.array([np.reshape(result.losses, (epochs, -1)) for result in results])
        low, median, high = np.percentile(losses, [10, 50, 90], axis=(0, 2))
        accuracy = spread([100 * result.accuracy for result in results], 1)
        (line,) = axes.plot(x, median, marker=".", label=f"{label}: test accuracy {accuracy} %")
        axes.fill_between(x, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set_title(f"Handwritten digits on {mpisign.size()} ranks")
    axes.set(xlabel="epoch", ylabel="training loss: median and middle 80 %", yscale="log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


# ------------------------------------------------------------------------------------------------- the options


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and leaves the examples as they are."""


def whole(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 up, such as 20")
    return int(text)


def rate(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a positive number, such as 0.001")


def seed_number(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a seed: give one or more of 0 .. 2^32 - 1, as --seeds 0 1 2")
    return int(text)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--epochs", type=whole, default=20, help="passes over the training images")
    add("--batch-size", type=whole, default=32, help="images per rank and step")
    add("--hidden", type=whole, default=640, help="units in each of the two hidden layers")
    add("--method", choices=METHODS, default="signum", help="what each rank votes with")
    # Each the best of its kind, 2e-4 to 1e-3 and 0.02 to 0.2, in test accuracy on seeds 100 to 105.
    add("--lr", type=rate, default=3e-4, help="learning rate of the vote, at the start of a cosine; tuned for signum")
    add("--lr-mean", type=rate, default=0.08, help="learning rate of the full-precision mean, likewise")
    add("--zeros", choices=("coin", "abstain", "positive"), default="coin", help="what an exactly zero value votes")
    add("--ties", choices=("coin", "zero", "positive"), default="coin", help="who wins a tied vote")
    add("--exchange", choices=("auto", "allgather", "two_phase"), default="auto", help="how messages cross MPI")
    add("--seeds", type=seed_number, nargs="+", default=[0], help="of split, weights, order; several: mean ± std")
    add("--out", type=Path, default=Path("out/digits.png"), help="the loss curves; the folder is made")
    add("--json", type=Path, help="write all numbers of all seeds to this file")
    add("--quiet", action="store_true", help="no progress bar")
    # Every rank reads the same command line; one is enough to speak about it.
    with contextlib.ExitStack() as stack:
        if mpisign.rank() > 0:
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        args = parser.parse_args()
        if args.out.suffix != ".png":
            parser.error(f"--out {args.out} must end in .png, such as --out out/digits.png")
        for path in filter(None, (args.out, args.json)):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                parser.error(f"cannot write {path}: {error.strerror}; name a file in a folder that can be made")
    return args


if __name__ == "__main__":
    main()
