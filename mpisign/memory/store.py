"""Where a rank keeps its memory: one set of state tensors a parameter, saved and restored a rank at a time."""

from __future__ import annotations

import logging
import math
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mpisign.backends import backend_for
from mpisign.bitmap.tensors import flat, strides_of
from mpisign.errors import CheckpointError
from mpisign.group import Group
from mpisign.memory.memory import Memory, State
from mpisign.memory.saved import STATE_VERSION, checked
from mpisign.warning import warn

__all__ = ["MemoryStore", "state_dtype"]

logger = logging.getLogger(__name__)

LEAST_RATE = 2.0**-100
"""A learning rate below it moves nothing, and a memory that is divided by it overflows: it counts as 0."""


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a memory keeps its state: fp32 for 16-bit parameters, else the parameter's own."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


class Laid:
    """A memory's tensors of one parameter, by field: in the parameter's shape, and the same memory flat."""

    __slots__ = ("flat", "shaped")

    def __init__(self, shaped: State) -> None:
        self.shaped = shaped
        self.flat: State = {field: flat(value) for field, value in shaped.items()}

    def __reduce__(self) -> tuple[type[Laid], tuple[State]]:
        return Laid, (self.shaped,)  # a copy's flat views are of its own tensors


Pieces = dict[torch.Tensor, dict[int, torch.Tensor]]
"""By parameter, and by first element: what this rank keeps of what it decides."""


class MemoryStore:
    """The state of memories for every parameter that has had a gradient here, and of the deciding side.

    Each tensor of a memory has its parameter's shape and wire order, and starts at zero. What a rule keeps (a server's
    error, a centre) belongs to the pieces of parameters that this rank decides.

    When ranks come or go, every rank keeps its memory. What shard owners keep starts anew, as the shards are others
    now and some have left with their owner; what all ranks keep alike stays.

    Between :meth:`draft` and :meth:`commit` everything is written to second buffers, so that :meth:`drop` can undo it.

    Attributes:
        rows: parameters in which some rank has had a row of zeros; the same on all ranks.
        sharded: what a rule keeps is another piece on every rank, not the same on all.
        unsummed: ranks have come or gone since a memory's ``summed`` was the sum over them.
        secret: what only this rank knows, in hexadecimal, if a memory's noise is private; else empty.
        moves: how often :meth:`of` has begun to give other tensors.
    """

    _born: Sequence[tuple[torch.Tensor, int]] = ()  # pieces that were begun since draft()

    def __init__(self, memory: Memory) -> None:
        self._usual = memory  # of parameters of which follow() has not said another
        self._memories: dict[torch.Tensor, Memory] = {}
        self._follows_rates = bool(memory.follows_lr)
        self.secret = secrets.token_hex(32) if memory.private else ""
        self.rows: set[torch.Tensor] = set()
        self.sharded = self.unsummed = False
        self._place = (0, 1)  # rank and size when it was last used, for a state that is asked for after shutdown()
        self._members: tuple[int, ...] | None = None  # the identities of the ranks it has been kept among
        self._states: dict[torch.Tensor, Laid] = {}
        self._pieces: Pieces = {}
        self._former: Pieces = {}  # of an earlier layout, or another job
        self._rates: dict[torch.Tensor, float] = {}
        self._warned = False  # of a rate near 0
        self._drafts: dict[torch.Tensor, Laid] | None = None  # what a round has written; None outside
        self._piece_drafts: Pieces = {}
        self._spares: dict[torch.Tensor, Laid] = {}  # second buffers that are free
        self._piece_spares: Pieces = {}
        self.moves = 0

    def memory_of(self, parameter: torch.Tensor) -> Memory:
        """The memory whose state it is."""
        return self._memories.get(parameter, self._usual)

    def _set_memories(self, memories: Mapping[torch.Tensor, Memory]) -> None:
        self._memories = dict(memories)
        self._follows_rates = any(memory.follows_lr for memory in (self._usual, *memories.values()))

    def of(self, parameter: torch.Tensor) -> State:
        """The state of one parameter by field, flat, to be read and written; made on first use."""
        before, now = self.before(parameter)
        if now is not before:
            for field, value in before.items():
                now[field].copy_(value)
        return now

    @property
    def drafting(self) -> bool:
        """Whether second buffers are written."""
        return self._drafts is not None

    def before(self, parameter: torch.Tensor) -> tuple[State, State]:
        """The state to be read, and the one to be written throughout; the same unless it is a new second buffer."""
        kept = self._kept(parameter)
        if self._drafts is None:
            return kept.flat, kept.flat
        if parameter in self._drafts:
            return self._drafts[parameter].flat, self._drafts[parameter].flat
        spare = self._spares.pop(parameter, None) or Laid({field: _lay(parameter, None) for field in kept.shaped})
        self._drafts[parameter] = spare
        self.moves += 1
        return kept.flat, spare.flat

    def _kept(self, parameter: torch.Tensor) -> Laid:
        if parameter not in self._states:
            self._states[parameter] = Laid({field: _lay(parameter, None) for field in self.memory_of(parameter).fields})
        return self._states[parameter]

    # --------------------------------------------------------------------------------------- second buffers

    def draft(self) -> None:
        """From here on write to second buffers."""
        self._drafts = {}
        self.moves += 1

    def commit(self) -> None:
        """What was written since :meth:`draft` is the state from here on. Harmless without a draft."""
        if self._drafts is None:
            return
        for parameter, draft in self._drafts.items():
            self._spares[parameter] = self._states[parameter]
            self._states[parameter] = draft
        for parameter, drafts in self._piece_drafts.items():
            for lo, piece in drafts.items():
                self._piece_spares.setdefault(parameter, {})[lo] = self._pieces[parameter][lo]
                self._pieces[parameter][lo] = piece
        self._end_drafts()

    def drop(self) -> None:
        """Forget what was written since :meth:`draft`."""
        if self._drafts is None:
            return
        self._spares.update(self._drafts)
        for parameter, drafts in self._piece_drafts.items():
            self._piece_spares.setdefault(parameter, {}).update(drafts)
        for parameter, lo in self._born:  # a later layout may cut others
            del self._pieces[parameter][lo]
            self._piece_spares.get(parameter, {}).pop(lo, None)
        self._end_drafts()

    def _end_drafts(self) -> None:
        self._drafts, self._piece_drafts, self._born = None, {}, ()
        self.moves += 1

    def __getstate__(self) -> dict[str, Any]:
        """A copy has nothing of a round that goes on."""
        state = {**self.__dict__, "_drafts": None, "_piece_drafts": {}, "_spares": {}, "_piece_spares": {}, "_born": ()}
        for parameter, lo in self._born:
            state["_pieces"] = {**state["_pieces"], parameter: dict(state["_pieces"][parameter])}
            del state["_pieces"][parameter][lo]
        return state

    # ------------------------------------------------------------------------------------------- changes

    def follow(self, parameters: Sequence[torch.Tensor], memories: Mapping[torch.Tensor, Memory], group: Group) -> None:
        """Take note of changes: forget parameters no longer held, and lay the state out anew where they differ."""
        regrouped = self._is_regrouped(group)
        self._place, self._members = (group.rank, group.size), group.identities
        self._set_memories(memories)
        self.unsummed = self._is_unsummed(regrouped)
        # A sum of which some parts cannot be summed anew now is worth nothing later.
        held = {p for p in parameters if p.requires_grad or not (regrouped and self.memory_of(p).summed)}
        if any(memory.private for memory in memories.values()) and not self.secret:
            self.secret = secrets.token_hex(32)
        if regrouped and self.sharded and any(self._pieces.values()) and group.rank == 0:
            logger.warning("ranks have come or gone: what owners of shards had kept starts anew")
        self._former = {
            parameter: pieces
            for parameter, pieces in self._kept_pieces(regrouped).items()
            if parameter in held and all(lo + its.numel() <= parameter.numel() for lo, its in pieces.items())
        }
        self._pieces, self._spares, self._piece_spares = {}, {}, {}
        if self._drafts is not None:  # of a round that will be dropped
            self._drafts, self._piece_drafts, self._born = {}, {}, ()
        self.rows &= held
        self._rates = {parameter: rate for parameter, rate in self._rates.items() if parameter in held}
        states = {parameter: laid for parameter, laid in self._states.items() if parameter in held}
        self._states = {parameter: self._followed(parameter, laid) for parameter, laid in states.items()}
        self.moves += 1

    def _followed(self, parameter: torch.Tensor, laid: Laid) -> Laid:
        """The state as the parameter and its memory are now: the same one where they have not changed."""
        strides, dtype = strides_of(parameter), state_dtype(parameter.dtype)
        shaped: State = {}
        for field in self.memory_of(parameter).fields:
            value = laid.shaped.get(field)
            if value is None or value.shape != parameter.shape:
                shaped[field] = _lay(parameter, None)
            elif (value.dtype, value.device, value.stride()) != (dtype, parameter.device, strides):
                shaped[field] = _lay(parameter, value)
            else:
                shaped[field] = value
        same = shaped.keys() == laid.shaped.keys() and all(shaped[field] is laid.shaped[field] for field in shaped)
        return laid if same else Laid(shaped)

    def follow_rates(self, groups: Sequence[dict[str, Any]]) -> None:
        """Rescale the fields that follow the learning rate, so that rate times field stays what it was.

        A step at rate 0 leaves them alone, as there is no factor that could undo it, and so does one at a rate that is
        nearly 0 or no number.
        """
        if not self._follows_rates:
            return
        for group in groups:
            rate = float(group.get("lr", 1.0))
            for parameter in group["params"]:
                fields = self.memory_of(parameter).follows_lr
                if not fields:
                    continue
                before = self._rates.get(parameter, rate)
                if not LEAST_RATE <= abs(rate) < math.inf:
                    if rate != 0.0 and not self._warned:
                        self._warned = True
                        warn(
                            f"a learning rate of {rate!r} counts as 0: what error feedback still owes the parameters "
                            f"is kept as it is, in units of the last rate, as it would overflow else"
                        )
                    continue
                if before != rate:
                    state = self._states[parameter].flat if parameter in self._states else {}
                    owed = [state[field] for field in fields if field in state]
                    owed += self._pieces.get(parameter, {}).values()
                    for value in owed:
                        value.mul_(before / rate)
                    if parameter in self._former:  # not in place: it may be the caller's own state dict
                        former = self._former[parameter]
                        self._former[parameter] = {lo: value * (before / rate) for lo, value in former.items()}
                self._rates[parameter] = rate

    def rates(self) -> dict[torch.Tensor, float]:
        """The learning rates in whose units the fields are that follow them, by parameter."""
        return dict(self._rates)

    # ------------------------------------------------------------------------------------- what rules keep

    def piece(self, parameter: torch.Tensor, lo: int, hi: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """What is kept for elements ``lo .. hi`` of a flat parameter by whoever decides them: (hi - lo,).

        Args:
            dtype: default that of a memory's state.
        """
        mine = self._pieces.setdefault(parameter, {})
        if lo not in mine:
            dtype = state_dtype(parameter.dtype) if dtype is None else dtype
            kept = torch.zeros(hi - lo, dtype=dtype, device=parameter.device)
            self._recall(parameter, lo, kept)
            mine[lo] = kept
            if self._drafts is not None:
                self._born = (*self._born, (parameter, lo))
        if self._drafts is None:
            return mine[lo]
        drafts = self._piece_drafts.setdefault(parameter, {})
        if lo not in drafts:
            spare = self._piece_spares.get(parameter, {}).pop(lo, None)
            drafts[lo] = mine[lo].clone() if spare is None else spare.copy_(mine[lo])
        return drafts[lo]

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
        sums = self._usual.summed or any(memory.summed for memory in self._memories.values())
        return bool(sums) and (self.unsummed or regrouped)

    def sum_anew(self) -> None:
        """Before the next exchange, what is a sum over ranks is summed anew: some rank's part is another one now."""
        self.unsummed = self._is_unsummed(regrouped=True)

    def _kept_pieces(self, regrouped: bool = False) -> Pieces:
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

    # ------------------------------------------------------------------------------------------ checkpoints

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
        others = {place: self.memory_of(p).name for place, p in enumerate(parameters)}
        return {
            "version": STATE_VERSION,
            "rank": rank,
            "size": size,
            "step": step,
            "epoch": epoch,
            "method": method,
            "memory_of": self._usual.name,
            "others": {place: name for place, name in others.items() if name != self._usual.name},
            "secret": self.secret,
            "unsummed": self._is_unsummed(regrouped),
            "memory": {place: dict(self._states[p].shaped) for place, p in enumerate(parameters) if p in self._states},
            "pieces": {place: pieces[p] for place, p in enumerate(parameters) if p in pieces},
            "rates": {place: self._rates[p] for place, p in enumerate(parameters) if p in self._rates},
            "rows": [place for place, p in enumerate(parameters) if p in self.rows],
        }

    def restored(
        self,
        saved: dict[str, Any] | None,
        parameters: Sequence[torch.Tensor],
        memories: Mapping[torch.Tensor, Memory],
        group: Group,
    ) -> MemoryStore:
        """A new store with the state that :meth:`state_dict` saved, or a fresh one, with a warning why.

        Raises:
            CheckpointError: saved by a job of another size, by a newer version, for other parameters, or damaged.
        """
        store = MemoryStore(self._usual)
        store._set_memories(memories)
        store._place = group.rank, group.size
        names = [store.memory_of(parameter).name for parameter in parameters]
        fields = any(store.memory_of(parameter).fields for parameter in parameters)
        fresh = f"rank {group.rank}: the memory ({', '.join(dict.fromkeys(names))}) starts fresh: "
        if saved is None:
            if fields:
                warn(f"{fresh}this state has none, as a plain optimizer's, or a framework's without its ranks' files")
            return store
        saved = checked(saved, parameters, f"rank {group.rank}")
        if saved["size"] != group.size:
            raise CheckpointError(
                f"rank {group.rank}: this state was saved by a job of {saved['size']} ranks and this one has "
                f"{group.size}, so the ranks' memories do not fit: start with -n {saved['size']}, or give the memory "
                f"up with state_dict.pop('mpisign')"
            )
        # Of all ranks the same, so that it is taken from another rank's state, too.
        store.rows = {parameters[place] for place in saved["rows"]}
        theirs = _names(saved, len(parameters))
        if saved["rank"] != group.rank or theirs != names:
            if fields:
                drift = any(memory.common for memory in memories.values()) or any(saved["pieces"].values())
                level = ", or call mpisign.broadcast_optimizer_state() now, or replicas drift apart" if drift else ""
                warn(
                    fresh + f"this is the state of rank {saved['rank']} under method {saved['method']!r}; "
                    f"to resume exactly, save and load one state a rank{level}"
                )
            return store
        given_up = []
        for place, state in saved["memory"].items():
            parameter = parameters[place]
            for field in dict.fromkeys((*store.memory_of(parameter).fields, *state)):
                if field not in state or field not in store.memory_of(parameter).fields:
                    what = "missing" if field not in state else f"none of {saved['method']}'s fields"
                    raise CheckpointError(
                        f"rank {group.rank}: in this state ['mpisign']['memory'][{place}][{field!r}] is {what}: it is "
                        f"damaged, or of another method"
                    )
                if state[field].shape != parameter.shape and 0 not in (state[field].numel(), parameter.numel()):
                    raise CheckpointError(
                        f"rank {group.rank}: the saved {field} of parameter {place} has shape "
                        f"{tuple(state[field].shape)}, which is not this model's: load the state of the same model"
                    )
            if all(value.shape == parameter.shape for value in state.values()):
                store._states[parameter] = Laid({field: _lay(parameter, value) for field, value in state.items()})
            elif not parameter.numel():  # with every=, frozen ones have no common value; else it was one when saved
                given_up.append(place)
        if given_up:
            warn(
                f"rank {group.rank}: parameters {given_up} are frozen, and the memory that was saved of them is given "
                f"up: thaw those that will be trained before load_state_dict()"
            )
        for place, pieces in saved["pieces"].items():
            parameter = parameters[place]
            if not parameter.numel() and any(value.numel() for value in pieces.values()):
                continue  # frozen here
            for lo, value in pieces.items():
                if lo + value.numel() > parameter.numel():
                    raise CheckpointError(
                        f"rank {group.rank}: ['mpisign']['pieces'][{place}][{lo}] of this state has {value.numel()} "
                        f"elements, which parameter {place} has not: load the state of the same model"
                    )
            store._former[parameter] = {lo: value.to(parameter.device) for lo, value in pieces.items()}
        store.unsummed = saved["unsummed"]
        if store.secret or any(memory.private for memory in memories.values()):
            store.secret = saved["secret"] or store.secret
        store._rates = {parameters[place]: rate for place, rate in saved["rates"].items()}
        return store


def _names(saved: Mapping[str, Any], count: int) -> list[str]:
    """Of the saved memories, by place."""
    names = [saved["others"].get(place, saved["memory_of"]) for place in range(count)]
    plain = [place for place, name in enumerate(names) if name == "ef21"]
    if any("momentum" in saved["memory"].get(place, ()) for place in plain):  # until 0.2 it had the same name
        names = ["ef21_sgdm" if name == "ef21" else name for name in names]
    return names


def _lay(parameter: torch.Tensor, value: torch.Tensor | None) -> torch.Tensor:
    """A new tensor in the parameter's shape and wire order: a copy of ``value``, or zeros."""
    dtype = state_dtype(parameter.dtype)
    zeros = backend_for(parameter.device).zeros(parameter.numel(), dtype, parameter.device)
    laid = zeros.as_strided(parameter.shape, strides_of(parameter))
    return laid if value is None else laid.copy_(value)
