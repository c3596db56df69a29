"""The scripts on the pages of the integrations that need other packages, each a job of its own."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
from code_blocks import code_blocks
from mpirun import mpirun

import mpisign

ROOT = Path(__file__).parents[1]
INTEGRATIONS = Path(mpisign.__file__).parent / "integrations"
PACKAGES = {"lightning": ["lightning"], "huggingface": ["transformers", "accelerate"]}


@pytest.mark.long
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("page", PACKAGES)
def test_the_script_of_a_page_runs(tmp_path: Path, page: str, ranks: int) -> None:
    missing = [name for name in PACKAGES[page] if find_spec(name) is None]
    if missing:
        pytest.skip(f"needs {missing}: pip install '.[integrations]'")
    script = tmp_path / f"train_with_{page}.py"
    # Where torchvision does not load (see there), frameworks that import it would not, either.
    before = f"import sys; sys.path.insert(0, {str(ROOT / 'tests' / 'mpi')!r}); import frameworks\n"
    before += "frameworks.declare_operators()\n"
    blocks = code_blocks((ROOT / "docs" / f"{page}.md").read_text(), "python")
    script.write_text(before + "\n".join(blocks) + "\nprint('ended')\n")
    result = mpirun(ranks, script, cwd=tmp_path, timeout=240)
    assert result.returncode == 0, result.text
    assert result.text.count("ended") == ranks


def test_no_integration_is_loaded_with_the_library() -> None:
    """Nor needs one that torch alone suffices for any other package."""
    texts = {path.stem: path.read_text() for path in INTEGRATIONS.glob("*.py")}
    assert set(PACKAGES) < set(texts)
    others = ("lightning", "transformers", "accelerate", "torchmetrics")
    needy = {name for name, text in texts.items() if any(f"\nfrom {its}" in text for its in others)}
    assert needy == {"lightning", "huggingface", "metrics"}
