"""scripts/chaos: a short run finds nothing wrong, and each of its checks finds what it is there for."""

from __future__ import annotations

import copy
import importlib
import json
import random
import subprocess
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from mpi4py import MPI
from mpirun import environment
from namespaces import left_behind, needs_namespaces

SCRIPTS = Path(__file__).parents[1] / "scripts"
CHAOS = SCRIPTS / "chaos"
RATE = 0.1
pytestmark = pytest.mark.timeout(700)  # trainings one after the other, with a new start of all ranks between some

SAMPLES = 12

needs_ulfm = pytest.mark.skipif(MPI.get_vendor()[0] != "Open MPI", reason="no ULFM")

Records = list[dict[str, Any]]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """A module of the tool's."""
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module


def chaos(*arguments: str, timeout: float = 600.0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(CHAOS), *arguments]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=timeout, check=False)


# ------------------------------------------------------------------------------------------------- end to end


@pytest.mark.long
@needs_ulfm
def test_a_short_run_finds_nothing_wrong(tmp_path: Path) -> None:
    """Three faults on four ranks; a relaunch is not needed."""
    training, data = short_run(tmp_path, "kill", "exception", "nan", seed=12, spread=0, more=LONGER)
    assert {fault["kind"] for fault in training["faults"]} == {"kill", "exception", "nan"}
    assert training["launches"] == 1
    assert data["without faults"] == {}


@needs_ulfm
@pytest.mark.long
def test_it_goes_on_from_a_checkpoint_and_compares_losses(tmp_path: Path) -> None:
    training, data = short_run(tmp_path, "two", "save", seed=7, spread=2)
    assert len(training["exit codes"]) == training["launches"] > 1
    assert [len(losses) for losses in data["without faults"][training["variation"]]] == [2, 2]


@needs_ulfm
@pytest.mark.long
def test_goodput_is_measured_with_and_without_relaunches(tmp_path: Path) -> None:
    options = ("--goodput", "6", "--between", "2", "--spread", "0", "--quiet")
    done = chaos("--runs", "1", "--most", "1", "--epochs", "2", "--ranks", "3", *options, "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    data = json.loads((tmp_path / f"{date.today():%Y-%m-%d}-chaos.json").read_text())
    measured = {(one["between"], one["survives"]): one for one in data["goodput"]}
    assert set(measured) == {(between, survives) for between in (None, 2.0) for survives in (True, False)}
    assert all(one["samples"] > 0 for (between, _), one in measured.items() if between is None)
    assert measured[None, True]["deaths"] == measured[None, True]["relaunches"] == 0
    assert measured[2.0, False]["relaunches"] >= measured[2.0, False]["deaths"] - 1
    assert (tmp_path / f"{date.today():%Y-%m-%d}-chaos-goodput.png").exists()


@needs_ulfm
@needs_namespaces
@pytest.mark.long
def test_links_are_cut_and_mended(tmp_path: Path) -> None:
    """Of who was cut off, or has slept, and comes back, nobody else hears: the others go on, all of them."""
    before = left_behind()
    kinds, hosts = ("cut", "silence", "flicker"), ("--hosts", "4", "--detect-links", "16s", *LONGER)
    training, _ = short_run(tmp_path, *kinds, seed=39, spread=0, more=hosts)
    assert {fault["kind"] for fault in training["faults"]} == set(kinds)
    assert training["launches"] == 1
    assert left_behind() <= before


LONGER = ("--epochs", "16")  # so that all faults strike, however quick the machine is


def short_run(
    folder: Path, *kinds: str, seed: int, spread: int, more: tuple[str, ...] = ()
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the report says of the one training, and all of it."""
    done = chaos(
        "--runs", "1", "--seed", str(seed), "--ranks", "4", "--epochs", "6", "--most", "3", "--gap", "0.2",
        "--spread", str(spread), *more, "--kinds", *kinds, "--out", str(folder),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    stem = f"{date.today():%Y-%m-%d}-chaos"
    text, data = (folder / f"{stem}.md").read_text(), json.loads((folder / f"{stem}.json").read_text())
    (training,) = data["trainings"]
    struck = [fault["kind"] for fault in training["faults"]]
    assert struck
    assert set(struck) <= set(kinds)
    assert training["problems"] == []
    assert training["exit codes"][-1] == 0
    assert f"{len(struck)} faults" in text
    assert "0 violations in all" in done.stdout
    assert (folder / f"{stem}-recovery.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    return training, data


def test_it_explains_itself() -> None:
    done = chaos("--help")
    assert done.returncode == 0
    assert "scripts/chaos --seed 1007 --runs 1" in done.stdout
    assert "--hosts" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--ranks", "2"), "--ranks must be 3 or more"),
        (("--spread", "1"), "is no spread"),
        (("--kinds", "flood"), "invalid choice: 'flood'"),
        (("--kinds", "cut", "kill"), "--kinds cut: add --hosts 4"),
        (("--detect-links", "2s"), "--detect-links must be 4s or more"),
        (("--hosts", "5"), "--hosts must be 2 or more, and no more than there are ranks"),
    ],
)
def test_options_that_cannot_be(
    arguments: tuple[str, ...],
    message: str,
    load: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = load("chaos_command")
    monkeypatch.setattr(sys, "argv", ["chaos", *arguments])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_seed_repeats_its_faults(load: Callable[[str], ModuleType]) -> None:
    faults = load("chaos_faults")
    deck = [*faults.KINDS, *(set(faults.KINDS) - set(faults.DEADLY))]

    def first(seed: int) -> list[Any]:
        dealt = faults.deal(random.Random(seed), list(faults.KINDS), 0.5)
        return [next(dealt) for _ in range(2 * len(deck))]

    assert first(7) == first(7) != first(8)
    assert sorted(fault.kind for fault in first(7)) == sorted(2 * deck)
    for fault in first(7):
        victim, other = fault.strikes([1, 4])
        assert {victim, other} == {1, 4}


# ------------------------------------------------------------------------------------ what its checks find


def records(rank: int, killed_at: int, resumed: int = 0, steps: int = 8) -> Records:
    """What a rank of 3 writes in two epochs of 12 samples: rank 2 dies in step ``killed_at`` without a vote in it."""
    its: Records = [
        {"what": "here", "pid": 1},
        {"what": "begin", "step": resumed, "epoch": 0, "crc": 1000 + resumed, "came": False},
    ]
    members, left, dealt = [0, 1, 2], list(range(SAMPLES)), None
    step, epoch = resumed, 0
    while step < steps:
        if dealt != members:
            dealt = members
            its.append({"what": "deal", "step": step, "epoch": epoch, "members": members})
        step += 1
        batches = {who: left[place :: len(members)][:2] for place, who in enumerate(members)}
        its.append({"what": "take", "step": step, "samples": batches[rank]})
        if step == killed_at:
            if rank == 2:
                return its
            members = [0, 1]
            its.append({"what": "change", "generation": 1, "members": members, "lost": [2]})
        left = [sample for sample in left if not any(sample in batches[who] for who in members)]
        commit = {"what": "commit", "step": step, "nan": False, "exchange": step - 1, "moved": RATE, "skipped": False}
        commit |= {"generation": int(step >= killed_at), "members": members, "silent": [], "crc": 1000 + step}
        its.append({**commit, "recovery": 0.1 * (step == killed_at)})
        if not left:
            its.append({"what": "epoch", "step": step, "epoch": epoch})
            epoch, left, dealt = epoch + 1, list(range(SAMPLES)), None
            if epoch == 2:
                break
    return [*its, {"what": "end", "step": step, "crc": 1, "loss": 0.5}, {"what": "left"}]


@pytest.fixture
def training(load: Callable[[str], ModuleType]) -> Any:
    """One that is as it should be: rank 2 dies in step 2, and the others go on to the end."""
    job, checks, faults = load("chaos_job"), load("chaos_checks"), load("chaos_faults")
    its = {rank: records(rank, killed_at=2) for rank in range(3)}
    for written in its.values():
        for at, record in enumerate(written):
            record["at"] = float(at)
    launch = job.Outcome(0, 3, 2, 0.0, 1.0, 0, its, killed=[2])
    fault = faults.Fault("kill", 0.1, (0.9, 0.0), 0.0, 0.0, 0, "before")
    struck = [job.Struck(fault, 0, 3, 5.0, [2], [2])]
    return checks.Training(0, "flat", 3, False, SAMPLES, RATE, [launch], struck)


def found(load: Callable[[str], ModuleType], training: Any) -> set[str]:
    return {problem.check for problem in load("chaos_checks").check(training)}


def test_of_a_good_training_they_find_nothing(load: Callable[[str], ModuleType], training: Any) -> None:
    assert load("chaos_checks").check(training) == []
    assert load("chaos_checks").final_loss(training) == 0.5


def commit(training: Any, rank: int, step: int) -> dict[str, Any]:
    its = training.launches[0].records[rank]
    return next(record for record in its if record["what"] == "commit" and record["step"] == step)


def drop(training: Any, rank: int, step: int) -> None:
    training.launches[0].records[rank].remove(commit(training, rank, step))


def twice(training: Any, rank: int, step: int) -> None:
    its = training.launches[0].records[rank]
    its.insert(its.index(commit(training, rank, step)), copy.deepcopy(commit(training, rank, step)))


def put(what: str, value: Any, step: int = 3, rank: int = 1) -> Callable[[Any], None]:
    return lambda training: commit(training, rank, step).__setitem__(what, value)


def of_launch(what: str, value: Any) -> Callable[[Any], None]:
    return lambda training: setattr(training.launches[0], what, value)


def redeal(training: Any) -> None:
    deal = next(r for r in training.launches[0].records[1] if r["what"] == "deal" and r["step"] > 0)
    deal["step"] += 1


def had_before(training: Any) -> None:
    taken = [record for record in training.launches[0].records[0] if record["what"] == "take"]
    taken[2]["samples"] = taken[0]["samples"]


def come_later(training: Any) -> None:
    """By what was decided on the window before, so that rank 2's, which dies then, have not counted."""
    for rank in range(3):
        for record in training.launches[0].records[rank]:
            if record["what"] == "commit" and record["step"] == 1:
                record["later"] = 1


def ends_alone(training: Any) -> None:
    its = training.launches[0].records[1]
    its[:] = [record for record in its if record["what"] not in ("end", "left")]


def ends_otherwise(training: Any) -> None:
    next(r for r in training.launches[0].records[1] if r["what"] == "end")["crc"] = 2


def counted_out(training: Any) -> None:
    training.launches[0].killed = []
    training.struck = []


DOCTORED: dict[str, tuple[str, Callable[[Any], None]]] = {
    "it hangs": ("hang", of_launch("hang", "no steps for 60 s")),
    "a file is left": ("left", of_launch("left", ["/dev/shm/mpisign-1"])),
    "a step is lost": ("steps", lambda training: drop(training, 1, 3)),
    "a step is made twice": ("steps", lambda training: twice(training, 1, 3)),
    "an exchange counts twice": ("steps", put("exchange", 1, step=3)),
    "replicas differ": ("replicas", put("crc", 7)),
    "reports differ": ("replicas", put("generation", 0)),
    "a vote is applied twice": ("moved", put("moved", 2 * RATE)),
    "a vote is not applied": ("moved", put("moved", 0.0)),
    "a rank is counted out that lives": ("members", counted_out),
    "one votes who was not there": ("members", put("members", [0, 1, 2], step=3)),
    "samples are dealt at another step": ("deals", redeal),
    "samples count twice": ("samples", had_before),
    "samples that were sent later count": ("samples", come_later),
    "one ends, and nobody has killed it": ("end", ends_alone),
    "replicas differ at the end": ("end", ends_otherwise),
    "it stops where it could go on": ("end", of_launch("code", 86)),
}


@pytest.mark.parametrize("name", DOCTORED)
def test_what_is_doctored_is_found(load: Callable[[str], ModuleType], training: Any, name: str) -> None:
    expected, doctor = DOCTORED[name]
    doctor(training)
    assert expected in found(load, training)


def test_a_last_exchange_of_the_dead_need_not_count(load: Callable[[str], ModuleType], training: Any) -> None:
    its = training.launches[0].records[2]
    its.append({**commit(training, 1, 2), "crc": 7, "members": [0, 1, 2], "generation": 0})
    assert found(load, training) == set()
    its.append({**its[-1], "step": 3, "exchange": 2})
    assert "replicas" in found(load, training)


def test_nan_are_silent(load: Callable[[str], ModuleType], training: Any) -> None:
    fault = load("chaos_faults").Fault("nan", 0.1, (0.9, 0.0), 0.0, 0.0, 1, "before")
    training.struck.append(load("chaos_job").Struck(fault, 0, 2, 6.0, [1], []))
    commit(training, 1, 3)["nan"] = True
    assert found(load, training) == {"abstained"}
    for rank in (0, 1):
        commit(training, rank, 3)["silent"] = [1]
    assert found(load, training) == set()


@pytest.fixture
def relaunched(load: Callable[[str], ModuleType], training: Any) -> Any:
    """The same, but rank 0 dies too, in step 3, and a relaunch goes on from step 2."""
    first = training.launches[0]
    for rank in (0, 1):
        its = first.records[rank]
        del its[its.index(commit(training, rank, 3)) :]
        its[-2:-2] = [{"what": "saved", "step": 2, "certain": True, "at": 6.5}]
    first.killed, first.code, first.text = [2, 0], 86, "rank 1 stops: ranks [1] are all that this one reaches of [0, 1]"
    left = [sample for sample in range(SAMPLES) if sample not in _had(first.records, 2)]
    again = copy.deepcopy(first)
    again.number, again.code, again.killed = 1, 0, []
    again.records = {}
    for rank in range(3):
        its = [{"what": "begin", "step": 2, "epoch": 0, "crc": 1002, "came": False}]
        its += [{"what": "deal", "step": 2, "epoch": 0, "members": [0, 1, 2]}]
        its += [{"what": "take", "step": 3, "samples": left[rank::3]}]
        its += [{**commit_of(3), "crc": 1003}, {"what": "epoch", "step": 3, "epoch": 0}]
        its += [{"what": "end", "step": 3, "crc": 1, "loss": 0.5}, {"what": "left"}]
        again.records[rank] = [{**record, "at": 10.0 + at} for at, record in enumerate(its)]
    training.launches.append(again)
    return training


def _had(records: dict[int, Records], until: int) -> set[int]:
    taken = [(rank, r) for rank, its in records.items() for r in its if r["what"] == "take" and r["step"] <= until]
    return {sample for rank, r in taken for sample in r["samples"] if r["step"] == 1 or rank != 2}


def commit_of(step: int) -> dict[str, Any]:
    its = {"what": "commit", "step": step, "nan": False, "exchange": step - 1, "moved": RATE, "skipped": False}
    return {**its, "generation": 0, "members": [0, 1, 2], "silent": [], "recovery": 0.0}


def test_a_step_that_was_saved_counts_though_all_have_died_who_knew(
    load: Callable[[str], ModuleType], relaunched: Any
) -> None:
    first, again = relaunched.launches
    first.killed = [2, 0, 1]
    assert "resumed" in found(load, relaunched)
    relaunched.launches[:] = []
    for launch in (first, again):
        relaunched.add(launch)
    assert found(load, relaunched) == set()


def test_a_relaunch_goes_on(load: Callable[[str], ModuleType], relaunched: Any) -> None:
    assert load("chaos_checks").check(relaunched) == []
    assert load("chaos_times").redone(relaunched) == 0


def in_a_window(job: ModuleType, number: int, members: list[int], begun: int, takes: list[list[int]]) -> Any:
    """A launch that takes samples in turn, by step; what its second step decides is on the first one's alone."""
    its: dict[int, Records] = {}
    for place, rank in enumerate(members):
        its[rank] = [{"what": "begin", "step": begun, "epoch": 0, "crc": 1000 + begun, "came": False}]
        its[rank] += [{"what": "deal", "step": begun, "epoch": 0, "members": members}]
        for step, taken in enumerate(takes, begun + 1):
            its[rank] += [{"what": "take", "step": step, "samples": taken[place :: len(members)]}]
            its[rank] += [{**commit_of(step), "crc": 1000 + step, "members": members, "later": 1}]
        if number:
            its[rank] += [{"what": "epoch", "step": begun + len(takes), "epoch": 0}]
    return job.Outcome(number, len(members), 1, 0.0, 1.0, 0, its)


@pytest.mark.parametrize(
    ("members", "takes", "good"),
    [
        ([0, 1, 2], [[6, 7, 8], [9, 10, 11]], True),
        ([0, 1, 2], [[3, 4, 5], [6, 7, 8], [9, 10, 11]], False),
        ([0, 1], [[3, 4, 5, 6], [7, 8, 9, 10, 11, 3]], True),
        ([0, 1], [[6, 7, 8], [9, 10, 11]], False),
    ],
    ids=["goes on", "goes back", "gives up what another number cannot go on with", "leaves it out"],
)
def test_what_a_relaunch_within_a_window_takes(
    load: Callable[[str], ModuleType], members: list[int], takes: list[list[int]], good: bool
) -> None:
    """Rank 4 was a spare; of samples 3 to 5 the checkpoint's window says nothing yet."""
    job, checks = load("chaos_job"), load("chaos_checks")
    launches = [in_a_window(job, 0, [0, 1, 4], 0, [[0, 1, 2], [3, 4, 5]]), in_a_window(job, 1, members, 2, takes)]
    training = checks.Training(0, "every-delay", 3, False, SAMPLES, None, launches)
    assert ("samples" in found(load, training)) is not good


@pytest.mark.parametrize(("what", "value"), [("step", 1), ("crc", 7)])
def test_a_relaunch_from_elsewhere_is_found(
    load: Callable[[str], ModuleType], relaunched: Any, what: str, value: int
) -> None:
    for its in relaunched.launches[1].records.values():
        its[0][what] = value
    assert "resumed" in found(load, relaunched)


def test_a_loss_that_chance_does_not_explain(load: Callable[[str], ModuleType], training: Any) -> None:
    run = load("chaos_run")
    assert run.loss_is_wrong(training, run.Spread([[0.45, 0.5], [0.1, 0.1]])) == []
    assert [its.check for its in run.loss_is_wrong(training, run.Spread([[0.30, 0.31], [0.1, 0.1]]))] == ["loss"]


def test_how_long_it_takes(load: Callable[[str], ModuleType], training: Any) -> None:
    """A record a second; the recovery is told to have taken 0.1 s."""
    struck = training.struck[0]
    its = load("chaos_times").times(training.launches[0], struck)
    change, step = (
        next(r["at"] for r in training.launches[0].records[0] if r["what"] == what and r["at"] > struck.at)
        for what in ("change", "commit")
    )
    assert its.found == pytest.approx(change - 0.1 - struck.at)
    assert its.back == step - struck.at


def test_a_spare_that_comes_later_is_not_waited_for(load: Callable[[str], ModuleType], training: Any) -> None:
    launch, fault = training.launches[0], load("chaos_faults").Fault("stop", 0.1, (0.0, 0.0), 0.0, 1.0, 0, "before")
    struck = load("chaos_job").Struck(fault, 0, 2, 8.5, [0], [])
    launch.records[3] = [{**record, "at": record["at"] + 100.0} for record in launch.records[1]]
    assert 0 < load("chaos_times").times(launch, struck).back < 5
