"""The transformer on Python's own library: the real script on real ranks, with a model of a few thousand parameters."""

from __future__ import annotations

import importlib
import json
import math
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


@pytest.fixture
def results(script: ModuleType) -> ModuleType:
    return importlib.import_module("text_results")


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
    bits_sent, megabytes = 8 * sum(adamw["bytes_sent"]) / STEPS / PARAMETERS, sum(adamw["bytes_sent"]) / 1e6
    row = f"AdamW, mean in fp32 | {adamw['bits'][-1]:.3f} | {bits_sent:.3g} | {megabytes:.1f} |"
    assert row in text.read_text()
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


@pytest.mark.long
def test_rivals_and_local_steps_and_reports_made_of_reports(tmp_path: Path) -> None:
    def report(folder: str, *options: str | Path) -> dict[str, dict[str, Any]]:
        done = mpirun(2, SCRIPT, *SMALL, "--out", tmp_path / folder, *options)
        assert done.returncode == 0, done.text
        return {run["contender"]: run for run in numbers(tmp_path / folder)["runs"]}

    names = ("adamw", "local4-vote", "one_bit_adam", "ddp", "ddp-bf16", "ddp-powersgd")
    runs = report("all", "--only", *names, "--rates", "one_bit_adam=2e-3")
    assert {name: run["lr"] for name, run in runs.items()} == {
        **dict.fromkeys(names, 6e-3),
        "one_bit_adam": 2e-3,
        "ddp-powersgd": 3e-3,
    }
    assert runs["ddp"]["losses"] == pytest.approx(runs["adamw"]["losses"], rel=1e-4)
    assert runs["ddp"]["bytes_sent"] == [4 * PARAMETERS] * STEPS
    assert runs["ddp-bf16"]["bytes_sent"] == [2 * PARAMETERS] * STEPS
    assert runs["ddp-bf16"]["losses"] != runs["ddp"]["losses"]
    assert runs["ddp-bf16"]["losses"] == pytest.approx(runs["ddp"]["losses"], rel=0.02)
    power = runs["ddp-powersgd"]["bytes_sent"]
    assert power[:10] == [4 * PARAMETERS] * 10
    assert len(set(power[10:])) == 1
    assert power[-1] < 2 * PARAMETERS
    assert [bool(sent) for sent in runs["local4-vote"]["bytes_sent"]] == [step % 4 == 3 for step in range(STEPS)]
    one_bit = runs["one_bit_adam"]["bytes_sent"]
    assert min(one_bit[:2]) > 20 * max(one_bit[2:]), "2 of 15 steps are exact"

    (saved,) = (tmp_path / "all").glob("*.json")
    gathered = report("gathered", "--gather", saved, "--within", "0.1")
    assert {name: run["bits"] for name, run in gathered.items()} == {name: run["bits"] for name, run in runs.items()}
    (text,) = (tmp_path / "gathered").glob("*.md")
    assert f"until {runs['adamw']['bits'][-1] + 0.1:.2f} bits" in text.read_text()
    whole, few = json.loads(saved.read_text()), tmp_path / "few.json"
    few.write_text(json.dumps({**whole, "runs": whole["runs"][:2]}))
    assert len(report("few", "--gather", few)) == 2
    timed = report("timed", "--losses", saved, "--only", "ddp", "local4-vote", "--max-steps", "10")
    assert timed["ddp"]["bits"] == runs["adamw"]["bits"]
    assert len(timed["ddp"]["seconds"]) == len(timed["local4-vote"]["seconds"]) == STEPS


@pytest.mark.long
def test_it_is_evaluated_once_at_least_and_steps_that_a_scaler_skips_count(tmp_path: Path) -> None:
    """The scaler begins with a factor that fp16 cannot hold."""
    options = ("--only", "adamw", "ddp", "--precision", "fp16", "--max-steps", "4")
    done = mpirun(2, SCRIPT, *SMALL, "--out", tmp_path, *options)
    assert done.returncode == 0, done.text
    for run in numbers(tmp_path)["runs"]:
        assert run["steps"] == [4]
        assert len(run["bits"]) == 1
        assert len(run["losses"]) == len(run["bytes_sent"]) == 4
    assert "epoch 0.8: bits per byte" in done.text


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
        contender="vote", label="", seed=0, lr=1e-3, parameters=1, exchange="", losses=[], seconds=[1.0, 2.0, 3.0, 4.0],
        bytes_sent=[10, 10, 20, 20], steps=[2, 4], bits=[5.0, 3.0],
    )  # fmt: skip
    assert result.curve("seconds") == [3.0, 10.0]
    assert [result.until(bits, "bytes_sent") for bits in (5.5, 5.0, 4.0, 3.0)] == [20.0, 20.0, 40.0, 60.0]
    assert result.until(4.0, "steps") == 3.0
    assert result.until(2.9, "steps") == math.inf


def test_steps_take_as_long_as_those_that_sent_as_much(results: ModuleType) -> None:
    def result(contender: str, seconds: list[float], bytes_sent: list[int], bits: list[float]) -> Any:
        return results.Result(
            contender=contender, label=contender, seed=0, lr=1.0, parameters=1, exchange="", losses=[],
            seconds=seconds, bytes_sent=bytes_sent, steps=[len(bytes_sent)] * bool(bits), bits=bits,
        )  # fmt: skip

    ran = [result("adamw", [], [40, 40, 40], [2.0]), result("local4-vote", [], [0, 0, 0, 9, 0, 0, 0, 10], [3.0])]
    here = [
        result("ddp-bf16", [9.0, 9.0, 1.0, 2.0, 6.0], [20] * 5, []),
        result("local4-vote", [9.0, 9.0, 0.1, 0.5, 0.2, 0.3, 0.2, 0.7], [0, 0, 0, 10, 0, 0, 0, 10], []),
    ]
    bf16, local = results.timed(ran, here)
    assert (bf16.contender, bf16.bits, bf16.bytes_sent, bf16.seconds) == ("ddp-bf16", [2.0], [20] * 3, [2.0] * 3)
    assert local.seconds == [0.2, 0.2, 0.2, 0.6, 0.2, 0.2, 0.2, 0.6]
    assert local.bytes_sent == ran[1].bytes_sent


def test_reports_that_do_not_fit_are_refused(
    results: ModuleType, parse: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, args = tmp_path / "text.json", parse("--width", "64")
    run = {
        "contender": "vote", "label": "", "seed": 3, "lr": 1e-3, "parameters": 1, "exchange": "", "losses": [1.0],
        "seconds": [1.0], "bytes_sent": [1], "steps": [1], "bits": [2.0],
    }  # fmt: skip
    data = {
        "runs": [run],
        "ranks": 1,
        "text_bytes": {},
        "options": {name: getattr(args, name) for name in results.ALIKE + results.TRAINED} | {"data": args.data.name},
    }
    path.write_text(json.dumps(data))
    (again,), _ = results.gather(args, [path])
    assert (again.bits, again.seconds) == ([2.0], [])
    longer = tmp_path / "longer.json"
    longer.write_text(json.dumps({**data, "runs": [{**run, "seed": 4, "steps": [2], "bytes_sent": [1, 1]}]}))
    old = {name: data["options"][name] for name in data["options"].keys() - {"precision", "epochs"}}
    for written, options, said in [
        (data, [path, path], "has vote on seed 3, which an earlier file has, too"),
        (data, [path, longer], "vote on seed 4 evaluated after steps 2, and vote of an earlier run was after 1"),
        ({**data, "ranks": 4}, [path], "was made with ranks 4, and now it is 1"),
        changed(data, epochs=4),
        changed(data, epoch_windows=8),
        changed(data, precision="bf16"),
        changed(data, data="books"),
        changed(data, dgc_ratio=0.5),
        changed(data, dgc_clip=0.5),
        changed(data, width=128),
        ({"runs": []}, [path], "is no report of train_text.py"),
    ]:
        path.write_text(json.dumps(written))
        with pytest.raises(SystemExit, match="2"):
            results.gather(args, options or [path])
        assert said in capsys.readouterr().err
    path.write_text(json.dumps({**data, "options": old}))
    assert len(results.gather(args, [path])[0]) == 1, "what an old one does not say"
    path.write_text(json.dumps(changed(data, epochs=4, data="books")[0]))
    assert len(results.gather(parse("--width", "64", "--losses", str(path)), [path])[0]) == 1, "steps are only timed"


def changed(report: dict[str, Any], /, **options: Any) -> tuple[dict[str, Any], list[Path], str]:
    """A report with other options, and what is said of the first."""
    (name, value), *_ = options.items()
    return {**report, "options": {**report["options"], **options}}, [], f"was made with {name} {value}, and now it is "


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
    assert "Learning rates: each had three tries at least" in text


def test_what_draws_the_picture_is_looked_for_at_the_start(
    parse: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match="2"):
        parse()
    assert "pip install matplotlib" in capsys.readouterr().err


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
        (("--rates", "dgc=0"), "'0' is not a positive number"),
        (("--rates", "sgd=1"), "'sgd=1' names none of vote, adamw, dgc, "),
        (("--only", "ddp-powersgd", "--checkpoint-dir", "."), "would not keep what PowerSGD's hook remembers"),
        (("--out", f"{SCRIPT}/out"), "name a file in a folder that can be made"),
    ],
)
def test_bad_input_is_answered_with_what_to_type(
    parse: Callable[..., Any], options: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse(*options)
    assert said in capsys.readouterr().err
