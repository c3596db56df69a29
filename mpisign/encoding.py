"""What ranks say to each other besides numbers and bits: JSON of a known shape and size, never code.

A pickle runs what its sender likes. So whatever the library itself says travels as JSON that the receiver checks
against a schema before it looks at a value; only a user's own objects are pickled.
"""

from __future__ import annotations

import json
from typing import Any

from mpisign.errors import ConsistencyError

__all__ = ["LIMIT_BYTES", "Optional", "decode", "encode", "fits", "printable"]

LIMIT_BYTES = 64 << 20
"""The longest message that is taken from a rank."""


class Optional:
    """In a schema: None, or what ``schema`` says."""

    def __init__(self, schema: Any) -> None:
        self.schema = schema


def encode(value: Any) -> bytes:
    """Plain values as JSON."""
    return json.dumps(value, separators=(",", ":")).encode()


def decode(message: bytes, schema: Any, sender: int) -> Any:
    """The value in a message.

    Args:
        schema: a type (``str``, ``int``, ``bool``, ``float``), ``[schema]`` for a list of such, a tuple of schemas for
            a list of just these, ``{str: schema}`` for any keys, ``{"key": schema, ...}`` for just these,
            :class:`Optional`, or ``object`` for anything.

    Raises:
        ConsistencyError: it is not of that shape; names ``sender``.
    """
    try:
        value = json.loads(message)
    except (ValueError, RecursionError, MemoryError):
        value, whole = None, False
    else:
        whole = fits(value, schema)
    if not whole:
        raise ConsistencyError(
            f"rank {sender} has sent {len(message)} bytes that are no message of mpisign's ({message[:32]!r}...): run "
            f"the same version on every rank, and only processes that you trust"
        )
    return value


def fits(value: Any, schema: Any) -> bool:  # noqa: PLR0911 - a line a kind
    """Whether a value from JSON has the shape that a schema (see :func:`decode`) says."""
    if schema is object:
        return True
    if isinstance(schema, Optional):
        return value is None or fits(value, schema.schema)
    if isinstance(schema, list):
        return isinstance(value, list) and all(fits(item, schema[0]) for item in value)
    if isinstance(schema, tuple):
        return (
            isinstance(value, list)
            and len(value) == len(schema)
            and all(fits(item, its) for item, its in zip(value, schema, strict=True))
        )
    if isinstance(schema, dict):
        if not isinstance(value, dict):
            return False
        if str in schema:
            return all(fits(item, schema[str]) for item in value.values())
        return value.keys() == schema.keys() and all(fits(value[key], its) for key, its in schema.items())
    return type(value) is schema


def printable(text: str) -> str:
    """Another rank's words, fit for this one's terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text)
