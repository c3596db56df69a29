"""``python -m mpisign predict``, run as a user runs it, and the numbers in its table worked out by hand."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from mpirun import environment, mpirun

from mpisign import __main__, cost, prediction
from mpisign.cost import Links, Nodes, Rates
from mpisign.prediction import Scenario

SLOW = Scenario(8_000_000, Nodes.even(2, 4), Links(network_bandwidth=12.5e6), Rates(1e12, 1e12, 1e15, 1e15, 1e12, 0.0))


def predict(*options: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mpisign", "predict", *options]
    return subprocess.run(command, env=environment(env), capture_output=True, text=True, timeout=240, check=False)


def table(text: str) -> dict[str, list[float]]:
    """The rows of the printed table, and the name of the best one under "best"."""
    lines = text.split("\n\n")[1].splitlines()
    assert lines[0].split("  ")[-1].strip() == "x ring bf16"
    return {
        line.split("  ")[0]: [float(cell) for cell in line[13:].replace("<- best", "").split()] for line in lines[1:]
    }


def test_iterations_by_hand():
    """100 Mbit/s, 1 MB a plane, 50 + 100 ms: 0.25 MB... of 8 million parameters, 2 nodes of 4."""
    found = {row.way: row for row in prediction.rows(SLOW)}
    # Out of a card: hierarchical (3 + 1)/2 planes of 1 MB, two-phase 4 * 4/8 * 2, all-gather 4 * 4, fp32 7/4 * 32.
    for way, megabytes in (
        ("hierarchical", 2),
        ("two_phase", 4),
        ("allgather", 16),
        ("ring fp32", 56),
        ("ring bf16", 28),
    ):
        row = found[way]
        assert row.step.card_bytes == pytest.approx(1e6 * megabytes)
        assert row.step.total == pytest.approx(megabytes / 12.5, rel=1e-3)
        assert row.seconds == pytest.approx(0.15 + row.step.exposed)
    # 8 messages of 122 KiB (128 KiB at most) in 100 ms: ready at 12.5 ms, then 160 ms of sending; 72.5 ms too long.
    assert found["hierarchical"].step.exposed == pytest.approx(0.0125 + 0.16 - 0.1, rel=1e-3)
    assert prediction.best(list(found.values())) is found["hierarchical"]
    assert found["hierarchical"].speedups["ring bf16"] == pytest.approx(found["ring bf16"].seconds / 0.2225, rel=1e-3)


def test_the_verdict():
    def said(scenario: Scenario) -> str:
        return prediction.verdict(scenario, prediction.rows(scenario))

    assert said(SLOW).startswith("Use exchange='hierarchical': an iteration is ")
    fast = replace(SLOW, links=Links(network_bandwidth=1e12), rates=Rates(1e9, 1e9))
    assert said(fast).startswith("Do not use it here: an iteration takes ")
    assert "by ring bf16" in said(fast)
    slower_model = replace(SLOW, forward=10.0, backward=20.0)  # which hides everything
    assert said(replace(slower_model, links=Links(network_bandwidth=1.25e9))).startswith(("It is hardly", "Do not use"))
    middle = replace(SLOW, forward=5.0, backward=0.1)
    assert "% faster than ring bf16" in said(replace(middle, links=Links(network_bandwidth=125e6)))
    assert said(replace(SLOW, nodes=Nodes((1,)))) == "Do not use it here: one rank has nobody to vote with."


def test_one_table_with_the_best_choice(capsys: pytest.CaptureFixture[str], monkeypatch):
    def said(*options: str) -> str:
        monkeypatch.setattr(sys, "argv", ["mpisign", "predict", *options])
        assert __main__.main() == 0
        return capsys.readouterr().out

    options = ["--parameters", "25.6M", "--nodes", "16", "--ranks-per-node", "8", "--bandwidth", "10Gbit"]
    seen = said(*options, "--latency", "20us", "--backward", "100ms")
    rows = table(seen)
    assert list(rows) == [*cost.EXCHANGES, *cost.REDUCTIONS]
    assert [rows[way][2] for way in rows] == [3072.0, 48.0, 15.0, 203.2, 101.6]
    assert "\nhierarchical" in seen
    (best,) = [line for line in seen.splitlines() if line.endswith("<- best")]
    assert best.startswith("hierarchical")
    assert "25.6M parameters, 16 node(s) of 8 rank(s)" in seen
    assert "forward 50 ms, backward 100 ms" in seen
    assert "Use exchange='hierarchical'" in seen
    assert said() == seen, "these are the defaults"


@pytest.mark.long
def test_where_it_does_not_pay_it_says_so():
    seen = predict("--bandwidth", "400Gbit", "--latency", "1us", "--nodes", "2", "--ranks-per-node", "1")
    assert seen.returncode == 0
    assert "Do not use it here: " in seen.stdout or "hardly worth it" in seen.stdout
    assert "one rank has nobody to vote with" in predict("--nodes", "1", "--ranks-per-node", "1").stdout


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        (["--bandwidth", "10"], "write 10Gbit"),
        (["--parameters", "many"], "write 25.6M"),
        (["--latency", "20"], "write 20us"),
        (["--nodes", "0"], "number of at least 1"),
        (["--planes", "3"], "choose from"),
        (["--calibrate", "--nodes", "4"], "--calibrate measures what --nodes says"),
        (["--calibrate", "--pack-rate", "1G"], "--calibrate measures what --pack-rate says"),
    ],
)
def test_errors_say_what_to_type(options: list[str], advice: str, capsys: pytest.CaptureFixture[str], monkeypatch):
    monkeypatch.setattr(sys, "argv", ["mpisign", "predict", *options])
    with pytest.raises(SystemExit, match="2"):
        __main__.main()
    assert advice in capsys.readouterr().err


def test_help_has_units_and_examples(capsys: pytest.CaptureFixture[str], monkeypatch):
    monkeypatch.setattr(sys, "argv", ["mpisign", "predict", "--help"])
    with pytest.raises(SystemExit, match="0"):
        __main__.main()
    text = capsys.readouterr().out
    assert "(default: 10Gbit)" in text
    assert "mpirun -n 4 python -m mpisign predict --calibrate" in text.partition("examples:")[2]


@pytest.mark.long
def test_it_draws(tmp_path: Path):
    pytest.importorskip("matplotlib")
    seen = predict("--plot", str(path := tmp_path / "prediction.svg"))
    assert seen.returncode == 0, seen.stderr
    assert f"wrote {path}" in seen.stdout
    drawn = path.read_text()
    assert drawn.startswith("<?xml")
    assert drawn.count('id="line2d_') > 10, "curves, not empty axes"
    seen = predict("--plot", str(tmp_path / "prediction.doc"))
    assert seen.returncode == 2
    assert "write --plot prediction.png" in seen.stderr


@pytest.mark.long
@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="for Linux")
def test_from_a_calibration_on_two_nodes():
    result = mpirun(2, "-m", "mpisign", "predict", "--calibrate", "--backward", "200ms", env={"MPISIGN_NODE_OF": "0,1"})
    assert result.returncode == 0, result.text
    assert result.text.count("25.6M parameters, 2 node(s) of 1 rank(s)") == 1
    assert "across nodes: " in result.text
    assert "inside a node" not in result.text
    rows = table(result.text)
    assert rows["two_phase"][2] == rows["hierarchical"][2] == 3.2
    assert min(row[0] for row in rows.values()) > 0
