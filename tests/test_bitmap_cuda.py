"""The CUDA backend, mpisign.bitmap.cuda, .batch and .kernels besides the bits: what accumulates, waits, is refused."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import shim
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mpisign.backends.cuda import BACKEND as CUDA
from mpisign.bitmap import cuda, kernels
from mpisign.bitmap.batch import Batch
from mpisign.errors import GradientError

needs_compiler = pytest.mark.skipif(not shim.COMPILER, reason="needs a C++ compiler")


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Kernels run on the host; (name, blocks) of each launch."""
    seen: list[tuple[str, int]] = []

    def launch(name: str, blocks: int, arguments: Sequence[Any], device: torch.device) -> None:
        seen.append((name, blocks))
        shim.launch(name, blocks, arguments, device)

    monkeypatch.setattr(kernels, "launch", launch)
    return seen


def words(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


# --------------------------------------------------------------------------------------------- what adds up


@needs_compiler
def test_a_flag_given_stays_false(launches: list[tuple[str, int]]) -> None:
    good, bad, bitmap, flag = torch.ones(3), torch.tensor([1.0, torch.nan, 1.0]), words(0), torch.tensor(True)
    assert cuda.pack(good, bitmap, finite=flag) is flag
    assert flag
    cuda.pack(bad, bitmap, finite=flag)
    assert not flag
    cuda.pack(good, bitmap, finite=flag)
    assert not flag


@needs_compiler
def test_a_batch_tells_the_first_bad_tensor_of_its_last_packing_in_one_place(launches: list[tuple[str, int]]) -> None:
    batch, kept = Batch([3], [words(0)]), [torch.ones(3)]
    told = batch.pack([torch.full((3,), torch.nan)])
    assert told == 0
    assert batch.pack([torch.ones(3)]) is told
    assert told == kernels.NONE
    assert batch.pack_momentum([torch.full((3,), torch.inf)], kept, (0.5, 0.5)) is told
    assert told == 0
    assert batch.pack_momentum([torch.ones(3)], kept, (0.5, 0.5)) is told
    assert told == kernels.NONE


class NumbersAsked(TorchDispatchMode):
    """How often a tensor was made a number, for which one waits on a GPU."""

    times = 0

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.times += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@needs_compiler
def test_nothing_waits_for_a_result(launches: list[tuple[str, int]]) -> None:
    """Besides what must be known at once, and says so by being a bool."""
    planes = torch.zeros(3, 1, dtype=torch.int32)
    values: list[torch.Tensor | None] = [None, torch.ones(3)]
    bitmaps = CUDA.bitmaps([3, 3], [planes[0], planes[1]], [None, planes[2]], [0, 1])
    with NumbersAsked() as asked:
        assert CUDA.any_zero(planes[0])
        assert asked.times == 1, "the measure sees it"
        CUDA.first_bad(values)
        CUDA.all_finite(torch.ones(3))
        CUDA.pack(torch.ones(3), planes[0])
        CUDA.unpack(planes[0], torch.ones(3))
        CUDA.majority(list(planes), torch.zeros(1, dtype=torch.int32))
        CUDA.count(list(planes), torch.zeros(2, 1, dtype=torch.int32))
        CUDA.agreement(planes[0], planes[1], 3)
        bitmaps.pack(values, zeros="rows", key=1)
        bitmaps.pack_average(values, values, (0.5, 0.5), unscale=1.0, zeros="rows", key=1)
        bitmaps.unpack(values)
    assert asked.times == 1


@needs_compiler
def test_ties_add_up(launches: list[tuple[str, int]]) -> None:
    tied = torch.tensor(5)
    assert cuda.majority([words(0b0011), words(0b0101)], words(0), tied=tied) is tied
    assert tied == 7
    cuda.majority([words(0b0011), words(0b0101), words(0)], words(0), tied=tied)
    assert tied == 7


@needs_compiler
def test_agreement_adds_up(launches: list[tuple[str, int]]) -> None:
    counts = torch.tensor([10, 20])
    agree, both = cuda.agreement(words(0b0011), words(0b0101), 4, counts=counts)
    assert (agree, both) == (12, 24)
    assert counts.tolist() == [12, 24]


# ------------------------------------------------------------------------------------------------- launches


@needs_compiler
def test_the_tensors_of_a_resnet50_take_one_launch(launches: list[tuple[str, int]]) -> None:
    sizes = [64 + i for i in range(161)]
    values = [torch.ones(n) for n in sizes]
    batch = Batch(sizes, [torch.zeros((n + 31) // 32, dtype=torch.int32) for n in sizes])
    batch.pack(values)
    batch.unpack(values)
    cuda.first_bad(values)
    assert launches == [("pack_many", 161), ("unpack_many", 161), ("first_bad", 161)]


# -------------------------------------------------------------------------------------------------- refusals


def refused(bitmap: torch.Tensor) -> list[Any]:
    """Every call that would write to, or read from, memory that is not a bitmap of one word."""
    good, values = words(0), torch.ones(32)
    return [
        lambda: cuda.pack(values, bitmap),
        lambda: cuda.pack(values, good, zeros="abstain", nonzero=bitmap),
        lambda: cuda.unpack(bitmap, values),
        lambda: cuda.unpack(good, values, nonzero=bitmap),
        lambda: cuda.majority([good, bitmap], good),
        lambda: cuda.majority([good], good, nonzeros=[bitmap], out_nonzero=good),
        lambda: cuda.majority([good], good, ties="zero", out_nonzero=bitmap),
        lambda: cuda.count([bitmap], torch.zeros(1, 1, dtype=torch.int32)),
        lambda: cuda.agreement(bitmap, good, 32),
        lambda: cuda.agreement(good, bitmap, 32),
        lambda: cuda.agreement(good, good, 32, bitmap),
        lambda: cuda.agreement(good, good, 32, None, bitmap),
        lambda: Batch([32], [bitmap]),
        lambda: Batch([32], [good], nonzeros=[bitmap]),
    ]


@pytest.mark.parametrize(
    "bitmap",
    [words(), words(0, 0), torch.zeros(1, dtype=torch.float32), torch.zeros(1, 1, dtype=torch.int32)],
    ids=["too short", "too long", "floats", "a matrix"],
)
def test_what_is_no_bitmap_is_refused(bitmap: torch.Tensor) -> None:
    for call in refused(bitmap):
        with pytest.raises(ValueError, match="a bitmap of 1 contiguous 32-bit words on cpu is needed"):
            call()


def test_a_bitmap_on_another_device_is_refused() -> None:
    """Its address would be read as one of this device's."""
    elsewhere, good = torch.zeros(1, dtype=torch.int32, device="meta"), words(0)
    for call in (
        lambda: cuda.pack(torch.ones(32), elsewhere),
        lambda: cuda.unpack(good, torch.ones(32), nonzero=elsewhere),
        lambda: cuda.majority([good, elsewhere], good),
        lambda: cuda.decide_counts(good[None], 1, good, ties="zero", out_nonzero=elsewhere),
        lambda: cuda.count([elsewhere], torch.zeros(1, 1, dtype=torch.int32)),
        lambda: cuda.add_counts([elsewhere[None]], torch.zeros(1, 1, dtype=torch.int32)),
        lambda: cuda.agreement(good, elsewhere, 32),
        lambda: Batch([32, 32], [good, elsewhere]),
    ):
        with pytest.raises(ValueError, match=r"words on cpu is needed, not torch\.int32 .* on meta"):
            call()


def test_a_bitmap_with_gaps_is_refused() -> None:
    with pytest.raises(ValueError, match="a bitmap of 2 contiguous 32-bit words on cpu is needed"):
        cuda.pack(torch.ones(64), torch.zeros(4, dtype=torch.int32)[::2])


def test_values_with_gaps_are_refused() -> None:
    for call in (
        lambda values: cuda.pack(values, words(0)),
        lambda values: cuda.unpack(words(0), values),
        cuda.all_finite,
    ):
        with pytest.raises(ValueError, match="gaps"):
            call(torch.ones(8)[::2])


def test_a_batch_refuses_tensors_of_other_sizes_and_numbers() -> None:
    batch = Batch([3, 4], [words(0), words(0)])
    for call in (batch.pack, batch.unpack):
        with pytest.raises(ValueError, match="a tensor of 5 elements stands where the batch has 4"):
            call([torch.ones(3), torch.ones(5)])
        with pytest.raises(ValueError, match="1 tensors were given to a batch of 2"):
            call([torch.ones(3)])
    with pytest.raises(ValueError, match="zip"):
        Batch([3, 4], [words(0)])


def test_a_gradient_needs_a_momentum_of_its_size_and_precision() -> None:
    batch = Batch([3, 4], [words(0), words(0)])
    gradients = [torch.ones(3), torch.ones(4)]
    for other in (None, None, torch.ones(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)):
        with pytest.raises(ValueError, match="a gradient has no momentum, or one of another precision"):
            batch.pack_momentum(gradients, [torch.ones(3), other], (0.9, 0.9))
    with pytest.raises(ValueError, match="a tensor of 3 elements stands where the batch has 4"):
        batch.pack_momentum(gradients, [torch.ones(3), torch.ones(3)], (0.9, 0.9))


@pytest.mark.parametrize(
    "wrong", [torch.zeros(1, dtype=torch.int32), torch.zeros(2, dtype=torch.int64), torch.zeros((), device="meta")]
)
def test_what_a_kernel_cannot_add_to_is_refused(wrong: torch.Tensor) -> None:
    """Its atomics are of 8 bytes, on its device."""
    bitmap = words(0)
    with pytest.raises(ValueError, match=r"1 of torch.bool on cpu are needed"):
        cuda.pack(torch.ones(3), bitmap, finite=wrong)
    with pytest.raises(ValueError, match=r"1 of torch.int64 on cpu are needed"):
        cuda.majority([bitmap], bitmap, tied=wrong)
    with pytest.raises(ValueError, match=r"2 of torch.int64 on cpu are needed"):
        cuda.agreement(bitmap, bitmap, 3, counts=wrong[:1] if wrong.dim() else wrong)


def test_counters_have_a_largest_size() -> None:
    with pytest.raises(ValueError, match="no counters of 17 planes: at most 16"):
        cuda.count([words(0)], torch.zeros(17, 1, dtype=torch.int32))


def test_types_that_cannot_be_voted_on() -> None:
    integers = torch.ones(3, dtype=torch.int32)
    for call in (lambda: cuda.pack(integers, words(0)), lambda: Batch([3], [words(0)]).pack([integers])):
        with pytest.raises(KeyError):
            call()


# --------------------------------------------------------------------------------------------- CuPy


@pytest.mark.parametrize(
    ("version", "extra"),
    [("12.6", "'.[cuda12]',"), ("13.0", "'.[cuda13]',"), (None, "'.[cuda12]' or '.[cuda13]',")],
)
def test_without_cupy_the_error_names_the_extra(
    version: str | None, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)  # Python's way to say that a module cannot be imported
    monkeypatch.setattr(torch.version, "cuda", version)
    with pytest.raises(GradientError) as caught:
        kernels.import_cupy()
    assert f"pip install {extra}" in str(caught.value)


def test_importing_the_cuda_modules_imports_no_cupy() -> None:
    program = "import mpisign.backends.cuda, sys; print('cupy' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert run.stdout.strip() == "False"


def test_structures_are_laid_out_as_in_c() -> None:
    """C puts a field at a multiple of its size, and pads the whole to the largest; NumPy packs unless told."""
    for structure in (kernels.JOB, kernels.TENSORS, kernels.HALF_TENSORS, kernels.VECTORS, kernels.BITMAPS):
        assert structure.fields is not None
        for dtype, offset, *_ in structure.fields.values():
            assert offset % dtype.base.itemsize == 0
        assert structure.itemsize % max(dtype.base.itemsize for dtype, *_ in structure.fields.values()) == 0
        assert np.dtype(structure.descr, align=True).itemsize == structure.itemsize
