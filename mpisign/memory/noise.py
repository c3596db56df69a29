"""Noise in front of the sign: it makes the probability of a vote, and so the mean of many, follow the magnitude."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from mpisign.backends import RandomNumbers, backend_for
from mpisign.errors import OptionError
from mpisign.memory.memory import Memory, State
from mpisign.policy import StepContext, check_positive

__all__ = [
    "ClippedNoise",
    "GaussianNoise",
    "SparseSign",
    "StochasticSign",
    "TernarySign",
    "gaussian_mechanism",
]

Scale = float | Tensor


class Noise(Memory, ABC):
    """A memory that keeps nothing and sends a random function of the gradient."""

    elementwise = False
    noisy = True

    def __call__(
        self, gradient: Tensor, state: State, scratch: Tensor, context: StepContext, first_word: int
    ) -> Tensor:
        backend, scale = backend_for(gradient.device), self.scale_of(gradient, context, first_word)
        random = backend.random(context.noise_key(first_word), gradient.device, private=bool(context.secret))
        spare = gradient.new_empty(0)
        for span in backend.blocks(gradient.numel()):
            here = scale[span] if isinstance(scale, Tensor) and scale.dim() else scale
            self.draw(gradient[span], here, scratch[span], spare.resize_(span.stop - span.start), random)
        return scratch[: gradient.numel()]

    def scale_of(self, gradient: Tensor, context: StepContext, first_word: int) -> Scale:
        """What :meth:`draw` measures gradient or noise by: a number, a 0-d tensor, or one for each element (n,)."""
        return 1.0

    @abstractmethod
    def draw(self, gradient: Tensor, scale: Scale, out: Tensor, spare: Tensor, random: RandomNumbers) -> None:
        """Write what is sent for a part of the gradient (n,) into ``out`` (n,); ``spare`` (n,) is scratch."""


@dataclass(frozen=True)
class GaussianNoise(Noise):
    """``u = g + b xi``, xi standard normal; ``b`` is ``scale``, or ``scale`` times the parameter's largest ``|g|``.

    Source: Chen et al., "Distributed Training with Heterogeneous Data: Bridging Median- and Mean-Based Algorithms",
    2020, Algorithms 3 and 4 (noisy signSGD, noisy medianSGD).
    """

    scale: float = 1.0
    relative: bool = False
    name = "gaussian_noise"

    def __post_init__(self) -> None:
        check_positive("scale", self.scale)

    def scale_of(self, gradient: Tensor, context: StepContext, first_word: int) -> Scale:
        if not self.relative or not gradient.numel():
            return self.scale
        smallest, largest = gradient.aminmax()
        return torch.maximum(-smallest, largest).mul_(self.scale)

    def draw(self, gradient: Tensor, scale: Scale, out: Tensor, spare: Tensor, random: RandomNumbers) -> None:
        random.normal(out).mul_(scale).add_(gradient)


@dataclass(frozen=True)
class StochasticSign(Noise):
    """``u = g + b U``, U uniform on [-1, 1], so that ``P(u > 0) = 1/2 + g / 2b`` and the sign's mean is ``g / b``.

    Args:
        bound: b, at least the largest ``|g|`` (beyond it the sign is certain, and the mean no longer in
            proportion); None for the exact maximum over the ranks, coordinate by coordinate, which costs one dense
            fp32 all-reduce a step.

    Source: Jin et al., "Stochastic-Sign SGD for Federated Learning with Theoretical Guarantees", 2020, Definition 1.
    """

    bound: float | None = None
    name = "stochastic_sign"

    def __post_init__(self) -> None:
        if self.bound is not None:
            check_positive("bound", self.bound, ", or None for the exact maximum over the ranks")

    @property
    def needs_maximum(self) -> bool:  # type: ignore[override]
        return self.bound is None

    def scale_of(self, gradient: Tensor, context: StepContext, first_word: int) -> Scale:
        bounds: Scale = context.prepared[first_word] if self.bound is None else self.bound
        return bounds

    def draw(self, gradient: Tensor, scale: Scale, out: Tensor, spare: Tensor, random: RandomNumbers) -> None:
        random.uniform(out, 1.0).mul_(scale).add_(gradient)


@dataclass(frozen=True)
class ClippedNoise(Noise):
    """``u = g min(1, C / ||g||_2) + sigma xi``: P(+1) = Phi(clipped g / sigma). The norm is the whole gradient's.

    Differentially private towards whoever counts: (epsilon, delta) of a step are :func:`gaussian_mechanism`'s.
    Accounting over steps and subsampling are the user's. Rows without gradient walk, as all else would tell of data.
    Others do see of which parameters a rank has no gradient at all, and where one has a NaN or Inf: both are in the
    headers, without noise.

    Args:
        private: draw the noise from a secret of 256 bits that only this rank and its checkpoints know: keep those
            private, too. If not, whoever knows the optimizer's seed can draw it again and take it out. Steps that are
            made again after a resume repeat their noise. The generators are statistical, not cryptographic.

    Source: Jin et al., 2020 (see :class:`StochasticSign`), Definition 2; Lyu, "DP-signSGD", 2021.
    """

    clip: float = 1.0
    noise: float = 1.0
    private: bool = True
    name = "clipped_noise"
    noisy = False  # what abstains would tell

    def __post_init__(self) -> None:
        check_positive("clip", self.clip)
        check_positive("noise", self.noise)

    def prepare(self, gradients: Sequence[Tensor], context: StepContext) -> Tensor:
        return (self.clip / total_norm(gradients)).clamp(max=1.0)

    def scale_of(self, gradient: Tensor, context: StepContext, first_word: int) -> Tensor:
        factor: Tensor = context.prepared.to(gradient.dtype)
        return factor

    def draw(self, gradient: Tensor, scale: Scale, out: Tensor, spare: Tensor, random: RandomNumbers) -> None:
        random.normal(out).mul_(self.noise).add_(torch.mul(gradient, scale, out=spare))


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The L2 norm of all gradients together, 0-d fp64; it waits for no GPU."""
    if not gradients:
        return torch.zeros((), dtype=torch.float64, device="cpu")
    return backend_for(gradients[0].device).norm(gradients)


def gaussian_mechanism(clip: float, epsilon: float, delta: float) -> float:
    """The noise ``sigma = C sqrt(2 ln(1.25 / delta)) / epsilon`` that makes one step (epsilon, delta)-private.

    It hides whether a gradient of norm at most C is there. To hide which of two it is, give ``2 C`` as ``clip``.

    Source: Dwork & Roth, "The Algorithmic Foundations of Differential Privacy", 2014, Theorem A.1 (epsilon < 1).

    Raises:
        OptionError: ``epsilon`` or ``delta`` is not in (0, 1).
    """
    check_positive("clip", clip)
    for name, value in (("epsilon", epsilon), ("delta", delta)):
        if not (isinstance(value, Real) and 0.0 < value < 1.0):
            raise OptionError(f"{name}={value!r} must be in (0, 1), where the Gaussian mechanism's bound holds")
    return clip * math.sqrt(2.0 * math.log(1.25 / delta)) / epsilon


@dataclass(frozen=True)
class TernarySign(Noise):
    """+1 with probability (A + g) / 2B, -1 with (A - g) / 2B, else 0; g is clipped to [-A, A]. The mean is g / B.

    ``private`` as in :class:`ClippedNoise`, each coordinate alone; no (epsilon, delta) of the whole is claimed.

    Source: "TernaryVote: Differentially Private, Communication Efficient, and Byzantine Resilient Distributed
    Optimization on Heterogeneous Data", 2024, Definition 3.
    """

    a: float = 1.0
    b: float = 2.0
    private: bool = False
    name = "ternary_sign"

    @property
    def noisy(self) -> bool:  # type: ignore[override]
        return not self.private  # else what abstains would tell

    def __post_init__(self) -> None:
        check_positive("A", self.a)
        check_positive("B", self.b)
        if self.b < self.a:
            raise OptionError(f"B={self.b!r} must be at least A={self.a!r}, as A/B is the probability to vote")

    def draw(self, gradient: Tensor, scale: Scale, out: Tensor, spare: Tensor, random: RandomNumbers) -> None:
        random.uniform(out, self.b)  # within A it is a vote: +1 up to g, else -1
        up = spare.copy_(gradient).ge_(out)
        out.abs_().le_(self.a).mul_(up.mul_(2.0).sub_(1.0))


@dataclass(frozen=True)
class SparseSign(Noise):
    """``sign(g)`` with probability ``min(1, B |g|)``, else 0. The mean is ``B g`` while ``B |g| <= 1``.

    Source: Jin et al., "Magnitude Matters: Fixing SIGNSGD Through Magnitude-Aware Sparsification in the Presence of
    Data Heterogeneity", 2023 (sparsign).
    """

    budget: float = 1.0
    name = "sparse_sign"

    def __post_init__(self) -> None:
        check_positive("budget", self.budget)

    def draw(self, gradient: Tensor, scale: Scale, out: Tensor, spare: Tensor, random: RandomNumbers) -> None:
        speaks = random.uniform(out, 1.0 / self.budget).abs_().le_(torch.abs(gradient, out=spare))
        speaks.mul_(torch.sign(gradient, out=spare))
