"""What may be wrapped: which torch optimizers, and what their parameters are called in messages."""

from __future__ import annotations

import operator
import warnings
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim import Optimizer

from mpisign.errors import OptionError, SynchronizationError
from mpisign.method import Method
from mpisign.session import is_initialized, rank

__all__ = [
    "check_wrappable",
    "default_names",
    "drop_frozen",
    "epoch_number",
    "forbid_alone",
    "methods_of",
    "names_of",
    "warn_if_adaptive",
    "warn_of_epochs",
    "warn_of_momentum",
    "without_methods",
]

# They divide by the gradient's running magnitude, which is 1 for every coordinate of a vote.
ADAPTIVE = (
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.Adamax,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
    torch.optim.RMSprop,
    *([torch.optim.Adafactor] if hasattr(torch.optim, "Adafactor") else []),  # since torch 2.5
)


def check_wrappable(optimizer: Optimizer) -> None:
    """Raise :class:`OptionError`, with the reason, for an optimizer that cannot work on a decision of all ranks."""
    if not isinstance(optimizer, Optimizer):
        raise OptionError(f"{type(optimizer).__name__} is not a torch.optim.Optimizer: pass e.g. torch.optim.SGD(...)")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise OptionError(
            "LBFGS cannot be wrapped: it evaluates the loss several times inside one step and fits curvature to "
            "gradient differences, which signs do not have; use SGD"
        )
    if isinstance(optimizer, torch.optim.SparseAdam):
        raise OptionError("SparseAdam cannot be wrapped: a vote is dense; use SGD and sparse=False embeddings")


def methods_of(optimizer: Optimizer) -> list[Method]:
    """The methods that parameter groups have of their own. Raises :class:`OptionError` if one is no method."""
    methods = [group["method"] for group in optimizer.param_groups if "method" in group]
    for method in methods:
        if not isinstance(method, Method):
            raise OptionError(f"method={method!r} of a parameter group is not a Method: use one of mpisign's")
    return methods


@contextmanager
def without_methods(optimizer: Optimizer) -> Iterator[None]:
    """Inside, parameter groups have no methods: they are a part of the program, and not of its state."""
    methods = [group.pop("method", None) for group in optimizer.param_groups]
    try:
        yield
    finally:
        for group, method in zip(optimizer.param_groups, methods, strict=True):
            if method is not None:
                group["method"] = method


def warn_if_adaptive(optimizer: Optimizer) -> None:
    """Say what an Adam-like optimizer does to the +-1 of a vote."""
    if isinstance(optimizer, ADAPTIVE):
        warnings.warn(
            f"{type(optimizer).__name__} divides each coordinate by its running magnitude, and every coordinate of a "
            f"vote has magnitude 1: what remains is its momentum over votes. Usually SGD(lr=..., weight_decay=...) "
            f"with method=mpisign.lion() or mpisign.signum() is what you want",
            stacklevel=3,
        )


def warn_of_momentum(optimizer: Optimizer, methods: Sequence[Method]) -> bool:
    """Say what momentum in the wrapped optimizer does to votes. Returns whether there was something to say.

    Args:
        methods: by parameter group.
    """
    if isinstance(optimizer, ADAPTIVE):  # of which warn_if_adaptive() has spoken
        return False
    for at, (group, method) in enumerate(zip(optimizer.param_groups, methods, strict=True)):
        momentum, betas = group.get("momentum"), group.get("betas")
        decay = betas[0] if isinstance(betas, (tuple, list)) and betas else momentum
        if not (method.elects and isinstance(decay, (int, float)) and 0 < decay < 1):
            continue
        option = f"momentum={momentum}" if decay is momentum else f"betas={betas}"
        instead = f"mpisign.signum({decay:g})" if decay is momentum else f"mpisign.lion() or mpisign.signum({decay:g})"
        warnings.warn(
            f"{type(optimizer).__name__} with {option} (parameter group {at}) around the vote of {method.name} "
            f"averages votes, which is another method. Momentum belongs to each rank, before the sign: wrap "
            f"SGD(lr=..., weight_decay=...) with momentum=0 and pass method={instead}; OneCycleLR and CyclicLR turn "
            f"it on unless they have cycle_momentum=False",
            stacklevel=4,
        )
        return True
    return False


def warn_of_epochs(method: Method) -> None:
    """Say that a method which changes with the epoch has not been told any."""
    warnings.warn(
        f"{method.name} changes with the epoch, and nobody has said which this is, so it stays as in epoch 0: call "
        f"optimizer.set_epoch(epoch) on every rank at the beginning of each epoch",
        stacklevel=6,  # through torch's own wrapper of step()
    )


def epoch_number(epoch: object) -> int:
    """A plain int from 0 up, also from NumPy's or torch's. Raises :class:`OptionError`."""
    try:
        number = operator.index(epoch)  # type: ignore[arg-type]
    except TypeError:
        number = -1
    if number < 0:
        raise OptionError(f"epoch={epoch!r} must be an int of 0 or more")
    return number


def forbid_alone(optimizer: Optimizer, wrapper: Optimizer) -> None:
    """Let the optimizer inside refuse a step that is none of its wrapper's: it would apply this rank's own gradient."""
    if not hasattr(optimizer, "_optimizer_step_pre_hooks"):
        return  # not one that torch has initialized
    known = weakref.ref(wrapper)

    def refuse(optimizer: Optimizer, args: Any, options: Any) -> None:
        its: Any = known()
        if its is not None and its.wrapped is optimizer and not its._applies and is_initialized():
            raise SynchronizationError(
                f"rank {rank()}: the {type(optimizer).__name__} inside a DistributedSignOptimizer was told to step by "
                f"itself, without a vote, and the replicas would drift apart: call step(), scaler.unscale_() and "
                f"scaler.step() with the DistributedSignOptimizer"
            )

    optimizer.register_step_pre_hook(refuse)


def drop_frozen(parameters: Iterable[torch.Tensor]) -> None:
    """Drop gradients that are left from before their parameters were frozen: nobody votes on them."""
    for parameter in parameters:
        if not parameter.requires_grad:
            parameter.grad = None


def default_names(groups: list[dict[str, Any]]) -> dict[torch.Tensor, str]:
    """The names torch was given, or names made of group and place."""
    names: dict[torch.Tensor, str] = {}
    for at, group in enumerate(groups):
        given = group.get("param_names") or [f"group{at}.param{i}" for i in range(len(group["params"]))]
        names.update(zip(group["params"], given, strict=True))
    return names


def names_of(
    optimizer: Optimizer, named_parameters: Iterable[tuple[str, torch.Tensor]] | None
) -> dict[torch.Tensor, str]:
    """The names the user gave, checked against what the optimizer holds. Raises :class:`OptionError`."""
    if named_parameters is None:
        return default_names(optimizer.param_groups)
    names: dict[torch.Tensor, str] = {}
    taken: set[str] = set()
    for entry in named_parameters:
        pair = isinstance(entry, tuple) and len(entry) == 2
        if not (pair and isinstance(entry[0], str) and isinstance(entry[1], torch.Tensor)):
            raise OptionError("named_parameters must give (name, parameter) pairs: pass model.named_parameters()")
        name, parameter = entry
        if parameter in names:
            raise OptionError(f"one parameter is named twice, {names[parameter]!r} and {name!r}: name it once")
        if name in taken:
            raise OptionError(f"two parameters are named {name!r}: names must differ")
        names[parameter] = name
        taken.add(name)
    held = {p for group in optimizer.param_groups for p in group["params"]}
    strangers = [name for p, name in names.items() if p.requires_grad and p not in held]
    if strangers:
        raise OptionError(
            f"named_parameters has {_listed(strangers)}, which the optimizer does not: add them to it, freeze them "
            f"with requires_grad_(False), or pass only the names of what it holds"
        )
    nameless = [name for p, name in default_names(optimizer.param_groups).items() if p not in names]
    if nameless:
        raise OptionError(
            f"the optimizer has {_listed(nameless)} (group and place), which named_parameters does not: name all of "
            f"them, or pass no names at all"
        )
    return {p: name for p, name in names.items() if p in held}


def _listed(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")
