"""What a step applies besides the decision: the options of parameter groups, as ranks tell them each other."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

__all__ = ["IMPLEMENTATION", "Hyperparameters", "described", "line", "options_of"]

Groups = Sequence[dict[str, Any]]

# How a step is computed, which may depend on a rank's device.
IMPLEMENTATION = frozenset({"params", "param_names", "method", "foreach", "fused", "capturable", "differentiable"})
# What torch's schedulers keep in groups for themselves.
SCHEDULERS = frozenset({"initial_lr", "swa_lr", "max_lr", "min_lr", "max_momentum", "base_momentum"})
APART = IMPLEMENTATION | SCHEDULERS

EXACT_INTEGERS = 2**53


def described(value: Any) -> str:
    """A value as text, the same for equal numbers of any type, with every digit; of large tensors a hash."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        if value.dtype == torch.bfloat16:
            value = value.float()
        value = value.item() if value.numel() == 1 else value.numpy()
    if isinstance(value, np.ndarray) and value.size > 8 and not value.dtype.hasobject:
        digest = hashlib.blake2b(np.ascontiguousarray(value).tobytes(), digest_size=8).hexdigest()
        return f"{value.shape} {value.dtype} #{digest}"
    if isinstance(value, (np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(value, int) and abs(value) >= EXACT_INTEGERS:
        return repr(value)
    if isinstance(value, (bool, int, float)):
        return repr(float(value) + 0.0)  # a zero has no sign
    if isinstance(value, (list, tuple)):
        return f"({', '.join(map(described, value))})"
    if isinstance(value, dict):
        return f"({', '.join(f'{key}: {described(value[key])}' for key in sorted(value, key=str))})"
    text = repr(value)
    return type(value).__qualname__ if " at 0x" in text else text  # addresses say nothing


def options_of(groups: Groups, apart: frozenset[str] = APART) -> Iterator[tuple[int, str, Any]]:
    """(group, name, value) in one order."""
    for at, group in enumerate(groups):
        for name in sorted(name for name in group if name not in apart):
            yield at, name, group[name]


def line(at: int, name: str, text: str) -> str:
    """What a difference is reported as."""
    return f"{name!r} of parameter group {at} = {text}"


class Hyperparameters:
    """What one optimizer's ranks apply, told once a step. Where nothing has changed it costs a comparison of a list.

    Numbers on a GPU are told one step later, so that nobody waits for them. What has changed between the vote and the
    step is told by the next one.

    Attributes:
        changed: there are other options than at the last time.
    """

    def __init__(self) -> None:
        self.changed = False
        self._told: list[Any] | None = None  # the values, if none of them can change in place
        self._digest = 0
        self._lines: list[str] = []
        self._owed: list[str] = []  # what was applied without having been told
        self._texts: dict[tuple[int, str], tuple[Any, str]] = {}  # values and their lines, as most do not change
        self._late: dict[tuple[int, str], tuple[int, torch.Tensor, torch.cuda.Event]] = {}

    def tell(self, optimizer: torch.optim.Optimizer, step: int) -> int:
        """63 bits that stand for all that is applied at exchange ``step``; never 0."""
        groups = optimizer.param_groups
        values = _values(groups)
        self.changed = not self._is_as_told(values)
        if self.changed or self._owed:
            self._lines = [f"the optimizer {type(optimizer).__name__}", *self._owed, *self._describe(groups, step)]
            digest = hashlib.blake2b("\0".join(self._lines).encode(), digest_size=8).digest()
            self._digest = (int.from_bytes(digest, "little") >> 1) or 1
            fixed = not self._owed and all(map(_is_fixed, values))
            self._told, self._owed = values if fixed else None, []
        return self._digest

    def lines(self) -> list[str]:
        """What was told last, one a line."""
        return self._lines

    def applied(self, optimizer: torch.optim.Optimizer) -> None:
        """The decision is applied now, after a vote that was some time ago."""
        if self._is_as_told(_values(optimizer.param_groups)):
            return
        told = set(self._lines)
        lines = [line(at, name, described(value)) for at, name, value in _here(optimizer.param_groups)]
        self._owed = [f"applied in the step before: {text}" for text in lines if text not in told]

    def forget(self) -> None:
        """This rank has sat out an exchange, and knows nothing of a step before the next."""
        self._owed, self._told = [], None
        self._late.clear()

    def _is_as_told(self, values: list[Any]) -> bool:
        try:
            return self._told is not None and values == self._told
        except (RuntimeError, ValueError):  # tensors and arrays have no truth
            return False

    def _describe(self, groups: Groups, step: int) -> list[str]:
        lines = []
        for at, name, value in options_of(groups):
            if isinstance(value, torch.Tensor) and value.is_cuda:
                taken, copy, copied = self._late.get((at, name), (-1, None, None))
                if copy is not None and copied is not None and taken == step - 1:
                    copied.synchronize()
                    lines.append(line(at, name, described(copy)))
                arrived = torch.cuda.Event()
                self._late[at, name] = step, value.detach().to("cpu", non_blocking=True), arrived
                arrived.record(torch.cuda.current_stream(value.device))
                continue
            kept, text = self._texts.get((at, name), (None, ""))
            if not text or kept is not value or not _is_fixed(value):
                text = line(at, name, described(value))
                self._texts[at, name] = value, text
            lines.append(text)
        return lines


def _here(groups: Groups) -> Iterator[tuple[int, str, Any]]:
    """Those of which nobody waits for a GPU."""
    return (it for it in options_of(groups) if not (isinstance(it[2], torch.Tensor) and it[2].is_cuda))


def _values(groups: Groups) -> list[Any]:
    values: list[Any] = []
    for group in groups:
        for name, value in group.items():
            if name not in APART:
                values += (name, value)
    return values


def _is_fixed(value: Any) -> bool:
    """Whether it cannot change in place."""
    if isinstance(value, tuple):
        return all(map(_is_fixed, value))
    return value is None or isinstance(value, (bool, int, float, complex, str, np.generic))
