"""Saving: every rank writes its files, and when all have, rank 0 makes them a checkpoint."""

from __future__ import annotations

import functools
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from mpisign.checkpoint import directory, local, owner
from mpisign.checkpoint.agreement import agree
from mpisign.checkpoint.files import Stamp, write_tensors
from mpisign.checkpoint.state import Snapshot, State, Stateful, check_loadable, check_stateful, collect
from mpisign.differences import minority
from mpisign.encoding import Optional
from mpisign.errors import CheckpointError, ConsistencyError, MpisignError, OptionError
from mpisign.plain import plain, uncompiled
from mpisign.policy import check_integer
from mpisign.session import Session, collective, current
from mpisign.survival import RanksLostError

__all__ = ["after_pending", "save", "wait"]

F = TypeVar("F", bound=Callable[..., Any])

ACT = "checkpoint.save()"
SAID = ({"step": int, "keep": int, "asynchronous": bool, "the optimizer's steps": int}, Optional(str))
POLL_SECONDS = 0.05  # how often rank 0's thread looks whether another rank's is done

_snapshot = Snapshot()
_pending: _Save | None = None
_saves_in: Session | None = None  # the session that will not be left before the pending save is done


def after_pending(function: F) -> F:
    """A function that first waits for a pending save, which counts or not by itself."""

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        wait()
        return function(*args, **options)

    return cast(F, call)


@uncompiled
@after_pending
@collective(ACT)
@plain()
def save(
    path: str | os.PathLike[str],
    *,
    model: torch.nn.Module,
    optimizer: Stateful,
    step: int,
    scheduler: Stateful | None = None,
    scaler: Stateful | None = None,
    extra: Any = None,
    keep: int = 3,
    asynchronous: bool = False,
) -> Path:
    """Write a checkpoint into the directory ``path``, which is made if need be. **Collective.**

    A job that is killed meanwhile, or that finds the disk full, keeps the checkpoints it has. The states of Python's,
    NumPy's and torch's random number generators are saved too; where the data loader is belongs into ``extra``. Ranks
    wait for the slowest one's disk: let a ``stall_timeout`` of :func:`mpisign.init` be longer than that takes.

    Args:
        path: on a file system that all nodes share. It is this job's from its first save to its end, which
            ``owner.json`` there says: another job that saves there gets an error. One that has ended, or was killed,
            leaves it to the next: on the same host or as the same SLURM job at once, else after five minutes.
        model: its parameters are the same on all ranks, but between two exchanges of an optimizer with ``every``:
            then the common ones are saved once and each rank's own beside. Buffers may differ and are saved for each
            rank. Of a ``DistributedDataParallel`` pass ``.module``.
        optimizer: a :class:`~mpisign.DistributedSignOptimizer`, or a plain one that is the same on all ranks. Save each
            of several with its part of the model in a directory of its own.
        step: names the checkpoint; the same on all ranks.
        scheduler: a learning rate scheduler.
        scaler: a GradScaler.
        extra: plain Python types and tensors, e.g. ``{"epoch": 3, "batch": 120}``. Rank 0's is saved; for what
            differs between ranks, ``mpisign.allgather_object(it)`` makes a list of all ranks'.
        keep: how many checkpoints to keep; older ones are removed when the new one is on the disk.
        asynchronous: only copy the state, and write it in a thread while training goes on. The memory for the copy
            is kept for the next time, so that the first time takes longest. It is a checkpoint when all ranks'
            threads are done, at the latest after :func:`wait`, which :func:`save`, :func:`load` and
            :func:`mpisign.shutdown` begin with.

    Returns:
        The checkpoint's folder, ``path/step-00000120``.

    Raises:
        CheckpointError: on every rank, naming the rank that could not write and why, or the job whose directory it is.
            Also for an earlier asynchronous save.
        ConsistencyError: ranks are at different steps, or pass different options.
        OptionError: an impossible option.
    """
    session = current(ACT)
    _begin(session)
    with session.telling(ACT):
        path, asynchronous = Path(path), bool(asynchronous)
        step, keep = check_integer("step", step, 0), check_integer("keep", keep, 1)
        if max(step, keep) >= directory.LIMIT:
            raise OptionError(f"step={step} and keep={keep} must be below {directory.LIMIT}")
        check_stateful(model=model, optimizer=optimizer, scheduler=scheduler, scaler=scaler)
    error, files, made = None, dict[str, State](), None
    said = {"step": step, "keep": keep, "asynchronous": asynchronous}
    try:
        shared, own = collect(model, optimizer, scheduler, scaler)
        local.divide(shared, own, model, optimizer)
        said["the optimizer's steps"] = (own["mpisign"] or said)["step"]
        check_loadable({"the optimizer's memory": own["mpisign"]})
        files[directory.rank_file(session.rank)] = own
        if session.rank == 0:
            files[directory.SHARED] = {**shared, "step": step, "extra": extra}
            check_loadable(files[directory.SHARED])
            path.mkdir(parents=True, exist_ok=True)
            owner.claim(path, owner.me(session.token))
            made = directory.begin(path, step)
        if asynchronous:
            files = _snapshot.of(files)
    except Exception as caught:  # whatever it is, the others must hear of it
        error = caught
    try:
        everyone = agree(session, ACT, f"step {step} is not saved", error, [said, made and made.name], SAID)
        _demand_same(session, [said for said, _ in everyone])
    except MpisignError:
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)
        raise
    written = path / directory.unfinished(everyone[0][1])
    final = written.with_name(directory.folder_of(step))
    saving = _Save(session, session.group.identities, session.rank, written, final, step, keep)
    if asynchronous:
        _let_run(saving, files)
    else:
        saving.write(files)
        saving.finish(ACT)
    return saving.folder


@uncompiled
def wait() -> None:
    """Wait until an asynchronous :func:`save` is a checkpoint; return at once if there is none. **Collective.**

    Raises:
        CheckpointError: on every rank, naming the rank that could not write and why.
    """
    if _pending is not None:
        current("checkpoint.wait()")  # or an error, each time: a forked child finishes nothing
    _finish(collective("checkpoint.wait()"))


def _finish(an_act: Callable[..., Any] = lambda function: function) -> None:
    global _pending
    saving = _pending
    if saving is not None:
        try:
            an_act(lambda: saving.finish("checkpoint.wait()"))()
        finally:  # on all ranks, whatever some have heard before others have died
            _pending = None


def _begin(session: Session) -> None:
    """Before the first save in a session: at its end the pending one is waited for, and the directory left."""
    global _saves_in
    if session is not _saves_in:
        _saves_in = session
        session.farewells.callback(owner.release_all)
        session.farewells.callback(_finish)


def _let_run(saving: _Save, files: dict[str, State]) -> None:
    global _pending
    _pending = saving
    saving.start(files)


def _demand_same(session: Session, said: list[dict[str, int]]) -> None:
    for name, mine in said[session.rank].items():
        values = [theirs[name] for theirs in said]
        odd, usual = minority(values)
        if odd:
            raise ConsistencyError(
                f"{ACT}: ranks {odd} differ from the others in {name}: rank {odd[0]} has {values[odd[0]]}, the others "
                f"{usual} (this is rank {session.rank}, with {mine}). All ranks must save the same step in the same way"
            )


@dataclass
class _Save:
    """One checkpoint on its way to the disk: from ``written``, where its files are, it will be moved to ``folder``.

    It is of the ranks that have begun it, ``identities``, of which this one was ``rank``. If some leave meanwhile,
    those who stay finish it, provided that the others had done their part.
    """

    session: Session
    identities: tuple[int, ...]
    rank: int
    written: Path
    folder: Path
    step: int
    keep: int
    _stamps: dict[str, Stamp] = field(default_factory=dict)
    _error: Exception | None = None
    _committed: bool = False
    _thread: threading.Thread | None = None
    _waited_for: threading.Event = field(default_factory=threading.Event)

    def write(self, files: dict[str, State]) -> None:
        """Write this rank's files; an error is kept for :meth:`finish`."""
        try:
            if not self.written.is_dir():
                raise CheckpointError(
                    f"there is no {self.written} here, which rank 0 has made: all ranks must pass the same path, on a "
                    f"file system that all nodes share"
                )
            for name, content in files.items():
                self._stamps[name] = write_tensors(self.written / name, content)
        except Exception as caught:
            self._error = caught

    def start(self, files: dict[str, State]) -> None:
        """The same in a thread, which ends with the process, and the commit too if all ranks' threads are done."""
        thread = threading.Thread(target=self._run, args=(files,), name="mpisign checkpoint", daemon=True)
        try:
            thread.start()
        except RuntimeError as caught:  # the system allows no more
            self._error = caught
        else:
            self._thread = thread

    def _run(self, files: dict[str, State]) -> None:
        # No MPI here: it need not stand threads, and the channel belongs to training. Ranks meet in the folder.
        self._waited_for.wait(POLL_SECONDS)  # let save() return first: what torch.save() does at first holds the GIL
        self.write(files)
        if self._error is not None:
            return
        try:
            if self.rank != 0:
                directory.say_done(self.written, self.rank, self._stamps)
                return
            told = [directory.as_json(self._stamps)]
            for rank in range(1, len(self.identities)):
                while (theirs := directory.done(self.written, rank)) is None:
                    if self._waited_for.wait(POLL_SECONDS):
                        return  # then finish() does it
                told.append(theirs)
            self._commit(directory.stamps_of_ranks(told))
        except Exception as caught:
            self._error = caught

    def finish(self, act: str) -> None:
        """Return when there is a checkpoint. **Collective.** Raises CheckpointError on all ranks if there is none."""
        self._waited_for.set()
        if self._thread is not None:
            self._thread.join()
        failed = f"{self.folder} is not saved, and earlier checkpoints are as they were"
        try:
            told = agree(self.session, act, failed, self._error, directory.as_json(self._stamps), directory.STAMPS)
            try:
                if self.session.group.identities != self.identities:
                    self._commit_of_those_left()
                elif self.rank == 0 and not self._committed:
                    self._commit(directory.stamps_of_ranks(told))
            except Exception as caught:
                self._error = caught
            agree(self.session, act, failed, self._error)
        except RanksLostError:
            raise
        except MpisignError:
            # Where ranks have parted, others may still write; the next save removes it.
            if self.rank == 0 and self.session.group.identities == self.identities:
                shutil.rmtree(self.written, ignore_errors=True)
            raise

    def _commit_of_those_left(self) -> None:
        """After some have left: by what ranks have said in the folder, as those who are gone can say nothing else."""
        if self.rank != 0:
            made = (self.folder / directory.MANIFEST).exists() and not self.written.exists()
            if not made and self.identities[0] not in self.session.group.identities:
                raise CheckpointError("rank 0 has left before it had made it a checkpoint")
        elif not self._committed:
            told = [directory.as_json(self._stamps)]
            for rank in range(1, len(self.identities)):
                theirs = directory.done(self.written, rank)
                if theirs is None:
                    raise CheckpointError(f"rank {rank} has left before it had written its part")
                told.append(theirs)
            self._commit(directory.stamps_of_ranks(told))

    def _commit(self, stamps: dict[str, Stamp]) -> None:
        owner.check(self.written.parent, self.session.token)
        directory.commit(self.written, stamps, self.step, len(self.identities), self.keep)
        self._committed = True
