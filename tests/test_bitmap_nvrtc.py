"""The kernels compile for every GPU they are meant for, without warnings and without spilling registers; needs none."""

from __future__ import annotations

import ctypes
import functools
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from mpisign.bitmap import kernels

# CUDA 13 does not know Volta any more.
ARCHITECTURES = {"sm_70": 12, "sm_80": 13, "sm_90": 13, "sm_100": 13, "sm_120": 13}

AS_CUPY_DOES = ("-ftz=true", "--device-as-default-execution-space")
VERBOSE = "--ptxas-options=-v"

ENTRY = r"ptxas info +: Compiling entry function '(\w+)' for 'sm_\d+'\n"
PROPERTIES = r"ptxas info +: Function properties for \1\n"
USAGE = r"ptxas +\. +(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n"


@functools.cache
def nvrtc(major: int) -> ctypes.CDLL:
    """The compiler of CUDA 12 or 13, from PyPI."""
    package = find_spec("nvidia")
    folders = [Path(folder) for folder in package.submodule_search_locations or []] if package else []
    found = [library for folder in folders for library in folder.glob(f"*/lib/libnvrtc.so.{major}")]
    name = "nvidia-cuda-nvrtc" + ("" if major > 12 else f"-cu{major}")
    assert found, f"there is no libnvrtc.so.{major}: pip install {name}"
    for part in found[0].parent.glob("libnvrtc-builtins.so*"):
        ctypes.CDLL(str(part))  # which it would look for in the system's folders, unless it is there
    return ctypes.CDLL(str(found[0]))


def compile_for(major: int, text: str, *options: str, result: str = "ProgramLog") -> tuple[bool, str]:
    """Whether the compiler makes a binary, and all it says, or another ``result``."""
    library, program = nvrtc(major), ctypes.c_void_p()
    assert library.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"program.cu", 0, None, None) == 0
    arguments = [option.encode() for option in (*kernels.OPTIONS, *AS_CUPY_DOES, *options)]
    failed = library.nvrtcCompileProgram(program, len(arguments), (ctypes.c_char_p * len(arguments))(*arguments))
    size = ctypes.c_size_t()
    getattr(library, f"nvrtcGet{result}Size")(program, ctypes.byref(size))
    said = ctypes.create_string_buffer(size.value)
    getattr(library, f"nvrtcGet{result}")(program, said)
    library.nvrtcDestroyProgram(ctypes.byref(program))
    return not failed, said.value.decode()


def usage(log: str) -> dict[str, tuple[int, ...]]:
    """(bytes of stack, spilled, reloaded) of every kernel."""
    return {name: tuple(map(int, numbers)) for name, *numbers in re.findall(ENTRY + PROPERTIES + USAGE, log)}


def complaints(log: str) -> list[str]:
    """What is no mere information. (That Volta is deprecated is true, and not about us.)"""
    return [
        line for line in log.split("\n") if line.strip("\0 ") and not re.match(r"ptxas (info|  )|.*deprecated", line)
    ]


def expected_kernels() -> set[str]:
    counting = {
        f"{name}_{planes}"
        for name in ("majority", "majority_abstain", "count", "add_counts")
        for planes in kernels.PLANES
    }
    return counting | {
        "pack_one",
        "pack_many",
        "pack_momentum",
        "unpack_one",
        "unpack_many",
        "apply_many",
        "first_bad",
        "agreement",
        "any_zero",
        "decide_counts",
    }


@pytest.mark.long
@pytest.mark.parametrize(
    "architecture",
    ARCHITECTURES,
)
def test_compiles_without_warnings_and_spills(architecture: str) -> None:
    done, log = compile_for(ARCHITECTURES[architecture], kernels.source(), f"-arch={architecture}", VERBOSE)
    assert done, log
    assert not complaints(log)
    assert usage(log) == dict.fromkeys(expected_kernels(), (0, 0, 0))


@pytest.mark.parametrize("major", [12, 13])
def test_spills_and_warnings_would_be_seen(major: int) -> None:
    text = """
    extern "C" __global__ void spills(int* x) {
        int unused, kept[60];
        for (int i = 0; i < 60; ++i) kept[i] = x[i];
        __syncthreads();
        for (int i = 0; i < 60; ++i) x[i * kept[59 - i]] = kept[i];
    }
    """
    done, log = compile_for(major, text, "-arch=sm_90", "-maxrregcount=24", VERBOSE)
    assert done, log
    assert any("unused" in line for line in complaints(log))
    stack, stores, loads = usage(log)["spills"]
    assert min(stack, stores, loads) > 0


@pytest.mark.long
def test_denormals_are_not_flushed() -> None:
    """CuPy's flags ask for it. What may be flushed here are four rates and a weight less 1, which are no denormals."""
    done, ptx = compile_for(13, kernels.source(), "-arch=compute_90", result="PTX")
    assert done
    arithmetic = set(re.findall(r"^\s*((?!mov|ld|st|selp)[a-z]+\.[\w.]*f(?:16|32|64)\b)", ptx, re.MULTILINE))
    assert {one for one in arithmetic if ".ftz" in one} == {"cvt.rn.ftz.f32.f64", "add.ftz.f32", "setp.lt.ftz.f32"}
    others = {"fma.rn.f32", "fma.rn.f64", "add.f64", "setp.lt.f64", "setp.neu.f64"}
    assert {one for one in arithmetic if ".ftz" not in one} == others


@pytest.mark.parametrize("major", [12, 13])
def test_messages_point_into_the_files(major: int) -> None:
    for path in kernels.SOURCES:
        right = path.read_text()
        done, log = compile_for(major, kernels.source().replace(right, right + "nonsense\n"), "-arch=sm_90")
        assert not done
        assert f"{path}({right.count(chr(10)) + 1}): error" in log
