"""A wheel holds all of mpisign, an sdist all of the repository, and what tells of a release tells the same.

What is no Python file is easily left out, and missed only on a machine with a GPU, or by who tests from an sdist.
"""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

import mpisign

ROOT = Path(__file__).parents[1]


def what_is_missing() -> str:
    """For building without a network."""
    if find_spec("pip") is None or find_spec("setuptools") is None:
        return "needs pip and setuptools"
    return "needs setuptools 77" if int(importlib.metadata.version("setuptools").partition(".")[0]) < 77 else ""


def tracked() -> list[str]:
    """What git tracks, or would; [] where this is no repository (in an sdist)."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        return []
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return [name for name in names if name and (ROOT / name).is_file()]


@pytest.mark.skipif(bool(what_is_missing()) or not tracked(), reason=what_is_missing() or "needs a git repository")
def test_an_sdist_holds_the_repository(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in tracked():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "setup.py", "-q", "sdist", "--formats=tar"]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    with tarfile.open(next((source / "dist").glob("mpisign-*.tar"))) as sdist:
        packed = {member.name.partition("/")[2]: member.mode for member in sdist if member.isfile()}
    made = {name for name in packed if name.startswith("mpisign.egg-info/")} | {"PKG-INFO", "setup.cfg"}
    assert packed.keys() - made == set(tracked())
    programs = {name for name in tracked() if (ROOT / name).stat().st_mode & 0o111}
    assert "scripts/test" in programs
    assert not [name for name in programs if not packed[name] & 0o111]


@pytest.mark.long
@pytest.mark.skipif(bool(what_is_missing()), reason=what_is_missing())
def test_a_wheel_holds_every_file(tmp_path: Path) -> None:
    source, wheels = tmp_path / "source", tmp_path / "wheels"  # a build leaves its traces in the source
    shutil.copytree(ROOT / "mpisign", source / "mpisign", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", str(wheels), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    with zipfile.ZipFile(next(wheels.glob("mpisign-*.whl"))) as wheel:
        packed = {name: wheel.read(name) for name in wheel.namelist() if name.startswith("mpisign/")}
    files = [path for path in (source / "mpisign").rglob("*") if path.is_file()]
    assert packed == {path.relative_to(source).as_posix(): path.read_bytes() for path in files}
    assert {"mpisign/bitmap/common.cu", "mpisign/bitmap/count.cu", "mpisign/py.typed"} <= packed.keys()


def metadata_url(text: str) -> str:
    """The project's own address in a PKG-INFO."""
    return re.findall(r"^Project-URL: Source, (\S+)$", text, re.MULTILINE)[0]


def test_links_of_the_long_description_are_absolute(tmp_path: Path) -> None:
    """It is the README, whose relative links lead nowhere on PyPI."""
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, capture_output=True, timeout=120, check=True)
    text = (tmp_path / "mpisign.egg-info" / "PKG-INFO").read_text()
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert len(links) > 20
    assert not [link for link in links if not link.startswith(("https://", "#"))]
    assert re.findall(r"!\[[^]]*\]\((\S+)\)", text) == [f"{metadata_url(text)}/raw/main/docs/vote.svg"]


def test_all_name_the_same_home() -> None:
    """So that one search and replace, in CONTRIBUTING.md, is enough."""
    (home,) = re.findall(r'^URL = "(\S+)"$', (ROOT / "setup.py").read_text(), re.MULTILINE)
    files = [ROOT / "CITATION.cff", *(ROOT / ".github").rglob("*.yml"), *(ROOT / "packaging").rglob("*")]
    text = "\n".join(path.read_text() for path in files if path.is_file())
    named = re.findall(r"https://[^\s'\"]*mpisign\S*", text)
    assert len(named) >= 8
    assert not [url for url in named if not url.startswith(home)]


def test_what_tells_of_a_release_tells_the_same() -> None:
    """The package, the citation, and the newest release in the changelog."""
    cited = dict(re.findall(r"^(version|date-released): \"?([^\"\n]+)\"?$", (ROOT / "CITATION.cff").read_text(), re.M))
    releases = re.findall(r"^## (\d\S*) \((\d{4}-\d\d-\d\d)\)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert (mpisign.__version__, cited["version"]) == (releases[0][0], releases[0][0])
    assert cited["date-released"] == releases[0][1]


def test_pre_commit_uses_the_pinned_versions() -> None:
    pinned = dict(re.findall(r"^([\w.-]+)==([\w.]+)$", (ROOT / "scripts/constraints.txt").read_text(), re.M))
    used = re.findall(r'"([\w.-]+)==([\w.]+)"', (ROOT / ".pre-commit-config.yaml").read_text())
    assert "ruff" in dict(used)
    assert not [(name, version) for name, version in used if pinned.get(name, version) != version]


def test_packages_have_the_version_and_the_requirements_of_setup_py() -> None:
    """What Spack, EasyBuild and conda are told; CUDA's and the build's requirements stand apart."""
    setup = (ROOT / "setup.py").read_text()
    needed = dict(re.findall(r'"(\w+)>=([\d.]+)"', setup.partition("install_requires=")[2].partition("]")[0]))
    assert needed.keys() == {"numpy", "torch", "mpi4py"}
    folder, version = ROOT / "packaging", mpisign.__version__
    (config,) = (folder / "easybuild").glob(f"mpisign-{version}-*.eb")
    texts = {
        "spack": (folder / "spack" / "package.py").read_text(),
        "easybuild": config.read_text(),
        "conda": (folder / "conda" / "meta.yaml").read_text().replace("pytorch", "torch"),
        "apptainer": (folder / "apptainer" / "mpisign.def").read_text(),
    }
    for name, pattern in (
        ("spack", r'"mpisign/mpisign-(.+)\.tar\.gz"$'),
        ("easybuild", r"^version = '(.+)'$"),
        ("conda", r'set version = "(.+)"'),
        ("apptainer", r"image\.version (.+)$"),
    ):
        assert re.findall(pattern, texts[name], re.MULTILINE) == [version], name
    for package, least in needed.items():
        assert f"py-{package}@{least}:" in texts["spack"]
        assert f"{package}>={least}" in texts["easybuild"]
        assert f"{package} >={least}" in texts["conda"]
    assert '"setuptools>=77"' in (ROOT / "pyproject.toml").read_text()
    assert all(tools in texts[name] for name, tools in (("spack", "py-setuptools@77:"), ("conda", "setuptools >=77")))
    copied = re.findall(r"^    (\S+) /opt/mpisign/$", texts["apptainer"], re.MULTILINE)
    assert {"mpisign", "setup.py", "pyproject.toml", "README.md", "LICENSE"} <= set(copied)
    assert all((ROOT / name).exists() for name in copied)
