"""A training in which ranks die and spares step in: every sample of an epoch once, equal replicas after every exchange.

Usage: standing_by.py SCENARIO, as JSON.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from harm import at_call, die, identity, lie
from surviving import tell
from torch.utils.data import DataLoader, TensorDataset

import mpisign
from mpisign import regrouping
from mpisign.membership import Membership
from mpisign.regrouping import Living
from mpisign.spares import Spares
from mpisign.standby import Standby

regrouping.MAKING_SECONDS = 1.0  # ranks may wait that long for a core

EPOCHS = 2
SPOTS: dict[str, tuple[Any, str, int, bool]] = {
    "before the order": (Living, "order", 1, False),
    "after the order": (Living, "order", 1, True),
    "before the group": (Spares, "_enlarge", 1, False),
    "after the group": (Spares, "_enlarge", 1, True),
    "before it is given": (Standby, "_hand_over", 1, False),
    "while it is given": (Standby, "_given", 1, True),
    "while it is taken": (Standby, "_take", 1, False),
    "after it is given": (Standby, "_hand_over", 1, True),
    "at the end": (Membership, "close", 1, False),
}


class Steps:
    """Something else that must be brought level."""

    def __init__(self) -> None:
        self.number = 0

    def state_dict(self) -> dict[str, int]:
        return {"number": self.number}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.number = state["number"]


def arm(spot: str) -> None:
    owner, name, count, after = SPOTS[spot]
    at_call(owner, name, count, die, after=after)


def main(scenario: dict[str, Any]) -> None:
    spares, few = scenario["spares"], scenario.get("min_ranks")
    mpisign.init(on_failure="continue", spares=spares, min_ranks=few, stall_timeout=60.0)
    samples, batch = scenario["samples"], scenario["batch"]
    size, every, method = mpisign.size(), scenario.get("every"), getattr(mpisign, scenario.get("method", "signum"))()
    events = [event for event in scenario["events"] if event["rank"] == identity()]
    changes: list[mpisign.MembershipChange] = []
    mpisign.on_membership_change(changes.append)
    torch.manual_seed(7 + identity())
    model = torch.nn.Sequential(torch.nn.Linear(9, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2))
    mpisign.broadcast_parameters(model.state_dict())
    inner = torch.optim.AdamW if every else torch.optim.SGD
    optimizer = mpisign.DistributedSignOptimizer(
        inner(model.parameters(), lr=1e-2),
        model.named_parameters(),
        method=method,
        every=every,
        delay=scenario.get("delay", 0),
        overlap=scenario.get("overlap", False),
        exchange="two_phase" if scenario.get("audit") else "auto",
        audit=scenario.get("audit", 0),
    )
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.9)
    data = torch.randn(samples, 9, generator=torch.Generator().manual_seed(1))
    dataset = TensorDataset(data, (data.sum(1) > 0).long(), torch.arange(samples))
    sampler, steps = mpisign.ElasticSampler(dataset, seed=3), Steps()
    loader = DataLoader(dataset, batch_size=batch, sampler=sampler)
    for event in events:
        if event["step"] == 0:
            arm(event["where"])
    length = len(loader)
    standby = mpisign.Standby(
        model=model,
        optimizer=optimizer,
        scheduler=schedule,
        sampler=sampler if scenario.get("deals", True) else None,
        extra=steps,
    )
    assert mpisign.size() <= size - scenario["spares"]
    came = identity() >= size - scenario["spares"]
    assert came or len(loader) == length, "a schedule may need it, and Standby needs the schedule"
    if came and not every:
        memories = mpisign.allgather_object((memory_of(optimizer), came))
        others = [its for its, newcomer in memories if not newcomer]
        mean = (sum(its.double() for its in others) / len(others)).float()
        assert torch.equal(memory_of(optimizer), mean), "a spare begins with the mean of what others remember"
    elif not every:
        mpisign.on_membership_change(lambda change: joined.extend(change.joined[:1]))
    joined: list[int] = []
    for epoch in range(sampler.epoch, EPOCHS):
        sampler.set_epoch(epoch)
        had: list[list[Any]] = []
        while not sampler.finished:
            for number, (inputs, labels, indices) in enumerate(loader):
                for _ in joined:
                    mpisign.allgather_object((memory_of(optimizer), came))
                joined.clear()
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(model(inputs), labels).backward()
                for event in events:
                    if event["step"] == steps.number + 1:
                        if event["where"] == "step":
                            die()
                        lie() if event["where"] == "lie" else arm(event["where"])
                optimizer.step()
                schedule.step()
                steps.number += 1
                sampler.record_batch(number, batch)
                had.append([steps.number, list(optimizer.report.members) if optimizer.report else [], indices.tolist()])
                if not every:
                    mpisign.check_consistency(model, optimizer)
                    assert set(mpisign.allgather_object((steps.number, schedule.get_last_lr()[0]))) == {
                        (steps.number, schedule.get_last_lr()[0])
                    }
                if sampler.changed:
                    break
        mpisign.barrier()
        tell(f"epoch {epoch}: {json.dumps(had)}")
    optimizer.join()
    mpisign.check_consistency(model, optimizer)
    assert not standby.admit(), "nobody is missing, or nobody is left"
    tell(f"ends with {list(optimizer.report.members)} after {steps.number} steps")


def memory_of(optimizer: Any) -> torch.Tensor:
    """All that this rank remembers, as one vector."""
    memory = optimizer.state_dict()["mpisign"]["memory"]
    kept = [its.reshape(-1) for place in sorted(memory) for _, its in sorted(memory[place].items())]
    return torch.cat(kept) if kept else torch.zeros(0)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
