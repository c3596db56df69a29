"""The experiments run as a user runs them, on real ranks, and find what they are there to show."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from mpirun import mpirun

import mpisign
from mpisign.policy import Policy, StepContext

SCRIPTS = Path(__file__).parents[1] / "scripts"
NAMES = ("experiment_byzantine", "experiment_heterogeneous")


@pytest.fixture
def load(world: None, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """A script as a module, in a job of this process alone."""
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module


def report(folder: Path, name: str) -> tuple[str, dict[str, Any]]:
    """Text and numbers of the one report in ``folder``, whose figures are there."""
    stem = f"{date.today():%Y-%m-%d}-{name}"
    text = (folder / f"{stem}.md").read_text()
    for line in text.splitlines():
        if line.startswith("!["):
            assert (folder / line.split("(")[1].rstrip(")")).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    return text, json.loads((folder / f"{stem}.json").read_text())


# ------------------------------------------------------------------------------------------- end to end


@pytest.mark.long
def test_hostile_ranks(tmp_path: Path) -> None:
    """One of three sends -100 times what it should: the vote does not care, and the mean is lost."""
    done = mpirun(
        3, SCRIPTS / "experiment_byzantine.py", "--methods", "signum", "mean", "krum", "monna",
        "scaled_vote_every_8",
        "--attacks", "none", "scaled", "inner_product", "nan", "label_flip", "--seeds", "5", "--steps", "20",
        "--out", tmp_path / "new",
    )  # fmt: skip
    assert done.returncode == 0, done.text
    text, data = report(tmp_path / "new", "byzantine")
    assert (data["ranks"], data["seeds"], data["options"]["f"]) == (3, [5], [1])
    cells = {(cell["method"], cell["attack"]): cell for cell in data["cells"]}
    assert len(cells) == 5 * 5
    accuracy = {key: cell["accuracies"][0] for key, cell in cells.items() if not cell["reason"]}
    assert accuracy["signum", "none"] > 0.8
    assert accuracy["signum", "scaled"] > 0.7
    assert accuracy["mean", "none"] > 0.7
    assert accuracy["mean", "scaled"] < 0.4
    assert accuracy["monna", "scaled"] > 0.5
    windowed = {attack: accuracy["scaled_vote_every_8", attack] for attack in data["options"]["attacks"]}
    assert windowed["scaled"] > 0.5
    assert windowed["nan"] > 0.5
    assert len(set(windowed.values())) > 2, "what is sent is what attacks replace"
    assert accuracy["mean", "nan"] > 0.7, "a rank with a NaN abstains"
    losses = cells["signum", "label_flip"]["losses"][0]
    assert len(losses) == data["options"]["steps"]
    assert losses[-1] < losses[0] / 2

    for attack in data["options"]["attacks"]:  # Krum needs 2 f + 3 ranks
        cell = cells["krum", attack]
        assert (cell["accuracies"], cell["losses"]) == ([], [])
        assert "needs at least 2 f + 3 = 5 ranks" in cell["reason"]
    assert "needs at least 2 f + 3 = 5 ranks" in text
    assert "With 1 of 3 ranks hostile the worst cases are: " in text
    lowest = min(value for (method, _), value in accuracy.items() if method == "mean")
    assert f"`mean` {100 * lowest:.0f} %" in text

    inverted = {(cell["method"], cell["attack"], cell["f"]): cell["accuracies"][0] for cell in data["inverted"]}
    assert inverted["signum", "sign_flip", 0] == accuracy["signum", "none"]
    assert inverted["mean", "scaled", 1] == accuracy["mean", "scaled"]
    assert "mpirun" in data["command"]
    assert str(Path.home()) not in text


@pytest.mark.long
def test_classes_of_its_own_for_each_rank(tmp_path: Path) -> None:
    done = mpirun(
        3, SCRIPTS / "experiment_heterogeneous.py", "--methods", "signsgd", "mean", "--noise", "100", "0",
        "--seeds", "5", "--steps", "40", "--out", tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.text
    text, data = report(tmp_path, "heterogeneous")
    vote, mean = data["methods"]
    assert (vote["name"], mean["name"]) == ("signsgd", "mean")
    assert len(vote["losses"][0]) == len(mean["losses"][0]) == 40
    assert mean["accuracies"][0] > 0.7
    sweep = {(curve["name"], curve["noise"]): curve for curve in data["sweep"]}
    assert set(sweep) == {(name, noise) for name in ("noisy_signsgd", "noisy_median") for noise in (0.0, 100.0)}
    assert sweep["noisy_signsgd", 0.0]["losses"] == vote["losses"], "no noise is signsgd itself"
    assert sweep["noisy_signsgd", 100.0]["accuracies"][0] < 0.4, "nothing but noise"
    assert "100%" in done.text
    assert "Warning" not in done.text
    assert "seeds**: 5\n" in text


# ------------------------------------------------------------------------------------------ what they share


def test_a_report(load: Callable[[str], ModuleType], tmp_path: Path) -> None:
    text = "# A heading\n\nWhat was found.\n\nThe rest.\n\n- more\n"
    path = load("experiments").write_report(
        tmp_path / "a",
        "name",
        text,
        {"seeds": [1, 2], "loss": math.inf, "x": (Path("p"),)},
        {"": Figure, "b": Figure},
    )
    day = f"{date.today():%Y-%m-%d}"
    assert path == tmp_path / "a" / f"{day}-name.md"
    text, data = report(tmp_path / "a", "name")
    start = f"# A heading, {day}\n\nWhat was found.\n\n![name]({day}-name.png)\n\n![b]({day}-name-b.png)\n\nThe rest.\n"
    assert text.startswith(start)
    for fact in (f"**torch**: {torch.__version__}", "**ranks**: 1", "**seeds**: 1 2", "**MPI**: ", "**cores**: "):
        assert fact in text
    assert (data["seeds"], data["loss"], data["x"]) == ([1, 2], None, ["p"])
    assert data["torch"] == torch.__version__


def test_what_draws_pictures_is_looked_for_at_the_start(
    load: Callable[[str], ModuleType],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    experiments = load("experiments")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(sys, "argv", ["experiment.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        experiments.parse(experiments.make_parser(None, ""), {})
    assert "pip install matplotlib" in capsys.readouterr().err


def test_numbers_are_written_before_a_picture_is_drawn(load: Callable[[str], ModuleType], tmp_path: Path) -> None:
    def fail() -> Figure:
        raise MemoryError

    with pytest.raises(MemoryError):
        load("experiments").write_report(tmp_path, "name", "# A heading\n\nFound.", {"x": 1}, {"": fail})
    (numbers,) = tmp_path.glob("*-name.json")
    assert json.loads(numbers.read_text())["x"] == 1
    assert len(list(tmp_path.glob("*-name.md"))) == 1


@pytest.mark.parametrize(
    "method",
    [mpisign.signum(0.9), mpisign.signum(0.0), mpisign.lion(), mpisign.signsgd(), mpisign.monna(0, 0.9)],
    ids=str,
)
def test_an_adversary_decides_what_leaves(load: Callable[[str], ModuleType], method: mpisign.Method) -> None:
    """Steps of the library's memory, some of which an adversary replaces by way of the gradient."""
    memory, random = method.memory, torch.Generator().manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(50, generator=random))
    outgoing = load("experiments").Outgoing(method, torch.optim.SGD([parameter], lr=0.5))

    def leaves(gradient: torch.Tensor) -> torch.Tensor:
        return parameter.detach() - 0.5 * gradient if method.exchanges_models else gradient

    assert outgoing.view(parameter) is None
    honest, actual = ({field: torch.zeros(50) for field in memory.fields} for _ in range(2))
    context = StepContext(Policy("coin", "coin", 0), step=0, rank=0, size=1, zeros_key=0, ties_key=0)
    for step in range(7):
        parameter.grad = torch.randn(50, generator=random)
        usual = leaves(memory(parameter.grad.clone(), honest, torch.empty(50), context, 0))
        seen = outgoing.view(parameter)
        torch.testing.assert_close(seen, usual, msg="the attack is made from what an honest rank would send")
        wanted = -100.0 * seen
        with torch.no_grad():
            if step == 3:
                wanted[:20] = math.nan
            outgoing.place(parameter, wanted)
        before = {field: values.clone() for field, values in actual.items()}
        sent = leaves(memory(parameter.grad, actual, torch.empty(50), context, 0))
        torch.testing.assert_close(sent, wanted, rtol=1e-4, atol=1e-3, equal_nan=True)
        for field, values in actual.items():  # as the library: where it is no number the momentum stays
            values[parameter.grad.isnan()] = before[field][parameter.grad.isnan()]


def test_the_command_without_proc(load: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(path: Path) -> str:
        raise FileNotFoundError(path)

    experiments = load("experiments")
    monkeypatch.setattr(Path, "read_text", absent)
    monkeypatch.setattr(sys, "argv", [str(SCRIPTS / "train_text.py"), "--out", "/a/folder"])
    assert experiments._command() == "python scripts/train_text.py --out folder"


@pytest.mark.parametrize("size", [1, 3, 10, 14])
def test_classes_are_dealt_whole(load: Callable[[str], ModuleType], size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    experiments = load("experiments")
    labels = torch.arange(400) % 10
    monkeypatch.setattr("mpisign.size", lambda: size)
    dealt = []
    for rank in range(size):
        monkeypatch.setattr("mpisign.rank", lambda rank=rank: rank)
        dealt.append(experiments._dealt(labels, by_class=True, seed=0))
        assert set(labels[dealt[-1]].tolist()) == ({rank % 10} if size >= 10 else set(range(rank, 10, size)))
    assert sorted(torch.cat(dealt).tolist()) == list(range(400)), "everything, and nothing twice"


# ------------------------------------------------------------------------------------------ the command line


@pytest.fixture
def parse(load: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A script's reading of its command line, as on three ranks."""
    monkeypatch.setattr("mpisign.size", lambda: 3)

    def parse(name: str, *options: str | Path) -> Any:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, options)])
        return load(name).parse_arguments()

    return parse


@pytest.mark.parametrize("name", NAMES)
def test_help(name: str, parse: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        parse(name, "--help")
    text = capsys.readouterr().out
    assert f"--oversubscribe python scripts/{name}.py --quick\n" in text
    assert "signsgd, signum, lion" in " ".join(text.split())


def test_quick_stands_for_other_defaults(parse: Callable[..., Any], tmp_path: Path) -> None:
    quick = parse(NAMES[0], "--quick", "--seeds", "7", "--out", tmp_path)
    assert (quick.methods, quick.seeds) == (["signum", "mean", "median", "multi_krum"], [7])
    assert parse(NAMES[0], "--out", tmp_path).seeds == [0, 1, 2]
    assert parse(NAMES[0], "--report").out.resolve() == SCRIPTS / "results"


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        (NAMES[0], ("--methods", "signum", "adam"), ("'adam'", "signum", "monna")),
        (NAMES[0], ("--attacks", "bribe"), ("'bribe'", "sign_flip", "colluding_signs")),
        (NAMES[0], ("--f", "0"), ("'0' is not a whole number from 1 up",)),
        (NAMES[0], ("--f", "1", "3"), ("--f 3 leaves no honest rank of 3: choose 2 at most",)),
        (NAMES[0], ("--out", SCRIPTS / "experiments.py"), ("name a file in a folder that can be made",)),
        (NAMES[1], ("--methods", "adam"), ("'adam'", "signsgd", "ef21_sgdm")),
        (NAMES[1], ("--noise", "-1"), ("'-1' is not a number from 0 up",)),
        (NAMES[1], ("--seeds", "x"), ("'x' is not a whole number from 0 up",)),
    ],
)
def test_bad_input_is_answered_with_what_to_type(
    name: str,
    options: tuple[str, ...],
    said: tuple[str, ...],
    parse: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        parse(name, *options)
    text = capsys.readouterr().err
    assert all(words in text for words in said), text


@pytest.mark.parametrize("name", NAMES)
def test_one_rank_is_not_enough(
    name: str, parse: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mpisign.size", lambda: 1)
    with pytest.raises(SystemExit, match="2"):
        parse(name)
    assert "start with mpirun -n 1" in capsys.readouterr().err
