"""Tensors, with all that a call into C or a launch has to know of them: it is looked up once, however many ask."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mpisign.bitmap.kernels import FORMATS

__all__ = ["Located", "Places", "locate"]

# A model has hundreds of tensors, and to ask one anything from Python takes longer than to answer: so calls in C.
_dtype = attrgetter("dtype")


class Places:
    """Where tensors lie and of which form they are. Nobody changes it.

    Attributes:
        at: (n,) addresses; 0 where there is no tensor.
        elements: (n,) how many; -1 where there is none.
        formats: (n,) numbers of their types; 0 where there is none.
        complete: there is one everywhere.
    """

    def __init__(
        self, at: npt.NDArray[np.uint64], elements: npt.NDArray[np.int64], formats: npt.NDArray[np.uint8]
    ) -> None:
        self.at, self.elements, self.formats = at, elements, formats
        self.complete = bool((elements >= 0).all())
        self._chosen: dict[tuple[int, ...], Places] = {}

    def same_forms(self, other: Places | None) -> bool:
        """Whether there are as many elements of the same types."""
        if other is self:
            return True
        return (
            other is not None
            and np.array_equal(self.elements, other.elements)
            and np.array_equal(self.formats, other.formats)
        )

    def same(self, other: Places | None) -> bool:
        """Whether all of it is equal."""
        return other is self or (other is not None and np.array_equal(self.at, other.at) and self.same_forms(other))

    def moved(self, addresses: Sequence[int]) -> Places:
        """Of the same tensors, after they have gone elsewhere: those that there are have these addresses now."""
        if self.complete:
            return Places(np.array(addresses, np.uint64), self.elements, self.formats)
        at = np.zeros_like(self.at)
        at[self.elements >= 0] = addresses
        return Places(at, self.elements, self.formats)

    def chosen(self, numbers: tuple[int, ...]) -> Places:
        """Of some of them, in this order; the same object if it is asked again."""
        if numbers not in self._chosen:
            index = np.array(numbers, np.intp)
            self._chosen[numbers] = Places(self.at[index], self.elements[index], self.formats[index])
        return self._chosen[numbers]


class Located(list[Tensor | None]):
    """Tensors, or None, of which ``places`` is true as long as nobody moves one."""

    def __init__(self, tensors: Iterable[Tensor | None], places: Places) -> None:
        super().__init__(tensors)
        self.places = places

    def chosen(self, numbers: tuple[int, ...]) -> Located:
        """Some of them, in this order."""
        return Located(map(self.__getitem__, numbers), self.places.chosen(numbers))


def locate(tensors: Sequence[Tensor | None], formats: Mapping[torch.dtype, int] = FORMATS) -> Located:
    """Look at tensors, unless somebody has.

    Args:
        formats: the numbers of the types that they may be of. Raises KeyError for others.
    """
    if isinstance(tensors, Located):
        return tensors
    present = [tensor for tensor in tensors if tensor is not None]
    return Located(tensors, _places(tensors, present, formats))


def _places(tensors: Sequence[Tensor | None], present: Sequence[Tensor], formats: Mapping[torch.dtype, int]) -> Places:
    dtypes = list(map(_dtype, present))
    numbers = {dtype: formats[dtype] for dtype in set(dtypes)}
    at = np.array(list(map(Tensor.data_ptr, present)), np.uint64)
    elements = np.array(list(map(Tensor.numel, present)), np.int64)
    kinds = np.array([numbers[dtype] for dtype in dtypes], np.uint8)
    if len(present) == len(tensors):
        return Places(at, elements, kinds)
    there = np.array([tensor is not None for tensor in tensors], np.bool_)
    whole = Places(np.zeros(there.size, np.uint64), np.full(there.size, -1), np.zeros(there.size, np.uint8))
    whole.at[there], whole.elements[there], whole.formats[there] = at, elements, kinds
    return Places(whole.at, whole.elements, whole.formats)
