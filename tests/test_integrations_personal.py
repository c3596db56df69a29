"""mpisign.integrations.personal: what of a rank's own is saved, and what of it a trainer of another kind takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from resumable import assert_equal
from torch import nn

import mpisign
from mpisign.integrations import personal

LOCAL = {"every": 4, "method": mpisign.scaled_vote()}
MIXED = {"method": mpisign.monna(0)}


def stepped(steps: int, width: int = 3, **options: Any) -> tuple[nn.Module, mpisign.DistributedSignOptimizer]:
    """A model after so many steps of AdamW."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width))
    model.register_buffer("scratch", torch.zeros(steps), persistent=False)
    optimizer = mpisign.DistributedSignOptimizer(torch.optim.AdamW(model.parameters(), lr=0.1), **options)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 2)).square().sum().backward()
        optimizer.step()
    return model, optimizer


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "steps, options, kept",
    [
        (3, {}, set()),
        (3, LOCAL, {"optimizer", "parameters"}),
        (4, LOCAL, {"optimizer"}),
        (3, MIXED, {"optimizer", "parameters"}),
    ],
    ids=["votes", "within a window", "at its end", "models that are mixed"],
)
def test_what_is_kept(world: None, steps: int, options: dict[str, Any], kept: set[str]) -> None:
    model, optimizer = stepped(steps, **options)
    its = optimizer.state_dict()
    own = personal.taken(optimizer, its, model)
    assert own.keys() == {"mpisign", "buffers"} | kept
    assert own["buffers"].keys() == dict(model[1].named_buffers(prefix="1")).keys(), "no buffer that is not saved"
    shared = {**its, "state": {}} if kept else its
    again, other = stepped(0, **options)
    other.load_state_dict(personal.state(own, other, shared))
    if "parameters" not in kept:
        again.load_state_dict(model.state_dict())
    personal.put_back(own, other, again)
    assert_equal(again.state_dict(), model.state_dict())
    assert_equal(other.state_dict(), its)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("saved", "resumed"), [(LOCAL, {}), (LOCAL, MIXED), (MIXED, {}), (MIXED, LOCAL)])
def test_what_differed_otherwise_is_rank_0s(world: None, saved: dict[str, Any], resumed: dict[str, Any]) -> None:
    """Ranks that vote, or begin a window, must have equal parameters: rank 0's."""
    model, optimizer = stepped(3, **saved)
    own = personal.taken(optimizer, optimizer.state_dict(), model)
    again, votes = stepped(0, **resumed)
    before = again[0].weight.detach().clone()
    shared = {**votes.state_dict(), "state": {}}
    assert personal.state(own, votes, shared)["state"] == {}
    personal.put_back(own, votes, again)
    assert torch.equal(again[0].weight, before)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", ["parameters", "buffers"])
def test_another_model_is_named(world: None, part: str) -> None:
    model, optimizer = stepped(3, **LOCAL)
    own = personal.taken(optimizer, optimizer.state_dict(), model)
    own["parameters" if part == "buffers" else "buffers"] = {}
    again, other = stepped(0, width=5, **LOCAL)
    before = {name: its.clone() for name, its in again.state_dict().items()}
    with pytest.raises(mpisign.CheckpointError, match=f"a {part[:-1]} .* of shape"):
        personal.put_back(own, other, again)
    assert_equal(dict(again.state_dict()), before)
