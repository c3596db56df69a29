"""Whatever waits for other ranks is watched: calls of MPI's that block are made under a guard, the others by wait().

That each entry names who is missing is in test_stalls.py.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import mpisign

ROOT = Path(mpisign.__file__).parent
BLOCKING = {
    *("Dup", "Split", "Split_type", "Create", "Create_group", "Free", "Shrink", "Agree"),
    *("Allgather", "Allgatherv", "Allreduce", "Alltoall", "Barrier", "Bcast", "Gather", "Gatherv", "Reduce", "Scatter"),
    *("Recv", "Send", "Sendrecv", "Ssend", "Probe", "Mprobe", "Wait", "Waitall", "Waitany"),
}
GUARDS = {"guard", "guard_start"}
UNGUARDED = {
    ("presence.py", "listen"),  # a message that is here, or a notice of some bytes
    ("presence.py", "drain"),  # its callers guard it
    ("cuts.py", "block_type"),  # Free of a datatype is no communication
    ("cuts.py", "_free"),  # likewise
}
APART = {"attacks.py"}  # for experiments; nothing of the library


def unwatched(path: Path) -> Iterator[tuple[str, str, int, str]]:
    """Blocking calls outside of a guard: file, function, line and call."""

    def walk(node: ast.AST, function: str, guarded: bool) -> Iterator[tuple[str, str, int, str]]:
        if isinstance(node, ast.FunctionDef):
            function, guarded = node.name, False
        if isinstance(node, ast.With):
            guarded |= any(
                isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr in GUARDS
                for item in node.items
                for call in ast.walk(item.context_expr)
            )
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in BLOCKING
            and not guarded
            and (path.name, function) not in UNGUARDED
        ):
            yield path.name, function, node.lineno, node.func.attr
        for child in ast.iter_child_nodes(node):
            yield from walk(child, function, guarded)

    yield from walk(ast.parse(path.read_text()), "", False)


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_calls_that_block_are_guarded(path: Path) -> None:
    assert path.name in APART or not list(unwatched(path))


def test_there_is_something_to_guard(tmp_path: Path) -> None:
    path = tmp_path / "group.py"
    path.write_text(
        "def form(comm, watchdog):\n"
        "    comm.Split(1, 2)\n"
        "    with watchdog.guard('a split'):\n"
        "        comm.Split(1, 2)\n"
    )
    assert list(unwatched(path)) == [("group.py", "form", 2, "Split")]
