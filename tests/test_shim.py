"""The shim notices what a GPU would not survive: each of these breaks a kernel in one place."""

from __future__ import annotations

import numpy as np
import pytest
import shim
import torch

from mpisign.bitmap import cuda, kernels

pytestmark = [pytest.mark.skipif(not shim.COMPILER, reason="needs a C++ compiler"), pytest.mark.long]

CPU = torch.device("cpu")


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch):
    """Puts a changed text in the place of the right one."""
    right = kernels.source()

    def broken(old: str, new: str) -> None:
        assert right.count(old) == 1
        monkeypatch.setattr(kernels, "source", lambda: right.replace(old, new))
        monkeypatch.setattr(kernels, "launch", shim.launch)

    return broken


def pack(n: int, offset: int = 0) -> None:
    cuda.pack(torch.ones(n + offset)[offset:], torch.zeros((n + 31) // 32, dtype=torch.uint32))


def test_misaligned_access(broken) -> None:
    broken(
        "bool aligned() const { return (u64)values % 16 == 0; }",
        "bool aligned() const { return (u64)values % 4 == 0; }",
    )
    pack(1024)
    with pytest.raises(RuntimeError, match="pack_one: access to misaligned memory"):
        pack(1024, offset=1)
    pack(1024)  # the shim itself recovers


def test_lanes_that_end_early(broken) -> None:
    broken("    u32 bad = 0;\n#pragma unroll 1", "    u32 bad = 0;\n    if (lane == 7) return false;\n#pragma unroll 1")
    with pytest.raises(RuntimeError, match="pack_one: lanes of a warp have ended while others wait for them"):
        pack(1024)


def test_lanes_that_wait_for_different_things(broken) -> None:
    broken(
        "    u32 bad = 0;\n#pragma unroll 1", "    u32 bad = 0;\n    if (lane == 7) __syncthreads();\n#pragma unroll 1"
    )
    with pytest.raises(RuntimeError, match="pack_one: lanes of a warp wait in different operations"):
        pack(1024)


def test_warps_that_miss_the_barrier(broken) -> None:
    broken("    __syncthreads();", "    if (threadIdx.x < 64) __syncthreads();")
    with pytest.raises(RuntimeError, match="agreement: warps of a block have ended while others wait at a barrier"):
        cuda.agreement(*torch.zeros(2, 1, dtype=torch.uint32), 32)


def test_a_mask_that_leaves_lanes_out(broken) -> None:
    broken("constexpr u32 ALL = 0xffffffffu;", "constexpr u32 ALL = 0xfffffffeu;")
    with pytest.raises(RuntimeError, match="pack_one: a mask without all lanes"):
        pack(1024)


def test_arguments_of_other_sizes_and_numbers() -> None:
    right = [np.uint64(0), np.uint32(0), np.uint64(0), np.uint64(0), np.uint64(0)]
    with pytest.raises(RuntimeError, match="unpack_one: argument 1 has 8 bytes instead of 4"):
        shim.launch("unpack_one", 1, [right[0], np.uint64(0), *right[2:]], CPU)
    with pytest.raises(RuntimeError, match="unpack_one: another number of arguments"):
        shim.launch("unpack_one", 1, right[1:], CPU)
    with pytest.raises(RuntimeError, match="pack_two: no such kernel"):
        shim.launch("pack_two", 1, right, CPU)
    with pytest.raises(RuntimeError, match="unpack_one: no launch of this shape"):
        shim.launch("unpack_one", 0, right, CPU)
