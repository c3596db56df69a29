"""What a step will cost on machines that one has or not, by the cost model: ``python -m mpisign predict``."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter

import torch

from mpisign import cost, places, session
from mpisign.backends import WORD, backend_for
from mpisign.bitmap.host import words_for
from mpisign.calibration import ACT, calibrate
from mpisign.cost import Links, Nodes, Rates, Step
from mpisign.errors import OptionError
from mpisign.quantities import spoken_bandwidth, spoken_number

__all__ = ["Row", "Scenario", "best", "measured", "plot", "rows", "verdict"]

WORTH = 1.1  # times faster than the best all-reduce, below which a vote is hardly worth it
TRIAL_ELEMENTS = 1 << 24  # more than caches hold, as gradients are after backward
TRIAL_BALLOTS = 8
TRIES = 4


@dataclass(frozen=True)
class Scenario:
    """A model on a cluster.

    Attributes:
        parameters: d.
        nodes: ranks by node.
        links, rates: how quick they are.
        forward, backward: seconds of an iteration without any communication; messages can hide behind ``backward``.
        planes: of a vote, up and down: 1 for signs, 2 for trits.
    """

    parameters: int
    nodes: Nodes
    links: Links
    rates: Rates = field(default_factory=Rates)
    forward: float = 0.05
    backward: float = 0.1
    planes: int = 1

    def step(self, way: str) -> Step:
        """What a step costs by an exchange or an all-reduce."""
        return cost.step(
            way,
            self.links,
            self.nodes,
            self.parameters,
            self.backward,
            up=self.planes,
            down=self.planes,
            rates=self.rates,
        )

    def iteration(self, way: str) -> float:
        """Seconds of forward, backward, and what a step leaves open with overlap."""
        return self.forward + self.backward + self.step(way).exposed


@dataclass(frozen=True)
class Row:
    """A line of the table: ``step`` is what it costs, ``seconds`` those of an iteration, ``speedups`` against each
    all-reduce, by its name."""

    way: str
    step: Step
    seconds: float
    speedups: dict[str, float]


def rows(scenario: Scenario) -> list[Row]:
    """A row for each exchange, then for each all-reduce."""
    rivals = {way: scenario.iteration(way) for way in cost.REDUCTIONS}
    found = []
    for way in (*cost.EXCHANGES, *cost.REDUCTIONS):
        seconds = scenario.iteration(way)
        speedups = {rival: its / seconds if seconds else 1.0 for rival, its in rivals.items()}
        found.append(Row(way, scenario.step(way), seconds, speedups))
    return found


def best(found: Sequence[Row]) -> Row:
    """The exchange with the shortest iteration."""
    return min((row for row in found if row.way in cost.EXCHANGES), key=lambda row: row.seconds)


def verdict(scenario: Scenario, found: Sequence[Row]) -> str:
    """Whether to use the library here, in a sentence."""
    ours = best(found)
    rival, gain = min(ours.speedups.items(), key=lambda pair: pair[1])
    if scenario.nodes.ranks == 1:
        return "Do not use it here: one rank has nobody to vote with."
    if gain <= 1.0:
        return (
            f"Do not use it here: an iteration takes {1e3 * ours.seconds:.4g} ms by {ours.way}, and "
            f"{1e3 * ours.seconds * gain:.4g} ms by {rival}."
        )
    if gain < WORTH:
        return (
            f"It is hardly worth it here: {ours.way} makes an iteration {100 * (gain - 1):.1f} % faster than {rival}, "
            f"and a vote is not the mean of the gradients."
        )
    against = ", ".join(f"{speedup:.2f} times as fast as {name}" for name, speedup in ours.speedups.items())
    return f"Use exchange={ours.way!r}: an iteration is {against}."


# ------------------------------------------------------------------------------------------------- measured


def measured() -> tuple[Nodes, Links, Rates]:
    """Nodes, links and rates of the job that has been joined, the same on all ranks. **Collective.**"""
    here = session.current()
    nodes, links = here.group.nodes, calibrate(here)
    with here.telling(ACT):
        device, sizes = places.device(), [TRIAL_ELEMENTS]
        words = [torch.zeros(words_for(TRIAL_ELEMENTS), dtype=WORD, device=device) for _ in range(TRIAL_BALLOTS + 1)]
        gradient = torch.linspace(-1.0, 1.0, TRIAL_ELEMENTS, dtype=torch.float32, device=device)
        average, parameter = torch.zeros_like(gradient), torch.nn.Parameter(torch.zeros_like(gradient))
        parameter.grad = gradient
        sgd = torch.optim.SGD([parameter], lr=1e-3, momentum=0.9)
        backend = backend_for(device)
        bitmaps = backend.bitmaps(sizes, words[:1], [None], [0])
    ballots, decision = words[:-1], words[-1]
    trials: list[tuple[float, Callable[[], object]]] = [
        (
            TRIAL_ELEMENTS,
            lambda: bitmaps.pack_average([gradient], [average], (0.9, 0.9), unscale=1.0, zeros="coin", key=0),
        ),
        (TRIAL_ELEMENTS, lambda: bitmaps.apply([parameter], [1e-3], [0.0], [None])),
        (TRIAL_BALLOTS * TRIAL_ELEMENTS / 8, lambda: backend.majority(ballots, decision)),
        (4.0 * TRIAL_ELEMENTS, lambda: average.add_(gradient)),
        (TRIAL_ELEMENTS, sgd.step),
    ]
    mine = []
    for amount, run in trials:
        here.meet(ACT)  # all ranks of a node at once, as in a step: they share its memory
        with here.telling(ACT):
            _seconds(run, device)  # first touches
            # The mean, as ranks that outnumber cores take turns on them.
            mine.append(amount / statistics.mean(_seconds(run, device) for _ in range(TRIES)))
    slowest = [min(rates) for rates in zip(*here.gather_values(mine, [float], ACT), strict=True)]
    return nodes, links, Rates(*slowest)  # in the order of the trials


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    began = perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter() - began


# ---------------------------------------------------------------------------------------------------- drawn


def plot(scenario: Scenario, path: Path) -> None:
    """Draw the speed-up of an iteration over bandwidth, and over nodes from 1 to 10,000.

    Raises:
        OptionError: matplotlib is not installed, or cannot write such a file.
    """
    try:
        import matplotlib as mpl

        mpl.use("agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise OptionError("drawing needs matplotlib; in the checkout: pip install '.[scripts]'") from error
    widths = [1e8 / 8 * 10 ** (place / 10) for place in range(37)]  # 100 Mbit/s to 400 Gbit/s
    numbers = sorted({round(10 ** (place / 8)) for place in range(33)})
    per_node = scenario.nodes.fullest
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    over_bandwidth = [replace(scenario, links=replace(scenario.links, network_bandwidth=width)) for width in widths]
    over_nodes = [replace(scenario, nodes=Nodes.even(number, per_node)) for number in numbers]
    for axis, scenarios, ticks in (
        (axes[0], over_bandwidth, [8 * width / 1e9 for width in widths]),
        (axes[1], over_nodes, numbers),
    ):
        tables = [rows(each) for each in scenarios]
        for rival in cost.REDUCTIONS:
            axis.plot(ticks, [best(table).speedups[rival] for table in tables], label=f"best exchange / {rival}")
        for place, way in enumerate(cost.EXCHANGES):
            line = [table[place].speedups["ring bf16"] for table in tables]
            axis.plot(ticks, line, linestyle=":", linewidth=1, label=f"{way} / ring bf16")
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set(xscale="log", yscale="log")
        axis.set_ylim(bottom=0.1)  # far below 1 it does not matter how far
        axis.yaxis.set_major_formatter("{x:g}")
        axis.grid(which="both", alpha=0.3)
    of_each = f"{per_node} rank{'s' if per_node > 1 else ''} each"
    axes[0].set(
        xlabel="bandwidth of a node's card, Gbit/s",
        ylabel="times as fast an iteration",
        title=f"{scenario.nodes.number} nodes of {of_each}",
    )
    axes[1].set(xlabel="nodes", title=f"{spoken_bandwidth(scenario.links.network_bandwidth)}, {of_each}")
    axes[0].legend(fontsize="small")
    figure.suptitle(
        f"{spoken_number(scenario.parameters)} parameters, forward {1e3 * scenario.forward:.4g} ms, backward "
        f"{1e3 * scenario.backward:.4g} ms, all with overlap"
    )
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise OptionError(f"--plot {path} cannot be written: {error}; write --plot prediction.png or .svg") from error
    finally:
        pyplot.close(figure)
