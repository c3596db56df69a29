"""Every benchmark runs for real, on small sizes, and writes a report that holds together. No time is judged."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
from argparse import ArgumentTypeError
from math import ceil, prod
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from mpi4py import MPI
from mpirun import environment, mpirun
from namespaces import namespaces, needs_namespaces, slow_network

from mpisign.bitmap import native
from mpisign.vendors import flags_of

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
ROUNDS = 2
PHASES = {"pack", "exchange", "decide", "unpack", "rest", "step"}


def run_alone(script: str, *options: str) -> str:
    """Run a benchmark as one process; returns what it printed."""
    command = [sys.executable, str(BENCHMARKS / script), *options]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_ranks(ranks: int, script: str, *options: str) -> str:
    """Run a benchmark under mpirun; returns what all ranks wrote."""
    result = mpirun(ranks, BENCHMARKS / script, *options)
    assert result.returncode == 0, result.text
    return result.text


def reporting(folder: Path) -> list[str]:
    return ["--rounds", str(ROUNDS), "--warmup", "0", "--report", "--results", str(folder)]


def check_report(folder: Path, name: str, printed: str, of: str = "") -> dict[str, Any]:
    """A report's two files (named ``of`` something, if so) agree with what was printed; returns the raw numbers."""
    markdown, raw = (next(folder.glob(f"*.{kind}")) for kind in ("md", "json"))
    assert len(list(folder.iterdir())) == 2
    assert markdown.stem == raw.stem
    assert re.fullmatch(rf"\d{{4}}-\d\d-\d\d-{name}{of}", raw.stem)
    text, data = markdown.read_text(), json.loads(raw.read_text())

    title = text.partition(f", {raw.stem[:10]}")[0].removeprefix("# ")
    assert printed.count(title) == 1, "only rank 0 prints, and once"
    assert data["date"].startswith(raw.stem[:10])
    assert f"bench_{name}.py" in data["command"]
    assert data["command"] in text
    assert str(BENCHMARKS.parent) not in text + raw.read_text(), "a report names no folder of this machine"
    assert data["machine"]["cores"] >= 1
    assert data["machine"]["threads of a process"] == 1
    assert {"python", "numpy", "torch", "mpisign"} <= data["versions"].keys()

    seconds = {one["name"]: one["seconds"] for one in data["contenders"]}
    for contender, times in seconds.items():
        assert len(times) == ROUNDS
        assert min(times) > 0
        assert f"\n| {contender} |" in text
        assert f"- **{contender}**: " in text
    assert data["targets"]
    for target in data["targets"]:
        theirs, ours = seconds[target["reference"]], seconds[target["contender"]]
        ratios = [a / b for a, b in zip(theirs, ours, strict=True)]
        assert target["median_of_ratios"] == pytest.approx(sum(ratios) / 2)  # the median of two
        assert target["ratio_of_fastest"] == pytest.approx(min(theirs) / min(ours))
        assert f"{target['contender']} against {target['reference']}" in text
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({line.count("|") for line in block.splitlines()}) == 1, "a table's rows are equally long"
    return data


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bitmap(tmp_path: Path, dtype: str):
    options = ["--elements", "4099", "--dtype", dtype, "--ranks", "3", "8"]
    printed = run_alone("bench_bitmap.py", *options, *reporting(tmp_path))
    data = check_report(tmp_path, "bitmap", printed)
    names = {one["name"] for one in data["contenders"]}
    ours = ("pack", "pack, 10 % zeros", "momentum + pack", "unpack", "apply", "majority of 3", "majority of 8")
    assert {"np.copyto", *(f"{name}, NumPy" for name in ours)} <= names
    assert {f"{name}, C{threads}" for name in ours for threads in ("", ", 2 threads")} <= names
    assert ("np.packbits(x >= 0)" in names) == (dtype != "bfloat16")
    assert data["settings"] == {"rounds": 2, "warmup": 0, "elements": 4099, "dtype": dtype, "ranks": [3, 8]}


@pytest.mark.long
def test_exchange_between_ranks(tmp_path: Path):
    ranks, elements = 3, 40_000
    options = ["--elements", str(elements), "--bucket-mb", "0.001"]
    printed = run_ranks(ranks, "bench_exchange.py", *options, *reporting(tmp_path))
    data = check_report(tmp_path, "exchange", printed)
    assert data["ranks"] == ranks
    assert data["command"].startswith("mpirun ")
    assert f"-n {ranks} " in data["command"]
    assert "MPI library" in data["versions"]
    assert {"Allreduce fp32", "gloo fp32", "gloo bf16"} <= {one["name"] for one in data["contenders"]}
    words, cap = ceil(elements / 32), int(0.001 * 2**20) // 4
    messages = [min(cap, words - start) for start in range(0, words, cap)]
    assert len(messages) > 1
    assert data["bytes_sent"] == {
        "two_phase": sum(2 * (ranks - 1) * 4 * ceil(message / ranks) for message in messages),
        "allgather": (ranks - 1) * 4 * words,
        "hierarchical": 0,  # of one node nothing leaves
    }


@pytest.mark.long
def test_exchange_of_one_process_without_gloo(tmp_path: Path):
    """One rank sends nothing, and no ratio of bytes may trip over that."""
    printed = run_alone("bench_exchange.py", "--elements", "1000", "--no-gloo", *reporting(tmp_path))
    data = check_report(tmp_path, "exchange", printed)
    assert data["ranks"] == 1
    assert data["bytes_sent"] == {"two_phase": 0, "allgather": 0, "hierarchical": 0}
    assert not [one for one in data["contenders"] if "gloo" in one["name"]]


@pytest.mark.long
@pytest.mark.parametrize("exchange", ["allgather", "two_phase"])
def test_step(tmp_path: Path, exchange: str):
    printed = run_ranks(2, "bench_step.py", "--width", "2", "--exchange", exchange, *reporting(tmp_path))
    data = check_report(tmp_path, "step", printed)
    assert data["tensors"] == 161
    by_numpy = {"signum by NumPy", "signsgd by NumPy"} if native.library() is not None else set()
    assert {"signum", "signsgd", "lion", "mean", "signum, audited", *by_numpy} == data["phases"].keys()
    for phases in data["phases"].values():
        assert len(phases) == ROUNDS
        for repetition in phases:
            assert repetition.keys() == PHASES
            assert sum(repetition[phase] for phase in PHASES - {"step"}) == pytest.approx(repetition["step"])
    for method, bit in (("signum", 1), ("signsgd", 1), ("lion", 1), ("mean", 32)):
        headers = data["header_bytes"][method]
        assert 0 < headers < 200
        # With two ranks both exchanges send each message once. Words pad every tensor, two shards every bucket.
        payload = data["bytes_sent"][method] - headers
        assert 0 <= payload - bit * data["parameters"] / 8 <= 4 * 161 + 8 * 161


@pytest.mark.long
@pytest.mark.skipif(MPI.get_vendor()[0] != "Open MPI", reason="no ULFM")
def test_step_of_a_job_that_outlives_its_ranks(tmp_path: Path):
    """A row more, in turns with the usual step of the same run."""
    survive = flags_of("Open MPI").survive
    arguments = ["--width", "2", "--no-gloo", *reporting(tmp_path)]
    result = mpirun(2, BENCHMARKS / "bench_step.py", *arguments, options=survive)
    assert result.returncode == 0, result.text
    data = check_report(tmp_path, "step", result.text)
    assert len(data["phases"]["signum, continues"]) == ROUNDS
    assert data["bytes_sent"]["signum, continues"] == data["bytes_sent"]["signum"]
    (target,) = [its for its in data["targets"] if its["contender"] == "signum, continues"]
    assert (target["reference"], target["at_least"]) == ("signum", 0.98)


@pytest.mark.long
def test_methods(tmp_path: Path):
    printed = run_alone("bench_methods.py", "--width", "2", *reporting(tmp_path))
    data = check_report(tmp_path, "methods", printed)
    elements, tensors = data["parameters"], 161
    # A coordinate's gradient in, decision out, a bit up and one down; signum's momentum in and out; fp32 messages.
    for name, least in (("signsgd", 8.25), ("signum", 16.25), ("ternary_vote", 8.5), ("mean", 16)):
        assert 0 <= data["bytes"][name] - least * elements <= 2 * 2 * 4 * tensors, "words pad every tensor"
    yardsticks = {"copy", "torch uniform_", "torch normal_", "torch.topk", "TopK", "TopK, sample"}
    assert data["bytes"].keys() | yardsticks == {one["name"] for one in data["contenders"]}


@pytest.mark.long
def test_methods_of_a_choice(tmp_path: Path):
    printed = run_alone("bench_methods.py", "--width", "2", "--only", "dgc", *reporting(tmp_path))
    assert check_report(tmp_path, "methods", printed)["bytes"].keys() == {"signum", "dgc"}


@pytest.mark.long
@pytest.mark.parametrize(("model", "of"), [("transformer", ""), ("resnet50", "-resnet50")])
def test_training(tmp_path: Path, model: str, of: str):
    options = ["--model", model, "--width", "8", "--batch", "2", "--size", "32"]
    printed = run_ranks(2, "bench_training.py", *options, *reporting(tmp_path))
    data = check_report(tmp_path, "training", printed, of)
    names = {one["name"] for one in data["contenders"]}
    assert {"signum", "DDP fp32", "DDP bf16 hook", "DDP PowerSGD hook", "no communication"} <= names
    seconds = {one["name"]: one["seconds"] for one in data["contenders"]}
    pairs = zip(seconds["signum"], seconds["no communication"], strict=True)
    assert data["exposed_seconds"]["signum"] == pytest.approx(sum(a - b for a, b in pairs) / ROUNDS)
    assert data["exposed_seconds"]["no communication"] == 0
    assert data["card_bytes"] == {}, "one machine sends nothing through its card"


@pytest.mark.long
def test_progress(tmp_path: Path):
    options = ["--elements", "100k", "--seconds", "0.02", "--message-mb", "0.005"]
    data = check_report(tmp_path, "progress", run_ranks(3, "bench_progress.py", *options, *reporting(tmp_path)))
    rows = {"not polled", "every 2 ms", "every 10 ms", "thread"}
    assert rows | {"computing alone"} == {one["name"] for one in data["contenders"]}
    for row in rows:
        assert len(data[row]["exposed"]) == len(data[row]["computing"]) == ROUNDS
        assert min(data[row]["exposed"]) >= 0
        assert min(data[row]["computing"]) > 0


@pytest.mark.long
def test_card_of_one_machine(tmp_path: Path):
    printed = run_ranks(2, "bench_card.py", "--elements", "80k", *reporting(tmp_path))
    assert "no bytes are counted: there is one node" in printed
    assert check_report(tmp_path, "card", printed)["card_bytes"] == {}


@pytest.mark.long
def test_without_gloo_none_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such-device")
    printed = run_alone("bench_card.py", "--elements", "8k", "--no-gloo", *reporting(tmp_path))
    assert not [one for one in check_report(tmp_path, "card", printed)["contenders"] if "gloo" in one["name"]]


@pytest.mark.long
@pytest.mark.parametrize(
    "script",
    [f"bench_{name}.py" for name in ("bitmap", "exchange", "step", "methods", "training", "card", "progress")],
)
def test_help_has_defaults_and_examples(script: str):
    text = run_alone(script, "--help")
    assert "(default: 15)" in text
    assert f"benchmarks/{script}" in text.partition("examples:")[2]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch):
    """Imports a module of benchmarks/, as its scripts import each other."""
    monkeypatch.syspath_prepend(BENCHMARKS)

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


def test_the_model_is_resnet50(load):
    shapes = list(load("bench_step").resnet50_shapes())
    assert len(shapes) == 161
    assert sum(prod(shape) for shape in shapes) == 25_557_032


def test_the_networks_have_the_papers_sizes(load):
    models = load("models")
    sizes = {name: sum(p.numel() for p in make(1, 0).parameters()) for name, make in models.MODELS.items()}
    assert sizes == {"transformer": 25_482_496, "resnet50": 25_557_032}
    for make in models.MODELS.values():
        task = make(2, 0, size=32, width=8)
        task.loss().backward()
        assert all(parameter.grad is not None for parameter in task.parameters())


def test_bytes_are_read_from_the_systems_counters(load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    cards = load("cards")
    (counters := tmp_path / "dev").write_text(
        "Inter-|   Receive                                                |  Transmit\n"
        " face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls\n"
        "    lo:  17  1 0 0 0 0 0 0  17  1 0 0 0 0 0 0\n  eth0:9999  9 0 0 0 0 0 0 1234567  9 0 0 0 0 0 0\n"
    )
    monkeypatch.setattr(cards, "COUNTERS", counters)
    assert cards.counters()["eth0"] == 1_234_567
    assert cards.find_card("eth0") == "eth0"
    with pytest.raises(SystemExit, match="no network device 'ib0' here, but"):
        cards.find_card("ib0")


def test_numbers_are_written_as_people_write_them(load):
    count = load("harness").count
    assert [count(text) for text in ("25.6M", "4k", "1000", "25_600_000")] == [25_600_000, 4000, 1000, 25_600_000]
    assert count("0", least=0) == 0
    for nonsense in ("0", "-3", "many", "M", "", "inf", "nan"):
        with pytest.raises(ArgumentTypeError, match="not a number of at least 1"):
            count(nonsense)


def test_contenders_take_turns_and_warm_up_uncounted(load):
    harness, calls = load("harness"), []

    def contender(name: str):
        return harness.Contender(
            name,
            "",
            run=lambda: calls.append(f"run {name}"),
            prepare=lambda: calls.append(f"prepare {name}"),
            observe=lambda seconds: calls.append(f"observe {name}"),
        )

    times = harness.measure([contender("a"), contender("b")], rounds=2, warmup=1)
    warm = ["prepare a", "run a", "prepare b", "run b"]
    counted = ["prepare a", "run a", "observe a", "prepare b", "run b", "observe b"]
    assert calls == warm + 2 * counted
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 2, "b": 2}


def test_speedup_is_the_median_of_ratios_beside_the_ratio_of_the_fastest(load):
    assert load("harness").speedup([2.0, 8.0, 3.0], [1.0, 2.0, 4.0]) == (2.0, 2.0)
    assert load("harness").speedup([4.0, 6.0, 5.0], [1.0, 2.0, 5.0]) == (3.0, 4.0)


def test_a_hidden_parent_is_left_out_of_the_command(load, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "getppid", lambda: 2**22 + 1)  # no process has this number
    monkeypatch.setattr(sys, "argv", ["bench_step.py", "--report"])
    assert load("harness")._command() == "python bench_step.py --report"


@pytest.mark.parametrize(("said", "threads"), [("3", 3), ("", 1), ("0", 1), ("4,2", 1), (None, 1)])
def test_ranks_compute_on_the_threads_they_are_given(
    load, monkeypatch: pytest.MonkeyPatch, said: str | None, threads: int
):
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if said is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", said)
    try:
        load("harness").few_threads()
        assert torch.get_num_threads() == threads
        load("harness").one_thread()
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_slow_network_explains_itself():
    script = str(BENCHMARKS / "slow_network")
    seen = subprocess.run([script, "--help"], capture_output=True, text=True, check=True)
    assert "1gbit" in seen.stdout
    assert subprocess.run([script, "4"], capture_output=True, check=False).returncode == 1


@pytest.mark.parametrize("shape", ["0", "2x0", "x4", "3+0", "3+", "two", "2x2x2", "100", "-1"])
def test_slow_network_knows_hosts_and_ranks(shape: str):
    command = [str(BENCHMARKS / "slow_network"), shape, "1gbit", "true"]
    seen = subprocess.run(command, capture_output=True, text=True, check=False)
    assert seen.returncode == 1
    assert "write 4, 2x4 (ranks of each) or 3+1" in seen.stderr


@pytest.mark.long
@needs_namespaces
@pytest.mark.parametrize(("shape", "said"), [("2", "2 on 2 nodes"), ("2x2", "4 on 2 nodes"), ("2+1", "3 on 2 nodes")])
def test_slow_network_runs_ranks_on_each_host_and_leaves_nothing(shape: str, said: str):
    job = slow_network(shape, "100mbit", sys.executable, "-m", "mpisign", "doctor")
    output, _ = job.communicate(timeout=280)
    assert job.returncode == 0, output
    assert said in output
    assert not [name for name in namespaces() if name.startswith(f"mpisign{job.pid}-")]


@pytest.mark.long
@needs_namespaces
def test_bytes_out_of_a_card_are_the_formulas(tmp_path: Path):
    """Two hosts of two ranks: frames, headers and acknowledgements are a few per cent of a megabyte."""
    command = [sys.executable, str(BENCHMARKS / "bench_card.py"), "--elements", "8M", "--no-gloo"]
    formulas, found = {"allgather": 2 * 2 / 8, "two_phase": 2 * 2 / 4 * 2 / 8}, []
    for attempt in range(3):
        (results := tmp_path / str(attempt)).mkdir()
        job = slow_network("2x2", "none", *command, *reporting(results))
        output, _ = job.communicate(timeout=280)
        assert job.returncode == 0, output
        data = json.loads(next(results.glob("*.json")).read_text())
        assert data["node_sizes"] == [2, 2]
        found.append({exchange: data["card_bytes"][exchange] / data["elements"] for exchange in formulas})
        if found[-1] == pytest.approx(formulas, rel=0.03):
            break
    for exchange, by_parameter in formulas.items():
        least = min(its[exchange] for its in found)  # what is sent again only adds
        assert least == pytest.approx(by_parameter, rel=0.03)


@pytest.mark.long
@needs_namespaces
def test_slow_network_that_is_ended_leaves_nothing(tmp_path: Path):
    (script := tmp_path / "sleep.py").write_text("import time; print('asleep', flush=True); time.sleep(100)")
    with slow_network("2", "1gbit", sys.executable, str(script)) as job:
        assert job.stdout is not None
        assert "asleep" in job.stdout.readline()
        assert [name for name in namespaces() if name.startswith(f"mpisign{job.pid}-")]
        job.terminate()
        assert job.wait(30) == 128 + signal.SIGTERM
    assert not [name for name in namespaces() if name.startswith(f"mpisign{job.pid}-")]


@pytest.mark.long
def test_checkpoint(tmp_path: Path) -> None:
    (results := tmp_path / "results").mkdir()
    (disk := tmp_path / "disk").mkdir()
    printed = run_ranks(
        3, "bench_checkpoint.py", "--width", "2", "--steps", "2", "--folder", str(disk), *reporting(results)
    )
    data = check_report(results, "checkpoint", printed)
    assert [(target["contender"], target["reference"]) for target in data["targets"]] == [
        ("save", "plain write"),
        ("save(asynchronous=True)", "save"),
    ]
    assert data["bytes"] > 4 * 4 * data["parameters"], "the parameters once, and a momentum a rank"
    assert list(disk.iterdir()) == [], "it tidies up"


@pytest.mark.long
def test_python_of_a_step(tmp_path: Path) -> None:
    run_alone("bench_python.py", *reporting(tmp_path))
    raw = json.loads(next(tmp_path.glob("*-python.json")).read_text())
    named = [one["name"] for one in raw["contenders"]]
    assert named == ["on the host", "on the host, new gradients", "as on a GPU", "as on a GPU, new gradients"]
    assert all(seconds > 0 for one in raw["contenders"] for seconds in one["seconds"])
