"""The ranks' memories made one: what every rank gets when a job goes on with another number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mpisign.checkpoint.files import read_tensors
from mpisign.errors import CheckpointError
from mpisign.windows import KEY

__all__ = ["merged"]


def merged(files: Sequence[Path], rank: int, size: int) -> dict[str, Any] | None:
    """The mean of the old ranks' memories, as if saved by ``rank`` of ``size``; None if the optimizer kept none.

    Holds one mean in memory, whatever the number of files: they are read tensor by tensor.

    Raises:
        CheckpointError: the files differ in what must be the same on all ranks, such as the number of steps.
    """
    memories = [read_tensors(file)["mpisign"] for file in files]
    if None in memories:
        return None
    pieces: dict[int, dict[int, torch.Tensor]] = {}
    for memory in memories:
        del memory["rank"]
        memory.pop("secret", None)  # each rank draws its own anew
        memory.pop(KEY, None)  # see mpisign.checkpoint.local
        for place, of_rank in memory.pop("pieces", {}).items():  # what each rank keeps of what it decides: put together
            pieces.setdefault(place, {}).update(of_rank)
    return {**_merge(memories, "memory"), "rank": rank, "size": size, "pieces": pieces}


def _merge(values: Sequence[Any], what: str) -> Any:
    """Means of tensors, entry by entry through dicts; None is a memory that has not begun."""
    present = [value for value in values if value is not None]
    if not present:
        return None
    first = present[0]
    if isinstance(first, torch.Tensor):
        return _mean(present, len(values))
    if isinstance(first, dict):
        keys = dict.fromkeys(key for value in present for key in value)
        return {
            key: _merge([None if value is None else value.get(key) for value in values], f"{what}[{key!r}]")
            for key in keys
        }
    if any(value != first for value in present):
        raise CheckpointError(f"{what} should be the same on all ranks and is {', '.join(map(str, present))}")
    return first


def _mean(present: Sequence[torch.Tensor], count: int) -> torch.Tensor:
    """The sum over ``count``, in fp64; equal values give that value, also where the sum would be rounded."""
    first = present[0]
    if len(present) == count and all(torch.equal(value, first) for value in present):
        return first.clone()
    total = torch.zeros_like(first, dtype=torch.float64)
    for value in present:
        total += value
    mean = total / count
    return (mean if first.is_floating_point() else mean.round()).to(first.dtype)
