"""mpisign.encoding: what other ranks send is taken only in the shape that is expected."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest

from mpisign import encoding
from mpisign.encoding import Optional, decode, encode, fits
from mpisign.errors import ConsistencyError

FIT: list[tuple[Any, Any]] = [
    ("text", str),
    (3, int),
    (True, bool),
    (0.5, float),
    (float("inf"), float),
    ([], [int]),
    ([1, 2], [int]),
    (["a", 1], (str, int)),
    ({"a": 1, "b": 2}, {str: int}),
    ({"a": 1, "b": ["x"]}, {"a": int, "b": [str]}),
    (None, Optional(str)),
    ("text", Optional(str)),
    ({"anything": [1, None]}, object),
]
UNFIT: list[tuple[Any, Any]] = [
    (3, str),
    (True, int),
    (1, bool),
    (1, float),
    ([1, "a"], [int]),
    ({}, [int]),
    (["a"], (str, int)),
    (["a", 1, 2], (str, int)),
    ({"a": "1"}, {str: int}),
    ([], {str: int}),
    ({"a": 1}, {"a": int, "b": int}),
    ({"a": 1, "b": 2, "c": 3}, {"a": int, "b": int}),
    (None, str),
    (1, Optional(str)),
]


@pytest.mark.parametrize(("value", "schema"), FIT)
def test_what_fits_arrives_as_it_was(value: Any, schema: Any) -> None:
    assert decode(encode(value), schema, 0) == value


@pytest.mark.parametrize(("value", "schema"), UNFIT)
def test_what_does_not_fit_is_refused_by_the_senders_name(value: Any, schema: Any) -> None:
    assert not fits(value, schema)
    with pytest.raises(ConsistencyError, match=r"rank 5 has sent \d+ bytes that are no message of mpisign's"):
        decode(encode(value), schema, 5)


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"\xff\xfe\x00",
        b"{",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"9" * 100_000,
        pickle.dumps(print),
        json.dumps("x").encode("utf-16"),
    ],
    ids=["nothing", "no text", "half", "deep list", "deep dict", "long number", "pickle", "utf-16"],
)
@pytest.mark.parametrize(
    "schema", [str, int, [str], {str: int}, Optional({"a": [str]})], ids=["text", "number", "list", "dict", "optional"]
)
def test_arbitrary_bytes_are_an_error_and_nothing_else(message: bytes, schema: Any) -> None:
    if json.detect_encoding(message) != "utf-8" and schema is str:
        pytest.skip("JSON may be UTF-16")
    with pytest.raises(ConsistencyError, match="rank 1 has sent"):
        decode(message, schema, 1)


def test_what_is_shown_of_others_is_printable() -> None:
    assert encoding.printable("a\x1b[31mb\nc\td\x00") == "a?[31mb\nc\td?"
