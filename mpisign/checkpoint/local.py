"""Checkpoints of replicas that differ: what ranks have in common is saved once, and where each has gone, by each.

They differ between the exchanges of local steps, and where ranks train models of their own, which they mix (MoNNA).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from mpisign.checkpoint.state import State, Stateful
from mpisign.errors import CheckpointError
from mpisign.windows import KEY
from mpisign.wrapping import lets_replicas_differ

__all__ = ["divide", "leave", "put_together", "restart"]

PERSONAL = ("position", "touched", "trained", "sent", "moved")


def divide(shared: State, own: State, model: torch.nn.Module, optimizer: Stateful) -> None:
    """Of an optimizer with ``every``: the model that is shared becomes the common one, and this rank's goes to its own.

    So does its schedule, as rates may differ by rank, too. Of models that ranks mix rank 0's is shared. Changes both in
    place; does nothing to a state of another optimizer.
    """
    memory = own["mpisign"]
    local = None if memory is None else memory.pop(KEY, None)
    if local is None:
        if lets_replicas_differ(optimizer):
            names = (name for name, _ in model.named_parameters(remove_duplicate=False) if name in shared["model"])
            own["parameters"] = {name: shared["model"][name] for name in names}
            own["optimizer"], own["scheduler"] = shared["optimizer"], shared["scheduler"]
        return
    parameters = _parameters(optimizer)
    places = {parameters[place]: place for place in local["common"]}
    weights, kept = shared["model"], {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter in places and name in weights:
            common = local["common"][places[parameter]]
            if local["position"] or local["sent"]:
                kept[name] = weights[name]
            weights[name] = common.to(parameter.dtype)
    own["parameters"], own["optimizer"], own["scheduler"] = kept, shared["optimizer"], shared["scheduler"]
    own["mpisign"] = {**memory, KEY: {key: local.pop(key) for key in PERSONAL}}
    shared["optimizer"] = {KEY: local}


def put_together(shared: State, own: State, file: Any, optimizer: Any) -> None:
    """For a rank that goes on where it was: the other way round. Raises :class:`CheckpointError`."""
    local = _common(shared, own, file)
    if local is None and not (lets_replicas_differ(optimizer) and "parameters" in own):
        return
    kept, state = _personal(own, file)
    unknown = sorted(map(str, kept.keys() - shared["model"].keys()))
    if unknown:
        raise CheckpointError(f"{file}: 'parameters' has {unknown[0]!r}, which the model has not")
    shared["model"].update(kept)
    shared["optimizer"] = state
    _take_schedule(shared, own)
    if local is not None:
        own["mpisign"] = {**own["mpisign"], KEY: {**local, **own["mpisign"][KEY]}}


def restart(shared: State, memory: dict[str, Any] | None, own: State, owns: Sequence[State], file: Any) -> list[int]:
    """For a rank of another number of ranks: it goes on from the common parameters, with the optimizer of ``own``.

    Returns:
        How many steps of a window are given up thereby, by rank that had saved.
    """
    local = _common(shared, own, file)
    if local is None or memory is None:
        return []
    shared["optimizer"] = own["optimizer"]
    _take_schedule(shared, own)
    memory[KEY] = {**local, "position": 0, "touched": [], "trained": [], "sent": {}, "moved": []}
    every = local["every"] if isinstance(local.get("every"), int) else 0
    steps = [its["position"] + every * bool(its["sent"]) for its in (one["mpisign"][KEY] for one in owns)]
    return [number for number in steps if number]


def leave(shared: State, first: State, file: Any) -> None:
    """For who goes on without local steps: from the common parameters, with the optimizer of ``first``, rank 0's."""
    _common(shared, first, file)
    shared["optimizer"] = first["optimizer"]


def _personal(own: State, file: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """A rank's own parameters and optimizer. Raises :class:`CheckpointError`."""
    for name in ("parameters", "optimizer"):
        if not isinstance(own.get(name), dict):
            raise CheckpointError(f"{file}: {name!r} is missing, and the checkpoint is one of replicas that differ")
    return own["parameters"], own["optimizer"]


def _take_schedule(shared: State, own: State) -> None:
    """Of checkpoints that have it for each rank, which 0.2 did not write."""
    shared["scheduler"] = own.get("scheduler", shared["scheduler"])


def _common(shared: State, own: State, file: Any) -> dict[str, Any] | None:
    """What is shared of local steps; None if it was saved without ``every``. Raises :class:`CheckpointError`."""
    local = shared["optimizer"].get(KEY)
    if local is None:
        return None
    _personal(own, file)
    memory = own["mpisign"]
    personal = memory.get(KEY) if isinstance(memory, dict) else None
    if not isinstance(local, dict) or not isinstance(personal, dict) or set(personal) != set(PERSONAL):
        raise CheckpointError(f"{file}: {KEY!r} is damaged, or of something else")
    return local


def _parameters(optimizer: Any) -> list[torch.Tensor]:
    groups: Iterable[dict[str, Any]] = optimizer.param_groups
    return [parameter for group in groups for parameter in group["params"]]
