"""What a rank's saved memory must be like: every field is looked at, and named, before anything is made of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from mpisign.errors import CheckpointError
from mpisign.trees import shown

__all__ = ["STATE_VERSION", "checked", "is_of_floats"]

STATE_VERSION = 2
LIMIT = 2**62  # of numbers of steps and places
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def is_number(value: object, least: int = 0) -> bool:
    return type(value) is int and least <= value < LIMIT


def is_of_floats(value: object) -> bool:
    """Whether it is a tensor that can be copied into a memory."""
    return (
        isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and value.dtype in FLOATS
        and value.device.type != "meta"
    )


def _is_secret(value: object) -> bool:
    return isinstance(value, str) and (value == "" or (len(value) == 64 and set(value) <= set("0123456789abcdef")))


def _is_rate(value: object) -> bool:
    return isinstance(value, float) and math.isfinite(value) and value != 0


Is = Callable[[object], bool]
# By field: what it must be, in words and as a test; for what is kept by place, also each of its entries.
FIELDS: dict[str, tuple[str, Is]] = {
    "rank": ("a rank's number", is_number),
    "size": ("a number of ranks", lambda it: is_number(it, 1)),
    "step": ("a number of steps", is_number),
    "epoch": ("None or a number of epochs", lambda it: it is None or is_number(it)),
    "method": ("a name", lambda it: isinstance(it, str)),
    "memory_of": ("a name", lambda it: isinstance(it, str)),
    "secret": ("64 hexadecimal digits, or nothing", _is_secret),
    "memory": ("a dict by place", lambda it: isinstance(it, dict)),
    "pieces": ("a dict by place", lambda it: isinstance(it, dict)),
    "rates": ("a dict by place", lambda it: isinstance(it, dict)),
    "others": ("a dict by place", lambda it: isinstance(it, dict)),
    "unsummed": ("True or False", lambda it: isinstance(it, bool)),
    "rows": ("a list of places", lambda it: isinstance(it, (list, tuple))),
}
ENTRIES: dict[str, tuple[str, Is]] = {
    "memory": ("a dict of tensors by field", lambda it: isinstance(it, dict)),
    "pieces": ("a dict of tensors by element", lambda it: isinstance(it, dict)),
    "rates": ("a learning rate", _is_rate),
    "others": ("a name", lambda it: isinstance(it, str)),
}
# What the first release did not write, and what no mean of several ranks has.
ABSENT = {"secret": "", "others": {}, "unsummed": False, "rows": []}


def checked(saved: Any, parameters: Sequence[torch.Tensor] | None, whose: str) -> dict[str, Any]:
    """A saved memory with all its fields, each of the right type; no tensor is copied.

    Args:
        parameters: for which places it must be; None for any.
        whose: begins the error.

    Raises:
        CheckpointError: a field is missing or cannot be what it is.
    """

    def demand(good: bool, where: str, value: object, what: str) -> None:
        if not good:
            raise CheckpointError(
                f"{whose}: in this state ['mpisign']{where} is {shown(value)}, and not {what}: it is damaged, or of "
                f"something else"
            )

    demand(isinstance(saved, dict), "", saved, "a dict")
    demand(is_number(saved.get("version"), 1), "['version']", saved.get("version"), "a number")
    if saved["version"] > STATE_VERSION:
        raise CheckpointError(
            f"{whose}: this state has version {saved['version']}, written by a newer mpisign; this one reads "
            f"{STATE_VERSION}: in the checkout of a newer one: pip install ."
        )
    whole = {**ABSENT, **saved}
    for name, (what, fits) in FIELDS.items():
        if name not in whole:
            raise CheckpointError(f"{whose}: in this state ['mpisign'][{name!r}] is missing: it is damaged")
        demand(fits(whole[name]), f"[{name!r}]", whole[name], what)
    places = [(name, place) for name in ENTRIES for place in whole[name]] + [("rows", place) for place in whole["rows"]]
    for name, place in places:
        demand(is_number(place), f"[{name!r}]", {}, f"by number of a parameter, as it has {shown(place)}")
        if parameters is not None and place >= len(parameters):
            raise CheckpointError(
                f"{whose}: ['mpisign'][{name!r}] of this state has a parameter {place}, and this model has "
                f"{len(parameters)} parameters: load the state of the same model"
            )
        if name in ENTRIES:
            what, fits = ENTRIES[name]
            demand(fits(whole[name][place]), f"[{name!r}][{place}]", whole[name][place], what)
    for place, fields in whole["memory"].items():
        for field, value in fields.items():
            where = f"['memory'][{place}][{shown(field)}]"
            demand(isinstance(field, str) and is_of_floats(value), where, value, "a tensor of floating-point numbers")
    for place, pieces in whole["pieces"].items():
        for lo, value in pieces.items():
            where = f"['pieces'][{place}][{shown(lo)}]"
            demand(is_number(lo), where, value, "by number of an element")
            demand(is_of_floats(value) and value.dim() == 1, where, value, "a flat tensor of floating-point numbers")
    return whole
