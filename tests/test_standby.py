"""mpisign.Standby: spares that step in when ranks die, in jobs of their own; see standing_by.py for what they do."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from mpi4py import MPI
from mpirun import ULFM, Result, outlived, started

SAMPLES, FEW, BATCH = 203, 83, 4
LONG = pytest.mark.long

pytestmark = pytest.mark.skipif(MPI.get_vendor()[0] != "Open MPI", reason="no ULFM")


def event(rank: int, step: int, where: str = "step") -> dict[str, Any]:
    return {"rank": rank, "step": step, "where": where}


def run(ranks: int, spares: int, events: list[dict[str, Any]], **options: Any) -> Result:
    scenario = {"samples": SAMPLES, "batch": BATCH, "spares": spares, "events": events, **options}
    return outlived(ranks, "standing_by.py", scenario)


def ends(result: Result) -> dict[int, tuple[list[int], int]]:
    """By the ranks that have come to the end: who has voted last, and the number of steps."""
    found = re.findall(r"rank (\d+): ends with (\[.*\]) after (\d+) steps", result.text)
    return {int(rank): (json.loads(members), int(steps)) for rank, members, steps in found}


def had(result: Result, epoch: int) -> dict[int, list[tuple[int, list[int], list[int]]]]:
    """By rank: for each of its steps in an epoch the number, who has voted, and its samples."""
    found = re.findall(rf"rank (\d+): epoch {epoch}: (.*)", result.text)
    return {int(rank): json.loads(its) for rank, its in found}


def members_by_step(result: Result, epoch: int = 0) -> dict[int, list[int]]:
    """Who has voted in each step, as all ranks say alike."""
    told: dict[int, list[int]] = {}
    for its in had(result, epoch).values():
        for step, members, _ in its:
            assert told.setdefault(step, members) == members, result.text
    return told


def check_epoch(result: Result, epoch: int, lost: int, samples: int = SAMPLES) -> None:
    """Every sample of an epoch once: at most ``lost`` are those of ranks that have not lived to tell; few fill up."""
    taken = [index for its in had(result, epoch).values() for _, _, indices in its for index in indices]
    assert samples - lost <= len(set(taken)) <= samples
    assert len(taken) - len(set(taken)) < 3 * BATCH, "only to fill up"


@pytest.mark.few
@pytest.mark.parametrize(
    ("died", "method"),
    [(0, "ef_signsgd"), pytest.param(1, "signum", marks=LONG), pytest.param(2, "centered_clipping", marks=LONG)],
)
def test_a_spare_votes_in_the_next_step(died: int, method: str) -> None:
    """At the death of rank 0, too; with the mean of the momenta, or of what error feedback owes; and with a centre."""
    result = run(4, 1, [event(died, 6)], method=method, samples=FEW)
    left = [rank for rank in range(3) if rank != died]
    assert ends(result).keys() == {*left, 3}, result.text
    told = members_by_step(result)
    assert [told[step] for step in (5, 6, 7)] == [[0, 1, 2], left, [*left, 3]], result.text
    check_epoch(result, 0, 5 * BATCH, FEW)
    check_epoch(result, 1, 0, FEW)


@pytest.mark.long
@pytest.mark.few
def test_a_spare_that_is_not_needed_ends_well() -> None:
    result = run(3, 1, [], samples=FEW)
    assert result.returncode == 0, result.text
    assert ends(result).keys() == {0, 1}
    check_epoch(result, 0, 0, FEW)


@pytest.mark.long
def test_one_after_the_other_steps_in_until_none_is_left() -> None:
    result = run(5, 2, [event(1, 4), event(3, 8), event(0, 12)])
    assert {rank: its for rank, (its, _) in ends(result).items()} == {2: [2, 4], 4: [2, 4]}, result.text
    told = members_by_step(result)
    assert [told[step] for step in (5, 8, 9, 12, 13)] == [[0, 2, 3], [0, 2], [0, 2, 4], [2, 4], [2, 4]], result.text
    check_epoch(result, 1, 0)


@pytest.mark.long
def test_two_at_once_and_without_a_sampler() -> None:
    """Of four; the two that are left are half with the lowest. Without a sampler it is admit() that lets them in."""
    result = run(6, 2, [event(1, 5), event(2, 5)])
    assert {rank: its for rank, (its, _) in ends(result).items()} == {rank: [0, 3, 4, 5] for rank in (0, 3, 4, 5)}, (
        result.text
    )
    check_epoch(result, 0, 2 * 4 * BATCH)


DEATHS = [
    *((where, 0) for where in ("before the order", "while it is given")),
    *(("before the group", rank) for rank in (4, 5)),
    *(("after the group", 2), ("while it is taken", 4), ("at the end", 3), ("at the end", 4)),
]


@pytest.mark.long
@pytest.mark.parametrize(("where", "rank"), DEATHS)
def test_deaths_while_a_spare_steps_in(where: str, rank: int) -> None:
    """Of rank 0, which gives; of another; of the spare that steps in; and of the one that waits on."""
    waits = rank > 3
    result = run(6, 2, [event(1, 4), event(rank, 0 if waits else 4, where)], samples=FEW)
    alive = {0, 2, 3, 4, 5} - {rank}
    assert ends(result).keys() == alive, result.text
    assert next(iter(ends(result).values()))[0] == sorted(alive), result.text
    check_epoch(result, 0, 2 * 4 * BATCH, FEW)
    check_epoch(result, 1, 0, FEW)


@pytest.mark.long
@pytest.mark.parametrize(("method", "delay"), [("ef_signsgd", 0), ("scaled_vote", 2)])
def test_local_steps(method: str, delay: int) -> None:
    result = run(4, 1, [event(1, 6)], method=method, every=4, delay=delay)
    assert {rank: its for rank, (its, _) in ends(result).items()} == {rank: [0, 2, 3] for rank in (0, 2, 3)}, (
        result.text
    )
    assert len({steps for _, steps in ends(result).values()}) == 1, result.text
    check_epoch(result, 0, 6 * BATCH)
    check_epoch(result, 1, 0)


@pytest.mark.long
def test_a_spare_takes_the_place_of_one_that_lies() -> None:
    """It counts for ``min_ranks``, as it does where one is killed."""
    result = run(4, 1, [event(1, 6, "lie")], audit=50, min_ranks=3, samples=FEW)
    assert ends(result).keys() == {0, 2, 3}, result.text
    assert "rank 1 ends, so that the others can go on: " in result.text


@pytest.mark.long
def test_overlap() -> None:
    result = run(4, 1, [event(2, 6)], overlap=True, samples=FEW)
    assert ends(result).keys() == {0, 1, 3}, result.text


@pytest.mark.few
@pytest.mark.long
def test_without_standby_no_spare_votes(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "import mpisign, torch\n"
        "mpisign.init(on_failure='continue', spares=1)\n"
        "layer = torch.nn.Linear(2, 2)\n"
        "optimizer = mpisign.DistributedSignOptimizer(torch.optim.SGD(layer.parameters(), lr=0.1))\n"
        "layer(torch.ones(2)).sum().backward()\n"
        "try:\n"
        "    optimizer.step()\n"
        "except mpisign.OptionError as error:\n"
        "    print(error)\n"
    )
    with started(2, script, options=ULFM) as job:
        result = job.wait(60.0)
    assert result.text.count("init(spares=1) keeps ranks that wait, and nothing says where") == 2, result.text


RESUMED = """\
import sys, torch, mpisign
folder, spares = sys.argv[1], int(sys.argv[2])
mpisign.init(on_failure="continue", spares=spares)
torch.manual_seed(0)
layer = torch.nn.Linear(40, 30)
optimizer = mpisign.DistributedSignOptimizer(
    torch.optim.SGD(layer.parameters(), lr=0.1), method=mpisign.double_squeeze(), exchange="two_phase"
)
sampler = mpisign.ElasticSampler(range(61))
begun = 0
if mpisign.checkpoint.newest(folder) is not None:
    saved = mpisign.checkpoint.load(folder, model=layer, optimizer=optimizer)
    begun = saved.step
    sampler.load_state_dict(saved.extra["sampler"])
length = len(sampler)
mpisign.Standby(model=layer, optimizer=optimizer, sampler=sampler)
assert len(sampler) == length
for step, index in zip(range(begun, begun + 4), sampler):
    generator = torch.Generator().manual_seed(10 * step + mpisign.rank())
    optimizer.zero_grad()
    layer(torch.randn(8, 40, generator=generator)).square().sum().backward()
    optimizer.step()
    sampler.record_indices([index])
mpisign.check_consistency(layer, optimizer)
if begun == 0:
    extra = {"sampler": sampler.state_dict()}
    mpisign.checkpoint.save(folder, model=layer, optimizer=optimizer, step=4, extra=extra)
if mpisign.rank() == 0:
    print("deals", sampler.position()["deals"])
    print("bits", layer.weight.detach().numpy().tobytes().hex(), torch.initial_seed())
"""


@pytest.mark.long
def test_a_job_goes_on_bit_for_bit_with_and_without_spares(tmp_path: Path) -> None:
    """What is loaded before spares leave is what those have saved who train."""
    script = tmp_path / "train.py"
    script.write_text(RESUMED)
    said, deals = [], []
    for spares in (1, 0, 2):
        folder = tmp_path / "saved"
        with started(3 + spares, script, str(folder), str(spares), options=ULFM) as job:
            result = job.wait(100.0)
        assert result.returncode == 0, result.text
        assert "was saved by" not in result.text
        said.append(re.findall(r"bits (\w+)", result.text))
        deals += re.findall(r"deals (.*)", result.text)
    assert said[1] == said[2] != said[0]
    assert deals == ["[[3, 4, 0, []]]", *["[[3, 8, 0, []]]"] * 2], "spares that have not left get no samples"
