"""The shape of a memory, to be subclassed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from mpisign.codecs.codec import Codec
from mpisign.policy import StepContext

__all__ = ["Memory", "State"]

State = dict[str, Tensor]
"""Flat tensors of one parameter, (n,) each, by field."""


class Memory:
    """What turns a rank's gradient into what it sends. Make it a frozen dataclass: ranks compare the ``repr``.

    Attributes:
        name: for errors and checkpoints.
        fields: names of its state tensors, each like the parameter (fp32 for 16-bit parameters), zero at first.
        elementwise: element i of the result depends on element i of the inputs alone, and there is no
            randomness. It may then be called on pieces of a parameter; if not it always sees the whole.
        feedback: :meth:`sent` wants to hear what went out.
        running: :meth:`received` turns the decision into the gradient.
        needs_maximum: ``context.prepared[first_word]`` shall be the largest magnitude (n,) any rank's gradient has,
            coordinate by coordinate. It costs a dense all-reduce.
        needs_all: :meth:`prepare` must see all gradients of the method before any is taken in. If one of them is not
            finite, the rank abstains on everything. Default: whether :meth:`prepare` is overridden.
        noisy: it votes by chance where a gradient is 0, as a coin would. Where rows of zeros count (``zeros="rows"``),
            0 is sent there instead, so that a row without gradient abstains.
        private: no other rank shall be able to repeat its random numbers: a secret of this rank's goes into them.
        common: fields that follow from the decisions alone, the same on all ranks: what happens to one rank must not
            change them.
        summed: a field that holds the sum over all ranks of their :meth:`share`, or "". It is summed anew when ranks
            have come or gone.
        owed: fields whose sum over ranks is yet to reach the parameters, and should when a rank dies.
        follows_lr: fields in units of the gradient whose product with the learning rate is what counts (an
            error still owed to the parameters): they are rescaled by old rate / new rate when the rate changes.
    """

    name = "memory"
    fields: ClassVar[tuple[str, ...]] = ()
    elementwise = True
    feedback = False
    running = False
    needs_maximum = False
    noisy: bool = False
    private: bool = False
    common: ClassVar[tuple[str, ...]] = ()
    summed = ""
    owed: ClassVar[tuple[str, ...]] = ()
    follows_lr: ClassVar[tuple[str, ...]] = ()

    @property
    def needs_all(self) -> bool:
        return self.needs_maximum or type(self).prepare is not Memory.prepare

    @property
    def betas(self) -> tuple[float, float] | None:
        """What is sent, and what m becomes, if its one field is an average m of gradients g. None for all others.

        ``betas[0] m + (1 - betas[0]) g`` is sent, then ``m <- betas[1] m + (1 - betas[1]) g``. On a GPU one kernel
        does both for all parameters, and packs the signs, if they stand in the class whose ``__call__`` does the same.
        """
        return None

    def prepare(self, gradients: Sequence[Tensor], context: StepContext) -> Any:
        """Look at all gradients of the step, flat and finite, before any is taken in: for norms over the model.

        The result is ``context.prepared`` in every call of the step.
        """
        return None

    def __call__(
        self, gradient: Tensor, state: State, scratch: Tensor, context: StepContext, first_word: int
    ) -> Tensor:
        """Take one flat gradient (n,) in and return what the codec shall send (n,). It allocates as little as it can.

        Args:
            gradient: in the state's precision; left alone.
            state: changed in place.
            scratch: at least n elements to write into.
            context: the step; ``first_word`` tells places apart: ``context.generator(first_word, gradient.device)``.

        Returns:
            ``gradient``, a state tensor, or the first n elements of ``scratch``.
        """
        return gradient

    def sent(self, message: Tensor, codec: Codec, state: State) -> None:
        """Hear which ``message`` (planes_up, k) went out: ``codec.add`` says what it is worth. Only if it counted."""

    def dropped(self, state: State) -> None:
        """Hear that what the last call took in did not count, and goes with the next message: a NaN was elsewhere."""

    def received(self, decision: Tensor, state: State) -> None:
        """Turn the decision (n,), flat and in the state's precision, into what the optimizer shall apply, in place."""

    def share(self, state: State, context: StepContext) -> Tensor:
        """What this rank has in the field ``summed``: (n,), new."""
        raise NotImplementedError
