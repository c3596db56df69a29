"""mpisign.exchange.staging on the host: one piece of memory, which MPI and torch share."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gpu_branch import gpu_branch

from mpisign.exchange.staging import Buffer, gpu_aware

HOST = torch.device("cpu")


@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize("dtype", [torch.int32, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(2, 5), (3, 1, 7), (0,), (1, 0)])
def test_what_is_computed_is_what_mpi_reads(shape: tuple[int, ...], dtype: torch.dtype, staged: bool) -> None:
    buffer = Buffer(shape, dtype, HOST, staged=staged)
    assert buffer.tensor.shape == shape
    assert buffer.tensor.dtype == dtype
    assert not buffer.tensor.any()
    assert isinstance(buffer.mpi, np.ndarray)
    assert buffer.nbytes == buffer.mpi.nbytes == buffer.tensor.numel() * dtype.itemsize
    buffer.tensor.fill_(3)
    buffer.push()
    buffer.ready()
    assert (buffer.mpi == 3).all()
    buffer.mpi[...] = 4
    buffer.pull()
    assert (buffer.tensor == 4).all()


def test_the_memory_never_moves() -> None:
    """MPI may be reading it, and views of it live in exchanges, encoders and decoders."""
    buffer = Buffer((2, 5), torch.int32, HOST)
    at = buffer.tensor.data_ptr()
    for _ in range(2):
        buffer.push()
        buffer.ready()
        buffer.pull()
        assert buffer.tensor.data_ptr() == buffer.mpi.ctypes.data == at


@pytest.mark.parametrize(("ranks", "without"), [(3, 0), (3, 1), (3, 2), (1, 0), (2, None)])
def test_a_row_that_is_left_out_stays_as_it_is(ranks: int, without: int | None) -> None:
    with gpu_branch():
        buffer = Buffer((ranks, 2, 4), torch.int32, HOST)
    assert buffer.mirrored
    buffer.tensor.fill_(3)
    buffer.mpi[...] = 4
    buffer.pull(without)
    assert [row.unique().tolist() for row in buffer.tensor] == [[3] if row == without else [4] for row in range(ranks)]


@pytest.mark.parametrize(("value", "aware"), [(None, False), ("", False), ("0", False), ("1", True), ("yes", True)])
def test_mpi_gets_device_pointers_on_request(value: str | None, aware: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MPISIGN_GPU_AWARE_MPI", raising=False)
    if value is not None:
        monkeypatch.setenv("MPISIGN_GPU_AWARE_MPI", value)
    assert gpu_aware() == aware
