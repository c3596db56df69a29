"""Loading: the ranks agree on the latest undamaged checkpoint, and each takes what is shared and what is its own."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mpisign.checkpoint import directory
from mpisign.checkpoint.agreement import agree
from mpisign.checkpoint.directory import Manifest
from mpisign.checkpoint.files import damage, read_tensors
from mpisign.checkpoint.merging import merged
from mpisign.checkpoint.saving import wait
from mpisign.checkpoint.state import State, Stateful, check_stateful, map_tensors, reseed, set_random_state
from mpisign.encoding import Optional, printable
from mpisign.errors import CheckpointError, ConsistencyError
from mpisign.plain import plain, uncompiled
from mpisign.session import Session, current
from mpisign.warning import warn

__all__ = ["Resumed", "load", "newest"]

ACT = "checkpoint.load()"
TOLD = (bool, [(str, str, Optional(directory.MANIFESTS))])


@dataclass(frozen=True)
class Resumed:
    """What :func:`load` has found: the ``step`` and ``extra`` of the save, its folder, and how many ranks saved."""

    step: int
    extra: Any
    path: Path
    ranks: int


@uncompiled
def newest(path: str | os.PathLike[str]) -> Path | None:
    """The checkpoint in a directory that was saved last, its files unread; None if there is none. **Collective.**

    Raises:
        CheckpointError: the directory cannot be read.
    """
    session = current("checkpoint.newest()")
    error, found = None, None
    if session.rank == 0:
        try:
            found = next((folder.name for folder, _ in directory.find(Path(path))), None)
        except CheckpointError as caught:
            error = caught
    latest = agree(session, "checkpoint.newest()", "no checkpoint", error, found, Optional(str))[0]
    return None if latest is None else Path(path) / directory.name_of(latest)


@uncompiled
@plain()
def load(
    path: str | os.PathLike[str],
    *,
    model: torch.nn.Module,
    optimizer: Stateful | None = None,
    scheduler: Stateful | None = None,
    scaler: Stateful | None = None,
) -> Resumed:
    """Put a job where :func:`save` has left it. **Collective.**

    On as many ranks as have saved, training goes on bit for bit. On another number, which a warning tells:

    - Every rank gets the mean over the old ranks' memories; a rank without one for a parameter counts as zeros, as
      which a memory begins. The rules combine the ranks' messages evenly, so an update depends on the ranks' mean
      momentum, and what error feedback still owes the parameters is the mean of the residuals: both stay as they
      were, up to rounding, on any number of ranks.
    - Random number generators are seeded anew, each rank's from rank 0's saved state and its own number.
    - Buffers and loss scale are rank 0's.

    Call it after the model, optimizer and so on are made as for the first start; nothing needs to be broadcast then.

    Args:
        path: a directory of checkpoints, of which the last undamaged one is taken, with a warning if others had to be
            left out; or the folder of one checkpoint.
        optimizer, scheduler, scaler: what shall go on too.

    Raises:
        CheckpointError: on every rank: there is no checkpoint, or it is damaged or does not fit, in which case the
            objects may have been changed in part. The message names file and rank, and another checkpoint
            that is good.
        OptionError: a model, optimizer, scheduler or scaler is something else, such as its state dict.
    """
    check_stateful(model=model, optimizer=optimizer, scheduler=scheduler, scaler=scaler)
    session = current(ACT)
    wait()
    folder, manifest, left_out = _choose(session, Path(path))
    error, extra = None, None
    try:
        shared, own = _read(folder, manifest, session)
        model.load_state_dict(shared["model"])
        for name, target in (("optimizer", optimizer), ("scheduler", scheduler), ("scaler", scaler)):
            if target is not None:
                if shared[name] is None:
                    raise CheckpointError(f"it was saved without {name}=")
                target.load_state_dict(_owned(shared[name]))
        extra = _owned(shared["extra"])
        if manifest.ranks == session.size:
            set_random_state(own["random"])
        else:
            reseed(own["random"], session.rank, session.size)
    except Exception as caught:  # whatever it is, the others must hear of it
        error = caught
    agree(session, ACT, f"{folder} does not fit", error)
    if session.rank == 0:
        if left_out:
            warn(f"training goes on from {folder}, as {'; '.join(left_out)}")
        if manifest.ranks != session.size:
            warn(
                f"{folder} was saved by {manifest.ranks} ranks and this job has {session.size}: every rank goes on "
                f"with the mean of the old ranks' memories and fresh random numbers (see mpisign.checkpoint.load)"
            )
    return Resumed(manifest.step, extra, folder, manifest.ranks)


def _choose(session: Session, path: Path) -> tuple[Path, Manifest, list[str]]:
    """The checkpoint to load, and what is wrong with those that were preferred to it. **Collective.**"""
    error, found = None, None
    if session.rank == 0:
        try:
            found = _told(*_candidates(path))
        except CheckpointError as caught:
            error = caught
    told = agree(session, ACT, f"{path} cannot be loaded", error, found, Optional(TOLD))[0]
    if told is None:
        raise ConsistencyError(f"{ACT}: rank 0 has not said what there is to load (this is rank {session.rank})")
    one, candidates = told
    wrong: list[str] = []
    manifest: Manifest | str
    for name, unreadable, content in candidates:
        named = one and name == path.name  # then it need not be called as one; paths are each rank's own: mounts differ
        folder = path if named else (path.parent if one else path) / directory.name_of(name)
        manifest = _manifest(content) if content is not None else printable(unreadable) or f"{folder} is unreadable"
        problem = manifest if isinstance(manifest, str) else _find_damage(session, folder, manifest)
        if not problem and isinstance(manifest, Manifest):
            break
        wrong.append(problem)
    else:
        raise CheckpointError(f"{ACT}: there is no good checkpoint in {path}: {'; '.join(wrong) or 'it is empty'}")
    if one and wrong:
        raise CheckpointError(
            f"{ACT}: {wrong[0]}. The latest good checkpoint beside it is {folder}: load({str(folder)!r}, ...)"
        )
    return folder, manifest, wrong


def _manifest(told: dict[str, Any]) -> Manifest | str:
    """The manifest that rank 0 has told, or what is wrong with it."""
    try:
        return Manifest.from_json(told)
    except ValueError as error:
        return f"rank 0 has told a manifest that is none: {error}"


def _told(one: bool, candidates: list[tuple[str, Manifest | str]]) -> list[Any]:
    """What :func:`_candidates` has found, as plain values."""
    return [one, [[name, it, None] if isinstance(it, str) else [name, "", it.as_json()] for name, it in candidates]]


def _candidates(path: Path) -> tuple[bool, list[tuple[str, Manifest | str]]]:
    """Whether the path is that of one checkpoint, and what may be loaded, by the folders' names, in this order.

    A manifest that cannot be read is replaced by what is wrong with it.
    """
    if path.is_file():
        raise CheckpointError(
            f"{path} is a file, and a checkpoint is a folder; what torch.save() has written of an optimizer loads by "
            f"optimizer.load_state_dict(torch.load({str(path)!r}, weights_only=True))"
        )
    if not directory.is_checkpoint(path):
        return False, [(folder.name, manifest) for folder, manifest in directory.find(path)]
    try:
        wanted: Manifest | str = Manifest.read(path)
    except CheckpointError as problem:
        wanted = str(problem)
    others = [(folder.name, it) for folder, it in directory.find(path.parent) if folder.name != path.name]
    return True, [(path.name, wanted), *others]


def _find_damage(session: Session, folder: Path, manifest: Manifest) -> str:
    """What is wrong with a checkpoint's files, each read by one rank, or "". **Collective.**"""
    mine = [name for at, name in enumerate(sorted(manifest.files)) if at % session.size == session.rank]
    problem = next(filter(None, (damage(folder / name, manifest.files[name]) for name in mine)), "")
    problems = session.gather_values([problem, platform.node()], (str, str), ACT)
    said = (f"{problem} (rank {rank} on {node})" for rank, (problem, node) in enumerate(problems) if problem)
    return printable(next(said, ""))


def _read(folder: Path, manifest: Manifest, session: Session) -> tuple[State, State]:
    """What is shared, with this rank's own in its place, and the rest of this rank's."""
    shared = read_tensors(folder / directory.SHARED)
    files = [folder / directory.rank_file(rank) for rank in range(manifest.ranks)]
    if manifest.ranks == session.size:
        own = read_tensors(files[session.rank])
        shared["model"].update(own["buffers"])
        shared["scaler"] = own["scaler"]
        memory = own["mpisign"]
    else:
        own = read_tensors(files[0])
        memory = merged(files, session.rank, session.size)
    if memory is not None:
        shared["optimizer"]["mpisign"] = memory
    return shared, own


def _owned(tree: Any) -> Any:
    """``tree`` with its tensors in memory; read lazily, they would be gone with the file."""
    return map_tensors(tree, torch.clone)
