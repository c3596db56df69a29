"""mpisign.methods: the named methods, and methods made of a user's own memory, codec and rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

import mpisign
from mpisign import DistributedSignOptimizer, Method
from mpisign.backends import Flag
from mpisign.codecs import Codec, Dense, SignBits
from mpisign.memory import Identity, LionMomentum, Memory, Momentum
from mpisign.policy import StepContext
from mpisign.rules import MajorityVote, Mean, ValueRule, VectorRule


@pytest.mark.parametrize(
    ("method", "memory", "codec", "rule", "name"),
    [
        (mpisign.signsgd(), Identity(), SignBits(), MajorityVote(), "signsgd"),
        (mpisign.signum(), Momentum(0.9), SignBits(), MajorityVote(), "signum"),
        (mpisign.signum(momentum=0.5), Momentum(0.5), SignBits(), MajorityVote(), "signum"),
        (mpisign.lion(), LionMomentum(0.9, 0.99), SignBits(), MajorityVote(), "lion"),
        (mpisign.lion(beta1=0.8, beta2=0.7), LionMomentum(0.8, 0.7), SignBits(), MajorityVote(), "lion"),
        (mpisign.mean(), Identity(), Dense(), Mean(), "mean"),
    ],
    ids=str,
)
def test_a_method_names_a_memory_a_codec_and_a_rule(
    method: Method, memory: object, codec: object, rule: object, name: str
) -> None:
    assert (method.memory, method.codec, method.rule, method.name) == (memory, codec, rule, name)
    assert method.elects == (name != "mean")


def test_the_text_of_a_method_tells_its_options() -> None:
    """It enters the layout's fingerprint, so ranks with other options must have another text."""
    methods = [mpisign.signsgd(), mpisign.signum(0.9), mpisign.signum(0.8), mpisign.lion(), mpisign.mean()]
    assert len({str(method) for method in methods}) == len(methods)
    assert str(mpisign.signum(0.9)) == str(mpisign.signum(0.9))


@pytest.mark.parametrize("make", [mpisign.signum, mpisign.lion], ids=lambda make: make.__name__)
def test_impossible_decays(make: Any) -> None:
    with pytest.raises(mpisign.OptionError, match=r"must be in \[0, 1\)"):
        make(1.0)


# ------------------------------------------------------------------------------------------- one's own


@dataclass(frozen=True)
class ClippedToUnitNorm(Memory):
    """Not elementwise: it must always see a whole parameter."""

    name = "unit norm"
    fields = ("calls",)
    elementwise = False
    sizes: list[int] = field(default_factory=list, repr=False, compare=False)

    def __call__(
        self,
        gradient: torch.Tensor,
        state: dict[str, torch.Tensor],
        scratch: torch.Tensor,
        context: StepContext,
        first_word: int,
    ) -> torch.Tensor:
        self.sizes.append(gradient.numel())
        state["calls"] += 1
        return torch.div(gradient, max(1.0, float(gradient.norm())), out=scratch[: gradient.numel()])


@dataclass(frozen=True)
class ScaledBits(Codec):
    """One word of scale (the mean magnitude, as fp32), then the signs. Not elementwise either."""

    name = "scaled bits"
    elementwise = False

    def length(self, elements: int) -> int:
        return 1 + SignBits().length(elements)

    def encode(self, values: torch.Tensor, message: torch.Tensor, context: StepContext, first_word: int) -> Flag:
        message[0, :1].view(torch.float32).copy_(values.abs().mean())
        return SignBits().encode(values, message[:, 1:], context, first_word)

    def add(self, message: torch.Tensor, out: torch.Tensor, alpha: float) -> None:
        signs = torch.empty_like(out)
        SignBits().decode(message[:, 1:], signs)
        out += alpha * message[0, :1].view(torch.float32) * signs


@dataclass(frozen=True)
class FirstVoter(ValueRule):
    """A dictatorship."""

    name = "first voter"

    def decide(self, messages: Sequence[torch.Tensor], out: torch.Tensor, context: StepContext, first_word: int) -> int:
        out.copy_(messages[0])
        return 0


@pytest.mark.usefixtures("world")
def test_a_method_of_one_s_own() -> None:
    memory = ClippedToUnitNorm()
    method = Method(memory, ScaledBits(), FirstVoter(), "mine")
    sizes = [3, 600_000, 40]  # the second is larger than the pieces that elementwise methods get
    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in sizes]
    optimizer = DistributedSignOptimizer(torch.optim.SGD(parameters, lr=1.0), method=method)
    gradients = [torch.randn(size, generator=torch.Generator().manual_seed(size)) for size in sizes]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    optimizer.step()
    assert sorted(memory.sizes) == sorted(sizes)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        clipped = gradient / max(1.0, float(gradient.norm()))
        torch.testing.assert_close(parameter.detach(), -clipped.abs().mean() * clipped.sign())
    assert optimizer.report is not None
    assert optimizer.report.method == "mine"
    assert optimizer.report.ties is None
    memories = optimizer.state_dict()["mpisign"]["memory"]
    assert all((state["calls"] == 1).all() for state in memories.values())


@pytest.mark.usefixtures("world")
def test_a_rule_that_needs_whole_vectors_refuses_shards() -> None:
    @dataclass(frozen=True)
    class WholeVectors(VectorRule):
        name = "first voter"

        def decide(self, messages: Any, out: torch.Tensor, context: StepContext, first_word: int) -> int:
            return FirstVoter().decide(messages, out, context, first_word)

    method = Method(Identity(), Dense(), WholeVectors())
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(3))], lr=1.0)
    with pytest.raises(mpisign.OptionError, match=r"two_phase.*'first voter' needs whole vectors.*allgather"):
        DistributedSignOptimizer(sgd, method=method, exchange="two_phase")
    DistributedSignOptimizer(sgd, method=method, exchange="auto")
    with pytest.raises(mpisign.OptionError, match=r"'first voter' compares whole vectors.*Dense"):
        Method(Identity(), ScaledBits(), WholeVectors())


def test_a_vote_needs_ballots() -> None:
    with pytest.raises(mpisign.OptionError, match=r"'vote' counts votes, and 'dense' messages are none.*SignBits"):
        Method(Identity(), Dense(), MajorityVote())


@pytest.mark.usefixtures("world")
def test_an_epoch_that_nobody_tells_is_the_first_with_a_warning_and_a_checkpoint_knows_it() -> None:
    def started() -> DistributedSignOptimizer:
        weight = torch.nn.Parameter(torch.zeros(100, 100))
        optimizer = DistributedSignOptimizer(torch.optim.SGD([weight], lr=1.0), method=mpisign.dgc(0.01, sample=None))
        weight.grad = torch.randn(100, 100)
        return optimizer

    untold = started()
    with pytest.warns(UserWarning, match=r"optimizer\.set_epoch\(epoch\)"):
        untold.step()
    first, resumed = started(), started()
    first.set_epoch(4)
    first.step()
    resumed.load_state_dict(first.state_dict())
    resumed.step()
    sent = [optimizer.param_groups[0]["params"][0].grad.count_nonzero() for optimizer in (untold, first, resumed)]
    assert sent == [2500, 100, 100]


@pytest.mark.usefixtures("world")
def test_an_epoch_is_a_plain_number() -> None:
    weight = torch.nn.Parameter(torch.zeros(3))
    optimizer = DistributedSignOptimizer(torch.optim.SGD([weight], lr=1.0))
    optimizer.set_epoch(np.int64(2))
    assert type(optimizer.state_dict()["mpisign"]["epoch"]) is int
    for wrong in (-1, 1.0, "1", None):
        with pytest.raises(mpisign.OptionError, match="epoch="):
            optimizer.set_epoch(wrong)
