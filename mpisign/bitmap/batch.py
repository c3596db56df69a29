"""Many CUDA tensors packed or unpacked by one launch."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from mpisign.bitmap import kernels
from mpisign.bitmap.host import words_for
from mpisign.bitmap.kernels import address, flag

__all__ = ["Batch"]

Tensor = torch.Tensor
_dtype = attrgetter("dtype")


class _Launch(NamedTuple):
    """As many tensors as one launch takes: which, and what each block does."""

    group: slice
    blocks: int
    jobs: Tensor  # the bytes of (blocks,) kernels.JOB


class _Addresses:
    """Where a batch's tensors lie, and of which types they are, as launches take it: by value.

    A model has hundreds of tensors and they seldom move, so each line here is one loop in C, and what was found is
    written down only if it is news.
    """

    def __init__(self, elements: Sequence[int], groups: Sequence[slice]) -> None:
        self._elements, self._groups = list(elements), groups
        self._seen: tuple[object, ...] = ()
        self.by_value = [np.zeros(1, kernels.TENSORS) for _ in groups]

    def fill(self, tensors: Sequence[Tensor | None]) -> None:
        """Raises ValueError if there are too few or many, or one has another size than the batch's."""
        if len(tensors) != len(self._elements):
            raise ValueError(f"{len(tensors)} tensors were given to a batch of {len(self._elements)}")
        present = [tensor for tensor in tensors if tensor is not None]
        places, expected = None, self._elements
        if len(present) < len(tensors):
            places = [place for place, tensor in enumerate(tensors) if tensor is not None]
            expected = [expected[place] for place in places]
        sizes = list(map(Tensor.numel, present))
        if sizes != expected:
            given, wanted = next((n, m) for n, m in zip(sizes, expected, strict=True) if n != m)
            raise ValueError(f"a tensor of {given} elements stands where the batch has {wanted}")
        seen = (places, list(map(Tensor.data_ptr, present)), list(map(_dtype, present)))
        if seen == self._seen:
            return
        at, formats = np.zeros((2, len(tensors)), np.uint64)
        where = slice(None) if places is None else places
        at[where], formats[where] = seen[1], [kernels.FORMATS[tensor.dtype] for tensor in present]
        for group, by_value in zip(self._groups, self.by_value, strict=True):
            by_value["at"][0, : at[group].size], by_value["format"][0, : at[group].size] = at[group], formats[group]
        self._seen = seen


class Batch:
    """Tensors of fixed sizes and places on the wire, packed or unpacked by one launch, however many and small.

    What does not change from step to step is put on the device when this is made. The tensors' addresses and types
    travel in the launch itself, so that a call copies nothing, allocates nothing and waits for nothing (beyond
    224 tensors it launches again). One object serves one thread at a time.

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
        self._segments = segments  # which keeps the bitmaps' memory
        self._device = words[0].device if words else torch.device("cpu")
        self._finite = flag(self._device)
        self._launches = []
        for lo in range(0, len(segments), kernels.TENSOR_CAPACITY):
            group = slice(lo, lo + kernels.TENSOR_CAPACITY)
            jobs = np.concatenate([_jobs(i, *segment) for i, segment in enumerate(segments[group])])
            on_device = torch.from_numpy(jobs.view(np.uint8)).to(self._device)
            self._launches.append(_Launch(group, jobs.size, on_device))
        groups = [launch.group for launch in self._launches]
        self._values, self._momenta = (_Addresses(elements, groups) for _ in range(2))

    def pack(
        self, values: Sequence[Tensor | None], *, zeros: str = "coin", key: int = 0, finite: Tensor | None = None
    ) -> Tensor:
        """Pack each of ``values`` as :func:`mpisign.bitmap.cuda.pack` does.

        Args:
            values: tensors of the batch's sizes and of any of the types; the words of those that are None stay. That
                they are dense is not checked.

        Returns:
            ``finite``. If none was given it is one of this object's, and holds until its next packing.
        """
        self._values.fill(values)
        finite = self._finite.fill_(True) if finite is None else finite
        self._launch("pack_many", [self._values], _packing(zeros, key, finite))
        return finite

    def pack_momentum(
        self,
        gradients: Sequence[Tensor | None],
        momenta: Sequence[Tensor | None],
        betas: tuple[float, float],
        *,
        unscale: float = 1.0,
        zeros: str = "coin",
        key: int = 0,
        finite: Tensor | None = None,
    ) -> Tensor:
        """Take each gradient g, times ``unscale``, into its momentum m, and pack the signs of what is sent of them.

        That is ``betas[0] m + (1 - betas[0]) g``; then ``m <- betas[1] m + (1 - betas[1]) g``, unless g is NaN or Inf.
        The arithmetic is that of ``torch.lerp``, in the momentum's precision.

        Args:
            gradients: as the values of :meth:`pack`.
            momenta: one for each gradient, of the same size, dense, float32 or float64; changed in place.
            betas: in [0, 1).

        Returns:
            As :meth:`pack`.
        """
        if any(g is not None and m is None for g, m in zip(gradients, momenta, strict=True)):
            raise ValueError("a gradient has no momentum")
        self._values.fill(gradients)
        self._momenta.fill(momenta)
        finite = self._finite.fill_(True) if finite is None else finite
        rates = [np.float64(unscale), *(np.float64(1.0 - beta) for beta in betas)]
        self._launch("pack_momentum", [self._values, self._momenta], [*rates, *_packing(zeros, key, finite)])
        return finite

    def unpack(self, outs: Sequence[Tensor | None]) -> None:
        """Unpack into each of ``outs`` as :func:`mpisign.bitmap.cuda.unpack` does; those that are None are left out."""
        self._values.fill(outs)
        self._launch("unpack_many", [self._values], [])

    def _launch(self, name: str, tensors: Sequence[_Addresses], arguments: Sequence[Any]) -> None:
        for number, (_, blocks, jobs) in enumerate(self._launches):
            if blocks:
                by_value = [addresses.by_value[number] for addresses in tensors]
                kernels.launch(name, blocks, [*by_value, np.uint64(jobs.data_ptr()), *arguments], self._device)


def _packing(zeros: str, key: int, finite: Tensor) -> list[Any]:
    return [np.uint64(key), np.uint32(kernels.ZEROS[zeros]), np.uint64(finite.data_ptr())]


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
