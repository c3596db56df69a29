"""The pages under docs: they build strictly and without a network, are complete, and what they show runs."""

from __future__ import annotations

import inspect
import json
import pkgutil
import re
import shlex
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from code_blocks import after, before, code_blocks, examples
from mpirun import environment, mpirun

import mpisign
from mpisign import methods, policy
from mpisign.exchange import choose

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
OF_FRAMEWORKS = {"huggingface", "lightning"}  # pages whose scripts need more packages; test_integrations.py runs them
# Of these "python" is run, and so is what "diff" makes of a file; "output" is what the block before it prints.
LANGUAGES = {"", "bash", "python", "diff", "output", "text", "{eval-rst}", "{include}", "{literalinclude}", "{toctree}"}
FETCHED = {("img", "src"), ("link", "href"), ("script", "src")}  # what a reader's browser loads by itself


def name(path: Path) -> str:
    return path.name


# ---------------------------------------------------------------------------------------------------- the build


def build(source: Path, work: Path) -> subprocess.CompletedProcess[str]:
    """Build ``source`` into ``work / "html"``, where neither MPI nor a network is to be had."""
    blocked = work / "blocked" / "mpi4py"
    blocked.mkdir(parents=True)
    (blocked / "__init__.py").touch()
    (blocked / "MPI.py").write_text("raise ImportError('the build of the pages imports MPI')\n")
    nowhere = "http://127.0.0.1:9"  # the port of "discard", where nobody listens
    variables = environment({"http_proxy": nowhere, "https_proxy": nowhere, "all_proxy": nowhere})
    variables["PYTHONPATH"] = f"{blocked.parent}:{ROOT}"
    # fmt: off
    command = [sys.executable, "-m", "sphinx", "-E", "-q", "-W", "--keep-going", "-d", str(work / "doctrees"),
               str(source), str(work / "html")]
    # fmt: on
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=240, check=False)


class Page(HTMLParser):
    """The anchors of a built page, the places its links lead to, and what a browser loads with it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: set[str] = set()
        self.loads: set[str] = set()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for attribute, value in attrs:
            if attribute == "id" and value:
                self.anchors.add(value)
            elif (tag, attribute) in FETCHED and value:
                self.loads.add(value)
            elif (tag, attribute) == ("a", "href") and value:
                self.links.add(value)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Page]:
    """The built pages by their paths; building them is the test of a strict build."""
    work = tmp_path_factory.mktemp("docs")
    done = build(DOCS, work)
    assert done.returncode == 0, done.stdout + done.stderr
    return {str(path.relative_to(work / "html")): Page(path) for path in (work / "html").rglob("*.html")}


@pytest.mark.long
def test_the_strict_build_passes(site: dict[str, Page]) -> None:
    assert {page.with_suffix(".html").name for page in PAGES if page.stem != "README"} <= site.keys()


@pytest.mark.long
def test_strict_means_that_links_anchors_and_names_are_looked_up(tmp_path: Path) -> None:
    """Without this, a setting that is lost would go unnoticed: all builds would pass."""
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(DOCS / "conf.py", source)
    (source / "index.md").write_text(
        "# Page\n\n[a](no-page.md) [b](#no-anchor) [c](../no-file.txt) {func}`mpisign.no_function`\n\n"
        "```{eval-rst}\n.. autofunction:: mpisign.no_member\n```\n"
    )
    done = build(source, tmp_path)
    assert done.returncode != 0
    for missing in ("no-page.md", "no-anchor", "no-file.txt", "mpisign.no_function", "no_member"):
        assert missing in done.stderr, f"nothing was said of {missing}:\n{done.stderr}"


@pytest.mark.long
def test_internal_links_and_anchors_are_alive(site: dict[str, Page]) -> None:
    dead = []
    for here, page in site.items():
        for link in page.links:
            to = urlsplit(link)
            if to.scheme or not link:
                continue
            target = (Path(here).parent / unquote(to.path)).as_posix() if to.path else here
            if target.startswith("_downloads/"):
                continue  # Sphinx has copied the file
            if target not in site or (to.fragment and unquote(to.fragment) not in site[target].anchors):
                dead.append(f"{here}: {link}")
    assert not dead


@pytest.mark.long
def test_links_into_the_pages_from_elsewhere_are_alive(site: dict[str, Page]) -> None:
    """From the README and its like, where anchors are those that GitHub makes of headings, as MyST does."""
    links = 0
    for file in (*ROOT.glob("*.md"), *ROOT.glob("*/README.md")):
        for page, anchor in re.findall(r"\]\((?:\.\./)?docs/([\w-]+)\.md(?:#([\w-]+))?\)", file.read_text()):
            assert f"{page}.html" in site, f"{file.name} links to docs/{page}.md"
            assert not anchor or anchor in site[f"{page}.html"].anchors, f"{file.name}: docs/{page}.md#{anchor}"
            links += 1
    assert links >= 20


@pytest.mark.long
def test_a_reader_needs_no_network(site: dict[str, Page]) -> None:
    elsewhere = {f"{here}: {file}" for here, page in site.items() for file in page.loads if urlsplit(file).netloc}
    assert not elsewhere


# --------------------------------------------------------------------------------------------------- the content


def entries() -> set[str]:
    """The anchors that the API page must have: every public name, and every public method of a public class."""
    found = set()
    for module in (mpisign, mpisign.checkpoint):
        for public in module.__all__:
            it = getattr(module, public)
            full = f"{module.__name__}.{public}"
            found.add(f"module-{full}" if inspect.ismodule(it) else full)
            if inspect.isclass(it):
                own = {
                    key for key, value in vars(it).items() if inspect.isfunction(value) or isinstance(value, property)
                }
                found |= {f"{full}.{key}" for key in own if not key.startswith("_")}
    return found


@pytest.mark.long
def test_every_public_name_is_on_the_api_page(site: dict[str, Page]) -> None:
    missing = entries() - site["api.html"].anchors
    assert not missing, f"add to docs/api.md: {sorted(missing)}"


def test_every_method_is_in_the_table_of_methods() -> None:
    spans = re.findall(r"`(\w+)", (DOCS / "methods.md").read_text())
    assert set(methods.__all__) <= set(spans)


def test_the_table_of_options_lists_what_the_code_accepts() -> None:
    page = (DOCS / "options.md").read_text()
    table = page.partition("| option | value |")[2].partition("\n\n")[0]
    known = inspect.signature(mpisign.DistributedSignOptimizer).parameters.keys() - {"optimizer", "named_parameters"}
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == known
    for choices in (policy.ZEROS, policy.TIE_RULES, choose.CHOICES):
        for choice in choices:
            assert f'`"{choice}"`' in table
    for option in inspect.signature(mpisign.init).parameters.keys() - {"comm"}:
        assert option in page


def test_every_variable_is_on_the_page_of_options() -> None:
    texts = [path.read_text() for path in (ROOT / "mpisign").rglob("*.py")]
    used = {name for text in texts for name in re.findall(r"""["'](MPISIGN_[A-Z_]+)["']""", text)}
    page = (DOCS / "options.md").read_text().partition("## Of the scripts")[0]
    listed = set(re.findall(r"^\| `(MPISIGN_[A-Z_]+)", page, re.MULTILINE))
    assert "MPISIGN_TIMELINE" in used
    assert listed == used - {"MPISIGN_EXIT_WORD"}  # by which `mpisign run` hears of its ranks' ends


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_names_in_a_page_exist(page: Path) -> None:
    """Also those that are plain code, which Sphinx does not look up."""
    for found in sorted(set(re.findall(r"\bmpisign(?:\.[A-Za-z_]\w*)+", page.read_text()))):
        of_integration = re.match(r"mpisign\.integrations\.(\w+)(?:\.(\w+))?", found)
        if of_integration:  # may need a package that is not here
            module, name = of_integration.groups()
            text = (ROOT / "mpisign" / "integrations" / f"{module}.py").read_text()
            assert name is None or re.search(rf"^(?:class|def) {name}\b", text, re.MULTILINE), found
        else:
            pkgutil.resolve_name(found)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_in_commands_exist(page: Path) -> None:
    for word in " ".join(code_blocks(page.read_text(), "bash")).split():
        if word.removeprefix("./").startswith(("scripts/", "benchmarks/", "slurm/", "docs/", "tests/")):
            assert (ROOT / word).exists(), f"{page.name} names {word}, which is not there"


# ---------------------------------------------------------------------------------------------------- what runs


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_no_code_hides_in_a_block_of_another_name(page: Path) -> None:
    fences = re.findall(r"^ *```+(.*)$", page.read_text(), flags=re.MULTILINE)
    assert {fence.split()[0] if fence else "" for fence in fences} <= LANGUAGES


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_an_output_follows_what_prints_it(page: Path) -> None:
    text = page.read_text()
    shown = [output for language in ("python", "bash") for _, output in examples(text, language) if output is not None]
    assert len(code_blocks(text, "output")) == len(shown)


def test_a_command_prints_what_follows_it() -> None:
    """Those of one process: what ranks say of themselves is another thing each time."""
    shown = [(code, output) for page in PAGES for code, output in examples(page.read_text(), "bash") if output]
    assert shown
    for command, output in shown:
        program, *options = shlex.split(command, comments=True)
        assert program == "python", command
        done = subprocess.run(
            [sys.executable, *options], env=environment(), capture_output=True, text=True, timeout=120, check=False
        )
        assert done.stdout.rstrip() == output.rstrip(), done.stderr


def test_both_sides_of_a_diff_are_scripts() -> None:
    diffs = [(page, diff) for page in PAGES for diff in code_blocks(page.read_text(), "diff")]
    assert len(diffs) >= 2
    for page, diff in diffs:
        for side in (before(diff), after(diff)):
            compile(side, page.name, "exec")


RUN = """
import contextlib, io, json, runpy, sys, mpisign
out, *scripts = sys.argv[1:]
printed = {}
for script in scripts:
    sys.argv = [script]
    with contextlib.redirect_stdout(io.StringIO()) as text:
        runpy.run_path(script, run_name="__main__")
    if mpisign.is_initialized() and mpisign.rank() == 0:
        printed[script] = text.getvalue().split("\\f\\n")
        with open(out, "w") as file:
            json.dump(printed, file)
    mpisign.shutdown()
print("ended")
"""


def test_a_timeline_is_drawn(tmp_path: Path) -> None:
    row = {"ph": "M", "name": "thread_name", "pid": 0, "tid": 1, "args": {"name": "exchange"}}
    span = {"ph": "X", "name": "handshake", "pid": 0, "tid": 1, "ts": 5.0, "dur": 2.0, "args": {"step": 3}}
    (tmp_path / "trace.json").write_text(json.dumps({"traceEvents": [row, span]}))
    command = [sys.executable, DOCS / "draw_timeline.py", tmp_path / "trace.json", tmp_path / "picture.svg", "3"]
    subprocess.run(command, env=environment(), timeout=120, check=True)
    assert "rank 0, exchange" in (tmp_path / "picture.svg").read_text()  # in a comment that names the text


@pytest.mark.long
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_blocks_of_each_page_run(tmp_path: Path, ranks: int) -> None:
    """The Python blocks of a page are one script, and each diff makes another; all run in turn, in one job.

    What a block prints on rank 0 of three is the block of output that follows it.
    """
    scripts: dict[str, list[tuple[str, str | None]]] = {}
    for page in PAGES:
        if page.stem in OF_FRAMEWORKS:
            continue
        text = page.read_text()
        if blocks := examples(text):
            scripts[str(tmp_path / f"{page.stem}.md.py")] = blocks
        for place, diff in enumerate(code_blocks(text, "diff")):
            scripts[str(tmp_path / f"{page.stem}.{place}.diff.py")] = [(after(diff), None)]
    assert len(scripts) >= 5
    for path, blocks in scripts.items():
        Path(path).write_text('print("\\f")\n'.join(code for code, _ in blocks))
    driver, out = tmp_path / "driver.py", tmp_path / "printed.json"
    driver.write_text(RUN)
    result = mpirun(ranks, driver, out, *scripts)
    assert result.returncode == 0, result.text
    assert result.text.splitlines().count("ended") == ranks
    if ranks == 3:
        printed = json.loads(out.read_text())
        shown = [(path, place, block[1]) for path, blocks in scripts.items() for place, block in enumerate(blocks)]
        checked = [(path, place, output) for path, place, output in shown if output is not None]
        assert [(path, place, printed[path][place]) for path, place, _ in checked] == checked
