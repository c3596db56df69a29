"""Gradients that somebody has averaged before the vote, so that every ballot is the same."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from mpisign.bitmap.tensors import flat
from mpisign.scaling import living
from mpisign.warning import warn

__all__ = ["Alike", "warn_of_averaging"]

IN_A_ROW = 3  # steps with equal gradients that are no accident
LOOKS = 10  # steps in which ranks tell
SAMPLE = 64  # values of each gradient
ENOUGH = 100  # different values among them; toys and dead models have fewer

FIX = (
    "do not wrap the model (train ddp.module; with Lightning pass MpisignStrategy(), with Trainer and Accelerate call "
    "init() of mpisign.integrations.huggingface), let DDP's ranks vote by mpisign.integrations.ddp.vote(), or run "
    "backward under ddp.no_sync()"
)


def warn_of_averaging(parameters: Sequence[torch.Tensor]) -> None:
    """Say what DDP or FSDP do to gradients, if they have these parameters."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    if any(_is_of_fsdp(parameter) for parameter in parameters):
        warn(
            "parameters belong to an FSDP module, which shards them and averages their gradients before the vote: "
            "ranks then vote on shards that are not the same parameters, or on averages. Train a model without FSDP"
        )
        return
    mine = set(map(id, parameters))
    for module in living(DistributedDataParallel):
        several = distributed.get_world_size(module.process_group) > 1
        if several and not mine.isdisjoint(map(id, module.parameters())):
            warn(
                f"parameters belong to a DistributedDataParallel module, which averages gradients in full precision "
                f"before the vote: every rank casts the same ballot then, and no traffic is saved. "
                f"{FIX[0].upper() + FIX[1:]}"
            )
            return


def _is_of_fsdp(parameter: torch.Tensor) -> bool:
    return type(parameter).__name__ == "DTensor" or hasattr(parameter, "_fsdp_flattened")


class Alike:
    """Whether the gradients of all ranks are the same: in the first steps each tells a digest of some of its values."""

    def __init__(self) -> None:
        self._looks = self._row = 0

    def digest(self, gradients: Sequence[torch.Tensor | None], size: int) -> int:
        """Of these, above 0; or 0, if this step tells nothing, or they hold too little to tell."""
        if self._looks == LOOKS or size == 1:
            return 0
        self._looks += 1
        some = [flat(gradient)[:SAMPLE].detach().double() for gradient in gradients if gradient is not None]
        if not some:
            return 0
        values = torch.cat(some).cpu()
        if len(values.unique()) < ENOUGH or not bool(values.isfinite().all()):
            return 0
        return zlib.crc32(values.numpy().tobytes()) + 1

    def heard(self, digests: Sequence[int]) -> None:
        """Those of all ranks, the same on each. Warns if they have been equal for some steps."""
        alike = len(digests) > 1 and digests[0] > 0 and len(set(digests)) == 1
        self._row = self._row + 1 if alike else 0
        if self._row == IN_A_ROW:
            self._looks = LOOKS
            warn(
                f"in {IN_A_ROW} steps in a row the gradients of all ranks were the same, so the vote decides nothing. "
                f"Either every rank reads the same data (use a DistributedSampler, or data[mpisign.rank() :: "
                f"mpisign.size()]), or something has averaged gradients before, such as DistributedDataParallel: {FIX}"
            )
