"""The host's memory, by C where it was compiled, else by NumPy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mpisign.backends import host
from mpisign.backends.backend import Bitmaps
from mpisign.backends.host import Host
from mpisign.bitmap import native
from mpisign.bitmap.host import check_counts, check_moved, check_voters, words_for
from mpisign.bitmap.kernels import FORMATS, TIES, ZEROS, address
from mpisign.bitmap.located import Places, locate

__all__ = ["BACKEND", "Native"]

HOST = torch.device("cpu")


def _address(bitmap: Tensor | None, k: int) -> int:
    return int(address(bitmap, k, HOST))


def _addresses(bitmaps: Sequence[Tensor | None], k: int) -> npt.NDArray[np.uint64]:
    return np.array([address(bitmap, k, HOST) for bitmap in bitmaps], np.uint64)


def _at(array: npt.NDArray[Any]) -> int:
    return array.ctypes.data


class _Given:
    """Tensors of fixed sizes, as C takes them: where they are, and of which types; 0 for one that is not there.

    Attributes:
        places: of those that were written last.
    """

    def __init__(self, elements: Sequence[int]) -> None:
        self._elements = np.array(elements, np.int64)
        self.places: Places | None = None
        self.addresses = self.formats = 0

    def write(self, tensors: Sequence[Tensor | None]) -> Places:
        """Raises ValueError if they are not of the sizes: C would write beside them."""
        places, before = locate(tensors).places, self.places
        if places is before:
            return places
        if not places.same_forms(before):
            if len(tensors) != len(self._elements):
                raise ValueError(f"{len(tensors)} tensors were given where there are {len(self._elements)}")
            others = (places.elements != self._elements) & (places.elements >= 0)
            if others.any():
                given, wanted = places.elements[others][0], self._elements[others][0]
                raise ValueError(f"a tensor of {given} elements stands where there are {wanted}")
        self.places, self.addresses, self.formats = places, _at(places.at), _at(places.formats)
        return places


def _suit(values: Places, averages: Places) -> bool:
    """Whether each value has an average, of a double if it is a double."""
    double = FORMATS[torch.float64]
    fits = (averages.elements >= 0) & ((values.formats == double) == (averages.formats == double))
    return bool((fits | (values.elements < 0)).all())


class NativeBitmaps(Bitmaps):
    """See :class:`mpisign.backends.backend.Bitmaps`."""

    def __init__(
        self,
        functions: native.Functions,
        elements: Sequence[int],
        words: Sequence[Tensor],
        nonzeros: Sequence[Tensor | None],
        starts: Sequence[int],
    ) -> None:
        self._c = functions
        pieces = np.zeros(len(elements) + 1, np.uint64)
        np.cumsum([-(-n // native.PIECE) for n in elements], out=pieces[1:])
        sizes = [words_for(n) for n in elements]
        rows, others = (
            np.array([address(plane, k, HOST) for plane, k in zip(planes, sizes, strict=True)], np.uint64)
            for planes in (words, nonzeros)
        )
        fixed = [pieces, np.array(elements, np.uint64), rows, others, np.array(starts, np.uint64)]
        self._kept = fixed, list(words), list(nonzeros)  # C has their addresses
        at, counts, self._words, self._nonzeros, self._starts = map(_at, fixed)
        self._tensors = len(elements), at, counts
        self._sizes = sizes
        self._values, self._averages, self._before = _Given(elements), _Given(elements), _Given(elements)
        self._suited: tuple[Places, Places] | None = None  # values and averages that go together

    def pack(self, values: Sequence[Tensor | None], *, zeros: str, key: int) -> int:
        self._values.write(values)
        first: int = self._c.pack(*self._tensors, self._values.addresses, self._values.formats, *self._to(zeros, key))
        return first

    def pack_average(
        self,
        gradients: Sequence[Tensor | None],
        averages: Sequence[Tensor | None],
        betas: tuple[float, float],
        *,
        unscale: float,
        zeros: str,
        key: int,
        before: Sequence[Tensor | None] | None = None,
    ) -> int:
        pair = self._values.write(gradients), self._averages.write(averages)
        if self._suited is None or not all(map(Places.same_forms, pair, self._suited)):
            if not _suit(*pair):
                raise ValueError("a gradient has no average, or one of another precision")
            self._suited = pair
        if before is not None and not self._before.write(before).same_forms(pair[1]):
            raise ValueError("an average comes from one of another form")
        first: int = self._c.pack_average(
            *self._tensors,
            self._values.addresses,
            self._values.formats,
            self._averages.addresses,
            None if before is None else self._before.addresses,
            unscale,
            1.0 - betas[0],
            1.0 - betas[1],
            *self._to(zeros, key),
        )
        return first

    def _to(self, zeros: str, key: int) -> tuple[int, ...]:
        return self._words, self._nonzeros, self._starts, ZEROS[zeros], key, native.threads()

    def unpack(self, outs: Sequence[Tensor | None]) -> None:
        self._values.write(outs)
        given = self._values
        self._c.unpack(*self._tensors, self._words, self._nonzeros, given.addresses, given.formats, native.threads())

    def apply(
        self,
        parameters: Sequence[Tensor | None],
        rates: Sequence[float],
        decays: Sequence[float],
        moved: Sequence[Tensor | None],
    ) -> None:
        self._values.write(parameters)
        given, nonzeros = self._values, self._nonzeros
        if any(plane is not None for plane in moved):
            every = zip(moved, self._kept[2], self._sizes, strict=True)
            planes = np.array([address(own if its is None else its, k, HOST) for its, own, k in every], np.uint64)
            nonzeros = _at(planes)
        numbers = np.array([rates, decays], np.float64)
        self._c.apply(
            *self._tensors,
            self._words,
            nonzeros,
            given.addresses,
            given.formats,
            _at(numbers[0]),
            _at(numbers[1]),
            native.threads(),
        )


class Native(Host):
    """See :class:`mpisign.backends.backend.Backend`. What C does not do faster, NumPy and torch do."""

    name = "native"

    def __init__(self, functions: native.Functions) -> None:
        self._c = functions

    def bitmaps(
        self, elements: Sequence[int], words: Sequence[Tensor], nonzeros: Sequence[Tensor | None], starts: Sequence[int]
    ) -> Bitmaps:
        return NativeBitmaps(self._c, elements, words, nonzeros, starts)

    def pack(
        self,
        values: Tensor,
        words: Tensor,
        *,
        zeros: str = "coin",
        key: int = 0,
        first_word: int = 0,
        nonzero: Tensor | None = None,
    ) -> bool:
        alone = NativeBitmaps(self._c, [values.numel()], [words], [nonzero], [first_word])
        return alone.pack([values], zeros=zeros, key=key) > 0

    def unpack(self, words: Tensor, out: Tensor, *, nonzero: Tensor | None = None) -> None:
        NativeBitmaps(self._c, [out.numel()], [words], [nonzero], [0]).unpack([out])

    def majority(
        self,
        ballots: Sequence[Tensor],
        out: Tensor,
        *,
        ties: str = "coin",
        key: int = 0,
        first_word: int = 0,
        nonzeros: Sequence[Tensor] | None = None,
        out_nonzero: Tensor | None = None,
        tied: Tensor | None = None,
    ) -> int:
        check_moved(out_nonzero, ties, abstentions=nonzeros is not None)
        k = out.numel()
        signs = _addresses(ballots, k)
        spoken = None if nonzeros is None else _addresses(nonzeros, k)
        found: int = self._c.majority(
            len(ballots),
            _at(signs),
            0 if spoken is None else _at(spoken),
            k,
            _address(out, k),
            _address(out_nonzero, k),
            TIES[ties],
            key,
            first_word,
            native.threads(),
        )
        return found

    def count(self, ballots: Sequence[Tensor], planes: Tensor) -> None:
        if len(planes) < len(ballots).bit_length():
            raise ValueError(f"{len(planes)} planes cannot count {len(ballots)} ballots")
        self._count(len(ballots), 1, list(ballots), planes)

    def add_counts(self, counts: Sequence[Tensor], planes: Tensor) -> None:
        check_counts([len(count) for count in counts], len(planes))
        self._count(len(counts), len(counts[0]), [plane for count in counts for plane in count], planes)

    def _count(self, counts: int, per: int, rows: Sequence[Tensor], planes: Tensor) -> None:
        k = planes.shape[1]
        at = _addresses(rows, k)
        self._c.count(
            counts,
            per,
            _at(at),
            k,
            int(_addresses(list(planes), k)[0]),
            planes.stride(0),
            len(planes),
            native.threads(),
        )

    def decide_counts(
        self,
        yes: Tensor,
        voted: int | Tensor,
        out: Tensor,
        *,
        ties: str = "coin",
        key: int = 0,
        first_word: int = 0,
        out_nonzero: Tensor | None = None,
        tied: Tensor | None = None,
    ) -> int:
        check_moved(out_nonzero, ties, abstentions=not isinstance(voted, int))
        check_voters(len(yes), voted)
        everywhere, counted = (voted, ()) if isinstance(voted, int) else (0, tuple(voted))
        k = out.numel()
        rows = _addresses([*yes, *counted], k)
        found: int = self._c.decide_counts(
            len(yes),
            len(counted),
            everywhere,
            _at(rows),
            k,
            _address(out, k),
            _address(out_nonzero, k),
            TIES[ties],
            key,
            first_word,
            native.threads(),
        )
        return found


_FUNCTIONS = native.library()
BACKEND: Host = host.BACKEND if _FUNCTIONS is None else Native(_FUNCTIONS)
