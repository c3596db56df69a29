"""Where a rank keeps its memory: one set of state tensors a parameter, saved and restored a rank at a time."""

from __future__ import annotations

import secrets
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from mpisign.bitmap.tensors import strides_of
from mpisign.errors import CheckpointError
from mpisign.group import Group
from mpisign.layout import Bucket, Layout
from mpisign.memory import Memory

__all__ = ["MemoryStore", "state_dtype"]

STATE_VERSION = 2
NUMPY_DTYPES = {torch.float32: np.float32, torch.float64: np.float64}


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a memory keeps its state: fp32 for 16-bit parameters, else the parameter's own."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


class MemoryStore:
    """The state of ``memory`` for every parameter that has had a gradient here, and of the deciding side.

    Each tensor of the memory has its parameter's shape and wire order, starts at zero, and is changed in place. What
    a rule keeps (a server's error, a centre) belongs to the pieces of parameters that this rank decides.

    When ranks come or go, every rank keeps its memory. What shard owners keep starts anew, as the shards are others
    now and some have left with their owner; what all ranks keep alike stays.

    Attributes:
        sharded: what a rule keeps is another piece on every rank, not the same on all.
        unsummed: ranks have come or gone since ``memory.summed`` was the sum over them.
    """

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.secret = secrets.token_hex(32) if memory.private else ""
        self.sharded = self.unsummed = False
        self._place = (0, 1)  # rank and size when it was last used, for a state that is asked for after shutdown()
        self._members: tuple[int, ...] | None = None  # the identities of the ranks it has been kept among
        self._states: dict[torch.Tensor, dict[str, torch.Tensor]] = {}
        self._pieces: dict[torch.Tensor, dict[int, torch.Tensor]] = {}  # by first element
        self._former: dict[torch.Tensor, dict[int, torch.Tensor]] = {}  # of an earlier layout, or another job
        self._rates: dict[torch.Tensor, float] = {}

    def of(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        """The state of one parameter by field, made on first use."""
        if parameter not in self._states:
            self._states[parameter] = {field: _lay(parameter, None) for field in self.memory.fields}
        return self._states[parameter]

    def follow(self, parameters: Sequence[torch.Tensor], group: Group) -> None:
        """Take note of changes: forget parameters no longer held, and lay the state out anew where they differ."""
        regrouped = self._is_regrouped(group)
        self._place, self._members = (group.rank, group.size), group.identities
        self.unsummed = self._is_unsummed(regrouped)
        held = {p for p in parameters if p.requires_grad} if regrouped and self.memory.summed else set(parameters)
        self._former = self._kept_pieces(regrouped)
        self._pieces = {}
        self._states = {parameter: state for parameter, state in self._states.items() if parameter in held}
        self._former = {parameter: pieces for parameter, pieces in self._former.items() if parameter in held}
        self._rates = {parameter: rate for parameter, rate in self._rates.items() if parameter in held}
        for parameter, state in self._states.items():
            for field, value in state.items():
                if value.shape != parameter.shape:
                    state[field] = _lay(parameter, None)
                elif (value.dtype, value.device) != (state_dtype(parameter.dtype), parameter.device) or (
                    value.stride() != strides_of(parameter)
                ):
                    state[field] = _lay(parameter, value)

    def follow_rates(self, groups: Sequence[dict[str, Any]]) -> None:
        """Rescale the fields that follow the learning rate, so that rate times field stays what it was.

        A step at rate 0 leaves them alone, as there is no factor that could undo it.
        """
        if not self.memory.follows_lr:
            return
        for group in groups:
            rate = float(group.get("lr", 1.0))
            for parameter in group["params"]:
                before = self._rates.get(parameter, rate)
                if before != rate != 0.0:
                    state = self._states.get(parameter, {})
                    owed = [state[field] for field in self.memory.follows_lr if field in state]
                    owed += self._pieces.get(parameter, {}).values()
                    for value in owed:
                        value.mul_(before / rate)
                    if parameter in self._former:  # not in place: it may be the caller's own state dict
                        former = self._former[parameter]
                        self._former[parameter] = {lo: value * (before / rate) for lo, value in former.items()}
                if rate != 0.0:
                    self._rates[parameter] = rate

    def piece(self, parameter: torch.Tensor, lo: int, hi: int) -> torch.Tensor:
        """What is kept for elements ``lo .. hi`` of a flat parameter by whoever decides them: (hi - lo,), in place."""
        mine = self._pieces.setdefault(parameter, {})
        if lo not in mine:
            kept = torch.zeros(hi - lo, dtype=state_dtype(parameter.dtype), device=parameter.device)
            self._recall(parameter, lo, kept)
            mine[lo] = kept
        return mine[lo]

    def remembered(self, layout: Layout, bucket: Bucket) -> torch.Tensor:
        """A bucket's previous decision of plain values, (1, length), to be kept up to date by the caller."""
        previous = torch.zeros((1, bucket.length), dtype=bucket.dtype, device=layout.device)
        for segment in bucket.segments:
            parameter = layout.parameters[segment.index]
            part = previous[0, segment.start : segment.stop]
            self._recall(parameter, 0, part)
            self._pieces[parameter] = {0: part}
        return previous

    def _recall(self, parameter: torch.Tensor, lo: int, kept: torch.Tensor) -> None:
        """Copy what earlier pieces hold of the elements from ``lo`` on."""
        for start, value in self._former.get(parameter, {}).items():
            begin, end = max(lo, start), min(lo + kept.numel(), start + value.numel())
            if begin < end:
                kept[begin - lo : end - lo] = value[begin - start : end - start]

    def _is_regrouped(self, group: Group) -> bool:
        """Whether it was kept among other ranks than these."""
        return self._members is not None and self._members != group.identities

    def _is_unsummed(self, regrouped: bool) -> bool:
        return bool(self.memory.summed) and (self.unsummed or regrouped)

    def _kept_pieces(self, regrouped: bool = False) -> dict[torch.Tensor, dict[int, torch.Tensor]]:
        """All pieces that are still good, without the former ones that present ones have replaced."""
        if regrouped and self.sharded:
            return {}
        kept = {parameter: dict(pieces) for parameter, pieces in self._pieces.items()}
        for parameter, former in self._former.items():
            present = kept.setdefault(parameter, {})
            for lo, value in former.items():
                if not any(lo < at + its.numel() and at < lo + value.numel() for at, its in present.items()):
                    present[lo] = value
        return kept

    def state_dict(
        self, parameters: Sequence[torch.Tensor], step: int, epoch: int | None, method: str, group: Group | None = None
    ) -> dict[str, Any]:
        """This rank's memory, keyed by place in ``parameters``; plain types and tensors only.

        Args:
            group: the ranks as they are now; None for those it was last used among.
        """
        rank, size = self._place if group is None else (group.rank, group.size)
        regrouped = group is not None and self._is_regrouped(group)
        pieces = self._kept_pieces(regrouped)
        return {
            "version": STATE_VERSION,
            "rank": rank,
            "size": size,
            "step": step,
            "epoch": epoch,
            "method": method,
            "memory_of": self.memory.name,
            "secret": self.secret,
            "unsummed": self._is_unsummed(regrouped),
            "memory": {
                place: dict(self._states[parameter])
                for place, parameter in enumerate(parameters)
                if parameter in self._states
            },
            "pieces": {place: pieces[p] for place, p in enumerate(parameters) if p in pieces},
            "rates": {place: self._rates[p] for place, p in enumerate(parameters) if p in self._rates},
        }

    def restored(self, saved: dict[str, Any] | None, parameters: Sequence[torch.Tensor], group: Group) -> MemoryStore:
        """A new store with the state that :meth:`state_dict` saved, or a fresh one, with a warning why.

        Raises:
            CheckpointError: saved by a job of another size, by a newer version, or for other parameters.
        """
        store = MemoryStore(self.memory)
        store._place = (group.rank, group.size)
        fresh = f"rank {group.rank}: the memory ({self.memory.name}) starts fresh: "
        if saved is None:
            if self.memory.fields:
                warnings.warn(fresh + "this is the state of a plain optimizer, which has none", stacklevel=3)
            return store
        if saved["version"] > STATE_VERSION:
            raise CheckpointError(
                f"rank {group.rank}: this state has version {saved['version']}, written by a newer mpisign; this one "
                f"reads {STATE_VERSION}: pip install --upgrade mpisign"
            )
        if saved["size"] != group.size:
            raise CheckpointError(
                f"rank {group.rank}: this state was saved by a job of {saved['size']} ranks and this one has "
                f"{group.size}, so the ranks' memories do not fit: start with -n {saved['size']}, or give the memory "
                f"up with state_dict.pop('mpisign')"
            )
        if saved["rank"] != group.rank or saved["memory_of"] != self.memory.name:
            if not self.memory.fields:
                return store
            warnings.warn(
                fresh + f"this is the state of rank {saved['rank']} under method {saved['method']!r}; "
                "to resume exactly, save and load one state a rank",
                stacklevel=3,
            )
            return store
        for place, fields in saved["memory"].items():
            for field, value in fields.items():
                if place >= len(parameters) or value.shape != parameters[place].shape:
                    raise CheckpointError(
                        f"rank {group.rank}: the saved {field} of parameter {place} has shape {tuple(value.shape)}, "
                        f"which is not this model's: load the state of the same model"
                    )
            store._states[parameters[place]] = {
                field: _lay(parameters[place], value) for field, value in fields.items()
            }
        for place, pieces in saved.get("pieces", {}).items():
            store._former[parameters[place]] = {lo: value.to(parameters[place].device) for lo, value in pieces.items()}
        store.unsummed = saved.get("unsummed", False)
        if self.memory.private:
            store.secret = saved.get("secret") or store.secret
        store._rates = {parameters[place]: rate for place, rate in saved.get("rates", {}).items()}
        return store


def _lay(parameter: torch.Tensor, value: torch.Tensor | None) -> torch.Tensor:
    """A new tensor in the parameter's shape and wire order: a copy of ``value``, or zeros."""
    dtype = state_dtype(parameter.dtype)
    if parameter.device.type == "cpu":
        # NumPy asks the system for huge pages where torch does not, and a memory is read and written at every step.
        zeros = torch.from_numpy(np.zeros(parameter.numel(), NUMPY_DTYPES[dtype]))
    else:
        zeros = torch.zeros(parameter.numel(), dtype=dtype, device=parameter.device)
    laid = zeros.as_strided(parameter.shape, strides_of(parameter))
    return laid if value is None else laid.copy_(value)
