"""What may be wrapped: which torch optimizers, and what their parameters are called in messages."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim import Optimizer

from mpisign.errors import OptionError
from mpisign.method import Method
from mpisign.warning import warn

__all__ = [
    "check_wrappable",
    "default_names",
    "drop_frozen",
    "keep_defaults",
    "lets_replicas_differ",
    "local_steps_of",
    "methods_of",
    "names_of",
    "no_attribute",
    "wants_closure",
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
    _, *arguments = inspect.signature(type(optimizer).step).parameters.values()  # schedulers replace the bound one
    if any(it.default is it.empty and it.kind not in (it.VAR_POSITIONAL, it.VAR_KEYWORD) for it in arguments):
        raise wants_closure(optimizer)


def wants_closure(optimizer: Optimizer) -> OptionError:
    """The error for an optimizer whose step computes gradients of its own."""
    name = type(optimizer).__name__
    return OptionError(
        f"{name} cannot be wrapped, as its step() demands a closure: nobody has voted on the gradients that it leaves, "
        f"and the replicas would drift apart. Wrap the optimizer inside, if it has one, or give {name}.step() a "
        f"closure=None without which it applies the gradients that are there"
    )


@torch.inference_mode(False)  # in which it would make state that can never be changed outside
def no_attribute(wrapper: Optimizer, wrapped: Optimizer | None, name: str) -> AttributeError:
    """The error for an attribute that a wrapper has not; it says if the wrapped optimizer has it."""
    message = f"{type(wrapper).__name__!r} object has no attribute {name!r}"
    if not name.startswith("__") and hasattr(wrapped, name):
        message += f"; the wrapped {type(wrapped).__name__} has one: optimizer.wrapped.{name}"
    return AttributeError(message)


def methods_of(groups: Sequence[dict[str, Any]]) -> list[Method]:
    """The methods that parameter groups have of their own. Raises :class:`OptionError` if one is no method."""
    methods = [group["method"] for group in groups if "method" in group]
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
        warn(
            f"{type(optimizer).__name__} divides each coordinate by its running magnitude, and every coordinate of a "
            f"vote has magnitude 1: what remains is its momentum over votes. Usually SGD(lr=..., weight_decay=...) "
            f"with method=mpisign.lion() or mpisign.signum() is what you want; or keep {type(optimizer).__name__} with "
            f"every=8, method=mpisign.scaled_vote(), by which it steps on each rank's own gradients"
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
        warn(
            f"{type(optimizer).__name__} with {option} (parameter group {at}) around the vote of {method.name} "
            f"averages votes, which is another method. Momentum belongs to each rank, before the sign: wrap "
            f"SGD(lr=..., weight_decay=...) with momentum=0 and pass method={instead}; OneCycleLR and CyclicLR turn "
            f"it on unless they have cycle_momentum=False"
        )
        return True
    return False


def warn_of_epochs(method: Method) -> None:
    """Say that a method which changes with the epoch has not been told any."""
    warn(
        f"{method.name} changes with the epoch, and nobody has said which this is, so it stays as in epoch 0: call "
        f"optimizer.set_epoch(epoch) on every rank at the beginning of each epoch"
    )


@contextmanager
def keep_defaults(optimizer: Optimizer) -> Iterator[None]:
    """Afterwards its defaults are what they were: torch adds options of its own to those of any optimizer."""
    before = optimizer.defaults
    optimizer.defaults = dict(before)
    try:
        yield
    finally:
        optimizer.defaults = before


def drop_frozen(parameters: Iterable[torch.Tensor]) -> None:
    """Drop gradients that are left from before their parameters were frozen: nobody votes on them."""
    for parameter in parameters:
        if not parameter.requires_grad:
            parameter.grad = None


def local_steps_of(optimizer: object) -> Any:
    """The local steps of a DistributedSignOptimizer with ``every``; None of any other optimizer."""
    return getattr(optimizer, "_local", None) if hasattr(optimizer, "common_parameters") else None


def lets_replicas_differ(optimizer: object) -> bool:
    """Whether ranks train models of their own, which they mix (MoNNA)."""
    usual = getattr(optimizer, "method", None)
    if not isinstance(usual, Method):
        return False
    groups: list[dict[str, Any]] = getattr(optimizer, "param_groups", [])
    return any(group.get("method", usual).exchanges_models for group in groups)


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
    if isinstance(named_parameters, (torch.nn.Module, Mapping)) or not isinstance(named_parameters, Iterable):
        what = type(named_parameters).__name__
        raise OptionError(f"named_parameters={what} has no (name, parameter) pairs: pass model.named_parameters()")
    for entry in named_parameters:
        pair = isinstance(entry, tuple) and len(entry) == 2
        if not (pair and isinstance(entry[0], str) and isinstance(entry[1], torch.Tensor)):
            what = "a parameter" if isinstance(entry, torch.Tensor) else f"{entry!r:.40}"
            raise OptionError(
                f"named_parameters must give (name, parameter) pairs, and {what} is none: pass model.named_parameters()"
            )
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
