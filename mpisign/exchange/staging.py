"""The buffers that MPI reads and writes, and their way to and from a GPU: the one place where data is staged.

On the host a buffer is one piece of memory. On a GPU it is two: device memory, and a mirror in pinned host memory
that MPI is given; copies between them run on torch's current stream and are waited for by an event, never by
synchronising the device. With ``MPISIGN_GPU_AWARE_MPI=1`` MPI gets the device memory itself, as DLPack or by the CUDA
array interface.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mpisign.backends import backend_for

__all__ = ["Buffer", "Held", "gpu_aware"]

Held = tuple[int, int, npt.NDArray[Any]]
"""A voter, the item at which a part of its ballot begins, and that, (planes, k)."""


def gpu_aware() -> bool:
    """Whether MPI shall be given device pointers: ``MPISIGN_GPU_AWARE_MPI`` is set and not 0."""
    return os.environ.get("MPISIGN_GPU_AWARE_MPI", "0") not in ("", "0")


class Buffer:
    """A tensor that crosses MPI, zero at first.

    Args:
        staged: MPI shall get host memory in any case.

    Attributes:
        tensor: where this process computes.
        mpi: what MPI is given, flat: a NumPy array that shares the host memory, or the device tensor itself.
        item: NumPy's name of its type.
    """

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, *, staged: bool = False
    ) -> None:
        cuda = device.type == "cuda"
        self.tensor = torch.zeros(shape, dtype=dtype, device=device)
        self._mirror: torch.Tensor | None = None
        self._written = torch.cuda.Event() if cuda else None
        self.mpi: Any = self.tensor.view(-1)
        if not backend_for(device).staged:
            self.mpi = self.tensor.view(-1).numpy()
        elif staged or not gpu_aware():
            self._mirror = torch.zeros(shape, dtype=dtype, device="cpu", pin_memory=cuda)
            self.mpi = self._mirror.view(-1).numpy()
        self.item: np.dtype[Any] = torch.empty(0, dtype=dtype, device="cpu").numpy().dtype

    @property
    def mirrored(self) -> bool:
        """Whether MPI is given other memory than this process computes in."""
        return self._mirror is not None

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes

    def arrived(self) -> npt.NDArray[Any]:
        """What MPI has written, on the host, in the tensor's shape."""
        its: npt.NDArray[Any] = self.mpi.cpu().numpy() if isinstance(self.mpi, torch.Tensor) else self.mpi
        return its.reshape(self.tensor.shape)

    def push(self) -> None:
        """Begin to make what was computed visible to MPI."""
        if self._mirror is not None:
            self._mirror.copy_(self.tensor, non_blocking=True)
        if self._written is not None:
            self._written.record()

    def ready(self) -> None:
        """Wait until it is."""
        if self._written is not None:
            self._written.synchronize()

    def pull(self, without: int | None = None) -> None:
        """Make what MPI has received visible to what the current stream computes next.

        Args:
            without: leave out this row.
        """
        if self._mirror is None:
            return
        spans = [slice(None)] if without is None else [slice(without), slice(without + 1, None)]
        for span in spans:
            if len(its := self.tensor[span]):
                its.copy_(self._mirror[span], non_blocking=True)
