"""Who keeps the contract of bit arithmetic, in which memory, and on which data."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import oracle
import pytest
import shim
import torch

from mpisign import backends
from mpisign.backends import WORD, Bitmaps
from mpisign.bitmap import kernels, native
from mpisign.bitmap.host import FORMATS, FloatFormat
from mpisign.bitmap.kernels import JOB_ELEMENTS

Tensor = torch.Tensor
Array = npt.NDArray[Any]

ZEROS = ["coin", "abstain", "positive", "rows"]
TWO_PLANES = ("abstain", "rows")  # of those
TIES = ["coin", "zero", "positive"]
KEY = oracle.coin_key(3, 1, 4)
FULL = 0xFFFFFFFF
GUARD = 64  # bytes; more than the widest access, and a multiple of it

TILE = 1024  # what a warp takes at once
SMALL = [0, 1, 7, 31, 32, 33, 63, 64, 65, 1023, TILE, TILE + 1, 9 * TILE + 31]
LARGE = [JOB_ELEMENTS - 1, JOB_ELEMENTS, JOB_ELEMENTS + 1, 2 * JOB_ELEMENTS + TILE + 33]
OFFSETS = [0, 1, 2, 3]  # in elements, from 16-byte alignment
FIRST_WORDS = [0, 1, 2**31 - 1, 2**32 - 1, 2**33 + 1, 2**40]

formats = pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda fmt: fmt.name)
coins = functools.cache(oracle.coins)


# ---------------------------------------------------------------------------------------------- who is tested


def number(result: Any) -> Any:
    """0-d tensors, which a GPU gives, as the numbers that the host gives."""
    if isinstance(result, tuple):
        return tuple(number(one) for one in result)
    return result.item() if isinstance(result, Tensor) else result


class Subject:
    """A backend, or its bitmaps, on a device; every result is a number."""

    def __init__(self, tested: Any, device: torch.device) -> None:
        self._tested, self.device = tested, device
        self.kernels = getattr(tested, "name", "") == "cuda"

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            return number(getattr(self._tested, name)(*arguments, **options))

        return call

    def bitmaps(
        self,
        elements: Sequence[int],
        words: Sequence[Tensor],
        nonzeros: Sequence[Tensor | None] | None = None,
        starts: Sequence[int] | None = None,
    ) -> Subject:
        absent: list[Tensor | None] = [None] * len(words)
        made = self._tested.bitmaps(elements, words, nonzeros or absent, starts or [0] * len(words))
        assert isinstance(made, Bitmaps)
        return Subject(made, self.device)


needs_compiler = pytest.mark.skipif(not shim.COMPILER, reason="needs a C++ compiler")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
needs_native = pytest.mark.skipif(native.library() is None, reason=f"no compiled library: {native.absence()}")
GENERATIONS = {"native": 9, "native-avx2": 1, "native-baseline": 0}
NATIVE = [
    pytest.param(name, marks=[needs_native] if name == "native" else [needs_native, pytest.mark.long])
    for name in GENERATIONS
]
DEVICES = [pytest.param("shim", marks=needs_compiler), pytest.param("cuda", marks=needs_gpu)]


def make(name: str, monkeypatch: pytest.MonkeyPatch) -> Subject:
    """As the library chooses it. The shim's is that of CUDA tensors, for those of the CPU."""
    if name == "host":
        monkeypatch.setitem(backends.BACKENDS, "cpu", "mpisign.backends.host")
    if name in GENERATIONS:
        native.choose(GENERATIONS[name])
    if name == "shim":
        monkeypatch.setattr(kernels, "launch", shim.launch)
        monkeypatch.setitem(backends.BACKENDS, "cpu", backends.BACKENDS["cuda"])
    device = torch.device("cuda", 0) if name == "cuda" else torch.device("cpu")
    backend = backends.backend_for(device)
    assert backend.name == ("cuda" if name == "shim" else name.partition("-")[0])
    return Subject(backend, device)


class Memory:
    """Tensors on a device with NaNs (all ones, in every format) before and behind them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.all: list[tuple[Tensor, slice]] = []

    def put(self, values: Array, dtype: torch.dtype = WORD, offset: int = 0) -> Tensor:
        """The bits of ``values``, ``offset`` elements after 16-byte aligned memory."""
        start = GUARD + offset * values.itemsize
        inside = slice(start, start + values.nbytes)
        whole = torch.full((inside.stop + GUARD,), 0xFF, dtype=torch.uint8, device=self.device)
        whole[inside] = torch.from_numpy(np.ascontiguousarray(values).view(np.uint8).reshape(-1)).to(self.device)
        self.all.append((whole, inside))
        return whole[inside].view(dtype).view(values.shape)

    def words(self, k: int, offset: int = 0) -> Tensor:
        """A bitmap to write to."""
        return self.put(np.full(k, 0xA5A5A5A5, np.uint32), offset=offset)

    def check(self) -> None:
        for whole, inside in self.all:
            assert (whole[: inside.start] == 0xFF).all(), "memory before a tensor was written"
            assert (whole[inside.stop :] == 0xFF).all(), "memory behind a tensor was written"


# ------------------------------------------------------------------------------------------------------- data


def array(words: Tensor | None) -> Any:
    """Word tensors as NumPy's uint32; on the host they share memory."""
    return None if words is None else words.cpu().numpy().view(np.uint32)


def dtype_of(fmt: FloatFormat) -> torch.dtype:
    return getattr(torch, fmt.name)


def as_doubles(bits: Array, fmt: FloatFormat) -> npt.NDArray[np.float64]:
    """The values exactly: every format fits into a double."""
    return torch.from_numpy(bits.view(f"i{bits.itemsize}").copy()).view(dtype_of(fmt)).double().numpy()


def some_values(n: int, fmt: FloatFormat, seed: int = 0) -> Array:
    """Any finite bit patterns, a third of them zeros, denormals and the largest and smallest normals."""
    rng = np.random.default_rng(seed)
    smallest_normal = fmt.infinity & -fmt.infinity
    edges = np.array([0, 1, smallest_normal - 1, smallest_normal, fmt.one, fmt.infinity - 1], np.uint64)
    magnitudes = np.where(rng.random(n) < 1 / 3, rng.choice(edges, n), rng.integers(0, fmt.infinity, n, np.uint64))
    signs = np.where(rng.random(n) < 0.5, np.uint64(fmt.sign), np.uint64(0))
    return (magnitudes | signs).astype(fmt.bits)


def non_finite_values(fmt: FloatFormat) -> list[int]:
    """Inf, a signalling and a quiet NaN, and the NaN of all ones; of either sign."""
    quiet = (fmt.infinity & -fmt.infinity) >> 1
    positive = [fmt.infinity, fmt.infinity + 1, fmt.infinity | quiet, fmt.sign - 1]
    return positive + [fmt.sign | value for value in positive]


def random_words(shape: int | tuple[int, ...], seed: int = 0) -> npt.NDArray[np.uint32]:
    return np.random.default_rng(seed).integers(0, 2**32, shape, np.uint32)


class Votes(NamedTuple):
    ballots: list[oracle.Ballot]
    signs: list[npt.NDArray[np.uint32]]
    nonzeros: list[npt.NDArray[np.uint32]]


def votes(ballots: list[oracle.Ballot]) -> Votes:
    signs = [oracle.to_words(ballot > 0) for ballot in ballots]
    return Votes(ballots, signs, [oracle.to_words(ballot != 0) for ballot in ballots])


@functools.cache
def some_votes(ranks: int, n: int, abstaining: float) -> Votes:
    """Close, clear and unanimous votes; in the first eighth nobody votes, if some abstain at all."""
    rng = np.random.default_rng((ranks, n))
    leaning = rng.random(n)
    ballots = [np.where(rng.random(n) < leaning, 1, -1).astype(np.int8) for _ in range(ranks)]
    for ballot in ballots:
        ballot[rng.random(n) < abstaining] = 0
        ballot[: n // 8] = 0 if abstaining else ballot[: n // 8]
    return votes(ballots)


def check_packed(values: Array, fmt: FloatFormat, zeros: str, first_word: int, words: Tensor, nonzero: Tensor) -> None:
    """Under "rows" zeros toss coins, and the second plane says where they are all the same."""
    doubles = as_doubles(values, fmt)
    ballot = oracle.ballot(doubles, "coin" if zeros == "rows" else zeros, coins(KEY, first_word, len(values)))
    assert (array(words) == oracle.to_words(ballot > 0)).all()
    if zeros in TWO_PLANES:
        assert (array(nonzero) == oracle.to_words(doubles != 0)).all()
    else:
        assert (array(nonzero) == 0xA5A5A5A5).all()


def fused(a: Array, b: Array, c: Array) -> npt.NDArray[np.float32]:
    """a b + c of fp32 numbers, rounded once: doubles hold the product, and a sum rounded to odd rounds no further."""
    product, addend = np.multiply(a, b, dtype=np.float64), np.asarray(c, np.float64)
    total = product + addend
    other = total - product
    error = (product - (total - other)) + (addend - other)
    even = total.view(np.int64) % 2 == 0
    return np.where((error != 0) & even, np.nextafter(total, np.copysign(np.inf, error)), total).astype(np.float32)


def lerp(start: Array, end: Array, weight: float) -> npt.NDArray[np.float32]:
    """torch.lerp of fp32 numbers."""
    w, difference = np.float32(weight), np.subtract(end, start, dtype=np.float32)
    return fused(w, difference, start) if w < 0.5 else fused(w - np.float32(1), difference, end)
