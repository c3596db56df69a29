"""The directory that holds checkpoints: names, manifests, what is kept. Everything here is done by one rank."""

from __future__ import annotations

import logging
import re
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpisign.checkpoint.files import Stamp, read_json, sync_folder, write_json
from mpisign.encoding import fits
from mpisign.errors import CheckpointError, ConsistencyError
from mpisign.trees import shown

__all__ = [
    "MANIFEST",
    "MANIFESTS",
    "SHARED",
    "STAMPS",
    "Manifest",
    "as_json",
    "begin",
    "commit",
    "done",
    "find",
    "folder_of",
    "is_checkpoint",
    "name_of",
    "rank_file",
    "say_done",
    "stamps_of_ranks",
    "unfinished",
]

FORMAT, FORMAT_VERSION = "mpisign checkpoint", 1
LIMIT = 2**62  # of numbers in manifests
MANIFEST = "manifest.json"
SHARED = "shared.pt"
UNFINISHED = ".tmp"
REPLACED = ".old"  # has been saved a second time at the same step; stays until the second is in its place
_UNFINISHED_NAME = re.compile(rf"step-[0-9]+\.[0-9a-f]{{8}}{re.escape(UNFINISHED)}")
_NAME = re.compile(rf"step-[0-9]+({re.escape(REPLACED)})?")

logger = logging.getLogger(__name__)


def folder_of(step: int) -> str:
    return f"step-{step:08d}"


STAMP = {"bytes": int, "crc32": int}
STAMPS = {str: STAMP}
MANIFESTS = {"step": int, "ranks": int, "serial": int, "files": STAMPS}
"""The shape of what ranks tell each other of files and manifests."""


def rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.pt"


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself.

    ``serial`` counts the saves into a directory, which orders them also after going back to an earlier step;
    ``files`` by name: just those of a checkpoint of so many ranks, all in its folder.
    """

    step: int
    ranks: int
    serial: int
    files: dict[str, Stamp]

    def write(self, folder: Path) -> None:
        """Raises OSError."""
        about = {"format": FORMAT, "version": FORMAT_VERSION}
        write_json(folder / MANIFEST, about | self.as_json())

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**vars(self), "files": as_json(self.files)}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Manifest:
        """The other way round; nothing is made that is larger than ``content``.

        Raises:
            ValueError: it is no whole manifest; names the first field that cannot be.
        """
        step, ranks, serial = (
            _number(content, name, least) for name, least in (("step", 0), ("ranks", 1), ("serial", 0))
        )
        files = content.get("files")
        if not isinstance(files, dict):
            raise ValueError(f"files is {_shown(files)}, and not the files with their sizes")
        if len(files) != ranks + 1:  # first the number: names are made for each rank
            raise ValueError(f"ranks is {ranks}, and files has {len(files)} instead of {ranks + 1}")
        stamps = {}
        for name in (SHARED, *map(rank_file, range(ranks))):
            stamp: Any = files.get(name)
            if not fits(stamp, STAMP) or not (0 <= stamp["bytes"] < LIMIT and 0 <= stamp["crc32"] < 2**32):
                raise ValueError(f"files[{name!r}] is {_shown(stamp)}, and not a size and a CRC-32")
            stamps[name] = Stamp(**stamp)
        return cls(step, ranks, serial, stamps)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Raises CheckpointError, with what is wrong."""
        path = folder / MANIFEST
        try:
            content = read_json(path)
        except FileNotFoundError:
            raise CheckpointError(f"{folder} has no {MANIFEST}, so it is not a checkpoint of mpisign's") from None
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
        except ValueError as error:
            raise CheckpointError(f"{path} is damaged, or of another program") from error
        if content.get("format") != FORMAT or type(version := content.get("version")) is not int:
            raise CheckpointError(f"{path} is of another program: its format is {_shown(content.get('format'))}")
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"{path} has format {_shown(version)} and this mpisign reads {FORMAT_VERSION}: "
                + ("in the checkout of a newer one: pip install ." if version > FORMAT_VERSION else "it is too old")
            )
        try:
            return cls.from_json(content)
        except ValueError as error:
            raise CheckpointError(f"{path} is damaged, or of another program: {error}") from error


def _number(content: dict[str, Any], name: str, least: int) -> int:
    """Raises ValueError."""
    value = content.get(name)
    if type(value) is not int or not least <= value < LIMIT:
        raise ValueError(f"{name} is {_shown(value)}, and not an integer of at least {least}")
    return value


def _shown(value: object) -> str:
    return "missing" if value is None else shown(value)


def is_checkpoint(path: Path) -> bool:
    """Whether a path is that of one checkpoint, be it damaged, and not of a directory of them."""
    return _NAME.fullmatch(path.name) is not None or (path / MANIFEST).exists()


def find(directory: Path) -> list[tuple[Path, Manifest | str]]:
    """The checkpoints in a directory, the latest first, with what is wrong where the manifest cannot be read.

    Raises CheckpointError if the directory cannot be read; one that does not exist is empty.
    """
    try:
        folders = sorted(path for path in directory.iterdir() if _NAME.fullmatch(path.name))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be read: {error.strerror}") from error
    found, unreadable = [], []
    for folder in folders:
        try:
            found.append((folder, Manifest.read(folder)))
        except CheckpointError as error:
            unreadable.append((folder, str(error)))
    ordered: list[tuple[Path, Manifest | str]] = [*sorted(found, key=lambda entry: -entry[1].serial)]
    for folder, problem in unreadable:  # it cannot say when it was saved: take it as later than an earlier step
        earlier = (at for at, (_, it) in enumerate(ordered) if isinstance(it, Manifest) and it.step < _step_of(folder))
        ordered.insert(next(earlier, len(ordered)), (folder, problem))
    return ordered


def begin(directory: Path, step: int) -> Path:
    """A new folder to write to, in a directory freed of what killed jobs have left there. Raises OSError."""
    directory.mkdir(parents=True, exist_ok=True)
    for leftover in directory.glob(f"step-*{UNFINISHED}"):
        _remove(leftover)
    folder = directory / f"{folder_of(step)}.{secrets.token_hex(4)}{UNFINISHED}"
    folder.mkdir()
    return folder


def name_of(told: str) -> str:
    """The name of a checkpoint's folder that another rank has told, if it is one. Raises ConsistencyError."""
    if not _NAME.fullmatch(told):
        raise ConsistencyError(f"rank 0 has told {told[:80]!r} for the name of a checkpoint, which it cannot be")
    return told


def unfinished(told: str | None) -> str:
    """The same for a folder that is being written to."""
    if told is None or not _UNFINISHED_NAME.fullmatch(told):
        raise ConsistencyError(f"rank 0 has told {told!r:.80} for the name of a new folder, which it cannot be")
    return told


def stamps_of_ranks(told: list[dict[str, dict[str, int]]]) -> dict[str, Stamp]:
    """The stamps of all files, told by the ranks that have written them. Raises ConsistencyError."""
    stamps: dict[str, Stamp] = {}
    for rank, theirs in enumerate(told):
        if theirs.keys() != {rank_file(rank), *([SHARED] if rank == 0 else [])}:
            raise ConsistencyError(
                f"rank {rank} says that it has written {sorted(theirs)!r:.200}, which are not its files"
            )
        stamps |= {name: Stamp(**stamp) for name, stamp in theirs.items()}
    return stamps


def say_done(written: Path, rank: int, stamps: dict[str, Stamp]) -> None:
    """Tell rank 0 through the folder that ``rank`` has written its files. Raises OSError."""
    write_json(_note(written, rank), as_json(stamps))


def done(written: Path, rank: int) -> dict[str, dict[str, int]] | None:
    """What ``rank`` has said, or None if it is not done yet. Raises OSError, ValueError."""
    try:
        told = read_json(_note(written, rank))
    except FileNotFoundError:
        return None
    if not fits(told, STAMPS):
        raise ValueError(f"rank {rank} has left a note in {written} that is none of mpisign's")
    return told


def _note(written: Path, rank: int) -> Path:
    return written / f"rank-{rank:05d}.done"


def commit(written: Path, stamps: dict[str, Stamp], step: int, ranks: int, keep: int) -> Path:
    """Make the files in ``written`` a checkpoint of the directory they are in, and keep the latest ``keep``.

    Raises OSError; there is no new checkpoint then, and the others are as they were.
    """
    directory, final = written.parent, written.parent / folder_of(step)
    replaced = final.with_name(final.name + REPLACED)
    serial = 1 + max((manifest.serial for _, manifest in _readable(directory)), default=0)
    Manifest(step, ranks, serial, stamps).write(written)
    for note in written.glob("*.done"):
        note.unlink()
    sync_folder(written)
    if final.exists():
        _remove(replaced)
        final.rename(replaced)
    written.rename(final)
    sync_folder(directory)
    _remove(replaced)
    for folder, _ in _readable(directory)[keep:]:
        _remove(folder)
    return final


def _readable(directory: Path) -> list[tuple[Path, Manifest]]:
    return [(folder, manifest) for folder, manifest in find(directory) if isinstance(manifest, Manifest)]


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-").removesuffix(REPLACED))


def _remove(folder: Path) -> None:
    """Remove a folder: for whoever looks for a checkpoint at once, then its files."""
    doomed = folder if folder.suffix == UNFINISHED else folder.with_name(folder.name + UNFINISHED)
    try:
        folder.rename(doomed)
        shutil.rmtree(doomed)
    except FileNotFoundError:
        pass
    except OSError as error:
        logger.warning("%s is no longer needed and cannot be removed: %s", folder, error)


def as_json(stamps: dict[str, Stamp]) -> dict[str, dict[str, int]]:
    """Plain values."""
    return {name: stamp._asdict() for name, stamp in stamps.items()}
