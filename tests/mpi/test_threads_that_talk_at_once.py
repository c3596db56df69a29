"""Two threads of a rank talk at once: one waits for the other, and nobody hears a mixture of both."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import torch

import mpisign
from mpisign.memory import Identity


class Thread(threading.Thread):
    """One whose exception is raised where it is joined."""

    def __init__(self, act: Any, *arguments: Any) -> None:
        super().__init__(daemon=True)
        self._act, self._arguments, self._error = act, arguments, None
        self.start()

    def run(self) -> None:
        try:
            self._act(*self._arguments)
        except BaseException as error:
            self._error = error

    def end(self) -> None:
        self.join(60.0)
        if self._error is not None:
            raise self._error
        assert not self.is_alive()


def test_each_hears_what_was_said_at_once() -> None:
    """Which of one rank's threads meets which of another's is the user's business."""
    rank, size = mpisign.rank(), mpisign.size()

    def talk(who: int) -> None:
        for number in range(60):
            mine = rank, who, number, "x" * ((7919 * number * (1 + who)) % 20_000)
            heard = mpisign.allgather_object(mine)
            assert heard[rank] == mine
            assert [its[0] for its in heard] == list(range(size))
            for _, its, count, text in heard:
                assert text == "x" * ((7919 * count * (1 + its)) % 20_000)

    threads = [Thread(talk, who) for who in range(2)]
    for thread in threads:
        thread.end()


def test_a_step_is_one_operation_on_any_thread() -> None:
    ended: list[str] = []
    inside, other = threading.Event(), threading.Event()

    class Slow(Identity):
        def __call__(self, gradient: torch.Tensor, *_: Any) -> torch.Tensor:
            inside.set()
            assert not other.wait(0.3), "it has met the others in the middle of a step"
            return gradient

    parameter = torch.nn.Parameter(torch.zeros(100))
    parameter.grad = torch.ones(100)
    method = dataclasses.replace(mpisign.signsgd(), memory=Slow())
    optimizer = mpisign.DistributedSignOptimizer(torch.optim.SGD([parameter], lr=1.0), method=method)
    optimizer.register_step_post_hook(lambda *_: ended.append("step"))

    def meet() -> None:
        assert inside.wait(60.0)
        mpisign.barrier()
        other.set()
        ended.append("barrier")

    thread = Thread(meet)
    Thread(optimizer.step).end()
    thread.end()
    assert sorted(ended) == ["barrier", "step"]
    assert (parameter == -1).all()
    mpisign.check_consistency(torch.nn.ParameterList([parameter]))


def test_a_closure_may_wait_for_another_thread_that_talks() -> None:
    """Gradients come from it, on whatever threads autograd has."""
    parameter = torch.nn.Parameter(torch.zeros(100))
    optimizer = mpisign.DistributedSignOptimizer(torch.optim.SGD([parameter], lr=1.0))

    def closure() -> float:
        Thread(mpisign.barrier).end()
        parameter.grad = torch.ones(100)
        return 1.0

    assert optimizer.step(closure) == 1.0
    assert (parameter == -1).all()
