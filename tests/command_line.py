"""What the flags of the training scripts give for a command line."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from types import ModuleType


def arguments(flags: ModuleType, *options: str | Path) -> argparse.Namespace:
    """Two epochs of batches of 4, if the options do not say otherwise."""
    parser = argparse.ArgumentParser()
    flags.add_flags(parser, epochs=2, batch_size=4)
    before, sys.argv = sys.argv, ["train.py", *map(str, options)]
    try:
        return flags.parse(parser)
    finally:
        sys.argv = before
