"""What a checkpoint holds: collected from the objects of a job, and put back."""

from __future__ import annotations

import copy
import hashlib
import io
import random
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from torch.nn.parameter import is_lazy

from mpisign.bitmap.tensors import unreadable
from mpisign.errors import CheckpointError, OptionError

__all__ = [
    "Snapshot",
    "State",
    "Stateful",
    "check_loadable",
    "check_stateful",
    "collect",
    "map_tensors",
    "put_back",
    "reseed",
    "set_random_state",
]

State = dict[str, Any]


class Stateful(Protocol):
    """An optimizer, a scheduler, a GradScaler."""

    def state_dict(self) -> State: ...
    def load_state_dict(self, state_dict: State) -> object: ...


def map_tensors(tree: Any, change: Callable[[torch.Tensor], Any]) -> Any:
    """A copy of dicts, lists and tuples with every tensor changed."""
    if isinstance(tree, torch.Tensor):
        return change(tree)
    if isinstance(tree, dict):
        copied = copy.copy(tree)  # keeps what hangs on a model's state besides its entries
        for key, value in tree.items():  # update() would add to what a Counter holds
            copied[key] = map_tensors(value, change)
        return copied
    if isinstance(tree, (list, tuple)):
        return type(tree)(map_tensors(value, change) for value in tree)
    return tree


class Snapshot:
    """Copies tensors, so that they can be written while training goes on, into buffers that the next copy reuses."""

    def __init__(self) -> None:
        self._buffers: list[torch.Tensor] = []

    def of(self, tree: Any) -> Any:
        """A copy of ``tree``, good until the next call. Tensors that are one stay one."""
        spare, used = iter(self._buffers), dict[tuple[object, ...], torch.Tensor]()

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if unreadable(tensor):
                return tensor.detach().clone()
            lazily = tensor.is_conj(), tensor.is_neg()  # a view that differs in this is no other memory
            key = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), *lazily)
            if key not in used:
                buffer = next(spare, None)
                if buffer is None or (buffer.dtype, buffer.shape) != (tensor.dtype, tensor.shape):
                    buffer = torch.empty_like(tensor, device="cpu", requires_grad=False)
                used[key] = buffer.copy_(tensor.detach())
            return used[key]

        copied = map_tensors(tree, keep)
        self._buffers = list(used.values())
        return copied


def check_loadable(content: State) -> None:
    """Raise CheckpointError if ``torch.load(weights_only=True)`` would refuse an entry that is about to be saved."""
    for key, value in content.items():
        if _is_plain(value):
            continue
        file = io.BytesIO()
        try:
            torch.save(map_tensors(value, lambda _: None), file)
            file.seek(0)
            torch.load(file, weights_only=True)  # what it takes differs between versions of torch
        except Exception as error:  # what cannot be pickled raises whatever it likes
            reason = str(error).strip().partition("\n")[0]
            raise CheckpointError(
                f"{key!r} holds what could not be loaded again: a checkpoint takes tensors and plain Python types (for "
                f"NumPy: torch.from_numpy(), float()): {reason}"
            ) from error


def _is_plain(tree: Any) -> bool:
    """Whether there are only tensors and the commonest types in it, which a load never refuses."""
    if type(tree) in (dict, OrderedDict):
        return all(_is_plain(key) and _is_plain(value) for key, value in tree.items())
    if type(tree) in (list, tuple):
        return all(map(_is_plain, tree))
    return type(tree) in (torch.Tensor, torch.nn.Parameter, bool, int, float, str, type(None))


def check_stateful(**objects: object) -> None:
    """Raise OptionError for what a checkpoint was given and cannot ask for its state: a state dict, most often."""
    for name, given in objects.items():
        needed = ["state_dict", "load_state_dict", *(["named_parameters"] if name == "model" else [])]
        lacking = [method for method in needed if not hasattr(given, method)]
        some = list(given.values()) if isinstance(given, dict) else given
        if lacking and isinstance(some, (list, tuple)) and some and all(hasattr(its, "state_dict") for its in some):
            raise OptionError(
                f"{name}= takes one, and there are {len(some)}: save each optimizer with its part of the model and its "
                f"scheduler in a directory of its own (docs/running.md, 'Several optimizers')"
            )
        if given is not None and lacking:
            raise OptionError(f"{name}={type(given).__name__} has no {lacking[0]}(): pass the {name} itself")


def collect(
    model: torch.nn.Module, optimizer: Stateful, scheduler: Stateful | None, scaler: Stateful | None
) -> tuple[State, State]:
    """The state that is the same on all ranks, and the state that is this rank's own; nothing is copied."""
    weights = model.state_dict()
    for name, tensor in weights.items():
        if isinstance(tensor, torch.Tensor) and (is_lazy(tensor) or tensor.is_meta):
            raise CheckpointError(f"{name!r} of the model is {unreadable(tensor)}")
    replicated = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    stepping = optimizer.state_dict()
    memory = stepping.pop("mpisign", None)
    scale = None if scaler is None else scaler.state_dict()
    schedule = None if scheduler is None else scheduler.state_dict()
    buffers = {name: value for name, value in weights.items() if name not in replicated}
    shared = {"model": weights, "optimizer": stepping, "scheduler": schedule, "scaler": scale}
    return shared, {"mpisign": memory, "buffers": buffers, "scaler": scale, "random": random_state()}


def put_back(name: str, target: Any, state: State) -> None:
    """Raises CheckpointError that names the part, whatever goes wrong in it."""
    try:
        target.load_state_dict(state)
    except CheckpointError:
        raise
    except Exception as error:  # torch's and users' own
        raise CheckpointError(f"the saved {name} does not load: {type(error).__name__}: {error}") from error


def random_state() -> State:
    """The states of this process's global random number generators."""
    numpy = np.random.get_state(legacy=False)  # noqa: NPY002  (whatever else is old about it, users draw from it)
    key = torch.from_numpy(numpy["state"]["key"].astype(np.int64))
    numpy = {**numpy, "state": {"key": key, "pos": numpy["state"]["pos"]}}
    state = {"python": random.getstate(), "numpy": numpy, "torch": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: State) -> None:
    """Put back what :func:`random_state` has given. Raises CheckpointError if it is something else."""
    try:
        _set_random_state(state)
    except Exception as error:  # each generator has errors of its own
        raise CheckpointError(
            f"'random', the states of random number generators, cannot be put back: {type(error).__name__}: {error}"
        ) from error


def _set_random_state(state: State) -> None:
    key = state["numpy"]["state"]["key"].numpy().astype(np.uint32)
    random.setstate(state["python"])
    numpy = {**state["numpy"], "state": {"key": key, "pos": state["numpy"]["state"]["pos"]}}
    np.random.set_state(numpy)  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def reseed(state: State, rank: int, size: int) -> None:
    """Seed the generators anew: different on each rank, and the same whenever it goes on from the same state."""
    saved = state.get("torch")
    if not isinstance(saved, torch.Tensor):
        raise CheckpointError("'random' lacks the state of torch's random number generator, 'torch'")
    words = hashlib.blake2b(saved.numpy().tobytes() + f"{rank} of {size}".encode(), digest_size=8).digest()
    seed = int.from_bytes(words, "little")
    random.seed(seed)
    np.random.seed([seed % 2**32, seed >> 32])  # noqa: NPY002
    torch.manual_seed(seed % 2**63)
