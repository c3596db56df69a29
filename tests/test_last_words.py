"""mpisign.last_words: what is said and done when a process dies, whoever has put his hook around ours."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import mpisign
from mpisign.last_words import LastWords

AROUND = """
import io, sys
import torch.distributed as dist
import mpisign

mpisign.init()
dist.init_process_group("gloo", init_method={store!r}, rank=0, world_size=1)
{more}
raise RuntimeError("the reason")
"""


def run(tmp_path: Path, more: str) -> subprocess.CompletedProcess[str]:
    program = AROUND.format(store=f"file://{tmp_path / 'store'}", more=more)
    return subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=120)


def test_the_traceback_is_seen_although_torch_holds_it_back(tmp_path: Path) -> None:
    ended = run(tmp_path, "")
    assert ended.returncode != 0
    assert "RuntimeError: the reason" in ended.stderr
    assert "died of RuntimeError" in ended.stderr


def test_hooks_around_hooks_end(tmp_path: Path) -> None:
    """A job that is left and joined again, with torch's hook in between, which calls that of the first job."""
    ended = run(tmp_path, "mpisign.shutdown(); mpisign.init()")
    assert ended.returncode != 0
    assert "RuntimeError: the reason" in ended.stderr
    assert "died of RuntimeError" in ended.stderr
    assert "RecursionError" not in ended.stderr


def test_one_that_is_removed_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[object] = []
    monkeypatch.setattr(sys, "excepthook", lambda *args: said.append(args[0]))
    before = sys.excepthook
    hook = LastWords(said.append)
    error = ValueError()
    sys.excepthook(ValueError, error, None)
    assert said == [ValueError, ValueError]
    hook.remove()
    assert sys.excepthook is before
    hook(ValueError, error, None)
    assert said == [ValueError] * 3


@pytest.mark.usefixtures("world")
def test_a_job_has_one() -> None:
    assert isinstance(sys.excepthook, LastWords)
    mpisign.shutdown()
    assert not isinstance(sys.excepthook, LastWords)
