"""A job that loses ranks, or believes so: every step against NumPy, or against a training in which nobody is lost.

Usage: surviving.py SCENARIOS, a JSON list, of which each is a training. It begins with those whom the last has left.
"""

from __future__ import annotations

import copy
import functools
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ballots
import numpy as np
import oracle
import torch
from harm import Scenario, alarm, arm, at_call, identity
from methods_table import TABLE

import mpisign
from mpisign import regrouping
from mpisign.checkpoint.saving import _Save
from mpisign.session import current

regrouping.MAKING_SECONDS = 1.0  # ranks may wait that long for a core

SHAPES = ((20, 10), (33,), (7, 3), (500,))
DTYPES = [torch.float32, torch.float64]
BETA = 0.5

# ------------------------------------------------------------------------------------------------------ training


def gradients(tensors: Sequence[torch.Tensor], at: int, who: int) -> list[torch.Tensor]:
    return ballots.draw(tensors, ballots.generator(at, who))


def backward(tensors: Sequence[torch.nn.Parameter], its: Sequence[torch.Tensor]) -> None:
    """Let these be the gradients, bit for bit, by a backward pass."""
    sum((p * g).sum().double() for p, g in zip(tensors, its, strict=True)).backward()


def votes(scenario: Scenario) -> None:
    """Signum: after every step, the parameters are what NumPy makes of the ballots of those whom the report names."""
    tensors = ballots.parameters(*SHAPES, dtypes=DTYPES)
    sgd = torch.optim.SGD(tensors, lr=1.0)
    options = {"bucket_cap_mb": 1e-5, "zeros": "coin", "seed": 7, **scenario.get("options", {})}
    optimizer = mpisign.DistributedSignOptimizer(sgd, ballots.named(tensors), method=mpisign.signum(BETA), **options)
    everyone = current().group.identities
    kept = {who: [np.zeros(t.numel()) for t in tensors] for who in everyone}
    expected = [np.zeros(t.numel()) for t in tensors]
    told = []
    for at in range(scenario["steps"]):
        arm(scenario, at)
        optimizer.zero_grad()
        backward(tensors, gradients(tensors, at, identity()))
        try:
            optimizer.step()
        except (ValueError, mpisign.MpisignError) as error:
            expected_here = any(event["step"] == at and event["what"] == "error" for event in scenario["events"])
            if not expected_here or "an error of the user's" not in str(error):
                raise
            optimizer.step()
        report = optimizer.report
        assert report.step == at
        sent = []
        for who in report.members:
            both = [
                oracle.momentum(m, ballots.flat(g), BETA)
                for m, g in zip(kept[who], gradients(tensors, at, who), strict=True)
            ]
            sent.append([its for its, _ in both])
            kept[who] = [its for _, its in both]
        sizes = [t.numel() for t in tensors]
        decisions, ties = ballots.vote(sent, sizes, at, seed=7, identities=report.members)
        expected = [total - decision for total, decision in zip(expected, decisions, strict=True)]
        assert (report.ties, report.voters) == (ties, tuple(range(len(report.members)))), (at, report)
        for tensor, total in zip(tensors, expected, strict=True):
            assert np.array_equal(ballots.flat(tensor), total), (scenario, at, identity())
        told.append([report.generation, list(report.members)])
    memory = optimizer.state_dict()["mpisign"]["memory"]
    for place, its in memory.items():
        assert np.array_equal(ballots.flat(its["momentum"]), kept[identity()][place]), "taken in once"
    assert all(its == told for its in mpisign.allgather_object(told)), "the same members have voted on all ranks"
    say(scenario, told)


def alarms(scenario: Scenario) -> None:
    """Any method: ranks take fright, and nobody is dead: training is what it is without, bit for bit."""
    for name in scenario["methods"]:
        ends = []
        for frightened in (False, True):
            method = TABLE[name](mpisign.size())
            tensors = ballots.parameters(*SHAPES, dtypes=[torch.float32])
            sgd = torch.optim.SGD(tensors, lr=0.25)
            options = {"bucket_cap_mb": 1e-5, **scenario.get("options", {})}
            optimizer = mpisign.DistributedSignOptimizer(sgd, ballots.named(tensors), method=method, **options)
            optimizer.set_epoch(0)
            for at in range(scenario["steps"]):
                if frightened:
                    arm(scenario, at)
                optimizer.zero_grad()
                backward(tensors, gradients(tensors, at, identity()))
                optimizer.step()
            state = optimizer.state_dict()["mpisign"]
            kept = [its for place in state["memory"].values() for its in place.values()]
            ends.append([*(t.detach().clone() for t in tensors), *kept])
        assert len(ends[0]) == len(ends[1])
        assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True)), (name, scenario, identity())
    say(scenario, [current().group.generation])


def owed(scenario: Scenario) -> None:
    """With ``buddy_every=`` the next rank takes over what error feedback of a dead one has owed at the last copy.

    Gradients are powers of two of each other's, and so are errors, exactly: each rank knows what the others owe.
    """
    tensors = ballots.parameters(*SHAPES, dtypes=[torch.float32])
    sgd = torch.optim.SGD(tensors, lr=0.25)
    method = getattr(mpisign, scenario["method"])()
    every = scenario["buddy_every"]
    optimizer = mpisign.DistributedSignOptimizer(sgd, ballots.named(tensors), method=method, buddy_every=every)
    history: list[torch.Tensor] = []  # of this rank's errors times the learning rate, over 2^identity
    everyone = current().group.identities
    taken_over: dict[int, list[int]] = {who: [] for who in everyone}
    for at in range(scenario["steps"]):
        arm(scenario, at)
        sgd.param_groups[0]["lr"] = 0.25 * 2.0 ** -(at // 4)
        if at == scenario.get("told_at"):
            mpisign.broadcast_optimizer_state(optimizer)
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(at)  # no zeros, whose signs would be each rank's own coins
        drawn = [torch.randn(t.shape, generator=generator) for t in tensors]
        backward(tensors, [its * 2.0 ** identity() for its in drawn])
        optimizer.step()
        memory = optimizer.state_dict()["mpisign"]["memory"]
        flat = torch.cat([its[method.memory.owed[0]].reshape(-1) for _, its in sorted(memory.items())])
        history.append(flat * sgd.param_groups[0]["lr"] / 2.0 ** identity())
        errors = mpisign.allgather_object(history[-1].tolist())
        gone = [who for who in everyone if who not in optimizer.report.members]
        new = [who for who in gone if not any(who in its for its in taken_over.values())]
        buddies = [min((its for its in current().group.identities if its > who), default=min(everyone)) for who in new]
        for who, buddy in zip(new, buddies, strict=True):
            taken_over[buddy].append(who)
        plain = [its for who, its in zip(current().group.identities, errors, strict=True) if not taken_over[who]]
        assert all(its == plain[0] for its in plain), "who has taken nothing over owes the same"
        for who, buddy in zip(new, buddies, strict=True):
            done = next(event["step"] for event in scenario["events"] if event["rank"] == who)
            of_last_copy = history[done // every * every - 1] if done >= every else history[0]
            expected = torch.tensor(plain[0]) + of_last_copy * 2.0 ** (who - buddy)
            got = torch.tensor(errors[current().group.identities.index(buddy)])
            assert torch.allclose(got, expected, rtol=1e-6, atol=1e-9), (at, who, buddy, (got - expected).abs().max())
            assert of_last_copy.abs().max() > 0
    copy.deepcopy(optimizer)
    head = torch.nn.Parameter(torch.zeros(3))  # all that owe are frozen, and something else is trained
    optimizer.add_param_group({"params": [head], "method": mpisign.signsgd()})
    for tensor in tensors:
        tensor.requires_grad_(False)
    for _ in range(every):
        head.grad = torch.ones(3)
        optimizer.step()
    say(scenario, sorted([buddy, its] for buddy, its in taken_over.items() if its))


def windows(scenario: Scenario) -> None:
    """``every=``: an exchange counts once, on all; without momentum and with a mean, common parameters are NumPy's."""
    if scenario.get("delay"):
        delayed(scenario)
        return
    tensors = ballots.parameters(*SHAPES, dtypes=[torch.float64])
    sgd = torch.optim.SGD(tensors, lr=0.5)
    optimizer = mpisign.DistributedSignOptimizer(
        sgd, ballots.named(tensors), method=mpisign.mean(), every=2, bucket_cap_mb=1e-5
    )
    expected, window = [np.zeros(t.numel()) for t in tensors], 0
    for at in range(scenario["steps"]):
        arm(scenario, at)
        optimizer.zero_grad()
        backward(tensors, gradients(tensors, at, identity()))
        optimizer.step()
        if at % 2 == 0:
            continue
        members = optimizer.report.members
        for place, total in enumerate(expected):
            moved = [
                sum(ballots.flat(gradients(tensors, step, who)[place]) for step in (at - 1, at)) for who in members
            ]
            expected[place] = total - 0.5 * np.sum(moved, axis=0) / len(members)
        for tensor, total in zip(tensors, expected, strict=True):
            np.testing.assert_allclose(ballots.flat(tensor), total, rtol=0, atol=1e-12)
        window += 1
    raw = [t.detach().numpy().tobytes() for t in tensors]
    assert all(its == raw for its in mpisign.allgather_object(raw)), "replicas are the same"
    say(scenario, [window])


def delayed(scenario: Scenario) -> None:
    """With ``delay=``: whoever is left, differences count once: common parameters are a sum of them."""
    tensors = ballots.parameters(*SHAPES, dtypes=[torch.float64])
    sgd = torch.optim.SGD(tensors, lr=0.5)
    optimizer = mpisign.DistributedSignOptimizer(
        sgd, ballots.named(tensors), method=mpisign.mean(), every=3, delay=2, bucket_cap_mb=1e-5
    )
    expected = [np.zeros(t.numel()) for t in tensors]
    for at in range(scenario["steps"]):
        arm(scenario, at)
        optimizer.zero_grad()
        backward(tensors, gradients(tensors, at, identity()))
        optimizer.step()
        if at % 3 != 1 or at < 3:
            continue
        members = optimizer.report.members
        for place, total in enumerate(expected):
            moved = [
                sum(ballots.flat(gradients(tensors, step, who)[place]) for step in range(at - 4, at - 1))
                for who in members
            ]
            expected[place] = total - 0.5 * np.sum(moved, axis=0) / len(members)
        with optimizer.common_parameters():
            for tensor, total in zip(tensors, expected, strict=True):
                np.testing.assert_allclose(ballots.flat(tensor), total, rtol=0, atol=1e-12)
            raw = [t.detach().numpy().tobytes() for t in tensors]
            assert all(its == raw for its in mpisign.allgather_object(raw)), "replicas are the same"
    say(scenario, [optimizer.report.generation])


def dealt(scenario: Scenario) -> None:
    """With ``delay=`` ranks may find a death in different steps, and deal what is left of an epoch anew in the same."""
    layer, samples = torch.nn.Linear(3, 1), scenario["samples"]
    optimizer = mpisign.DistributedSignOptimizer(
        torch.optim.SGD(layer.parameters(), lr=0.1), layer.named_parameters(), method=mpisign.mean(), every=6, delay=4
    )
    sampler = mpisign.ElasticSampler(range(samples), shuffle=False)
    deals, had, at = [], [], 0
    while not sampler.finished:
        deals.append(at)
        for index in sampler:
            arm(scenario, at)
            if identity() == scenario["slow"] and 10 <= at < 12:
                time.sleep(3.0)
            optimizer.zero_grad()
            layer(torch.full((1, 3), float(index))).sum().backward()
            optimizer.step()
            sampler.record_indices([index])
            had, at = [*had, index], at + 1
    assert all(its == deals for its in mpisign.allgather_object(deals)), "in the same step"
    everything = [index for its in mpisign.allgather_object(had) for index in its]
    counted = range(scenario["events"][0]["rank"], 3 * 6, 3)  # in the first window, which is decided in the tenth step
    assert set(range(samples)) - set(everything) == {*counted}, "what had counted of the lost one"
    assert len(everything) - len(set(everything)) < mpisign.size(), "none was repeated, but to fill up"
    say(scenario, deals)


def calls(scenario: Scenario) -> None:
    """Everything besides steps: repeated by itself, or an error on all, after which it can be called again."""
    folder = Path(scenario["folder"])
    layer = torch.nn.Linear(5, 4)
    optimizer = mpisign.DistributedSignOptimizer(torch.optim.SGD(layer.parameters(), lr=0.1), layer.named_parameters())
    mpisign.broadcast_parameters(layer.state_dict())
    layer(torch.ones(2, 5)).sum().backward()
    optimizer.step()
    frightened = [mpisign.size() - 1, 0]
    members = mpisign.allgather_object(identity())

    def again(call: Callable[[], Any]) -> Any:
        for _ in range(3):
            try:
                return call()
            except mpisign.MembershipChangedError as error:
                changed.append(str(error))
        raise AssertionError("it never comes about")

    def both(call: Callable[[], Any], *, raises: bool) -> Any:
        """With an alarm on one rank, in the first meeting and at the very end, in turn."""
        for rank in frightened:
            for count, after in ((1, False), (1, True), (2, True)):
                changed.clear()
                if mpisign.rank() == rank:
                    at_call(type(current()), "meet", count, alarm, after=after)
                result = again(call)
                told = mpisign.allgather_object(len(changed))
                assert len(set(told)) == 1, (told, call, count, after)
                assert raises or told[0] == 0, (told, count, after)
        return result

    changed: list[str] = []
    assert both(lambda: mpisign.average(2.0 + mpisign.rank()), raises=False) == 2.0 + (mpisign.size() - 1) / 2
    assert both(lambda: mpisign.allgather_object(identity()), raises=False) == members
    both(mpisign.barrier, raises=False)
    both(lambda: mpisign.check_consistency(layer, optimizer), raises=False)
    both(lambda: mpisign.broadcast_parameters(layer.state_dict(), root_rank=1), raises=True)
    assert both(lambda: mpisign.broadcast_object(identity(), root_rank=1), raises=True) == members[1]
    both(lambda: mpisign.checkpoint.save(folder, model=layer, optimizer=optimizer, step=1), raises=False)
    both(lambda: mpisign.checkpoint.load(folder, model=layer, optimizer=optimizer), raises=False)
    mpisign.checkpoint.save(folder, model=layer, optimizer=optimizer, step=2, asynchronous=True)
    both(mpisign.checkpoint.wait, raises=False)
    assert mpisign.checkpoint.newest(folder).name == "step-00000002"
    saved: dict[str, Any] = {"model": layer, "optimizer": optimizer}
    for rank in frightened:
        for act in (functools.partial(mpisign.checkpoint.save, step=4), mpisign.checkpoint.load):
            mpisign.checkpoint.save(folder, **saved, step=3, asynchronous=True)
            if mpisign.rank() == rank:  # as it has heard of all, and some others have not
                at_call(_Save, "finish", 1, alarm, after=True)
            act(folder, **saved)
    assert not mpisign.stop_requested()
    if mpisign.rank() == 0:
        at_call(type(current()), "call", 2, lambda: setattr(current(), "wants_stop", True))
    if mpisign.rank() == 1:  # all others hear of it
        at_call(type(current()), "wait", 2, alarm, after=True)
    mpisign.barrier()
    assert mpisign.stop_requested()
    current().wants_stop = False  # as if that rank had died
    mpisign.barrier()
    assert mpisign.stop_requested()
    for rank in frightened:
        for count in (1, 2, 3):
            for _ in range(1 + mpisign.rank() % 2):
                optimizer.zero_grad()
                layer(torch.ones(2, 5) * (1 + identity())).sum().backward()
                optimizer.step()
            if mpisign.rank() == rank:
                at_call(type(current()), "meet", count, alarm)
            assert optimizer.join() == (1 if mpisign.size() > 1 else 0)
            mpisign.check_consistency(layer, optimizer)
    say(scenario, members)


def say(scenario: Scenario, what: Any) -> None:
    tell(f"{scenario['name']}: {json.dumps(what)}")


def tell(text: str) -> None:
    sys.stdout.write(f"\nrank {identity()}: {text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    scenarios = json.loads(sys.argv[1])
    mpisign.init(on_failure="continue", stall_timeout=60.0)
    changes: list[mpisign.MembershipChange] = []
    mpisign.on_membership_change(changes.append)
    for one in scenarios:
        globals()[one["kind"]](one)
    assert not changes or changes[-1].members == current().group.identities
    tell(f"has lost {[list(it.lost) for it in changes if it.lost]} and ends")
