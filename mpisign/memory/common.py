"""What of a memory is the same on all ranks, for ranks that get it from another: replicas would drift apart without it.

That is fields which follow from decisions alone, what rules keep where every rank decides, and where rows of zeros have
been seen. The rest of a memory is each rank's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mpisign.memory.store import MemoryStore

__all__ = ["in_common", "with_common"]

State = dict[str, Any]


def in_common(store: MemoryStore, parameters: Sequence[torch.Tensor], state: State) -> State:
    """Of what :meth:`MemoryStore.state_dict` has given, what is the same on all ranks; nothing is copied."""
    memory = {
        place: {field: its[field] for field in store.memory_of(parameters[place]).common}
        for place, its in state["memory"].items()
    }
    kept = {} if store.sharded else state["pieces"]
    return {"rows": state["rows"], "memory": memory, "pieces": kept, "rates": state["rates"]}


def with_common(
    store: MemoryStore, parameters: Sequence[torch.Tensor], state: State, common: State
) -> tuple[State, bool]:
    """A rank's own state with what another has told by :func:`in_common`; and whether fields were others here."""
    memory, changed = {place: dict(its) for place, its in state["memory"].items()}, False
    for place, parameter in enumerate(parameters):
        its, theirs = store.memory_of(parameter), common["memory"].get(place, {})
        if not its.common or not (theirs or place in memory):
            continue
        mine = memory.setdefault(place, {field: torch.zeros(parameter.shape, device="cpu") for field in its.fields})
        for field in its.common:
            told = theirs.get(field, torch.zeros(parameter.shape, device="cpu"))
            changed |= not torch.equal(told.to(mine[field]), mine[field])
            mine[field] = told
    rates = {**state["rates"], **common["rates"]}  # what is kept stays as it is, to the last bit, so its units count
    for place, fields in memory.items():
        factor = state["rates"].get(place, rates.get(place, 1.0)) / rates.get(place, 1.0)
        for field in store.memory_of(parameters[place]).follows_lr if factor != 1.0 else ():
            fields[field] = fields[field] * factor
    pieces = state["pieces"] if store.sharded else common["pieces"]
    return {**state, "rows": common["rows"], "memory": memory, "pieces": pieces, "rates": rates}, changed
