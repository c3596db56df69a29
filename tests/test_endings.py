"""mpisign.endings: the exit code of a job whose launcher may say what it likes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from mpisign.endings import Ending, judge, read

ALL, LEFT = frozenset({0, 1, 2, 3}), frozenset({0, 2, 3})
LOST = Ending(137, 0, ALL)


def together(*codes: int | None, generation: int = 0, members: frozenset[int] = ALL) -> dict[int, Ending]:
    return {rank: Ending(code, generation, members) for rank, code in enumerate(codes)}


def survived(*codes: int | None) -> dict[int, Ending]:
    """Of four, rank 1 has been killed, and the others have gone on."""
    return {**together(*codes, generation=1, members=LEFT), 1: LOST}


def with_spare(*codes: int) -> dict[int, Ending]:
    """The last of four has waited until the others had ended."""
    trained = together(*codes, generation=1, members=frozenset({0, 1, 2}))
    return {**trained, 3: Ending(0, 1, frozenset({3}), waits=True)}


JOBS = {
    "all well": (together(0, 0, 0, 0), 0, 0, ""),
    "one failed, and the launcher says nothing of it": (together(0, 3, 0, 0), 0, 3, "rank 1, which .* exit code 3"),
    "one failed, and the launcher ended the others": (together(143, 3, None, 143), 3, 3, "^failed: rank 1, .*code 3$"),
    "one was killed": (together(143, 137, 143, 143), 137, 137, "^failed: rank 1, ended by SIGKILL .out of memory"),
    "one was not heard of": (together(0, None, 0, 0), 0, 1, "^failed: rank 1, not heard of$"),
    "nobody was heard of": ({}, 0, 1, "no rank"),
    "nothing could be started": ({}, 213, 213, "no rank .* 213"),
    "all stopped as they were asked to": (together(85, 85, 85, 85), 85, 85, ""),
    "one stopped, and the launcher ended the others": (together(143, 85, 85, 143), 85, 85, ""),
    "one stopped, and another failed": (together(85, 1, 85, 85), 85, 85, "^failed: rank 1, .* exit code 1$"),
    "only the launcher failed": (together(0, 0, 0, 0), 7, 7, "launcher with exit code 7"),
    "no signal has this number": (together(0, 255, 0, 0), 255, 255, "^failed: rank 1, which .* exit code 255$"),
}


@pytest.mark.parametrize(("endings", "launcher", "code", "said"), JOBS.values(), ids=JOBS)
def test_a_job_that_ends_with_its_first_rank(endings: dict[int, Ending], launcher: int, code: int, said: str) -> None:
    verdict = judge(endings, launcher, outlives=False)
    assert verdict[0] == code
    assert bool(verdict[1]) == bool(said)
    assert re.search(said, verdict[1])


OUTLIVING = {
    "nobody died": (together(0, 0, 0, 0), 0, 0, ""),
    "three finished": (survived(0, 0, 0, 0), 0, 0, "outlived rank 1, ended by SIGKILL"),
    "three finished, whatever the launcher says": (survived(0, 0, 0, 0), 137, 0, "outlived rank 1"),
    "a survivor failed": (survived(0, 0, 1, 0), 0, 1, "failed: rank 2, which .* exit code 1"),
    "a survivor was not heard of": (survived(0, 0, 0, None), 0, 1, "failed: rank 3, not heard of"),
    "all failed, and the launcher says 0": (together(1, 1, 1, 1), 0, 1, "failed: ranks 0, 1, 2, 3"),
    "nobody was heard of": ({}, 0, 1, "no rank"),
    "survivors stopped as they were asked to": (survived(85, 0, 85, 85), 0, 85, "outlived rank 1"),
    "one was counted out and ended itself": ({**survived(0, 0, 0, 0), 1: Ending(1, 0, ALL)}, 0, 0, "exit code 1"),
    "one was in no group": ({**together(0, 0, 0), 3: Ending(137)}, 0, 137, "failed: rank 3"),
    "a rank died when all had finished": ({**together(0, 0, 0, 0), 1: LOST}, 0, 137, "failed: rank 1"),
    "one left alone, which has no quorum": (
        {**together(0, 0, 0, 0, generation=1, members=LEFT), 1: Ending(1, 1, frozenset({1}))},
        0,
        0,
        "outlived rank 1",
    ),
    "a spare has waited, and was not needed": (with_spare(0, 0, 0), 0, 0, ""),
    "all failed but a spare that has waited": (with_spare(1, 1, 1), 0, 1, "failed: ranks 0, 1, 2, which"),
    "two groups, one of which has failed": (
        {
            **{rank: Ending(0, 0, frozenset({0, 1})) for rank in (0, 1)},
            **{rank: Ending(rank - 2, 0, frozenset({2, 3})) for rank in (2, 3)},
        },
        0,
        1,
        "failed: rank 3",
    ),
}


@pytest.mark.parametrize(("endings", "launcher", "code", "said"), OUTLIVING.values(), ids=OUTLIVING)
def test_a_job_that_outlives_its_ranks(endings: dict[int, Ending], launcher: int, code: int, said: str) -> None:
    verdict = judge(endings, launcher, outlives=True)
    assert verdict[0] == code
    assert bool(verdict[1]) == bool(said)
    assert re.search(said, verdict[1])


def test_what_is_read(tmp_path: Path) -> None:
    (tmp_path / "0.exit").write_text("0 4\n")
    (tmp_path / "0.group").write_text(json.dumps({"generation": 2, "members": [0, 3]}))
    (tmp_path / "1.exit").write_text("")  # it died as it wrote
    (tmp_path / "1.group").write_text("{")
    (tmp_path / "3.exit").write_text("137 4\n")
    (tmp_path / "3.group.new").write_text("{}")
    (tmp_path / ".exit").write_text("0 4\n")  # of a process whose launcher has given it no number
    assert read(tmp_path) == {0: Ending(0, 2, frozenset({0, 3})), 1: Ending(None), 2: Ending(None), 3: Ending(137)}


def test_nothing_is_read(tmp_path: Path) -> None:
    assert read(tmp_path) == {}
