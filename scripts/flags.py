"""The flags that all training scripts have, and how a script ends when it cannot begin."""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib.util
import inspect
import io
import math
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
from tqdm import tqdm

import mpisign
from mpisign import methods
from mpisign.exchange.choose import CHOICES

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
METHODS = {
    name: maker
    for name in methods.__all__
    if inspect.isfunction(maker := getattr(methods, name)) and inspect.signature(maker).return_annotation == "Method"
}
# What may differ when a training goes on from a checkpoint; every other flag decides its numbers.
FREE = {"epochs", "max_steps", "checkpoint_dir", "save_every", "resume", "keep", "async_save", "log_dir", "log_every"}
FREE |= {"tensorboard", "quiet", "data", "workers", "seeds", "out", "json"}


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults where there are any, and leaves the examples as they are."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        shown = action.default is not None and action.default is not False
        return super()._get_help_string(action) if shown else action.help


def whole(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 up, such as 20")
    return int(text)


def count(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 up to 2^32 - 1, such as 4")
    return int(text)


def rate(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a positive number, such as 0.001")


def amount(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 <= float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 up, such as 0.9")


def method(text: str) -> mpisign.Method:
    """What ``NAME`` or ``NAME:ARGUMENT=VALUE,...`` says, by the function of that name in mpisign.methods."""
    name, _, rest = text.partition(":")
    if name not in METHODS:
        raise argparse.ArgumentTypeError(f"{name!r} is not a method: choose from {', '.join(map(usage, METHODS))}")
    arguments = {}
    for argument, _, value in (pair.partition("=") for pair in rest.split(",") if pair):
        arguments[argument.strip()] = value
        with contextlib.suppress(ValueError, SyntaxError):
            arguments[argument.strip()] = ast.literal_eval(value.strip())
    try:
        made: mpisign.Method = METHODS[name](**arguments)
    except (TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(
            f"{text!r}: {error}. It is {usage(name)}: write --method {name}:ARGUMENT=VALUE,..."
        ) from error
    return made


def usage(name: str) -> str:
    """How a method is made: ``lion(beta1=0.9, beta2=0.99)``."""
    parameters = inspect.signature(METHODS[name]).parameters.values()
    return f"{name}({', '.join(str(p.replace(annotation=p.empty)) for p in parameters)})"


def add_flags(parser: argparse.ArgumentParser, epochs: int, batch_size: int) -> None:
    """Add them; ``epochs`` and ``batch_size`` are defaults."""
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=whole, default=epochs, metavar="N", help="passes over the training data")
    add("--max-steps", type=whole, metavar="N", help="end after N steps in all, even within an epoch")
    add("--batch-size", type=whole, default=batch_size, metavar="N", help="samples per rank and step")
    add("--precision", choices=DTYPES, default="fp32", help="of forward and backward; fp16 scales the loss")
    add = parser.add_argument_group("voting").add_argument
    known = ", ".join(map(usage, METHODS))
    add("--method", type=method, default="signum", metavar="NAME[:ARG=VALUE,...]", help=f"one of {known}")
    add(
        "--zeros",
        choices=("rows", "coin", "abstain", "positive"),
        default="rows",
        help="what an exactly zero value votes",
    )
    add("--ties", choices=("coin", "zero", "positive"), default="coin", help="who wins a tied vote")
    add("--exchange", choices=CHOICES, default="auto", help="how messages cross MPI")
    add = parser.add_argument_group(
        "job",
        "With --checkpoint-dir the training is saved after each epoch, and at SIGUSR1 or SIGTERM, which then end it\n"
        f"with exit code {mpisign.REQUEUE_EXIT_CODE}. The same command goes on from there, to the same bits.",
    ).add_argument
    add("--checkpoint-dir", type=Path, metavar="DIR", help="where checkpoints are, on a file system all nodes share")
    add("--save-every", type=whole, metavar="STEPS", help="save after so many steps, too")
    add("--resume", choices=("auto", "never"), default="auto", help="go on from the newest checkpoint if there is one")
    add("--keep", type=whole, default=3, metavar="N", help="how many checkpoints stay")
    add("--async-save", action="store_true", help="write checkpoints while training goes on")
    add("--log-dir", type=Path, metavar="DIR", help="write train.csv and, where there is an evaluation, eval.csv here")
    add("--log-every", type=whole, default=10, metavar="STEPS", help="steps a row of train.csv is about")
    add("--tensorboard", action="store_true", help="write to --log-dir for TensorBoard, too")
    add("--quiet", action="store_true", help="no progress bar")


@contextlib.contextmanager
def said_once() -> Iterator[None]:
    """Every rank reads the same command line; rank 0 speaks, also of what is wrong elsewhere alone. **Collective.**"""
    code, said = None, io.StringIO()
    with contextlib.ExitStack() as stack:
        if mpisign.rank() > 0:
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            stack.enter_context(contextlib.redirect_stderr(said))
        try:
            yield
        except SystemExit as ended:
            code = ended.code
    if (spoken := mpisign.broadcast_object(code)) is not None:
        sys.exit(spoken)
    end_if_any(None if code is None else said.getvalue().strip().rpartition("error: ")[2])


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Read the command line and make the folders it names; under :func:`said_once`."""
    args = parser.parse_args()
    if args.tensorboard and not args.log_dir:
        parser.error("--tensorboard has nowhere to write: add --log-dir, such as --log-dir out/log")
    if args.tensorboard and not importlib.util.find_spec("tensorboard"):
        parser.error("--tensorboard needs a package that is not there: pip install tensorboard")
    for folder in filter(None, (args.checkpoint_dir, args.log_dir)):
        make_folder(parser, folder, folder)
    return args


def make_folder(parser: argparse.ArgumentParser, folder: Path, path: Path) -> None:
    """Make the folder in which ``path`` will be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"cannot write {path}: {error.strerror}; name a file in a folder that can be made")


def need_matplotlib(parser: argparse.ArgumentParser) -> None:
    """For a picture in the end."""
    if not importlib.util.find_spec("matplotlib"):
        parser.error("a picture needs a package that is not there: pip install matplotlib")


def progress_bar(*jobs: Any, quiet: bool, **options: Any) -> tqdm:
    """tqdm's on rank 0, as a line every few seconds: Open MPI's mpirun hands on nothing but whole lines."""
    line = "{l_bar}{bar:30}{r_bar}\n"
    return tqdm(*jobs, mininterval=5.0, bar_format=line, disable=quiet or mpisign.rank() > 0, **options)


def end(reason: str, code: int = 2) -> NoReturn:
    """End the job; rank 0 says why. To be called by all ranks."""
    if mpisign.rank() == 0:
        tqdm.write(f"{Path(sys.argv[0]).name}: {reason}", file=sys.stderr)  # not into the progress bar
    sys.exit(code)


def end_if_any(problem: str | None) -> None:
    """:func:`end` the job if any rank has a problem. **Collective.**"""
    here = f"rank {mpisign.rank()} on {platform.node()}"
    problems = [text for text in mpisign.allgather_object(problem and f"{here}: {problem}") if text]
    if problems:
        end(problems[0] + (f" (so on {len(problems)} of {mpisign.size()} ranks)" if len(problems) > 1 else ""))
