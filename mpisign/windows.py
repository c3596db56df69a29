"""Local steps between two exchanges: the parameters that all ranks have in common, and how far this rank has gone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from mpisign.bitmap.tensors import strides_of
from mpisign.errors import CheckpointError
from mpisign.memory.saved import is_of_floats
from mpisign.memory.store import state_dtype
from mpisign.trees import shown

__all__ = ["KEY", "Windows"]

KEY = "local_steps"  # of what is kept here, in an optimizer's memory

LIMIT = 2**62  # of steps


class Windows:
    """Of one optimizer, whose *local* parameters are the model's, and whose *common* ones are kept here.

    A window begins with equal parameters, ``local == common`` in the model's precision. What its owner writes into the
    model then (a loaded state, a broadcast) is taken over into the common ones; what is written later in a window is
    a part of the rank's difference. Differences are from what the local ones began with, which in 16 bits is not quite
    what is common: what rounding has taken from that is no motion.

    Where a decision comes later than the window's end, what was sent is kept until then, and the next window goes on
    from it: its difference is what a rank has done since.

    Attributes:
        position: how many steps of the present window have been called, skipped ones included.
    """

    def __init__(self, parameters: Sequence[torch.Tensor]) -> None:
        self.position = 0
        self._sent: dict[torch.Tensor, torch.Tensor] = {}  # local values at the last window's end, if it is undecided
        self._moved: set[torch.Tensor] = set()  # of those, whose difference counts
        self._common: dict[torch.Tensor, torch.Tensor] = {}
        self._known: set[torch.Tensor] = set()  # whose common value is what all ranks have
        self._touched: set[torch.Tensor] = set()  # had a gradient in this window
        self._trained: set[torch.Tensor] = set()  # were no frozen ones in it, at least for a while
        self._shown = False
        self.follow(parameters)

    def follow(self, parameters: Sequence[torch.Tensor]) -> None:
        """Take note of parameters that were added or removed, or have moved to another device or type."""
        self._common = {parameter: self._of(parameter) for parameter in parameters}
        self._known = {p for p in self._known if p in self._common and self._common[p].shape == p.shape}
        self._touched &= self._common.keys()
        self._trained &= self._common.keys()
        self._moved &= self._common.keys()
        self._sent = {p: its for p, its in self._sent.items() if p in self._common and p.shape == its.shape}

    def needs(self, parameter: torch.Tensor) -> bool:
        """Whether it has a common value: it is trained, or was in a window that is not decided yet."""
        return parameter.requires_grad or parameter in self._trained or parameter in self._sent

    def _of(self, parameter: torch.Tensor) -> torch.Tensor:
        """Its common tensor, which stays the same object, as the outer optimizer has it; a frozen one's is empty."""
        common, dtype = self._common.get(parameter), state_dtype(parameter.dtype)
        shape = parameter.shape if self.needs(parameter) else torch.Size([0])
        if common is not None and (common.shape, common.dtype, common.device) == (shape, dtype, parameter.device):
            return common
        if shape == parameter.shape:
            values = parameter if common is None or common.shape != shape else common
            laid = torch.empty_strided(shape, strides_of(parameter), dtype=dtype, device=parameter.device)
            laid.copy_(values.detach())
        else:
            laid = torch.empty(shape, dtype=dtype, device=parameter.device)
        if common is None:
            return laid.requires_grad_(parameter.requires_grad)
        common.grad = None
        common.data = laid
        return common

    def common(self, parameters: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The common tensors of these."""
        return [self._common[parameter] for parameter in parameters]

    # ------------------------------------------------------------------------------------------- a window

    def begin(self) -> None:
        """Before a step, or before sitting out: a window that begins takes over what its owner has written."""
        self._trained.update(parameter for parameter in self._common if parameter.requires_grad)
        self._known &= self._trained.union(self._sent)
        self.take_over()
        for parameter in self._trained - self._known:
            self._common[parameter].detach().copy_(parameter.detach())
        self._known |= self._trained
        for parameter, common in self._common.items():
            common.requires_grad_(parameter in self._known)

    def _written(self) -> list[torch.Tensor]:
        """Those into which their owner has written what is to be common."""
        return [] if self.is_apart else self._apart(self._known)

    def take_over(self) -> None:
        """Let what was written into the model before its window has begun be common."""
        for parameter in self._written():
            self._common[parameter].detach().copy_(parameter.detach())

    def stepped(self, moved: Sequence[torch.Tensor]) -> None:
        """A step was called, in which these parameters had a gradient that was applied."""
        self.position += 1
        self._touched.update(moved)

    def differ(self) -> None:
        """Leave in each common tensor's ``grad`` how far the local one has gone down; None where nothing has moved."""
        self._differ({parameter: parameter.detach() for parameter in self._all_moved()})

    def _all_moved(self) -> set[torch.Tensor]:
        return self._touched.union(self._apart(self._trained - self._touched))

    def _differ(self, values: Mapping[torch.Tensor, torch.Tensor]) -> None:
        for parameter, common in self._common.items():
            common.grad = None
            if (its := values.get(parameter)) is not None:
                common.grad = common.detach().to(parameter.dtype).to(common.dtype) - its.to(common)

    def _apart(self, parameters: Iterable[torch.Tensor]) -> list[torch.Tensor]:
        """Those that do not hold their common value. However they were written: by ``.data``, say."""
        some = list(parameters)
        if not some:
            return []
        pairs = ((p.detach(), self._common[p].detach().to(p.dtype)) for p in some)
        differ = torch.stack([local.ne(common).any() for local, common in pairs]).tolist()
        return [parameter for parameter, its in zip(some, differ, strict=True) if its]

    def end(self) -> None:
        """Go on from the common parameters, in a new window."""
        for parameter, common in self._common.items():
            common.grad = None  # its memory is free until the next exchange
            if parameter in self._trained:
                parameter.detach().copy_(common.detach())
        self.position, self._touched, self._trained = 0, set(), set()

    def give_up(self) -> None:
        """Go on from the common parameters where no window has begun, whatever the local ones are."""
        for parameter in self._written():
            parameter.detach().copy_(self._common[parameter].detach())

    def part(self) -> None:
        """Begin a new window, while it is not decided yet how the common parameters move by what was done in this."""
        self._moved = self._all_moved()
        self._sent = {parameter: parameter.detach().clone() for parameter in self._trained}
        self.position, self._touched, self._trained = 0, set(), set()

    def differ_as_sent(self) -> None:
        """As :meth:`differ`, by what the local parameters were when the last window ended."""
        self._differ({parameter: self._sent[parameter] for parameter in self._moved.intersection(self._sent)})

    def meet(self) -> None:
        """Go on from the common parameters, which have moved, and what was done here since the last window's end.

        In 16 bits both are numbers of the model's precision, whose sum is rounded only where it grows beyond a power of
        two: the next difference is what was done, and no more.
        """
        for parameter, sent in self._sent.items():
            common = self._common[parameter]
            done = parameter.detach().to(common.dtype) - sent.to(common)
            parameter.detach().copy_(done.nan_to_num_(0.0, 0.0, 0.0).add_(common.detach().to(parameter.dtype)))
            common.grad = None
        self._sent, self._moved = {}, set()

    @property
    def is_undecided(self) -> bool:
        """Whether a window has ended whose decision is not there yet."""
        return bool(self._sent)

    @property
    def is_apart(self) -> bool:
        """Whether this rank's parameters are others than the common ones, as a window has begun or is undecided."""
        return self.position > 0 or self.is_undecided

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Inside, the local parameters hold the common ones' values; afterwards their own again, bit for bit."""
        if self._shown:  # already
            yield
            return
        with torch.no_grad():
            away = self._apart(self._known) if self.is_apart else []  # else what is written there will be common
            own = [p.detach().clone() for p in away]
            for parameter in away:
                parameter.detach().copy_(self._common[parameter].detach())
        self._shown = True
        try:
            yield
        finally:
            self._shown = False
            with torch.no_grad():
                for parameter, values in zip(away, own, strict=True):
                    parameter.detach().copy_(values)

    @property
    def is_shown(self) -> bool:
        """Whether the model holds the common parameters at present, for a while."""
        return self._shown

    # -------------------------------------------------------------------------------------------- states

    def state_dict(self) -> dict[str, Any]:
        """By place among the parameters; plain types and tensors only.

        Where the model holds the common parameters, it is that of a window that has not begun. What was written into
        the model before one is common already.
        """
        written = set(self._written())
        places = {parameter: place for place, parameter in enumerate(self._common)}
        begun = 0 if self._shown else self.position
        undecided = {} if self._shown else self._sent
        return {
            "position": begun,
            "touched": sorted(places[parameter] for parameter in self._touched if begun),
            "trained": sorted(places[parameter] for parameter in self._trained if begun),
            "sent": {places[parameter]: its for parameter, its in undecided.items()},
            "moved": sorted(places[parameter] for parameter in self._moved.intersection(undecided)),
            "common": {
                places[p]: p.detach().to(c.dtype) if p in written else c.detach()
                for p, c in self._common.items()
                if p in self._known
            },
        }

    def checked(self, saved: Any, whose: str) -> dict[str, Any]:
        """What :meth:`state_dict` gave, looked at. Raises :class:`CheckpointError`, naming what cannot be."""
        parameters = list(self._common)

        def demand(good: bool, where: str, value: object, what: str) -> None:
            if not good:
                raise CheckpointError(
                    f"{whose}: in this state ['mpisign']['local_steps']{where} is {shown(value)}, and not {what}: it "
                    f"is damaged, or of another model"
                )

        demand(isinstance(saved, Mapping), "", saved, "a dict")
        position = saved.get("position")
        demand(type(position) is int and 0 <= position < LIMIT, "['position']", position, "a number of steps")
        for name in ("touched", "trained", "moved"):
            its = saved.get(name)
            fit = isinstance(its, (list, tuple)) and all(type(p) is int and 0 <= p < len(parameters) for p in its)
            demand(fit, f"[{name!r}]", its, f"a list of places among {len(parameters)} parameters")
        for name in ("common", "sent"):
            its = saved.get(name)
            demand(isinstance(its, Mapping), f"[{name!r}]", its, "a dict of tensors")
            for place, value in its.items():
                where = f"[{name!r}][{shown(place)}]"
                of_one = type(place) is int and 0 <= place < len(parameters)
                demand(of_one, where, value, "of a parameter of this model")
                fit = is_of_floats(value) and value.shape == parameters[place].shape
                demand(fit, where, value, f"a tensor of shape {tuple(parameters[place].shape)}")
        return dict(saved)

    def load(self, saved: Mapping[str, Any]) -> None:
        """Take over what :meth:`checked` has found good."""
        parameters = list(self._common)
        self.position = saved["position"]
        self._touched = {parameters[place] for place in saved["touched"]}
        self._trained = {parameters[place] for place in saved["trained"]}
        self._moved = {parameters[place] for place in saved["moved"]}
        sent = {parameters[place]: its for place, its in saved["sent"].items()}
        self._sent = {parameter: its.to(parameter, copy=True) for parameter, its in sent.items()}
        self.follow(parameters)
        used = {place: parameters[place] for place in saved["common"]}
        self._known = {parameter for parameter in used.values() if self._common[parameter].shape == parameter.shape}
        for place, parameter in used.items():
            if parameter in self._known:
                self._common[parameter].detach().copy_(saved["common"][place])

    def forget(self) -> None:
        """The next window begins with the parameters as they are then."""
        self.position, self._touched, self._trained, self._known = 0, set(), set(), set()
        self._sent, self._moved = {}, set()
