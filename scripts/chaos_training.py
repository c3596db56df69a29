"""What each rank of scripts/chaos runs: a small training that writes down all it does, and harms itself when told to.

Usage: chaos_training.py JOB.json, which scripts/chaos writes.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import json
import os
import signal
import sys
import threading
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import BatchSampler

import mpisign
from mpisign import checkpoint

__all__ = ["VARIATIONS", "Variation"]

BUCKET_CAP_MB = 4e-4  # the model is small, and shall need several messages


@dataclass(frozen=True)
class Variation:
    """A way to train.

    Attributes:
        what: it in words.
        optimizer: makes what is wrapped, of the parameters.
        options: of the :class:`mpisign.DistributedSignOptimizer`.
        step_size: how far each parameter moves in a step, at most; None where that depends.
        nodes: on two nodes, as the library is told.
    """

    what: str
    method: Callable[[], mpisign.Method]
    optimizer: Callable[[Any], torch.optim.Optimizer]
    options: dict[str, Any] = field(default_factory=dict)
    step_size: float | None = None
    nodes: bool = False

    @property
    def every(self) -> int:
        """Steps from one exchange to the next."""
        return int(self.options.get("every", 1))


RATE = 0.002


def _vote(what: str, *, nodes: bool = False, **options: Any) -> Variation:
    return Variation(what, mpisign.signum, lambda p: torch.optim.SGD(p, lr=RATE), options, RATE, nodes)


def _local(what: str, *, nodes: bool = False, **options: Any) -> Variation:
    adamw = lambda p: torch.optim.AdamW(p, lr=0.003)  # noqa: E731
    return Variation(what, mpisign.scaled_vote, adamw, options, None, nodes)


def _feedback(what: str, method: Callable[[], mpisign.Method], **options: Any) -> Variation:
    return Variation(what, method, lambda p: torch.optim.SGD(p, lr=0.1), options)


VARIATIONS = {
    "flat": _vote("votes in two phases, applied at once", exchange="two_phase"),
    "flat-overlap": _vote("votes in two phases, overlapped with backward", exchange="two_phase", overlap=True),
    "hierarchical": _vote("votes that are counted on two nodes first", exchange="hierarchical", nodes=True),
    "hierarchical-overlap": _vote(
        "votes counted on two nodes first, overlapped", exchange="hierarchical", overlap=True, nodes=True
    ),
    "allgather": _vote("all ballots to all, applied by torch's SGD", exchange="allgather", apply="optimizer"),
    "audit": _vote("votes in two phases, audited", exchange="two_phase", audit=1),
    "every": _local("4 local steps of AdamW, then a scaled vote", exchange="two_phase", every=4),
    "every-delay": _local("4 local steps, and a scaled vote 2 steps later", exchange="two_phase", every=4, delay=2),
    "every-hierarchical": _local("4 local steps on two nodes", exchange="hierarchical", every=4, nodes=True),
    "feedback": _feedback("error feedback, with copies", mpisign.ef_signsgd, exchange="allgather", buddy_every=5),
    "feedback-overlap": _feedback("error feedback, overlapped", mpisign.ef_signsgd, exchange="allgather", overlap=True),
    "feedback-twice": _feedback(
        "error feedback on both sides, with copies", mpisign.double_squeeze, exchange="two_phase", buddy_every=5
    ),
}


class Diary:
    """What a rank writes down: a line of JSON each, which is in the file when :meth:`write` returns."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def write(self, what: str, **facts: Any) -> None:
        """``at`` is the machine's monotonic clock."""
        os.write(self._file, (json.dumps({"what": what, "at": time.monotonic(), **facts}) + "\n").encode())


class HarmError(Exception):
    """What this rank is told to die of."""


class Orders:
    """What scripts/chaos tells this rank to do to itself, in a file that it looks for in every step."""

    def __init__(self, path: Path, diary: Diary) -> None:
        self._path, self._diary = path, diary
        self._order: dict[str, Any] = {}
        self._left = 0  # steps

    def before(self) -> None:
        """At the beginning of a step."""
        if not self._order and self._path.exists():
            self._order = json.loads(self._path.read_text())
            self._path.unlink()
            self._left = self._order["steps"]
            self._diary.write("order", **self._order)
            if self._order["kind"] == "segfault":
                threading.Timer(self._order["delay"] * 0.1, self._crash).start()
        kind = self._order.get("kind")
        if kind == "stretch":
            time.sleep(self._order["seconds"])
            self._over()
        elif kind == "slow":
            time.sleep(self._order["seconds"])
        self._raise("before")

    def spoiled(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss of which gradients are made."""
        if self._order.get("place") == "backward" and self._order["kind"] == "exception":
            loss.register_hook(lambda gradient: self._raise("backward"))
        return loss * torch.nan if self.is_nan else loss

    @property
    def is_nan(self) -> bool:
        """Whether this step's gradients are NaN."""
        return self._order.get("kind") == "nan"

    def after(self) -> None:
        """At the end of a step, before it is written down that it is over."""
        self._raise("after")
        if self._left:
            self._left -= 1
            if not self._left:
                self._over()

    def saving(self, *, asynchronous: bool) -> None:
        """A checkpoint is about to be saved."""
        if self._order.get("kind") == "save":
            delay = 1e-4 + self._order["delay"] * (0.15 if asynchronous else 0.06)
            self._diary.write("fault", delay=delay)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, delay)  # which ends this process, whatever it does then

    def _raise(self, place: str) -> None:
        if self._order.get("kind") == "exception" and self._order["place"] == place:
            self._diary.write("fault", delay=0.0)
            raise HarmError(f"as told, {place} a step")

    def _crash(self) -> None:
        self._diary.write("fault", delay=0.0)
        ctypes.string_at(0)

    def _over(self) -> None:
        self._order = {}
        self._diary.write("order over")


# ------------------------------------------------------------------------------------------------ a training


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    failure = {"min_ranks": job["min_ranks"], "spares": job["spares"], "detect_links": job["detect_links"]}
    mpisign.init(on_failure="continue", **failure)
    me = mpisign.rank()
    folder = Path(job["folder"])
    stacks = open(folder / f"rank-{me}.stacks", "w")  # noqa: SIM115 - as long as the process
    faulthandler.register(signal.SIGUSR2, file=stacks)
    diary = Diary(folder / f"rank-{me}.jsonl")
    diary.write("here", pid=os.getpid())
    orders = Orders(folder / f"rank-{me}.order", diary)
    for seed in job["seeds"]:
        Training(job, seed, diary, orders).run()
    mpisign.shutdown()
    diary.write("left")


class Training:
    """One training of a small network on the digits."""

    def __init__(self, job: dict[str, Any], seed: int, diary: Diary, orders: Orders) -> None:
        self._job, self._seed, self._diary, self._orders = job, seed, diary, orders
        self._variation = VARIATIONS[job["variation"]]
        data = np.load(job["data"])
        self._images, self._labels, self._test_images, self._test_labels = (
            torch.from_numpy(data[name]) for name in ("images", "labels", "test_images", "test_labels")
        )
        torch.manual_seed(seed)
        width = self._images.shape[1]
        self._model = nn.Sequential(nn.Linear(width, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 10))
        self._optimizer = mpisign.DistributedSignOptimizer(
            self._variation.optimizer(self._model.parameters()),
            self._model.named_parameters(),
            method=self._variation.method(),
            seed=seed,
            bucket_cap_mb=BUCKET_CAP_MB,
            **self._variation.options,
        )
        self._sampler = mpisign.ElasticSampler(range(len(self._labels)), seed=seed)
        self._members = tuple(range(job["ranks"]))
        self._step = self._saved = 0

    def run(self) -> None:
        """From the newest checkpoint to the end."""
        forget = mpisign.on_membership_change(self._changed)
        self._begin()
        waits = mpisign.rank() >= self._job["ranks"]
        mpisign.Standby(model=self._model, optimizer=self._optimizer, sampler=self._sampler, extra=self)
        at = {"step": self._step, "epoch": self._sampler.epoch, "members": self._members}
        self._diary.write("begin", crc=self._crc(), seed=self._seed, came=waits, **at)
        epochs, size = self._job["epochs"], self._job["batch_size"]
        for epoch in range(self._sampler.epoch, epochs):
            self._sampler.set_epoch(epoch)
            while not self._sampler.finished:
                for number, batch in enumerate(BatchSampler(self._sampler, size, drop_last=False)):
                    if number == 0:
                        self._diary.write("deal", step=self._step, epoch=epoch, members=self._members)
                    exchanged = self._train(batch)
                    self._sampler.record_batch(number, size)
                    self._orders.after()
                    self._committed(exchanged)
                    if exchanged and self._job["save_every"] and self._step >= self._saved + self._job["save_every"]:
                        self._save()
                    if self._sampler.changed:
                        break
                if self._variation.every > 1:
                    mpisign.barrier()  # who has died in a window that is still open is found before the epoch is over
            mpisign.average(float(self._step))
            self._agree(epoch)
            self._diary.write("epoch", step=self._step, epoch=epoch)
        self._optimizer.join()
        with contextlib.suppress(mpisign.CheckpointError):
            checkpoint.wait()
        with torch.no_grad():
            loss = nn.functional.cross_entropy(self._model(self._test_images), self._test_labels).item()
        self._diary.write("end", step=self._step, crc=self._crc(), loss=loss, seed=self._seed)
        forget()

    def _begin(self) -> None:
        folder = self._job["checkpoints"]
        if folder and checkpoint.newest(folder) is not None:
            resumed = checkpoint.load(folder, model=self._model, optimizer=self._optimizer)
            self._step = self._saved = resumed.step
            self._sampler.load_state_dict(resumed.extra["sampler"])

    def state_dict(self) -> dict[str, int]:
        """What a spare must know that steps in, besides model, optimizer and sampler."""
        return {"step": self._step, "saved": self._saved}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on there."""
        self._step, self._saved = state["step"], state["saved"]

    def _train(self, batch: list[int]) -> bool:
        """A step. Returns whether it was one with an exchange."""
        self._orders.before()
        self._diary.write("take", step=self._step + 1, samples=batch)
        if self._job["compute"]:
            time.sleep(self._job["compute"])
        before = self._optimizer.report
        self._was = nn.utils.parameters_to_vector(self._model.parameters()).detach()
        self._optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self._model(self._images[batch]), self._labels[batch])
        self._orders.spoiled(loss).backward()
        self._spoiled = self._orders.is_nan
        self._optimizer.step()
        self._step += 1
        return self._optimizer.report is not before

    def _committed(self, exchanged: bool) -> None:
        facts: dict[str, Any] = {"step": self._step, "nan": self._spoiled}
        report = self._optimizer.report
        if exchanged and report is not None:
            moved = nn.utils.parameters_to_vector(self._model.parameters()).detach() - self._was
            silent = {*report.abstentions, *report.ended_at}
            facts |= {
                "exchange": report.step,
                "later": self._variation.options.get("delay", 0),
                "generation": report.generation,
                "members": report.members,
                "recovery": report.recovery_seconds,
                "silent": sorted(report.members[rank] for rank in silent),
                "skipped": report.skipped,
                "crc": self._crc(),
                "moved": moved.abs().max().item(),
            }
        self._diary.write("commit", **facts)

    def _save(self) -> None:
        asynchronous, folder = self._job["asynchronous"], self._job["checkpoints"]
        extra = {"sampler": self._sampler.state_dict()}
        self._diary.write("save", step=self._step)
        self._orders.saving(asynchronous=asynchronous)
        self._saved = self._step
        try:
            checkpoint.save(
                folder,
                model=self._model,
                optimizer=self._optimizer,
                step=self._step,
                extra=extra,
                asynchronous=asynchronous,
            )
        except mpisign.CheckpointError as error:  # a rank that has died had not written its part
            self._diary.write("unsaved", step=self._step, why=str(error))
        else:
            self._diary.write("saved", step=self._step, certain=not asynchronous)

    def _agree(self, epoch: int) -> None:
        """A call that names a rank, and so has to be made again if ranks change meanwhile."""
        while True:
            try:
                told = mpisign.broadcast_object(epoch, root_rank=0)
            except mpisign.MembershipChangedError:
                continue
            if told != epoch:
                raise AssertionError(f"rank 0 is in epoch {told}, and this one in {epoch}")
            return

    def _changed(self, change: mpisign.MembershipChange) -> None:
        self._members = change.members
        self._diary.write("change", generation=change.generation, members=change.members, lost=change.lost)

    def _crc(self) -> int:
        """Of the parameters that all ranks have in common."""
        with self._optimizer.common_parameters():
            crc = 0
            for parameter in self._model.parameters():
                crc = zlib.crc32(parameter.detach().numpy().tobytes(), crc)
        return crc


if __name__ == "__main__":
    main()
