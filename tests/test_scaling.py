"""mpisign.scaling: what a GradScaler says, and how one is found."""

from __future__ import annotations

from typing import Any

import parts
import pytest
import torch
from torch import optim

from mpisign.exchange.header import SCALER_INF, VOTES
from mpisign.scaling import living, scaler_says


class Rare:
    """Of which there is only what this test makes."""


def test_all_living_objects_of_a_class_are_found() -> None:
    assert living(Rare) == []
    kept = [Rare(), type("Rarer", (Rare,), {})()]
    assert {id(it) for it in living(Rare)} == {id(it) for it in kept}


@pytest.mark.parametrize(
    ("found_inf", "scale", "expected"),
    [
        (None, None, (VOTES, 1.0)),
        (torch.tensor(0.0), torch.tensor(1024.0), (VOTES, 2.0**-10)),
        (torch.tensor(1.0), torch.tensor(1024.0), (SCALER_INF, 2.0**-10)),
        (torch.tensor(2.0), None, (SCALER_INF, 1.0)),  # of two devices
        (torch.tensor(0.0), None, (VOTES, 1.0)),
        (None, torch.tensor(0.5), (VOTES, 2.0)),
    ],
)
def test_what_a_scaler_leaves_on_an_optimizer(found_inf: Any, scale: Any, expected: tuple[int, float]) -> None:
    optimizer = optim.SGD(parts.parameters((3,)), lr=0.1)
    for name, value in (("found_inf", found_inf), ("grad_scale", scale)):
        if value is not None:
            setattr(optimizer, name, value)
    answer = scaler_says(optimizer)
    assert answer == expected
    assert [type(part) for part in answer] == [int, float]


@pytest.mark.parametrize("unscaled", [False, True])
@pytest.mark.parametrize("bad", [False, True])
def test_what_torchs_scaler_leaves_there(bad: bool, unscaled: bool) -> None:
    """An optimizer of ours with torch's own GradScaler: what it hears inside ``step()``."""
    heard = []

    class Listening(optim.SGD):
        _step_supports_amp_scaling = True

        def step(self, closure: Any = None) -> None:
            heard.append(scaler_says(self))

    (tensor,) = tensors = parts.parameters((3,))
    optimizer = Listening(tensors, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(tensor.sum()).backward()
    assert tensor.grad is not None
    if bad:
        tensor.grad[1] = torch.inf
    if unscaled:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    assert heard == [(SCALER_INF if bad else VOTES, 1.0 if unscaled else 2.0**-10)]
    assert scaler_says(optimizer) == (VOTES, 1.0), "only inside step()"
