"""Make ranks equal, or find out where they are not. Every function here is **collective**."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import torch

from mpisign import trees
from mpisign.bitmap.tensors import unreadable
from mpisign.buddies import Buddies
from mpisign.encoding import Optional
from mpisign.errors import ConsistencyError, OptionError
from mpisign.hyperparameters import IMPLEMENTATION, described, line, options_of
from mpisign.memory.common import in_common, with_common
from mpisign.plain import plain, uncompiled
from mpisign.session import Session, collective, current
from mpisign.transfer import as_bytes, broadcast_tensors, check_root, demand_equal
from mpisign.wrapping import lets_replicas_differ, local_steps_of

__all__ = [
    "allgather_object",
    "broadcast_memory",
    "broadcast_object",
    "broadcast_optimizer_state",
    "broadcast_parameters",
    "check_consistency",
]


T = TypeVar("T")
SHAPES = [([int], str)]  # of tensors that are told of: shape and type of each


class HasState(Protocol):
    """An optimizer: torch's own or ours."""

    param_groups: list[dict[str, Any]]
    state: Any

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


@uncompiled
@collective("broadcast_object()", repeats=False)
def broadcast_object(obj: Any, root_rank: int = 0) -> Any:
    """Return ``root_rank``'s object on every rank.

    It is pickled, and unpickling runs what its sender likes: ``mpisign.init(pickle=False)`` refuses it. Do not use it
    for large tensors.

    Raises:
        OptionError: ``init(pickle=False)`` has turned pickles off.
    """
    session = current("broadcast_object()")
    with session.telling("broadcast_object()"):
        root_rank = check_root(root_rank, session)
    return session.spread_object(obj, root_rank, "broadcast_object()")


@uncompiled
@collective("allgather_object()")
def allgather_object(obj: T) -> list[T]:
    """Return every rank's object, in the order of the ranks, on every rank.

    They are pickled, and unpickling runs what their senders like: ``mpisign.init(pickle=False)`` refuses it.

    Raises:
        OptionError: ``init(pickle=False)`` has turned pickles off.
    """
    return current("allgather_object()").gather_objects(obj, "allgather_object()")


@uncompiled
@collective("broadcast_parameters()", repeats=False)
def broadcast_parameters(
    parameters: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]], root_rank: int = 0
) -> None:
    """Copy ``root_rank``'s tensors into every rank's, in place.

    Args:
        parameters: ``model.state_dict()`` or ``model.named_parameters()``.

    Raises:
        ConsistencyError: names, shapes or dtypes differ between ranks; nothing has been changed then.
        OptionError: an entry is not a tensor, or one that cannot be copied; the message names it.
    """
    act = "broadcast_parameters()"
    session = current(act)
    with session.telling(act):
        root_rank = check_root(root_rank, session)
        named = _named_tensors(parameters, session)
        described = [f"{name!r} {tuple(t.shape)} {t.dtype}" for name, t in named]
    demand_equal(described, session, act, "the tensors differ")
    broadcast_tensors([tensor for _, tensor in named], root_rank, session, act)


def _named_tensors(given: Any, session: Session) -> list[tuple[str, torch.Tensor]]:
    """What can be written to, with names. Raises OptionError."""
    usual = "pass model.state_dict() or model.named_parameters()"
    here = f"rank {session.rank}: "
    if isinstance(given, (torch.nn.Module, torch.Tensor)) or not isinstance(given, Iterable):
        kind = type(given).__name__
        raise OptionError(f"{here}broadcast_parameters() takes tensors with names, and {kind} is not that: {usual}")
    named = list(given.items()) if isinstance(given, Mapping) else list(given)
    for entry in named:
        if not (isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[1], torch.Tensor)):
            pair = isinstance(entry, tuple) and len(entry) == 2
            what = f"{entry[0]!r} is a {type(entry[1]).__name__}" if pair else f"{type(entry).__name__} is not one"
            raise OptionError(
                f"{here}broadcast_parameters() takes tensors with names, and {what}: {usual}, and other objects (what "
                f"get_extra_state() puts into a state dict, too) to broadcast_object()"
            )
        name, tensor = entry
        if why := unreadable(tensor):
            raise OptionError(f"{here}broadcast_parameters() cannot send {name!r}, which is {why}")
        if tensor.is_inference() and not torch.is_inference_mode_enabled():
            raise OptionError(
                f"{here}{name!r} was made in inference mode, and cannot be written to outside of it: pass a clone"
            )
        if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
            raise OptionError(
                f"{here}the elements of {name!r} overlap (it was made by expand()), so it cannot be written to: give "
                f"broadcast_parameters() a clone"
            )
    return named


@uncompiled
@collective("broadcast_optimizer_state()", repeats=False)
@plain()
def broadcast_optimizer_state(optimizer: HasState, root_rank: int = 0) -> None:
    """Give every rank ``root_rank``'s optimizer state and group options (learning rates and so on).

    Of a :class:`~mpisign.DistributedSignOptimizer`, the wrapped optimizer's state, step number and epoch are
    copied; each rank keeps its own memory (momentum), which is supposed to differ between ranks, but for what must be
    the same on all (the frozen moments of 1-bit Adam, say). With ``every``, the common parameters, the outer
    optimizer's state and the place in the window are copied, too.

    Raises:
        ConsistencyError: the optimizers have different groups, or what ``root_rank`` has sent does not fit.
        OptionError: it is no optimizer; or on every rank: the state holds something else than dense tensors, numbers,
            strings, None, lists, tuples and dicts.
    """
    act = "broadcast_optimizer_state()"
    session = current(act)
    with session.telling(act):
        root_rank = check_root(root_rank, session)
        if not hasattr(optimizer, "state_dict"):
            raise OptionError(
                f"rank {session.rank}: optimizer={type(optimizer).__name__} has no state_dict(): pass the optimizer "
                f"itself"
            )
        own = optimizer.state_dict()
        groups = [f"parameter group {at} of {len(group['params'])}" for at, group in enumerate(own["param_groups"])]
    demand_equal(groups, session, act, "the optimizers differ")
    tensors: list[torch.Tensor] = []
    told = None
    with session.telling(act):
        if session.rank == root_rank:
            told = _state_told(optimizer, own, tensors, act, root_rank)
    schema = {"state": object, "step": Optional(int), "epoch": Optional(int), "shapes": SHAPES}
    told = session.spread_value(told, schema, root_rank, act)
    for key in ("step", "epoch"):
        if not 0 <= (told[key] or 0) < 2**62:
            raise ConsistencyError(f"{act}: rank {root_rank} says that it is at {key} {told[key]}, which cannot be")
    tensors = _spread(tensors, told["shapes"], root_rank, session, act)
    changed = False
    with session.telling(act):
        if session.rank != root_rank:
            changed = _load_told(optimizer, own, told, tensors, root_rank, session)
    changes = session.meet(act, int(changed)).any()
    if (keeper := _keeper(optimizer)) is not None:
        keeper._buddies = Buddies(keeper.buddy_every)  # also on root_rank: all must make the next copy at once
        if changes:
            keeper._memory.sum_anew()
    local = local_steps_of(optimizer)
    if local is not None:
        local.broadcast(optimizer, root_rank)


def broadcast_memory(optimizer: Any, root_rank: int) -> None:
    """Give ranks that have sat out what of ``root_rank``'s memory must be the same on all. **Collective.**

    Args:
        optimizer: a DistributedSignOptimizer that exchanges itself.
    """
    act = "broadcast_optimizer_state()"
    session = current(act)
    store, parameters, told = optimizer._memory, optimizer._parameters(), None
    tensors: list[torch.Tensor] = []
    with session.telling(act):
        own = optimizer.state_dict()["mpisign"]
        if session.rank == root_rank:
            told = {"state": trees.flatten(in_common(store, parameters, own), tensors), "shapes": _shapes(tensors)}
    told = session.spread_value(told, {"state": object, "shapes": SHAPES}, root_rank, act)
    tensors = _spread(tensors, told["shapes"], root_rank, session, act)
    with session.telling(act):
        if session.rank != root_rank:
            try:
                state, _ = with_common(store, parameters, own, trees.unflatten(told["state"], tensors))
                optimizer._memory = store.restored(state, parameters, optimizer._memories(), session.group)
            except Exception as error:  # whatever it has sent
                raise ConsistencyError(f"{act}: what rank {root_rank} has kept does not fit here: {error}") from error
            optimizer._drop_plan()


def _spread(
    tensors: list[torch.Tensor], shapes: Sequence[Any], root_rank: int, session: Session, act: str
) -> list[torch.Tensor]:
    """``root_rank``'s tensors, whose shapes and types it has told, on every rank. **Collective.**"""
    with session.telling(act):
        if session.rank != root_rank:
            tensors = _new_tensors(shapes, root_rank)
    broadcast_tensors(tensors, root_rank, session, act)
    return tensors


def _keeper(optimizer: object) -> Any:
    """Who has the memory of a DistributedSignOptimizer: it, or the one in it that exchanges; None of any other."""
    local = local_steps_of(optimizer)
    keeper = optimizer if local is None else local.inner
    return keeper if hasattr(keeper, "_memory") else None


def _state_told(
    optimizer: HasState, own: dict[str, Any], tensors: list[torch.Tensor], act: str, root_rank: int
) -> dict[str, Any]:
    """An optimizer's state as plain values; its tensors are appended to ``tensors``. Raises OptionError."""
    place = {key: own.get("mpisign", {}).get(key) for key in ("step", "epoch")}
    shared = {key: own[key] for key in ("state", "param_groups")}
    if (keeper := _keeper(optimizer)) is not None:
        shared["mpisign"] = in_common(keeper._memory, keeper._parameters(), own["mpisign"])
    try:
        tree = trees.flatten(shared, tensors)
    except TypeError as error:
        raise OptionError(
            f"{act}: the optimizer's state on rank {root_rank} cannot be sent: {error}; send it with "
            f"broadcast_object() and load it with load_state_dict()"
        ) from error
    return {"state": tree, **place, "shapes": _shapes(tensors)}


def _load_told(
    optimizer: HasState,
    own: dict[str, Any],
    told: dict[str, Any],
    tensors: Sequence[torch.Tensor],
    root_rank: int,
    session: Session,
) -> bool:
    """Load the state that another rank has told. Raises ConsistencyError.

    Returns:
        Whether something of the memory was another one here that should be the same on all.
    """
    changed = False
    try:
        theirs = trees.unflatten(told["state"], tensors)
        common = theirs.pop("mpisign", None)
        _check_options(own["param_groups"], theirs["param_groups"], getattr(optimizer, "defaults", {}))
        own.update(theirs)
        if "mpisign" in own:
            own["mpisign"] = {**own["mpisign"], "step": told["step"], "epoch": told["epoch"]}
        if common is not None and (keeper := _keeper(optimizer)) is not None:
            own["mpisign"], changed = with_common(keeper._memory, keeper._parameters(), own["mpisign"], common)
        optimizer.load_state_dict(own)
    except Exception as error:  # whatever torch makes of it
        raise ConsistencyError(
            f"rank {session.rank}: the optimizer's state of rank {root_rank} does not fit this rank's "
            f"({type(error).__name__}: {error}): build the same optimizer on every rank"
        ) from error
    return changed


def _check_options(own: Sequence[Any], theirs: Sequence[Any], needed: Iterable[str]) -> None:
    """Raise ValueError or KeyError if options would load, and fail in a step: one is missing, or of another kind."""
    for mine, other in zip(own, theirs, strict=True):
        for key in (key for key in needed if key in mine):
            here, there = mine[key], other[key]
            if None not in (here, there) and _kind(here) != _kind(there):
                raise ValueError(f"{key!r} is {there!r:.80}, and here {here!r:.80}")


def _kind(option: Any) -> object:
    if isinstance(option, (list, tuple)):
        return [_kind(item) for item in option]
    return "number" if isinstance(option, (int, float, torch.Tensor)) else type(option)


def _shapes(tensors: Sequence[torch.Tensor]) -> list[Any]:
    return [[list(tensor.shape), trees.name_of(tensor.dtype)] for tensor in tensors]


def _new_tensors(shapes: Sequence[Any], root_rank: int) -> list[torch.Tensor]:
    """Empty tensors of the shapes and types that another rank has told."""
    try:
        if any(size >= 2**40 for shape, _ in shapes for size in shape):
            raise ValueError("one is too large")
        return [torch.empty(shape, dtype=trees.dtype_of(name), device="cpu") for shape, name in shapes]
    except (KeyError, MemoryError, RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise ConsistencyError(f"rank {root_rank} has sent tensors that cannot be made here: {error}") from error


@uncompiled
@collective("check_consistency()")
def check_consistency(model: torch.nn.Module, optimizer: HasState | None = None, *, buffers: bool = True) -> None:
    """Raise :class:`ConsistencyError` unless all ranks hold the same model and options, bit by bit.

    Costs one hash of the model, and a few bytes of traffic a tensor.

    Args:
        model: its parameters and buffers are compared.
        optimizer: the options of its groups and its state (of a :class:`~mpisign.DistributedSignOptimizer` the wrapped
            optimizer's) are compared too, if given. If its method lets replicas differ, only the shapes of the
            parameters are compared; with ``every`` also the common parameters, the outer optimizer and the place in the
            window, at whose end the parameters themselves must be equal.
        buffers: pass False where they differ by design (the running statistics of plain BatchNorm).

    Raises:
        ConsistencyError: on every rank, naming the ranks and the first tensor that differ.
    """
    session = current("check_consistency()")
    with session.telling("check_consistency()"):
        lines = _lines(model, optimizer, buffers, session)
    demand_equal(lines, session, "check_consistency()", "ranks hold different values")


def _lines(model: torch.nn.Module, optimizer: HasState | None, buffers: bool, session: Session) -> list[str]:
    """What must be equal, a line each. Raises OptionError."""
    for name, given, needed in (("model", model, "named_parameters"), ("optimizer", optimizer, "param_groups")):
        if given is not None and not hasattr(given, needed):
            raise OptionError(
                f"rank {session.rank}: {name}={type(given).__name__} has no {needed}: pass the {name} itself to "
                f"check_consistency()"
            )
    for name, tensor in [*model.named_parameters(), *(model.named_buffers() if buffers else ())]:
        if why := unreadable(tensor):
            raise OptionError(f"rank {session.rank}: check_consistency() cannot compare all tensors: {name!r} is {why}")
    local, differ = local_steps_of(optimizer), lets_replicas_differ(optimizer)
    lines = []
    if local is not None:
        lines = [f"{name} {_digest(tensor)}" for name, tensor in local.in_common(optimizer)]
        lines += [f"the place in the window, {local.windows.position} of {local.every}"]
        differ = local.windows.is_apart and not local.windows.is_shown
    for kind, named in (("parameter", model.named_parameters()), ("buffer", model.named_buffers() if buffers else ())):
        as_text = _form if differ and kind == "parameter" else _digest
        lines += [f"{kind} {name!r} {as_text(tensor)}" for name, tensor in named]
    if local is not None and optimizer is not None:  # whose state is each rank's own
        lines += _option_lines(optimizer)
        lines += [*_option_lines(local.inner), *_state_lines(local.inner, local.inner._names)]
    elif optimizer is not None and not differ:
        lines += _option_lines(optimizer)
        lines += _state_lines(optimizer, {p: name for name, p in model.named_parameters()})
    return lines


def _option_lines(optimizer: HasState) -> list[str]:
    options = options_of(optimizer.param_groups, IMPLEMENTATION)
    return [line(at, name, described(value)) for at, name, value in options]


def _state_lines(optimizer: HasState, names: Mapping[torch.Tensor, str]) -> Iterator[str]:
    """A line for each thing that an optimizer keeps of a parameter, in one order."""
    for at, group in enumerate(optimizer.param_groups):
        for place, parameter in enumerate(group["params"]):
            its = optimizer.state.get(parameter, {})
            for key in sorted(its, key=str):
                text = _digest(its[key]) if isinstance(its[key], torch.Tensor) else described(its[key])
                yield f"{key!r} of {names.get(parameter, f'group{at}.param{place}')!r} in the optimizer's state {text}"
    for key in sorted((key for key in optimizer.state if not isinstance(key, torch.Tensor)), key=str):
        yield f"{key!r} in the optimizer's state {described(optimizer.state[key])}"


def _form(tensor: torch.Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _digest(tensor: torch.Tensor) -> str:
    return f"{_form(tensor)} #{hashlib.blake2b(as_bytes(tensor).data, digest_size=8).hexdigest()}"
