"""What the experiments share: small trainings on the digits, with adversaries if asked, and dated reports."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import re
import shlex
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from flags import HelpFormatter, count, make_folder, need_matplotlib, rate, whole
from torch import Tensor, nn
from train_digits import build_model, load_data, measure_accuracy

import mpisign
from mpisign import attacks
from mpisign.memory import LionMomentum, Momentum

if TYPE_CHECKING:
    from matplotlib.figure import Figure

T = TypeVar("T")

RESULTS = Path(os.path.relpath(Path(__file__).parent / "results"))

_load_data = cache(load_data)  # parsing them takes as long as a short training

_LAUNCHERS = ("mpirun", "mpiexec", "mpiexec.hydra", "prterun", "srun")

# ------------------------------------------------------------------------------------------------ trainings


@dataclass(frozen=True)
class LabelFlip:
    """Not what an adversary sends, but what it learns from: it honestly follows data whose labels are flipped."""


Attack = attacks.Attack | LabelFlip


@dataclass(frozen=True)
class Recipe:
    """How to train by a method: the method, and the learning rate of the wrapped SGD at the start of a cosine.

    ``momentum`` is the wrapped SGD's, for methods that are linear enough to keep it there. It is an average like that
    of the methods which keep it on the worker, so that learning rates mean the same. With ``every``, AdamW steps in its
    place, on each rank's own gradients, and differences are exchanged after so many steps, and at the end.
    """

    method: mpisign.Method
    lr: float
    momentum: float = 0.0
    every: int | None = None


@dataclass(frozen=True)
class Outcome:
    """What a training gave, the same on all ranks.

    Attributes:
        accuracy: the share of the test images that the model names right; of the worst honest rank's model where
            replicas differ.
        losses: of each step, the mean over the honest ranks' batches; not finite once parameters are not.
        finite: whether the parameters of all honest ranks still are numbers. If not, the model names every image alike.
    """

    accuracy: float
    losses: list[float]
    finite: bool


def train_fresh(
    recipe: Recipe,
    *,
    seed: int,
    steps: int,
    batch_size: int,
    hidden: int,
    by_class: bool = False,
    attack: Attack | None = None,
    adversaries: Collection[int] = (),
) -> Outcome:
    """Train a new model on the digits from a seed: of the split, weights, batches, coins and noise. **Collective.**

    Args:
        by_class: deal the training images to the ranks by their class, class c to rank c modulo the number of ranks
            (with more ranks than classes, ranks c, c + 10, ... share class c), not at random.
        attack: what ``adversaries``, ranks, do to their data, or to what they send, after the method's momentum.

    Raises:
        OptionError: the method cannot run on so many ranks, or the attack with so few honest ones.
    """
    train_set, test_set = _load_data(seed)
    torch.manual_seed(seed)
    model = build_model(hidden)
    sgd = torch.optim.SGD(model.parameters(), recipe.lr, recipe.momentum, dampening=recipe.momentum)
    wrapped = torch.optim.AdamW(model.parameters(), recipe.lr) if recipe.every else sgd
    optimizer = mpisign.DistributedSignOptimizer(
        wrapped, model.named_parameters(), method=recipe.method, seed=seed, every=recipe.every
    )
    optimizer.set_epoch(sys.maxsize)  # past any warm-up
    cosine = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / steps)) / 2)
    outgoing, adversary = Outgoing(recipe.method, sgd), None
    if isinstance(attack, attacks.Attack):
        adversary = attacks.Adversary(
            attack,
            adversaries,
            _world(),
            i_know_this_is_an_attack=True,
            seed=seed,
            view=outgoing.view,
            place=outgoing.place,
        )
    images, labels = train_set.tensors
    mine = _dealt(labels, by_class, seed)
    images, labels = images[mine], labels[mine]
    if isinstance(attack, LabelFlip) and mpisign.rank() in adversaries:
        labels = attacks.flip_labels(labels, 10)
    random = torch.Generator().manual_seed(seed * mpisign.size() + mpisign.rank())
    losses: list[float] = []

    def corrupt_difference(*_: Any) -> None:
        """After a local step, and before an exchange if one comes now."""
        if adversary and recipe.every and (len(losses) + 1 == steps or (len(losses) + 1) % recipe.every == 0):
            _corrupt_difference(model, optimizer, adversary, hostile=mpisign.rank() in adversaries)

    wrapped.register_step_post_hook(corrupt_difference)
    for _ in range(steps):
        batch = torch.randint(len(labels), (batch_size,), generator=random)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
        loss.backward()
        if adversary and not recipe.every:
            adversary.corrupt(model.parameters())
        optimizer.step()
        cosine.step()
        losses.append(loss.item())
    if recipe.every:
        optimizer.join()

    finite = all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    honest = [
        result
        for rank, result in enumerate(
            mpisign.allgather_object((measure_accuracy(model, test_set, torch.device("cpu")), losses, finite))
        )
        if rank not in adversaries
    ]
    accuracies, curves, alive = zip(*honest, strict=True)
    return Outcome(min(accuracies), np.mean(curves, axis=0).tolist(), all(alive))


class Outgoing:
    """What leaves the momentum in front of the codec, for an adversary to see and to replace by way of the gradient.

    It keeps two momenta, which the library does not show: the one of an honest rank, which an attack is made from, and
    the one that the attack has left in the method. Memories of other kinds get the adversary's vector as gradient.
    Where parameters are sent, what leaves is what plain SGD makes of them with that momentum.
    """

    def __init__(self, method: mpisign.Method, sgd: torch.optim.SGD) -> None:
        memory = method.memory
        self._step_of = sgd.param_groups[0] if method.exchanges_models else None
        self._now, self._later = 0.0, 0.0  # what is sent is now m + (1 - now) g, and then m is later m + (1 - later) g
        if isinstance(memory, Momentum):
            self._now = self._later = memory.beta
        elif isinstance(memory, LionMomentum):
            self._now, self._later = memory.beta1, memory.beta2
        self._honest: dict[Tensor, Tensor] = {}
        self._actual: dict[Tensor, Tensor] = {}

    def view(self, parameter: Tensor) -> Tensor | None:
        """What an honest rank would send with this gradient; to be called once a step."""
        if parameter.grad is None:
            return None
        momentum = self._honest.setdefault(parameter, torch.zeros_like(parameter))
        sent = momentum.lerp(parameter.grad, 1 - self._now)
        momentum.lerp_(parameter.grad, 1 - self._later)
        return sent if self._step_of is None else parameter.detach() - self._step_of["lr"] * sent

    def place(self, parameter: Tensor, sent: Tensor) -> None:
        """Leave the gradient with which the method will send ``sent``."""
        assert parameter.grad is not None
        if self._step_of is not None:
            sent = (parameter.detach() - sent) / self._step_of["lr"]
        momentum = self._actual.setdefault(parameter, torch.zeros_like(parameter))
        gradient = (sent - self._now * momentum) / (1 - self._now)
        parameter.grad.copy_(gradient)
        # Where it is no number the rank abstains, and its momentum stays.
        momentum.copy_(torch.where(gradient.isfinite(), momentum.lerp(gradient, 1 - self._later), momentum))


def _corrupt_difference(
    model: nn.Module, optimizer: mpisign.DistributedSignOptimizer, adversary: attacks.Adversary, *, hostile: bool
) -> None:
    """Leave a hostile rank's parameters where what it sends at a window's end is what it wants. **Collective.**"""
    assert optimizer.outer is not None
    common = [its.detach() for group in optimizer.outer.param_groups for its in group["params"]]
    pairs = list(zip(model.parameters(), common, strict=True))
    gradients = [parameter.grad for parameter, _ in pairs]
    for parameter, its in pairs:
        parameter.grad = its - parameter.detach()
    adversary.corrupt(model.parameters())
    for (parameter, its), gradient in zip(pairs, gradients, strict=True):
        if hostile and parameter.grad is not None:
            parameter.detach().copy_(its - parameter.grad)
        parameter.grad = gradient


def _world() -> Any:
    from mpi4py import MPI  # importing it starts MPI

    return MPI.COMM_WORLD


def _dealt(labels: Tensor, by_class: bool, seed: int) -> Tensor:
    """The indices of this rank's training images."""
    size, rank = mpisign.size(), mpisign.rank()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    if not by_class:
        return order[rank::size]
    if size <= 10:
        return order[labels[order] % size == rank]
    sharing = range(rank % 10, size, 10)
    return order[labels[order] == rank % 10][sharing.index(rank) :: len(sharing)]


# -------------------------------------------------------------------------------------------- the command line


def make_parser(description: str | None, examples: str) -> argparse.ArgumentParser:
    """A parser with the flags that both experiments on the digits have."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [OPTIONS]", description=description, epilog=examples, formatter_class=HelpFormatter
    )
    add = parser.add_argument
    add("--seeds", type=count, nargs="+", metavar="SEED", default=[0, 1, 2], help="what is shown is the mean over them")
    add("--steps", type=whole, default=30, metavar="N", help="of each training")
    add("--batch-size", type=whole, default=32, metavar="N", help="images per rank and step")
    add("--hidden", type=whole, default=32, metavar="N", help="units in each of the two hidden layers")
    add("--lr-scale", type=rate, default=1.0, metavar="X", help="multiplies all learning rates, for tuning")
    add("--quick", action="store_true", help="takes seconds: other defaults, for the smallest grid that says something")
    add("--out", type=Path, default=Path("out"), metavar="FOLDER", help="where the report goes; it is made")
    add("--report", action="store_true", help=f"write the report to {RESULTS} instead")
    add("--quiet", action="store_true", help="no progress bar")
    return parser


def parse(parser: argparse.ArgumentParser, quick: Mapping[str, Any]) -> argparse.Namespace:
    """Read the command line, where ``--quick`` stands for other defaults, and make the folder of the report."""
    args = parser.parse_args()
    if args.quick:
        parser.set_defaults(**quick)
        args = parser.parse_args()
    args.out = RESULTS if args.report else args.out
    make_folder(parser, args.out, args.out)
    need_matplotlib(parser)
    return args


# --------------------------------------------------------------------------------------------------- reports


def write_report(
    folder: Path, name: str, text: str, data: Mapping[str, Any], figures: Mapping[str, Callable[[], Figure]]
) -> Path:
    """Write ``YYYY-MM-DD-NAME.md``, ``.json`` and ``-FIGURE.png`` into ``folder``; for one rank to call.

    A report of the same day and name is replaced.

    Args:
        text: Markdown: a heading (``# ...``), a paragraph on what was found, and whatever else there is. The figures
            come after that paragraph; at the end, what was typed, and what it ran on.
        data: all raw numbers, for the JSON: to six digits, and null where they are not finite. ``data["seeds"]`` is
            also said in the text, and so is ``data["ranks"]`` where it is not this job's.
        figures: what draws each, when all else is written, by its name, for the file names; ``""`` is a figure without
            a name of its own.

    Returns:
        The path of the Markdown file.
    """
    now = datetime.now().astimezone()
    stem = f"{now:%Y-%m-%d}-{name}"
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {figure: f"{stem}-{figure}.png" if figure else f"{stem}.png" for figure in figures}
    ranks = data.get("ranks") or mpisign.size()
    about = {"ranks": ranks, "seeds": data.get("seeds", []), **_circumstances()}
    raw = {"experiment": name, "date": now.isoformat(timespec="seconds"), "command": _command(), **about, **data}
    lines = json.dumps(_plain(raw), indent=1)
    short = re.sub(r"\[[^][{}]+\]", lambda numbers: " ".join(numbers[0].split()), lines)  # a list of numbers is a line
    (folder / f"{stem}.json").write_text(short + "\n")
    heading, summary, *rest = text.strip().split("\n\n", 2)
    facts = [f"- **{key}**: {' '.join(map(str, v)) if isinstance(v, list) else v}" for key, v in about.items() if v]
    parts = [
        f"{heading}, {now:%Y-%m-%d}",
        summary,
        *(f"![{figure or name}]({picture})" for figure, picture in pictures.items()),
        *rest,
        f"## What ran, and where\n\n```\n{_command()}\n```",
        "\n".join(facts),
        f"All raw numbers are in `{stem}.json`.",
    ]
    path = folder / f"{stem}.md"
    path.write_text("\n\n".join(parts) + "\n")
    for figure, draw in figures.items():
        draw().savefig(folder / pictures[figure], dpi=110)
    return path


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of text cells; the first column to the left, the others to the right."""
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _plain(value: Any) -> Any:
    """What JSON can say, numbers to six digits."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, Path):
        return shown(value)
    return value if isinstance(value, int | str | None) else str(value)


def _command() -> str:
    """What was typed: this process's command line, or that of the launcher above it, without absolute paths."""
    typed = ["python", *sys.argv]
    parent = [""]
    with contextlib.suppress(OSError):  # systems other than Linux have no /proc, and some hide others' processes
        parent = Path(f"/proc/{os.getppid()}/cmdline").read_text().rstrip("\0").split("\0")
    if Path(parent[0]).name in _LAUNCHERS:
        typed = ["mpirun" if Path(parent[0]).name == "prterun" else parent[0], *parent[1:]]  # prterun is mpirun inside
    return shlex.join(shown(Path(word)) if Path(word).is_absolute() else word for word in typed)


def shown(path: Path) -> str:
    """As it is from the repository's root; of one outside, which is a place of this machine, the last name."""
    root, full = Path(__file__).resolve().parents[1], path.resolve()
    return str(full.relative_to(root)) if full.is_relative_to(root) else path.name


def _circumstances() -> dict[str, Any]:
    """Versions, and the machine."""
    from mpi4py import MPI

    return {
        "cores": os.cpu_count(),
        "nodes": mpisign.num_nodes() if mpisign.is_initialized() else 1,
        "machine": platform.platform(),
        "Python": platform.python_version(),
        "mpisign": mpisign.__version__,
        **{package: version(package) for package in ("torch", "numpy", "mpi4py")},
        "MPI": MPI.Get_library_version().splitlines()[0].split(", package")[0].strip("\0 "),
    }
