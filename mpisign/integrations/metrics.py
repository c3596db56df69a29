"""torchmetrics' metrics over all ranks."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from mpisign.collectives import allgather, gather_each
from mpisign.errors import OptionError
from mpisign.places import rank, size
from mpisign.session import is_initialized

__all__ = ["sync_metrics"]


def sync_metrics(module: nn.Module) -> nn.Module:
    """Let all torchmetrics in ``module`` compute over the data of all ranks. Not collective; ``compute()`` becomes it.

    Every rank must call ``compute()``, after as many updates as it likes, none included. It raises
    :class:`~mpisign.OptionError` on all ranks if a metric keeps lists of something else than tensors.

    Args:
        module: a ``Metric``, a ``MetricCollection``, or a model with some in it.

    Returns:
        The same, which is changed in place.

    Example::

        accuracy = sync_metrics(torchmetrics.classification.MulticlassAccuracy(10))
    """
    for its in module.modules():
        if isinstance(its, Metric):
            its.dist_sync_fn = _gather
            its.distributed_available_fn = _several
            its._sync_dist = partial(_sync, its)
    return module


def _several() -> bool:
    return is_initialized() and size() > 1


def _sync(metric: Any, *args: Any, **options: Any) -> None:
    """As the metric's own, which would gather lists that it does not concatenate item by item. **Collective.**

    With different numbers of updates ranks would then gather different things in one call.
    """
    reductions = metric._reductions
    lists = {
        name: reduction
        for name, reduction in reductions.items()
        if isinstance(getattr(metric, name), list) and reduction is not dim_zero_cat
    }
    for name, reduction in lists.items():
        items = _items(metric, name)
        setattr(metric, name, items if reduction is None or not items else reduction(items))
    metric._reductions = {name: its for name, its in reductions.items() if name not in lists}
    try:
        type(metric)._sync_dist(metric, *args, **options)
    finally:
        metric._reductions = reductions


def _items(metric: Any, name: str) -> list[torch.Tensor]:
    """Those of all ranks: the first of each rank, the second, and so on, as torchmetrics has them. **Collective.**"""
    mine = getattr(metric, name)
    plain = all(isinstance(its, torch.Tensor) for its in mine)
    counts = allgather(torch.tensor([len(mine) if plain else -1], device="cpu")).tolist()
    if min(counts) < 0:
        raise OptionError(
            f"rank {rank()}: {type(metric).__name__} keeps a list {name!r} of something else than tensors, which "
            f"cannot be gathered: compute it on one rank, over all data"
        )
    mine = [*mine, *[torch.empty(0, device=metric.device)] * (max(counts) - len(mine))]
    gathered = [gather_each(its) for its in mine]
    return [its[who] for at, its in enumerate(gathered) for who, count in enumerate(counts) if at < count]


def _gather(tensor: torch.Tensor, group: Any = None) -> list[torch.Tensor]:
    """Every rank's state of a metric, of any shapes. **Collective.**"""
    return gather_each(tensor)
