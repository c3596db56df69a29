"""The largest magnitude of every coordinate over all ranks, for methods that need it: one dense reduction."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mpisign.bitmap.tensors import flat
from mpisign.cuts import cut
from mpisign.exchange.staging import Buffer
from mpisign.group import Group
from mpisign.layout import Bucket, Layout
from mpisign.session import Session

__all__ = ["Maximum"]


class Maximum:
    """Its buffer, of one fp32 number a coordinate."""

    def __init__(self, layout: Layout, buckets: Sequence[Bucket], group: Group) -> None:
        self._segments = [segment for bucket in buckets for segment in bucket.segments]
        # Staged, as Open MPI's nonblocking reductions crash on GPU memory even where its other collectives take it.
        length = sum(segment.numel for segment in self._segments)
        self._buffer = Buffer((length,), torch.float32, layout.device, staged=True)
        ranks = group.size
        self.bytes_sent = 2 * (ranks - 1) * self._buffer.nbytes // ranks  # of a ring; MPI may choose another way

    def over_ranks(
        self, gradients: Sequence[torch.Tensor | None], unscale: float, session: Session
    ) -> dict[int, torch.Tensor]:
        """By a segment's first word: ``max_m |g_m|`` (n,) over the ranks that have a gradient. **Collective.**

        Args:
            gradients: by segment, in the order of the wire; None where this rank has none.
            unscale: factor that takes this rank's loss scale out of its gradients.
        """
        from mpi4py import MPI

        parts = self._buffer.tensor.split([segment.numel for segment in self._segments])
        for gradient, part in zip(gradients, parts, strict=True):
            part.zero_() if gradient is None else part.copy_(flat(gradient)).abs_().mul_(unscale)
        self._buffer.push()
        self._buffer.ready()
        with session.tracer.span("maximum"):
            for start, length in cut(len(self._buffer.mpi), self._buffer.item.itemsize):
                part = self._buffer.mpi[start : start + length]
                request = session.group.comm.Iallreduce(MPI.IN_PLACE, part, op=MPI.MAX)
                session.wait(session.post(request, self, part))
        self._buffer.pull()
        return {segment.first_word: part for segment, part in zip(self._segments, parts, strict=True)}
