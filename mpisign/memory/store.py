"""Where a rank keeps its memory: one set of state tensors a parameter, saved and restored a rank at a time."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from mpisign.bitmap.tensors import strides_of
from mpisign.errors import CheckpointError
from mpisign.memory import Memory
from mpisign.world import World

__all__ = ["MemoryStore", "state_dtype"]

STATE_VERSION = 1
NUMPY_DTYPES = {torch.float32: np.float32, torch.float64: np.float64}


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a memory keeps its state: fp32 for 16-bit parameters, else the parameter's own."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


class MemoryStore:
    """The state of ``memory`` for every parameter that has had a gradient here.

    Each tensor has its parameter's shape and wire order, starts at zero, and is changed in place.
    """

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self._place = (0, 1)  # rank and size of the job it belongs to
        self._states: dict[torch.Tensor, dict[str, torch.Tensor]] = {}

    def of(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        """The state of one parameter by field, made on first use."""
        if parameter not in self._states:
            self._states[parameter] = {field: _lay(parameter, None) for field in self.memory.fields}
        return self._states[parameter]

    def follow(self, parameters: Sequence[torch.Tensor], world: World) -> None:
        """Take note of changes: forget parameters no longer held, and lay the state out anew where they differ."""
        self._place = (world.rank, world.size)
        held = set(parameters)
        self._states = {parameter: state for parameter, state in self._states.items() if parameter in held}
        for parameter, state in self._states.items():
            for field, value in state.items():
                if value.shape != parameter.shape:
                    state[field] = _lay(parameter, None)
                elif value.dtype != state_dtype(parameter.dtype) or value.stride() != strides_of(parameter):
                    state[field] = _lay(parameter, value)

    def state_dict(self, parameters: Sequence[torch.Tensor], step: int, method: str) -> dict[str, Any]:
        """This rank's memory, keyed by place in ``parameters``; plain types and tensors only."""
        rank, size = self._place
        return {
            "version": STATE_VERSION,
            "rank": rank,
            "size": size,
            "step": step,
            "method": method,
            "memory_of": self.memory.name,
            "memory": {
                place: dict(self._states[parameter])
                for place, parameter in enumerate(parameters)
                if parameter in self._states
            },
        }

    def restored(self, saved: dict[str, Any] | None, parameters: Sequence[torch.Tensor], world: World) -> MemoryStore:
        """A new store with the state that :meth:`state_dict` saved, or a fresh one, with a warning why.

        Raises:
            CheckpointError: saved by a job of another size, by a newer version, or for other parameters.
        """
        store = MemoryStore(self.memory)
        store._place = (world.rank, world.size)
        fresh = f"rank {world.rank}: the memory ({self.memory.name}) starts fresh: "
        if saved is None:
            if self.memory.fields:
                warnings.warn(fresh + "this is the state of a plain optimizer, which has none", stacklevel=3)
            return store
        if saved["version"] > STATE_VERSION:
            raise CheckpointError(
                f"rank {world.rank}: this state has version {saved['version']}, written by a newer mpisign; this one "
                f"reads {STATE_VERSION}: pip install --upgrade mpisign"
            )
        if saved["size"] != world.size:
            raise CheckpointError(
                f"rank {world.rank}: this state was saved by a job of {saved['size']} ranks and this one has "
                f"{world.size}, so the ranks' memories do not fit: start with -n {saved['size']}, or give the memory "
                f"up with state_dict.pop('mpisign')"
            )
        if saved["rank"] != world.rank or saved["memory_of"] != self.memory.name:
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
                        f"rank {world.rank}: the saved {field} of parameter {place} has shape {tuple(value.shape)}, "
                        f"which is not this model's: load the state of the same model"
                    )
            store._states[parameters[place]] = {
                field: _lay(parameters[place], value) for field, value in fields.items()
            }
        return store


def _lay(parameter: torch.Tensor, value: torch.Tensor | None) -> torch.Tensor:
    """A new tensor in the parameter's shape and wire order: a copy of ``value``, or zeros."""
    # NumPy asks the system for huge pages where torch does not, and a memory is read and written at every step.
    zeros = torch.from_numpy(np.zeros(parameter.numel(), NUMPY_DTYPES[state_dtype(parameter.dtype)]))
    laid = zeros.as_strided(parameter.shape, strides_of(parameter))
    return laid if value is None else laid.copy_(value)
