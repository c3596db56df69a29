"""mpisign.bitmap: values to bits and back, and whether they are finite."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from contract import (
    FIRST_WORDS,
    KEY,
    LARGE,
    OFFSETS,
    SMALL,
    TILE,
    TWO_PLANES,
    ZEROS,
    Array,
    Memory,
    Subject,
    Tensor,
    check_packed,
    dtype_of,
    formats,
    non_finite_values,
    random_words,
    some_values,
)

from mpisign.bitmap.host import FORMATS, FloatFormat, words_for
from mpisign.bitmap.kernels import JOB_ELEMENTS, VECTOR_CAPACITY

# ---------------------------------------------------------------------------------------------------- packing


def check_pack(
    backend: Subject, memory: Memory, values: Array, fmt: FloatFormat, zeros: str, first_word: int, offset: int
) -> None:
    words, nonzero = (memory.words(words_for(len(values)), offset) for _ in range(2))
    finite = backend.pack(
        memory.put(values, dtype_of(fmt), offset),
        words,
        zeros=zeros,
        key=KEY,
        first_word=first_word,
        nonzero=nonzero if zeros in TWO_PLANES else None,
    )
    assert finite is True
    check_packed(values, fmt, zeros, first_word, words, nonzero)


@formats
@pytest.mark.parametrize("zeros", ZEROS)
def test_pack(zeros: str, fmt: FloatFormat, backend: Subject, memory: Memory) -> None:
    for n in SMALL:
        for offset in OFFSETS:
            check_pack(backend, memory, some_values(n, fmt, n), fmt, zeros, 2**33 + 1, offset)


@formats
@pytest.mark.parametrize("zeros", ZEROS)
def test_pack_across_blocks(zeros: str, fmt: FloatFormat, backend: Subject, memory: Memory) -> None:
    for offset, n in enumerate(LARGE):
        check_pack(backend, memory, some_values(n, fmt), fmt, zeros, 11, 0)
        check_pack(backend, memory, some_values(n, fmt), fmt, zeros, 11, offset)


@formats
@pytest.mark.parametrize("zeros", ZEROS)
def test_pack_zeros_only(zeros: str, fmt: FloatFormat, backend: Subject, memory: Memory) -> None:
    values = np.zeros(TILE + 100, fmt.bits)
    values[1::2] = fmt.sign
    for first_word in FIRST_WORDS:
        check_pack(backend, memory, values, fmt, zeros, first_word, 0)


@formats
def test_coins_and_planes_are_those_of_the_bit_whatever_the_signs(
    fmt: FloatFormat, backend: Subject, memory: Memory
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
    offset: int, fmt: FloatFormat, backend: Subject, memory: Memory
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
                finite = backend.pack(tensor, words, zeros=ZEROS[turn % 4], key=KEY, nonzero=nonzero)
                assert finite is False, f"{bad:x} at {place} of {n}"
            bits[place] = kept
        assert backend.all_finite(tensor) is True


@formats
def test_huge_finite_values_are_finite(fmt: FloatFormat, backend: Subject, memory: Memory) -> None:
    """Their squares and their sum overflow."""
    for n in (0, 1, 1000, JOB_ELEMENTS + 1):
        largest = np.full(n, fmt.infinity - 1, fmt.bits)
        largest[::3] |= fmt.bits.type(fmt.sign)
        assert backend.all_finite(memory.put(largest, dtype_of(fmt)))
        check_pack(backend, memory, largest, fmt, "coin", 0, 0)


def test_one_bad_value_among_many_tensors(backend: Subject, memory: Memory) -> None:
    """More than one launch takes, of all types and many sizes, none among them; some are not there."""
    every = list(FORMATS.values())
    sizes = [0 if i % 9 == 5 else 1 + 37 * i % 600 for i in range(2 * VECTOR_CAPACITY + 60)]
    sizes += [2 * JOB_ELEMENTS + 5, JOB_ELEMENTS]
    some = [(n, every[i % 4], i % 3) for i, n in enumerate(sizes)]
    tensors: list[Tensor | None] = [
        None if i % 7 == 2 else memory.put(some_values(n, fmt), dtype_of(fmt), offset)
        for i, (n, fmt, offset) in enumerate(some)
    ]
    assert backend.first_bad(tensors) >= len(tensors)
    for place, tensor in enumerate(tensors):
        at_an_edge = place % VECTOR_CAPACITY in (0, 1, VECTOR_CAPACITY - 1) or place >= len(sizes) - 3
        if tensor is None or not tensor.numel() or not (at_an_edge or place % 20 == 0):
            continue
        kept = tensor[-1].item()
        tensor[-1] = torch.inf
        assert backend.first_bad(tensors) == place
        tensor[-1] = kept
    assert backend.first_bad(tensors) >= len(tensors)


@pytest.mark.parametrize("missing", [False, True], ids=["all there", "some missing"])
def test_the_first_of_several_bad_tensors(missing: bool, backend: Subject) -> None:
    """Of one launch and of several, whichever ends first."""
    tensors: list[Tensor | None] = [torch.ones(2, i % 3, device=backend.device) for i in range(2 * VECTOR_CAPACITY + 9)]
    if missing:
        tensors[::5] = [None] * len(tensors[::5])
    for place in (392, 391, 386, VECTOR_CAPACITY + 2, VECTOR_CAPACITY - 1, 188, 4, 1):
        found = tensors[place]
        assert found is not None
        found.fill_(torch.nan)
        assert backend.first_bad(tensors) == place


@pytest.mark.parametrize("values", [[], [None, None], [torch.empty(0)], [None, torch.empty(0), torch.ones(3)]])
def test_nothing_there_is_nothing_bad(values: list[Tensor | None], backend: Subject) -> None:
    given = [None if value is None else value.to(backend.device) for value in values]
    assert backend.first_bad(given) >= len(given)


# ------------------------------------------------------------------------------------------------ unpacking


@formats
@pytest.mark.parametrize("masked", [False, True], ids=["signs", "signs and zeros"])
def test_unpack(masked: bool, fmt: FloatFormat, backend: Subject, memory: Memory) -> None:
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


# ------------------------------------------------------------------------------------------------ zero words


def test_a_word_without_a_one_is_found_wherever_it_is(backend: Subject, memory: Memory) -> None:
    for k, offset in ((1, 0), (5, 0), (1024, 1), (1025, 0), (3000, 0), (3001, 2)):
        words = memory.put(np.full(k, 1, np.uint32), offset=offset)
        words[k // 2] = -(2**31)  # a 1 in any bit will do
        assert not backend.any_zero(words)
        for place in {0, 3 % k, k // 2, k - 2, k - 1} - {-1}:
            kept = words[place].item()
            words[place] = 0
            assert backend.any_zero(words), f"word {place} of {k}"
            spans = [(0, place), (place, place + 1), (place + 1, k), (0, k), (place, place)]
            assert backend.zero_words(words, spans) == [False, True, False, True, False], f"word {place} of {k}"
            words[place] = kept
    assert not backend.any_zero(memory.words(0))
    assert backend.zero_words(memory.words(0), []) == []
