"""Deep Gradient Compression: momentum and what was not sent yet, corrected for each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from mpisign.codecs.codec import Codec
from mpisign.codecs.sparse import TopK
from mpisign.memory.memory import Memory, State
from mpisign.memory.momentum import check_decay
from mpisign.memory.noise import total_norm
from mpisign.policy import StepContext, check_positive

__all__ = ["DGC"]


@dataclass(frozen=True)
class DGC(Memory):
    """``u <- m u + g; v <- v + u`` (Nesterov: ``u <- m (u + g); v <- v + u + g``); v's largest are sent and cleared.

    Args:
        momentum: the m of the equations.
        nesterov: use Nesterov's form.
        clip: clip the rank's whole gradient to the norm ``clip / sqrt(M)`` before it is taken in; None for never.
        masking: clear u, too, where v is sent (momentum factor masking), but not where all of a parameter is, as
            nothing of it is ever late. Without it, everything sent plus what v still holds is the sum of all u.

    Source: Lin et al., "Deep Gradient Compression: Reducing the Communication Bandwidth for Distributed Training",
    2018, Algorithm 4 and sections 3.1 to 3.3.
    """

    momentum: float = 0.9
    nesterov: bool = True
    clip: float | None = None
    masking: bool = True
    name = "dgc"
    fields: ClassVar[tuple[str, ...]] = ("velocity", "residual")
    owed: ClassVar[tuple[str, ...]] = ("residual",)
    feedback = True

    def __post_init__(self) -> None:
        check_decay("momentum", self.momentum)
        if self.clip is not None:
            check_positive("clip", self.clip, ", or None for never")

    @property
    def needs_all(self) -> bool:
        return self.clip is not None

    def prepare(self, gradients: Sequence[Tensor], context: StepContext) -> Any:
        if self.clip is None:
            return None
        return (self.clip * context.size**-0.5 / total_norm(gradients)).clamp(max=1.0)

    def __call__(
        self, gradient: Tensor, state: State, scratch: Tensor, context: StepContext, first_word: int
    ) -> Tensor:
        velocity, residual = state["velocity"], state["residual"]
        if self.clip is not None:
            gradient = torch.mul(gradient, context.prepared.to(gradient.dtype), out=scratch[: gradient.numel()])
        if self.nesterov:
            velocity.add_(gradient).mul_(self.momentum)
            residual.add_(gradient)
        else:
            velocity.mul_(self.momentum).add_(gradient)
        return residual.add_(velocity)

    def sent(self, message: Tensor, codec: Codec, state: State) -> None:
        codec.add(message, state["residual"], -1.0)
        if self.masking and message.shape[1] < state["velocity"].numel():
            assert isinstance(codec, TopK)
            codec.clear(message, state["velocity"])
