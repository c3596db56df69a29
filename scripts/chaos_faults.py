"""What scripts/chaos does to a training, and when: all of it drawn from a seed."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

__all__ = ["DEADLY", "KINDS", "Fault", "deal"]

KINDS = {
    "kill": "SIGKILL",
    "segfault": "a read from address 0, wherever the rank is",
    "exception": "an uncaught exception, before a step, in its backward pass or after it",
    "two": "SIGKILL to two ranks at once",
    "recovery": "SIGKILL to one rank, and to another about when the others recover",
    "save": "a death while a checkpoint is saved",
    "stretch": "SIGKILL to one rank while another calls no MPI for 2 to 4 s (or 1.2 to 4 times what counts as death)",
    "spare": "SIGKILL to one rank, and to the spare that steps in for it, or is about to",
    "stop": "SIGSTOP, and SIGCONT 0.1 to 2 s later",
    "slow": "20 to 60 steps that take one rank 5 to 20 ms longer",
    "nan": "1 to 3 steps in which all gradients of one rank are NaN",
    "silence": "SIGSTOP until the others have gone on, and then SIGCONT",
    "node": "SIGKILL to all ranks of a host",
    "cut": "the link of a host is cut until the others have gone on, and then mended",
    "flicker": "the link of a host is cut for a tenth to a quarter of the silence that counts as death",
}
DEADLY = ("kill", "segfault", "exception", "two", "recovery", "save", "stretch", "spare", "silence", "node", "cut")
"""Those of which ranks die, or are counted out."""
SILENT = ("silence", "cut")
"""Those that are found by silence alone: with ``detect_links=``."""
OF_HOSTS = ("node", "cut", "flicker")
"""Those that take hosts."""

PLACES = ("before", "backward", "after")
SECONDS = {"stretch": (2.0, 4.0), "stop": (0.1, 2.0), "slow": (0.005, 0.02)}
OF_SILENCE = {"stretch": (1.2, 4.0), "stop": (0.02, 0.4), "flicker": (0.1, 0.25)}  # with ``detect_links=``, times that
STEPS = {"slow": (20, 60), "nan": (1, 3)}
RANK_0 = 0.2  # of the faults strike the lowest rank, besides those that strike it by chance


@dataclass(frozen=True)
class Fault:
    """One of ``KINDS``.

    Attributes:
        gap: seconds from when all are back from the last one.
        picks: by how far into the list of those that live, in [0, 1), it strikes its one or two ranks.
        delay: how far into what it interrupts, in [0, 1).
        seconds, steps: how long it lasts.
        place: where in a step an exception is raised, one of ``PLACES``.
    """

    kind: str
    gap: float
    picks: tuple[float, float]
    delay: float
    seconds: float
    steps: int
    place: str

    def strikes(self, living: Sequence[int]) -> tuple[int, int]:
        """Two different ranks of at least two: the victim first."""
        first = living[int(self.picks[0] * len(living))]
        others = [rank for rank in living if rank != first]
        return first, others[int(self.picks[1] * len(others))]


def deal(dice: random.Random, kinds: Sequence[str], gap: float, silence: float | None = None) -> Iterator[Fault]:
    """Faults without end: each kind once, those that nobody dies of twice, in an order by chance, and then again.

    Args:
        gap: the mean of the seconds between them, which are those of a Poisson process.
        silence: seconds of silence that count as death.
    """
    seconds = dict(SECONDS)
    if silence is not None:
        seconds |= {kind: (silence * low, silence * high) for kind, (low, high) in OF_SILENCE.items()}
    deck = [*kinds, *(kind for kind in kinds if kind not in DEADLY)]
    while True:
        for kind in dice.sample(deck, len(deck)):
            first = 0.0 if dice.random() < RANK_0 else dice.random()
            yield Fault(
                kind,
                dice.expovariate(1.0 / gap),
                (first, dice.random()),
                dice.random(),
                dice.uniform(*seconds.get(kind, (0.0, 0.0))),
                dice.randint(*STEPS.get(kind, (0, 0))),
                dice.choice(PLACES),
            )
