"""Loading: the ranks agree on the latest undamaged checkpoint, and each takes what is shared and what is its own."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mpisign.checkpoint import directory, local
from mpisign.checkpoint.agreement import agree
from mpisign.checkpoint.directory import Manifest
from mpisign.checkpoint.files import damage, read_tensors
from mpisign.checkpoint.merging import merged
from mpisign.checkpoint.saving import after_pending
from mpisign.checkpoint.state import State, Stateful, check_stateful, map_tensors, put_back, reseed, set_random_state
from mpisign.encoding import Optional, printable
from mpisign.errors import CheckpointError, ConsistencyError
from mpisign.memory.saved import checked
from mpisign.plain import plain, uncompiled
from mpisign.session import Session, collective, current
from mpisign.warning import warn
from mpisign.windows import KEY

__all__ = ["Resumed", "load", "newest"]

ACT = "checkpoint.load()"
SHARED_PARTS = {"model": dict, "optimizer": dict, "scheduler": object, "scaler": object, "step": int, "extra": object}
OWN_PARTS = {"mpisign": object, "buffers": dict, "scaler": object, "random": dict}
TOLD = (bool, [(str, str, Optional(directory.MANIFESTS))])


@dataclass(frozen=True)
class Resumed:
    """What :func:`load` has found: the ``step`` and ``extra`` of the save, its folder, and how many ranks saved."""

    step: int
    extra: Any
    path: Path
    ranks: int


@uncompiled
@collective("checkpoint.newest()")
def newest(path: str | os.PathLike[str]) -> Path | None:
    """The checkpoint in a directory that was saved last, its files unread; None if there is none. **Collective.**

    Raises:
        CheckpointError: the directory cannot be read.
    """
    act = "checkpoint.newest()"
    session = current(act)
    error, found = None, None
    with session.telling(act):
        path = Path(path)
    try:
        if session.rank == 0:
            found = next((folder.name for folder, _ in directory.find(path)), None)
    except Exception as caught:  # whatever it is, the others must hear of it
        error = caught
    latest = agree(session, act, "no checkpoint", error, found, Optional(str))[0]
    return None if latest is None else path / directory.name_of(latest)


@uncompiled
@after_pending
@collective(ACT)
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
    - Where ranks mix models of their own (:func:`mpisign.monna`), all go on from rank 0's, with its optimizer.
    - With ``every``, all go on from the last common parameters, rank r with the wrapped optimizer's state and schedule
      of old rank ``r % ranks``. Save right after an exchange for that, as what was done in a window that had begun is
      given up.

    Of a checkpoint of an optimizer with ``every``, a model alone, or one with an optimizer without ``every``, gets the
    common parameters, on any number of ranks.

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
    with session.telling(ACT):
        path = Path(path)
    folder, manifest, left_out = _choose(session, path)
    error, extra = None, None
    try:
        shared, own = _read(folder, manifest, session, optimizer)
        put_back("model", model, shared["model"])
        for name, target in (("optimizer", optimizer), ("scheduler", scheduler), ("scaler", scaler)):
            if target is not None:
                if shared[name] is None:
                    raise CheckpointError(f"it was saved without {name}=")
                put_back(name, target, _owned(shared[name]))
        extra = _owned(shared["extra"])
        if manifest.ranks == _trainers(session):
            set_random_state(own["random"])
        else:
            reseed(own["random"], session.rank, session.size)
        if session.rank == 0 and left_out:  # here, as a warning may be an error
            warn(f"training goes on from {folder}, as {'; '.join(left_out)}")
        if session.rank == 0 and manifest.ranks != _trainers(session):
            warn(
                f"{folder} was saved by {manifest.ranks} ranks and this job has {_trainers(session)}: every rank goes "
                f"on with the mean of the old ranks' memories and fresh random numbers (see mpisign.checkpoint.load)"
            )
    except Exception as caught:  # whatever it is, the others must hear of it
        error = caught
    agree(session, ACT, f"{folder} does not fit", error)
    return Resumed(manifest.step, extra, folder, manifest.ranks)


def _choose(session: Session, path: Path) -> tuple[Path, Manifest, list[str]]:
    """The checkpoint to load, and what is wrong with those that were preferred to it. **Collective.**"""
    error, found = None, None
    try:
        if session.rank == 0:
            found = _told(*_candidates(path))
    except Exception as caught:  # whatever it is, the others must hear of it
        error = caught
    told = agree(session, ACT, f"{path} cannot be loaded", error, found, Optional(TOLD))[0]
    if told is None:
        raise ConsistencyError(f"{ACT}: rank 0 has not said what there is to load (this is rank {session.rank})")
    one, candidates = told
    wrong: list[str] = []
    manifest: Manifest | str
    for name, unreadable, content in candidates:
        with session.telling(ACT):
            named = one and name == path.name  # then it need not be called as one
            # Paths are each rank's own: mounts differ.
            folder = path if named else (path.parent if one else path) / directory.name_of(name)
            manifest = _manifest(content) if content is not None else printable(unreadable) or f"{folder} is unreadable"
            found_here = manifest if isinstance(manifest, str) else _damage_in_my_share(session, folder, manifest)
        problem = _first_problem(session, found_here)
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


def _damage_in_my_share(session: Session, folder: Path, manifest: Manifest) -> str:
    """What is wrong with the files of a checkpoint that this rank reads for all, or ""."""
    mine = [name for at, name in enumerate(sorted(manifest.files)) if at % session.size == session.rank]
    return next(filter(None, (damage(folder / name, manifest.files[name]) for name in mine)), "")


def _first_problem(session: Session, mine: str) -> str:
    """Of what the ranks have found, or "". **Collective.**"""
    problems = session.gather_values([mine, platform.node()], (str, str), ACT)
    said = (f"{problem} (rank {rank} on {node})" for rank, (problem, node) in enumerate(problems) if problem)
    return printable(next(said, ""))


def _trainers(session: Session) -> int:
    """How many ranks are to train: all, but for spares that have not left yet."""
    return session.size if session.membership is None else session.membership.spares.trainers


def _read(folder: Path, manifest: Manifest, session: Session, optimizer: Stateful | None) -> tuple[State, State]:
    """What is shared, with this rank's own in its place, and the rest of this rank's."""
    shared = _parts(folder / directory.SHARED, SHARED_PARTS)
    if shared["step"] != manifest.step:
        raise CheckpointError(f"{folder / directory.SHARED} is not of step {manifest.step}, of which its manifest is")
    files = [folder / directory.rank_file(rank) for rank in range(manifest.ranks)]
    left = KEY in shared["optimizer"] and not _has_windows(optimizer)
    if left:
        local.leave(shared, _parts(files[0], OWN_PARTS), files[0])
    if left and optimizer is not None and session.rank == 0:
        warn(
            f"{folder} was saved with every=, and this optimizer is without: all go on from the common parameters, "
            f"with rank 0's state of the wrapped optimizer"
        )
    if manifest.ranks == _trainers(session):
        mine = session.rank % manifest.ranks  # a spare takes another's, and is given all when it steps in
        own = _parts(files[mine], OWN_PARTS)
        strange = sorted(map(str, own["buffers"].keys() - shared["model"].keys()))
        if strange:
            raise CheckpointError(
                f"{files[mine]}: 'buffers' has {strange[0]!r}, which the model in {directory.SHARED} has not"
            )
        shared["model"].update(own["buffers"])
        shared["scaler"] = own["scaler"]
        if not left:
            local.put_together(shared, own, files[mine], optimizer)
        memory = own["mpisign"]
        if memory is not None and _trainers(session) < session.size:
            memory = {**memory, "rank": session.rank, "size": session.size}
    else:
        kept = [_parts(file, OWN_PARTS) for file in files]  # nothing is read of it yet but what there is
        for file, its in zip(files, kept, strict=True):
            if its["mpisign"] is not None:
                checked(its["mpisign"], None, str(file))
        own = kept[0]
        memory = merged(files, session.rank, session.size)
        at = session.rank % manifest.ranks
        given_up = local.restart(shared, memory, kept[at], kept, files[at])
        if given_up and session.rank == 0:
            warn(
                f"{folder} was saved within a window of local steps, and by another number of ranks: at most "
                f"{max(given_up)} steps of each are given up, and all go on from their last common parameters"
            )
    if memory is not None and not left:
        shared["optimizer"]["mpisign"] = memory
    return shared, own


def _has_windows(optimizer: Stateful | None) -> bool:
    """Whether it makes local steps, by its state: it may be in a wrapper, such as Accelerate's."""
    return optimizer is not None and KEY in (optimizer.state_dict().get("mpisign") or {})


def _parts(file: Path, parts: Mapping[str, type]) -> State:
    """What a file holds, by name and type. Raises CheckpointError, naming what is missing or of another type."""
    content = read_tensors(file)
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds a {type(content).__name__} instead of {', '.join(parts)}")
    for name, kind in parts.items():
        if name not in content or not isinstance(content[name], kind):
            found = f"of type {type(content[name]).__name__}" if name in content else "missing"
            raise CheckpointError(f"{file}: {name!r} is {found}, so this is no checkpoint of mpisign's")
    return content


def _owned(tree: Any) -> Any:
    """``tree`` with its tensors in memory; read lazily, they would be gone with the file."""
    return map_tensors(tree, torch.clone)
