"""State dicts as JSON and a list of tensors, and back."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch

from mpisign.bitmap.tensors import unreadable

__all__ = ["dtype_of", "flatten", "name_of", "shown", "unflatten"]


def _is_integer(dtype: torch.dtype) -> bool:
    return re.fullmatch(r"torch\.u?int(8|16|32|64)", str(dtype)) is not None


# Those whose elements are numbers of whole bytes; others can hardly be copied.
_DTYPES = {
    str(it).removeprefix("torch."): it
    for it in vars(torch).values()
    if isinstance(it, torch.dtype) and (it.is_floating_point or it.is_complex or it is torch.bool or _is_integer(it))
}


def name_of(dtype: torch.dtype) -> str:
    """``"float32"`` of ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """The other way round. Raises KeyError."""
    return _DTYPES[name]


def flatten(tree: Any, tensors: list[torch.Tensor], where: str = "") -> Any:  # noqa: PLR0911 - a line a kind
    """Plain JSON for a tree of dicts, lists, tuples and plain values; its tensors are appended to ``tensors``.

    Values stand for themselves, and everything else is a list that begins with what it is.

    Raises:
        TypeError: something is of another type; names its place.
    """
    if isinstance(tree, torch.Tensor):
        if problem := unreadable(tree):
            raise TypeError(f"state{where} is {problem}")
        if name_of(tree.dtype) not in _DTYPES:
            raise TypeError(f"state{where} is a tensor of {tree.dtype}")
        tensors.append(tree)
        return ["tensor", len(tensors) - 1]
    if isinstance(tree, torch.dtype):
        return ["dtype", name_of(tree)]
    if isinstance(tree, dict):
        return ["dict", [[_key(key, where), flatten(its, tensors, f"{where}[{key!r}]")] for key, its in tree.items()]]
    if type(tree) in (list, tuple):
        items = [flatten(item, tensors, f"{where}[{at}]") for at, item in enumerate(tree)]
        return [type(tree).__name__, items]
    if tree is None or isinstance(tree, (bool, str)):
        return tree
    for kind in (int, float):  # also NumPy's, which are subclasses or have .item()
        if isinstance(tree, kind):
            return kind(tree)
    if type(tree).__module__ == "numpy" and getattr(tree, "ndim", None) == 0:
        return flatten(tree.item(), tensors, where)
    raise TypeError(f"state{where} is a {type(tree).__module__}.{type(tree).__qualname__}")


def unflatten(tree: Any, tensors: Sequence[torch.Tensor]) -> Any:
    """The tree that :func:`flatten` has made this of; ValueError, TypeError, KeyError or IndexError if it is none."""
    if not isinstance(tree, list):
        return tree
    kind, content = tree
    if kind == "tensor":
        if type(content) is not int or content < 0:
            raise ValueError(f"there is no tensor {content!r}")
        return tensors[content]
    if kind == "dtype":
        return dtype_of(content)
    if kind == "dict":
        return {_key(key, ""): unflatten(value, tensors) for key, value in content}
    if kind in ("list", "tuple"):
        items = [unflatten(item, tensors) for item in content]
        return items if kind == "list" else tuple(items)
    raise ValueError(f"there is no kind of tree called {kind!r}")


def _key(key: Any, where: str) -> str | int:
    if isinstance(key, (str, int)):
        return key
    raise TypeError(f"state{where} has the key {key!r}, which is neither a string nor an integer")


def shown(value: object) -> str:
    """What stands in a state, for a message: short values themselves, and of others what they are."""
    if isinstance(value, torch.Tensor):
        if value.dim() == 0 and value.layout == torch.strided and not value.is_meta:
            return f"tensor({value.item()}), {name_of(value.dtype)}"
        where = "" if value.layout == torch.strided and not value.is_meta else f" ({value.layout} on {value.device})"
        return f"a tensor {tuple(value.shape)} of {name_of(value.dtype)}{where}"
    if value is None or isinstance(value, (bool, float)) or (isinstance(value, int) and abs(value) < 2**64):
        return repr(value)
    if isinstance(value, (list, tuple)) and len(value) <= 4 and not any(isinstance(it, (list, tuple)) for it in value):
        return f"({', '.join(map(shown, value))})"
    return repr(value[:40]) if isinstance(value, str) else f"a {type(value).__name__}"
