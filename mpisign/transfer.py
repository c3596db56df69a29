"""Tensors between ranks, in full: how they are compared, cut into messages, and copied."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from mpisign.cuts import cut
from mpisign.differences import minority
from mpisign.errors import ConsistencyError, OptionError
from mpisign.policy import check_integer
from mpisign.session import Session

__all__ = ["CHUNK_BYTES", "as_bytes", "broadcast_tensors", "check_root", "demand_equal"]

CHUNK_BYTES = 32 << 20  # tensors travel together, in messages of at most about this size

ALIKE = (
    "Start all ranks alike: mpisign.broadcast_parameters(model.state_dict()) and "
    "mpisign.broadcast_optimizer_state(optimizer)"
)


def demand_equal(lines: Sequence[str], session: Session, act: str, problem: str, advice: str = ALIKE) -> None:
    """Raise on all ranks unless all have the same ``lines``, naming the minority and its first difference.

    **Collective.**
    """
    summary = hashlib.blake2b("\0".join(lines).encode(), digest_size=16).digest()
    summaries = session.gather_bytes(summary, act, limit=len(summary))
    odd, usual = minority(summaries)
    if not odd:
        return
    here, there = session.compare(lines, odd[0], summaries.index(usual), act)
    raise ConsistencyError(
        f"{act}: {problem}: ranks {odd} differ from the others (this is rank {session.rank}), first in {here} on rank "
        f"{odd[0]}, where rank {summaries.index(usual)} has {there}. {advice}"
    )


def as_bytes(tensor: torch.Tensor) -> npt.NDArray[np.uint8]:
    """A tensor's elements in row-major order as bytes (n,) uint8; shares memory where it is contiguous."""
    plain_tensor = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    raw: npt.NDArray[np.uint8] = plain_tensor.view(-1).view(torch.uint8).numpy()
    return raw


def _chunks(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    chunk: list[torch.Tensor] = []
    size = 0
    for tensor in tensors:
        nbytes = tensor.numel() * tensor.element_size()
        if chunk and size + nbytes > CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
        if nbytes:
            chunk.append(tensor)
            size += nbytes
    if chunk:
        yield chunk


@torch.no_grad()
def broadcast_tensors(tensors: Sequence[torch.Tensor], root_rank: int, session: Session, act: str) -> None:
    """Copy ``root_rank``'s tensors into every rank's, of the same shapes and types. **Collective.**"""
    for chunk in _chunks(tensors):
        with session.telling(act):  # of too little memory, or of an error of the device
            pieces = [as_bytes(tensor) for tensor in chunk]
            message = np.concatenate(pieces) if len(pieces) > 1 else np.ascontiguousarray(pieces[0])
        session.meet(act)
        with session.tracer.span("broadcast of tensors"):
            for start, length in cut(message.size):
                part = message[start : start + length]
                session.wait(session.post(session.group.comm.Ibcast(part, root=root_rank), message, part))
        if session.rank != root_rank:
            with session.telling(act):
                start = 0
                for tensor, piece in zip(chunk, pieces, strict=True):
                    received = torch.from_numpy(message[start : start + piece.size])
                    tensor.copy_(received.view(tensor.dtype).view(tensor.shape))
                    start += piece.size
    session.meet(act)


def check_root(root_rank: int, session: Session) -> int:
    """The number of a rank of the job. Raises :class:`OptionError`."""
    root_rank = check_integer("root_rank", root_rank)
    if not 0 <= root_rank < session.size:
        raise OptionError(f"root_rank={root_rank} is not a rank of this job: it has 0 .. {session.size - 1}")
    return root_rank
