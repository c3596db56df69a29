"""Warnings that point at the user's own line, however many functions of torch and the library lie between."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from pathlib import Path

import torch

__all__ = ["warn"]

BETWEEN = (*(f"{Path(file).parent}{os.sep}" for file in (__file__, str(torch.__file__))), contextlib.__file__)
"""Where files lie whose lines are nobody's that could be told."""


def warn(message: str) -> None:
    """Warn, naming the innermost line that belongs neither to the library nor to torch."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(BETWEEN):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
