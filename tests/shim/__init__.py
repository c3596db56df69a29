"""The .cu files on a machine without a GPU: the very text, compiled for the host and called as CuPy would call it.

``cuda.h`` has the part of CUDA that they use, ``shim.cpp`` runs a block's threads in lockstep. Tests put
:func:`launch` in the place of :func:`mpisign.bitmap.kernels.launch` and pass CPU tensors.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mpisign.bitmap import kernels

FOLDER = Path(__file__).parent
PARAMETER_BYTES = 4096  # what every driver takes
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")


def launch(name: str, blocks: int, arguments: Sequence[Any], device: torch.device) -> None:
    """Run a kernel to its end; the arguments are those of :func:`mpisign.bitmap.kernels.launch`.

    Raises:
        RuntimeError: the kernel does what a GPU would not survive, or an argument is not what it takes.
    """
    assert device.type == "cpu"
    holders = [np.atleast_1d(np.asarray(argument)) for argument in arguments]
    addresses = (ctypes.c_void_p * len(holders))(*(holder.ctypes.data for holder in holders))
    assert sum(-(-holder.nbytes // 8) * 8 for holder in holders) <= PARAMETER_BYTES, "too much for a launch"
    sizes = (ctypes.c_size_t * len(holders))(*(holder.nbytes for holder in holders))
    failure = library(kernels.source()).launch(name.encode(), blocks, kernels.THREADS, addresses, sizes, len(holders))
    if failure is not None:
        raise RuntimeError(failure.decode())


@functools.cache
def library(source: str) -> ctypes.PyDLL:
    """CUDA C++ compiled with the shim, or the library that an earlier run has made of the same texts."""
    assert COMPILER, "there is no C++ compiler"
    texts = [source, *((FOLDER / name).read_text() for name in ("cuda.h", "shim.cpp", "__init__.py"))]
    digest = hashlib.blake2b("\0".join([*texts, repr(kernels.OPTIONS)]).encode())
    built = Path(tempfile.gettempdir()) / f"mpisign-shim-{os.getuid()}-{digest.hexdigest()[:16]}.so"
    if not built.exists():
        partial = built.with_suffix(f".{os.getpid()}")  # another process may be compiling it too
        flags = ["-O1", "-shared", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-U_FORTIFY_SOURCE"]
        program = partial.with_suffix(f"{partial.suffix}.cu")
        program.write_text(source)
        command = [COMPILER, *kernels.OPTIONS, *flags, f'-DBITMAP_CU="{program}"', f"{FOLDER}/shim.cpp"]
        subprocess.run([*command, "-o", str(partial)], check=True)
        program.unlink()
        partial.replace(built)
    loaded = ctypes.PyDLL(str(built))  # which keeps other Python threads out, as there is one set of fibers
    loaded.launch.argtypes = [
        ctypes.c_char_p,
        ctypes.c_uint,
        ctypes.c_uint,
        ctypes.POINTER(ctypes.c_void_p),
        ctypes.POINTER(ctypes.c_size_t),
        ctypes.c_size_t,
    ]
    loaded.launch.restype = ctypes.c_char_p
    return loaded
