"""The real CuPy on a machine without a GPU: it compiles and launches the kernels, and the shim runs them.

CuPy reaches CUDA through function pointers: the driver's are of a library that it loads by name, the runtime's of its
own module ``cupy_backends.cuda.api.runtime``. :func:`install` puts functions of this file in their places, before CuPy
is imported. Device memory is the host's, and a kernel has ended when its launch returns.

As a plugin (``python -m pytest -p fake_cuda``) it sends whatever tests give to the shim through CuPy.
"""

from __future__ import annotations

import ctypes
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import shim
import torch

from mpisign.bitmap import kernels

DEVICES, STREAMS = 2, 3
SUCCESS, INVALID_IMAGE, INVALID_HANDLE, NOT_FOUND, LAUNCH_FAILED = 0, 200, 400, 500, 719
CAPABILITY = {75: 9, 76: 0}  # cudaDevAttrComputeCapabilityMajor, ...Minor

kept: list[Any] = []  # what only C points to


class FakeCuda:
    """The driver, with two devices that have three streams each, and torch's idea of them."""

    def __init__(self) -> None:
        self.device = 0  # the current one
        self.stream = 0  # torch's current one, of every device
        self.modules: list[tuple[int, set[str]]] = []  # device and kernels
        self.functions: list[tuple[int, str]] = []  # device and name
        self.launches: list[tuple[str, int, int]] = []  # name, number of blocks, stream
        self.sizes: list[int] = []  # of the parameters of the kernel that is launched next
        self.failure = ""

    def stream_of(self, device: int) -> int:
        """A pointer; the default stream has none."""
        return self.stream and 0x1000 * (device + 1) + self.stream

    def load(self, module: Any, image: int) -> int:
        header = ctypes.string_at(image, 64)
        if header[:4] != b"\x7fELF":
            return INVALID_IMAGE
        sections = int.from_bytes(header[40:48], "little")  # their table is the last but one part of a cubin
        names = re.findall(rb"\.text\.(\w+)\0", ctypes.string_at(image, sections))
        self.modules.append((self.device, {name.decode() for name in names}))
        module[0] = len(self.modules)
        return SUCCESS

    def get_function(self, function: Any, module: int, name: bytes) -> int:
        device, names = self.modules[module - 1]
        if name.decode() not in names:
            return NOT_FOUND
        self.functions.append((device, name.decode()))
        function[0] = len(self.functions)
        return SUCCESS

    def launch(self, function: int, *rest: Any) -> int:
        *shape, shared, stream, parameters, extra = rest
        blocks, threads = shape[0], shape[3]
        device, name = self.functions[function - 1]
        if device != self.device or (stream or 0) // 0x1000 not in (0, device + 1):
            return INVALID_HANDLE
        assert (shape, shared, extra) == ([blocks, 1, 1, threads, 1, 1], 0, None)
        self.launches.append((name, blocks, stream or 0))
        sizes = (ctypes.c_size_t * len(self.sizes))(*self.sizes)
        library = shim.library(kernels.source())
        failure = library.launch(name.encode(), blocks, threads, parameters, sizes, len(sizes))
        self.failure = failure.decode() if failure else ""
        return LAUNCH_FAILED if failure else SUCCESS

    def error(self, status: int, text: Any) -> int:
        text[0] = (self.failure if status == LAUNCH_FAILED else f"error {status}").encode()
        return SUCCESS

    def set_device(self, device: int, _: int) -> int:
        self.device = device
        return SUCCESS

    @contextmanager
    def torch_device(self, device: torch.device) -> Iterator[None]:
        before, self.device = self.device, device.index
        yield
        self.device = before

    def torch_stream(self, device: torch.device) -> Any:
        return SimpleNamespace(cuda_stream=self.stream_of(device.index))


def install() -> FakeCuda:
    """Put a fake in the places of CUDA and of what mpisign.bitmap.kernels asks torch. For a process of its own."""
    fake = FakeCuda()
    _install_driver(fake)
    _install_runtime(fake)
    torch.cuda.device, torch.cuda.current_stream = fake.torch_device, fake.torch_stream  # type: ignore
    return fake


def _install_driver(fake: FakeCuda) -> None:
    from cupy_backends.cuda import _softlink

    def function(call: Callable[..., int], *parameters: Any) -> Any:
        return ctypes.CFUNCTYPE(ctypes.c_int, *parameters)(call)

    pointer, text = ctypes.c_void_p, ctypes.c_char_p
    pointers, texts = ctypes.POINTER(pointer), ctypes.POINTER(text)
    driver = SimpleNamespace(
        cuGetErrorName=function(fake.error, ctypes.c_int, texts),
        cuGetErrorString=function(fake.error, ctypes.c_int, texts),
        cuModuleLoadData=function(fake.load, pointers, pointer),
        cuModuleUnload=function(lambda module: 0, pointer),
        cuModuleGetFunction=function(fake.get_function, pointers, pointer, text),
        cuLaunchKernel=function(fake.launch, pointer, *[ctypes.c_uint] * 7, pointer, pointers, pointer),
    )

    def load(name: str | None, **options: Any) -> Any:
        return driver if name == "libcuda.so.1" else ctypes.CDLL(name, **options)

    _softlink.ctypes = SimpleNamespace(CDLL=load, addressof=ctypes.addressof)


def _install_runtime(fake: FakeCuda) -> None:
    """Cython's modules call each other through capsules, whose names are the functions' types."""
    from cupy_backends.cuda.api import runtime

    name_of, capsule = ctypes.pythonapi.PyCapsule_GetName, ctypes.pythonapi.PyCapsule_New
    name_of.restype, name_of.argtypes = ctypes.c_char_p, [ctypes.py_object]
    capsule.restype, capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]

    def put(name: str, call: Callable[..., Any], result: Any, parameters: int) -> None:
        kind = name_of(runtime.__pyx_capi__[name])
        function = ctypes.PYFUNCTYPE(result, *[ctypes.c_int] * parameters)(call)
        kept.extend((kind, function))
        runtime.__pyx_capi__[name] = capsule(ctypes.cast(function, ctypes.c_void_p), kind, None)

    # Any object will do for one that is ignored, except for None: ctypes takes back its reference to that.
    put("getDevice", lambda _: fake.device, ctypes.c_int, 1)
    put("getDeviceCount", lambda _: DEVICES, ctypes.c_int, 1)
    put("setDevice", fake.set_device, ctypes.py_object, 2)
    put("deviceGetAttribute", lambda attribute, device, _: CAPABILITY[attribute], ctypes.c_int, 3)
    put("_ensure_context", lambda: SUCCESS, ctypes.py_object, 0)


# ---------------------------------------------------------------------------------------------- as a plugin


def pytest_configure(config: pytest.Config) -> None:
    fake, through_cupy = install(), kernels.launch
    turns = itertools.cycle(itertools.product(range(DEVICES), range(STREAMS)))

    def launch(name: str, blocks: int, arguments: Sequence[Any], device: torch.device) -> None:
        """On every device and stream by turns, while another device is current."""
        there, fake.stream = next(turns)
        fake.device = DEVICES - 1 - there
        fake.sizes = [np.asarray(argument).nbytes for argument in arguments]
        through_cupy(name, blocks, arguments, torch.device("cuda", there))
        assert fake.launches[-1] == (name, blocks, fake.stream_of(there))
        assert fake.device == DEVICES - 1 - there

    shim.launch = launch
    config.stash[FAKE] = fake


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    fake = config.stash[FAKE]
    missing = {name for _, names in fake.modules for name in names} - {name for name, *_ in fake.launches}
    terminalreporter.write_line(f"kernels that were not launched: {', '.join(sorted(missing)) or 'none'}")


FAKE = pytest.StashKey[FakeCuda]()
