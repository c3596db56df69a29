"""A state_dict that the first release wrote loads, and training goes on from it to the release's own bits, but for
the rounding of scales.

``states/release_0.1.pt`` holds, for each of some methods with a memory, after three steps of one rank: the state_dict,
the parameters, the gradients of the fourth step, and the parameters after it, all as the release computed them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import mpisign
from mpisign import Method
from mpisign.codecs import ScaledBits

pytestmark = pytest.mark.usefixtures("world")

METHODS: dict[str, Callable[[], Method]] = {
    "signum": mpisign.signum,
    "lion": mpisign.lion,
    "ef_signsgd": mpisign.ef_signsgd,
    "double_squeeze": mpisign.double_squeeze,
    "ef21": lambda: mpisign.ef21(0.1),
    "ef21_sgdm": lambda: mpisign.ef21_sgdm(ratio=0.1),
    "dgc": lambda: mpisign.dgc(0.05, warmup_epochs=0),
    "one_bit_adam": lambda: mpisign.one_bit_adam(freeze_step=1),
    "centered_clipping": lambda: mpisign.centered_clipping(1.0),
}


@pytest.mark.parametrize("name", METHODS)
def test_it_goes_on(name: str) -> None:
    saved = torch.load(Path(__file__).parent / "states" / "release_0.1.pt", weights_only=True)[name]
    parameters = [nn.Parameter(value.clone()) for value in saved["parameters"]]
    optimizer = mpisign.DistributedSignOptimizer(
        torch.optim.SGD(parameters, lr=0.1),
        list(zip(("0.weight", "0.bias", "1.weight", "1.bias"), parameters, strict=True)),
        method=METHODS[name](),
        zeros="coin",
        seed=3,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "starts fresh" is one
        optimizer.load_state_dict(saved["state"])
    for parameter, gradient in zip(parameters, saved["gradients"], strict=True):
        parameter.grad = gradient
    optimizer.step()
    for now, then in zip(parameters, saved["after"], strict=True):
        # The sum that a scale is made of depended on the processor and the number of threads.
        rounding = 1e-6 if isinstance(optimizer.method.at(9, 0).codec, ScaledBits) else 0.0
        torch.testing.assert_close(now.detach(), then.detach(), rtol=rounding, atol=0.1 * rounding)
    assert not any(torch.equal(now, then) for now, then in zip(parameters, saved["parameters"], strict=True))
