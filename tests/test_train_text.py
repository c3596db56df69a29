"""The transformer on Python's own library: the real script on real ranks, with a model of a few thousand parameters."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from mpirun import Result, mpirun
from resumable import assert_equal

SCRIPT = Path(__file__).parents[1] / "scripts" / "train_text.py"
WIDTH, CONTEXT = 32, 16
SMALL = ("--layers", "1", "--width", str(WIDTH), "--heads", "2", "--context", str(CONTEXT), "--megabytes", "0.3")
SMALL += ("--epochs", "3", "--epoch-windows", "80", "--eval-windows", "33", "--dgc-ratio", "0.05", "--quiet")
STEPS = 3 * 80 // (2 * 8)
PARAMETERS = (256 + CONTEXT) * WIDTH + 12 * WIDTH**2 + 5 * WIDTH + 3 * 2 * WIDTH


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    return importlib.import_module("train_text")


def numbers(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("*-text.json")
    data: dict[str, Any] = json.loads(path.read_text())
    return data


def final_state(folder: Path) -> dict[str, Any]:
    """The model of the newest checkpoint."""
    newest = max(folder.glob("step-*"))
    state: dict[str, Any] = torch.load(newest / "shared.pt", weights_only=True)["model"]
    return state


def train(folder: Path, *options: str) -> Result:
    done = mpirun(2, SCRIPT, *SMALL, "--checkpoint-dir", folder / "saved", "--out", folder, *options)
    assert done.returncode == 0, done.text
    return done


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Where all trainings from their beginning to their end are, and what they printed."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, train(folder).text


@pytest.mark.long
def test_three_trainings_and_their_report(whole: tuple[Path, str]) -> None:
    folder, printed = whole
    data = numbers(folder)
    vote, adamw, dgc = data["runs"]
    assert [run["contender"] for run in data["runs"]] == ["vote", "adamw", "dgc"]
    assert [run["label"] for run in data["runs"]] == ["lion, vote", "AdamW, mean in fp32", "DGC, 5 %"]
    assert vote["losses"][0] == adamw["losses"][0] == dgc["losses"][0], "the same weights and batches"
    assert len(set(data["text_bytes"].values())) == 2
    for run in data["runs"]:
        assert run["parameters"] == PARAMETERS
        assert run["steps"] == [5, 10, 15]
        assert len(run["losses"]) == len(run["seconds"]) == len(run["bytes_sent"]) == STEPS
        assert run["losses"][0] > 5, "ln 256 is 5.5"
        assert run["bits"][-1] < run["bits"][0] < 8
    # 2 (M - 1) / M = 1. Messages are whole words, and a small model's headers count.
    assert adamw["bytes_sent"] == [pytest.approx(4 * PARAMETERS, rel=0.01)] * STEPS
    assert vote["bytes_sent"] == [pytest.approx(PARAMETERS / 8, rel=0.1)] * STEPS
    assert dgc["bytes_sent"][:5] > dgc["bytes_sent"][5:10] > dgc["bytes_sent"][10:], "it warms up by epochs"
    assert dgc["bytes_sent"][0] < adamw["bytes_sent"][0]

    (text,) = folder.glob("*-text.md")
    assert f"AdamW, mean in fp32 | {adamw['bits'][-1]:.3f} | {4 * PARAMETERS / 1e3:.0f} |" in text.read_text()
    assert re.search(r"AdamW, mean in fp32 sends \d+ times the bytes of lion, vote", text.read_text())
    (picture,) = folder.glob("*-text.png")
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert "│ lion, vote " in printed


@pytest.mark.long
def test_a_training_that_is_cut_goes_on_to_the_same_bits(whole: tuple[Path, str], tmp_path: Path) -> None:
    train(tmp_path, "--only", "vote", "dgc", "--max-steps", "8")  # amid the second epoch
    train(tmp_path, "--only", "vote", "dgc")
    at_once = {run["contender"]: run for run in numbers(whole[0])["runs"]}
    cut = numbers(tmp_path)["runs"]
    assert [run["contender"] for run in cut] == ["vote", "dgc"]
    for run_cut in cut:
        run_whole = dict(at_once[run_cut["contender"]])
        assert len(run_cut.pop("seconds")) == len(run_whole.pop("seconds")) == STEPS
        assert run_cut == run_whole
        name = f"seed-0-{run_whole['contender']}"
        assert_equal(*(final_state(folder / "saved" / name) for folder in (whole[0], tmp_path)))


def test_no_file_is_in_both_texts(script: ModuleType, world: None, tmp_path: Path, parse: Callable[..., Any]) -> None:
    for number in range(40):
        folder = tmp_path / ("site-packages" if number >= 30 else "package")
        folder.mkdir(exist_ok=True)
        (folder / f"module{number}.py").write_text(f"{number:02d}" * 500)
    text = script.read_text(parse("--data", str(tmp_path), "--megabytes", "0.0195"))
    found = [{data[at : at + 2] for at in range(0, len(data), 1000)} for data in text.values()]
    assert [len(data) for data in text.values()] == [18000, 2000]
    assert not found[0] & found[1]
    assert max(map(int, found[0] | found[1])) < 30, "nothing of site-packages"
    assert text == script.read_text(parse("--data", str(tmp_path), "--megabytes", "0.0195"))


def test_text_that_is_too_short_is_said(
    script: ModuleType, parse: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "one.py").write_text("pass\n")
    with pytest.raises(SystemExit, match="2"):
        script.read_text(parse("--data", str(tmp_path)))
    assert "5 bytes of training text in the *.py files of" in capsys.readouterr().err


def test_the_model_sees_only_what_was_before(script: ModuleType) -> None:
    model = script.Transformer(layers=2, width=16, heads=2, context=8)
    text = torch.randint(256, (3, 8), generator=torch.Generator().manual_seed(0))
    other = text.clone()
    other[:, 5:] = 255 - other[:, 5:]
    assert torch.equal(model(text)[:, :5], model(other)[:, :5])
    assert not torch.isclose(model(text)[:, 5:], model(other)[:, 5:]).all(dim=2).any()


def test_what_was_spent_until_a_loss(script: ModuleType) -> None:
    result = script.Result(
        contender="vote", label="", seed=0, parameters=1, exchange="", losses=[], seconds=[1.0, 2.0, 3.0, 4.0],
        bytes_sent=[10, 10, 20, 20], steps=[2, 4], bits=[5.0, 3.0],
    )  # fmt: skip
    assert result.curve("seconds") == [3.0, 10.0]
    assert [result.until(bits, "bytes_sent") for bits in (5.5, 5.0, 4.0, 3.0)] == [20.0, 20.0, 40.0, 60.0]
    assert result.until(4.0, "steps") == 3.0


@pytest.fixture
def parse(script: ModuleType, world: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """The script's reading of its command line."""

    def parse(*options: str) -> Any:
        monkeypatch.setattr(sys, "argv", ["train_text.py", "--out", str(tmp_path), *options])
        return script.parse_arguments()

    return parse


def test_help(parse: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        parse("--help")
    text = capsys.readouterr().out
    assert "  mpirun -n 4 python scripts/train_text.py --seeds 0 1 --report\n" in text
    assert "Learning rates are the best of these" in text


def test_quick_stands_for_other_defaults(parse: Callable[..., Any]) -> None:
    quick, usual = parse("--quick", "--layers", "2"), parse()
    assert (quick.layers, quick.width) == (2, 64)
    assert (usual.layers, usual.width) == (3, 128)
    assert quick.epochs * quick.epoch_windows < usual.epochs * usual.epoch_windows / 5


@pytest.mark.parametrize(
    "options, said",
    [
        (("--only", "sgd"), "invalid choice: 'sgd'"),
        (("--width", "30"), "--width 30 is no multiple of --heads 4"),
        (("--lr-dgc", "0"), "'0' is not a positive number"),
        (("--out", f"{SCRIPT}/out"), "name a file in a folder that can be made"),
    ],
)
def test_bad_input_is_answered_with_what_to_type(
    parse: Callable[..., Any], options: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse(*options)
    assert said in capsys.readouterr().err
