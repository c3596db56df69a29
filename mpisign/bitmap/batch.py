"""Many CUDA tensors packed or unpacked by one launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from mpisign.bitmap import kernels
from mpisign.bitmap.host import words_for
from mpisign.bitmap.kernels import address, flag

__all__ = ["Batch"]

Tensor = torch.Tensor


class _Launch(NamedTuple):
    """As many tensors as one launch takes: which, their addresses and types, and what each block does."""

    group: slice
    tensors: npt.NDArray[np.void]  # (1,) kernels.TENSORS
    blocks: int
    jobs: Tensor  # the bytes of (blocks,) kernels.JOB


class Batch:
    """Tensors of fixed sizes and places on the wire, packed or unpacked by one launch, however many and small.

    What does not change from step to step is put on the device when this is made. The tensors' addresses and types
    travel in the launch itself, so that a call copies nothing, allocates nothing and waits for nothing (beyond
    448 tensors it launches again). One object serves one thread at a time.

    Args:
        elements: how many each tensor has.
        words: their bitmaps, (ceil(elements/32),) words each. They are kept, and must stay where they are.
        nonzeros: their second planes, or None.
        first_words: the global numbers of their first words, from which the zeros' coins are drawn; default 0.
    """

    def __init__(
        self,
        elements: Sequence[int],
        words: Sequence[Tensor],
        *,
        nonzeros: Sequence[Tensor] | None = None,
        first_words: Sequence[int] | None = None,
    ) -> None:
        absent: list[None] = [None] * len(words)
        starts = first_words if first_words is not None else [0] * len(words)
        segments = list(zip(elements, words, nonzeros if nonzeros is not None else absent, starts, strict=True))
        self._elements = [n for n, *_ in segments]
        self._segments = segments  # which keeps the bitmaps' memory
        self._device = words[0].device if words else torch.device("cpu")
        self._finite = flag(self._device)
        self._addresses, self._formats = np.zeros(len(segments), np.uint64), np.zeros(len(segments), np.uint8)
        self._launches = []
        for lo in range(0, len(segments), kernels.TENSOR_CAPACITY):
            group = slice(lo, lo + kernels.TENSOR_CAPACITY)
            jobs = np.concatenate([_jobs(i, *segment) for i, segment in enumerate(segments[group])])
            on_device = torch.from_numpy(jobs.view(np.uint8)).to(self._device)
            self._launches.append(_Launch(group, np.zeros(1, kernels.TENSORS), jobs.size, on_device))

    def pack(
        self, values: Sequence[Tensor | None], *, zeros: str = "coin", key: int = 0, finite: Tensor | None = None
    ) -> Tensor:
        """Pack each of ``values`` as :func:`mpisign.bitmap.cuda.pack` does.

        Args:
            values: tensors of the batch's sizes and of any of the types; the words of those that are None stay. That
                they are dense is not checked.

        Returns:
            ``finite``. If none was given it is one of this object's, and holds until its next :meth:`pack`.
        """
        if finite is None:
            finite = self._finite.fill_(True)
        arguments = [np.uint64(key), np.uint32(kernels.ZEROS[zeros]), np.uint64(finite.data_ptr())]
        self._launch("pack_many", values, arguments)
        return finite

    def unpack(self, outs: Sequence[Tensor | None]) -> None:
        """Unpack into each of ``outs`` as :func:`mpisign.bitmap.cuda.unpack` does; those that are None are left out."""
        self._launch("unpack_many", outs, [])

    def _launch(self, name: str, tensors: Sequence[Tensor | None], arguments: list[Any]) -> None:
        # A model on a GPU has hundreds of tensors, so each of these lines is one loop in C or a short one in Python.
        present = [tensor for tensor in tensors if tensor is not None]
        places: slice | list[int] = slice(None)
        expected = self._elements
        if len(tensors) != len(expected):
            raise ValueError(f"{len(tensors)} tensors were given to a batch of {len(expected)}")
        if len(present) < len(tensors):
            places = [place for place, tensor in enumerate(tensors) if tensor is not None]
            expected = [expected[place] for place in places]
        elements = list(map(Tensor.numel, present))
        if elements != expected:
            given, wanted = next((n, m) for n, m in zip(elements, expected, strict=True) if n != m)
            raise ValueError(f"a tensor of {given} elements stands where the batch has {wanted}")
        self._addresses.fill(0)
        self._addresses[places] = list(map(Tensor.data_ptr, present))
        self._formats[places] = [kernels.FORMATS[tensor.dtype] for tensor in present]
        for group, by_value, blocks, jobs in self._launches:
            some = self._addresses[group]
            by_value["at"][0, : some.size] = some
            by_value["format"][0, : some.size] = self._formats[group]
            if blocks:
                kernels.launch(name, blocks, [by_value, np.uint64(jobs.data_ptr()), *arguments], self._device)


def _jobs(tensor: int, n: int, words: Tensor, nonzero: Tensor | None, first_word: int) -> npt.NDArray[np.void]:
    """A tensor of ``n`` elements cut into the work of blocks."""
    start = np.arange(0, n, kernels.JOB_ELEMENTS, dtype=np.uint64)
    jobs = np.zeros(start.size, kernels.JOB)
    jobs["words"] = address(words, words_for(n)) + start // 8
    if nonzero is not None:
        jobs["nonzero"] = address(nonzero, words_for(n)) + start // 8
    jobs["first_word"] = np.uint64(first_word) + start // 32
    jobs["start"] = start
    jobs["tensor"] = tensor
    jobs["elements"] = np.minimum(n - start, kernels.JOB_ELEMENTS)
    return jobs
