"""The ImageNet job on a small folder of real JPEG files, with the smallest model of ResNet-50's family."""

from __future__ import annotations

import csv
import importlib
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from mpirun import Job, mpirun, started
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import mpisign

SCRIPT = Path(__file__).parents[1] / "scripts" / "train_imagenet.py"
SMALL = ("--model", "resnet18", "--crop", "32", "--batch-size", "8", "--warmup-epochs", "0", "--quiet")
EPOCHS = 7  # enough to be stopped before the end, also by who is kept waiting for a core
LAST = 5 * EPOCHS


def write_images(root: Path, images: dict[str, int]) -> Path:
    """A folder like ImageNet's, of two classes, bright and dark; ``images`` by part, one less of the bright."""
    generator = np.random.default_rng(0)
    for part, number in images.items():
        for name, light in (("n01440764", 130), ("n01443537", 0)):
            folder = root / part / name
            folder.mkdir(parents=True)
            for at in range(number - (light > 0)):
                height, width = generator.integers(36, 60, 2)
                pixels = generator.integers(0, 120, (height, width, 3)) + light
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{name}_{at}.JPEG")
    return root


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("imagenet"), {"train": 40, "val": 11})


@pytest.fixture
def imagenet(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    return importlib.import_module("train_imagenet")


@pytest.fixture
def run_here(imagenet: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Runs the script's main() with a command line, in a job of this process alone."""

    def run(*options: str | Path) -> None:
        monkeypatch.setattr(sys, "argv", ["train_imagenet.py", *map(str, options)])
        imagenet.main()

    yield run
    mpisign.shutdown()


def table(path: Path) -> list[dict[str, float]]:
    with open(path) as file:
        return [{name: float(cell) for name, cell in row.items()} for row in csv.DictReader(file)]


def assert_same_checkpoint(one: Path, other: Path) -> None:
    """The same bits: parameters, momentum, BatchNorm's statistics of each rank, ..."""
    files = sorted(path.name for path in one.glob("*.pt"))
    assert files == sorted(path.name for path in other.glob("*.pt"))
    assert "rank-00001.pt" in files
    for name in files:
        content, others = (dict(leaves(torch.load(folder / name, weights_only=True))) for folder in (one, other))
        assert content.keys() == others.keys()
        for place, value in content.items():
            same = torch.equal(value, others[place]) if isinstance(value, torch.Tensor) else value == others[place]
            assert same, f"{place} in {name}"


def leaves(tree: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Everything but Python's and NumPy's own generators, which nobody seeds or uses here."""
    if place in ("/random/python", "/random/numpy"):
        return
    if isinstance(tree, (dict, list, tuple)):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from leaves(value, f"{place}/{key}")
    else:
        yield place, tree


def is_rank(words: list[str]) -> bool:
    return words[0].endswith("python") and str(SCRIPT) in words


def tell_all(job: Job, steps: Callable[[int], None]) -> None:
    """SIGTERM for every process there is, first for those that load images: they must not die of it."""
    python = [pid for pid, words in commands(job).items() if words[0].endswith("python")]
    ranks = [pid for pid, words in commands(job).items() if is_rank(words)]
    assert len(ranks) == 2
    assert len(python) >= 2 + 2 * 3, "each rank has workers, their server, and Python's tracker of resources"
    for pid in set(python) - set(ranks):
        os.kill(pid, signal.SIGTERM)
    steps(5)
    for pid in ranks:
        os.kill(pid, signal.SIGTERM)


def tell_one(job: Job, steps: Callable[[int], None]) -> None:
    """SIGUSR1 for one rank."""
    os.kill(max(pid for pid, words in commands(job).items() if is_rank(words)), signal.SIGUSR1)


def commands(job: Job) -> dict[int, list[str]]:
    return {pid: Path(f"/proc/{pid}/cmdline").read_text().split("\0") for pid in job.processes()}


@pytest.mark.long
@pytest.mark.parametrize(
    "options, tell",
    [
        (("--method", "lion:beta1=0.9,beta2=0.95", "--lr", "1e-3"), tell_all),
        (("--baseline", "ddp", "--lr", "0.02", "--precision", "bf16"), tell_one),
    ],
    ids=["vote", "ddp"],
)
def test_stopped_by_the_queue_it_ends_with_the_same_bits(
    images: Path, tmp_path: Path, options: tuple[str, ...], tell: Callable[[Job, Callable[[int], None]], None]
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    command = (SCRIPT, *SMALL, *options, "--data", images, "--epochs", str(EPOCHS), "--log-every", "1")

    def places(folder: Path) -> tuple[str | Path, ...]:
        return "--checkpoint-dir", folder / "checkpoints", "--log-dir", folder

    done = mpirun(2, *command, *places(whole), "--workers", "0", "--async-save")
    assert done.returncode == 0, done.text
    steps, evaluations = table(whole / "train.csv"), table(whole / "eval.csv")
    assert [row["step"] for row in steps] == list(range(1, LAST + 1))
    assert [row["step"] for row in evaluations] == list(range(5, LAST + 1, 5))
    assert steps[-1]["loss"] < 0.3 < steps[0]["loss"]
    assert re.findall(r"epoch (\d): loss", done.text) == [str(epoch + 1) for epoch in range(EPOCHS)]

    with started(2, *command, *places(stopped), "--workers", "1") as job:
        log = stopped / "train.csv"

        def wait_for_steps(more: int) -> None:
            before = log.read_text().count("\n") if log.exists() else 1
            while not log.exists() or log.read_text().count("\n") < before + more:
                assert job.process.poll() is None, job.text()
                time.sleep(0.02)

        wait_for_steps(2)
        tell(job, wait_for_steps)
        assert job.wait(60).returncode == 85, job.text()
        assert re.search(rf"train_imagenet.py: stopped by a signal; step \d+ of {LAST} is saved in", job.text())
        assert "Traceback" not in job.text()
        assert not job.orphans()
    done = mpirun(2, *command, *places(stopped), "--workers", "0")
    assert done.returncode == 0, done.text
    assert_same_checkpoint(*(folder / "checkpoints" / f"step-{LAST:08d}" for folder in (whole, stopped)))
    assert table(stopped / "eval.csv") == evaluations
    assert [row["loss"] for row in table(stopped / "train.csv")] == [row["loss"] for row in steps]


@pytest.mark.long
def test_evaluation_counts_every_image_once(images: Path, tmp_path: Path, imagenet: ModuleType) -> None:
    done = mpirun(
        2, SCRIPT, *SMALL, "--data", images, "--epochs", "1", "--workers", "0", "--lr", "3e-4",
        "--checkpoint-dir", tmp_path, "--log-dir", tmp_path, "--tensorboard",
    )  # fmt: skip
    assert done.returncode == 0, done.text
    (logged,) = table(tmp_path / "eval.csv")

    torchvision = imagenet.torchvision
    transforms = torchvision.transforms
    look = [transforms.Resize(36), transforms.CenterCrop(32), transforms.ToTensor()]
    look.append(transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    pairs = list(torchvision.datasets.ImageFolder(str(images / "val"), transforms.Compose(look)))
    assert len(pairs) == 21, "one rank has one more than the other"
    model = torchvision.models.resnet18(num_classes=2).eval()
    model.load_state_dict(torch.load(tmp_path / "step-00000005" / "shared.pt", weights_only=True)["model"])
    labels = torch.tensor([label for _, label in pairs])
    with torch.no_grad():
        logits = model(torch.stack([image for image, _ in pairs]))
    assert logged["top1"] == pytest.approx(100 * float((logits.argmax(1) == labels).double().mean()))
    assert logged["top5"] == 100
    assert logged["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-4)

    board = EventAccumulator(str(tmp_path)).Reload()
    for part in ("train", "eval"):
        row = table(tmp_path / f"{part}.csv")[-1]
        for name in row.keys() - {"step", "epoch"}:
            scalar = board.Scalars(f"{part}/{name}")[-1]
            assert (scalar.step, scalar.value) == (5, pytest.approx(row[name], rel=1e-6))


@pytest.mark.long
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_noise_for_a_measurement(run_here: Callable[..., None], tmp_path: Path, precision: str) -> None:
    run_here(
        *SMALL, "--data", "synthetic", "--synthetic-images", "16", "--epochs", "2", "--max-steps", "3",
        "--workers", "0", "--precision", precision, "--no-channels-last", "--log-every", "1", "--log-dir", tmp_path,
    )  # fmt: skip
    assert [row["step"] for row in table(tmp_path / "train.csv")] == [1, 2, 3]
    assert [row["epoch"] for row in table(tmp_path / "eval.csv")] == [1]


def test_noise_is_another_for_each_image(imagenet: ModuleType) -> None:
    noise = imagenet.Noise(5000, 32, 1000)
    images = torch.stack([noise[index][0] for index in range(0, 4096, 7)])
    assert images.shape[1:] == (3, 32, 32)
    assert len(images.flatten(1).unique(dim=0)) == len(images)
    assert [noise[index][1] for index in (0, 999, 1000, 4999)] == [0, 999, 0, 999]


def read_arguments(imagenet: ModuleType, monkeypatch: pytest.MonkeyPatch, *options: str) -> Any:
    monkeypatch.setattr(sys, "argv", ["train_imagenet.py", "--data", "synthetic", *options])
    return imagenet.parse_arguments()


def test_hyper_parameters_are_the_papers(world: None, imagenet: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    vote = read_arguments(imagenet, monkeypatch)
    assert (vote.model, vote.batch_size, vote.method) == ("resnet50", 128, mpisign.signum(0.9))
    assert (vote.lr, vote.momentum, vote.weight_decay) == (1e-4, 0, 0.1)
    assert (vote.warmup_epochs, vote.decay_epochs) == (5, 30)
    ddp = read_arguments(imagenet, monkeypatch, "--baseline", "ddp")
    assert (ddp.lr, ddp.momentum, ddp.weight_decay) == (0.1, 0.9, 1e-4)
    own = read_arguments(
        imagenet, monkeypatch, "--baseline", "ddp", "--lr", "0.4", "--momentum", "0", "--weight-decay", "0"
    )
    assert (own.lr, own.momentum, own.weight_decay) == (0.4, 0, 0)


def test_the_rate_rises_and_falls(imagenet: ModuleType) -> None:
    rates = {epoch: imagenet.rate_after(epoch, warmup=5, decay=30) for epoch in (0, 2.5, 5, 29.99, 30, 60, 89.9)}
    assert rates == pytest.approx({0: 0.1, 2.5: 0.55, 5: 1, 29.99: 1, 30: 0.1, 60: 0.01, 89.9: 0.01})
    assert imagenet.rate_after(0, warmup=0, decay=30) == 1


@pytest.mark.parametrize(
    "options, said",
    [
        (("--data", "nowhere"), "'nowhere/train'; --data DIR must hold train/CLASS/*.JPEG and val/CLASS/*.JPEG"),
        (("--data", "empty"), "Couldn't find any class folder in empty/train"),
        (("--data", "odd"), "train and val in odd differ in classes: n01440764 is only in one of them"),
        (("--data", "odd", "--model", "resnet19"), "try resnet18"),
        (("--data", "odd", "--model", "inception_v3"), "--model inception_v3 is not a classifier that"),
        (("--data", "odd", "--momentum", "-1"), "'-1' is not a number from 0 up, such as 0.9"),
        (("--data", "odd", "--seed", "x"), "'x' is not a whole number from 0 up"),
        (
            ("--data", "synthetic", "--synthetic-images", "7"),
            "7 training samples do not fill a batch of 8 on each of 1",
        ),
        ((), "the following arguments are required: --data"),
    ],
)
def test_bad_input_is_answered_with_what_to_type(
    run_here: Callable[..., None],
    options: tuple[str, ...],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty" / "train").mkdir(parents=True)
    write_images(tmp_path / "odd", {"train": 2, "val": 2})
    for image in (tmp_path / "odd/val/n01440764").iterdir():
        image.unlink()
    (tmp_path / "odd/val/n01440764").rmdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        run_here(*SMALL, "--workers", "0", *options)
    assert said in capsys.readouterr().err


def test_without_torchvision_it_says_what_to_install(
    run_here: Callable[..., None],
    imagenet: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(imagenet, "torchvision", None)
    with pytest.raises(SystemExit, match="2"):
        run_here("--data", "synthetic")
    assert "in the checkout: pip install '.[imagenet]'" in capsys.readouterr().err


def test_an_image_that_cannot_be_read_is_named(run_here: Callable[..., None], tmp_path: Path) -> None:
    write_images(tmp_path, {"train": 8, "val": 2})
    torn = tmp_path / "train" / "n01443537" / "n01443537_3.JPEG"
    torn.write_bytes(torn.read_bytes()[:500])
    with pytest.raises(OSError, match=f"{torn} cannot be read as an image"):
        run_here(*SMALL, "--data", tmp_path, "--workers", "0")


@pytest.mark.long
@pytest.mark.parametrize(
    "other, said",
    [
        ("nowhere", r"rank 1 on \S+: .*nowhere/train'; --data DIR must hold train/CLASS"),
        ("fewer", r"rank 1 on \S+: \S+fewer has other images here than on rank 0 \(2 classes, 79 and 19 images, .*; "
                  r"there 2 classes, 79 and 21 images, .*\): all nodes need the same files"),
    ],
)  # fmt: skip
def test_a_rank_with_other_images_ends_the_job(images: Path, tmp_path: Path, other: str, said: str) -> None:
    write_images(tmp_path / "fewer", {"train": 40, "val": 10})
    here = tmp_path / "here.py"  # as where each node has its own copy
    here.write_text(
        "import os, runpy, sys\n"
        f"sys.argv = [{str(SCRIPT)!r}, '--data', sys.argv[1 + int(os.environ['OMPI_COMM_WORLD_RANK'])]]\n"
        f"sys.path.insert(0, {str(SCRIPT.parent)!r})\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    done = mpirun(2, here, images, tmp_path / other)
    assert done.returncode == 2, done.text
    assert len(re.findall(said, done.text)) == 1
    assert "Traceback" not in done.text
