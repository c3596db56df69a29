"""Adversaries, to measure in experiments what a method withstands. Nothing in the library imports this module.

An attack is a pure function of what this rank would send, and for omniscient ones of what the honest ranks would send.
:class:`Adversary` plays it on chosen ranks, between ``backward()`` and ``optimizer.step()``.

The signSGD paper's "up to half the workers" are blind adversaries that do not collude (:class:`SignFlip`). Those that
do (:class:`ColludingSigns`) do far more damage: measure both.
"""

from __future__ import annotations

import hashlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mpisign.bitmap.tensors import unreadable
from mpisign.differences import minority
from mpisign.errors import ConsistencyError, OptionError
from mpisign.plain import uncompiled
from mpisign.policy import check_integer, use_plain_numbers

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = [
    "ALittleIsEnough",
    "Adversary",
    "Attack",
    "ColludingSigns",
    "Constant",
    "Gaussian",
    "InnerProduct",
    "Mimic",
    "RandomSigns",
    "Scaled",
    "SignFlip",
    "flip_labels",
]

logger = logging.getLogger(__name__)


class Attack(ABC):
    """What an adversary sends. Make it a frozen dataclass: ranks compare the ``repr``.

    Attributes:
        omniscient: it is shown what the honest ranks would send.
    """

    omniscient = False

    @abstractmethod
    def __call__(self, mine: Tensor, honest: Tensor, generator: torch.Generator) -> Tensor:
        """What to send instead of ``mine``: (n,), new. Everything is on the CPU, in fp32 or fp64.

        Args:
            mine: (n,) what this rank would send, all parameters in one vector.
            honest: (H, n) what the H >= 1 honest ranks would, lowest first; (0, n) unless ``omniscient``.
            generator: this rank's random numbers.
        """


@dataclass(frozen=True)
class SignFlip(Attack):
    """``-x``, x the own vector, as the signSGD paper's inverted workers; if omniscient, ``-mu``, mu the honest mean.

    Bernstein et al., "signSGD with Majority Vote is Communication Efficient and Fault Tolerant", 2018.
    """

    omniscient: bool = False

    def __call__(self, mine: Tensor, honest: Tensor, generator: torch.Generator) -> Tensor:
        return -(honest.mean(0) if self.omniscient else mine)


@dataclass(frozen=True)
class Scaled(Attack):
    """``factor x``: enough of it to lead a mean wherever it likes, and no more than a sign flip to a vote."""

    factor: float = -100.0

    def __call__(self, mine: Tensor, honest: Tensor, generator: torch.Generator) -> Tensor:
        return self.factor * mine


@dataclass(frozen=True)
class Constant(Attack):
    """``value`` in every coordinate. With NaN or Inf the rank abstains; 0 is a coin unless ``zeros`` says otherwise."""

    value: float = 0.0

    def __call__(self, mine: Tensor, honest: Tensor, generator: torch.Generator) -> Tensor:
        return torch.full_like(mine, self.value)


@dataclass(frozen=True)
class Gaussian(Attack):
    """Normal noise of standard deviation ``scale``.

    Blanchard et al., "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent", 2017, who take 200.
    """

    scale: float = 200.0

    def __call__(self, mine: Tensor, honest: Tensor, generator: torch.Generator) -> Tensor:
        return self.scale * torch.randn(mine.shape, dtype=mine.dtype, device="cpu", generator=generator)


@dataclass(frozen=True)
class RandomSigns(Attack):
    """The own magnitudes under random signs: a rank that votes by tossing coins."""

    def __call__(self, mine: Tensor, honest: Tensor, generator: torch.Generator) -> Tensor:
        coins = torch.rand(mine.shape, dtype=torch.float32, device="cpu", generator=generator)
        return torch.where(coins < 0.5, mine, -mine)


@dataclass(frozen=True)
class InnerProduct(Attack):
    """``-tau mu``, mu the honest mean: small enough to be let in, and the decision's inner product with mu negative.

    Xie, Koyejo, Gupta, "Fall of Empires: Breaking Byzantine-tolerant SGD by Inner Product Manipulation", 2019.
    """

    tau: float = 2.0
    omniscient = True

    def __call__(self, mine: Tensor, honest: Tensor, generator: torch.Generator) -> Tensor:
        return -self.tau * honest.mean(0)


@dataclass(frozen=True)
class ALittleIsEnough(Attack):
    """``mu + tau sigma``, the honest mean and standard deviation (of a sample) per coordinate: nearly one of them.

    Baruch, Baruch, Goldberg, "A Little Is Enough: Circumventing Defenses For Distributed Learning", 2019.
    """

    tau: float = 1.5
    omniscient = True

    def __call__(self, mine: Tensor, honest: Tensor, generator: torch.Generator) -> Tensor:
        if len(honest) == 1:  # has no deviation
            return honest[0].clone()
        return honest.mean(0) + self.tau * honest.std(0)


@dataclass(frozen=True)
class Mimic(Attack):
    """A copy of honest rank number ``target`` (0 is the lowest), whose data then count once more for each adversary.

    Nothing tells it from an honest rank; it does harm where ranks hold data of different kinds. Karimireddy, He, Jaggi,
    "Byzantine-Robust Learning on Heterogeneous Datasets via Bucketing", 2022.
    """

    target: int = 0
    omniscient = True

    def __call__(self, mine: Tensor, honest: Tensor, generator: torch.Generator) -> Tensor:
        return honest[self.target].clone()


@dataclass(frozen=True)
class ColludingSigns(Attack):
    """Against the honest majority in every coordinate, in the mean honest magnitude; against the mean where it ties."""

    omniscient = True

    def __call__(self, mine: Tensor, honest: Tensor, generator: torch.Generator) -> Tensor:
        votes = honest.sign().sum(0)
        return -torch.where(votes != 0, votes, honest.mean(0)).sign() * honest.abs().mean(0)


def flip_labels(labels: Tensor, classes: int) -> Tensor:
    """``classes - 1 - labels``: what a rank trains on whose gradients are honest and whose data are poisoned."""
    return classes - 1 - labels


# ------------------------------------------------------------------------------------------ in an experiment


def gradient(parameter: Tensor) -> Tensor | None:
    """The gradient that backward has left, or None."""
    return parameter.grad


def replace_gradient(parameter: Tensor, sent: Tensor) -> None:
    """Let ``sent`` be the gradient from here on."""
    assert parameter.grad is not None
    parameter.grad.copy_(sent)


def _checked(parameters: Iterable[Tensor]) -> list[Tensor]:
    """What :meth:`Adversary.corrupt` was given. Raises :class:`OptionError`, saying which one is unfit."""
    if isinstance(parameters, (torch.nn.Module, Tensor)) or not isinstance(parameters, Iterable):
        raise OptionError(f"parameters={type(parameters).__name__} is no list of them: pass model.parameters()")
    listed = list(parameters)
    for at, parameter in enumerate(listed):
        if not isinstance(parameter, Tensor):
            raise OptionError(f"parameter {at} is a {type(parameter).__name__}: pass model.parameters()")
        if problem := unreadable(parameter) or (
            "" if parameter.is_floating_point() else f"{parameter.dtype}, no float"
        ):
            raise OptionError(f"parameter {at} cannot be attacked, as it is {problem}")
    return listed


class Adversary:
    """Plays an attack on some ranks of an experiment. Building it is **collective**.

    Its messages go over ``comm`` and never meet the library's, which optimizes whatever gradients it finds.

    Args:
        attack: what the adversaries send.
        ranks: who they are. Nobody, as a control, is fine.
        comm: the job's ranks in their order: ``MPI.COMM_WORLD``, or what :func:`mpisign.init` was given.
        i_know_this_is_an_attack: True, so that nobody gets here by accident.
        seed: of the random attacks.
        view: what this rank is about to send for a parameter, in the parameter's shape; None for nothing. By default
            the gradient.
        place: makes this rank send a given tensor instead. By default that becomes the gradient.

    A method's memory comes after the gradient. A sign flip, a scaling, an inner product or a mimic goes through
    momentum unchanged; the others are weaker when averaged. To corrupt what leaves the memory, show it and
    invert it: for ``signum(beta)``, with ``v[p]`` the momentum so far,
    ``view=lambda p: beta * v[p] + (1 - beta) * p.grad`` and
    ``place=lambda p, sent: p.grad.copy_((sent - beta * v[p]) / (1 - beta))``.

    Raises:
        OptionError: not ``i_know_this_is_an_attack``; no attack; a rank that is not in ``comm``; an omniscient attack,
            and no honest rank to look at, or not the one to mimic.
        ConsistencyError: ranks were given different attacks, ranks or seeds.

    Example::

        adversary = Adversary(SignFlip(), ranks=range(3), comm=MPI.COMM_WORLD, i_know_this_is_an_attack=True)
        loss.backward()
        adversary.corrupt(model.parameters())
        optimizer.step()
    """

    def __init__(
        self,
        attack: Attack,
        ranks: Collection[int],
        comm: MPI.Comm,
        *,
        i_know_this_is_an_attack: bool,
        seed: int = 0,
        view: Callable[[Tensor], Tensor | None] = gradient,
        place: Callable[[Tensor, Tensor], object] = replace_gradient,
    ) -> None:
        if not isinstance(attack, Attack):
            raise OptionError(f"attack={attack!r} is not an Attack: use one of mpisign.attacks, e.g. SignFlip()")
        self.attack, self.comm, self.view, self.place = attack, comm, view, place
        use_plain_numbers(attack)
        seed = check_integer("seed", seed)
        self.ranks = sorted({check_integer("a rank", rank) for rank in ranks})
        self.honest = [rank for rank in range(comm.size) if rank not in self.ranks]
        if i_know_this_is_an_attack is not True:
            raise OptionError(
                f"rank {comm.rank}: this would corrupt what ranks {self.ranks} send ({attack!r}). In an experiment on "
                f"attacks, pass i_know_this_is_an_attack=True; anywhere else, take the Adversary out"
            )
        if not set(self.ranks) <= set(range(comm.size)):
            raise OptionError(
                f"ranks={self.ranks} cannot all be adversaries: there are only ranks 0 to {comm.size - 1}"
            )
        if attack.omniscient and not self.honest:
            raise OptionError(f"{attack!r} needs an honest rank to look at, and all {comm.size} are adversaries")
        if isinstance(attack, Mimic) and not 0 <= attack.target < len(self.honest):
            raise OptionError(f"{attack!r} is not among the {len(self.honest)} honest ranks, which count from 0")
        mine = f"{attack!r} on ranks {self.ranks} with seed {seed}"
        digests = np.zeros((comm.size, 2), np.int64)  # bytes, not objects, as those would be pickled
        comm.Allgather(np.frombuffer(hashlib.blake2b(mine.encode(), digest_size=16).digest(), np.int64), digests)
        odd, _ = minority(digests.tolist())
        if odd:
            raise ConsistencyError(
                f"rank {comm.rank}: ranks {odd} play another attack than the others; this one plays {mine}: build the "
                f"same Adversary on every rank"
            )
        self._generator = torch.Generator("cpu").manual_seed(seed * comm.size + comm.rank)
        if comm.rank in self.ranks:
            logger.warning("rank %d of %d is an adversary from here on: %r", comm.rank, comm.size, attack)

    @uncompiled
    @torch.no_grad()
    def corrupt(self, parameters: Iterable[Tensor]) -> None:
        """Make the adversaries send what the attack says; call it between backward and step.

        **Collective** if the attack is omniscient: honest ranks show what they send, and keep it as it is. A parameter
        for which a rank sends nothing counts as zeros, and an adversary sends nothing there either.

        Args:
            parameters: ``model.parameters()``, the same on all ranks.
        """
        parameters = _checked(parameters)
        playing = self.comm.rank in self.ranks
        if not playing and not self.attack.omniscient:
            return
        views = [self.view(parameter) for parameter in parameters]
        dtype = torch.float64 if any(p.dtype == torch.float64 for p in parameters) else torch.float32
        mine = torch.cat(
            [
                (torch.zeros_like(p) if view is None else view).to("cpu", dtype).flatten()
                for p, view in zip(parameters, views, strict=True)
            ]
        )
        honest = self._shown(mine) if self.attack.omniscient else mine.new_empty(0, mine.numel())
        if not playing:
            return
        pieces = self.attack(mine, honest, self._generator).split([p.numel() for p in parameters])
        for parameter, view, piece in zip(parameters, views, pieces, strict=True):
            if view is not None:
                self.place(parameter, piece.view(parameter.shape).to(parameter.device))

    def _shown(self, mine: Tensor) -> Tensor:
        """The honest ranks' vectors, on adversaries: (H, n). **Collective.**"""
        everyones = mine.new_empty(self.comm.size if self.comm.rank in self.ranks else 0, mine.numel())
        for adversary in self.ranks:
            self.comm.Gather(mine.numpy(), everyones.numpy() if self.comm.rank == adversary else None, adversary)
        return everyones[self.honest] if len(everyones) else everyones
