"""The README's code, run as it stands."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from code_blocks import after, before, code_blocks
from mpirun import environment, mpirun

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return code_blocks(README, language)


@pytest.fixture(scope="module")
def script_before_and_after() -> tuple[str, str]:
    (diff,) = blocks("diff")
    return before(diff), after(diff)


def test_the_diff_adds_six_statements_and_two_that_show_it_and_removes_none():
    (diff,) = blocks("diff")
    assert not re.search(r"^-", diff, flags=re.MULTILINE)
    added = re.findall(r"^\+(.*)", diff, flags=re.MULTILINE)
    needed, shown = added[:6], added[6:]
    assert len([line for line in needed if "mpisign" in line and not line.startswith("inputs")]) == 5
    assert len(needed) == 6  # the sixth gives each rank its share of the data
    assert [line.partition("(")[0] for line in shown] == ["mpisign.check_consistency", "print"]


@pytest.mark.long
def test_both_sides_of_the_diff_run(script_before_and_after, tmp_path):
    was, becomes = script_before_and_after
    check = "mpisign.check_consistency(model, optimizer)\nprint('ended on', mpisign.size())\n"
    (tmp_path / "both.py").write_text(f"{was}\n{becomes}\n{check}")
    result = mpirun(2, tmp_path / "both.py")
    assert result.returncode == 0, result.text
    assert result.text.splitlines().count("ended on 2") == 2


@pytest.mark.long
def test_the_commands_exist(script_before_and_after, tmp_path):
    (tmp_path / "train.py").write_text(script_before_and_after[1])
    seen = set()
    for line in "".join(blocks("bash")).splitlines():
        words = [word for word in shlex.split(line, comments=True) if word != "--oversubscribe"]
        if not words:
            continue
        seen.add(words[0])
        if words[0].startswith("./scripts/"):
            assert (ROOT / words[0]).stat().st_mode & 0o111, f"{words[0]} is not executable"
        else:
            assert words[:5] == ["python", "-m", "mpisign", "run", "-n"], line
            if words[6] == "-m":
                job = mpirun(int(words[5]), *words[6:], cwd=tmp_path)
                assert job.returncode == 0, job.text
                continue
            command = [sys.executable, *words[1:]]
            done = subprocess.run(
                command, env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
            )
            assert done.returncode == 0, done.stdout + done.stderr
            assert f"rank 1 of {words[5]}: replicas are equal, the last vote was of (0, 1)" in done.stdout
    assert {"./scripts/quickstart", "./scripts/test", "python"} <= seen


def test_it_is_short():
    assert README.count("\n") <= 150
    assert README.count("](docs/vote.svg)") == 1


def test_links_to_files_are_alive():
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", README):
        assert (ROOT / target).exists(), f"README links to {target}, which is not there"
