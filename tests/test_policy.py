"""mpisign.policy: options are checked where they are given; the coins' keys are the documented ones."""

from __future__ import annotations

import dataclasses
from typing import Any

import oracle
import pytest

from mpisign import OptionError
from mpisign.policy import Policy


@pytest.mark.parametrize(
    ("option", "choices"), [("zeros", ("coin", "abstain", "positive")), ("ties", ("coin", "zero", "positive"))]
)
def test_choices(option: str, choices: tuple[str, ...]) -> None:
    for choice in choices:
        assert getattr(Policy(**{option: choice}), option) == choice
    for wrong in ("Coin", "", None, 1, ["coin"]):
        with pytest.raises(OptionError, match=f"^{option}=.*" + ".*".join(choices)):
            Policy(**{option: wrong})


@pytest.mark.parametrize("seed", [0.0, "0", None, True])
def test_the_seed_is_an_integer(seed: Any) -> None:
    with pytest.raises(OptionError, match="seed="):
        Policy(seed=seed)


@pytest.mark.parametrize("seed", [0, -1, 2**70])
def test_turn(seed: int) -> None:
    """Ties fall alike on all ranks, zeros on each rank in its own way, and all anew each step."""
    policy = Policy(seed=seed)
    for step in (0, 1, 10**9):
        for rank in (0, 1, 500):
            context = policy.context(step, rank)
            assert context.policy is policy
            assert context.zeros_key == oracle.coin_key(seed, step, oracle.zeros_stream(rank))
            assert context.ties_key == oracle.coin_key(seed, step, oracle.TIES)


def test_a_policy_cannot_change_under_a_running_job() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Policy().zeros = "positive"
