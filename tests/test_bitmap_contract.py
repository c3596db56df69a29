"""One contract for all who do bit arithmetic: the host, the CUDA kernels, and the same kernels without a GPU.

Everything is compared with the oracle, bit for bit, in memory whose surroundings must neither be written nor matter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import oracle
import pytest
import shim
import torch

from mpisign.bitmap import cuda, host, kernels
from mpisign.bitmap.batch import Batch
from mpisign.bitmap.host import FORMATS, FloatFormat, words_for
from mpisign.bitmap.kernels import (
    BITMAP_CAPACITY,
    JOB_ELEMENTS,
    MOMENTUM_CAPACITY,
    TENSOR_CAPACITY,
    VECTOR_CAPACITY,
)
from mpisign.bitmap.ops import WORD
from mpisign.bitmap.tensors import format_of, raw_bits
from mpisign.memory.store import state_dtype

Tensor = torch.Tensor
Array = npt.NDArray[Any]

ZEROS = ["coin", "abstain", "positive"]
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


class Host:
    """mpisign.bitmap.host, called with tensors."""

    device = torch.device("cpu")

    def pack(self, values: Tensor, words: Tensor, *, nonzero: Tensor | None = None, **options: Any) -> bool:
        return host.pack(raw_bits(values), format_of(values.dtype), array(words), nonzero=array(nonzero), **options)

    def unpack(self, words: Tensor, out: Tensor, *, nonzero: Tensor | None = None) -> None:
        host.unpack(array(words), format_of(out.dtype), raw_bits(out), nonzero=array(nonzero))

    def all_finite(self, values: Tensor) -> bool:
        return host.all_finite(raw_bits(values), format_of(values.dtype))

    def majority(self, ballots: Sequence[Tensor], out: Tensor, **options: Any) -> int:
        for name in ("nonzeros", "out_nonzero"):
            planes = options.get(name)
            options[name] = [array(plane) for plane in planes] if isinstance(planes, list) else array(planes)
        return host.majority([array(ballot) for ballot in ballots], array(out), **options)

    def count(self, ballots: Sequence[Tensor], planes: Tensor) -> None:
        host.count([array(ballot) for ballot in ballots], array(planes))

    def agreement(self, ballot: Tensor, decision: Tensor, elements: int, *planes: Tensor | None) -> tuple[int, int]:
        return host.agreement(array(ballot), array(decision), elements, *(array(plane) for plane in planes))


class Device:
    """mpisign.bitmap.cuda, whose 0-d tensors become numbers."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            result = getattr(cuda, name)(*arguments, **options)
            if isinstance(result, tuple):
                return tuple(one.item() for one in result)
            return None if result is None else result.item()

        return call


needs_compiler = pytest.mark.skipif(not shim.COMPILER, reason="needs a C++ compiler")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = [pytest.param("shim", marks=needs_compiler), pytest.param("cuda", marks=needs_gpu)]


def make(name: str, monkeypatch: pytest.MonkeyPatch) -> Host | Device:
    if name == "shim":
        monkeypatch.setattr(kernels, "launch", shim.launch)
    return Host() if name == "host" else Device(torch.device("cpu" if name == "shim" else "cuda", 0))


@pytest.fixture(params=["host", *DEVICES])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Host | Device:
    return make(request.param, monkeypatch)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """For what the host does not have."""
    return make(request.param, monkeypatch).device


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


@pytest.fixture
def memory(request: pytest.FixtureRequest) -> Iterator[Memory]:
    names = request.fixturenames
    where = request.getfixturevalue("backend").device if "backend" in names else request.getfixturevalue("device")
    memory = Memory(where)
    yield memory
    memory.check()


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


# ---------------------------------------------------------------------------------------------------- packing


def check_packed(values: Array, fmt: FloatFormat, zeros: str, first_word: int, words: Tensor, nonzero: Tensor) -> None:
    ballot = oracle.ballot(as_doubles(values, fmt), zeros, coins(KEY, first_word, len(values)))
    assert (array(words) == oracle.to_words(ballot > 0)).all()
    if zeros == "abstain":
        assert (array(nonzero) == oracle.to_words(ballot != 0)).all()
    else:
        assert (array(nonzero) == 0xA5A5A5A5).all()


def check_pack(
    backend: Host | Device, memory: Memory, values: Array, fmt: FloatFormat, zeros: str, first_word: int, offset: int
) -> None:
    words, nonzero = (memory.words(words_for(len(values)), offset) for _ in range(2))
    finite = backend.pack(
        memory.put(values, dtype_of(fmt), offset),
        words,
        zeros=zeros,
        key=KEY,
        first_word=first_word,
        nonzero=nonzero if zeros == "abstain" else None,
    )
    assert finite is True
    check_packed(values, fmt, zeros, first_word, words, nonzero)


@formats
@pytest.mark.parametrize("zeros", ZEROS)
def test_pack(zeros: str, fmt: FloatFormat, backend: Host | Device, memory: Memory) -> None:
    for n in SMALL:
        for offset in OFFSETS:
            check_pack(backend, memory, some_values(n, fmt, n), fmt, zeros, 2**33 + 1, offset)


@formats
@pytest.mark.parametrize("zeros", ZEROS)
def test_pack_across_blocks(zeros: str, fmt: FloatFormat, backend: Host | Device, memory: Memory) -> None:
    for offset, n in enumerate(LARGE):
        check_pack(backend, memory, some_values(n, fmt), fmt, zeros, 11, 0)
        check_pack(backend, memory, some_values(n, fmt), fmt, zeros, 11, offset)


@formats
@pytest.mark.parametrize("zeros", ZEROS)
def test_pack_zeros_only(zeros: str, fmt: FloatFormat, backend: Host | Device, memory: Memory) -> None:
    values = np.zeros(TILE + 100, fmt.bits)
    values[1::2] = fmt.sign
    for first_word in FIRST_WORDS:
        check_pack(backend, memory, values, fmt, zeros, first_word, 0)


@formats
def test_coins_and_planes_are_those_of_the_bit_whatever_the_signs(
    fmt: FloatFormat, backend: Host | Device, memory: Memory
) -> None:
    """A single zero, a single positive, a single negative at every place of a tile."""
    for background, single in ((fmt.one, 0), (fmt.sign | 1, 1), (1, fmt.sign | fmt.one)):
        for place in range(0, TILE, 37):
            values = np.full(TILE, background, np.uint64)
            values[place] = single
            check_pack(backend, memory, values.astype(fmt.bits), fmt, "coin", 5, 0)


# ------------------------------------------------------------------------------------------- finite or not


@formats
@pytest.mark.parametrize("offset", [0, 1])
def test_one_non_finite_value_is_found_wherever_it_is(
    offset: int, fmt: FloatFormat, backend: Host | Device, memory: Memory
) -> None:
    every = non_finite_values(fmt)
    for n in (1, 33, TILE + 33, JOB_ELEMENTS + TILE + 3):
        tensor = memory.put(some_values(n, fmt), dtype_of(fmt), offset)
        words, nonzero = memory.words(words_for(n)), memory.words(words_for(n))
        bits = tensor.view(getattr(torch, f"int{8 * fmt.bits.itemsize}"))
        somewhere = np.random.default_rng(n).integers(0, n, 40).tolist()
        for turn, place in enumerate([*range(min(n, 16)), n // 2, *somewhere, n - 1]):
            kept = bits[place].item()
            for bad in every if place in (0, n // 2, n - 1) else every[turn % 8 :][:1]:
                bits[place] = int(np.array(bad, fmt.bits).view(f"i{fmt.bits.itemsize}"))
                assert backend.all_finite(tensor) is False, f"{bad:x} at {place} of {n}"
                finite = backend.pack(tensor, words, zeros=ZEROS[turn % 3], key=KEY, nonzero=nonzero)
                assert finite is False, f"{bad:x} at {place} of {n}"
            bits[place] = kept
        assert backend.all_finite(tensor) is True


@formats
def test_huge_finite_values_are_finite(fmt: FloatFormat, backend: Host | Device, memory: Memory) -> None:
    """Their squares and their sum overflow."""
    for n in (0, 1, 1000, JOB_ELEMENTS + 1):
        largest = np.full(n, fmt.infinity - 1, fmt.bits)
        largest[::3] |= fmt.bits.type(fmt.sign)
        assert backend.all_finite(memory.put(largest, dtype_of(fmt)))
        check_pack(backend, memory, largest, fmt, "coin", 0, 0)


def test_one_bad_value_among_many_tensors(device: torch.device, memory: Memory) -> None:
    """More than one launch takes, of all types and many sizes, none among them."""
    every = list(FORMATS.values())
    sizes = [0 if i % 9 == 5 else 1 + 37 * i % 600 for i in range(VECTOR_CAPACITY + 60)]
    sizes += [2 * JOB_ELEMENTS + 5, JOB_ELEMENTS]
    some = [(n, every[i % 4], i % 3) for i, n in enumerate(sizes)]
    tensors = [memory.put(some_values(n, fmt), dtype_of(fmt), offset) for n, fmt, offset in some]
    assert cuda.all_finite_many(tensors)
    assert cuda.all_finite_many([])
    for place in [place for place, n in enumerate(sizes) if n]:
        kept = tensors[place][-1].item()
        tensors[place][-1] = torch.inf
        assert not cuda.all_finite_many(tensors), f"tensor {place}"
        tensors[place][-1] = kept
    assert cuda.all_finite_many(tensors)


# ------------------------------------------------------------------------------------------------ unpacking


@formats
@pytest.mark.parametrize("masked", [False, True], ids=["signs", "signs and zeros"])
def test_unpack(masked: bool, fmt: FloatFormat, backend: Host | Device, memory: Memory) -> None:
    for n, offsets in [*((n, OFFSETS) for n in SMALL), *((n, [0, 1]) for n in LARGE)]:
        words, nonzero = random_words((2, words_for(n)), n)
        expected = np.where(oracle.to_flags(words, n), 1.0, -1.0)
        if masked:
            expected[~oracle.to_flags(nonzero, n)] = 0.0
        for offset in offsets:
            out = memory.put(np.full(n, 7, fmt.bits), dtype_of(fmt), offset)
            backend.unpack(
                memory.put(words, offset=offset), out, nonzero=memory.put(nonzero, offset=1) if masked else None
            )
            values = out.double().cpu().numpy()
            assert (values == expected).all(), f"{n} elements, offset {offset}"
            assert not np.signbit(values[values == 0]).any(), "a coordinate that does not move is +0"


# ------------------------------------------------------------------------------------------- many tensors


@pytest.mark.parametrize("zeros", ZEROS)
def test_batch_of_thousands_of_small_tensors_and_a_few_large(zeros: str, device: torch.device, memory: Memory) -> None:
    """Of all types and alignments, their words side by side; every seventh has no gradient."""
    every = list(FORMATS.values())
    sizes = [(11 * i) % 140 for i in range(2 * TENSOR_CAPACITY + 200)] + LARGE
    starts = [11 + start for start in oracle.first_words(sizes)]
    total = sum(map(words_for, sizes))
    all_words, all_nonzero = memory.words(total, offset=1), memory.words(total, offset=3)
    spans = [slice(start - 11, start - 11 + words_for(n)) for start, n in zip(starts, sizes, strict=True)]
    words, nonzeros = ([plane[span] for span in spans] for plane in (all_words, all_nonzero))
    batch = Batch(sizes, words, nonzeros=nonzeros, first_words=starts)

    kinds = [every[i % 4] for i in range(len(sizes))]
    values = [some_values(n, fmt, seed) for seed, (n, fmt) in enumerate(zip(sizes, kinds, strict=True))]
    gradients: list[Tensor | None] = [
        None if i % 7 == 3 else memory.put(bits, dtype_of(kinds[i]), i % 3) for i, bits in enumerate(values)
    ]
    assert batch.pack(gradients, zeros=zeros, key=KEY).item() is True
    for i, gradient in enumerate(gradients):
        if gradient is None:
            assert (array(words[i]) == 0xA5A5A5A5).all()
        else:
            check_packed(values[i], kinds[i], zeros, starts[i], words[i], nonzeros[i])

    signs, moves = random_words((2, total))
    for plane, random in ((all_words, signs), (all_nonzero, moves)):
        plane.copy_(torch.from_numpy(random))
    batch.unpack(gradients)
    Batch(sizes, words).unpack([None] * len(sizes))
    for i, gradient in enumerate(gradients):
        if gradient is not None:
            votes = np.where(oracle.to_flags(signs[spans[i]], sizes[i]), 1.0, -1.0)
            votes[~oracle.to_flags(moves[spans[i]], sizes[i])] = 0.0
            assert (gradient.double().cpu().numpy() == votes).all(), f"tensor {i}"


BETAS = [(0.9, 0.9), (0.9, 0.99), (0.2, 0.6), (0.0, 0.0)]


@pytest.mark.parametrize("betas", BETAS, ids=str)
@formats
def test_batch_packs_momentum(
    fmt: FloatFormat, betas: tuple[float, float], device: torch.device, memory: Memory
) -> None:
    """Normal gradients and momenta of every alignment, some gradients zero, denormal or huge; two have none."""
    precision = state_dtype(dtype_of(fmt))
    sizes = [*SMALL, 2 * JOB_ELEMENTS + TILE + 33]
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(2, n, generator=generator, dtype=torch.float64) for n in sizes]
    gradients, momenta = ([one[i].to(dtype) for one in drawn] for i, dtype in enumerate((dtype_of(fmt), precision)))
    for seed, gradient in enumerate(gradients):
        edges = torch.from_numpy(as_doubles(some_values(gradient.numel(), fmt, seed), fmt)).clamp(-1e30, 1e30)
        gradient[1::3] = edges[1::3].to(gradient.dtype)
    starts = [5 + start for start in oracle.first_words(sizes)]
    words = [memory.words(words_for(n)) for n in sizes]
    nonzeros = [memory.words(words_for(n)) for n in sizes]
    batch = Batch(sizes, words, nonzeros=nonzeros, first_words=starts)

    def put(tensor: Tensor, offset: int) -> Tensor:
        return memory.put(raw_bits(tensor), tensor.dtype, offset)

    given = [None if i in (3, 8) else put(g, (i + 2) % 4) for i, g in enumerate(gradients)]
    kept = [put(m, i % 3) for i, m in enumerate(momenta)]
    for unscale, zeros in ((1.0, "coin"), (2.0**-10, "abstain")):
        finite = batch.pack_momentum(given, kept, betas, unscale=unscale, zeros=zeros, key=KEY)
        assert finite.item() is True
        for i, gradient in enumerate(given):
            if gradient is not None:
                wide = gradients[i].to(precision) * unscale
                sent = torch.lerp(momenta[i], wide, 1.0 - betas[0])
                momenta[i].lerp_(wide, 1.0 - betas[1])
                values = raw_bits(sent)
                check_packed(values, format_of(precision), zeros, starts[i], words[i], nonzeros[i])
            assert torch.equal(kept[i].cpu(), momenta[i]), f"momentum {i}"


@formats
def test_momentum_is_the_oracles(fmt: FloatFormat, device: torch.device) -> None:
    """Of small multiples of 1/4 with decays of 1/2 and 3/4, of which every format has the exact results."""
    rng = np.random.default_rng(0)
    gradient, momentum = rng.integers(-8, 9, (2, 3000)) / 4
    words = torch.zeros(words_for(3000), dtype=WORD, device=device)
    kept = torch.from_numpy(momentum).to(device, state_dtype(dtype_of(fmt)))
    given = torch.from_numpy(gradient).to(device, dtype_of(fmt))
    assert Batch([3000], [words]).pack_momentum([given], [kept], (0.5, 0.75), zeros="positive")
    sent, expected = oracle.lion(momentum, gradient, 0.5, 0.75)
    assert (array(words) == oracle.to_words(oracle.ballot(sent, "positive") > 0)).all()
    assert (kept.double().cpu().numpy() == expected).all()


@pytest.mark.parametrize("place", [0, 5, 1023, 1024, 1100])
@formats
def test_bad_gradients_leave_their_momentum_alone(fmt: FloatFormat, place: int, device: torch.device) -> None:
    for bad in (torch.nan, torch.inf, -torch.inf):
        gradient = torch.ones(1101, dtype=dtype_of(fmt))
        gradient[place] = bad
        kept = torch.zeros(1101, dtype=state_dtype(gradient.dtype), device=device)
        expected = torch.full_like(kept, 0.5, device="cpu")
        expected[place] = 0.0
        batch = Batch([1101], [torch.zeros(words_for(1101), dtype=WORD, device=device)])
        assert not batch.pack_momentum([gradient.to(device)], [kept], (0.5, 0.5))
        assert torch.equal(kept.cpu(), expected)
        assert batch.pack_momentum([torch.ones_like(gradient).to(device)], [kept], (0.5, 0.5))


@pytest.mark.parametrize("tensors", [MOMENTUM_CAPACITY - 1, MOMENTUM_CAPACITY, TENSOR_CAPACITY + 1])
def test_momenta_of_many_tensors(tensors: int, device: torch.device) -> None:
    """Each has its own; every fifth is empty, every seventh has no gradient."""
    sizes = [0 if i % 5 == 0 else 1 + i % 40 for i in range(tensors)]
    drawn = [torch.randn(n, generator=torch.Generator().manual_seed(i)) for i, n in enumerate(sizes)]
    kept = [torch.zeros(n, device=device) for n in sizes]
    given = [None if i % 7 == 3 else gradient.to(device) for i, gradient in enumerate(drawn)]
    words = [torch.zeros(words_for(n), dtype=WORD, device=device) for n in sizes]
    assert Batch(sizes, words).pack_momentum(given, kept, (0.5, 0.5))
    for i, gradient in enumerate(drawn):
        moved = torch.zeros_like(gradient) if i % 7 == 3 else gradient / 2
        assert torch.equal(kept[i].cpu(), moved), f"tensor {i}"
        assert (array(words[i]) == oracle.to_words((moved > 0).tolist())).all(), f"tensor {i}"


def test_momentum_that_overflows_is_not_finite(device: torch.device) -> None:
    batch = Batch([40], [torch.zeros(2, dtype=WORD, device=device)])
    gradient, kept = torch.full((40,), 3e38, device=device), torch.full((40,), -3e38, device=device)
    assert not batch.pack_momentum([gradient], [kept], (0.5, 0.5))


@pytest.mark.parametrize("place", [0, TENSOR_CAPACITY - 1, TENSOR_CAPACITY, TENSOR_CAPACITY + 1])
def test_batch_finds_one_bad_value_and_forgets_it(place: int, device: torch.device, memory: Memory) -> None:
    sizes = [5] * (TENSOR_CAPACITY + 2)
    batch = Batch(sizes, [memory.words(1) for _ in sizes])
    values = [memory.put(np.ones(n, np.float32), torch.float32) for n in sizes]
    values[place][4] = torch.nan
    assert batch.pack(values).item() is False
    values[place][4] = 1
    assert batch.pack(values).item() is True


def test_batch_takes_dense_tensors_of_any_shape_in_the_order_of_their_memory(device: torch.device) -> None:
    values = torch.randn(2, 3, 4, 5).to(device).to(memory_format=torch.channels_last)
    words, expected = torch.zeros(2, words_for(120), dtype=WORD, device=device)
    Batch([120], [words]).pack([values])
    cuda.pack(values.permute(0, 2, 3, 1).reshape(-1), expected)
    assert torch.equal(words.cpu(), expected.cpu())


def test_batch_of_nothing(device: torch.device) -> None:
    empty = torch.empty(0, dtype=WORD, device=device)
    assert Batch([], []).pack([])
    batch = Batch([0], [empty])
    assert batch.pack([torch.empty(0, device=device)])
    batch.unpack([torch.empty(0, device=device)])


# ------------------------------------------------------------------------------------------------- deciding


def check_majority(
    backend: Host | Device,
    memory: Memory,
    cast: Votes,
    ties: str,
    abstain: bool,
    first_word: int = 0,
    offsets: tuple[int, int] = (0, 0),
) -> int:
    """Compare with the oracle; returns the ties. ``offsets``: of the ballots and of what is written, in words."""
    ballots = cast.ballots
    n = len(ballots[0])
    k, wants_moved = words_for(n), abstain or ties == "zero"
    out, moved = (memory.words(k, offsets[1]) for _ in range(2))
    tied = backend.majority(
        [memory.put(words, offset=offsets[0]) for words in cast.signs],
        out,
        ties=ties,
        key=KEY,
        first_word=first_word,
        nonzeros=[memory.put(words, offset=offsets[0]) for words in cast.nonzeros] if abstain else None,
        out_nonzero=moved if wants_moved else None,
    )
    expected, expected_ties = oracle.majority(ballots, ties, coins(KEY, first_word, n))
    decided = np.where(oracle.to_flags(array(out), n), 1, -1)
    if wants_moved:
        decided[~oracle.to_flags(array(moved), n)] = 0
    assert (decided == expected).all(), f"{len(ballots)} ranks"
    assert tied == expected_ties, f"{len(ballots)} ranks"
    return tied


@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("abstaining", [0.0, 0.2, 0.9])
def test_majority_of_1_to_70_ranks(abstaining: float, ties: str, backend: Host | Device, memory: Memory) -> None:
    tied = 0
    for ranks in range(1, 71):
        cast = some_votes(ranks, 200, abstaining)
        tied += check_majority(backend, memory, cast, ties, abstaining > 0, 2**32 - 3)
    assert tied > 100


@pytest.mark.parametrize("abstain", [False, True])
@pytest.mark.parametrize("ties", TIES)
def test_majority_of_sizes_and_alignments(ties: str, abstain: bool, backend: Host | Device, memory: Memory) -> None:
    """Four words a thread and 256 threads a block; 16-byte accesses only where every bitmap is aligned."""
    for words in (1, 3, 4, 5, 127, 1023, 1024, 1025, 1028):
        for offsets in ((0, 0), (0, 1), (2, 0), (3, 3)):
            n = 32 * words - words % 32
            check_majority(backend, memory, some_votes(4, n, 0.3 * abstain), ties, abstain, words, offsets)


@pytest.mark.parametrize("ranks", [BITMAP_CAPACITY // 2 + 1, BITMAP_CAPACITY, BITMAP_CAPACITY + 1, 700])
def test_majority_of_hundreds(ranks: int, backend: Host | Device, memory: Memory) -> None:
    """More than the parameters of a launch can list."""
    for abstain in (False, True):
        check_majority(backend, memory, some_votes(ranks, 100, 0.3 * abstain), "coin", abstain)


def test_one_vote_more_decides_whatever_the_number(backend: Host | Device, memory: Memory) -> None:
    """Counters of every number of planes, at their fullest."""
    for ranks in (1, 2, 3, 4, 7, 8, 15, 16, 31, 32, 63, 64, 127, 128, 255, 256):
        for ayes in {0, ranks // 2 - 1, ranks // 2, ranks // 2 + 1, ranks} - {-1}:
            ballots = [np.full(40, 1 if rank < ayes else -1, np.int8) for rank in range(ranks)]
            for abstain in (False, True):
                check_majority(backend, memory, votes(ballots), "zero", abstain)


def test_ballots_that_lie_about_abstaining_are_counted_alike(backend: Host | Device, memory: Memory) -> None:
    """A sign where its rank does not vote breaks the format; every backend must still decide the same."""
    ballots, nonzeros = random_words((2, 6, 50))
    plain = [memory.put(words) for words in (*ballots, *nonzeros)]
    out, moved = memory.words(50), memory.words(50)
    tied = backend.majority(plain[:6], out, ties="coin", key=KEY, nonzeros=plain[6:], out_nonzero=moved)
    expected = np.empty((2, 50), np.uint32)
    reference = host.majority(
        list(ballots), expected[0], ties="coin", key=KEY, nonzeros=list(nonzeros), out_nonzero=expected[1]
    )
    assert tied == reference
    assert (np.stack([array(out), array(moved)]) == expected).all()


@pytest.mark.parametrize("ties", TIES)
def test_nobody_votes_is_no_tie_and_does_not_move(ties: str, backend: Host | Device, memory: Memory) -> None:
    nothing = [memory.put(np.zeros(2, np.uint32)) for _ in range(2)]
    out, moved = memory.words(2), memory.words(2)
    assert backend.majority(nothing, out, ties=ties, key=KEY, nonzeros=nothing, out_nonzero=moved) == 0
    assert not array(moved).any()


def test_nothing_to_decide(backend: Host | Device, memory: Memory) -> None:
    empty = memory.words(0)
    assert backend.majority([empty, empty], empty) == 0
    assert backend.agreement(empty, empty, 0) == (0, 0)
    backend.count([empty, empty], empty.view(1, 0).expand(2, 0))


@pytest.mark.parametrize("options", [{"ties": "zero"}, {"nonzeros": []}])
def test_do_not_move_needs_a_plane_to_say_so(options: dict, backend: Host | Device, memory: Memory) -> None:
    with pytest.raises(ValueError, match="out_nonzero"):
        backend.majority([memory.words(1)], memory.words(1), **options)


# ------------------------------------------------------------------------------------------------- counting


def test_count(backend: Host | Device, memory: Memory) -> None:
    """Also into rows that lie further apart than they are long."""
    for ballots in (1, 2, 3, 4, 5, 7, 8, 16, 63, 64, 70, 256, BITMAP_CAPACITY + 1):
        for k, offset, gap, spare in ((5, 1, 0, 0), (4, 0, 0, 1), (7, 0, 1, 0), (1027, 0, 5, 2)):
            if k > 1000 and ballots > 8:
                continue
            words = random_words((ballots, k), ballots)
            p = ballots.bit_length() + spare
            planes = memory.put(np.full((p, k + gap), 0xA5A5A5A5, np.uint32), offset=offset)
            backend.count([memory.put(row, offset=offset) for row in words], planes[:, :k])
            bits = np.stack([oracle.to_flags(row, 32 * k) for row in words])
            rows = array(planes)
            counted = sum((1 << i) * oracle.to_flags(row[:k], 32 * k).astype(int) for i, row in enumerate(rows))
            assert (counted == bits.sum(axis=0)).all()
            assert (rows[:, k:] == 0xA5A5A5A5).all()


def test_planes_too_few_to_count(backend: Host | Device, memory: Memory) -> None:
    with pytest.raises(ValueError, match="2 planes cannot count 4 ballots"):
        backend.count([memory.words(1)] * 4, memory.put(np.zeros((2, 1), np.uint32)))


@pytest.mark.parametrize("n", [1, 31, 32, 33, 200, 32 * 1024 + 1])
def test_agreement(n: int, backend: Host | Device, memory: Memory) -> None:
    for ranks in (1, 3):
        ballots = some_votes(ranks, n, 0.3).ballots
        decision, _ = oracle.majority(ballots, "zero")
        signs, moved = (memory.put(oracle.to_words(flags)) for flags in (decision > 0, decision != 0))
        for ballot in ballots:
            mine, spoke = (memory.put(oracle.to_words(flags), offset=1) for flags in (ballot > 0, ballot != 0))
            both = (ballot != 0) & (decision != 0)
            together = int((both & (ballot == decision)).sum())
            assert backend.agreement(mine, signs, n, spoke, moved) == (together, int(both.sum()))
            assert backend.agreement(mine, signs, n) == (int(((ballot > 0) == (decision > 0)).sum()), n)
