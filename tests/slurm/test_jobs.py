"""The batch scripts on a real SLURM: they start four nodes either way, and what cannot work ends at once."""

from __future__ import annotations

import re
import shutil
import sys
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cluster import SLURM, SMALL, Cluster, Submit, on

pytestmark = pytest.mark.long

DOCTOR = ("salloc", "--nodes=1", sys.executable, "-m", "mpisign", "doctor")


def assert_four_nodes(text: str, cluster: Cluster) -> None:
    found = re.findall(r"rank (\d) of 4 on (\S+)", text)
    assert sorted(found) == [(str(rank), node) for rank, node in enumerate(cluster.nodes)]


@pytest.mark.parametrize("launcher", ["srun", "mpirun"])
def test_four_nodes(submit: Submit, cluster: Cluster, launcher: str, tmp_path: Path) -> None:
    job = submit(*on(4), SLURM / "train_cpu.sbatch", SMALL, "--quiet", MPISIGN_LAUNCHER=launcher)
    text = job.wait()
    assert_four_nodes(text, cluster)
    assert re.search(rf"job {job.number}, start 1: 4 ranks .* by \S*{launcher} .*; Open MPI v\d", text)
    results = tmp_path / "out" / f"mpisign-{job.number}"
    assert (results / "checkpoints" / "step-00000040" / "rank-00003.pt").exists()
    assert (results / "train.csv").exists()


def test_the_default_trains_digits(submit: Submit, tmp_path: Path) -> None:
    """By a path relative to where sbatch is, and on as many ranks as the options say."""
    (tmp_path / "project").symlink_to(SLURM.parent)
    script = Path("project/slurm/train_cpu.sbatch")
    options = ("--epochs", "1", "--hidden", "16", "--quiet", "--out", "digits.png")
    job = submit(*on(2), script, "scripts/train_digits.py", *options)
    text = job.wait()
    assert "one-bit vote" in text
    assert "by srun --mpi=pmix" in text
    assert (tmp_path / "digits.png").exists()


def test_a_sweep_with_more_tasks_than_values(submit: Submit) -> None:
    text = submit(*on(1), "--array=2", SLURM / "sweep.sbatch", MPISIGN_SWEEP="--seeds 0 1").wait("FAILED")
    assert "--array asks for value 2, and MPISIGN_SWEEP='--seeds 0 1' has 2: sbatch --array=0-1" in text


def test_benchmarks_write_their_reports(submit: Submit, tmp_path: Path) -> None:
    options = ("--width", "4", "--rounds", "2", "--warmup", "1", "--no-gloo")
    job = submit(*on(2), SLURM / "benchmark.sbatch", *options, MPISIGN_BENCHMARKS="bench_step")
    job.wait()
    assert len(list((tmp_path / "out" / f"benchmark-{job.number}").glob("*-step.json"))) == 1


def test_the_tests_themselves(submit: Submit) -> None:
    text = submit(*on(2), SLURM / "test.sbatch", "-k", "test_barrier or test_rank").wait()
    assert re.search(r"ok +SLURM +job \d+; SLURM's srun works", text)
    assert re.search(r"\d+ passed", text)


# ------------------------------------------------------------------------------------------- what cannot work


@pytest.mark.parametrize("plugin", ["none", "pmi2"])
def test_worlds_of_one_under_the_wrong_plugin(submit: Submit, plugin: str) -> None:
    program = "import mpisign; mpisign.init(); print('trains alone')"
    command = f'srun --mpi={plugin} {sys.executable} -c "{program}"'
    text = submit(*on(2), "--output=plugin-%j.out", "--wrap", command).wait("FAILED")
    assert "trains alone" not in text
    assert len(re.findall(r"LaunchError: .*2 separate worlds of one .*srun --mpi=pmix", text)) == 2


@pytest.fixture
def without_pmix(cluster: Cluster, tmp_path: Path) -> Iterator[Cluster]:
    """Another SLURM, which lacks the plugin that Open MPI needs."""
    (installed,) = re.findall(r"PluginDir += (\S+)", cluster.run("scontrol", "show", "config"))
    plugins = tmp_path / "plugins"
    plugins.mkdir()
    for path in Path(installed).iterdir():
        if not path.name.startswith("mpi_pmix"):
            (plugins / path.name).symlink_to(path)
    with Cluster(2, plugins) as other:
        yield other


def test_where_srun_cannot_start_ranks_it_is_mpirun(without_pmix: Cluster, tmp_path: Path) -> None:
    script = (*on(2), SLURM / "train_cpu.sbatch", SMALL, "--quiet")
    text = without_pmix.submit(tmp_path, *script, PYTHON=sys.executable).wait()
    assert re.search(r"srun --mpi=pmix does not work here, so mpirun it is: [^$]*'pmix'", text)
    assert "rank 1 of 2 on " in text
    text = without_pmix.submit(tmp_path, *script, PYTHON=sys.executable, MPISIGN_LAUNCHER="srun").wait("FAILED")
    assert re.search(r"srun --mpi=pmix does not work here: [^$]*'pmix'[^$]*MPISIGN_LAUNCHER=mpirun", text)
    text = without_pmix.run(*DOCTOR)
    assert re.search(r"warn +SLURM .*srun --mpi=pmix does not work: .*pmix.*\n.*MPISIGN_LAUNCHER=mpirun", text)


def test_the_doctor_in_an_allocation(cluster: Cluster) -> None:
    assert re.search(r"ok +SLURM +job \d+; srun --mpi=pmix works", cluster.run(*DOCTOR))


REFUSED = {
    "PYTHON": (
        "/no/python",
        "/no/python does not run on .* Activate your environment .* PYTHON=/path/to/python sbatch",
    ),
    "MPISIGN_OUT": ("/dev/null/out", "cannot write to /dev/null/out: name another folder: MPISIGN_OUT=/path sbatch"),
    "MPISIGN_LAUNCHER": ("ssh", "MPISIGN_LAUNCHER=ssh is none of auto, srun, mpirun"),
    "MPISIGN_CONTAINER": ("false --nv", "false --nv .* does not run on "),
}


@pytest.mark.parametrize(("variable", "value", "said"), [(name, *pair) for name, pair in REFUSED.items()], ids=REFUSED)
def test_a_setting_that_cannot_work(submit: Submit, variable: str, value: str, said: str) -> None:
    assert re.search(said, submit(*on(1), SLURM / "train_cpu.sbatch", **{variable: value}).wait("FAILED"))


@pytest.mark.parametrize(
    ("script", "missing", "extras"),
    [
        ("train_cpu", "tqdm", "mpi,scripts"),
        ("train_gpu", "tqdm cupy torchvision", "mpi,scripts,imagenet,cuda12"),
        ("test", "pytest pytest_mpi pytest_timeout", "mpi,scripts,test-mpi"),
    ],
)
def test_a_python_without_the_packages(submit: Submit, tmp_path: Path, script: str, missing: str, extras: str) -> None:
    venv.create(tmp_path / "venv", symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    text = submit(*on(1), "--gpus-per-node=0", SLURM / f"{script}.sbatch", PYTHON=python, PYTHONPATH="").wait("FAILED")
    assert f"missing: mpisign torch numpy mpi4py {missing}" in text
    assert f"{python} -m pip install -e '{SLURM.parent}[{extras}]'" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="here are GPUs")
def test_ranks_without_gpus(submit: Submit, cluster: Cluster) -> None:
    text = submit(*on(1), "--gpus-per-node=0", SLURM / "train_gpu.sbatch").wait("FAILED")
    assert f"{cluster.nodes[0]}: torch sees 0 GPUs for 1 ranks" in text
    assert "every rank needs a GPU: sbatch --gpus-per-node=N --ntasks-per-node=N" in text


def test_a_script_that_is_not_where_the_others_are(submit: Submit, tmp_path: Path) -> None:
    """Then it has to be told where they are."""
    script = shutil.copy(SLURM / "train_cpu.sbatch", tmp_path)
    said = "MPISIGN_ROOT: is not set, and this is not in the folder slurm/ of mpisign: name its root"
    assert said in submit(*on(1), script).wait("FAILED")
    told = submit(*on(1), script, "no/such/script.py", MPISIGN_ROOT=SLURM.parent)
    assert f"there is no {SLURM.parent}/no/such/script.py" in told.wait("FAILED")
