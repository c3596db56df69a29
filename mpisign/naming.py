"""The names of an optimizer's parameters, for messages and the layout's fingerprint."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.optim import Optimizer

from mpisign.errors import OptionError

__all__ = ["default_names", "names_of"]


def default_names(groups: list[dict[str, Any]], first: int = 0) -> dict[torch.Tensor, str]:
    names: dict[torch.Tensor, str] = {}
    for at, group in enumerate(groups, first):
        given = group.get("param_names") or [f"group{at}.param{i}" for i in range(len(group["params"]))]
        names.update(zip(group["params"], given, strict=True))
    return names


def names_of(
    optimizer: Optimizer, named_parameters: Iterable[tuple[str, torch.Tensor]] | None
) -> dict[torch.Tensor, str]:
    if named_parameters is None:
        return default_names(optimizer.param_groups)
    names: dict[torch.Tensor, str] = {}
    for entry in named_parameters:
        if not (isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[0], str)):
            raise OptionError("named_parameters must give (name, parameter) pairs: pass model.named_parameters()")
        name, parameter = entry
        if parameter in names:
            raise OptionError(f"one parameter is named twice, {names[parameter]!r} and {name!r}: name it once")
        if name in names.values():
            raise OptionError(f"two parameters are named {name!r}: names must differ")
        names[parameter] = name
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
