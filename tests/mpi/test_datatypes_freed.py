"""MPI's datatypes live as long as the plan that has made them."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import pytest
import torch

import mpisign

from . import ballots
from .wrapped import give, wrap

if TYPE_CHECKING:
    from mpi4py import MPI

pytestmark = pytest.mark.mpi


def test_a_plan_frees_its_datatypes(comm: MPI.Comm) -> None:
    """They are replaced with it, here as a parameter is frozen, and the job goes on."""
    from mpi4py import MPI

    tensors = ballots.parameters((9, 64), (33,), (200,))
    optimizer = wrap(tensors, exchange="two_phase", zeros="abstain", ties="zero", bucket_cap_mb=1e-5)
    give(tensors, [torch.ones_like(t) for t in tensors])
    optimizer.step()
    types = [its for one in optimizer._plan.exchanges for its in one.types]
    assert len(types) >= 4
    assert all(its != MPI.DATATYPE_NULL for its in types)
    tensors[1].requires_grad_(False)
    optimizer.step()
    gc.collect()
    assert all(its == MPI.DATATYPE_NULL for its in types)
    optimizer.step()
    assert optimizer.report.voters == tuple(range(mpisign.size()))
