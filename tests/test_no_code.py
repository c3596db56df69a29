"""Nothing that another rank or a file says is run: no pickles but users' own, no code from text."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import mpisign

ROOT = Path(mpisign.__file__).parent
MODULES = sorted(str(path.relative_to(ROOT)) for path in ROOT.rglob("*.py"))
MAY_PICKLE = "talk.py"  # broadcast_object() and allgather_object(), which can be turned off
PICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
OF_OBJECTS = {  # mpi4py's, which pickle; those with a capital letter take buffers
    *("bcast", "gather", "scatter", "allgather", "alltoall", "reduce", "allreduce", "scan", "exscan"),
    *("send", "recv", "isend", "irecv", "bsend", "ssend", "ibsend", "issend", "sendrecv", "mprobe", "improbe"),
}


def called(tree: ast.AST) -> Iterator[tuple[ast.Call, str, str]]:
    """Every call with what it is called on, and the name: ``torch.load(...)`` is ("torch", "load")."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Attribute):
                yield node, ast.unparse(node.func.value), node.func.attr
            elif isinstance(node.func, ast.Name):
                yield node, "", node.func.id


def faults(text: str) -> list[str]:
    """What in a module could run what somebody else has sent or written."""
    tree, found = ast.parse(text), []
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
        found += [f"import of {name}" for name in names if name.partition(".")[0] in PICKLERS]
    for call, owner, name in called(tree):
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        if name in OF_OBJECTS and owner:  # without an owner it is none of a communicator's
            found.append(f"{owner}.{name}()")
        if name == "load" and owner == "torch" and options.get("weights_only") != "True":
            found.append("torch.load() of anything")
        if (not owner and name in ("eval", "exec", "compile", "__import__")) or name == "system":
            found.append(f"{name}()")
        if name == "load" and owner in ("np", "numpy") and options.get("allow_pickle", "False") != "False":
            found.append("numpy.load() of pickles")
        if options.get("shell", "False") != "False":
            found.append("a shell")
    return found


def test_faults_are_seen() -> None:
    for text in (
        "import pickle",
        "from pickle import loads",
        "import pickle as p",
        "comm.bcast(1)",
        "self.group.comm.allgather(x)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "eval(text)",
        "exec(text)",
        "np.load(path, allow_pickle=True)",
        "subprocess.run(text, shell=True)",
    ):
        assert faults(text), text
    assert not faults("comm.Allgather(x, y); torch.load(path, weights_only=True); re.compile(text)")


@pytest.mark.parametrize("module", MODULES)
def test_nothing_that_is_heard_or_read_is_run(module: str) -> None:
    found = faults((ROOT / module).read_text())
    assert [fault for fault in found if not (module == MAY_PICKLE and fault == "import of pickle")] == []


def test_one_place_unpickles() -> None:
    """In the two functions for users' objects alone, after they have looked whether they may."""
    tree = ast.parse((ROOT / MAY_PICKLE).read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    using = [it.name for it in functions if any(owner == "pickles" for _, owner, _ in called(it))]
    assert sorted(using) == ["gather_objects", "spread_object"]
    for function in functions:
        if function.name in using:
            first = next(node for node in function.body if not isinstance(getattr(node, "value", None), ast.Constant))
            assert ast.unparse(first) == "self._check_pickle(act)"
