"""mpisign.bitmap: batches of many tensors at once, and their momenta."""

from __future__ import annotations

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
    Memory,
    Tensor,
    array,
    as_doubles,
    check_packed,
    dtype_of,
    formats,
    random_words,
    some_values,
)

from mpisign.backends import WORD
from mpisign.bitmap import cuda
from mpisign.bitmap.batch import Batch
from mpisign.bitmap.host import FORMATS, FloatFormat, words_for
from mpisign.bitmap.kernels import JOB_ELEMENTS, MOMENTUM_CAPACITY, TENSOR_CAPACITY
from mpisign.bitmap.tensors import format_of, raw_bits
from mpisign.memory.store import state_dtype

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
