"""The code blocks of a Markdown text, for the tests that run them."""

from __future__ import annotations

import re

__all__ = ["after", "before", "code_blocks", "examples"]


def code_blocks(text: str, language: str) -> list[str]:
    """What stands between the fences of each block that is marked with ``language``, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def examples(text: str, language: str = "python") -> list[tuple[str, str | None]]:
    """Each such block with what it shall print: the block marked ``output`` that follows it, or None."""
    pattern = rf"^```{language}\n(.*?)^```$(?:\n\n```output\n(.*?)^```$)?"
    return [(code, output or None) for code, output in re.findall(pattern, text, flags=re.MULTILINE | re.DOTALL)]


def before(diff: str) -> str:
    """What a diff of a whole file was."""
    return _without(diff, "+")


def after(diff: str) -> str:
    """What a diff of a whole file makes of it."""
    return _without(diff, "-")


def _without(diff: str, mark: str) -> str:
    return "\n".join(line[1:] for line in diff.splitlines() if not line.startswith(mark)) + "\n"
