"""What each method's memory and codec cost one rank on ResNet-50's parameters, against the bytes they must move."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from bench_step import Model, resnet50_shapes
from harness import Contender, Report, Table, Target, Times, compare, count, measure, one_thread, parser, speedup

import mpisign
from mpisign import Method
from mpisign.bitmap.tensors import flat
from mpisign.codecs.sparse import top_k
from mpisign.exchange.header import VOTES, Heard
from mpisign.exchange.plan import make_plan
from mpisign.exchange.sink import GradientSink
from mpisign.group import Group
from mpisign.memory.store import MemoryStore
from mpisign.policy import Policy

COPY, SIGNUM = "copy", "signum"
UNIFORM, NORMAL = "torch uniform_", "torch normal_"
TORCH_TOPK, TOPK, SAMPLED = "torch.topk", "TopK", "TopK, sample"
BUCKET = 2**20  # bytes; the optimizer's default

WORDS = """\
One process on one thread does what one rank does besides the exchange: every gradient through the method's memory and
codec into the message, what the memory has to hear of it, and one decision back into the gradients (the rank's own
message of the step before is taken for it). Exchange, rule and optimizer are left out. The floor is the time in which
this machine copies as many bytes as the method must read and write at least: gradient, state, message, decision. What
a method must compute comes on top of it: random numbers above all, for which `torch uniform_` and `torch normal_` stand
beside it.
Dense robust rules (Krum, trimmed mean, ...) do the local work of `median`, and `double_squeeze` that of `ef_signsgd`.
Selection is of the 0.1 % of largest magnitude among as many coordinates in one tensor; all three find the same."""


@dataclass(frozen=True)
class Case:
    """A method, and how many fp32 numbers a coordinate it must read or write at least, messages aside."""

    name: str
    method: Method
    moves: int
    what: str


CASES = (
    Case("signsgd", mpisign.signsgd(), 2, "gradient in, decision out"),
    Case(SIGNUM, mpisign.signum(), 4, "and the momentum in and out"),
    Case("lion", mpisign.lion(), 4, "the same"),
    Case("noisy_signsgd", mpisign.noisy_signsgd(1.0), 2, "gradient in, decision out; a normal random number"),
    Case(
        "noisy_signsgd, relative", mpisign.noisy_signsgd(0.1, relative=True), 3, "the gradient once more, for its max"
    ),
    Case("sto_sign", mpisign.sto_sign(4.0), 2, "gradient in, decision out; a uniform random number"),
    Case("dp_sign", mpisign.dp_sign(1.0, 0.01), 3, "gradient in twice, for its norm; a normal random number"),
    Case("ternary_vote", mpisign.ternary_vote(4.0, 5.0), 2, "gradient in, decision out; a uniform random number"),
    Case("sparsign", mpisign.sparsign(0.5), 2, "the same"),
    Case("ef_signsgd", mpisign.ef_signsgd(), 6, "the error in and out, and again when the message has counted"),
    Case("1-bit Adam, before", mpisign.one_bit_adam(10**9), 6, "fp32 messages; both moments in and out"),
    Case("1-bit Adam, frozen", mpisign.one_bit_adam(1), 9, "the error twice in and out, the moments"),
    Case("ef21", mpisign.ef21(), 4, "top 1 %; the estimate in, the average out"),
    Case("ef21, signs", mpisign.ef21(None), 7, "the estimate in, in and out; the average in and out"),
    Case("ef21_sgdm", mpisign.ef21_sgdm(), 6, "top 1 %; and the momentum in and out"),
    Case("top_k", mpisign.top_k(0.001), 4, "top 0.1 %; the error in and out"),
    Case("top_k, sample", mpisign.top_k(0.001, sample=0.01), 4, "the same"),
    Case("dgc", mpisign.dgc(warmup_epochs=0), 6, "top 0.1 %; velocity and residual in and out"),
    Case("mean", mpisign.mean(), 2, "fp32 messages"),
    Case("median", mpisign.median(), 4, "fp32 messages; the momentum in and out"),
    Case("noisy_median", mpisign.noisy_median(1.0), 2, "fp32 messages; a normal random number"),
)


def main() -> None:
    options = parser(
        __doc__ or "",
        [
            "python benchmarks/bench_methods.py",
            "python benchmarks/bench_methods.py --rounds 5 --only ef_signsgd dgc",
            "python benchmarks/bench_methods.py --report",
        ],
    )
    options.add_argument("--width", type=count, default=64, help="channels of the first stage; 64 is ResNet-50")
    options.add_argument("--only", nargs="+", choices=[case.name for case in CASES], help="time these alone")
    args = options.parse_args()
    one_thread()

    model = Model(list(resnet50_shapes(args.width)), 0)
    cases = [case for case in CASES if args.only is None or case.name in (SIGNUM, *args.only)]
    works = [Work(case, model) for case in cases]
    yardstick = torch.empty_like(model.gradients)
    copying = Contender(COPY, "`torch.Tensor.copy_` of all gradients", lambda: yardstick.copy_(model.gradients))
    random = torch.Generator().manual_seed(0)
    drawing = [
        Contender(UNIFORM, "a uniform number a coordinate", lambda: yardstick.uniform_(generator=random)),
        Contender(NORMAL, "a normal number a coordinate", lambda: yardstick.normal_(generator=random)),
    ]
    selecting = selectors(model.gradients)
    contenders = [copying, *drawing, *(work.contender for work in works), *selecting]
    times = measure(contenders, args.rounds, args.warmup)

    size = f"{model.elements:,} parameters in {len(model.parameters)} tensors"
    chosen = [one.name for one in selecting]
    report = Report(
        "methods",
        f"Memory and codec of each method on {size}, one core",
        WORDS,
        args,
        contenders,
        times,
        [Target(TOPK, TORCH_TOPK, 1 / 3), Target(SAMPLED, TORCH_TOPK, 1.0)],
        [overheads(works, times, model.elements), compare("Select 0.1 %", times, chosen, [TORCH_TOPK])],
        extra={"parameters": model.elements, "bytes": {work.case.name: work.bytes for work in works}},
    )
    report.show()
    if args.report:
        print("\n".join(f"wrote {path}" for path in report.write(args.results)))


# ------------------------------------------------------------------------------------------- contenders


class Work:
    """What one rank does at a step of a method, with memory and buffers of its own."""

    @torch.no_grad()
    def __init__(self, case: Case, model: Model) -> None:
        self.case, self._model, self._step = case, model, 0
        method = case.method.at(1, 0)
        named = [(str(place), parameter) for place, parameter in enumerate(model.parameters)]
        store = MemoryStore(method.memory)
        for parameter in model.parameters:
            for value in store.of(parameter).values():
                value.copy_(parameter.view(-1).square())  # as after some steps: zeros may take another time than others
        group = Group.alone(None)  # nothing is sent
        cap_mb = BUCKET / 2**20
        self._plan = make_plan(named, [method] * len(named), Policy(), "allgather", cap_mb, store, group, 0)
        self._sink = GradientSink(self._plan.layout)
        self._heard = [heard_alone(len(bucket.segments)) for bucket in self._plan.layout.buckets]
        sent = sum(exchange.message.nbytes for exchange in self._plan.exchanges)
        self.bytes = 4 * case.moves * model.elements + 2 * sent  # a message is written once, a decision read once
        self.contender = Contender(
            case.name, f"`{method.memory!r}`, `{method.codec!r}`: {case.what}", self.run, self.begin
        )

    def begin(self) -> None:
        self._model.restore()
        self._step += 1
        for exchange in self._plan.exchanges:  # what was sent is what comes back
            exchange.received[0].copy_(exchange.message)
            if exchange.decision.shape == exchange.message.shape:
                exchange.decision.copy_(exchange.message)

    @torch.no_grad()
    def run(self) -> None:
        plan, context = self._plan, Policy().context(self._step, 0)
        gradients = plan.gradients.read()
        finite = True
        for method in plan.layout.methods:
            if method.memory.needs_all:
                finite &= int(plan.backend.first_bad(gradients)) >= len(gradients)
                prepared = method.memory.prepare([flat(g) for g in gradients if g is not None], context)
                context = dataclasses.replace(context, prepared=prepared)
        for batch in plan.batches:
            its = [gradients[place] for place in batch.places]
            finite &= int(batch.encoder.encode(its, context, 1.0)) >= len(its)
            for bucket in batch.buckets:
                spoken = plan.spoken[bucket.index]
                if spoken is not None:
                    plan.backend.any_zero(spoken)
        if not finite:
            raise RuntimeError(f"{self.case.name} has made values that are not finite")
        for batch in plan.batches:
            batch.encoder.sent([True] * len(batch.places))
            batch.decoder.decode([self._heard[bucket.index] for bucket in batch.buckets], self._sink, context)


def heard_alone(segments: int) -> Heard:
    """What a rank without others hears of a bucket: that it votes on all of it."""
    votes = np.ones((1, segments), np.bool_)
    return Heard((VOTES,), votes, (-1,), np.zeros_like(votes), {})


def selectors(values: torch.Tensor) -> list[Contender]:
    """The 0.1 % of largest magnitude in one tensor."""
    share = max(1, values.numel() // 1000)

    def plain() -> torch.Tensor:
        return values.abs().topk(share, sorted=False).indices

    expected = plain().sort().values
    for sample in (None, 0.01):
        if not torch.equal(top_k(values, share, sample).sort().values, expected):
            raise RuntimeError(f"top_k(sample={sample}) finds others than torch.topk")
    return [
        Contender(TORCH_TOPK, "`x.abs().topk(k, sorted=False).indices`", plain),
        Contender(TOPK, "`TopK(0.001)`", lambda: top_k(values, share)),
        Contender(SAMPLED, "`TopK(0.001, sample=0.01)`", lambda: top_k(values, share, 0.01)),
    ]


# ----------------------------------------------------------------------------------------------- tables


def overheads(works: Sequence[Work], times: Times, elements: int) -> Table:
    """Each method's time beside its floor, and beside signum's."""
    copied = 2 * 4 * elements  # bytes: each number is read and written once
    moves = {COPY: copied, UNIFORM: copied / 2, NORMAL: copied / 2} | {work.case.name: work.bytes for work in works}
    rows = []
    for name, moved in moves.items():
        seconds = times[name]
        floors = [moved / copied * copy for copy in times[COPY]]
        against_floor, against_signum = (1 / speedup(other, seconds)[0] for other in (floors, times[SIGNUM]))
        rows.append(
            [
                name,
                f"{moved / 1e6:.0f}",
                f"{1e3 * statistics.median(floors):.1f}",
                f"{1e3 * statistics.median(seconds):.1f}",
                f"{against_floor:.2f}",
                f"{against_signum:.2f}",
            ]
        )
    title = "Time of one rank's own work, as multiples of its floor and of signum's time (medians of ratios)"
    return Table(title, ["", "MB moved at least", "floor ms", "median ms", "/ floor", "/ signum"], rows)


if __name__ == "__main__":
    main()
