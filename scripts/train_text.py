"""Teach a small transformer Python three ways: Lion by majority vote, AdamW on averaged gradients, and DGC.

The text is Python's own library, byte by byte, so nothing is downloaded. All trainings have the same ranks, batches
and initial weights; what the ranks send each other differs. Shows the loss on files that were not trained on, by step,
by byte sent and by second.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import statistics
import sysconfig
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from batches import Batches
from experiments import RESULTS, markdown_table, write_report
from flags import FREE, HelpFormatter, add_flags, amount, count, end, make_folder, parse, rate, said_once, whole
from rich.console import Console
from rich.table import Table
from text_contenders import CONTENDERS, DEFAULT, Contender, make_contenders
from torch import nn
from torch.utils.data import Dataset
from training import distribute, take_device, train

import mpisign

EXAMPLES = """\
examples:
  mpirun -n 4 python scripts/train_text.py
  mpirun -n 4 python scripts/train_text.py --quick
  mpirun -n 4 python scripts/train_text.py --only vote --method signum --lr 1e-3
  mpirun -n 4 python scripts/train_text.py --seeds 0 1 --report
  sudo -E benchmarks/slow_network 4 100mbit python scripts/train_text.py        four hosts with a slow network

On one machine ranks exchange through memory, and seconds do not show what a network costs: the last example does.

Learning rates are the best of these, on seed 100, 4 ranks, --epochs 10. Each with its bits per byte of validation text:
  lion:beta2=0.95      1e-3: 3.543, 2e-3: 3.609
  lion:beta2=0.99      5e-4: 3.750, 1e-3: 3.955, 2e-3: 3.747
  AdamW                1.5e-3: 3.493, 3e-3: 3.365, 6e-3: 3.214, 12e-3: 3.832
  DGC                  0.3: 3.698, 1: 3.513, 3: 4.037
"""
QUICK = {"layers": 1, "width": 64, "epochs": 4, "epoch_windows": 320, "eval_windows": 64, "megabytes": 1.0}
# A checkpoint of one method does not depend on which others there are, nor on how its options were said.
FREE.update({"only", "quick", "report", "results"})
SHARES = {"training": 0.9, "validation": 0.1}


@dataclass(frozen=True)
class Result:
    """What one training gave.

    Attributes:
        parameters: how many the model has.
        losses: of each step, in nats, averaged over the ranks.
        seconds, bytes_sent: of each step, on rank 0, without evaluations.
        steps, bits: when the model was evaluated, and the bits it needed for a byte of the validation text.
    """

    contender: str
    label: str
    seed: int
    parameters: int
    exchange: str
    losses: list[float]
    seconds: list[float]
    bytes_sent: list[int]
    steps: list[int]
    bits: list[float]

    def curve(self, by: str) -> list[float]:
        """What had been spent in all, ``steps``, ``bytes_sent`` or ``seconds``, at each evaluation."""
        if by == "steps":
            return list(map(float, self.steps))
        spent = list(accumulate(getattr(self, by)))
        return [spent[step - 1] for step in self.steps]

    def until(self, bits: float, by: str) -> float:
        """What had been spent, likewise, when the loss first was ``bits`` or less, between evaluations on a line."""
        spent = self.curve(by)
        at = next(i for i, value in enumerate(self.bits) if value <= bits)
        if at == 0:
            return spent[0]
        share = (self.bits[at - 1] - bits) / (self.bits[at - 1] - self.bits[at])
        return spent[at - 1] + share * (spent[at] - spent[at - 1])


def main() -> None:
    mpisign.init()
    args = parse_arguments()
    device = take_device()
    text = {part: torch.frombuffer(bytearray(data), dtype=torch.uint8) for part, data in read_text(args).items()}
    contenders = {name: contender for name, contender in make_contenders(args).items() if name in args.only}
    results = [
        run(args, device, text, seed, name, contender) for seed in args.seeds for name, contender in contenders.items()
    ]
    if mpisign.rank() == 0 and all(result.bits for result in results):  # --max-steps may end before an evaluation
        show(args, results, {part: len(data) for part, data in text.items()})


def run(
    args: argparse.Namespace,
    device: torch.device,
    text: dict[str, torch.Tensor],
    seed: int,
    name: str,
    contender: Contender,
) -> Result:
    """Train a new model. **Collective.**"""
    torch.manual_seed(seed)
    model = Transformer(args.layers, args.width, args.heads, args.context).to(device)
    inner = contender.optimizer(model.parameters())
    optimizer = distribute(args, model, inner, contender.method, seed, contender.every)
    windows = Windows(text["training"], args.context, args.epoch_windows)
    history: dict[str, Any] = {"steps": [], "bits": [], "bytes_sent_by_step": []}
    counted: list[Any] = [None]

    def count_bytes(stepped: Any, *_: Any) -> None:
        new = stepped.report is not counted[0]  # inside a window nothing is sent
        counted[0] = stepped.report
        history["bytes_sent_by_step"].append(stepped.report.bytes_sent if new else 0)

    def loss_of(batch: Sequence[torch.Tensor]) -> torch.Tensor:
        (window,) = batch
        window = window.long()
        return nn.functional.cross_entropy(model(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())

    def evaluate() -> dict[str, float]:
        """Bits per byte of the validation text, in windows that lie evenly in it. **Collective.**"""
        every = torch.linspace(0, len(text["validation"]) - args.context - 1, args.eval_windows).long()
        with optimizer.common_parameters() if contender.every else nullcontext():
            return evaluated(every)

    def evaluated(every: torch.Tensor) -> dict[str, float]:
        mine = [text["validation"][at : at + args.context + 1] for at in every[mpisign.rank() :: mpisign.size()]]
        batches = torch.stack(mine).to(device).split(args.batch_size) if mine else ()
        nats = sum(loss_of([batch]).item() * len(batch) for batch in batches)
        bits = sum(mpisign.allgather_object(nats)) / args.eval_windows / math.log(2)
        history["steps"].append(len(history["losses"]))
        history["bits"].append(bits)
        return {"bits per byte": bits}

    optimizer.register_step_post_hook(count_bytes)
    warmup = args.warmup * args.epochs
    train(
        args,
        model,
        optimizer,
        Batches(windows, args.batch_size, seed),
        loss_of,
        schedule=lambda epoch: min(1.0, (epoch + 0.05) / warmup) * (1 + math.cos(math.pi * epoch / args.epochs)) / 2,
        evaluate=evaluate,
        history=history,
        name=f"seed-{seed}-{name}",
    )
    return Result(
        contender=name,
        label=contender.label,
        seed=seed,
        parameters=sum(p.numel() for p in model.parameters()),
        exchange=history["exchange"],
        losses=history["losses"],
        seconds=history["seconds"],
        bytes_sent=history["bytes_sent_by_step"],
        steps=history["steps"],
        bits=history["bits"],
    )


# ---------------------------------------------------------------------------------------------------- the text


def read_text(args: argparse.Namespace) -> dict[str, bytes]:
    """Training and validation text: no file is in both. Rank 0 reads it for all. **Collective.**

    Files come in the order of their names' hashes: the same on any machine, and like a random one.
    """
    text = None
    if mpisign.rank() == 0:
        names = [path.relative_to(args.data).as_posix() for path in args.data.rglob("*.py")]
        names = [name for name in names if "site-packages" not in name]
        names.sort(key=lambda name: hashlib.blake2b(name.encode()).digest())
        text = dict.fromkeys(SHARES, b"")
        for part, share in SHARES.items():
            while names and len(text[part]) < share * args.megabytes * 1e6:
                text[part] += (args.data / names.pop()).read_bytes()
    shared: dict[str, bytes] = mpisign.broadcast_object(text)
    for part, data in shared.items():
        if len(data) <= args.context:
            end(
                f"{len(data)} bytes of {part} text in the *.py files of {args.data} do not fill a window of "
                f"{args.context + 1}: name a folder with more by --data"
            )
    return shared


class Windows(Dataset):
    """``number`` pieces of ``context + 1`` bytes, from places that torch's generator chooses."""

    def __init__(self, text: torch.Tensor, context: int, number: int) -> None:
        self._text = text
        self._length = context + 1
        self._number = number

    def __len__(self) -> int:
        return self._number

    def __getitem__(self, index: int) -> tuple[torch.Tensor]:
        start = int(torch.randint(len(self._text) - self._length + 1, ()))
        return (self._text[start : start + self._length],)


# --------------------------------------------------------------------------------------------------- the model


class Transformer(nn.Module):
    """Predicts each next byte: (samples, length) bytes to (samples, length, 256) logits.

    A decoder with normalisation before each part, learned positions, and one table for bytes in and bytes out.
    """

    def __init__(self, layers: int, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.bytes = nn.Embedding(256, width)
        self.positions = nn.Parameter(torch.zeros(context, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        for table in (self.bytes.weight, self.positions):
            nn.init.normal_(table, std=width**-0.5)  # as the table for bytes out, too

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        hidden = self.bytes(text) + self.positions[: text.shape[1]]
        logits: torch.Tensor = nn.functional.linear(self.norm(self.blocks(hidden)), self.bytes.weight)
        return logits


class Block(nn.Module):
    """Attention to what was before, and a perceptron; each is added to what comes in."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.perceptron = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        parts = self.query_key_value(self.norms[0](hidden)).unflatten(-1, (3, self.heads, -1))
        query, key, value = parts.permute(2, 0, 3, 1, 4)  # each (samples, heads, length, width / heads)
        seen = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.out(seen.transpose(1, 2).flatten(2))
        mixed: torch.Tensor = hidden + self.perceptron(self.norms[1](hidden))
        return mixed


# ------------------------------------------------------------------------------------------------- the results


def show(args: argparse.Namespace, results: Sequence[Result], sizes: dict[str, int]) -> None:
    """Print the table; write the report."""
    groups = {result.label: [other for other in results if other.label == result.label] for result in results}
    title = (
        f"Python's library: {results[0].parameters:,} parameters, ranks: {mpisign.size()}, "
        f"steps: {results[0].steps[-1]}, seeds: {len(args.seeds)}"
    )
    columns, rows = compare(groups)
    table = Table(title=title)
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left")
    for row in rows:
        table.add_row(*row)
    # mpirun gives each rank a terminal of its own, so rich would colour what goes to a file in the end.
    Console(color_system=None).print(table)
    plain = (int, float, list)
    data = {
        "seeds": args.seeds,
        "options": {name: value if isinstance(value, plain) else str(value) for name, value in vars(args).items()},
        "text_bytes": sizes,
        "runs": [asdict(result) for result in results],
    }
    print(f"report: {write_report(args.out, 'text', report(groups, args, sizes), data, {'': draw(groups)})}")


def target_of(results: Sequence[Result]) -> float:
    """The loss that all trainings reached at some evaluation, in bits per byte."""
    return max(min(result.bits) for result in results)


def compare(groups: dict[str, list[Result]]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: means over the seeds; of several, the last loss with its standard deviation."""
    target = target_of([result for results in groups.values() for result in results])
    until = f"until {target:.2f} bits:"
    columns = ["", "bits per byte", "KB a step", "s a step", f"{until} steps", "MB", "s"]
    rows = []
    for label, results in groups.items():
        bits = [result.bits[-1] for result in results]
        spread = f" ± {statistics.stdev(bits):.3f}" if len(bits) > 1 else ""
        sent = [byte for result in results for byte in result.bytes_sent]
        seconds = statistics.median(second for result in results for second in result.seconds)
        steps, megabytes, waited = (
            statistics.fmean(result.until(target, by) for result in results)
            for by in ("steps", "bytes_sent", "seconds")
        )
        cells = (f"{statistics.fmean(sent) / 1e3:,.0f}", f"{seconds:.3f}", f"{steps:.0f}", f"{megabytes / 1e6:,.1f}")
        rows.append([label, f"{statistics.fmean(bits):.3f}{spread}", *cells, f"{waited:.1f}"])
    return columns, rows


def report(groups: dict[str, list[Result]], args: argparse.Namespace, sizes: dict[str, int]) -> str:
    """What was found, in Markdown."""
    columns, rows = compare(groups)
    everything = [result for results in groups.values() for result in results]
    target = target_of(everything)

    def mean(label: str, by: str) -> float:
        return statistics.fmean(result.until(target, by) for result in groups[label])

    first, *others = groups
    found = " ".join(
        f"To {target:.2f} bits a byte, {other} sends {mean(other, 'bytes_sent') / mean(first, 'bytes_sent'):.2g} times "
        f"the bytes of {first}, in {mean(other, 'steps') / mean(first, 'steps'):.2g} times its steps and "
        f"{mean(other, 'seconds') / mean(first, 'seconds'):.2g} times its seconds."
        for other in others
        if mpisign.size() > 1
    )
    text, validation = (f"{size / 1e6:.2f}" for size in sizes.values())
    return f"""# Python's own library by a transformer, on {mpisign.size()} ranks

{found or "One training, or one rank: nothing to compare."}

{markdown_table(columns, rows)}

The model has {everything[0].parameters:,} parameters ({args.layers} layers of width {args.width}) and sees
{args.context} bytes; {text} MB of source files to train on, {validation} MB of others to validate, of Python's library.
A step takes {args.batch_size} windows on each rank. Bytes are those that rank 0 sends; seconds are rank 0's, without
evaluations and checkpoints. Learning rates: `--help` says how they were found."""


def draw(groups: dict[str, list[Result]]) -> Any:
    """Validation loss by step, by byte sent and by second: each seed, in one colour for each way to train."""
    from matplotlib.figure import Figure  # slow to import, and one rank needs it

    figure = Figure(figsize=(12, 4.2), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    for axes, by, heading in zip(
        panels, ("steps", "bytes_sent", "seconds"), ("steps", "megabytes sent by a rank", "seconds"), strict=True
    ):
        for place, (label, results) in enumerate(groups.items()):
            for result in results:
                spent = np.array(result.curve(by)) / (1e6 if by == "bytes_sent" else 1.0)
                name = label if result is results[0] else None
                axes.plot(spent, result.bits, color=f"C{place}", marker=".", markersize=3, linewidth=1.3, label=name)
        axes.set_xlabel(heading)
        axes.grid(alpha=0.3)
    if mpisign.size() > 1:
        panels[1].set_xscale("log")
    panels[0].set_ylabel("validation loss, bits per byte")
    panels[0].legend()
    return figure


# ------------------------------------------------------------------------------------------------- the options


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage="%(prog)s [OPTIONS]", description=__doc__, epilog=EXAMPLES, formatter_class=HelpFormatter
    )
    add = parser.add_argument
    add("--only", nargs="+", choices=CONTENDERS, default=DEFAULT, help="trainings to do")
    add("--lr", type=rate, default=1e-3, help="highest learning rate of --method; tuned for lion")
    add("--lr-adamw", type=rate, default=6e-3, help="of AdamW on averaged gradients")
    add("--lr-local", type=rate, default=6e-3, help="of AdamW that steps by itself between exchanges")
    add("--lr-dgc", type=rate, default=1.0, help="of DGC, whose optimizer is SGD: momentum is on the ranks")
    add("--dgc-ratio", type=rate, default=0.01, help="share of the gradient's coordinates that DGC sends in the end")
    add("--dgc-clip", type=rate, default=1.0, help="norm to which DGC clips, before it divides by the ranks' root")
    add("--decay", type=amount, default=3e-4, help="share of themselves that weights lose a step, at the highest rate")
    add("--warmup", type=rate, default=0.05, help="share of the training in which rates rise, before a cosine to zero")
    add("--layers", type=whole, default=3, metavar="N", help="of the transformer")
    add("--width", type=whole, default=128, metavar="N", help="numbers a byte becomes; a multiple of --heads")
    add("--heads", type=whole, default=4, metavar="N", help="of attention")
    add("--context", type=whole, default=64, metavar="BYTES", help="what the model sees at once")
    library = Path(sysconfig.get_path("stdlib"))
    add("--data", type=Path, default=library, metavar="DIR", help="*.py files in it and below are the text")
    add("--megabytes", type=rate, default=5.0, help="of it, at most; a tenth is for validation")
    add("--epoch-windows", type=whole, default=640, metavar="N", help="samples of an epoch; after each it is evaluated")
    add("--eval-windows", type=whole, default=256, metavar="N", help="samples of an evaluation")
    add("--seeds", type=count, nargs="+", default=[0], help="of weights and batches; several: mean ± std")
    add("--quick", action="store_true", help="takes seconds: other defaults, for a smaller model, text and training")
    add("--out", type=Path, default=Path("out"), metavar="DIR", help="where the report goes: .md, .json and .png")
    add("--report", action="store_true", help="write it to --results instead")
    add("--results", type=Path, default=RESULTS, metavar="DIR", help="for reports to keep")
    add_flags(parser, epochs=15, batch_size=8)
    parser.set_defaults(method="lion:beta2=0.95")
    with said_once():
        args = parse(parser)
        if args.quick:
            parser.set_defaults(**QUICK)
            args = parse(parser)
        args.out = args.results if args.report else args.out
        make_folder(parser, args.out, args.out)
        if args.width % args.heads:
            parser.error(f"--width {args.width} is no multiple of --heads {args.heads}: try --heads 4")
    return args


if __name__ == "__main__":
    main()
