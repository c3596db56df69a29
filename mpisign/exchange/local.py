"""What concerns this rank's gradient alone: its norm, and a step by itself where models are exchanged afterwards."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from mpisign.backends import Backend
from mpisign.bitmap.tensors import flat
from mpisign.exchange.plan import Plan
from mpisign.memory.store import state_dtype
from mpisign.session import current

__all__ = ["clipped", "local_update", "unscaled"]

Grads = Sequence[torch.Tensor | None]


def local_update(plan: Plan, step: int, gradients: Grads, unscale: float) -> bool:
    """Turn every gradient into what the memory makes of it, for a step of this rank alone.

    Args:
        gradients: by parameter; changed in place.

    Returns:
        Whether all of it was finite. If not, the gradients are worth nothing.
    """
    group = current().group
    context = plan.policy.context(step, group.rank, group.size, plan.store.secret, group.identities)
    finite = True
    with plan.use(), torch.no_grad():
        if plan.clip is not None:
            if int(plan.backend.first_bad(gradients)) < len(gradients):
                return False
            unscale = clipped(plan.backend, gradients, unscale, plan.clip)
        for encoder in plan.local:
            its = [gradients[segment.index] for segment in encoder.segments]
            if encoder.method.memory.needs_all:
                if int(plan.backend.first_bad(its)) < len(its):
                    return False
                prepared = encoder.method.memory.prepare(unscaled(its, unscale), context)
                context = dataclasses.replace(context, prepared=prepared)
            finite &= encoder.local_update(its, context, unscale)
            if not finite:
                encoder.recover()
    return finite


def clipped(backend: Backend, gradients: Grads, unscale: float, clip: float) -> float:
    """The factor that takes the loss scale out of finite gradients and clips them to the norm ``clip``."""
    present = [flat(gradient) for gradient in gradients if gradient is not None]
    norm = float(backend.norm(present)) * unscale if present else 0.0
    return unscale if norm <= clip else unscale * (clip / norm)


def unscaled(gradients: Grads, unscale: float) -> list[torch.Tensor]:
    """Those that there are, flat, without the loss scale."""
    present = [flat(gradient) for gradient in gradients if gradient is not None]
    return present if unscale == 1.0 else [g.to(state_dtype(g.dtype), copy=True).mul_(unscale) for g in present]
