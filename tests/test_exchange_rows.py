"""mpisign.exchange.rows against NumPy: rows of zeros, and who has voted on which elements, in any order of memory."""

from __future__ import annotations

import math

import numpy as np
import oracle
import pytest
import torch

from mpisign.backends import backend_for
from mpisign.backends.host import as_words
from mpisign.bitmap.tensors import strides_of
from mpisign.exchange import rows

HOST = torch.device("cpu")
BACKEND = backend_for(HOST)

LAID: dict[str, torch.Tensor] = {
    "0-d": torch.zeros(()),
    "empty": torch.zeros(0),
    "no rows": torch.zeros(0, 64),
    "rows of nothing": torch.zeros(5, 0),
    "vector": torch.zeros(100),
    "one row": torch.zeros(1, 64),
    "rows of 63": torch.zeros(5, 63),
    "rows of 64": torch.zeros(5, 64),
    "rows of 65": torch.zeros(5, 65),
    "rows of 205": torch.zeros(7, 205),
    "rows of 8 x 8": torch.zeros(3, 8, 8),
    "transposed": torch.zeros(65, 5).t(),
    "transposed rows of 63": torch.zeros(63, 5).t(),
    "channels last": torch.zeros(3, 16, 2, 3).to(memory_format=torch.channels_last),
    "turned": torch.zeros(5, 7, 4, 11).permute(2, 0, 3, 1),
}
each = pytest.mark.parametrize("tensor", list(LAID.values()), ids=list(LAID))


def rows_of(tensor: torch.Tensor) -> int:
    """From the documentation: one index of the first dimension, or everything where that is less than 64 elements."""
    if tensor.dim() < 2 or not tensor.numel() or math.prod(tensor.shape[1:]) < 64:
        return 1
    return tensor.shape[0]


def in_memory(tensor: torch.Tensor, values: np.ndarray) -> np.ndarray:
    """``values`` in the tensor's shape, in the order in which its elements lie."""
    order = np.argsort(-np.array(tensor.stride()), kind="stable")
    return np.transpose(values, order).reshape(-1)


def row_numbers(tensor: torch.Tensor) -> np.ndarray:
    """The row of each element, in the order in which they lie."""
    numbers = np.zeros(tuple(tensor.shape), int)
    if rows_of(tensor) > 1:
        for row in range(len(numbers)):
            numbers[row] = row
    return in_memory(tensor, numbers)


@each
def test_how_many_rows(tensor: torch.Tensor) -> None:
    assert rows.count_rows(tuple(tensor.shape)) == rows_of(tensor)


@each
@pytest.mark.parametrize("density", [0.0, 0.02, 0.5, 1.0])
def test_rows_that_are_zero_throughout(tensor: torch.Tensor, density: float) -> None:
    numbers, count = row_numbers(tensor), rows_of(tensor)
    for seed in range(5):
        nonzero = np.random.default_rng(seed).random(numbers.size) < density
        words = torch.from_numpy(oracle.to_words(nonzero).view(np.int32))
        expected = [bool(numbers.size) and not nonzero[numbers == row].any() for row in range(count)]
        found = rows.zero_rows(words, tuple(tensor.shape), strides_of(tensor), BACKEND)
        assert (found is not None) == any(expected)
        if found is not None:
            assert found.tolist() == expected


@each
def test_one_element_is_enough_for_a_row(tensor: torch.Tensor) -> None:
    numbers = row_numbers(tensor)
    for element in range(0, numbers.size, 7):
        words = torch.from_numpy(oracle.to_words(np.arange(numbers.size) == element).view(np.int32))
        found = rows.zero_rows(words, tuple(tensor.shape), strides_of(tensor), BACKEND)
        expected = [row != numbers[element] for row in range(rows_of(tensor))]
        assert (found is None) == (not any(expected))
        if found is not None:
            assert found.tolist() == expected


@each
def test_the_elements_of_rows_that_speak(tensor: torch.Tensor) -> None:
    numbers = row_numbers(tensor)
    for seed in range(5):
        speak = np.random.default_rng(seed).random(rows_of(tensor)) < 0.5
        words = rows.spoken_words(speak, tuple(tensor.shape), strides_of(tensor), BACKEND, HOST)
        assert as_words(words).tolist() == oracle.to_words(speak[numbers]).tolist(), "and zeros past the last"


@each
def test_the_elements_of_several_ranks_rows(tensor: torch.Tensor) -> None:
    form = tuple(tensor.shape), strides_of(tensor)
    speak = np.random.default_rng(0).random((3, rows_of(tensor))) < 0.5
    together = rows.spoken_words(speak, *form, BACKEND, HOST)
    assert together.tolist() == [rows.spoken_words(its, *form, BACKEND, HOST).tolist() for its in speak]


@each
def test_silent_rows_are_made_zero(tensor: torch.Tensor) -> None:
    numbers = row_numbers(tensor)
    for seed in range(5):
        silent = np.random.default_rng(seed).random(rows_of(tensor)) < 0.5
        values = torch.ones(numbers.size)
        rows.silence(values, silent, tuple(tensor.shape), strides_of(tensor))
        assert values.tolist() == np.where(silent[numbers], 0.0, 1.0).tolist()


@each
def test_how_many_have_voted_on_each_element(tensor: torch.Tensor) -> None:
    numbers = row_numbers(tensor)
    for voters in (1, 2, 5):
        spoken = np.random.default_rng(voters).random((voters, rows_of(tensor))) < 0.5
        by = rows.speakers(spoken, tuple(tensor.shape), strides_of(tensor), HOST)
        assert by.dtype == torch.float32
        assert by.tolist() == spoken.sum(0)[numbers].tolist()
