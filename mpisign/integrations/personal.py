"""What is a rank's own in a training: for its file beside a framework's checkpoint, all of which is rank 0's."""

from __future__ import annotations

from typing import Any

import torch

from mpisign.errors import CheckpointError
from mpisign.optimizer import DistributedSignOptimizer
from mpisign.places import rank
from mpisign.windows import KEY
from mpisign.wrapping import lets_replicas_differ

__all__ = ["put_back", "state", "taken"]

State = dict[str, Any]


def taken(optimizer: DistributedSignOptimizer, its: State, model: torch.nn.Module) -> State:
    """What is this rank's own, where ``its`` is a state of ``optimizer``; plain types and tensors, nothing is copied.

    That is its memory and the model's buffers that are saved; with ``every`` also the wrapped optimizer's state, and
    within a window its parameters; and both where ranks mix models of their own (MoNNA).
    """
    local, parameters = its["mpisign"].get(KEY), optimizer._parameters()
    own: State = {"mpisign": its["mpisign"], "buffers": _buffers(model)}
    if local is None and not lets_replicas_differ(optimizer):
        return own
    own["optimizer"] = {key: value for key, value in its.items() if key != "mpisign"}
    if local is None or local["position"] or local["sent"]:
        places = range(len(parameters)) if local is None else local["common"]
        own["parameters"] = {place: parameters[place].detach() for place in places}
    return own


def state(own: State, optimizer: DistributedSignOptimizer, shared: State) -> State:
    """For ``optimizer`` to load: what :func:`taken` gave, and of ``shared``, rank 0's state, what was not in it."""
    kept = own.get("optimizer", shared) if _differs(optimizer, own) else shared
    # Rates are the same on all ranks, and a framework may have changed them since this rank has saved.
    return {**shared, "state": kept["state"], "mpisign": own["mpisign"]}


def put_back(own: State, optimizer: DistributedSignOptimizer, model: torch.nn.Module) -> None:
    """Write this rank's parameters and buffers into the model, where it had its own.

    Raises:
        CheckpointError: the model has no such parameter or buffer; it is as it was then.
    """
    parameters = own.get("parameters", {}) if _differs(optimizer, own) else {}
    targets: dict[Any, torch.Tensor] = dict(enumerate(optimizer._parameters()))
    pairs = [(f"parameter {place}", targets.get(place), value) for place, value in parameters.items()]
    here = _buffers(model)
    pairs += [(f"buffer {name!r}", here.get(name), value) for name, value in own.get("buffers", {}).items()]
    for what, target, value in pairs:
        if target is None or target.shape != value.shape:
            has = "no such" if target is None else f"one of shape {tuple(target.shape)}"
            raise CheckpointError(
                f"rank {rank()}: its file has a {what} of shape {tuple(value.shape)}, and this model has {has}: load "
                f"the checkpoint of the same model"
            )
    with torch.no_grad():
        for _, target, value in pairs:
            assert target is not None
            target.copy_(value)


def _buffers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    saved = model.state_dict().keys()
    return {name: its.detach() for name, its in model.named_buffers() if name in saved}


def _differs(optimizer: DistributedSignOptimizer, own: State) -> bool:
    """Whether it lets replicas differ, and did so when it was saved, in the same way."""
    if KEY in own["mpisign"]:
        return optimizer.outer is not None
    return lets_replicas_differ(optimizer)
