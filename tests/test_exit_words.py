"""mpisign.exit_words: what the shell around a rank writes down, and what the library adds."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

import mpisign
from mpisign.endings import Ending, read
from mpisign.exit_words import shell, tell_group
from mpisign.session import current

RANK = {"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "3"}
HYDRA = {"PMI_RANK": "2", "PMI_SIZE": "3"}


def ended(folder: Path, *command: str, variables: dict[str, str] = RANK, outlives: bool = False) -> int:
    kept = {"PATH": os.environ["PATH"], **variables}
    typed = [*shell(str(folder), outlives=outlives), *command]
    return subprocess.run(typed, env=kept, stderr=subprocess.DEVNULL, check=False, timeout=240).returncode


@pytest.mark.parametrize(("code", "variables"), [(0, RANK), (3, HYDRA), (85, RANK)])
def test_the_code_is_passed_on_and_written_down(tmp_path: Path, code: int, variables: dict[str, str]) -> None:
    assert ended(tmp_path, "sh", "-c", f"exit {code}", variables=variables) == code
    assert read(tmp_path)[2] == Ending(code)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1, signal.SIGSEGV])
def test_a_signal_ends_the_shell_too(tmp_path: Path, number: int) -> None:
    assert ended(tmp_path, "sh", "-c", f"kill -{int(number)} $$") == -number
    assert read(tmp_path)[2] == Ending(128 + number)


@pytest.mark.parametrize(("code", "end"), [(0, 0), (85, 85), (1, -signal.SIGKILL), (143, -signal.SIGTERM)])
def test_where_others_go_on_a_failure_is_a_death(tmp_path: Path, code: int, end: int) -> None:
    assert ended(tmp_path, "sh", "-c", f"exit {code}", outlives=True) == end
    assert read(tmp_path)[2] == Ending(code)


def test_a_signal_that_the_command_takes_does_not_end_the_shell(tmp_path: Path) -> None:
    """The launcher sends it to both."""
    command = "trap 'exit 85' USR1; kill -USR1 $PPID; kill -USR1 $$; exit 1"
    assert ended(tmp_path, "sh", "-c", command) == 85
    assert read(tmp_path)[2] == Ending(85)


def test_arguments_stay_as_they_are(tmp_path: Path) -> None:
    assert ended(tmp_path, "test", "a b  c", "=", "a b  c") == 0


@pytest.mark.usefixtures("world")
def test_a_group_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "0.exit").write_text("0 1")
    monkeypatch.setenv("MPISIGN_EXIT_WORD", f"{tmp_path}/0 {os.getpid()}")
    tell_group(current().group)
    assert read(tmp_path) == {0: Ending(0)}, "of this process's child, which is no rank"
    monkeypatch.setenv("MPISIGN_EXIT_WORD", f"{tmp_path}/0 {os.getppid()}")
    tell_group(current().group)
    assert read(tmp_path) == {0: Ending(0, 0, frozenset({0}))}
    (tmp_path / "0.group").unlink()
    mpisign.shutdown()
    mpisign.init()
    assert read(tmp_path) == {0: Ending(0, 0, frozenset({0}))}
    monkeypatch.setenv("MPISIGN_EXIT_WORD", f"{tmp_path}/gone/0 {os.getppid()}")
    tell_group(current().group)  # the launcher has ended
