"""The digits job runs as a user runs it: the real script on real ranks, on its real data."""

from __future__ import annotations

import importlib
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mpirun import environment, mpirun

SCRIPT = Path(__file__).parents[1] / "scripts" / "train_digits.py"
SMALL = ("--hidden", "128", "--epochs", "3", "--lr", "0.003")


def run_alone(*options: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the script without mpirun."""
    command = [sys.executable, str(SCRIPT), *map(str, options)]
    return subprocess.run(command, env=environment(), cwd=cwd, capture_output=True, text=True, timeout=120, check=False)


def cells(text: str, label: str) -> list[str]:
    """The cells of the table's row that starts with ``label``."""
    (row,) = re.findall(rf"│ {re.escape(label)} +│(.*)│", text)
    return [cell.strip() for cell in row.split("│")]


def assert_png(path: Path) -> None:
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(data) > 10_000, "a figure with two curves and text is larger than that"


@pytest.mark.long
def test_two_ranks(tmp_path: Path) -> None:
    figure, numbers = tmp_path / "new" / "loss.png", tmp_path / "new" / "numbers.json"
    done = mpirun(2, SCRIPT, *SMALL, "--seeds", "3", "4", "--out", figure, "--json", numbers)
    assert done.returncode == 0, done.text

    data = json.loads(numbers.read_text())
    parameters = 64 * 128 + 128 + 128 * 128 + 128 + 128 * 10 + 10
    assert data["ranks"] == 2
    assert data["options"]["seeds"] == [3, 4]
    assert [(run["seed"], run["method"]) for run in data["runs"]] == [
        (3, "signum"), (3, "mean"), (4, "signum"), (4, "mean")
    ]  # fmt: skip
    for run in data["runs"]:
        width = 32 if run["method"] == "mean" else 1
        assert run["parameters"] == parameters
        headers = run["bytes_sent"] - parameters * width / 8  # 2 (M - 1) / M = 1
        assert 0 < headers < 100
        assert run["accuracy"] > 0.85
        assert run["seconds_per_step"] > 0
        assert len(run["losses"]) == 3 * 23, "719 images a rank, 32 a step"
        assert run["losses"][0] > 2
        assert min(run["losses"]) < 0.5
    assert data["bytes_ratio"] == pytest.approx(32, rel=0.03)
    first = [run["losses"][0] for run in data["runs"]]
    assert first[0] == first[1] != first[2] == first[3], "a seed is one set of weights and batches, for both trainings"

    vote = cells(done.text, "one-bit vote (signum)")
    mean = cells(done.text, "full-precision mean")
    for row, first in ((vote, 0), (mean, 1)):
        accuracy, sent, seconds = row
        average = sum(100 * run["accuracy"] for run in data["runs"][first::2]) / 2
        assert re.fullmatch(rf"{average:.2f} ± \d+\.\d\d %", accuracy)
        assert sent == f"{data['runs'][first]['bytes_sent']:,}"
        assert re.fullmatch(r"\d\.\d{4} ± \d\.\d{4}", seconds)
    assert cells(done.text, "mean / vote")[1] == f"{data['bytes_ratio']:.1f} x"
    assert "seed-3-signum: 100%" in done.text
    assert "\x1b[1m" not in done.text, "no styles in what may be a file"
    assert_png(figure)


@pytest.mark.long
def test_every_option_reaches_the_training(tmp_path: Path) -> None:
    done = mpirun(
        3, SCRIPT, *SMALL, "--method", "lion:beta1=0.95", "--zeros", "abstain", "--ties", "zero",
        "--exchange", "two_phase", "--batch-size", "100", "--lr-mean", "0.2", "--quiet",
        "--out", tmp_path / "a.png", "--json", tmp_path / "a.json",
    )  # fmt: skip
    assert done.returncode == 0, done.text
    data = json.loads((tmp_path / "a.json").read_text())
    assert data["options"]["method"].startswith("lion (LionMomentum(beta1=0.95, beta2=0.99)")
    vote, mean = data["runs"]
    assert vote["method"] == "lion"
    assert vote["exchange"] == mean["exchange"] == "two_phase"
    assert len(vote["losses"]) == 3 * 5, "479 images a rank, 100 a step"
    assert mean["bytes_sent"] / vote["bytes_sent"] == pytest.approx(16, rel=0.02), "abstaining costs a second bit"
    assert cells(done.text, "one-bit vote (lion)")
    assert "step/s" not in done.text, "--quiet shows no bar"


@pytest.mark.long
def test_without_mpirun_one_rank_votes_alone(tmp_path: Path) -> None:
    done = run_alone(*SMALL, "--json", "out/numbers.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    data = json.loads((tmp_path / "out" / "numbers.json").read_text())
    assert data["ranks"] == 1
    assert data["bytes_ratio"] is None
    assert [run["bytes_sent"] for run in data["runs"]] == [0, 0]
    assert all(run["accuracy"] > 0.85 for run in data["runs"])
    assert cells(done.stdout, "mean / vote")[1] == "-"
    assert "loss curves: out/digits.png" in done.stdout
    assert_png(tmp_path / "out" / "digits.png")


@pytest.mark.long
def test_on_other_ranks_it_goes_on_in_the_same_epoch(tmp_path: Path) -> None:
    places = ("--checkpoint-dir", tmp_path / "saved", "--log-dir", tmp_path / "log", "--out", tmp_path / "a.png")
    for ranks, options in ((2, ("--max-steps", "30")), (3, ("--json", tmp_path / "a.json"))):
        done = mpirun(ranks, SCRIPT, *SMALL, "--quiet", "--log-every", "1", *places, *options)
        assert done.returncode == 0, done.text
    for run in json.loads((tmp_path / "a.json").read_text())["runs"]:
        # It had done 30 steps of 23 an epoch, which are 19.57 of 15: it goes on from 19.
        assert run["epochs"] == [step / 23 for step in range(30)] + [step / 15 for step in range(19, 45)]
        assert run["accuracy"] > 0.85
    rows = (tmp_path / "log" / "seed-0-signum" / "train.csv").read_text().splitlines()[1:]
    for row in rows:
        _, epoch, _, rate, *_ = map(float, row.split(","))
        assert rate == pytest.approx(0.003 * (1 + math.cos(math.pi * epoch / 3)) / 2, abs=1e-8)


@pytest.mark.long
def test_the_baseline_has_checkpoints_of_its_own_beside_a_mean(tmp_path: Path) -> None:
    places = ("--checkpoint-dir", tmp_path, "--out", tmp_path / "a.png", "--json", tmp_path / "a.json")
    done = run_alone(*SMALL, "--method", "mean", *places)
    assert done.returncode == 0, done.stderr
    asked, baseline = json.loads((tmp_path / "a.json").read_text())["runs"]
    assert asked["losses"][1:] != baseline["losses"][1:], "they have different learning rates"


@pytest.mark.long
def test_bad_input_on_several_ranks_is_said_once_and_ends_the_job() -> None:
    done = mpirun(3, SCRIPT, "--epochs", "none")
    assert done.returncode == 2
    assert done.text.count("'none' is not a whole number") == 1
    assert "Traceback" not in done.text


@pytest.mark.long
def test_what_is_wrong_on_one_rank_alone_is_said() -> None:
    """Such as a folder that cannot be made on one node."""
    usual = (SCRIPT, *SMALL, "--quiet")
    done = mpirun(1, *usual, ":", "-n", "1", sys.executable, *usual, "--log-dir", SCRIPT / "log")
    assert done.returncode == 2
    assert "train_digits.py: rank 1 on " in done.text
    assert f"cannot write {SCRIPT}/log: Not a directory; name a file in a folder that can be made\n" in done.text
    assert "usage:" not in done.text


@pytest.fixture
def parse(world: None, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """The script's reading of its command line."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    train_digits = importlib.import_module("train_digits")

    def parse(*options: str) -> Any:
        monkeypatch.setattr(sys, "argv", ["train_digits.py", *options])
        return train_digits.parse_arguments()

    return parse


def test_what_draws_the_picture_is_looked_for_at_the_start(
    parse: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match="2"):
        parse("--out", str(tmp_path / "a.png"))
    assert "a picture needs a package that is not there: pip install matplotlib" in capsys.readouterr().err


def test_numbers_are_written_before_the_picture_is_drawn(
    parse: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = parse("--out", str(tmp_path / "a.png"), "--json", str(tmp_path / "a.json"))
    train_digits = importlib.import_module("train_digits")
    result = train_digits.Result(0, "mean", 1, "", 0.5, 1, 0.1, [0.0], [1.0])
    args.out.mkdir()
    with pytest.raises(IsADirectoryError):
        train_digits.show(args, [result], [result])
    assert len(json.loads((tmp_path / "a.json").read_text())["runs"]) == 2


def test_help(parse: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        parse("--help")
    text = capsys.readouterr().out
    assert "  mpirun -n 4 python scripts/train_digits.py --seeds 0 1 2 --json out/digits.json\n" in text
    assert "(default: signum)" in " ".join(text.split())


@pytest.mark.parametrize(
    "options, said",
    [
        (("--epochs", "0"), "'0' is not a whole number from 1 up, such as 20"),
        (("--batch-size", "-4"), "'-4' is not a whole number from 1 up"),
        (("--hidden", "many"), "'many' is not a whole number"),
        (("--lr", "nan"), "'nan' is not a positive number, such as 0.001"),
        (("--lr", "fast"), "'fast' is not a positive number"),
        (("--lr-mean", "inf"), "'inf' is not a positive number"),
        (("--seeds", "0", "x"), "'x' is not a whole number from 0 up"),
        (("--seeds", str(2**32)), "'4294967296' is not a whole number from 0 up"),
        (("--method", "adam"), "signsgd"),
        (("--out", "digits"), "must end in .png, such as --out out/digits.png"),
        (("--out", f"{SCRIPT}/a.png"), "name a file in a folder that can be made"),
        (("--json", f"{SCRIPT}/a.json"), "name a file in a folder that can be made"),
    ],
)
def test_bad_input_is_answered_with_what_to_type(
    parse: Callable[..., Any],
    options: tuple[str, ...],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        parse(*options)
    assert said in capsys.readouterr().err
