"""Who applies a decision: the optimizer inside, when its wrapper says so, or one pass over parameters in its place."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks as _global_post_hooks
from torch.optim.optimizer import _global_optimizer_pre_hooks as _global_pre_hooks

from mpisign.errors import SynchronizationError
from mpisign.exchange.plan import Plan
from mpisign.exchange.sink import StepSink
from mpisign.places import rank
from mpisign.session import is_initialized
from mpisign.wrapping import wants_closure

__all__ = ["count_step", "forbid_alone", "sgd_numbers", "step", "step_sink"]

_told: weakref.WeakSet[Optimizer] = weakref.WeakSet()  # by their wrappers, to step now


def count_step(optimizer: Optimizer) -> None:
    """Let a scheduler hear of a step that was done in the wrapped optimizer's place."""
    if "step" in vars(optimizer):
        optimizer._opt_called = True  # type: ignore[attr-defined]


def step(optimizer: Optimizer) -> None:
    """Let a wrapped optimizer apply what is decided. Raises :class:`OptionError` if it asks for a closure."""
    _told.add(optimizer)
    try:
        with torch.inference_mode(False):  # what it keeps could not be changed outside of that mode
            optimizer.step()
    except Exception as error:
        if "closure" in str(error):  # some only say so when they are called without
            raise wants_closure(optimizer) from error
        raise
    finally:
        _told.discard(optimizer)


def sgd_numbers(optimizer: Optimizer) -> list[tuple[float, float]] | None:
    """Learning rate and weight decay of each parameter group, if a step is plain SGD's and nobody looks at it.

    That is torch's own class without momentum, ``maximize``, ``fused`` or ``differentiable``, with numbers and not
    tensors, and without hooks on its ``step()``. A scheduler's own function in its place only counts.
    """
    hooks = [hook for hook in optimizer._optimizer_step_pre_hooks.values() if not isinstance(hook, _NotAlone)]
    watched = hooks or optimizer._optimizer_step_post_hooks or not _is_its_own(vars(optimizer).get("step"))
    if type(optimizer) is not torch.optim.SGD or watched or _global_pre_hooks or _global_post_hooks:
        return None
    numbers = []
    for group in optimizer.param_groups:
        lr, decay = group["lr"], group["weight_decay"]
        other = [group[option] for option in ("momentum", "maximize", "differentiable")] + [group.get("fused")]
        if any(other) or not (isinstance(lr, (int, float)) and isinstance(decay, (int, float))):
            return None
        # Of 16 bits, torch rounds an element's decay on the host in one of two ways, by its place.
        halves = (p.dtype.itemsize < 4 and p.device.type == "cpu" for p in group["params"])
        if decay != 0 and any(halves):
            return None
        numbers.append((float(lr), float(decay)))
    return numbers


def _is_its_own(replaced: Any) -> bool:
    """Whether SGD's ``step()`` is replaced on an object by nothing, or by a scheduler's function around it."""
    if replaced is None:
        return True
    return hasattr(replaced, "_wrapped_by_lr_sched") and replaced.__wrapped__ is torch.optim.SGD.step


def step_sink(optimizer: Optimizer, plan: Plan, order: Sequence[int]) -> StepSink | None:
    """What applies a vote to the parameters at once, if that is what ``optimizer`` would do, bit for bit.

    Args:
        order: the places in its groups, of what is trained, of the plan's parameters.
    """
    numbers = sgd_numbers(optimizer) if plan.steps else None
    if numbers is None:
        return None
    pairs = zip(numbers, optimizer.param_groups, strict=True)
    in_groups = [its for its, group in pairs for parameter in group["params"] if parameter.requires_grad]
    by_parameter = [in_groups[at] for at in order]
    return StepSink(plan.gradients.parameters, [rate for rate, _ in by_parameter], [decay for _, decay in by_parameter])


class _NotAlone:
    """A hook with which the optimizer inside refuses a step that is none of its wrapper's."""

    def __init__(self, wrapper: Optimizer) -> None:
        self._known: weakref.ref[Any] = weakref.ref(wrapper)

    def __call__(self, optimizer: Optimizer, args: Any, options: Any) -> None:
        its = self._known()
        if its is not None and its.wrapped is optimizer and optimizer not in _told and is_initialized():
            raise SynchronizationError(
                f"rank {rank()}: the {type(optimizer).__name__} inside a DistributedSignOptimizer was told to step by "
                f"itself, without a vote, and the replicas would drift apart: call step(), scaler.unscale_() and "
                f"scaler.step() with the DistributedSignOptimizer"
            )


def forbid_alone(optimizer: Optimizer, wrapper: Optimizer) -> None:
    """Let the optimizer inside refuse a step that is none of its wrapper's: it would apply this rank's own gradient."""
    if hasattr(optimizer, "_optimizer_step_pre_hooks"):  # torch has initialized it
        optimizer.register_step_pre_hook(_NotAlone(wrapper))
