"""Error feedback: what a message loses is added to the next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mpisign.codecs.codec import Codec
from mpisign.memory.memory import Memory, State
from mpisign.policy import StepContext

__all__ = ["ErrorFeedback"]


@dataclass(frozen=True)
class ErrorFeedback(Memory):
    """``p = g + e`` is sent as C(p), then ``e <- p - C(p)``.

    The paper accumulates ``lr g``; here the error is in units of the gradient, and is rescaled when the learning
    rate changes, which is the same. It needs a rule that is a mean: under a vote nothing is guaranteed.

    A step at a learning rate of exactly 0 is still sent and counted, and moves nothing: what its message had of the
    error is lost, where the paper would apply it. Let warm-ups begin, and schedules end, a little above 0.

    Source: Karimireddy et al., "Error Feedback Fixes SignSGD and other Gradient Compression Schemes", 2019,
    Algorithm 2.
    """

    name = "error_feedback"
    fields: ClassVar[tuple[str, ...]] = ("error",)
    owed: ClassVar[tuple[str, ...]] = ("error",)
    follows_lr: ClassVar[tuple[str, ...]] = ("error",)
    feedback = True

    def __call__(
        self, gradient: Tensor, state: State, scratch: Tensor, context: StepContext, first_word: int
    ) -> Tensor:
        return state["error"].add_(gradient)

    def sent(self, message: Tensor, codec: Codec, state: State) -> None:
        codec.add(message, state["error"], -1.0)
