"""What a user sees of the package: its names, its help, the types of options and of what comes back."""

from __future__ import annotations

import inspect
import pydoc
import re
import textwrap
from types import ModuleType

import pytest

import mpisign

FUNCTIONS = {name: it for name in mpisign.__all__ if inspect.isfunction(it := getattr(mpisign, name))}
METHODS = {
    name: it
    for name, it in vars(mpisign.DistributedSignOptimizer).items()
    if inspect.isfunction(it) and (name == "__init__" or not name.startswith("_"))
}
FREE = {"name", "path"}  # any text will do
WHATEVER = {"broadcast_object", "average"}  # gives what rank 0 has; has overloads


def test_the_names_that_complete_are_the_public_ones() -> None:
    assert dir(mpisign) == sorted(mpisign.__all__)
    assert [name for name in dir(mpisign) if isinstance(getattr(mpisign, name), ModuleType)] == ["checkpoint"]


def test_help_begins_with_an_example() -> None:
    text = pydoc.plain(pydoc.render_doc(mpisign))
    first = text.index("Example::")
    assert text[:first].count("\n") < 10
    assert first < text.index("PACKAGE CONTENTS")
    assert mpisign.__doc__
    example = textwrap.dedent(mpisign.__doc__.partition("Example::\n\n")[2].partition("\nStart it")[0])
    compile(example, "help", "exec")
    for name in re.findall(r"mpisign\.(\w+)", example):
        assert name in mpisign.__all__


@pytest.mark.parametrize("name", [*FUNCTIONS, *METHODS])
def test_choices_are_literals_and_results_have_types(name: str) -> None:
    signature = inspect.signature((FUNCTIONS | METHODS)[name])
    for option, parameter in signature.parameters.items():
        texts = re.fullmatch(r"(bool \| )?str( \| None)?", str(parameter.annotation))
        assert not texts or option in FREE, f"{name}({option}: {parameter.annotation})"
    assert signature.return_annotation != "Any" or name in WHATEVER
    assert signature.return_annotation is not signature.empty
