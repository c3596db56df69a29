"""mpisign.hyperparameters on a GPU: nobody waits for a number there, and it is told one step later."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import SGD

from mpisign.hyperparameters import Hyperparameters

from .needs import needs_gpu

pytestmark = needs_gpu


def test_numbers_on_a_gpu_are_told_one_step_later() -> None:
    rate = torch.tensor(0.5, device="cuda")
    optimizer = SGD([nn.Parameter(torch.zeros(3, device="cuda"))], lr=0.1)
    optimizer.param_groups[0]["lr"] = rate
    told = Hyperparameters()

    def rates(step: int) -> list[str]:
        told.tell(optimizer, step)
        return [line for line in told.lines() if "'lr'" in line]

    assert rates(0) == []
    rate.fill_(0.25)
    assert rates(1) == ["'lr' of parameter group 0 = 0.5"]
    assert rates(2) == ["'lr' of parameter group 0 = 0.25"]
    told.forget()
    assert rates(3) == [], "a rank that has sat out tells nothing of a step before"
