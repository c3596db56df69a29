"""Children of a rank, forked or spawned, get an error from all that talks, and the job goes on and ends well."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from mpirun import Result, mpirun

import mpisign
from mpisign import processes

FORKED = """
import json, os, sys
import torch
import mpisign
from mpisign import doctor

mpisign.init()
folder = sys.argv[1]
model = torch.nn.Linear(3, 2)
sgd = torch.optim.SGD(model.parameters(), lr=1.0)
optimizer = mpisign.DistributedSignOptimizer(sgd, method=mpisign.signsgd())
for parameter in model.parameters():
    parameter.grad = torch.ones_like(parameter)
optimizer.step()
state = optimizer.state_dict()
objects = {"model": model, "optimizer": optimizer}
mpisign.checkpoint.save(folder, **objects, step=1, asynchronous=True)
talking = {
    "init": mpisign.init,
    "barrier": mpisign.barrier,
    "timeline": lambda: mpisign.timeline(folder + "/trace.json"),
    "broadcast_object": lambda: mpisign.broadcast_object(1),
    "allgather_object": lambda: mpisign.allgather_object(1),
    "broadcast_parameters": lambda: mpisign.broadcast_parameters(model.state_dict()),
    "broadcast_optimizer_state": lambda: mpisign.broadcast_optimizer_state(optimizer),
    "check_consistency": lambda: mpisign.check_consistency(model),
    "DistributedSignOptimizer": lambda: mpisign.DistributedSignOptimizer(sgd),
    "step": optimizer.step,
    "synchronize": optimizer.synchronize,
    "join": optimizer.join,
    "load_state_dict": lambda: optimizer.load_state_dict(state),
    "agreement": optimizer.report.agreement,
    "save": lambda: mpisign.checkpoint.save(folder, **objects, step=2),
    "wait": mpisign.checkpoint.wait,
    "newest": lambda: mpisign.checkpoint.newest(folder),
    "load": lambda: mpisign.checkpoint.load(folder, **objects),
    "stop_on_signal": mpisign.stop_on_signal,
    "stop_requested": mpisign.stop_requested,
    "examine": doctor.examine,
}
sys.stdout.flush()
child = os.fork()
if child == 0:
    said = {}
    for name, talk in talking.items():
        try:
            said[name] = repr(talk())
        except Exception as error:
            said[name] = f"{type(error).__name__}: {error}"
    answers = [mpisign.is_initialized(), mpisign.rank(), mpisign.size(), mpisign.local_rank(), mpisign.local_size()]
    answers += [mpisign.node_rank(), mpisign.num_nodes(), str(mpisign.device()), optimizer.state_dict() is not None]
    print(json.dumps([os.getppid(), said, answers]), flush=True)
    mpisign.shutdown()
    sys.exit(7)
code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
mpisign.barrier()
mpisign.checkpoint.wait()
print(json.dumps({"rank": mpisign.rank(), "process": os.getpid(), "code": code}), flush=True)
"""


def job(tmp_path: Path, body: str) -> Result:
    path = tmp_path / "job.py"
    path.write_text(textwrap.dedent(body))
    return mpirun(2, path, tmp_path / "checkpoints", timeout=100.0)


@pytest.mark.long
def test_a_forked_child_gets_errors_and_the_job_goes_on(tmp_path: Path) -> None:
    result = job(tmp_path, FORKED)
    assert result.returncode == 0, result.text
    told = [json.loads(line) for line in result.text.splitlines() if line.startswith(("[", "{"))]
    parents = {it["process"]: it for it in told if isinstance(it, dict)}
    assert sorted((it["rank"], it["code"]) for it in parents.values()) == [(0, 7), (1, 7)]
    children = [it for it in told if isinstance(it, list)]
    assert len(children) == 2
    for parent, said, answers in children:
        assert len(said) == 21
        for name, error in said.items():
            kind = "LaunchError" if name == "init" else "NotInitializedError"
            assert error.startswith(kind), (name, error)
            assert f"which is no rank: process {parent}, in which MPI runs, has forked it" in error
        assert answers == [True, parents[parent]["rank"], 2, parents[parent]["rank"], 2, 0, 1, "cpu", True]


@pytest.mark.long
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_dataset_that_talks_is_an_error_of_its_rank(tmp_path: Path, method: str) -> None:
    result = job(
        tmp_path,
        f"""
        import torch
        import mpisign

        class Talking(torch.utils.data.Dataset):
            def __len__(self):
                return 2

            def __getitem__(self, place):
                if place == 0:
                    return mpisign.allgather_object(place)
                mpisign.init()

        if __name__ == "__main__":
            mpisign.init()
            for place, error in enumerate((mpisign.NotInitializedError, mpisign.LaunchError)):
                loader = torch.utils.data.DataLoader(
                    Talking(), sampler=[place], num_workers=1, multiprocessing_context="{method}"
                )
                try:
                    list(loader)
                except error as caught:
                    assert "no rank: " in str(caught) and "as arguments" in str(caught), caught
                    mpisign.barrier()
                    print("told", flush=True)
            mpisign.barrier()
            print("went on", flush=True)
        """,
    )
    assert result.returncode == 0, result.text
    assert (result.text.count("told"), result.text.count("went on")) == (4, 2), result.text


@pytest.mark.long
def test_a_script_that_a_spawned_worker_imports_anew_says_what_is_missing(tmp_path: Path) -> None:
    """It would start MPI in the worker, which hangs."""
    path = tmp_path / "job.py"
    path.write_text(
        "import multiprocessing\n"
        "import mpisign\n"
        "mpisign.init()\n"
        "if __name__ == '__main__':\n"
        "    child = multiprocessing.get_context('spawn').Process(target=print)\n"
        "    child.start()\n"
        "    child.join()\n"
        "    print(child.exitcode)\n"
    )
    ended = subprocess.run([sys.executable, path], capture_output=True, text=True, check=False, timeout=240)
    assert (ended.returncode, ended.stdout) == (0, "1\n"), ended.stderr
    assert "LaunchError: init() in process" in ended.stderr
    assert "no rank: multiprocessing has started it, and it imports the main script anew" in ended.stderr
    assert "under `if __name__ == '__main__':`" in ended.stderr


FORKING = """
import atexit, os, sys
import mpisign

mpisign.init()
atexit.register(print, "parent's")
for last_words in ("pass", "sys.exit()", "sys.exit(3)", "sys.exit('no')", "raise ValueError('no')"):
    child = os.fork()
    if child == 0:
        atexit.register(print, "child's")
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    mpisign.barrier()
if child == 0:
    exec(last_words)
"""


@pytest.mark.long
def test_a_forked_child_ends_as_it_wants_and_leaves_mpi_alone() -> None:
    command = [sys.executable, "-c", FORKING]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "".join(f"child's\nparent's\n{code}\n" for code in (0, 0, 3, 1, 1)) + "parent's\n"
    assert ended.stderr.startswith("no\nTraceback")


def test_this_process_is_nobodys_child() -> None:
    assert processes.whose_child() == ""
    processes.check_may_start()
    with pytest.raises(mpisign.NotInitializedError, match=r"call mpisign\.init\(\) first"):
        mpisign.barrier()
