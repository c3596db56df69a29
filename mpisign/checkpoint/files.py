"""Files that are on the disk when writing them returns, and whose damage is found when they are read."""

from __future__ import annotations

import errno
import json
import os
import stat
import zlib
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import torch

__all__ = ["Stamp", "damage", "open_regular", "read_json", "read_tensors", "sync_folder", "write_json", "write_tensors"]

CHUNK_BYTES = 4 << 20
JSON_LIMIT_BYTES = 64 << 20


class Stamp(NamedTuple):
    """What a file must be: its size, and the CRC-32 of all its bytes."""

    bytes: int
    crc32: int


class _Stamping:
    """A file that takes note of what is written to it."""

    def __init__(self, file: FileIO) -> None:
        self.file = file
        self.stamp = Stamp(0, 0)
        self.error: OSError | None = None

    def write(self, data: memoryview) -> int:
        self.stamp = Stamp(self.stamp.bytes + len(data), zlib.crc32(data, self.stamp.crc32))
        left = memoryview(data)
        try:
            while left:
                left = left[self.file.write(left) :]  # Linux takes at most 2 GiB at a time
        except OSError as error:
            self.error = error
            raise
        return len(data)

    def flush(self) -> None:
        """Asked for by torch; nothing is held back here."""


def write_tensors(path: Path, content: dict[str, Any]) -> Stamp:
    """``torch.save`` to a new file. Raises OSError."""
    with FileIO(path, "x") as file:
        stamping = _Stamping(file)
        try:
            torch.save(content, stamping)  # type: ignore[arg-type]
        except RuntimeError:
            if stamping.error is None:
                raise
            raise stamping.error from None  # torch's own error does not tell what has happened
        os.fsync(file.fileno())
    return stamping.stamp


def read_tensors(path: Path) -> dict[str, Any]:
    """What :func:`write_tensors` has written, on the CPU; the tensors are in the file until they are copied.

    No code in the file is executed. Raises whatever torch does, and OSError.
    """
    open_regular(path).close()
    content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return content


def damage(path: Path, stamp: Stamp) -> str:
    """What is wrong with a file, or "". Reads all of it."""
    found, crc = 0, 0
    try:
        with open_regular(path) as file:
            chunk = bytearray(CHUNK_BYTES)
            while length := file.readinto(chunk):
                found += length
                crc = zlib.crc32(memoryview(chunk)[:length], crc)
    except OSError as error:
        return f"{path} cannot be read: {error.strerror or error}"
    if found != stamp.bytes:
        return f"{path} has {found} bytes and was saved with {stamp.bytes}"
    return "" if crc == stamp.crc32 else f"{path} is damaged: its checksum is not that of what was saved"


def open_regular(path: Path) -> FileIO:
    """A file to read. Raises OSError, also for what is no file of its own: a link, a folder, a pipe, a device.

    To open a pipe would wait for who writes to it, and to open a device may do anything.
    """
    if not stat.S_ISREG(os.lstat(path).st_mode):
        raise OSError(errno.EINVAL, "it is a link, a folder, a pipe or a device, and no regular file", str(path))
    return FileIO(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK), "rb")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a file that is either whole or not there. Raises OSError."""
    part = path.with_name(path.name + ".part")
    with open(part, "w") as file:
        file.write(json.dumps({**content, "crc32": _crc(content)}, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """What :func:`write_json` has written. Raises OSError, ValueError."""
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > JSON_LIMIT_BYTES:
            raise ValueError(f"{path} is larger than any that is written")
        read = file.readall()
    try:
        content = json.loads(read)
        if isinstance(content, dict):
            crc, whole = content.pop("crc32", None), _crc(content)
    except RecursionError:
        content = None
    if not isinstance(content, dict) or type(crc) is not int or crc != whole:
        raise ValueError(f"{path} is damaged: its checksum is not that of what was saved")
    return content


def _crc(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def sync_folder(path: Path) -> None:
    """Get the names in a folder to the disk. Raises OSError."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
