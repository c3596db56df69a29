"""torchmetrics' metrics over all ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torchmetrics import Metric

from mpisign.collectives import gather_each
from mpisign.places import size
from mpisign.session import is_initialized

__all__ = ["sync_metrics"]


def sync_metrics(module: nn.Module) -> nn.Module:
    """Let all torchmetrics in ``module`` compute over the data of all ranks. Not collective; ``compute()`` becomes it.

    Every rank must call ``compute()``, after as many updates as it likes, none included.

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
    return module


def _several() -> bool:
    return is_initialized() and size() > 1


def _gather(tensor: torch.Tensor, group: Any = None) -> list[torch.Tensor]:
    """Every rank's state of a metric, of any shapes. **Collective.**"""
    return gather_each(tensor)
