"""mpisign.exchange as it goes on a GPU, on a rank alone: few launches, the bits of the host, nothing allocated."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from gpu_branch import gpu_branch, needs_compiler
from methods_table import among, packs_signs
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils._python_dispatch import TorchDispatchMode

import mpisign
from mpisign import DistributedSignOptimizer, Method, session
from mpisign.bitmap import kernels
from mpisign.codecs import ScaledBits, ScaledRows
from mpisign.exchange.allgather import AllGather
from mpisign.memory import Memory, Momentum
from mpisign.memory.memory import State
from mpisign.policy import StepContext

pytestmark = [needs_compiler, pytest.mark.usefixtures("world")]

METHODS = list(among(1, packs_signs).values())
VOTES = [method for method in METHODS if method.elects]  # whose decisions are signs, too
OTHERS = among(1, lambda method: not packs_signs(method) and not method.memory.private)  # whose noise repeats
SCALED = {
    name: method for name, method in OTHERS.items() if isinstance(method.at(1, 0).codec, (ScaledBits, ScaledRows))
}
UNIFORM = (
    "sto_sign",
    "ternary_vote",
    "sparsign",
    "qsgd",
    "qsgd coarse",
    "terngrad",
    "terngrad clip",
)  # a GPU draws other numbers for them
EXACT = {name: method for name, method in OTHERS.items() if name not in (*SCALED, *UNIFORM)}
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SHAPES = [(3, 5, 7), (64,), (), (0,), (1,), (33, 2), (127,), (16400,)]
NAN = float("nan")

Gradients = Sequence[torch.Tensor | None]


def parameters(dtypes: Sequence[torch.dtype] = DTYPES) -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(shape, dtype=dtypes[i % len(dtypes)])) for i, shape in enumerate(SHAPES)]


def draw(step: int, dtypes: Sequence[torch.dtype] = DTYPES) -> list[torch.Tensor | None]:
    """Normal, with zeros of both signs and a denormal, and None for another parameter in every step."""
    generator = torch.Generator().manual_seed(step)
    drawn: list[torch.Tensor | None] = []
    for tensor in parameters(dtypes):
        values = torch.randn(tensor.shape, generator=generator)
        values[torch.rand(tensor.shape, generator=generator) < 0.2] = 0.0
        values[torch.rand(tensor.shape, generator=generator) < 0.1] = -0.0
        values[torch.rand(tensor.shape, generator=generator) < 0.1] = torch.finfo(torch.float32).tiny / 2
        drawn.append(values.to(tensor.dtype))
    drawn[step % len(drawn)] = None
    return drawn


def give(tensors: Sequence[nn.Parameter], gradients: Gradients) -> None:
    for tensor, gradient in zip(tensors, gradients, strict=True):
        tensor.grad = None if gradient is None else gradient.clone()


def bits(tensors: Gradients) -> list[str | None]:
    """Values with the signs of zeros, as text: NaN equals NaN there."""
    return [None if t is None else str(t.flatten().tolist()) for t in tensors]


def train(gpu: bool, method: Method, steps: Sequence[Gradients], scale: float = 1.0, **options: Any) -> list[Any]:
    """All that a user can see of each step: decisions, parameters, memory, report."""
    seen: list[Any] = []
    dtypes = options.pop("dtypes", DTYPES)
    tensors = parameters(dtypes)
    with gpu_branch(gpu):
        sgd = SGD(tensors, lr=0.5)
        optimizer = DistributedSignOptimizer(sgd, method=method, apply="optimizer", **options)
        optimizer.set_epoch(0)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale != 1.0)
        scaler.scale(torch.zeros(()))
        for gradients in steps:
            give(tensors, [None if g is None else g * scale for g in gradients])
            scaler.step(optimizer)
            scaler.update()
            report = optimizer.report
            assert report is not None
            memory = optimizer.state_dict()["mpisign"]["memory"]
            seen.append(
                (
                    bits([t.grad for t in tensors]),
                    bits([t.detach() for t in tensors]),
                    {(place, key): bits([value]) for place, state in memory.items() for key, value in state.items()},
                    (report.voters, dict(report.abstentions), report.skipped, report.ties, report.bytes_sent),
                    dict(report.ended_at),
                    [] if report.skipped or report.ties is None else report.agreement(),
                )
            )
    return seen


def assert_same(method: Method, steps: Sequence[Gradients], **options: Any) -> list[Any]:
    """The two ways agree in everything; returns what they did."""
    host, gpu = (train(branch, method, steps, **options) for branch in (False, True))
    for step, (here, there) in enumerate(zip(host, gpu, strict=True)):
        assert there == here, f"step {step}"
    return host


# ------------------------------------------------------------------------------------------------- the same bits


@pytest.mark.parametrize("exchange", ["allgather", "two_phase"])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_it_trains_as_on_the_host(method: Method, exchange: str) -> None:
    seen = assert_same(method, [draw(step) for step in range(4)], exchange=exchange)
    assert all(report[0] == (0,) for _, _, _, report, *_ in seen)


@pytest.mark.parametrize("ties", ["coin", "zero", "positive"])
@pytest.mark.parametrize("zeros", ["coin", "abstain", "positive", "rows"])
def test_every_policy(zeros: str, ties: str) -> None:
    assert_same(mpisign.signsgd(), [draw(step) for step in range(2)], zeros=zeros, ties=ties, seed=5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_gradients_of_one_type(method: Method, dtype: torch.dtype) -> None:
    assert_same(method, [draw(step, [dtype]) for step in range(2)], dtypes=[dtype])


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="this torch has no gradients of another dtype")
@pytest.mark.parametrize("of_gradient", DTYPES, ids=str)
@pytest.mark.parametrize("of_parameter", DTYPES, ids=str)
@pytest.mark.parametrize("method", VOTES, ids=str)
def test_gradients_of_another_type(method: Method, of_parameter: torch.dtype, of_gradient: torch.dtype) -> None:
    tensors = [nn.Parameter(torch.zeros(3, dtype=dtype)) for dtype in (of_parameter, torch.float32)]
    tensors[0].grad_dtype = of_gradient
    with gpu_branch() as launches:
        optimizer = DistributedSignOptimizer(SGD(tensors, lr=1.0), method=method, apply="optimizer")
        for _ in range(2):
            for tensor, dtype in zip(tensors, (of_gradient, torch.float32), strict=True):
                tensor.grad = torch.tensor([2.0, -0.5, 1.0], dtype=dtype)
            optimizer.step()
    assert all(tensor.tolist() == [-2.0, 2.0, -2.0] for tensor in tensors)
    assert launches.count("unpack_many") == 2


@dataclass(frozen=True)
class Average(Memory):
    """A memory of one's own, which the kernel knows by its betas."""

    fields = ("average",)
    betas = (0.75, 0.75)

    def __call__(
        self, gradient: Tensor, state: State, scratch: Tensor, context: StepContext, first_word: int
    ) -> Tensor:
        return state["average"].lerp_(gradient, 0.25)


@dataclass(frozen=True)
class Opposite(Momentum):
    """One that does something else than the betas it inherits say."""

    def __call__(
        self, gradient: Tensor, state: State, scratch: Tensor, context: StepContext, first_word: int
    ) -> Tensor:
        return state["momentum"].lerp_(-gradient, 1.0 - self.beta)


@pytest.mark.parametrize(("memory", "in_one_launch"), [(Average(), True), (Opposite(0.75), False)], ids=str)
def test_a_memory_of_ones_own(memory: Memory, in_one_launch: bool) -> None:
    method = replace(mpisign.signum(), memory=memory)
    assert_same(method, [draw(step) for step in range(3)])
    with gpu_branch() as launches:
        tensors, optimizer = many_small(method, 3)
        ones(tensors)
        optimizer.step()
    assert ("pack_momentum" in launches) == in_one_launch


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_small_buckets(method: Method) -> None:
    """Many messages, still of one launch."""
    assert_same(method, [draw(step) for step in range(2)], bucket_cap_mb=4 / 2**20)


@pytest.mark.parametrize("method", EXACT.values(), ids=EXACT)
def test_methods_of_other_messages(method: Method) -> None:
    """In fp32: where magnitudes are equal, as 16 bits often are, which of them are the largest is anybody's choice."""
    assert_same(method, [draw(step, [torch.float32]) for step in range(2)], dtypes=[torch.float32])


@pytest.mark.long
@pytest.mark.parametrize("method", SCALED.values(), ids=SCALED)
def test_methods_whose_scales_are_sums(method: Method) -> None:
    """A GPU adds them up in fp64, the host in fp32: the last bits differ."""
    steps = [draw(step, [torch.float32]) for step in range(2)]
    host, gpu = (train(branch, method, steps, dtypes=[torch.float32]) for branch in (False, True))
    for (*values, memory, report, ended, _), (*others, its_memory, its_report, its_ended, _) in zip(
        host, gpu, strict=True
    ):
        assert (report, ended, memory.keys()) == (its_report, its_ended, its_memory.keys())
        kept, its = ([text for (text,) in state.values()] for state in (memory, its_memory))
        for mine, theirs in zip([*values[0], *values[1], *kept], [*others[0], *others[1], *its], strict=True):
            assert (mine is None) == (theirs is None)
            if mine is not None and theirs is not None:
                assert json.loads(theirs) == pytest.approx(json.loads(mine), rel=1e-5, abs=1e-6)


# ---------------------------------------------------------------------------------------------- who does not vote


def spoilt(step: int, bad: float) -> list[torch.Tensor | None]:
    gradients = draw(step)
    assert gradients[5] is not None
    gradients[5][3, 1] = bad
    return gradients


@pytest.mark.parametrize("bad", [NAN, float("inf")])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_bad_value_ends_the_ballot_and_does_not_enter_the_memory(method: Method, bad: float) -> None:
    """What backward has reached before it counts."""
    seen = assert_same(method, [draw(0), spoilt(1, bad), draw(2)])
    assert [ended for *_, ended, _ in seen] == [{}, {0: "group0.param5"}, {}]
    decisions, _, after, (voters, *_), *_ = seen[1]
    assert voters == (0,)
    assert [place for place, decision in enumerate(decisions) if decision is not None] == [6, 7]
    for key, before in seen[0][2].items():
        values, news = (json.loads(text) for text in (before[0], after[key][0]))
        if key[0] == 5:
            assert values[7] == news[7], "where it was bad"
            assert values != news, "the memory takes in what is finite, though the ballot has ended"


@pytest.mark.parametrize("bad", [NAN, float("inf")])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_what_a_grad_scaler_finds_withdraws_the_ballot(method: Method, bad: float) -> None:
    seen = assert_same(method, [draw(0), spoilt(1, bad), draw(2)], scale=1024.0)
    assert [report[2] for _, _, _, report, *_ in seen] == [False, True, False]
    assert seen[1][2] == seen[0][2], "and its memory stays"


def test_no_gradient_at_all() -> None:
    seen = assert_same(mpisign.signum(), [draw(0), [None] * len(SHAPES), draw(2)])
    assert seen[1][3][1] == {0: "no gradient"}


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_loss_scale_is_taken_out(method: Method) -> None:
    assert_same(method, [draw(step) for step in range(3)], scale=1024.0, zeros="abstain")


def test_a_loss_scale_gives_a_method_without_memory_none() -> None:
    seen = assert_same(mpisign.signsgd(), [draw(step) for step in range(2)], scale=1024.0)
    assert [memory for _, _, memory, *_ in seen] == [{}, {}]


# ------------------------------------------------------------------------------------------------------- launches

RESNET50_TENSORS = 161


def many_small(
    method: Method, number: int = RESNET50_TENSORS, **options: Any
) -> tuple[list[nn.Parameter], DistributedSignOptimizer]:
    tensors = [nn.Parameter(torch.zeros(16 + i)) for i in range(number)]
    return tensors, DistributedSignOptimizer(SGD(tensors, lr=0.5), method=method, apply="optimizer", **options)


def ones(tensors: Sequence[nn.Parameter]) -> None:
    for tensor in tensors:
        tensor.grad = torch.ones_like(tensor) if tensor.grad is None else tensor.grad.fill_(1.0)


@pytest.mark.parametrize("cap", [25.0, 1 / 2**10], ids=["one bucket", "many buckets"])
@pytest.mark.parametrize(
    ("method", "packs"), [(one, "pack_momentum" if one.memory.fields else "pack_many") for one in VOTES], ids=str
)
def test_the_tensors_of_a_resnet50_take_one_launch_each_way(method: Method, packs: str, cap: float) -> None:
    with gpu_branch() as launches:
        tensors, optimizer = many_small(method, bucket_cap_mb=cap)
        ones(tensors)
        launches.clear()
        optimizer.synchronize()
        assert optimizer.report is not None
        buckets = len(optimizer.report.exchange)
    assert (buckets > 1) == (cap < 1)
    assert Counter(launches) == {packs: 1, "any_zero": buckets, "majority_2": buckets, "unpack_many": 1}


def test_more_tensors_than_a_launch_can_take() -> None:
    with gpu_branch() as launches:
        tensors, optimizer = many_small(mpisign.signsgd(), kernels.TENSOR_CAPACITY + 1)
        ones(tensors)
        optimizer.step()
    assert (launches.count("pack_many"), launches.count("unpack_many")) == (2, 2)
    assert all((t == -0.5).all() for t in tensors)


# ---------------------------------------------------------------------------------------------------- allocations


class Allocations(TorchDispatchMode):
    """The largest tensor that any operation inside has made, in elements."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        known = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        made = [t for t in _tensors(result) if t.untyped_storage().data_ptr() not in known]
        self.largest = max([self.largest, *(t.untyped_storage().nbytes() for t in made)])
        return result


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


@pytest.mark.parametrize("scale", [1.0, 1024.0])
@pytest.mark.parametrize("method", VOTES, ids=str)
def test_a_steady_step_makes_no_tensor_but_flags_and_counts(method: Method, scale: float) -> None:
    with gpu_branch():
        tensors, optimizer = many_small(method)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale != 1.0)
        scaler.scale(torch.zeros(()))
        for _ in range(2):
            ones(tensors)
            scaler.step(optimizer)
            scaler.update()
        ones(tensors)
        with Allocations() as allocations:
            torch.ones(7, dtype=torch.float64)
            assert allocations.largest == 56, "the measure sees an allocation"
            allocations.largest = 0
            scaler.step(optimizer)
    assert allocations.largest <= 8


# ------------------------------------------------------------------------------------------------ waiting for it


class Waits:
    """In the place of a CUDA event: which span is open, and which kernels were launched, when it is waited for."""

    def __init__(self, launches: list[str]) -> None:
        self._launches, self._waited = launches, True
        self.seen: list[tuple[str, list[str]]] = []

    def record(self) -> None:
        self._waited = False

    def synchronize(self) -> None:
        if not self._waited:
            self.seen.append((session.current().tracer.where(), list(self._launches)))
        self._waited = True


def test_a_step_waits_once_for_its_packing_and_once_for_its_ties_when_unpacking_is_under_way() -> None:
    """What packing takes is told as packing: nothing else has waited for it."""
    tensors = parameters([torch.float32])
    with gpu_branch() as launches:
        optimizer = DistributedSignOptimizer(SGD(tensors, lr=0.5), method=mpisign.signum(0.9), apply="optimizer")
        give(tensors, [torch.randn(tensor.shape) for tensor in tensors])
        plan = optimizer._current_plan()
        assert plan.answers is not None
        waits = Waits(launches)
        for answers in (plan.answers, *(batch.answers for batch in plan.batches)):
            assert answers is not None
            answers._copied = waits  # type: ignore[assignment]
        optimizer.step()
    assert [where for where, _ in waits.seen] == ["step 0, bucket 0, pack", "step 0, decide"]
    packing, deciding = (launched for _, launched in waits.seen)
    assert packing == ["pack_momentum", "any_zero"]
    assert deciding[-1] == "unpack_many"


def test_a_ranks_own_message_stays_on_the_device() -> None:
    tensors = parameters([torch.float32])
    with gpu_branch():
        optimizer = DistributedSignOptimizer(SGD(tensors, lr=0.5), method=mpisign.signsgd(), exchange="allgather")
        give(tensors, [torch.randn(tensor.shape) for tensor in tensors])
        (exchange,) = optimizer._current_plan().exchanges
        assert isinstance(exchange, AllGather)
        exchange._received.tensor.fill_(5)
        optimizer.step()
    assert exchange.received[0] is exchange.message
    assert (exchange._received.tensor == 5).all(), "nothing came back"
    assert torch.equal(exchange.decision, exchange.message), "of one rank alone"
