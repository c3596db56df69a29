"""mpisign.memory: what a worker remembers, against the oracle."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import oracle
import pytest
import torch

from mpisign import OptionError
from mpisign.memory import Identity, LionMomentum, Memory, Momentum
from mpisign.policy import Policy

N = 1000
TURN = Policy().context(0, 0)
Update = Callable[[oracle.Floats, oracle.Floats], tuple[oracle.Floats, oracle.Floats]]

MEMORIES: dict[str, tuple[Memory, Update]] = {
    "momentum 0.9": (Momentum(0.9), lambda v, g: oracle.momentum(v, g, 0.9)),
    "momentum 0": (Momentum(0.0), lambda v, g: oracle.momentum(v, g, 0.0)),
    "momentum 0.3": (Momentum(0.3), lambda v, g: oracle.momentum(v, g, 0.3)),
    "lion": (LionMomentum(), lambda m, g: oracle.lion(m, g, 0.9, 0.99)),
    "lion 0.2, 0.6": (LionMomentum(0.2, 0.6), lambda m, g: oracle.lion(m, g, 0.2, 0.6)),
}
each = pytest.mark.parametrize(("memory", "update"), MEMORIES.values(), ids=MEMORIES)


def gradients(steps: int) -> torch.Tensor:
    return torch.randn(steps, N, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_against_the_oracle(memory: Memory, update: Update, dtype: torch.dtype) -> None:
    state = {"momentum": torch.zeros(N, dtype=dtype)}
    kept = np.zeros(N)
    for g in gradients(5).to(dtype):
        before = g.clone()
        sent = memory(g, state, torch.full((N + 100,), torch.nan, dtype=dtype), TURN, 0)  # scratch may be larger
        assert sent.shape == (N,)
        expected, kept = update(kept, g.double().numpy())
        tolerance = 4 * torch.finfo(dtype).eps
        np.testing.assert_allclose(sent.double().numpy(), expected, rtol=0, atol=tolerance)
        np.testing.assert_allclose(state["momentum"].double().numpy(), kept, rtol=0, atol=tolerance)
        assert torch.equal(g, before), "the gradient must be left alone"


@each
def test_pieces_give_what_the_whole_gives(memory: Memory, update: Update) -> None:
    assert memory.elementwise
    whole, pieces = ({"momentum": torch.zeros(N)} for _ in range(2))
    for g in gradients(3).float():
        sent = memory(g, whole, torch.empty(N), TURN, 0).clone()
        for at in range(0, N, 96):
            piece = slice(at, at + 96)
            part = memory(g[piece], {"momentum": pieces["momentum"][piece]}, torch.empty(N)[piece], TURN, at // 32)
            assert torch.equal(part, sent[piece])
    assert torch.equal(whole["momentum"], pieces["momentum"])


@each
def test_the_state_stays_in_place(memory: Memory, update: Update) -> None:
    momentum = torch.zeros(N)
    state, scratch = {"momentum": momentum}, torch.empty(N)
    sent = memory(torch.ones(N), state, scratch, TURN, 0)
    assert state["momentum"] is momentum
    assert sent.data_ptr() in (momentum.data_ptr(), scratch.data_ptr())


@each
def test_betas_tell_what_is_sent_and_kept(memory: Memory, update: Update) -> None:
    assert memory.betas is not None
    sent, kept = memory.betas
    momentum, gradient = torch.randn(2, N, generator=torch.Generator().manual_seed(0))
    expected = torch.lerp(momentum, gradient, 1.0 - sent), torch.lerp(momentum, gradient, 1.0 - kept)
    ours = memory(gradient, {"momentum": momentum}, torch.empty(N), TURN, 0)
    assert torch.equal(ours, expected[0])
    assert torch.equal(momentum, expected[1])


def test_nothing_sends_the_gradient_as_it_lies() -> None:
    gradient = torch.randn(5)
    assert Identity().fields == ()
    assert Identity()(gradient, {}, torch.empty(5), TURN, 0) is gradient


@pytest.mark.parametrize("decay", [-0.1, 1.0, 1.5, float("nan"), float("inf")])
def test_decays_lie_between_0_and_1(decay: float) -> None:
    with pytest.raises(OptionError, match="momentum="):
        Momentum(decay)
    with pytest.raises(OptionError, match="beta1="):
        LionMomentum(decay, 0.99)
    with pytest.raises(OptionError, match="beta2="):
        LionMomentum(0.9, decay)
