"""The host's memory, by NumPy: the oracle."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mpisign.backends.backend import Backend, Bitmaps, RandomNumbers
from mpisign.bitmap import host
from mpisign.bitmap.coin import coin_words
from mpisign.bitmap.tensors import flat, format_of, raw_bits

__all__ = ["BACKEND", "Host", "as_words"]

CACHE_LINE = 64  # bytes
COINS = 1 << 16  # drawn at once: larger arrays would come fresh from the system each time
PIECE = 1 << 19  # elements averaged and packed at once: few calls, and still near a core's cache
NUMPY_DTYPES = {torch.float32: np.float32, torch.float64: np.float64}

Words = npt.NDArray[np.uint32]


def as_words(tensor: Tensor) -> Words:
    """A word tensor as NumPy's uint32, sharing its memory."""
    words: Words = tensor.numpy().view(np.uint32)
    return words


class HostBitmaps(Bitmaps):
    """See :class:`mpisign.backends.backend.Bitmaps`."""

    def __init__(
        self, elements: Sequence[int], words: Sequence[Tensor], nonzeros: Sequence[Tensor | None], starts: Sequence[int]
    ) -> None:
        pairs = zip(words, nonzeros, strict=True)
        planes = [(as_words(mine), None if its is None else as_words(its)) for mine, its in pairs]
        self._places = list(zip(elements, planes, starts, strict=True))
        self._most = min(PIECE, max(elements, default=0))
        self._scratches: dict[tuple[str, torch.dtype], Tensor] = {}

    def pack(self, values: Sequence[Tensor | None], *, zeros: str, key: int) -> int:
        first = len(self._places)
        for place, (tensor, (_, (words, nonzero), start)) in enumerate(zip(values, self._places, strict=True)):
            if tensor is None:
                continue
            fmt = format_of(tensor.dtype)
            finite = host.pack(
                raw_bits(flat(tensor)), fmt, words, zeros=zeros, key=key, first_word=start, nonzero=nonzero
            )
            if not finite and place < first:
                first = place
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
        first = len(self._places)
        for place, (gradient, average) in enumerate(zip(gradients, averages, strict=True)):
            if gradient is None:
                continue
            assert average is not None
            former = None if before is None else before[place]
            elements, (words, nonzero), start = self._places[place]
            whole, fmt = flat(gradient), format_of(average.dtype)
            for lo in range(0, elements, PIECE):
                g, m = whole, average
                if elements > PIECE:
                    g, m = whole[lo : lo + PIECE], average[lo : lo + PIECE]
                if former is not None:
                    m.copy_(former[lo : lo + PIECE])
                span = slice(lo // 32, lo // 32 + host.words_for(g.numel()))
                sent, finite = self._average(g, m, betas, unscale)
                finite &= host.pack(
                    raw_bits(sent),
                    fmt,
                    words[span],
                    zeros=zeros,
                    key=key,
                    first_word=start + span.start,
                    nonzero=None if nonzero is None else nonzero[span],
                )
                if not finite and place < first:
                    first = place
        return first

    def _average(
        self, gradient: Tensor, average: Tensor, betas: tuple[float, float], unscale: float
    ) -> tuple[Tensor, bool]:
        """What is sent; the average has taken in what is finite of the gradient. And whether all of that was."""
        if gradient.dtype != average.dtype or unscale != 1.0:
            gradient = self._scratch("gradient", average.dtype)[: gradient.numel()].copy_(gradient)
            if unscale != 1.0:
                gradient.mul_(unscale)
        finite = host.all_finite(raw_bits(gradient), format_of(gradient.dtype))
        kept = bad = None
        if not finite:
            bad = ~torch.isfinite(gradient)
            kept = average[bad]
        if betas[0] == betas[1]:
            sent = average.lerp_(gradient, 1.0 - betas[0])
        else:
            scratch = self._scratch("sent", average.dtype)[: gradient.numel()]
            sent = torch.lerp(average, gradient, 1.0 - betas[0], out=scratch)
            average.lerp_(gradient, 1.0 - betas[1])
        if bad is not None and kept is not None:
            average[bad] = kept
        return sent, finite

    def _scratch(self, purpose: str, dtype: torch.dtype) -> Tensor:
        if (purpose, dtype) not in self._scratches:
            self._scratches[purpose, dtype] = torch.empty(self._most, dtype=dtype, device="cpu")
        return self._scratches[purpose, dtype]

    def unpack(self, outs: Sequence[Tensor | None]) -> None:
        for out, (_, (words, nonzero), _) in zip(outs, self._places, strict=True):
            if out is not None:
                host.unpack(words, format_of(out.dtype), raw_bits(flat(out)), nonzero=nonzero)

    def apply(
        self,
        parameters: Sequence[Tensor | None],
        rates: Sequence[float],
        decays: Sequence[float],
        moved: Sequence[Tensor | None],
    ) -> None:
        for parameter, rate, decay, its, place in zip(parameters, rates, decays, moved, self._places, strict=True):
            if parameter is None:
                continue
            elements, (words, nonzero), _ = place
            nonzero = nonzero if its is None else as_words(its)
            for lo in range(0, elements, PIECE):
                p = flat(parameter)[lo : lo + PIECE]
                span = slice(lo // 32, lo // 32 + host.words_for(p.numel()))
                signs = self._scratch("signs", p.dtype)[: p.numel()]
                mask = None if nonzero is None else nonzero[span]
                host.unpack(words[span], format_of(p.dtype), raw_bits(signs), nonzero=mask)
                if decay != 0:
                    signs.add_(p, alpha=decay)
                p.add_(signs, alpha=-rate)


class HostRandomNumbers(RandomNumbers):
    """See :class:`mpisign.backends.backend.RandomNumbers`."""

    def __init__(self, key: int, private: bool) -> None:
        self._key, self._private, self._drawn = key, private, 0

    @functools.cached_property
    def _generator(self) -> torch.Generator:
        return torch.Generator("cpu").manual_seed(self._key % 2**63)

    @functools.cached_property
    def _philox(self) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=self._key))

    def normal(self, out: Tensor) -> Tensor:
        if not self._private:  # torch's generator is faster, and uses 32 bits of the key
            return out.normal_(generator=self._generator)
        values = out.numpy()
        self._philox.standard_normal(out=values, dtype=values.dtype)
        return out

    def uniform(self, out: Tensor, bound: float) -> Tensor:
        """Of 32 coins each, at half of torch's price."""
        for lo in range(0, out.numel(), COINS):
            part = out[lo : lo + COINS]
            coins = coin_words(self._key, self._drawn, part.numel()).view(np.int32)
            self._drawn += part.numel()
            part.copy_(torch.from_numpy(coins)).mul_(bound / 2**31)
        return out


class Host(Backend):
    """See :class:`mpisign.backends.backend.Backend`."""

    name = "host"
    cache = 1 << 18
    rows = 1 << 15
    work = 1 << 19
    sample = 0.01

    def bitmaps(
        self, elements: Sequence[int], words: Sequence[Tensor], nonzeros: Sequence[Tensor | None], starts: Sequence[int]
    ) -> Bitmaps:
        return HostBitmaps(elements, words, nonzeros, starts)

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
        return host.pack(
            raw_bits(values),
            format_of(values.dtype),
            as_words(words),
            zeros=zeros,
            key=key,
            first_word=first_word,
            nonzero=None if nonzero is None else as_words(nonzero),
        )

    def unpack(self, words: Tensor, out: Tensor, *, nonzero: Tensor | None = None) -> None:
        host.unpack(
            as_words(words), format_of(out.dtype), raw_bits(out), nonzero=None if nonzero is None else as_words(nonzero)
        )

    def all_finite(self, values: Tensor) -> bool:
        return host.all_finite(raw_bits(values), format_of(values.dtype))

    def first_bad(self, values: Sequence[Tensor | None]) -> int:
        bad = (place for place, value in enumerate(values) if value is not None and not self.all_finite(flat(value)))
        return next(bad, len(values))

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
        return host.majority(
            [as_words(ballot) for ballot in ballots],
            as_words(out),
            ties=ties,
            key=key,
            first_word=first_word,
            nonzeros=None if nonzeros is None else [as_words(plane) for plane in nonzeros],
            out_nonzero=None if out_nonzero is None else as_words(out_nonzero),
        )

    def any_zero(self, words: Tensor) -> bool:
        return not as_words(words).all()

    def zero_words(self, words: Tensor, spans: Sequence[tuple[int, int]]) -> list[bool]:
        its = as_words(words)
        return [not its[start:stop].all() for start, stop in spans]

    def count(self, ballots: Sequence[Tensor], planes: Tensor) -> None:
        host.count([as_words(ballot) for ballot in ballots], as_words(planes))

    def add_counts(self, counts: Sequence[Tensor], planes: Tensor) -> None:
        host.add_counts([as_words(count) for count in counts], as_words(planes))

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
        return host.decide_counts(
            as_words(yes),
            voted if isinstance(voted, int) else as_words(voted),
            as_words(out),
            ties=ties,
            key=key,
            first_word=first_word,
            out_nonzero=None if out_nonzero is None else as_words(out_nonzero),
        )

    def agreement(
        self,
        ballot: Tensor,
        decision: Tensor,
        elements: int,
        nonzero: Tensor | None = None,
        moved: Tensor | None = None,
    ) -> tuple[int, int]:
        planes = [None if plane is None else as_words(plane) for plane in (nonzero, moved)]
        return host.agreement(as_words(ballot), as_words(decision), elements, *planes)

    def zeros(self, elements: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        # NumPy asks the system for huge pages where torch does not; torch begins where a cache line does.
        size = elements * dtype.itemsize
        raw = np.zeros(size + CACHE_LINE, np.uint8)
        begin = -raw.ctypes.data % CACHE_LINE
        return torch.from_numpy(raw[begin : begin + size].view(NUMPY_DTYPES[dtype]))

    def random(self, key: int, device: torch.device, *, private: bool) -> HostRandomNumbers:
        return HostRandomNumbers(key, private)

    def number(self, value: Tensor) -> float:
        return value.item()

    def total(self, values: Tensor) -> float:
        # Not by torch, whose sums depend on the number of threads and the processor.
        numbers = (values if values.dtype in NUMPY_DTYPES else values.float()).numpy()
        with np.errstate(over="ignore", invalid="ignore"):
            quick = float(numbers.sum())
            return quick if math.isfinite(quick) else float(numbers.sum(dtype=np.float64))

    def magnitudes(self, values: Tensor) -> Tensor:
        rows, n = values.shape
        width = max(1, min(n, self.cache))
        sums = np.zeros(rows)
        with np.errstate(over="ignore", invalid="ignore"):
            for at in range(0, rows, max(1, self.cache // width)):
                block = values[at : at + max(1, self.cache // width)]
                for lo in range(0, n, width):
                    part = block[:, lo : lo + width]
                    numbers = (part if part.dtype in NUMPY_DTYPES else part.float()).numpy()
                    sums[at : at + len(block)] += np.abs(numbers).sum(axis=1, dtype=np.float64)
        return torch.from_numpy(sums)

    def norm(self, values: Sequence[Tensor]) -> Tensor:
        squares = (np.square(v[span].double().numpy()) for v in values for span in self.blocks(v.numel()))
        with np.errstate(over="ignore", invalid="ignore"):
            total = sum(float(square.sum()) for square in squares)
        return torch.tensor(math.sqrt(total), dtype=torch.float64, device="cpu")

    def at_least(self, values: Tensor, threshold: Tensor) -> Tensor:
        # Without the sign, raw bits are in the order of the magnitudes, and those of NaN are above all.
        fmt, bits = format_of(values.dtype), raw_bits(values)
        least = raw_bits(threshold.view(1))[0]
        magnitude = np.empty(min(self.cache, bits.size), fmt.bits)
        found = []
        for span in self.blocks(values.numel()):
            block = np.bitwise_and(bits[span], fmt.sign - 1, out=magnitude[: span.stop - span.start])
            found.append(np.flatnonzero(block >= least) + span.start)
        return torch.from_numpy(np.concatenate(found))


BACKEND = Host()
