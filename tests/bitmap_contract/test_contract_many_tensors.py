"""mpisign.backends: bitmaps of many tensors at once, and their averages."""

from __future__ import annotations

from typing import Any

import numpy as np
import oracle
import pytest
import torch
from contract import (
    KEY,
    LARGE,
    SMALL,
    TILE,
    ZEROS,
    Array,
    Memory,
    Subject,
    Tensor,
    array,
    as_doubles,
    check_packed,
    coins,
    dtype_of,
    formats,
    lerp,
    random_words,
    some_values,
)

from mpisign import backends
from mpisign.backends import WORD
from mpisign.backends.host import PIECE
from mpisign.bitmap.host import FORMATS, FloatFormat, words_for
from mpisign.bitmap.kernels import JOB_ELEMENTS, MOMENTUM_CAPACITY, TENSOR_CAPACITY
from mpisign.bitmap.tensors import format_of, raw_bits
from mpisign.memory.store import state_dtype

# ------------------------------------------------------------------------------------------- many tensors


@pytest.mark.parametrize("zeros", ZEROS)
def test_thousands_of_small_tensors_and_a_few_large(zeros: str, backend: Subject, memory: Memory) -> None:
    """Of all types and alignments, their words side by side; every seventh has no gradient."""
    every = list(FORMATS.values())
    sizes = [(11 * i) % 140 for i in range(2 * TENSOR_CAPACITY + 200)] + LARGE
    starts = [11 + start for start in oracle.first_words(sizes)]
    total = sum(map(words_for, sizes))
    all_words, all_nonzero = memory.words(total, offset=1), memory.words(total, offset=3)
    spans = [slice(start - 11, start - 11 + words_for(n)) for start, n in zip(starts, sizes, strict=True)]
    words, nonzeros = ([plane[span] for span in spans] for plane in (all_words, all_nonzero))
    bitmaps = backend.bitmaps(sizes, words, nonzeros, starts)

    kinds = [every[i % 4] for i in range(len(sizes))]
    values = [some_values(n, fmt, seed) for seed, (n, fmt) in enumerate(zip(sizes, kinds, strict=True))]
    gradients: list[Tensor | None] = [
        None if i % 7 == 3 else memory.put(bits, dtype_of(kinds[i]), i % 3) for i, bits in enumerate(values)
    ]
    assert bitmaps.pack(gradients, zeros=zeros, key=KEY) >= len(sizes)
    for i, gradient in enumerate(gradients):
        if gradient is None:
            assert (array(words[i]) == 0xA5A5A5A5).all()
        else:
            check_packed(values[i], kinds[i], zeros, starts[i], words[i], nonzeros[i])

    signs, moves = random_words((2, total))
    for plane, random in ((all_words, signs), (all_nonzero, moves)):
        plane.copy_(torch.from_numpy(random))
    bitmaps.unpack(gradients)
    backend.bitmaps(sizes, words).unpack([None] * len(sizes))
    for i, gradient in enumerate(gradients):
        if gradient is not None:
            votes = np.where(oracle.to_flags(signs[spans[i]], sizes[i]), 1.0, -1.0)
            votes[~oracle.to_flags(moves[spans[i]], sizes[i])] = 0.0
            assert (gradient.double().cpu().numpy() == votes).all(), f"tensor {i}"


BETAS = [(0.9, 0.9), (0.9, 0.99), (0.2, 0.6), (0.0, 0.0)]


def put(memory: Memory, tensor: Tensor, offset: int = 0) -> Tensor:
    return memory.put(raw_bits(tensor), tensor.dtype, offset)


@pytest.mark.parametrize("betas", BETAS, ids=str)
@formats
def test_packs_momentum(fmt: FloatFormat, betas: tuple[float, float], backend: Subject, memory: Memory) -> None:
    """Normal gradients and averages of every alignment, some gradients zero, denormal or huge; two have none."""
    precision = state_dtype(dtype_of(fmt))
    sizes = [*SMALL, 2 * JOB_ELEMENTS + TILE + 33]
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(2, n, generator=generator, dtype=torch.float64) for n in sizes]
    gradients, averages = ([one[i].to(dtype) for one in drawn] for i, dtype in enumerate((dtype_of(fmt), precision)))
    for seed, gradient in enumerate(gradients):
        edges = torch.from_numpy(as_doubles(some_values(gradient.numel(), fmt, seed), fmt)).clamp(-1e30, 1e30)
        gradient[1::3] = edges[1::3].to(gradient.dtype)
    starts = [5 + start for start in oracle.first_words(sizes)]
    words = [memory.words(words_for(n)) for n in sizes]
    nonzeros = [memory.words(words_for(n)) for n in sizes]
    bitmaps = backend.bitmaps(sizes, words, nonzeros, starts)

    given = [None if i in (3, 8) else put(memory, g, (i + 2) % 4) for i, g in enumerate(gradients)]
    kept = [put(memory, m, i % 3) for i, m in enumerate(averages)]
    for unscale, zeros in ((1.0, "coin"), (2.0**-10, "abstain"), (0.25, "rows")):
        first = bitmaps.pack_average(given, kept, betas, unscale=unscale, zeros=zeros, key=KEY)
        assert first >= len(sizes)
        for i, gradient in enumerate(given):
            if gradient is not None:
                wide = gradients[i].to(precision) * unscale
                sent = torch.lerp(averages[i], wide, 1.0 - betas[0])
                averages[i].lerp_(wide, 1.0 - betas[1])
                if zeros == "coin":
                    nonzeros[i].fill_(-0x5A5A5A5B)  # 0xA5A5A5A5
                check_packed(raw_bits(sent), format_of(precision), zeros, starts[i], words[i], nonzeros[i])
            assert torch.equal(kept[i].cpu(), averages[i]), f"average {i}"


@pytest.mark.parametrize("betas", BETAS, ids=str)
def test_averages_are_rounded_as_the_oracle_rounds(
    betas: tuple[float, float], backend: Subject, memory: Memory
) -> None:
    """Of numbers of all magnitudes, denormals among them, step after step."""
    n, rng = 20_011, np.random.default_rng(1)

    def draw() -> Array:
        return (rng.standard_normal(n) * 10.0 ** rng.integers(-44, 30, n)).astype(np.float32)

    average = draw()
    words, kept = memory.words(words_for(n), offset=1), memory.put(average, torch.float32, 1)
    bitmaps = backend.bitmaps([n], [words])
    for step in range(3):
        gradient = draw()
        scaled = gradient * np.float32(0.3)
        sent, average = lerp(average, scaled, 1 - betas[0]), lerp(average, scaled, 1 - betas[1])
        given = [memory.put(gradient, torch.float32, step)]
        assert bitmaps.pack_average(given, [kept], betas, unscale=0.3, zeros="coin", key=KEY) >= 1
        assert (array(kept) == average.view(np.uint32)).all()
        assert (array(words) == oracle.to_words(oracle.ballot(sent, "coin", coins(KEY, 0, n)) > 0)).all()


@formats
def test_momentum_is_the_oracles(fmt: FloatFormat, backend: Subject) -> None:
    """Of small multiples of 1/4 with decays of 1/2 and 3/4, of which every format has the exact results."""
    rng = np.random.default_rng(0)
    gradient, momentum = rng.integers(-8, 9, (2, 3000)) / 4
    words = torch.zeros(words_for(3000), dtype=WORD, device=backend.device)
    kept = torch.from_numpy(momentum).to(backend.device, state_dtype(dtype_of(fmt)), copy=True)
    given = torch.from_numpy(gradient).to(backend.device, dtype_of(fmt))
    bitmaps = backend.bitmaps([3000], [words])
    assert bitmaps.pack_average([given], [kept], (0.5, 0.75), unscale=1.0, zeros="positive", key=0) >= 1
    sent, expected = oracle.lion(momentum, gradient, 0.5, 0.75)
    assert (array(words) == oracle.to_words(oracle.ballot(sent, "positive") > 0)).all()
    assert (kept.double().cpu().numpy() == expected).all()


def test_an_average_of_more_than_a_piece(backend: Subject) -> None:
    """The host does large tensors piece by piece."""
    n = PIECE + 1000
    gradient = torch.randn(n, generator=torch.Generator().manual_seed(0)).masked_fill_(torch.arange(n) % 7 == 0, 0.0)
    planes = torch.zeros(2, words_for(n), dtype=WORD, device=backend.device)
    kept = torch.zeros(n, device=backend.device)
    bitmaps = backend.bitmaps([n], [planes[0]], [planes[1]], [3])
    given = gradient.to(backend.device)
    assert bitmaps.pack_average([given], [kept], (0.0, 0.5), unscale=2.0, zeros="rows", key=KEY) >= 1
    assert torch.equal(kept.cpu(), gradient)
    check_packed(raw_bits(gradient), format_of(gradient.dtype), "rows", 3, *planes)
    given[-1] = torch.nan
    assert bitmaps.pack_average([given], [kept], (0.0, 0.5), unscale=2.0, zeros="rows", key=KEY) == 0


# ------------------------------------------------------------------------------------------ what is not finite


def average_alone(backend: Subject, gradient: Tensor, kept: Tensor) -> int:
    words = torch.zeros(words_for(kept.numel()), dtype=WORD, device=backend.device)
    bitmaps = backend.bitmaps([kept.numel()], [words])
    return bitmaps.pack_average([gradient.to(backend.device)], [kept], (0.5, 0.5), unscale=1.0, zeros="coin", key=KEY)


@pytest.mark.parametrize("place", [0, 5, 1023, 1024, 1100])
@formats
def test_bad_gradients_leave_their_momentum_alone(fmt: FloatFormat, place: int, backend: Subject) -> None:
    for bad in (torch.nan, torch.inf, -torch.inf):
        gradient = torch.ones(1101, dtype=dtype_of(fmt))
        gradient[place] = bad
        kept = torch.zeros(1101, dtype=state_dtype(gradient.dtype), device=backend.device)
        expected = torch.full_like(kept, 0.5, device="cpu")
        expected[place] = 0.0
        assert average_alone(backend, gradient, kept) == 0
        assert torch.equal(kept.cpu(), expected)
        assert average_alone(backend, torch.ones_like(gradient), kept) >= 1


@pytest.mark.parametrize("tensors", [MOMENTUM_CAPACITY - 1, MOMENTUM_CAPACITY, TENSOR_CAPACITY + 1])
def test_momenta_of_many_tensors(tensors: int, backend: Subject) -> None:
    """Each has its own; every fifth is empty, every seventh has no gradient."""
    sizes = [0 if i % 5 == 0 else 1 + i % 40 for i in range(tensors)]
    drawn = [torch.randn(n, generator=torch.Generator().manual_seed(i)) for i, n in enumerate(sizes)]
    kept = [torch.zeros(n, device=backend.device) for n in sizes]
    given = [None if i % 7 == 3 else gradient.to(backend.device) for i, gradient in enumerate(drawn)]
    words = [torch.zeros(words_for(n), dtype=WORD, device=backend.device) for n in sizes]
    averages = [None if gradient is None else average for gradient, average in zip(given, kept, strict=True)]
    bitmaps = backend.bitmaps(sizes, words)
    assert bitmaps.pack_average(given, averages, (0.5, 0.5), unscale=1.0, zeros="coin", key=KEY) >= tensors
    for i, gradient in enumerate(drawn):
        moved = torch.zeros_like(gradient) if i % 7 == 3 else gradient / 2
        assert torch.equal(kept[i].cpu(), moved), f"tensor {i}"
        assert (array(words[i]) == oracle.to_words((moved > 0).tolist())).all(), f"tensor {i}"


def test_an_average_that_overflows_is_not_finite(backend: Subject) -> None:
    kept = torch.full((40,), -3e38, device=backend.device)
    assert average_alone(backend, torch.full((40,), 3e38), kept) == 0


@pytest.mark.parametrize("place", [1, TENSOR_CAPACITY - 1, TENSOR_CAPACITY, TENSOR_CAPACITY + 1])
def test_one_bad_tensor_of_many_is_found_and_forgotten(place: int, backend: Subject, memory: Memory) -> None:
    """Which is the first however many launches it takes, also if some are empty or not there."""
    sizes = [0 if i % 5 == 2 else 5 for i in range(TENSOR_CAPACITY + 9)]
    bitmaps = backend.bitmaps(sizes, [memory.words(words_for(n)) for n in sizes])
    values: list[Tensor | None] = [memory.put(np.ones(n, np.float32), torch.float32) for n in sizes]
    values[0] = values[place + 2] = None
    spoilt = [value for i in (place, place + 1, place + 3, len(sizes) - 1) if (value := values[i]) is not None]
    assert bitmaps.pack(values, zeros="coin", key=KEY) >= len(sizes)
    for value in spoilt:
        value[-1:] = torch.nan
    first = next(i for i in range(place, len(sizes)) if values[i] is not None and sizes[i])
    assert bitmaps.pack(values, zeros="coin", key=KEY) == first
    for value in spoilt:
        value[-1:] = 1.0
    assert bitmaps.pack(values, zeros="coin", key=KEY) >= len(sizes)


@pytest.mark.parametrize("place", [1, MOMENTUM_CAPACITY - 2, MOMENTUM_CAPACITY, TENSOR_CAPACITY - 1, TENSOR_CAPACITY])
def test_the_first_bad_average(place: int, backend: Subject) -> None:
    """By a gradient, or because the average itself overflows; and the words of those before it count."""
    sizes = [40] * (TENSOR_CAPACITY + 9)
    words = [torch.zeros(2, dtype=WORD, device=backend.device) for _ in sizes]
    bitmaps = backend.bitmaps(sizes, words)
    for overflows in (False, True):
        gradients: list[Tensor | None] = [torch.ones(40, device=backend.device) for _ in sizes]
        averages: list[Tensor | None] = [torch.zeros(40, device=backend.device) for _ in sizes]
        gradients[0] = averages[0] = gradients[place + 1] = averages[place + 1] = None
        for bad, by_overflow in ((place, overflows), (place + 3, not overflows)):
            gradient, average = gradients[bad], averages[bad]
            assert gradient is not None
            assert average is not None
            gradient[33] = 3e38 if by_overflow else torch.nan
            average[33] = -3e38 if by_overflow else 0.0
        assert bitmaps.pack_average(gradients, averages, (0.5, 0.5), unscale=1.0, zeros="coin", key=KEY) == place
        assert all((array(words[i]) == [0xFFFFFFFF, 0xFF]).all() for i in range(1, place))


def test_bad_or_not_all_backends_leave_the_same(backend: Subject, memory: Memory) -> None:
    """Averages bit for bit, the place of the first, and the words up to it."""
    host = Subject(backends._of("mpisign.backends.host"), torch.device("cpu"))
    sizes, rng = [5, 0, 1500, 33, 700], np.random.default_rng(2)
    for turn in range(6):
        spoilt = sizes[2 + turn % 3]
        drawn = [(rng.standard_normal((2, n)).clip(-3, 3) * 1e38).astype(np.float32) for n in sizes]  # some overflow
        if turn % 2:
            drawn = [values / np.float32(1e10) for values in drawn]
            drawn[2 + turn % 3][0, rng.integers(spoilt)] = (np.nan, np.inf, -np.inf)[turn % 3]
        results = []
        for one, where in ((host, Memory(torch.device("cpu"))), (backend, memory)):
            gradients = [where.put(values[0], torch.float32, turn % 4) for values in drawn]
            averages = [where.put(values[1], torch.float32) for values in drawn]
            planes = [[where.words(words_for(n)) for n in sizes] for _ in range(2)]
            bitmaps = one.bitmaps(sizes, planes[0], planes[1], [7] * len(sizes))
            first = bitmaps.pack_average(gradients, averages, (0.9, 0.99), unscale=1.5, zeros="rows", key=KEY)
            sure = [array(words).tolist() for plane in planes for words in plane[:first]]
            finite = [torch.nan_to_num(average.cpu()).numpy().view(np.uint32).tolist() for average in averages]
            results.append((first, sure, finite))
        assert results[0] == results[1], f"turn {turn}"
        assert results[0][0] < len(sizes)


@pytest.mark.parametrize("betas", BETAS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_averages_may_be_read_where_they_were_and_written_elsewhere(
    betas: tuple[float, float], dtype: torch.dtype, backend: Subject, memory: Memory
) -> None:
    """The same bits and averages as in place; what is read stays, and a NaN leaves its average as it was."""
    sizes = [1, 33, TILE + 7, 2 * JOB_ELEMENTS + TILE + 33]
    generator = torch.Generator().manual_seed(1)
    gradients = [torch.randn(n, generator=generator, dtype=torch.float64).to(dtype) for n in sizes]
    averages = [torch.randn(n, generator=generator, dtype=torch.float64).to(state_dtype(dtype)) for n in sizes]
    gradients[2][5] = torch.nan
    given = [put(memory, g, i % 3) for i, g in enumerate(gradients)]
    given[1] = None
    in_place, before = ([put(memory, m, i % 4) for i, m in enumerate(averages)] for _ in range(2))
    written = [put(memory, torch.full_like(m, 7.0), (i + 1) % 4) for i, m in enumerate(averages)]
    words, others = ([memory.words(words_for(n)) for n in sizes] for _ in range(2))
    options: Any = {"unscale": 0.5, "zeros": "coin", "key": KEY}
    assert backend.bitmaps(sizes, words).pack_average(given, in_place, betas, **options) == 2
    bitmaps = backend.bitmaps(sizes, others)
    former, into = ([None if i == 1 else its for i, its in enumerate(some)] for some in (before, written))
    assert bitmaps.pack_average(given, into, betas, **options, before=former) == 2
    for i in (0, 2, 3):
        assert torch.equal(words[i], others[i])
        assert torch.equal(in_place[i], written[i])
        assert torch.equal(before[i].cpu(), averages[i])


# ---------------------------------------------------------------------------------------------------- the rest


def test_dense_tensors_of_any_shape_in_the_order_of_their_memory(backend: Subject) -> None:
    values = torch.randn(2, 3, 4, 5).to(backend.device).to(memory_format=torch.channels_last)
    words, expected, averaged = torch.zeros(3, words_for(120), dtype=WORD, device=backend.device)
    backend.bitmaps([120], [words]).pack([values], zeros="coin", key=0)
    backend.pack(values.permute(0, 2, 3, 1).reshape(-1), expected)
    assert torch.equal(words, expected)
    kept = torch.zeros(120, device=backend.device)
    averages = backend.bitmaps([120], [averaged])
    averages.pack_average([values], [kept], (0.5, 0.5), unscale=1.0, zeros="coin", key=0)
    assert torch.equal(averaged, expected)
    backend.bitmaps([120], [words]).unpack([values])
    out = torch.empty(120, device=backend.device)
    backend.unpack(words, out)
    assert torch.equal(values.permute(0, 2, 3, 1).reshape(-1), out)


def test_bitmaps_of_nothing(backend: Subject) -> None:
    nothing, empty = torch.empty(0, device=backend.device), torch.empty(0, dtype=WORD, device=backend.device)
    for sizes, words, values in (([], [], []), ([0], [empty], [nothing]), ([0], [empty], [None])):
        bitmaps = backend.bitmaps(sizes, words)
        assert bitmaps.pack(values, zeros="coin", key=0) >= len(sizes)
        assert bitmaps.pack_average(values, values, (0.5, 0.5), unscale=1.0, zeros="coin", key=0) >= len(sizes)
        bitmaps.unpack(values)


# ------------------------------------------------------------------------------------------------- a step of SGD


@pytest.mark.parametrize("moved", ["everywhere", "plane", "rows"])
@formats
def test_applies_what_sgd_would(fmt: FloatFormat, moved: str, backend: Subject, memory: Memory) -> None:
    """Two rates and decays, parameters of every size and alignment, some of them denormal or huge; two are left out."""
    dtype = dtype_of(fmt)
    sizes = [*SMALL, JOB_ELEMENTS + TILE + 33, PIECE + TILE + 7 if fmt.name == "float32" else 5]
    decay = 0.1 if dtype in (torch.float32, torch.float64) else 0.0  # torch rounds halves in two ways, by the place
    words, others = (
        [memory.put(random_words(words_for(n), seed + i)) for i, n in enumerate(sizes)] for seed in (0, 99)
    )
    planes: list[Tensor | None] = [None] * len(sizes)
    given = planes
    if moved == "plane":
        planes = list(others)
    if moved == "rows":  # instead of the planes that there are, for some
        planes = [None if i % 3 == 0 else memory.put(random_words(words_for(n), i)) for i, n in enumerate(sizes)]
        given = [other if i % 2 else None for i, other in enumerate(others)]
    bitmaps = backend.bitmaps(sizes, words, planes)
    values = [some_values(n, fmt, seed) for seed, n in enumerate(sizes)]
    parameters = [None if i in (3, 8) else memory.put(bits, dtype, i % 4) for i, bits in enumerate(values)]
    # On the host torch rounds a rate to the parameter's format, on a GPU it does not.
    rates = [2**-10 if i % 2 == 0 else 1e-3 if decay or not backend.kernels else 0.125 for i in range(len(sizes))]
    decays = [decay if i % 2 else 0.0 for i in range(len(sizes))]
    bitmaps.apply(parameters, rates, decays, given)
    for i, parameter in enumerate(parameters):
        if parameter is None:
            continue
        signs = np.where(oracle.to_flags(array(words[i]), sizes[i]), 1.0, -1.0)
        mask = given[i] if given[i] is not None else planes[i]
        if mask is not None:
            signs[~oracle.to_flags(array(mask), sizes[i])] = 0.0
        expected = memory.put(values[i], dtype).cpu()
        expected.grad = torch.from_numpy(signs).to(dtype)
        torch.optim.SGD([expected], lr=rates[i], weight_decay=decays[i]).step()
        assert torch.equal(raw(parameter), raw(expected)), f"parameter {i}"


def raw(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().view(torch.uint8)
