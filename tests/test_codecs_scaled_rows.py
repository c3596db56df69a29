"""mpisign.codecs.ScaledRows: a scale a row and a bit a coordinate, whole and in parts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import oracle
import pytest
import torch
from gpu_branch import gpu_branch, needs_compiler

from mpisign.backends import backend_for
from mpisign.backends.host import Host, as_words
from mpisign.bitmap.tensors import DTYPES, flat
from mpisign.codecs import ScaledRows
from mpisign.codecs.codec import Part
from mpisign.policy import Policy

FIRST_WORD = 1001
SHAPES: list[tuple[int, ...]] = [
    (),
    (0,),
    (1,),
    (33,),
    (1000,),
    (5, 63),
    (3, 64),
    (7, 70),
    (6, 3, 50),
    (1, 100),
    (0, 9),
]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
on = pytest.mark.parametrize("gpu", [False, pytest.param(True, marks=needs_compiler)], ids=["host", "kernels"])


@pytest.fixture(params=[None, 64], ids=["", "small blocks"], autouse=True)
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work that is done block by block is done in one here, and once more in several."""
    if request.param:
        monkeypatch.setattr(Host, "cache", request.param)


def some_values(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normal, with a row of zeros and a few more zeros."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64)
    values.view(-1)[3::7] = 0
    if len(shape) > 1 and shape[0] > 2:
        values[1] = 0
    return values.to(dtype)


def encoded(values: torch.Tensor, cuts: Sequence[int] = (), policy: Policy | None = None) -> list[Part]:
    policy, codec, n = policy or Policy(), ScaledRows().of(values), values.numel()
    parts = []
    for lo, hi in zip([0, *cuts], [*cuts, n], strict=True):
        its = codec.part(lo, hi)
        message = torch.full((its.planes(policy), its.length(hi - lo)), 0x25A5A5A5, dtype=torch.int32)
        parts.append(Part(its, lo, hi, message, FIRST_WORD + lo // 32))
    assert codec.encode_parts(flat(values), parts, policy.context(17, 3))
    return parts


def decoded(parts: Sequence[Part], like: torch.Tensor) -> torch.Tensor:
    out = torch.full((like.numel(),), torch.nan, dtype=torch.promote_types(like.dtype, torch.float32))
    for part in parts:
        part.codec.decode(part.message, out[part.lo : part.hi])
    return out


def expected(values: torch.Tensor, zeros: str = "rows") -> np.ndarray:
    numbers = flat(values).double().numpy()
    rows = oracle.count_rows(tuple(values.shape))
    row = np.repeat(np.arange(rows), numbers.size // rows)
    coin = oracle.coins(oracle.coin_key(0, 17, oracle.zeros_stream(3)), FIRST_WORD, numbers.size)
    signs = oracle.ballot(numbers, "coin" if zeros == "rows" else zeros, coin)
    return signs * oracle.scales(numbers, row)[row] if numbers.size else numbers


@on
@shapes
@pytest.mark.parametrize("zeros", ["rows", "coin", "abstain", "positive"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_worth_the_sign_times_the_mean_magnitude_of_the_row(
    dtype: torch.dtype, zeros: str, shape: tuple[int, ...], gpu: bool
) -> None:
    values = some_values(shape, dtype)
    with gpu_branch(gpu):
        ours = decoded(encoded(values, policy=Policy(zeros)), values)
    np.testing.assert_allclose(ours.double(), expected(values, zeros), rtol=1e-6)


@on
@pytest.mark.parametrize("shape", [(1000,), (7, 70), (6, 3, 50), (40, 100), (3, 640)], ids=str)
def test_parts_are_worth_the_whole(shape: tuple[int, ...], gpu: bool) -> None:
    """Bit for bit, wherever it is cut."""
    values = some_values(shape)
    with gpu_branch(gpu):
        whole = decoded(encoded(values), values)
        for cuts in ([32], [64, 96, 416], list(range(32, values.numel(), 32))):
            assert torch.equal(decoded(encoded(values, cuts), values), whole)


@on
def test_rows_that_lie_apart(gpu: bool) -> None:
    values = some_values((4, 6, 5, 5)).contiguous(memory_format=torch.channels_last)
    row = torch.arange(4).view(4, 1, 1, 1).expand(4, 6, 5, 5).contiguous(memory_format=torch.channels_last)
    numbers, rows = flat(values).double().numpy(), flat(row).numpy()
    with gpu_branch(gpu):
        for cuts in ([], [32], [64, 416]):
            ours = decoded(encoded(values, cuts), values).double().numpy()
            np.testing.assert_allclose(np.abs(ours), oracle.scales(numbers, rows)[rows], rtol=1e-6)
            assert (np.sign(ours) == np.sign(numbers))[numbers != 0].all()


def test_scales_of_rows_that_lie_apart_are_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not all of them for each block, which is the square of a parameter's size."""
    looked_up, by_run = [], ScaledRows._by_run

    def counted(*args: object) -> torch.Tensor:
        looked_up.append(by_run(*args))  # type: ignore[arg-type]
        return looked_up[-1]

    monkeypatch.setattr(ScaledRows, "_by_run", counted)
    values = some_values((70, 9)).t()
    decoded(encoded(values), values)
    assert sum(map(len, looked_up)) == values.numel()


@shapes
def test_adding_is_decoding_times_a_factor(shape: tuple[int, ...]) -> None:
    values = some_values(shape, torch.float64)
    (part,) = encoded(values)
    out = torch.ones(values.numel(), dtype=torch.float64)
    part.codec.add(part.message, out, -0.5)
    torch.testing.assert_close(out, 1 - 0.5 * decoded([part], values))


@pytest.mark.parametrize(
    ("shape", "scales"),
    [((), 1), ((0,), 0), ((500,), 1), ((10, 63), 1), ((10, 64), 10), ((10, 2, 32), 10), ((1, 99), 1)],
)
def test_how_many_scales_there_are(shape: tuple[int, ...], scales: int) -> None:
    parameter = torch.zeros(shape)
    codec = ScaledRows().of(parameter)
    assert codec.scales == scales
    assert codec.length(parameter.numel()) == scales + -(-parameter.numel() // 32)


def test_a_part_has_the_scales_of_the_rows_that_it_touches() -> None:
    codec = ScaledRows().of(torch.zeros(10, 96))
    assert [codec.part(lo, hi).scales for lo, hi in ((0, 96), (0, 128), (32, 96), (64, 224), (64, 960))] == [
        1,
        2,
        1,
        3,
        10,
    ]


@on
@pytest.mark.parametrize(("shape", "cuts"), [((7, 70), [32, 224]), ((6, 96), [64, 160]), ((9,), [])])
def test_words_of_rows(shape: tuple[int, ...], cuts: list[int], gpu: bool) -> None:
    n, whole = math.prod(shape), ScaledRows().of(torch.zeros(shape))
    row = np.arange(n) // (n // whole.rows)
    for lo, hi in zip([0, *cuts], [*cuts, n], strict=True):
        codec = whole.part(lo, hi)
        wanted = np.random.default_rng(lo).random(codec.scales) < 0.5
        with gpu_branch(gpu):
            words = codec.words_of(torch.from_numpy(wanted))
        assert (as_words(words) == oracle.to_words(wanted[row[lo:hi] - row[lo]])).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_told(bad: float) -> None:
    for values in (torch.ones(3, 64), torch.ones(3, 64, dtype=torch.float64)):
        codec, context = ScaledRows().of(values), Policy().context(0, 0)
        message = torch.zeros((1, codec.length(values.numel())), dtype=torch.int32)
        assert codec.encode(flat(values), message, context, 0)
        values[1, 5] = bad
        assert not codec.encode(flat(values), message, context, 0)
    values[1, 5] = 3e40  # a scale is fp32
    assert not codec.encode(flat(values), message, context, 0)


@on
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_magnitudes_are_summed_in_fp64(dtype: torch.dtype, gpu: bool) -> None:
    values = some_values((7, 300), dtype)
    with gpu_branch(gpu):
        sums = backend_for(values.device).magnitudes(values)
        assert backend_for(values.device).magnitudes(values[:0]).shape == (0,)
        huge = backend_for(values.device).magnitudes(torch.full((2, 4), 3e38))
    assert sums.dtype == torch.float64
    np.testing.assert_allclose(sums, np.abs(values.double().numpy()).sum(1), rtol=1e-12)
    assert huge.isfinite().all()
