"""mpisign.bitmap.tensors: every dense tensor is seen as a vector in its own memory, without a copy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mpisign.bitmap.tensors import DTYPES, flat, format_of, is_dense, is_laid_as, raw_bits, strides_of

DENSE = {
    "0-d": torch.zeros(()),
    "vector": torch.zeros(5),
    "slice": torch.zeros(9)[2:7],
    "matrix": torch.zeros(3, 4),
    "transposed": torch.zeros(3, 4).t(),
    "permuted": torch.zeros(2, 3, 4).permute(1, 2, 0),
    "channels_last": torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "size-1 dimensions of any stride": torch.zeros(40).as_strided((1, 4, 1, 3), (17, 3, 23, 1)),
    "no elements": torch.zeros(3, 0, 2),
    "no elements, odd strides": torch.zeros(40).as_strided((0, 4), (7, 3)),
}
NOT_DENSE = {
    "every other": torch.zeros(8)[::2],
    "columns": torch.zeros(4, 4)[:, :2],
    "expanded": torch.zeros(3, 1).expand(3, 4),
    "expanded 0-d": torch.zeros(()).expand(5),
    "overlapping": torch.zeros(6).as_strided((3, 3), (1, 1)),
}


def named(tensors: dict[str, torch.Tensor]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("tensor", tensors.values(), ids=tensors)


@named(DENSE)
def test_dense_goes_in_the_order_of_its_memory(tensor: torch.Tensor) -> None:
    assert is_dense(tensor)
    assert is_laid_as(tensor, strides_of(tensor))


@named(NOT_DENSE)
def test_not_dense_goes_in_row_major_order(tensor: torch.Tensor) -> None:
    assert not is_dense(tensor)
    assert strides_of(tensor) == torch.empty(tensor.shape).stride()
    assert not is_laid_as(tensor, strides_of(tensor))


def test_the_stride_of_a_single_element_says_nothing() -> None:
    """Torch picks it at will; the wire and the fingerprint must not depend on it."""
    one, other = (torch.zeros(99).as_strided((1, 4, 1, 3), (a, 3, b, 1)) for a, b in ((12, 3), (17, 23)))
    assert strides_of(one) == strides_of(other)
    assert is_laid_as(one, strides_of(other))
    assert not is_laid_as(one, strides_of(torch.zeros(3, 4).t()[None, :, None, :]))


@named(DENSE)
def test_flat_is_the_memory_itself_in_its_order(tensor: torch.Tensor) -> None:
    vector = flat(tensor)
    assert vector.shape == (tensor.numel(),)
    vector.copy_(torch.arange(tensor.numel()))
    for index in np.ndindex(*tensor.shape):
        place = sum(i * stride for i, stride in zip(index, tensor.stride(), strict=True))
        assert tensor[index] == place


def test_flat_of_a_parameter_needs_no_gradient() -> None:
    parameter = torch.nn.Parameter(torch.ones(2, 3))
    assert not flat(parameter).requires_grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_raw_bits_share_the_memory(dtype: torch.dtype) -> None:
    vector = torch.tensor([1.0, -2.0, 0.5], dtype=dtype)
    bits = raw_bits(vector)
    assert bits.dtype == format_of(dtype).bits
    bits ^= bits.dtype.type(format_of(dtype).sign)
    assert vector.tolist() == [-1.0, 2.0, -0.5]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_formats_are_torch_s(dtype: torch.dtype) -> None:
    fmt = format_of(dtype)
    vector = torch.tensor([1.0, math.inf, -0.0], dtype=dtype)
    assert raw_bits(vector).tolist() == [fmt.one, fmt.infinity, fmt.sign]
    assert fmt.name == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e5m2], ids=str)
def test_other_types_have_no_format(dtype: torch.dtype) -> None:
    with pytest.raises(KeyError):
        format_of(dtype)
