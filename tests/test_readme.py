"""The README's code, run as it stands."""

import re
import shlex
from pathlib import Path

import pytest
from code_blocks import code_blocks
from mpirun import mpirun

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return code_blocks(README, language)


@pytest.fixture(scope="module")
def script_before_and_after() -> tuple[str, str]:
    (diff,) = blocks("diff")
    lines = diff.splitlines()
    before = "\n".join(line[1:] for line in lines if not line.startswith("+"))
    after = "\n".join(line[1:] for line in lines if not line.startswith("-"))
    return before, after


def test_the_diff_adds_six_statements_and_removes_none():
    (diff,) = blocks("diff")
    assert not re.search(r"^-", diff, flags=re.MULTILINE)
    added = re.findall(r"^\+(.*)", diff, flags=re.MULTILINE)
    assert len([line for line in added if "mpisign" in line and not line.startswith("inputs")]) == 5
    assert len(added) == 6  # the sixth gives each rank its share of the data


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.long), 2])
def test_the_diff_runs(script_before_and_after, tmp_path, ranks: int):
    before, after = script_before_and_after
    check = "\nimport mpisign\nmpisign.check_consistency(model, optimizer)\nprint('ended on', mpisign.size())\n"
    for name, text, expected in (("before.py", before, ""), ("after.py", after + check, f"ended on {ranks}")):
        (tmp_path / name).write_text(text)
        result = mpirun(ranks, tmp_path / name)
        assert result.returncode == 0, result.text
        assert expected in result.text


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.long), 2, pytest.param(3, marks=pytest.mark.long)])
def test_the_python_blocks_run_in_order(tmp_path, ranks: int):
    script = tmp_path / "readme.py"
    script.write_text("\n".join(blocks("python")) + "\nprint('ended')\n")
    result = mpirun(ranks, script)
    assert result.returncode == 0, result.text
    assert result.text.splitlines().count("ended") == ranks


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
            assert words[:2] == ["mpirun", "-n"], line
            assert words[3] == "python"
            command = words[4:]
            if not command[0].startswith("-") and (ROOT / command[0]).exists():
                assert command[0].startswith(("scripts/", "benchmarks/"))  # long jobs, which have tests of their own
                continue
            result = mpirun(int(words[2]), *command, cwd=tmp_path)
            assert result.returncode == 0, result.text
    assert {"./scripts/quickstart", "./scripts/test", "mpirun"} <= seen


def test_the_options_table_lists_what_the_code_accepts():
    from mpisign import policy
    from mpisign.exchange import choose

    for choices in (policy.ZEROS, policy.TIE_RULES, choose.CHOICES):
        for choice in choices:
            assert f'`"{choice}"`' in README


def test_links_to_files_are_alive():
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", README):
        assert (ROOT / target).exists(), f"README links to {target}, which is not there"
