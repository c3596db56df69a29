"""Draw some steps of a timeline: python docs/draw_timeline.py trace.json picture.png [FIRST_STEP [LAST_STEP]]."""

import json
import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt

COLOURS = {"handshake": "#a6a6a6", "phase 1": "#1f77b4", "phase 2": "#17becf", "header": "#c5b0d5", "send": "#ffbb78"}
COLOURS |= {"pack": "#2ca02c", "decide": "#d62728", "unpack": "#9467bd", "count of ties": "#e377c2"}


def draw(events: list[dict], path: Path, first: int, last: int) -> None:
    """Draw the spans of the steps ``first`` to ``last``, a row for each rank and phase."""
    rows = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    mine = [e for e in events if e["ph"] == "X" and first <= e["args"].get("step", -1) <= last]
    spans = [e for e in mine if e["name"] in COLOURS]
    used = sorted({(e["pid"], e["tid"]) for e in spans})
    begin = min(e["ts"] for e in spans)
    figure, axes = plt.subplots(figsize=(11, 0.32 * len(used) + 1), layout="constrained")
    for e in spans:
        place, colour = used.index((e["pid"], e["tid"])), COLOURS[e["name"]]
        axes.barh(place, e["dur"] / 1000, 0.8, (e["ts"] - begin) / 1000, color=colour, edgecolor="white", linewidth=0.3)
    for place in range(1, len(used)):
        if used[place][0] != used[place - 1][0]:
            axes.axhline(place - 0.5, color="black", linewidth=0.8)
    axes.set_yticks(range(len(used)), [f"rank {rank}, {rows[rank, row]}" for rank, row in used])
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds")
    names = [name for name in COLOURS if any(e["name"] == name for e in spans)]
    handles = [mpl.patches.Patch(color=COLOURS[name]) for name in names]
    figure.legend(handles, names, loc="outside upper center", ncols=len(names), frameon=False, fontsize="small")
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    trace, picture, *steps = sys.argv[1:]
    numbers = [int(step) for step in steps] or [0]
    draw(json.loads(Path(trace).read_text())["traceEvents"], Path(picture), numbers[0], numbers[-1])
