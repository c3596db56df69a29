"""Manifests are checked field by field before anything is made of them, and files are regular files or refused."""

from __future__ import annotations

import json
import os
import socket
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import saved_twice

from mpisign import CheckpointError
from mpisign.checkpoint.directory import Manifest
from mpisign.checkpoint.files import read_json, write_json

pytestmark = pytest.mark.usefixtures("world")

GOOD = {
    "format": "mpisign checkpoint",
    "version": 1,
    "step": 4,
    "ranks": 1,
    "serial": 2,
    "files": {"shared.pt": {"bytes": 3, "crc32": 4}, "rank-00000.pt": {"bytes": 5, "crc32": 6}},
}
FOREIGN: list[Any] = [None, "text", 1.5, True, -1, 10**30, float("nan"), [], {}, [[[]]], {"a": {"b": []}}, "x" * 10_000]


def written(folder: Path, content: Any) -> Path:
    """A folder with a manifest whose own checksum is right."""
    folder.mkdir(exist_ok=True)
    write_json(folder / "manifest.json", content)
    return folder


def changed(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """GOOD with one field replaced, or without it."""
    content = json.loads(json.dumps(GOOD))
    inside = content
    for key in path[:-1]:
        inside = inside[key]
    if value is KeyError:
        del inside[path[-1]]
    else:
        inside[path[-1]] = value
    return content


def fields(tree: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The place of everything in it."""
    inside = (
        [place for key, its in tree.items() for place in fields(its, (*path, key))] if isinstance(tree, dict) else []
    )
    return [path, *inside] if path else inside


def test_a_good_one(tmp_path: Path) -> None:
    assert Manifest.read(written(tmp_path / "it", GOOD)).as_json() == {
        key: value for key, value in GOOD.items() if key not in ("format", "version")
    }


@pytest.mark.parametrize("path", fields(GOOD), ids="/".join)
def test_every_field_is_checked_and_named(tmp_path: Path, path: tuple[str, ...]) -> None:
    for value in (KeyError, *FOREIGN):
        folder = written(tmp_path / "it", changed(path, value))
        with pytest.raises(CheckpointError) as refused:
            Manifest.read(folder)
        said = str(refused.value)
        named = "shared.pt" if "shared.pt" in path else "rank-00000.pt" if "rank-00000.pt" in path else path[0]
        assert "manifest.json" in said
        assert any(name in said for name in (named, "format" if path == ("version",) else named, "files")), said
        assert len(said) < 1000


@pytest.mark.parametrize("name", ["../shared.pt", "/etc/passwd", "rank-0.pt", "rank-00001.pt", "shared.pt ", ""])
def test_names_are_just_the_expected_ones(tmp_path: Path, name: str) -> None:
    content = changed(("files", "rank-00000.pt"), KeyError)
    content["files"][name] = {"bytes": 5, "crc32": 6}
    with pytest.raises(CheckpointError, match=r"files\['rank-00000\.pt'\] is missing"):
        Manifest.read(written(tmp_path / "it", content))


def test_a_claim_of_many_ranks_costs_nothing(tmp_path: Path) -> None:
    folder = written(tmp_path / "it", changed(("ranks",), 2_000_000))
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match="ranks is 2000000, and files has 2 instead of 2000001"):
            Manifest.read(folder)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"null",
        b"3",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        b"9" * 100_000,
    ],
    ids=["empty", "list", "null", "number", "no text", "deep", "deep object", "long number"],
)
def test_what_is_no_manifest(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged, or of another program"):
        Manifest.read(tmp_path)


def test_one_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").touch()
    os.truncate(tmp_path / "manifest.json", 1 << 40)
    with pytest.raises(CheckpointError, match="damaged"):
        Manifest.read(tmp_path)


# ------------------------------------------------------------------------------------------------ no regular files


def a_pipe(file: Path, kept: Path) -> None:
    os.mkfifo(file)


def a_folder(file: Path, kept: Path) -> None:
    file.mkdir()


def a_link(file: Path, kept: Path) -> None:
    file.symlink_to(kept)


def a_dead_link(file: Path, kept: Path) -> None:
    file.symlink_to("nowhere")


def a_device(file: Path, kept: Path) -> None:
    file.symlink_to("/dev/zero")


def a_socket(file: Path, kept: Path) -> None:
    with socket.socket(socket.AF_UNIX) as it:
        os.chdir(file.parent)  # its path may be too long
        it.bind(file.name)


KINDS = [a_pipe, a_folder, a_link, a_dead_link, a_device, a_socket]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("name", ["manifest.json", "shared.pt", "rank-00000.pt"])
def test_what_is_no_regular_file_is_refused_without_waiting(
    tmp_path: Path, name: str, kind: Callable[[Path, Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    job, _ = saved_twice(tmp_path / "it")
    file = tmp_path / "it" / "step-00000004" / name
    kept = tmp_path / name
    file.rename(kept)
    kind(file, kept)
    with pytest.raises(CheckpointError, match=rf"{name} cannot be read: .*no regular file.*step-00000002"):
        job.load(tmp_path / "it" / "step-00000004")
    with pytest.warns(UserWarning, match=f"{name} cannot be read"):
        assert job.load(tmp_path / "it").step == 2


def test_a_pipe_in_the_place_of_a_directory(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    os.mkfifo(tmp_path / "step-00000001")
    job, _ = saved_twice(tmp_path)
    for path in (tmp_path / "pipe", tmp_path / "step-00000001", tmp_path / "step-00000001" / "step-00000002"):
        with pytest.raises(CheckpointError, match=r"cannot be read|no good checkpoint"):
            job.load(path)
    assert job.load(tmp_path).step == 4
    with pytest.raises(CheckpointError, match="step 5 is not saved"):
        job.save(tmp_path / "pipe", step=5)
    with pytest.raises(OSError, match="no regular file"):
        read_json(tmp_path / "pipe")


# ------------------------------------------------------------------------------------------- what files are to hold


def resaved(folder: Path, name: str, content: Any) -> None:
    """Another content, with stamps that are right."""
    from mpisign.checkpoint.files import write_tensors

    (folder / name).unlink()
    manifest = Manifest.read(folder)
    manifest.files[name] = write_tensors(folder / name, content)
    manifest.write(folder)


@pytest.mark.parametrize(
    ("name", "part"),
    [(name, part) for name, parts in (
        ("shared.pt", ("model", "optimizer", "scheduler", "scaler", "step", "extra")),
        ("rank-00000.pt", ("mpisign", "buffers", "scaler", "random")),
    ) for part in parts],
)  # fmt: skip
def test_every_part_of_a_file_is_checked_and_named(tmp_path: Path, name: str, part: str) -> None:
    job, _ = saved_twice(tmp_path)
    folder = tmp_path / "step-00000004"
    good = torch.load(folder / name, weights_only=True)
    resaved(folder, name, {key: value for key, value in good.items() if key != part})
    with pytest.raises(CheckpointError, match=rf"does not fit: rank 0 .*{name}: '{part}' is missing"):
        job.load(folder)
    for value in (3, [[]], {"unknown": [torch.ones(2)]}) if part != "extra" else ():  # that is the user's own
        resaved(folder, name, {**good, part: value})
        if part == "scaler" or (part == "scheduler" and isinstance(value, dict)):  # there is none; torch's takes any
            job.load(folder)
            job.train(6)
        else:
            with pytest.raises(CheckpointError, match=part):
                job.load(folder)


def test_a_file_of_another_step(tmp_path: Path) -> None:
    job, _ = saved_twice(tmp_path)
    folder = tmp_path / "step-00000004"
    resaved(folder, "shared.pt", torch.load(tmp_path / "step-00000002" / "shared.pt", weights_only=True))
    with pytest.raises(CheckpointError, match=r"shared\.pt is not of step 4"):
        job.load(folder)
