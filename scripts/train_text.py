"""Teach a small transformer Python three ways: Lion by majority vote, AdamW on averaged gradients, and DGC.

The text is Python's own library, byte by byte, so nothing is downloaded. All trainings have the same ranks, batches
and initial weights; what the ranks send each other differs. Shows the loss on files that were not trained on, by step,
by byte sent and by second.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import sysconfig
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from batches import Batches
from experiments import RESULTS
from flags import (
    FREE,
    HelpFormatter,
    add_flags,
    amount,
    count,
    end,
    make_folder,
    need_matplotlib,
    parse,
    rate,
    said_once,
    whole,
)
from text_contenders import CONTENDERS, DEFAULT, RATES, Contender, Reduced, make_contenders
from text_results import Result, gather, show, timed
from torch import nn
from torch.utils.data import Dataset
from training import autocast, distribute, measured, take_device, train

import mpisign

EXAMPLES = """\
examples:
  mpirun -n 4 python scripts/train_text.py
  mpirun -n 4 python scripts/train_text.py --quick
  mpirun -n 4 python scripts/train_text.py --only vote --method signum --rates vote=1e-3
  mpirun -n 4 python scripts/train_text.py --only adamw local8-vote --factors 0.5 1 2            to tune their rates
  mpirun -n 4 python scripts/train_text.py --seeds 0 1 --report
  sudo -E benchmarks/slow_network 4 100mbit python scripts/train_text.py        four hosts with a slow network

On one machine ranks exchange through memory, and seconds do not show what a network costs: the last example does.

Learning rates: each had three tries at least, on seed 100, 4 ranks, --epochs 10. Bits per byte of validation text:
  lion:beta2=0.95      2.5e-4: 3.783, 5e-4: 3.566, 1e-3: 3.543, 2e-3: 3.609
  lion:beta2=0.99      5e-4: 3.750, 1e-3: 3.955, 2e-3: 3.747
  AdamW                1.5e-3: 3.493, 3e-3: 3.365, 6e-3: 3.214, 12e-3: 3.831
  DGC                  0.3: 3.698, 1: 3.513, 3: 4.037
  1-bit Adam           1.5e-3: 3.526, 3e-3: 3.418, 6e-3: 3.888
  0/1 Adam             1.5e-3: 3.527, 3e-3: 3.397, 6e-3: 3.713
  AdamW, DDP PowerSGD  3e-3: 3.504, 6e-3: 3.561, 12e-3: 3.914
  local4-vote          3e-3: 3.559, 6e-3: 3.488, 12e-3: 3.820
  local4-ef            3e-3: 3.529, 6e-3: 3.566, 12e-3: 3.884
  local8-mean          3e-3: 3.541, 6e-3: 3.547, 12e-3: 3.921
  local8-vote          3e-3: 3.557, 6e-3: 3.572, 12e-3: 3.875
  local8-ef            3e-3: 3.566, 6e-3: 3.621, 12e-3: 3.877
  local8-double        3e-3: 3.583, 6e-3: 3.630, 12e-3: 3.879
  local30-ef           3e-3: 3.685, 6e-3: 3.844, 12e-3: 4.042
These are 200 steps. In 900, where little lies between two rates, the higher one wins: local4-ef ends at 2.409 with 3e-3
and at 2.299 with 6e-3 (seed 1), so that windows of 4 and 8 take AdamW's own. PowerSGD ends at 2.497 with either.
"""
QUICK = {"layers": 1, "width": 64, "epochs": 4, "epoch_windows": 320, "eval_windows": 64, "megabytes": 1.0}
# A checkpoint of one method does not depend on which others there are, nor on how its options were said.
FREE.update({"only", "quick", "report", "results", "factors", "within", "gather", "losses"})
SHARES = {"training": 0.9, "validation": 0.1}


def main() -> None:
    mpisign.init()
    args = parse_arguments()
    if args.gather:
        results, sizes = gather(args, args.gather)
    else:
        results, sizes = train_all(args)
    if args.losses:
        results = timed(gather(args, args.losses)[0], results)
    if mpisign.rank() == 0:
        show(args, results, sizes)


def train_all(args: argparse.Namespace) -> tuple[list[Result], dict[str, int]]:
    """The trainings that were asked for, and the bytes of their text. **Collective.**"""
    device = take_device()
    text = {part: torch.frombuffer(bytearray(data), dtype=torch.uint8) for part, data in read_text(args).items()}
    results = [
        run(args, device, text, seed, name, factor)
        for seed in args.seeds
        for name in CONTENDERS
        if name in args.only
        for factor in args.factors
    ]
    return results, {part: len(data) for part, data in text.items()}


def run(
    args: argparse.Namespace,
    device: torch.device,
    text: dict[str, torch.Tensor],
    seed: int,
    name: str,
    factor: float,
) -> Result:
    """Train a new model, at a contender's learning rate times ``factor``. **Collective.**"""
    torch.manual_seed(seed)
    model = Transformer(args.layers, args.width, args.heads, args.context).to(device)
    batches = Batches(Windows(text["training"], args.context, args.epoch_windows), args.batch_size, seed)
    contender = make_contenders(args, args.epochs * len(batches), factor)[name]
    optimizer, network, bytes_sent = in_parallel(args, model, seed, name, contender)
    history: dict[str, Any] = {"steps": [], "bits": [], "bytes_sent_by_step": []}

    def loss_of(batch: Sequence[torch.Tensor]) -> torch.Tensor:
        (window,) = batch
        window = window.long()
        return nn.functional.cross_entropy(network(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())

    def evaluate() -> dict[str, float]:
        """Bits per byte of the validation text, in windows that lie evenly in it. **Collective.**"""
        every = torch.linspace(0, len(text["validation"]) - args.context - 1, args.eval_windows).long()
        mine = [text["validation"][at : at + args.context + 1] for at in every[mpisign.rank() :: mpisign.size()]]
        pieces = torch.stack(mine).to(device).split(args.batch_size) if mine else ()
        with optimizer.common_parameters() if contender.every else nullcontext():
            nats = sum(loss_of([piece]).item() * len(piece) for piece in pieces)
        bits = sum(mpisign.allgather_object(nats)) / args.eval_windows / math.log(2)
        history["steps"].append(len(history["losses"]))
        history["bits"].append(bits)
        return {"bits per byte": bits}

    warmup = args.warmup * args.epochs
    train(
        args,
        model,
        optimizer,
        batches,
        loss_of,
        schedule=lambda epoch: min(1.0, (epoch + 0.05) / warmup) * (1 + math.cos(math.pi * epoch / args.epochs)) / 2,
        evaluate=evaluate,
        history=history,
        name=f"seed-{seed}-{name}" + (f"-{factor:g}" if len(args.factors) > 1 else ""),
        after_step=lambda: history["bytes_sent_by_step"].append(bytes_sent()),
    )
    if not history["bits"]:  # --max-steps has ended it in its first epoch
        with autocast(args, device):
            measured(model, evaluate, len(history["losses"]) / len(batches))
    lr = args.rates[name] * factor
    return Result(
        contender=name,
        label=contender.label + (f", {lr:g}" if len(args.factors) > 1 else ""),
        seed=seed,
        lr=lr,
        parameters=sum(p.numel() for p in model.parameters()),
        exchange=history["exchange"],
        losses=history["losses"],
        seconds=history["seconds"],
        bytes_sent=history["bytes_sent_by_step"],
        steps=history["steps"],
        bits=history["bits"],
    )


def in_parallel(
    args: argparse.Namespace, model: nn.Module, seed: int, name: str, contender: Contender
) -> tuple[Any, nn.Module, Callable[[], int]]:
    """The optimizer, what to call in place of the model, and what says how much a step has sent. **Collective.**"""
    inner = contender.optimizer(model.parameters())
    if contender.method is None:
        reduced = Reduced(name, model)
        return inner, reduced.network, reduced.bytes_sent
    optimizer = distribute(args, model, inner, contender.method, seed, contender.every, contender.delay)
    counted: list[Any] = [None]

    def bytes_sent() -> int:
        last, counted[0] = counted[0], optimizer.report
        return 0 if counted[0] is last else counted[0].bytes_sent  # inside a window nothing is sent

    return optimizer, model, bytes_sent


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


# ------------------------------------------------------------------------------------------------- the options


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage="%(prog)s [OPTIONS]", description=__doc__, epilog=EXAMPLES, formatter_class=HelpFormatter
    )
    add = parser.add_argument
    add("--only", nargs="+", choices=CONTENDERS, default=DEFAULT, help="trainings to do")
    defaults = ", ".join(f"{name}={lr:g}" for name, lr in RATES.items())
    add(
        "--rates",
        type=named_rate,
        nargs="+",
        metavar="NAME=RATE",
        default=[],
        help=f"highest learning rates, other than {defaults}; that of vote is tuned for lion",
    )
    add("--factors", type=rate, nargs="+", default=[1.0], metavar="X", help="times each rate; several: to tune it")
    add(
        "--within",
        type=amount,
        metavar="BITS",
        help="compare at so much more than AdamW's last loss, not at what all reach",
    )
    add("--gather", type=Path, nargs="+", metavar="JSON", help="no training: one report of several, on as many ranks")
    add(
        "--losses",
        type=Path,
        nargs="+",
        metavar="JSON",
        help="losses of these reports with seconds of the steps done here: --epochs 2 is enough",
    )
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
        args.rates = {**RATES, **dict(args.rates)}
        args.out = args.results if args.report else args.out
        make_folder(parser, args.out, args.out)
        need_matplotlib(parser)
        if args.width % args.heads:
            parser.error(f"--width {args.width} is no multiple of --heads {args.heads}: try --heads 4")
        if args.checkpoint_dir and "ddp-powersgd" in args.only:
            parser.error("--checkpoint-dir would not keep what PowerSGD's hook remembers: leave one of the two out")
    return args


def named_rate(text: str) -> tuple[str, float]:
    """``NAME=RATE``, of a contender."""
    name, _, value = text.partition("=")
    if name not in CONTENDERS:
        raise argparse.ArgumentTypeError(f"{text!r} names none of {', '.join(CONTENDERS)}: write vote=1e-3, say")
    return name, rate(value)


if __name__ == "__main__":
    main()
