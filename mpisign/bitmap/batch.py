"""Many CUDA tensors packed or unpacked by one launch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mpisign.bitmap import kernels
from mpisign.bitmap.host import words_for
from mpisign.bitmap.kernels import NONE, address, first
from mpisign.bitmap.located import Places, locate

__all__ = ["Batch"]

Tensor = torch.Tensor


class _Table:
    """A batch's tensors as launches take them: by value, so many at a time. It is written only if they have moved."""

    def __init__(
        self,
        elements: Sequence[int],
        structure: np.dtype[np.void],
        formats: Mapping[torch.dtype, int] = kernels.FORMATS,
    ) -> None:
        self._elements, self._formats = np.array(elements, np.int64), formats
        self.capacity = structure["at"].shape[0]
        self._written: Places | None = None
        self._tables = [np.zeros(1, structure) for _ in range(0, len(elements), self.capacity)]
        self.by_value = [kernels.opaque(table) for table in self._tables]

    def write(self, tensors: Sequence[Tensor | None]) -> bool:
        """Returns whether they are news. Raises ValueError if they are not of the batch's number and sizes."""
        places = locate(tensors, self._formats).places
        if places.same(self._written):
            return False
        if len(tensors) != len(self._elements):
            raise ValueError(f"{len(tensors)} tensors were given to a batch of {len(self._elements)}")
        others = (places.elements != self._elements) & (places.elements >= 0)
        if others.any():
            given, wanted = places.elements[others][0], self._elements[others][0]
            raise ValueError(f"a tensor of {given} elements stands where the batch has {wanted}")
        for number, table in enumerate(self._tables):
            some = slice(number * self.capacity, min((number + 1) * self.capacity, len(tensors)))
            table["at"][0, : some.stop - some.start] = places.at[some]
            table["format"][0, : some.stop - some.start] = places.formats[some]
        self._written = places
        return True

    def suit(self, momenta: _Table) -> bool:
        """Whether all of these have a momentum, of a double if they are doubles."""
        double = kernels.FORMATS[torch.float64]
        return all(
            ((mine["at"] == 0) | (its["at"] != 0) & ((mine["format"] == double) == (its["format"] == double))).all()
            for mine, its in zip(self._tables, momenta._tables, strict=True)
        )


class Batch:
    """Tensors of fixed sizes and places on the wire, packed or unpacked by one launch, however many and small.

    What does not change from step to step is put on the device when this is made. The tensors' addresses and types
    travel in the launch itself, so that a call copies nothing, allocates nothing and waits for nothing (beyond
    448 tensors, or 224 with momenta, it launches again). One object serves one thread at a time.

    Args:
        elements: how many each tensor has.
        words: their bitmaps, (ceil(elements/32),) words each. They are kept, and must stay where they are.
        nonzeros: their second planes, or None; each may be None, too.
        first_words: the global numbers of their first words, from which the zeros' coins are drawn; default 0.
    """

    def __init__(
        self,
        elements: Sequence[int],
        words: Sequence[Tensor],
        *,
        nonzeros: Sequence[Tensor | None] | None = None,
        first_words: Sequence[int] | None = None,
    ) -> None:
        absent: list[None] = [None] * len(words)
        starts = first_words if first_words is not None else [0] * len(words)
        segments = list(zip(elements, words, nonzeros if nonzeros is not None else absent, starts, strict=True))
        self._segments = segments  # which keeps the bitmaps' memory
        self._device = words[0].device if words else torch.device("cpu")
        self._bad = first(self._device)
        jobs = [
            _jobs(place % kernels.TENSOR_CAPACITY, self._device, *segment) for place, segment in enumerate(segments)
        ]
        self._ends = [0, *np.cumsum([some.size for some in jobs]).tolist()]  # of each tensor's jobs
        all_jobs = np.concatenate([np.zeros(0, kernels.JOB), *jobs])
        self._jobs = torch.from_numpy(all_jobs.view(np.uint8)).to(self._device)
        self._values = _Table(elements, kernels.TENSORS)
        self._gradients, self._momenta = (_Table(elements, kernels.HALF_TENSORS) for _ in range(2))
        self._parameters = _Table(elements, kernels.HALF_TENSORS)
        self._moved = _Table([words_for(n) for n in elements], kernels.HALF_TENSORS, dict.fromkeys(kernels.WORDS, 0))
        self._suited = False  # the latest momenta to the latest gradients

    def pack(
        self,
        values: Sequence[Tensor | None],
        *,
        zeros: str = "coin",
        key: int = 0,
    ) -> Tensor:
        """Pack each of ``values`` as :func:`mpisign.bitmap.cuda.pack` does.

        Args:
            values: tensors of the batch's sizes and of any of the types; the words of those that are None stay. That
                they are dense is not checked.

        Returns:
            The place of the first that has a NaN or Inf, or :data:`~mpisign.bitmap.kernels.NONE`. It is one of this
            object's, and holds until its next packing.
        """
        self._values.write(values)
        bad = self._bad.fill_(NONE)
        self._launch("pack_many", [self._values], _packing(zeros, key, bad), based=True)
        return bad

    def pack_momentum(
        self,
        gradients: Sequence[Tensor | None],
        momenta: Sequence[Tensor | None],
        betas: tuple[float, float],
        *,
        unscale: float = 1.0,
        zeros: str = "coin",
        key: int = 0,
    ) -> Tensor:
        """Take each gradient g, times ``unscale``, into its momentum m, and pack the signs of what is sent of them.

        That is ``betas[0] m + (1 - betas[0]) g``; then ``m <- betas[1] m + (1 - betas[1]) g``, unless g is NaN or Inf.
        The arithmetic is that of ``torch.lerp``, in the momentum's precision.

        Args:
            gradients: as the values of :meth:`pack`.
            momenta: one for each gradient, of the same size, dense, float64 if the gradient is, else float32; changed
                in place.
            betas: in [0, 1).

        Returns:
            As :meth:`pack`.
        """
        tables, news = (self._gradients, self._momenta), not self._suited
        self._suited = False
        for table, tensors in zip(tables, (gradients, momenta), strict=True):
            news |= table.write(tensors)
        if news and not self._gradients.suit(self._momenta):
            raise ValueError("a gradient has no momentum, or one of another precision")
        self._suited = True
        bad = self._bad.fill_(NONE)
        rates = [np.float64(unscale), *(np.float64(1.0 - beta) for beta in betas)]
        self._launch("pack_momentum", tables, [*rates, *_packing(zeros, key, bad)], based=True)
        return bad

    def unpack(self, outs: Sequence[Tensor | None]) -> None:
        """Unpack into each of ``outs`` as :func:`mpisign.bitmap.cuda.unpack` does; those that are None are left out."""
        self._values.write(outs)
        self._launch("unpack_many", [self._values], [])

    def apply(
        self,
        parameters: Sequence[Tensor | None],
        rates: Sequence[float],
        decays: Sequence[float],
        moved: Sequence[Tensor | None],
    ) -> None:
        """Take a step of SGD on each parameter, as :meth:`mpisign.backends.backend.Bitmaps.apply`.

        It launches once for each pair of a rate and a decay.
        """
        self._moved.write(moved)
        pairs = list(zip(rates, decays, strict=True))
        for pair in dict.fromkeys(pairs):
            mine = [its if its == pair else None for its in pairs]
            self._parameters.write([None if it is None else p for it, p in zip(mine, parameters, strict=True)])
            numbers = [np.float64(-pair[0]), np.float64(pair[1])]
            self._launch("apply_many", [self._parameters, self._moved], numbers)

    def _launch(self, name: str, tables: Sequence[_Table], arguments: Sequence[Any], *, based: bool = False) -> None:
        """``based``: the kernel is told the number of the launch's first tensor, too."""
        capacity, tensors = tables[0].capacity, len(self._ends) - 1
        for number, by_value in enumerate(zip(*(table.by_value for table in tables), strict=True)):
            begin, end = self._ends[number * capacity], self._ends[min((number + 1) * capacity, tensors)]
            if begin < end:
                jobs = np.uint64(self._jobs.data_ptr() + begin * kernels.JOB.itemsize)
                base = [np.uint32(number * capacity)] if based else []
                kernels.launch(name, end - begin, [*by_value, jobs, *base, *arguments], self._device)


def _packing(zeros: str, key: int, bad: Tensor) -> list[Any]:
    return [np.uint64(key), np.uint32(kernels.ZEROS[zeros]), np.uint64(bad.data_ptr())]


def _jobs(
    tensor: int, device: torch.device, n: int, words: Tensor, nonzero: Tensor | None, first_word: int
) -> npt.NDArray[np.void]:
    """A tensor of ``n`` elements cut into the work of blocks."""
    start = np.arange(0, n, kernels.JOB_ELEMENTS, dtype=np.uint64)
    jobs = np.zeros(start.size, kernels.JOB)
    jobs["words"] = address(words, words_for(n), device) + start // 8
    if nonzero is not None:
        jobs["nonzero"] = address(nonzero, words_for(n), device) + start // 8
    jobs["first_word"] = np.uint64(first_word) + start // 32
    jobs["start"] = start
    jobs["tensor"] = tensor
    jobs["elements"] = np.minimum(n - start, kernels.JOB_ELEMENTS)
    return jobs
