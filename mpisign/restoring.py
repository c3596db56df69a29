"""Loads a state into the wrapped optimizer: wholly, so that the next step works, or not at all.

torch's optimizers take what they are given and fail in a later step. What they need there, they say themselves: a
parameter of at most two elements a dimension takes a step with the same options, and what its state is then, the loaded
state must be, too.
"""

from __future__ import annotations

import inspect
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch.optim import Optimizer

from mpisign.errors import CheckpointError
from mpisign.trees import shown

__all__ = ["as_it_was", "load"]

Entry = dict[str, Any]
"""What an optimizer keeps for one parameter."""


def load(optimizer: Optimizer, state: Mapping[str, Any], whose: str) -> None:
    """``optimizer.load_state_dict(state)``, and then all that a step needs is there.

    Args:
        whose: begins the error.

    Raises:
        CheckpointError: something is missing or of another kind; names it. The optimizer is as it was.
    """
    with as_it_was(optimizer) as before:
        try:
            optimizer.load_state_dict(dict(state))
        except Exception as error:  # whatever torch, or a hook, makes of it
            named = _misshapen(optimizer, state) or _unfit(optimizer, state) or _said(error)
            raise CheckpointError(
                f"{whose}: this state does not load into this {type(optimizer).__name__}: {named}. Load the state of "
                f"the same optimizer, over the same parameters"
            ) from error
        problem = _problem(optimizer, before["param_groups"], before["state"])
        if problem:
            raise CheckpointError(
                f"{whose}: with this state the next step of {type(optimizer).__name__} would fail: {problem}. Load the "
                f"state of the same optimizer, over the same parameters"
            )


@contextmanager
def as_it_was(optimizer: Optimizer) -> Iterator[dict[str, Any]]:
    """Gives an optimizer's attributes, and puts them back on an exception: torch loads a state into new objects."""
    before = dict(vars(optimizer))
    try:
        yield before
    except BaseException:
        vars(optimizer).clear()
        vars(optimizer).update(before)
        raise


def _misshapen(optimizer: Optimizer, state: Mapping[str, Any]) -> str:  # noqa: PLR0911 - a line a kind
    """What no optimizer can load, or "" where it is something else that cannot be."""
    for name, kind in (("state", Mapping), ("param_groups", (list, tuple))):
        if not isinstance(state.get(name), kind):
            return f"[{name!r}] is {shown(state[name]) if name in state else 'missing'}"
    groups, own = state["param_groups"], optimizer.param_groups
    if len(groups) != len(own):
        return f"['param_groups'] has {len(groups)} groups, and this optimizer {len(own)}"
    for at, (group, its) in enumerate(zip(groups, own, strict=True)):
        where = f"['param_groups'][{at}]"
        if not isinstance(group, Mapping):
            return f"{where} is {shown(group)}"
        places = group.get("params")
        if not isinstance(places, (list, tuple)) or not all(type(place) is int for place in places):
            return (
                f"{where}['params'] is {shown(places) if 'params' in group else 'missing'}, and not a list of numbers"
            )
        if len(places) != len(its["params"]):
            return f"{where}['params'] has {len(places)} parameters, and this optimizer's {len(its['params'])}"
    for place, entry in state["state"].items():
        if isinstance(place, int) and not isinstance(entry, Mapping):
            return f"['state'][{place}] is {shown(entry)}"
    return ""


def _unfit(optimizer: Optimizer, state: Mapping[str, Any]) -> str:
    """What in a state that has not been taken is of another kind than what the optimizer has, or ""."""
    for at, (group, own) in enumerate(zip(state["param_groups"], optimizer.param_groups, strict=True)):
        for key in (key for key in optimizer.defaults if key in own and key in group):
            if not any(_may_be(optimizer, group[key], its.get(key)) for its in (own, optimizer.defaults)):
                return f"['param_groups'][{at}][{key!r}] is {shown(group[key])}, and here {shown(own[key])}"
        for number, parameter in zip(group["params"], own["params"], strict=True):
            sample = Sample(optimizer, own, own, parameter, optimizer.state.get(parameter) or {})
            for key, value in state["state"].get(number, {}).items():
                usual = (sample.kept or {}).get(key)
                scalar = isinstance(usual, torch.Tensor) and usual.dim() == 0 and _alike(value, usual)
                if not scalar and not sample.fits(value, usual, parameter):
                    described = sample.described(usual, parameter)
                    return f"['state'][{number}][{key!r}] is {shown(value)}, where it keeps {described}"
    return ""


def _problem(  # noqa: PLR0911 - a line a kind
    optimizer: Optimizer, usual_groups: Sequence[dict[str, Any]], before: Mapping[torch.Tensor, Entry]
) -> str:
    """What a step would stumble over, or ""."""
    if orphans := [place for place in optimizer.state if isinstance(place, int)]:
        return f"['state'][{orphans[0]}] is of a parameter that is in no ['params']"
    place = 0
    for at, (group, usual) in enumerate(zip(optimizer.param_groups, usual_groups, strict=True)):
        for key in (key for key in optimizer.defaults if key in usual):
            where = f"['param_groups'][{at}][{key!r}]"
            if key not in group:
                return f"{where} is missing"
            if not any(_may_be(optimizer, group[key], its[key]) for its in (usual, optimizer.defaults)):
                return f"{where} is {shown(group[key])}, and here {shown(usual[key])}"
        samples: dict[tuple[object, ...], Sample] = {}
        for parameter in group["params"]:
            if not parameter.requires_grad and not parameter.numel():
                place += 1  # it stands for a frozen one, and its state for what comes when that is trained again
                continue
            form: tuple[object, ...] = len(parameter.shape), 0 in parameter.shape, parameter.dtype, parameter.device
            if not _is_of_torch(optimizer):
                form = (id(parameter),)  # it may keep one thing for large ones, and another for small ones
            if form not in samples:
                samples[form] = Sample(optimizer, group, usual, parameter, before.get(parameter) or {})
                if samples[form].fails:
                    return f"['param_groups'][{at}]{samples[form].fails}"
            entry = optimizer.state.get(parameter, {})
            problem = samples[form].problem(parameter, entry)
            if problem:
                return f"['state'][{place}]{problem}"
            problem = samples[form].goes_on(parameter, entry)
            if problem:
                return f"['param_groups'][{at}]{problem} with ['state'][{place}]"
            place += 1
    return ""


def _is_of_torch(optimizer: Optimizer) -> bool:
    return type(optimizer).__module__.startswith("torch.optim")


def _may_be(optimizer: Optimizer, value: Any, usual: Any) -> bool:
    """Whether an option is of the kind that it is here. Of those that are tried, some of several may be None."""
    several = isinstance(value, (list, tuple)) and isinstance(usual, (list, tuple)) and len(value) == len(usual)
    if several and _is_of_torch(optimizer):
        value = [its if one is None else one for one, its in zip(value, usual, strict=True)]
    return _alike(value, usual)


def _alike(value: Any, usual: Any) -> bool:
    """Whether an option is of the kind that it is here; None here may be anything small."""
    if usual is None:
        return not isinstance(value, torch.Tensor) or _alike(value, 0.0)
    if isinstance(usual, bool):
        return value is None or (isinstance(value, (bool, int)) and value in (0, 1))
    if isinstance(usual, torch.Tensor) and usual.numel() != 1:
        return isinstance(value, torch.Tensor) and value.shape == usual.shape
    if isinstance(usual, (int, float, torch.Tensor)):
        if isinstance(value, torch.Tensor):
            number = value.numel() == 1 and not (value.is_complex() or value.is_meta or value.is_sparse)
        else:
            number = isinstance(value, float) or (type(value) is int and abs(value) < 2**63)
        return number and (math.isfinite(value) or not math.isfinite(usual))
    if isinstance(usual, (list, tuple)):
        return isinstance(value, (list, tuple)) and len(value) == len(usual) and all(map(_alike, value, usual))
    return isinstance(value, type(usual))


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}"


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


class Sample:
    """What an optimizer keeps for parameters of one kind.

    Args:
        group: its options, of which ``usual`` are those that this job began with.
        own: what it has kept for ``parameter`` before the load.

    Attributes:
        kept: what it keeps for such a parameter, None if that cannot be known.
        fails: which option is wrong, and what a step raises then, or "".
    """

    def __init__(
        self,
        optimizer: Optimizer,
        group: dict[str, Any],
        usual: dict[str, Any],
        parameter: torch.Tensor,
        own: Entry,
    ) -> None:
        self._optimizer, self._group, self._usual = optimizer, group, usual
        self._tried = False
        self._shape: Sequence[int] = parameter.shape
        self.kept: Entry | None = own or None
        self.fails = ""
        self._tries = _is_of_torch(optimizer)  # others may do more in a step than that
        if not self._tries:
            return
        self._shape = [min(2, length) for length in parameter.shape]
        self._initial = {key: self._small(parameter, value) for key, value in own.items()}
        try:
            self.kept = self._begun(parameter, group)
        except Exception as error:
            self.kept, self.fails = None, self._blame(lambda its: self._begun(parameter, its), error)

    def _begun(self, parameter: torch.Tensor, group: dict[str, Any]) -> Entry:
        """What is kept after a first step."""
        try:
            return self._stepped(parameter, {}, group)
        except Exception:
            if not self._initial:
                raise
            return self._stepped(parameter, dict(self._initial), group)  # Adagrad makes it beforehand

    def _blame(self, step: Callable[[dict[str, Any]], object], error: Exception) -> str:
        """The option without which steps do not fail, to be read after the place of its group."""
        for key in (key for key in self._usual if key in self._optimizer.defaults):
            if self._usual[key] is not self._group[key]:
                with suppress(Exception):
                    step({**self._group, key: self._usual[key]})
                    return f"[{key!r}] is {shown(self._group[key])}: {_said(error)}"
        return f" holds options that cannot be: {_said(error)}"

    def goes_on(self, parameter: torch.Tensor, entry: Mapping[str, Any]) -> str:
        """What is wrong with the options if steps do not go on from an entry, or ""; of a kind one is tried."""
        if not self._tries or self._tried or not entry:
            return ""
        self._tried = True
        small = {key: self._small(parameter, value) for key, value in entry.items()}

        def step(group: dict[str, Any]) -> Entry:
            return self._stepped(parameter, {key: _copied(value) for key, value in small.items()}, group, steps=2)

        try:
            step(self._group)
        except Exception as error:
            return self._blame(step, error)
        return ""

    def problem(self, parameter: torch.Tensor, entry: Any) -> str:
        """What is wrong with the entry of a parameter, or ""; to be read after its place."""
        if not isinstance(entry, Mapping):
            return f" is {shown(entry)}"
        kept = self.kept or {}
        lacks = [key for key, usual in kept.items() if entry.get(key) is None and usual is not None]
        for key, usual in kept.items():
            if key not in lacks and not self.fits(entry.get(key), usual, parameter):
                return f"[{key!r}] is {shown(entry.get(key))}, where it keeps {self.described(usual, parameter)}"
        if not lacks or self._does_without(parameter, entry):
            return ""
        return f"[{lacks[0]!r}] is {'None' if lacks[0] in entry else 'missing'}" if entry else " is missing"

    def _does_without(self, parameter: torch.Tensor, entry: Mapping[str, Any]) -> bool:
        """Whether steps go on from an entry in which something is missing."""
        if not self._tries:
            return not entry
        with suppress(Exception):
            small = {key: self._small(parameter, value) for key, value in entry.items()}
            self._stepped(parameter, small, self._group, steps=2)
            return True
        return False

    def _shape_for(self, usual: torch.Tensor, parameter: torch.Tensor) -> tuple[int, ...]:
        """The shape that belongs to a parameter where ``usual`` belongs to one of ``self._shape``."""
        if usual.dim() != parameter.dim():
            return tuple(usual.shape)
        its = zip(usual.shape, self._shape, parameter.shape, strict=True)
        return tuple(whole if length == sample else length for length, sample, whole in its)

    def fits(self, value: Any, usual: Any, parameter: torch.Tensor) -> bool:
        """Whether a value in the entry of a parameter is of the kind of ``usual``, in the sample's."""
        if isinstance(usual, torch.Tensor):
            return (
                isinstance(value, torch.Tensor)
                and value.layout == usual.layout
                and not value.is_meta
                and (value.is_floating_point(), value.is_complex()) == (usual.is_floating_point(), usual.is_complex())
                and tuple(value.shape) == self._shape_for(usual, parameter)
                and (
                    usual.dim() > 0 or parameter.dim() == 0 or 0 <= float(value) < math.inf
                )  # numbers of steps and so on
            )
        return usual is None or _alike(value, usual)

    def described(self, usual: Any, parameter: torch.Tensor) -> str:
        """What stands there in the entry of a parameter, for a message."""
        if not isinstance(usual, torch.Tensor):
            return shown(usual)
        return shown(torch.empty(self._shape_for(usual, parameter), dtype=usual.dtype, device="meta"))

    def _small(self, parameter: torch.Tensor, value: Any) -> Any:
        """What stands for ``value`` in the state of the sample."""
        if not isinstance(value, torch.Tensor) or value.dim() != parameter.dim():
            return _copied(value)
        its = zip(value.shape, parameter.shape, self._shape, strict=True)
        return value.new_zeros([small if length == whole else length for length, whole, small in its])

    @torch.no_grad()
    def _stepped(self, parameter: torch.Tensor, entry: Entry, group: dict[str, Any], steps: int = 1) -> Entry:
        """What an entry is after some steps with a group's options. Raises whatever a step does."""
        sample = torch.zeros(self._shape, dtype=parameter.dtype, device=parameter.device, requires_grad=True)
        sample.grad = torch.zeros_like(sample)
        # Not a copy by torch, which takes hooks and wrappers along; nor the decorated step, which calls them.
        trial = object.__new__(type(self._optimizer))
        vars(trial).update({key: value for key, value in vars(self._optimizer).items() if key != "step"})
        trial.state = defaultdict(dict, {sample: entry} if entry else {})
        trial.param_groups = [{**group, "params": [sample]}]
        for _ in range(steps):
            inspect.unwrap(type(trial).step)(trial)
        return dict(trial.state[sample])
