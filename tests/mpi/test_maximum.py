"""mpisign.exchange.maximum on real ranks: the largest magnitude that any of them has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import parts
import pytest
import rounds
import torch

if TYPE_CHECKING:
    from mpi4py import MPI

pytestmark = pytest.mark.mpi


@pytest.mark.parametrize("cap", [parts.ONE_BUCKET, parts.ONE_SEGMENT_A_BUCKET])
def test_the_largest_of_all_ranks_on_every_rank(comm: MPI.Comm, cap: float) -> None:
    """Each with a loss scale of its own, and rank 0 without some gradients, in the last step without any."""
    tensors = parts.parameters((3, 5, 7), (31,), (), (127,), dtypes=parts.DTYPES)
    its, over_ranks = rounds.maximum_of(tensors, cap)
    starts = parts.side(tensors, cap=cap).first_words()
    elements = sum(t.numel() for t in tensors)
    assert its.bytes_sent == 2 * (comm.size - 1) * 4 * elements // comm.size
    for step in range(3):
        absent: list[int] = [[], [1, 3], [0, 1, 2, 3]][step]
        everyones: list[list[Any]] = [parts.draw(tensors, step, rank) for rank in range(comm.size)]
        everyones[0] = [None if place in absent else g for place, g in enumerate(everyones[0])]
        mine = [None if g is None else g * (1.0 + comm.rank) for g in everyones[comm.rank]]
        bounds = over_ranks(mine, 1.0 / (1.0 + comm.rank))
        for place, (start, tensor) in enumerate(zip(starts, tensors, strict=True)):
            heard = [np.abs(parts.flat(sent[place])) for sent in everyones if sent[place] is not None]
            expected = np.max([np.zeros(tensor.numel()), *heard], axis=0)
            torch.testing.assert_close(bounds[start].double(), torch.from_numpy(expected), rtol=1e-6, atol=1e-6)
