"""The code blocks of a Markdown text, for the tests that run them."""

from __future__ import annotations

import re

__all__ = ["code_blocks"]


def code_blocks(text: str, language: str) -> list[str]:
    """What stands between the fences of each block that is marked with ``language``, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
