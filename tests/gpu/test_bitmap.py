"""The kernels on a real GPU, besides their bits: streams, devices, waiting, memory, sizes past 32 bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mpisign.backends import WORD
from mpisign.backends.cuda import BACKEND
from mpisign.bitmap import cuda, host
from mpisign.bitmap.batch import Batch
from mpisign.bitmap.host import words_for
from mpisign.bitmap.kernels import NONE
from mpisign.bitmap.tensors import format_of, raw_bits

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

N = 100_000
SLEEP = 200_000_000  # cycles: a tenth of a second, far longer than all that follows takes


def packed_on_host(values: torch.Tensor) -> torch.Tensor:
    words = torch.empty(words_for(values.numel()), dtype=WORD)
    host.pack(raw_bits(values), format_of(values.dtype), words.numpy().view(np.uint32))
    return words


def bitmap(n: int = N, device: str = "cuda") -> torch.Tensor:
    return torch.zeros(words_for(n), dtype=WORD, device=device)


def test_work_goes_to_the_current_stream_whichever_it_is() -> None:
    """On a side stream that is far behind, values arrive late: kernels on another stream would see the old ones."""
    late = torch.randn(N)
    staged = late.cuda()
    values, out, words, decided = torch.ones(N, device="cuda"), torch.zeros(N, device="cuda"), bitmap(), bitmap()
    batch = Batch([N], [words])
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()) as _:
        torch.cuda._sleep(SLEEP)
        values.copy_(staged)
        bad = batch.pack([values])
        cuda.majority([words], decided)
        cuda.unpack(decided, out)
        torch.cuda.current_stream().synchronize()
    assert bad == NONE
    assert torch.equal(words.cpu(), packed_on_host(late))
    assert torch.equal(out.cpu(), torch.where(late >= 0, 1.0, -1.0))


def test_nothing_waits_for_the_gpu() -> None:
    values, words, out = torch.randn(N, device="cuda"), bitmap(), bitmap()
    momentum = torch.zeros_like(values)
    batch = Batch([N], [words])

    def step() -> None:
        batch.pack([values])
        batch.pack_momentum([values], [momentum], (0.9, 0.99))
        cuda.pack(values, words)
        cuda.first_bad([values, None])
        BACKEND.first_bad([None, values])
        cuda.majority([words, words], out)
        cuda.agreement(words, out, N)
        batch.unpack([values])

    step()  # compiles
    torch.cuda.synchronize()
    torch.cuda._sleep(SLEEP)
    step()
    assert not torch.cuda.current_stream().query()


def test_a_steady_step_allocates_nothing() -> None:
    import cupy

    values = [torch.randn(n, device="cuda") for n in (5, 1000, N)]
    momenta = [torch.zeros_like(v) for v in values]
    batch = Batch([v.numel() for v in values], [bitmap(v.numel()) for v in values])
    finite, tied = torch.tensor(True, device="cuda"), torch.tensor(0, device="cuda")
    words = bitmap()
    ballots, out = [bitmap() for _ in range(4)], bitmap()

    def step() -> None:
        batch.pack(values)
        batch.pack_momentum(values, momenta, (0.9, 0.9))
        cuda.pack(values[-1], words, finite=finite)
        cuda.majority(ballots, out, tied=tied)
        batch.unpack(values)

    step()
    before = torch.cuda.memory_stats()["allocation.all.allocated"], cupy.get_default_memory_pool().total_bytes()
    for _ in range(3):
        step()
    after = torch.cuda.memory_stats()["allocation.all.allocated"], cupy.get_default_memory_pool().total_bytes()
    assert after == before


def test_a_step_can_be_captured_in_a_graph() -> None:
    values, words = torch.randn(N, device="cuda"), bitmap()
    batch = Batch([N], [words])
    batch.pack([values])  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        bad = batch.pack([values])
    values.copy_(-values)
    graph.replay()
    assert bad == NONE
    assert torch.equal(words.cpu(), packed_on_host(values.cpu()))
    values[N // 2] = torch.nan
    graph.replay()
    assert bad == 0


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_tensors_device_is_used_and_the_current_one_stays() -> None:
    values = torch.randn(N)
    for device in ("cuda:1", "cuda:0"):
        words = bitmap(device=device)
        with torch.cuda.device(0):
            assert cuda.pack(values.to(device), words)
            assert Batch([N], [words]).pack([values.to(device)]) == NONE
            assert torch.cuda.current_device() == 0
        assert torch.equal(words.cpu(), packed_on_host(values))


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory < 24 * 2**30,
    reason="needs 24 GB of GPU memory",
)
def test_more_elements_than_32_bits_can_number() -> None:
    n = 2**32 + 2**20 + 5
    values = torch.ones(n, dtype=torch.float16, device="cuda")
    words, out = bitmap(n), torch.zeros(n, dtype=torch.float16, device="cuda")
    negative = torch.tensor([0, 2**31 + 7, 2**32 - 1, 2**32, n - 1], device="cuda")
    values[negative] = -1
    for pack in (lambda: cuda.pack(values, words), lambda: Batch([n], [words]).pack([values]) == NONE):
        words.zero_()
        assert pack()
        cuda.unpack(words, out)
        assert torch.equal(out, values)
    values[-1] = torch.inf
    assert not cuda.all_finite(values)
    assert cuda.first_bad([words[:0].float(), values]) == 1


def test_many_blocks_agree_on_the_first_bad_tensor() -> None:
    """Thousands of blocks tell of a NaN at once, in whatever order."""
    values = [torch.full((200_003,), torch.nan, device="cuda") for _ in range(300)]
    averages = [torch.zeros_like(value) for value in values]
    batch = Batch([v.numel() for v in values], [bitmap(v.numel()) for v in values])
    for first in (0, 1, 191, 192, 223, 224, 299):
        for value in values[:first]:
            value.fill_(1.0)
        assert cuda.first_bad(values) == first
        assert batch.pack(values) == first
        assert batch.pack_momentum(values, averages, (0.5, 0.5)) == first
