"""Averages, sums and other collectives of tensors in full precision, for metrics and whatever is no gradient.

Every function here is **collective**. Nothing of it is differentiable: what comes back has no history.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args, overload

import numpy as np
import numpy.typing as npt
import torch

from mpisign import transfer, trees
from mpisign.bitmap.tensors import DTYPES, unreadable
from mpisign.errors import ConsistencyError, OptionError
from mpisign.plain import plain, uncompiled
from mpisign.policy import check_choice
from mpisign.session import Session, collective, current
from mpisign.transfer import as_bytes, broadcast_tensors, check_root, demand_equal

__all__ = ["Op", "allgather", "allreduce", "average", "broadcast", "gather_each"]

Op = Literal["average", "sum", "min", "max"]
"""How :func:`allreduce` makes one value of the ranks' values."""

SMALL_BYTES = 1 << 16  # of all ranks together: everyone gets all of it and reduces it, in one latency
ROWS_LIMIT = 1 << 40  # of one rank's part; nobody has memory for more

FLOATS = frozenset(DTYPES)
COMPLEX = frozenset({torch.complex64, torch.complex128})
INTEGERS = frozenset({torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64})
REDUCED = {
    "average": FLOATS | COMPLEX | INTEGERS | {torch.bool},
    "sum": FLOATS | COMPLEX | INTEGERS,
    "min": FLOATS | INTEGERS | {torch.bool},
    "max": FLOATS | INTEGERS | {torch.bool},
}
ADVICE = "Call it with tensors that are alike on every rank, in the same order"


@overload
def average(value: torch.Tensor, *, name: str | None = None) -> torch.Tensor: ...
@overload
def average(value: npt.NDArray[Any], *, name: str | None = None) -> npt.NDArray[Any]: ...
@overload
def average(value: float, *, name: str | None = None) -> float: ...
@uncompiled
@collective("average()")
@plain()
def average(value: Any, *, name: str | None = None) -> Any:
    """The mean of all ranks' values, e.g. of a metric. **Collective.**

    Args:
        value: a number, a NumPy array, or a tensor on any device; of the same shape and type on every rank.
        name: what it is called in messages; the same on every rank.

    Returns:
        A float for a number, else what was given; of integers and booleans in float64. It is added up in float64 in
        the order of the ranks and rounded once: the same bits on every rank.

    Raises:
        ConsistencyError: kind, shape, dtype or name differ; on every rank, naming those that differ.
        OptionError: ``value`` is none of these; on every rank.

    Example::

        loss = mpisign.average(loss.item())
    """
    act = "average()"
    session = current(act)
    with session.telling(act):
        kind, tensor = _of_value(value, session)
        _check_tensor(tensor, act, session, REDUCED["average"])
    result = _reduced(kind, tensor, "average", name, session, act)
    if kind == "a number":
        return float(result)
    return result.numpy() if kind == "an array" else result


@uncompiled
@collective("allreduce()")
@plain()
def allreduce(tensor: torch.Tensor, op: Op = "average", *, name: str | None = None) -> torch.Tensor:
    """All ranks' tensors made one, element by element. **Collective.**

    Args:
        tensor: on any device; of the same shape and dtype on every rank.
        op: ``"average"``, ``"sum"``, ``"min"`` or ``"max"``. A NaN wins both of the last.
        name: what it is called in messages; the same on every rank.

    Returns:
        A new tensor of the same shape, dtype and device (but float64 for the average of integers and booleans). Floats
        are added up in float64 in the order of the ranks and rounded once, integers as torch adds them; the bits are
        the same on every rank.

    Raises:
        ConsistencyError: shape, dtype, op or name differ; on every rank, naming those that differ.
        OptionError: there is no such op, or not for this dtype; or it is no dense tensor.
    """
    act = "allreduce()"
    session = current(act)
    with session.telling(act):
        check_choice("op", op, get_args(Op))
        _check_tensor(tensor, f"{act} with op={op!r}", session, REDUCED[op])
    return _reduced("a tensor", tensor, op, name, session, act)


@uncompiled
@collective("allgather()")
@plain()
def allgather(tensor: torch.Tensor, *, name: str | None = None) -> torch.Tensor:
    """All ranks' tensors in a row: concatenated along their first dimension, in the order of the ranks. **Collective.**

    Args:
        tensor: (n, ...) on any device; ``n`` may differ between ranks, all else may not. A 0-d one counts as (1,).
        name: what it is called in messages; the same on every rank.

    Returns:
        A new tensor (sum of all n, ...) of the same dtype and device.

    Raises:
        ConsistencyError: dtype, name or a dimension other than the first differ; on every rank, naming those that
            differ.
        OptionError: it is no dense tensor.
    """
    act = "allgather()"
    session = current(act)
    with session.telling(act):
        _check_tensor(tensor, act, session)
        inner = f"shape (n, {', '.join(map(str, tensor.shape[1:]))})" if tensor.dim() else "shape ()"
        rows = tensor.detach().reshape(-1 if tensor.dim() == 0 else tensor.shape[0], *tensor.shape[1:])
        raw = as_bytes(rows).tobytes()
    demand_equal(_lines(inner, tensor, None, name), session, act, "the tensors differ", ADVICE)
    counts = session.meet(act, rows.shape[0]).tolist()
    told = session.gather_bytes(raw, act, ROWS_LIMIT)
    width = rows[:1].numel() * rows.element_size() if rows.shape[0] else rows.new_empty(1, *rows.shape[1:]).nbytes
    for rank, (count, its) in enumerate(zip(counts, told, strict=True)):
        if not 0 <= count < ROWS_LIMIT or count * width != len(its):
            raise ConsistencyError(f"{act}: rank {rank} says that it has {count} rows, and has sent {len(its)} bytes")
    with session.telling(act):
        out = torch.empty((sum(counts), *rows.shape[1:]), dtype=tensor.dtype, device="cpu")
        as_bytes(out)[:] = np.frombuffer(b"".join(told), np.uint8)
        out = out.to(tensor.device)
    session.meet(act)
    return out


@uncompiled
@collective("allgather()")
@plain()
def gather_each(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Every rank's tensor, of whatever shape and dtype, on ``tensor``'s device. **Collective.**

    Raises:
        ConsistencyError: a rank has sent what cannot be.
        OptionError: it is no dense tensor.
    """
    act = "allgather()"
    session = current(act)
    with session.telling(act):
        _check_tensor(tensor, act, session)
        raw, form = as_bytes(tensor).tobytes(), [list(tensor.shape), trees.name_of(tensor.dtype)]
    forms = session.gather_values(form, ([int], str), act)
    told = session.gather_bytes(raw, act, ROWS_LIMIT)
    with session.telling(act):
        found = []
        for rank, ((shape, name), its) in enumerate(zip(forms, told, strict=True)):
            try:
                flat = torch.empty(0, dtype=torch.uint8, device="cpu")
                if its:
                    flat = torch.frombuffer(bytearray(its), dtype=torch.uint8)
                found.append(flat.view(trees.dtype_of(name)).view(shape).to(tensor.device))
            except (KeyError, RuntimeError, TypeError, ValueError) as error:
                raise ConsistencyError(f"{act}: rank {rank} has sent no tensor {shape} {name}: {error}") from error
    session.meet(act)
    return found


@uncompiled
@collective("broadcast()", repeats=False)
@plain()
def broadcast(tensor: torch.Tensor, root_rank: int = 0, *, name: str | None = None) -> torch.Tensor:
    """``root_rank``'s tensor, on every rank. **Collective.**

    For a model's parameters, in place, there is :func:`broadcast_parameters`.

    Args:
        tensor: on any device; of the same shape and dtype on every rank.
        name: what it is called in messages; the same on every rank.

    Returns:
        A new tensor on ``tensor``'s device.

    Raises:
        ConsistencyError: shape, dtype or name differ; on every rank, naming those that differ.
        OptionError: there is no such rank, or it is no dense tensor.
    """
    act = "broadcast()"
    session = current(act)
    with session.telling(act):
        root_rank = check_root(root_rank, session)
        _check_tensor(tensor, act, session)
        copy = tensor.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    lines = [f"root_rank={root_rank}", *_lines(_shape(tensor), tensor, None, name)]
    demand_equal(lines, session, act, "the tensors differ", ADVICE)
    broadcast_tensors([copy], root_rank, session, act)
    return copy


def _of_value(value: Any, session: Session) -> tuple[str, torch.Tensor]:
    """What a value is, and it as a tensor. Raises OptionError."""
    if isinstance(value, torch.Tensor):
        return "a tensor", value
    if isinstance(value, np.ndarray):
        try:
            return "an array", torch.from_numpy(np.array(value, value.dtype.newbyteorder("="), order="C"))
        except TypeError:
            pass  # of objects, texts, ...
    elif isinstance(value, (int, float, np.number, np.bool_)) and not isinstance(value, np.complexfloating):
        try:
            return "a number", torch.tensor(float(value), dtype=torch.float64, device="cpu")
        except OverflowError:
            pass
    raise OptionError(
        f"rank {session.rank}: average() takes a number, a NumPy array of numbers or a tensor, and {value!r:.80} is "
        f"none: of several values take the average of each, or of torch.tensor(values)"
    )


def _check_tensor(tensor: Any, act: str, session: Session, dtypes: frozenset[torch.dtype] | None = None) -> None:
    """Raise OptionError unless this is a tensor whose elements can be sent, of one of these types."""
    here = f"rank {session.rank}: {act}"
    if not isinstance(tensor, torch.Tensor):
        raise OptionError(f"{here} takes a tensor, and {type(tensor).__name__} is none: for numbers there is average()")
    if why := unreadable(tensor):
        raise OptionError(f"{here} cannot send a tensor that is {why}")
    if dtypes is not None and tensor.dtype not in dtypes:
        names = sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise OptionError(f"{here} takes none of {tensor.dtype}: convert it, e.g. with .float(); it takes {names}")


def _shape(tensor: torch.Tensor) -> str:
    return f"shape {tuple(tensor.shape)}"


def _lines(shape: str, tensor: torch.Tensor, op: str | None, name: str | None) -> list[str]:
    """What must be the same on all ranks."""
    return [shape, str(tensor.dtype), *([] if op is None else [f"op={op!r}"]), f"name={name!r}"]


def _reduced(kind: str, tensor: torch.Tensor, op: str, name: str | None, session: Session, act: str) -> torch.Tensor:
    demand_equal([kind, *_lines(_shape(tensor), tensor, op, name)], session, act, "the tensors differ", ADVICE)
    whole = op == "average" and not (tensor.dtype.is_floating_point or tensor.dtype.is_complex)
    with session.telling(act):
        mine = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().view(-1)
        out = torch.empty(mine.shape, dtype=torch.float64 if whole else tensor.dtype, device="cpu")
    step = max(1, transfer.CHUNK_BYTES // out.element_size())
    for start in range(0, mine.numel(), step):
        _reduce(mine[start : start + step], op, out[start : start + step], session, act)
    with session.telling(act):
        result = out.view(tensor.shape).to(tensor.device)
    session.meet(act)
    return result


def _reduce(mine: torch.Tensor, op: str, out: torch.Tensor, session: Session, act: str) -> None:
    """One message's worth, (n,). **Collective.**"""
    ranks, comm, n = session.size, session.group.comm, mine.numel()
    small = mine.nbytes * ranks <= SMALL_BYTES
    with session.telling(act):
        bounds = [0, n] if small else [n * rank // ranks for rank in range(ranks + 1)]
        first, last = (0, n) if small else (bounds[session.rank], bounds[session.rank + 1])
        heard = torch.empty((ranks, last - first), dtype=mine.dtype, device="cpu")
        sent, received = as_bytes(mine), as_bytes(heard)
    session.meet(act)
    with session.tracer.span(act):
        if small:
            request = comm.Iallgather(sent, received)
        else:
            counts = [(bounds[rank + 1] - bounds[rank]) * mine.element_size() for rank in range(ranks)]
            request = comm.Ialltoallv([sent, counts], [received, [heard[0].nbytes] * ranks])
        session.wait(session.post(request, sent, received))
    with session.telling(act):
        shard = _decide(heard, op, out.dtype)
        if small:
            out.copy_(shard)
            return
        raw, whole = as_bytes(shard), as_bytes(out)
    session.meet(act)
    with session.tracer.span(act):
        counts = [(bounds[rank + 1] - bounds[rank]) * out.element_size() for rank in range(ranks)]
        session.wait(session.post(comm.Iallgatherv(raw, [whole, counts]), raw, whole))


def _decide(heard: torch.Tensor, op: str, dtype: torch.dtype) -> torch.Tensor:
    """All ranks' elements (M, k) as one (k,), rank by rank, so that it is the same on every machine."""
    if op in ("min", "max"):
        smaller: Callable[..., torch.Tensor] = torch.minimum if op == "min" else torch.maximum
        found = heard[0].clone()
        for row in heard[1:]:
            smaller(found, row, out=found)
        return found
    adds_in = heard.dtype  # integers
    if heard.dtype in COMPLEX:
        adds_in = torch.complex128
    elif heard.dtype in FLOATS or op == "average":
        adds_in = torch.float64
    total = heard[0].to(adds_in, copy=True)
    for row in heard[1:]:
        total += row
    return (total / len(heard) if op == "average" else total).to(dtype)
