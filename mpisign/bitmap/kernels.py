"""The .cu files: how they are compiled, how their kernels are launched, and the parameters they take.

CuPy compiles them the first time a CUDA tensor is voted on, in a few seconds, and keeps the binary for later
processes in ``~/.cupy/kernel_cache`` (or ``$CUPY_CACHE_DIR``). Nothing here imports it before.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mpisign.errors import GradientError

__all__ = [
    "BITMAPS",
    "BITMAP_CAPACITY",
    "FORMATS",
    "HALF_TENSORS",
    "JOB",
    "JOB_ELEMENTS",
    "MOMENTUM_CAPACITY",
    "NONE",
    "OPTIONS",
    "PLANES",
    "SOURCES",
    "TENSORS",
    "TENSOR_CAPACITY",
    "THREADS",
    "TIES",
    "VECTORS",
    "VECTOR_CAPACITY",
    "WORDS",
    "ZEROS",
    "address",
    "cell",
    "first",
    "flag",
    "import_cupy",
    "launch",
    "opaque",
    "source",
    "stream",
]

SOURCES = tuple(
    Path(__file__).with_name(f"{part}.cu")
    for part in ("common", "pack", "momentum", "unpack", "apply", "finite", "count")
)
"""The files that are one program, in this order: each uses what those before it define."""

THREADS = 256  # of a block, in every kernel
JOB_ELEMENTS = 16384  # what a block packs or unpacks: 16 tiles, two for each of its warps
PLANES = (2, 3, 4, 6, 8, 16)  # of the counters that there are kernels for

# How many fit into the 4 KB that the parameters of a launch may take, besides the other parameters.
TENSOR_CAPACITY = 448
MOMENTUM_CAPACITY = TENSOR_CAPACITY // 2  # tensors with their momenta
VECTOR_CAPACITY = 192
BITMAP_CAPACITY = 448

NONE = 2**31 - 1
"""The place of a tensor that there is not."""

FORMATS = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
WORDS = (torch.int32, torch.uint32)  # the types a word may have
ZEROS = {"coin": 1, "positive": 2, "abstain": 4, "rows": 5}  # bits: toss coins, vote +1, write the second plane
TIES = {"coin": 0, "positive": 1, "zero": 2}

OPTIONS = (
    "-std=c++17",
    f"-DTHREADS={THREADS}",
    f"-DJOB_ELEMENTS={JOB_ELEMENTS}",
    f"-DTENSOR_CAPACITY={TENSOR_CAPACITY}",
    f"-DMOMENTUM_CAPACITY={MOMENTUM_CAPACITY}",
    f"-DVECTOR_CAPACITY={VECTOR_CAPACITY}",
    f"-DBITMAP_CAPACITY={BITMAP_CAPACITY}",
    *(f"-D{str(dtype).removeprefix('torch.').upper()}={code}" for dtype, code in FORMATS.items()),
    *(f"-DZEROS_{policy.upper()}={code}" for policy, code in ZEROS.items()),
    *(f"-DTIES_{policy.upper()}={code}" for policy, code in TIES.items()),
)
"""The options with which they are compiled, here and in tests."""

# common.cu's structures of the same names. One of them, passed by value, is an array of shape (1,).
JOB = np.dtype(
    [("words", "u8"), ("nonzero", "u8"), ("first_word", "u8"), ("start", "u8"), ("tensor", "u4"), ("elements", "u4")]
)
TENSORS, HALF_TENSORS = (
    np.dtype([("at", "u8", capacity), ("format", "u1", capacity)]) for capacity in (TENSOR_CAPACITY, MOMENTUM_CAPACITY)
)
VECTORS = np.dtype(
    [
        ("at", "u8", VECTOR_CAPACITY),
        ("elements", "u8", VECTOR_CAPACITY),
        ("first_block", "u4", VECTOR_CAPACITY),
        ("format", "u1", VECTOR_CAPACITY),
    ]
)
BITMAPS = np.dtype([("at", "u8", BITMAP_CAPACITY)])


@functools.cache
def source() -> str:
    """The text of all :data:`SOURCES`, with lines that make compilers' messages point into the files."""
    return "".join(f'#line 1 "{path}"\n{path.read_text()}' for path in SOURCES)


def launch(name: str, blocks: int, arguments: Sequence[Any], device: torch.device) -> None:
    """Start ``blocks`` blocks of a kernel on torch's current stream of ``device``, and return at once.

    Args:
        name: of the kernel.
        blocks: at least 1.
        arguments: NumPy scalars of the parameters' sizes (addresses are uint64), and arrays of shape (1,) for
            structures. They are copied before this returns.
        device: where all addresses are; it is selected for the launch, whatever the current device is.

    Raises:
        GradientError: CuPy is not installed.
    """
    kernel = _kernel(name, device)
    # CUDA has one current device a thread, the same for torch and for CuPy.
    with torch.cuda.device(device), stream(device):
        kernel((blocks,), (THREADS,), tuple(arguments))


def stream(device: torch.device) -> Any:
    """torch's current stream of ``device`` as CuPy's, a context in which CuPy's work goes there."""
    return _stream(torch.cuda.current_stream(device).cuda_stream, device)


def address(bitmap: torch.Tensor | None, k: int, device: torch.device) -> np.uint64:
    """Where a bitmap of ``k`` words lies on ``device``, 0 for None.

    Raises:
        ValueError: it is not one, or elsewhere: nobody else would notice before a kernel has read or written there.
    """
    if bitmap is not None and not (
        bitmap.dtype in WORDS and bitmap.shape == (k,) and bitmap.is_contiguous() and bitmap.device == device
    ):
        raise ValueError(
            f"a bitmap of {k} contiguous 32-bit words on {device} is needed, not {bitmap.dtype} {tuple(bitmap.shape)} "
            f"on {bitmap.device}"
        )
    pointer: np.uint64 = np.uint64(0 if bitmap is None else bitmap.data_ptr())
    return pointer


def cell(tensor: torch.Tensor, dtype: torch.dtype, device: torch.device, elements: int = 1) -> np.uint64:
    """Where numbers lie that a kernel changes. Raises ValueError if they are others: it would write beside them."""
    if tensor.dtype != dtype or tensor.device != device or tensor.numel() != elements or not tensor.is_contiguous():
        raise ValueError(
            f"{elements} of {dtype} on {device} are needed, not {tuple(tensor.shape)} of {tensor.dtype} on "
            f"{tensor.device}"
        )
    pointer: np.uint64 = np.uint64(tensor.data_ptr())
    return pointer


def opaque(structure: npt.NDArray[np.void]) -> npt.NDArray[np.void]:
    """The same memory, (1,), as bytes without fields: CuPy would describe those to itself at every launch, in 3 us."""
    return structure.view(f"V{structure.itemsize}")


def flag(device: torch.device) -> torch.Tensor:
    """A 0-d bool, True until a kernel finds a NaN or Inf."""
    return torch.ones((), dtype=torch.bool, device=device)


def first(device: torch.device) -> torch.Tensor:
    """A 0-d int32, :data:`NONE` until a kernel finds a NaN or Inf, then the place of the first tensor that has one."""
    return torch.full((), NONE, dtype=torch.int32, device=device)


def import_cupy() -> Any:
    """The module ``cupy``. Raises :class:`GradientError`, saying what to install, if it cannot be imported."""
    try:
        return importlib.import_module("cupy")
    except OSError as failed:
        raise GradientError(
            f"CuPy cannot make a folder for compiled kernels ({failed}): export CUPY_CACHE_DIR=/tmp/$USER-cupy, or any "
            f"other folder that can be written to"
        ) from failed
    except ImportError as failed:
        major = (torch.version.cuda or "").partition(".")[0]
        extra = f"'.[cuda{major}]'" if major in ("12", "13") else "'.[cuda12]' or '.[cuda13]'"
        raise GradientError(
            f"CUDA tensors are voted on with CuPy, which cannot be imported ({failed}); "
            f"in the checkout: pip install {extra}, or move the model with model.cpu()"
        ) from failed


@functools.cache
def _kernel(name: str, device: torch.device) -> Any:
    cupy = import_cupy()
    with torch.cuda.device(device):  # it is compiled for the current device, or taken from the cache on disk
        return cupy.RawModule(code=source(), options=OPTIONS).get_function(name)


@functools.cache  # torch takes its streams from a pool of a few dozen, which live as long as the process
def _stream(pointer: int, device: torch.device) -> Any:
    streams = import_cupy().cuda
    if hasattr(streams.Stream, "from_external"):  # since CuPy 14, which deprecates the other
        with torch.cuda.device(device):
            return streams.Stream.from_external(_TorchStream(pointer))
    return streams.ExternalStream(pointer, device.index)


class _TorchStream:
    """The CUDA stream protocol, which the streams of older torches do not have."""

    def __init__(self, pointer: int) -> None:
        self._pointer = pointer

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._pointer
