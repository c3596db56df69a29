"""The loop that the training scripts share: a queue may stop it at any step, and it goes on to the same bits.

A script brings a model, an optimizer, batches and a loss. It is no framework: :func:`train` is all that happens.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from batches import Batches
from flags import DTYPES, FREE, end, progress_bar
from torch import nn
from tqdm import tqdm

import mpisign
from mpisign import checkpoint

T = TypeVar("T")


def train(
    args: argparse.Namespace,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Batches,
    loss_of: Callable[[Any], torch.Tensor],
    schedule: Callable[[float], float],
    evaluate: Callable[[], dict[str, float]] | None = None,
    history: dict[str, Any] | None = None,
    name: str = "",
    after_step: Callable[[], object] = lambda: None,
) -> None:
    """Train from the newest checkpoint, or else the start, to the end, or until the queue wants the nodes back.

    BatchNorm's statistics are each rank's own while it trains. Rank 0's are evaluated, and are what the model in a
    checkpoint has. Where the job outlives its ranks, epochs keep their number of steps: what was dealt to a lost
    rank is left out, other samples in each.

    Args:
        model: the model itself, not DDP's wrapper.
        loss_of: the loss of a batch, which is on the model's device.
        schedule: what to multiply the learning rate with after so many epochs (not only whole ones).
        evaluate: what to log after each epoch, the same on all ranks; it may be collective.
        history: gets ``epochs``, ``losses`` (means over the ranks) and ``seconds`` of all steps, also of earlier runs,
            and of the last step ``bytes_sent`` and ``exchange``.
        name: for the progress bar, and a folder of its own in ``--checkpoint-dir`` and ``--log-dir``.
        after_step: called after each, also where the scaler has skipped the optimizer's, for which no hook runs.
    """
    folder = args.checkpoint_dir and args.checkpoint_dir / name
    if folder:
        mpisign.stop_on_signal()
    per_epoch, device = len(batches), next(model.parameters()).device
    precision = autocast(args, device)
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step / per_epoch))
    state: dict[str, Any] = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
    extra = {
        "per_epoch": per_epoch,
        "options": {option: str(value) for option, value in vars(args).items() if option not in FREE},
        "history": history,
    }
    step = resume(folder, args.resume, state, extra) if folder else 0
    last = min(args.epochs * per_epoch, args.max_steps or sys.maxsize)
    log = Log(args.log_dir and args.log_dir / name, args.tensorboard, step, step / per_epoch)
    with progress_bar(total=last, initial=step, desc=name, unit="step", quiet=args.quiet) as bar:
        while True:
            if evaluate and step and step % per_epoch == 0:
                with precision:
                    log.add("eval", step, step / per_epoch, measured(model, evaluate, step // per_epoch))
            if step >= last:
                break
            begin_epoch(model, optimizer, step // per_epoch)
            meter = Meter(batches.batch_size * mpisign.size(), per_epoch, history)
            for batch in itertools.islice(batches.epoch(*divmod(step, per_epoch)), last - step):
                began = time.perf_counter()
                optimizer.zero_grad()
                with precision:
                    loss = loss_of([part.to(device, non_blocking=True) for part in batch])
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                scheduler.step()
                meter.add(loss.detach(), began)
                after_step()
                step += 1
                bar.update()

                stop = folder is not None and stop_agreed(optimizer)
                rest = step == last or step % per_epoch == 0
                save = folder is not None and (rest or stop or step % (args.save_every or last) == 0)
                if save or rest or step % args.log_every == 0:
                    row = meter.read(step, optimizer)
                    log.add("train", step, step / per_epoch, row)
                    bar.set_postfix(loss=f"{row['loss']:.3f}", refresh=False)
                if save:  # at an epoch's end before the evaluation, which may last longer than the queue waits
                    behind = args.async_save and not stop
                    or_end(checkpoint.save)(
                        folder, **state, step=step, extra=extra, keep=args.keep, asynchronous=behind
                    )
                    meter.restart()
                if stop and step < last:
                    end(f"stopped by a signal; step {step} of {last} is saved in {folder}", mpisign.REQUEUE_EXIT_CODE)
    if folder:
        or_end(checkpoint.wait)()
    mpisign.check_consistency(model, optimizer, buffers=False)


def autocast(args: argparse.Namespace, device: torch.device) -> torch.autocast:
    """Of forward, as ``--precision`` says."""
    dtype = DTYPES[args.precision]
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def begin_epoch(model: nn.Module, optimizer: torch.optim.Optimizer, epoch: int) -> None:
    model.train()
    if isinstance(optimizer, mpisign.DistributedSignOptimizer):
        optimizer.set_epoch(epoch)  # some methods, such as DGC, warm up by epochs


def or_end(call: Callable[..., T]) -> Callable[..., T]:
    """The same call; if a checkpoint cannot be written or read, it ends the job, saying why, as all ranks know."""

    def instead(*args: Any, **options: Any) -> T:
        try:
            return call(*args, **options)
        except mpisign.CheckpointError as error:
            end(str(error))

    return instead


def resume(folder: Path, mode: str, state: dict[str, Any], extra: dict[str, Any]) -> int:
    """Load the newest checkpoint, if there is one, and return how many steps were done. **Collective.**"""
    newest = checkpoint.newest(folder)
    if newest is None:
        return 0
    if mode == "never":
        end(f"{newest} is an earlier training's, and --resume never would mix with it: remove it or name another place")
    resumed = or_end(checkpoint.load)(folder, **state)
    for option, value in extra["options"].items():
        was = resumed.extra["options"].get(option)
        if value != was:
            end(
                f"{resumed.path} was saved with {option}={was}, and now it is {value}: go on with what it was, or "
                f"begin anew with another --checkpoint-dir"
            )
    if extra["history"] is not None:
        extra["history"].update(resumed.extra["history"])
    step, scheduler = resumed.step, state["scheduler"]
    if extra["per_epoch"] != resumed.extra["per_epoch"]:  # other ranks: the same epochs, in a different number of steps
        step = step * extra["per_epoch"] // resumed.extra["per_epoch"]
        scheduler.last_epoch = step - 1
        scheduler.step()
    return step


@torch.no_grad()
def measured(model: nn.Module, evaluate: Callable[[], dict[str, float]], epoch: float) -> dict[str, float]:
    """What ``evaluate`` finds of the model with rank 0's buffers; rank 0 prints it. **Collective.**"""
    until_done(mpisign.broadcast_parameters, dict(model.named_buffers()))
    model.eval()
    scores = evaluate()
    if mpisign.rank() == 0:
        tqdm.write(f"epoch {epoch:.3g}: " + ", ".join(f"{name} {score:.4g}" for name, score in scores.items()))
    return scores


def stop_agreed(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a signal has asked any rank to stop, the same answer on all. **Collective.**"""
    if not isinstance(optimizer, mpisign.DistributedSignOptimizer):
        mpisign.barrier()  # the ranks tell each other when they meet; ours have just met in their step
    return mpisign.stop_requested()


# ------------------------------------------------------------------------------------------------- the numbers


class Meter:
    """Losses and times of the steps since it was last read, ``samples`` of all ranks in each; fills the history."""

    def __init__(self, samples: int, per_epoch: int, history: dict[str, Any] | None) -> None:
        self._samples = samples
        self._per_epoch = per_epoch
        self._history = history
        self.restart()

    def restart(self) -> None:
        self._losses: list[torch.Tensor] = []
        self._seconds: list[float] = []
        self._began = time.perf_counter()

    def add(self, loss: torch.Tensor, began: float) -> None:
        if self._history is not None and loss.is_cuda:
            torch.cuda.synchronize(loss.device)  # DDP's step has only been launched
        self._losses.append(loss)  # a tensor yet: the number would wait for the GPU
        self._seconds.append(time.perf_counter() - began)

    def read(self, step: int, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        """A row of train.csv, for the steps up to ``step``. **Collective.**"""
        losses = np.mean(mpisign.allgather_object(torch.stack(self._losses).tolist()), axis=0).tolist()
        speed = len(losses) * self._samples / (time.perf_counter() - self._began)
        row = {"loss": np.mean(losses), "lr": optimizer.param_groups[0]["lr"], "samples_per_second": speed}
        report = getattr(optimizer, "report", None)
        sent = {} if report is None else {"bytes_sent": report.bytes_sent}
        if self._history is not None:
            epochs = [at / self._per_epoch for at in range(step - len(losses), step)]
            for key, values in (("epochs", epochs), ("losses", losses), ("seconds", self._seconds)):
                self._history.setdefault(key, []).extend(values)
            self._history.update(sent, exchange="/".join(sorted(set(report.exchange))) if report else "")
        self.restart()
        return row | sent


class Log:
    """What rank 0 writes down: ``train.csv``, ``eval.csv`` and, if asked, the same for TensorBoard.

    Rows that an earlier run has written after the epoch where this one goes on are taken back.
    """

    def __init__(self, folder: Path | None, tensorboard: bool, step: int, epoch: float) -> None:
        self._folder, self._tensorboard = folder, tensorboard
        self._board: Any = None
        if folder is None or mpisign.rank() > 0:
            return
        folder.mkdir(parents=True, exist_ok=True)
        for name, until in (("train", epoch + 1e-6), ("eval", epoch - 1e-6)):  # it will be evaluated here again
            table = folder / f"{name}.csv"
            lines = table.read_text().splitlines(keepends=True) if table.exists() else []
            kept = [
                row for row in lines[1:] if row.count(",") == lines[0].count(",") and float(row.split(",")[1]) < until
            ]
            table.write_text("".join([lines[0], *kept])) if kept else table.unlink(missing_ok=True)

    def add(self, table: str, step: int, epoch: float, values: Mapping[str, float]) -> None:
        """Append a row: step, epoch, ``values``."""
        if self._folder is None or mpisign.rank() > 0:  # which may be another's number by now
            return
        with open(self._folder / f"{table}.csv", "a") as file:
            rows = csv.writer(file, lineterminator="\n")
            if file.tell() == 0:
                rows.writerow(["step", "epoch", *values])
            rows.writerow([step, f"{epoch:.6f}", *(f"{value:.8g}" for value in values.values())])
        if self._tensorboard:
            if self._board is None:
                from torch.utils.tensorboard import SummaryWriter  # it need not be there otherwise

                self._board = SummaryWriter(str(self._folder), purge_step=step + (table == "eval"))
            for name, value in values.items():
                self._board.add_scalar(f"{table}/{name}", value, step)


# ------------------------------------------------------------------------------------------------ the ingredients


def take_device() -> torch.device:
    """This rank's GPU if it has one, else the CPU, of whose cores it takes its share."""
    device = mpisign.device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif "OMP_NUM_THREADS" not in os.environ:  # torch would start a thread a core on each rank
        torch.set_num_threads(max(1, torch.get_num_threads() // mpisign.local_size()))
    return device


def distribute(
    args: argparse.Namespace,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    method: mpisign.Method,
    seed: int,
    every: int | None = None,
    delay: int = 0,
) -> mpisign.DistributedSignOptimizer:
    """Wrap an optimizer as the flags say, and make all ranks begin alike. **Collective.**"""
    try:
        wrapper = mpisign.DistributedSignOptimizer(
            optimizer,
            named_parameters=model.named_parameters(),
            method=method,
            zeros=args.zeros,
            ties=args.ties,
            exchange=args.exchange,
            seed=seed,
            every=every,
            delay=delay,
        )
    except mpisign.OptionError as error:
        end(str(error))
    until_done(mpisign.broadcast_parameters, model.state_dict())
    until_done(mpisign.broadcast_optimizer_state, wrapper)
    return wrapper


def until_done(call: Callable[[T], None], argument: T) -> None:
    """Call it, and again where ranks have died in it and the job goes on. **Collective.**"""
    while True:
        try:
            return call(argument)
        except mpisign.MembershipChangedError:
            pass
