"""Memory that the ranks of a node share: a file in /dev/shm that all have mapped and that has no name any more.

MPI's own windows do not survive the failure of a rank. All of the file's space is claimed before anybody writes to it,
as in a container /dev/shm may have 64 MB, and the first byte too many would be a SIGBUS; but not before all have opened
the file and its name is gone, as a job that is killed would leave it.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import secrets
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mpisign.session import Session

__all__ = ["FOLDER", "NodeMemory"]

FOLDER = Path("/dev/shm")
TOKEN_BYTES = 16
HEAD_BYTES = 64  # before what is asked for, so that it begins at a line of a cache


class NodeMemory:
    """Zeroed bytes, the same ones for all ranks of a node.

    Attributes:
        bytes: (size,) of them.
    """

    def __init__(self, mapped: mmap.mmap) -> None:
        self.bytes: npt.NDArray[np.uint8] = np.frombuffer(mapped, np.uint8)[HEAD_BYTES:]

    @classmethod
    def share(cls, session: Session, size: int) -> tuple[NodeMemory | None, str]:
        """Get ``size`` bytes on every node. **Collective** over all ranks.

        Args:
            size: the same on the ranks of a node.

        Returns:
            None if some rank of the job could not get it, and why, in words; the same on all ranks.
        """
        group, whole = session.group, size + HEAD_BYTES
        leader, leaders = group.neighbours[0], [ranks[0] for ranks in group.ranks_by_node]
        path, why = FOLDER / f"mpisign-{secrets.token_hex(TOKEN_BYTES)}", ""
        mapped: mmap.mmap | None = None
        with contextlib.ExitStack() as stack:
            if session.rank == leader:
                try:
                    handle, mapped = _create(path, whole, stack)
                except OSError as error:
                    why = _refused(session.rank, whole, error)
            names = session.gather_values(path.name if mapped else "", str, "a plan")
            if mapped is None and names[leader]:
                try:
                    mapped = _open(FOLDER / names[leader], whole)
                except (OSError, ValueError) as error:
                    why = f"rank {session.rank} does not see what rank {leader} has in {FOLDER} ({error})"
            reasons = [its for its in session.gather_values(why, str, "a plan") if its]
            reasons += [f"rank {its} has named no file" for its in leaders if not (names[its] or reasons)]
            if not reasons:  # all have it, so it needs no name any more, and a kill from here on leaves nothing
                if session.rank == leader:
                    path.unlink(missing_ok=True)
                    try:
                        os.posix_fallocate(handle, 0, whole)  # OSError where there is no space, instead of SIGBUS later
                    except OSError as error:
                        why = _refused(session.rank, whole, error)
                reasons = [its for its in session.gather_values(why, str, "a plan") if its]
        if reasons or mapped is None:
            return None, "; ".join(reasons[:3])
        return cls(mapped), ""


def _refused(rank: int, size: int, error: OSError) -> str:
    return f"rank {rank} gets no {size / 2**20:.3g} MiB in {FOLDER} ({error.strerror})"


def _create(path: Path, size: int, stack: contextlib.ExitStack) -> tuple[int, mmap.mmap]:
    """A file of that length that has claimed no space yet; with ``stack`` its name ends, and the handle."""
    handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    stack.callback(os.close, handle)
    stack.callback(path.unlink, missing_ok=True)
    os.ftruncate(handle, size)
    os.pwrite(handle, bytes.fromhex(path.name.rpartition("-")[2]), 0)
    return handle, mmap.mmap(handle, size)


def _open(path: Path, size: int) -> mmap.mmap:
    """Raises OSError or ValueError where the file is not what the leader has made."""
    if path.parent != FOLDER:
        raise ValueError(f"{path} is elsewhere")
    handle = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        mapped = mmap.mmap(handle, size)
        token = os.pread(handle, TOKEN_BYTES, 0)  # not by the mapping, whose space is not claimed yet
    finally:
        os.close(handle)
    if token.hex() != path.name.rpartition("-")[2]:
        raise ValueError(f"{path} is another file")
    return mapped
