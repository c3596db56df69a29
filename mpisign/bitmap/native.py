"""Loads ``libmpisign.so``, which setup.py compiles from ``native.c`` where there is a C compiler.

It is a plain shared library, called by ctypes, which lets go of the interpreter's lock: one file for every Python.
``MPISIGN_NATIVE=0`` leaves it alone, as does whatever keeps it from being loaded; NumPy does its work then.
"""

from __future__ import annotations

import ctypes
import functools
import os
import zlib
from pathlib import Path

import torch

__all__ = ["LIBRARY", "PIECE", "SOURCES", "VARIABLE", "absence", "choose", "library"]

VARIABLE = "MPISIGN_NATIVE"
LIBRARY = Path(__file__).with_name("libmpisign.so")
SOURCES = (Path(__file__).with_name("native.c"), Path(__file__).with_name("native_loops.h"))

PIECE = 1 << 16
"""Elements that a thread takes at once."""

_POINTER, _U32, _U64, _DOUBLE = ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint64, ctypes.c_double
_TENSORS = [_U64, _POINTER, _POINTER]
_PACKED = [_POINTER, _POINTER, _POINTER, _U32, _U64, _U32]
_SIGNATURES: dict[str, tuple[type | None, list[type]]] = {
    "sources": (_U32, []),
    "choose": (ctypes.c_char_p, [_U32]),
    "pack": (_U64, [*_TENSORS, _POINTER, _POINTER, *_PACKED]),
    "pack_average": (_U64, [*_TENSORS, _POINTER, _POINTER, _POINTER, _POINTER, _DOUBLE, _DOUBLE, _DOUBLE, *_PACKED]),
    "unpack": (None, [*_TENSORS, _POINTER, _POINTER, _POINTER, _POINTER, _U32]),
    "apply": (None, [*_TENSORS, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _U32]),
    "majority": (_U64, [_U64, _POINTER, _POINTER, _U64, _POINTER, _POINTER, _U32, _U64, _U64, _U32]),
    "count": (None, [_U64, _U32, _POINTER, _U64, _POINTER, _U64, _U32, _U32]),
    "decide_counts": (
        _U64,
        [_U32, _U32, _U64, _POINTER, _U64, _POINTER, _POINTER, _U32, _U64, _U64, _U32],
    ),
}


class Functions:
    """The library's functions, by their names without ``mpisign_``."""

    def __init__(self, path: Path) -> None:
        loaded = ctypes.CDLL(str(path))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(loaded, f"mpisign_{name}")
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)

    def __getattr__(self, name: str) -> ctypes._FuncPointer:  # for mypy: all are set above
        raise AttributeError(name)


def checksum() -> int:
    """Of the sources, as setup.py gives it to the compiler."""
    value = 0
    for path in SOURCES:
        value = zlib.crc32(path.read_bytes(), value)
    return value


@functools.cache
def _loaded() -> Functions | str:
    """The library, or why there is none."""
    if os.environ.get(VARIABLE, "1") == "0":
        return f"{VARIABLE} is 0"
    if not LIBRARY.exists():
        return "it was not compiled when mpisign was installed"
    try:
        functions = Functions(LIBRARY)
        same = functions.sources() == checksum()
    except (OSError, AttributeError) as error:
        return f"it cannot be loaded ({error})"
    if not same:
        return "it was compiled from other sources than those that lie beside it"
    functions.choose(_BEST)
    return functions


_BEST = 9  # more than there are


def library() -> Functions | None:
    """What was compiled, if it is there and may be used."""
    loaded = _loaded()
    return loaded if isinstance(loaded, Functions) else None


def absence() -> str | None:
    """Why there is no :func:`library`; None if there is one."""
    loaded = _loaded()
    return loaded if isinstance(loaded, str) else None


def choose(most: int = _BEST) -> str:
    """Take the loops for a generation of processors (0 runs on all), or for the best that this one is of.

    Returns:
        Its name. The bits are the same.
    """
    functions = library()
    if functions is None:
        raise RuntimeError(f"no compiled library: {absence()}")
    name: bytes = functions.choose(most)
    return name.decode()


def threads() -> int:
    """How many may work on a large tensor: as many as torch would take."""
    return torch.get_num_threads()
