"""The memory of NVIDIA's GPUs, by CUDA kernels. Nothing here waits for them, unless it returns a bool."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from mpisign.backends.backend import Backend, Bitmaps, Count, RandomNumbers
from mpisign.bitmap import cuda
from mpisign.bitmap.batch import Batch
from mpisign.bitmap.kernels import import_cupy

__all__ = ["BACKEND", "Cuda"]


class CudaBitmaps(Bitmaps):
    """See :class:`mpisign.backends.backend.Bitmaps`. Everything is done by a launch or two, however many there are."""

    def __init__(
        self, elements: Sequence[int], words: Sequence[Tensor], nonzeros: Sequence[Tensor | None], starts: Sequence[int]
    ) -> None:
        self._batch = Batch(elements, words, nonzeros=nonzeros, first_words=starts)

    def pack(self, values: Sequence[Tensor | None], *, zeros: str, key: int) -> Tensor:
        return self._batch.pack(values, zeros=zeros, key=key)

    def pack_average(
        self,
        gradients: Sequence[Tensor | None],
        averages: Sequence[Tensor | None],
        betas: tuple[float, float],
        *,
        unscale: float,
        zeros: str,
        key: int,
        before: Sequence[Tensor | None] | None = None,
    ) -> Tensor:
        pairs = zip(averages, before or (), strict=before is not None)
        if drafts := [(average, its) for average, its in pairs if average is not None and its is not None]:
            torch._foreach_copy_([average for average, _ in drafts], [its for _, its in drafts])
        return self._batch.pack_momentum(gradients, averages, betas, unscale=unscale, zeros=zeros, key=key)

    def unpack(self, outs: Sequence[Tensor | None]) -> None:
        self._batch.unpack(outs)

    def apply(
        self,
        parameters: Sequence[Tensor | None],
        rates: Sequence[float],
        decays: Sequence[float],
        moved: Sequence[Tensor | None],
    ) -> None:
        self._batch.apply(parameters, rates, decays, moved)


class CudaRandomNumbers(RandomNumbers):
    """See :class:`mpisign.backends.backend.RandomNumbers`."""

    def __init__(self, key: int, device: torch.device) -> None:
        self._generator = torch.Generator(device).manual_seed(key % 2**63)

    def normal(self, out: Tensor) -> Tensor:
        return out.normal_(generator=self._generator)

    def uniform(self, out: Tensor, bound: float) -> Tensor:
        return out.uniform_(-bound, bound, generator=self._generator)


@functools.cache
def _flag(device: torch.device) -> Tensor:
    """One that lives, so that asking allocates nothing. The answer is read before it is asked again."""
    return torch.zeros((), dtype=torch.bool, device=device)


class Cuda(Backend):
    """See :class:`mpisign.backends.backend.Backend`."""

    name = "cuda"
    together = True
    staged = True
    cache = 1 << 62  # launches cost more than reading twice
    rows = 1 << 22  # enough to fill a GPU
    work = 1 << 24

    def prepare(self) -> None:
        import_cupy()

    def bitmaps(
        self, elements: Sequence[int], words: Sequence[Tensor], nonzeros: Sequence[Tensor | None], starts: Sequence[int]
    ) -> CudaBitmaps:
        return CudaBitmaps(elements, words, nonzeros, starts)

    def pack(
        self,
        values: Tensor,
        words: Tensor,
        *,
        zeros: str = "coin",
        key: int = 0,
        first_word: int = 0,
        nonzero: Tensor | None = None,
    ) -> Tensor:
        return cuda.pack(values, words, zeros=zeros, key=key, first_word=first_word, nonzero=nonzero)

    def unpack(self, words: Tensor, out: Tensor, *, nonzero: Tensor | None = None) -> None:
        cuda.unpack(words, out, nonzero=nonzero)

    def all_finite(self, values: Tensor) -> Tensor:
        return cuda.all_finite(values)

    def first_bad(self, values: Sequence[Tensor | None]) -> Tensor:
        return cuda.first_bad(values)

    def majority(
        self,
        ballots: Sequence[Tensor],
        out: Tensor,
        *,
        ties: str = "coin",
        key: int = 0,
        first_word: int = 0,
        nonzeros: Sequence[Tensor] | None = None,
        out_nonzero: Tensor | None = None,
        tied: Tensor | None = None,
    ) -> Count:
        found = cuda.majority(
            ballots,
            out,
            ties=ties,
            key=key,
            first_word=first_word,
            nonzeros=nonzeros,
            out_nonzero=out_nonzero,
            tied=tied,
        )
        return found if tied is None else 0

    def any_zero(self, words: Tensor) -> Tensor:
        return cuda.any_zero(words, found=_flag(words.device).zero_())

    def zero_words(self, words: Tensor, spans: Sequence[tuple[int, int]]) -> list[bool]:
        before = torch.zeros(len(words) + 1, dtype=torch.int64, device=words.device)
        torch.cumsum(words == 0, 0, out=before[1:])
        starts, stops = torch.tensor(spans, dtype=torch.int64, device=words.device).view(-1, 2).T
        some: list[bool] = (before[stops] > before[starts]).tolist()  # one wait, however many spans
        return some

    def count(self, ballots: Sequence[Tensor], planes: Tensor) -> None:
        cuda.count(ballots, planes)

    def add_counts(self, counts: Sequence[Tensor], planes: Tensor) -> None:
        cuda.add_counts(counts, planes)

    def decide_counts(
        self,
        yes: Tensor,
        voted: int | Tensor,
        out: Tensor,
        *,
        ties: str = "coin",
        key: int = 0,
        first_word: int = 0,
        out_nonzero: Tensor | None = None,
        tied: Tensor | None = None,
    ) -> Count:
        found = cuda.decide_counts(
            yes, voted, out, ties=ties, key=key, first_word=first_word, out_nonzero=out_nonzero, tied=tied
        )
        return found if tied is None else 0

    def agreement(
        self,
        ballot: Tensor,
        decision: Tensor,
        elements: int,
        nonzero: Tensor | None = None,
        moved: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        return cuda.agreement(ballot, decision, elements, nonzero, moved)

    def zeros(self, elements: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.zeros(elements, dtype=dtype, device=device)

    def random(self, key: int, device: torch.device, *, private: bool) -> CudaRandomNumbers:
        return CudaRandomNumbers(key, device)

    def number(self, value: Tensor) -> Tensor:
        return value.double()

    def total(self, values: Tensor) -> Tensor:
        return values.sum(dtype=torch.float64)

    def magnitudes(self, values: Tensor) -> Tensor:
        return values.abs().sum(1, dtype=torch.float64)

    def norm(self, values: Sequence[Tensor]) -> Tensor:
        norms = [torch.linalg.vector_norm(value, dtype=torch.float64) for value in values]
        together: Tensor = torch.linalg.vector_norm(torch.stack(norms))
        return together

    def at_least(self, values: Tensor, threshold: Tensor) -> Tensor:
        return (~(values.abs() < threshold)).nonzero().view(-1)


BACKEND = Cuda()
