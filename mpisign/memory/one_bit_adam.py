"""1-bit Adam: Adam until its second moment has settled, then compressed momentum over the frozen one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mpisign.backends import backend_for
from mpisign.codecs.codec import Codec
from mpisign.memory.memory import Memory, State
from mpisign.memory.momentum import check_decay
from mpisign.policy import StepContext, check_positive

__all__ = ["OneBitAdam"]


@dataclass(frozen=True)
class OneBitAdam(Memory):
    """What is applied is ``m / (sqrt(v) + eps)``, m and v the same on all ranks.

    Before the freeze: exact means of gradients come in, ``m <- beta1 m + (1 - beta1) g``, ``v <- beta2 v +
    (1 - beta2) g^2``. After it v stays, each rank sends ``beta1 m + (1 - beta1) g`` with error feedback, and m
    becomes what comes back. No bias correction, as in the paper. Where v is 0, as no rank has seen a gradient yet
    (dead inputs, unused embedding rows), m is 0 too: a bit is never 0, and its scale over eps would be a giant step.

    Source: Tang et al., "1-bit Adam: Communication Efficient Large-Scale Training with Adam's Convergence Speed",
    2021, Algorithm 1.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    frozen: bool = False
    name = "one_bit_adam"
    fields: ClassVar[tuple[str, ...]] = ("momentum", "variance", "error")
    owed: ClassVar[tuple[str, ...]] = ("error",)
    common: ClassVar[tuple[str, ...]] = ("momentum", "variance")
    running = True

    def __post_init__(self) -> None:
        check_decay("beta1", self.beta1)
        check_decay("beta2", self.beta2)
        check_positive("eps", self.eps)

    @property
    def feedback(self) -> bool:  # type: ignore[override]
        return self.frozen

    def __call__(
        self, gradient: Tensor, state: State, scratch: Tensor, context: StepContext, first_word: int
    ) -> Tensor:
        if not self.frozen:
            return gradient
        error = state["error"].add_(state["momentum"], alpha=self.beta1)
        return error.add_(gradient, alpha=1.0 - self.beta1)

    def sent(self, message: Tensor, codec: Codec, state: State) -> None:
        codec.add(message, state["error"], -1.0)

    def dropped(self, state: State) -> None:
        if self.frozen:  # the gradient stays owed; the momentum comes again, as it has not changed
            state["error"].sub_(state["momentum"], alpha=self.beta1)

    def received(self, decision: Tensor, state: State) -> None:
        for span in backend_for(decision.device).blocks(decision.numel()):
            update, momentum, variance = decision[span], state["momentum"][span], state["variance"][span]
            if self.frozen:
                torch.sign(variance, out=momentum).mul_(update)
            else:
                momentum.lerp_(update, 1.0 - self.beta1)
                variance.mul_(self.beta2).addcmul_(update, update, value=1.0 - self.beta2)
                variance.clamp_(max=torch.finfo(variance.dtype).max)  # infinite, it would stop its coordinate for ever
            torch.div(momentum, torch.sqrt(variance, out=update).add_(self.eps), out=update)
