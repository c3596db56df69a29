"""Torch tensors as the flat vectors and raw bits that :mod:`mpisign.bitmap.host` works on, without a copy."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from mpisign.bitmap.host import FORMATS, FloatFormat

__all__ = ["DTYPES", "flat", "format_of", "is_dense", "is_laid_as", "raw_bits", "strides_of", "unreadable"]

DTYPES: dict[torch.dtype, FloatFormat] = {
    torch.float32: FORMATS["float32"],
    torch.float64: FORMATS["float64"],
    torch.float16: FORMATS["float16"],
    torch.bfloat16: FORMATS["bfloat16"],
}
_UNSIGNED: dict[int, type[np.unsignedinteger]] = {2: np.uint16, 4: np.uint32, 8: np.uint64}


def format_of(dtype: torch.dtype) -> FloatFormat:
    """The :class:`FloatFormat` of a torch dtype. Raises KeyError if it is not a float we vote on."""
    return DTYPES[dtype]


def unreadable(tensor: torch.Tensor) -> str:
    """Why a tensor's elements are not numbers in memory that can be copied, for "it is ...", or ""."""
    if torch.nn.parameter.is_lazy(tensor):
        return "of a lazy module that has seen no batch yet: run one through the model first"
    if tensor.layout != torch.strided or tensor.is_nested:
        return f"{'nested' if tensor.is_nested else tensor.layout}, not dense: use .to_dense(), or sparse=False"
    if tensor.is_quantized:
        return f"quantized ({tensor.dtype}): use .dequantize()"
    if tensor.is_meta:
        return "on the meta device, without elements: use model.to_empty(device=...) first"
    return ""


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements fill one gapless block of memory in some order of the dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return tensor.numel() == 0
        expected *= size
    return True


def strides_of(parameter: torch.Tensor) -> tuple[int, ...]:
    """The strides that fix the order of a parameter's elements on the wire.

    Its own where it is dense (channels-last weights need no copy), else those of a contiguous tensor. The stride
    of a dimension of size 1 says nothing, and torch picks it at will: it is 1 here.
    """
    if is_dense(parameter):
        return tuple(1 if n == 1 else stride for n, stride in zip(parameter.shape, parameter.stride(), strict=True))
    strides, step = [], 1
    for size in reversed(parameter.shape):
        strides.append(1 if size == 1 else step)
        step *= size
    return tuple(reversed(strides))


def is_laid_as(tensor: torch.Tensor, strides: tuple[int, ...]) -> bool:
    """Whether a tensor's elements lie in the order of ``strides``, without gaps."""
    mine = tensor.stride()
    return mine == strides or all(size == 1 or a == b for size, a, b in zip(tensor.shape, mine, strides, strict=True))


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """A dense tensor's elements as a vector (n,) in memory order, sharing its memory."""
    return torch.as_strided(tensor.detach(), (tensor.numel(),), (1,), tensor.storage_offset())


def raw_bits(vector: torch.Tensor) -> npt.NDArray[np.unsignedinteger]:
    """The raw bits of a flat CPU vector (n,), sharing its memory."""
    if vector.dtype == torch.bfloat16:  # which NumPy does not know
        vector = vector.view(torch.int16)
    values: npt.NDArray[np.generic] = vector.numpy()
    bits: npt.NDArray[np.unsignedinteger] = values.view(_UNSIGNED[values.itemsize])
    return bits
