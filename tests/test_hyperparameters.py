"""mpisign.hyperparameters: equal numbers have equal digests, whatever their types, and other numbers others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from mpisign.hyperparameters import Hyperparameters, described


def adam(**options: Any) -> AdamW:
    return AdamW([{"params": [nn.Parameter(torch.zeros(2))], **options}, {"params": [nn.Parameter(torch.zeros(3))]}])


def digest_of(optimizer: Optimizer) -> int:
    return Hyperparameters().tell(optimizer, 0)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"lr": 1}, {"lr": 1.0}),
        ({"lr": 0.5}, {"lr": np.float32(0.5)}),
        ({"lr": 0.5}, {"lr": torch.tensor(0.5)}),
        ({"betas": (0.9, 0.99)}, {"betas": [0.9, np.float64(0.99)]}),
        ({"weight_decay": 0.0}, {"weight_decay": -0.0}),
        ({"maximize": False}, {"maximize": 0}),
        ({"fused": None}, {"fused": False}),
        ({"foreach": None}, {"foreach": True}),
        ({"initial_lr": 1.0}, {"initial_lr": 2.0}),
        ({"mine": np.array([1.0, 2.0])}, {"mine": torch.tensor([1.0, 2.0])}),
    ],
)
def test_what_applies_the_same_has_one_digest(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert digest_of(adam(**one)) == digest_of(adam(**other)) > 0


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"lr": 0.1}, {"lr": np.nextafter(0.1, 1.0)}),
        ({"lr": torch.tensor(0.1)}, {"lr": torch.nextafter(torch.tensor(0.1), torch.tensor(1.0))}),
        ({"betas": (0.9, 0.99)}, {"betas": (0.9, 0.98)}),
        ({"maximize": False}, {"maximize": True}),
        ({"weight_decay": 0.1}, {"weight_decay": 0.2}),
        ({"mine": 2**60}, {"mine": 2**60 + 1}),
        ({"mine": torch.zeros(100)}, {"mine": torch.zeros(100).index_fill(0, torch.tensor([7]), 1e-30)}),
        ({"mine": torch.zeros(4, dtype=torch.bfloat16)}, {"mine": torch.tensor([0, 0, 0, 1.0], dtype=torch.bfloat16)}),
        ({"mine": {"a": 1.0}}, {"mine": {"a": 2.0}}),
        ({"mine": "one"}, {"mine": "another"}),
        ({}, {"mine": 0.0}),
    ],
)
def test_what_applies_something_else_has_another(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert digest_of(adam(**one)) != digest_of(adam(**other))


def test_the_kind_of_optimizer_counts() -> None:
    parameter = nn.Parameter(torch.zeros(2))

    class Mine(SGD):
        """With a step of its own, maybe."""

    assert digest_of(SGD([parameter], lr=0.1)) != digest_of(Mine([parameter], lr=0.1))


def test_options_that_have_an_address_say_nothing() -> None:
    assert described(object()) == described(object())


def change_number(group: dict[str, Any]) -> None:
    group["lr"] = 0.25


def change_tensor_in_place(group: dict[str, Any]) -> None:
    group["rate"].fill_(0.25)


def change_list_in_place(group: dict[str, Any]) -> None:
    group["list"][1] = 0.25


def change_array_in_place(group: dict[str, Any]) -> None:
    group["array"][1] = 0.25


@pytest.mark.parametrize("change", [change_number, change_tensor_in_place, change_list_in_place, change_array_in_place])
def test_a_change_is_seen_however_it_is_made(change: Any) -> None:
    def changed(at: int) -> list[int]:
        its = adam(rate=torch.tensor(0.5), list=[0.5, 0.5], array=np.array([0.5, 0.5]))
        told = Hyperparameters()
        digests = []
        for step in range(4):
            if step == at:
                change(its.param_groups[0])
            digests.append(told.tell(its, step))
        return digests

    never = changed(9)
    assert len(set(never)) == 1
    assert changed(2)[:2] == never[:2]
    assert len({*changed(2)[1:3]}) == 2
    assert changed(2)[2] == changed(2)[3] == changed(0)[0]


def test_where_nothing_changes_nothing_is_described_anew() -> None:
    optimizer, told = adam(), Hyperparameters()
    told.tell(optimizer, 0)
    lines = told.lines()
    assert told.changed
    told.tell(optimizer, 1)
    assert not told.changed
    assert told.lines() is lines
    optimizer.param_groups[1]["lr"] = 0.5
    told.tell(optimizer, 2)
    assert told.changed
    assert any("'lr' of parameter group 1 = 0.5" in text for text in told.lines())


def test_what_changed_between_vote_and_step_is_told_by_the_next() -> None:
    optimizer, other = adam(lr=0.5), adam(lr=0.5)
    told, others = Hyperparameters(), Hyperparameters()
    assert told.tell(optimizer, 0) == others.tell(other, 0)
    other.param_groups[0]["lr"] = 0.25
    for its, by in ((told, optimizer), (others, other)):
        its.applied(by)
    other.param_groups[0]["lr"] = 0.5
    assert told.tell(optimizer, 1) != others.tell(other, 1)
    assert others.lines()[1] == "applied in the step before: 'lr' of parameter group 0 = 0.25"
    assert told.tell(optimizer, 2) == others.tell(other, 2), "and only by the next"
    other.param_groups[0]["lr"] = 0.25
    others.applied(other)
    other.param_groups[0]["lr"] = 0.5
    others.forget()
    assert told.tell(optimizer, 3) == others.tell(other, 3), "a rank that has sat out since has nothing to tell"
