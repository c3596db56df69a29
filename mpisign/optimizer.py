"""DistributedSignOptimizer: the user's own torch optimizer, fed with the ranks' common decision."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, TypeVar, overload

import torch
from torch.optim import Optimizer

from mpisign import applying, restoring, sitting_out, wrapping
from mpisign.bitmap.located import Located
from mpisign.buddies import Buddies
from mpisign.checks import StepChecks
from mpisign.errors import CheckpointError, OptionError, SynchronizationError
from mpisign.exchange import header
from mpisign.exchange.choose import Choice
from mpisign.exchange.local import local_update
from mpisign.exchange.plan import Plan
from mpisign.exchange.run import NOTHING, Early, run
from mpisign.exchange.sink import GradientSink, ModelSink, Sink
from mpisign.local_steps import LocalSteps, Outer
from mpisign.method import Method
from mpisign.methods import signum
from mpisign.overlap import Overlap
from mpisign.plain import plain, uncompiled
from mpisign.planned import Apply, Planned
from mpisign.policy import Policy, Ties, Zeros, check_integer
from mpisign.rules import BallotRule
from mpisign.scaling import LossScale
from mpisign.session import current, is_initialized, known, operation
from mpisign.trees import shown
from mpisign.windows import KEY

__all__ = ["DistributedSignOptimizer"]

T = TypeVar("T")


class DistributedSignOptimizer(Planned):
    """Wraps a torch optimizer so that ``step()`` applies what all ranks decide together, one bit a coordinate.

    ``step()`` is ``synchronize()``, which replaces every ``p.grad`` by the decision (+1, -1, or 0 where a
    policy says "do not move"), then the wrapped optimizer's own ``step()``; or both in one (see ``apply``).
    Around plain ``SGD(lr, weight_decay=...)`` this is Algorithm 1 of Bernstein et al., "signSGD with Majority Vote is
    Communication Efficient and Fault Tolerant", 2018. Learning rate, weight decay and schedules are the wrapped
    optimizer's, applied after the vote. Momentum belongs into ``method``, where it acts on each worker before
    the sign; ``SGD(momentum=...)`` would average *votes*, which is a different method.

    Args:
        optimizer: any torch optimizer but LBFGS, SparseAdam and those whose ``step()`` demands a closure.
        named_parameters: ``model.named_parameters()``, whose reverse is the order on the wire; every trainable one must
            be in the optimizer, and the other way round. Default: names made of groups and places, in their order.
        method: what is sent and how it is decided, e.g. :func:`mpisign.signum` (the default). A parameter group may
            have one of its own: ``{"params": norms, "method": mpisign.mean()}``.
        zeros: what an exactly zero value votes. ``"rows"``: where a whole row is zero (a parameter's first dimension;
            one of less than 64 elements a row is one row), nothing, from the second step on that some rank has such a
            row in that parameter; elsewhere a fair coin. ``"coin"``: always a fair coin. ``"abstain"``: nothing, for
            one more bit a coordinate. ``"positive"``: +1, as the paper's code did.
        ties: who wins a tie: ``"coin"`` a fair coin, the same on all ranks; ``"zero"`` nobody: the coordinate
            stays; ``"positive"`` +1.
        exchange: ``"allgather"``, ``"two_phase"``, ``"hierarchical"`` (votes are counted in each node first, so that
            fewer bytes leave a network card that several ranks share) or ``"auto"``; all decide the same votes.
        seed: of coins and noise; the same on all ranks, another for each optimizer of a job.
        clip_grad_norm: each rank's gradient is first clipped to this L2 norm, over all parameters and without a loss
            scale, so that one huge gradient does not stay in a momentum for hundreds of steps; a rank with a NaN or Inf
            then abstains wholly. None for never.
        bucket_cap_mb: a message is sent when it has grown to this many MiB; 1, or 16 where every rank has a GPU, or 1/4
            with overlap; where links were measured, what fits them.
        apply: who applies a vote in :meth:`step`. ``"auto"``: where ``optimizer`` is plain ``torch.optim.SGD`` (no
            momentum, no ``maximize``, no hooks on its ``step()``) and all methods decide signs, the vote is applied
            to the parameters at once, in one pass over memory instead of three; the result is SGD's own, bit for bit,
            and ``p.grad`` keeps this rank's gradient. ``"optimizer"``: always the wrapped optimizer, from ``p.grad``.
        overlap: whether messages leave while backward runs, so that a slow network is hidden behind it. ``True``: from
            the second step on; a program in which that cannot be right (a gradient that is added to twice, or changed
            after backward, and ``clip_grad_norm``) gets an error. ``"auto"``: on several nodes, after three steps in
            which it would have been right; where it is not any more, it ends with a warning. The votes are the same. It
            takes second buffers of the method's memory, 4 bytes a parameter and field.
        backward_passes_per_step: how many backward passes make a gradient, as in Horovod; for ``overlap``, like
            :meth:`no_sync`.
        audit: how many blocks of 1024 words of the others' decisions each rank recounts in every step; who has lied is
            named by an :class:`AuditError`, before anything is applied. 0 for none.
        buddy_every: after how many exchanges each rank sends a copy of what error feedback still owes the parameters to
            the next one, which takes that over if it dies; with ``init(on_failure="continue")``. None for never: it is
            lost with the rank.
        every: None to exchange gradients, in every step. An integer to exchange *differences of parameters*, by
            ``method``, at the end of every window of so many calls of :meth:`step`, in which ``optimizer``, AdamW say,
            steps on this rank's own gradients; all go on from the decision.
        outer: with ``every``, how a decision moves the common parameters: makes an optimizer of parameter groups, e.g.
            ``lambda parameters: torch.optim.SGD(parameters, lr=0.7, momentum=0.9, nesterov=True)`` for DiLoCo. None to
            apply it as it is; votes without a scale (:func:`mpisign.signum`) need a rate.
        delay: with ``every``, after how many steps of the next window a decision is applied, less than ``every``: it
            travels meanwhile. What this rank does in them stays, and is a part of the next difference.
        average_buffers: with ``every``, a module whose floating-point buffers (BatchNorm's statistics) are averaged
            over ranks at the end of every window. None: they are each rank's own.

    Construction is not collective, but every rank must build the same; the first step checks it.

    Attributes:
        report: the :class:`~mpisign.StepReport` of the last exchange, or None before the first.

    Raises:
        NotInitializedError: :func:`mpisign.init` has not been called.
        OptionError: an option has an impossible value; the message lists the possible ones.
        GradientError: a parameter is of a type that cannot be voted on.

    Example::

        optimizer = mpisign.DistributedSignOptimizer(
            torch.optim.SGD(model.parameters(), lr=1e-3), model.named_parameters())
    """

    _local: LocalSteps | None = None  # with every=
    _step_supports_amp_scaling = True  # GradScaler hands us its findings instead of skipping step() on its own

    def __init__(
        self,
        optimizer: Optimizer,
        named_parameters: Iterable[tuple[str, torch.Tensor]] | None = None,
        *,
        method: Method | None = None,
        zeros: Zeros = "rows",
        ties: Ties = "coin",
        exchange: Choice = "auto",
        seed: int = 0,
        clip_grad_norm: float | None = None,
        bucket_cap_mb: float | None = None,
        apply: Apply = "auto",
        overlap: bool | Literal["auto"] = False,
        backward_passes_per_step: int = 1,
        audit: int = 0,
        buddy_every: int | None = None,
        every: int | None = None,
        outer: Outer | None = None,
        average_buffers: torch.nn.Module | None = None,
        delay: int = 0,
    ) -> None:
        method = signum() if method is None else method
        wrapping.check_wrappable(optimizer)
        if isinstance(optimizer, DistributedSignOptimizer):
            raise OptionError("this is a DistributedSignOptimizer already: wrap the torch optimizer once")
        if not isinstance(method, Method):
            raise OptionError(f"method={method!r} is not a Method: use one of mpisign's, e.g. mpisign.signum(0.9)")
        options = exchange, clip_grad_norm, bucket_cap_mb, apply, overlap, backward_passes_per_step, audit, buddy_every
        self._configure(optimizer, named_parameters, method, Policy(zeros, ties, seed), *options)
        self._exchanges = 0
        self._epoch: int | None = None  # until somebody says
        self.__setstate__({})
        if every is not None:
            self._local = LocalSteps(self, DistributedSignOptimizer, every, outer, average_buffers, delay)
            return
        if outer is not None or average_buffers is not None or delay:
            raise OptionError("outer=, delay= and average_buffers= are about local steps: say every how many")
        with operation("DistributedSignOptimizer()"), plain():
            self._current_plan()
        if any(one.elects for one in self._methods()):
            wrapping.warn_if_adaptive(optimizer)
        self._checks.options(optimizer, self._methods())

    # -------------------------------------------------------------------------------------------- a step

    @uncompiled
    @operation("DistributedSignOptimizer.synchronize()")
    def synchronize(self) -> None:
        """Replace every ``p.grad`` by the ranks' decision, without a step. **Collective.**

        For work between decision and step, such as clipping; then step under :meth:`skip_synchronize`. A GradScaler's
        ``scaler.unscale_(optimizer)`` may come before or, as with Horovod, after: the vote is the same, and no decision
        is divided. A rank whose gradient has a NaN or Inf, or in which GradScaler found one, abstains. A parameter on
        which nobody votes ends with ``p.grad = None``, which torch's optimizers skip; if nobody votes on any, gradients
        stay as they are and :meth:`step` applies nothing.

        Raises:
            ConsistencyError: ranks differ in layout, in options, or are at different steps; the message names them.
            DeadTrainingError: see :func:`mpisign.init`.
        """
        with plain():
            if self._local is not None:
                raise SynchronizationError(
                    "with every= gradients are this rank's own, and nobody decides on them: clip or change them before "
                    "optimizer.step(), which exchanges at a window's end"
                )
            plan = self._told_plan(votes=True)
            if plan.exchanges_models:
                raise SynchronizationError(
                    f"{self.method.name} exchanges parameters after the step, so there are no gradients to "
                    f"synchronize: call optimizer.step()"
                )
            self._synchronize(plan, alone=True)

    def _synchronize(self, plan: Plan, *, alone: bool) -> bool:
        """Vote. Returns whether the decision has been applied.

        Args:
            alone: not as a part of ``step()``: the decision is wanted, and a GradScaler may come yet.
        """
        changing = [method for method in self._methods() if method.by_epoch]
        if self._epoch is None and changing:
            wrapping.warn_of_epochs(changing[0])
            self._epoch = 0
        with current().telling("step()"):
            abstention, unscale = self._loss_scale.says(self, alone=alone)
            early = self._overlap.early(plan, self._loss_scale.scales(self))
            values = plan.gradients.read()
        sink = None if alone or self.apply == "optimizer" else applying.step_sink(self.wrapped, plan, self._order)
        self._exchange(plan, values, abstention, unscale, sink or GradientSink(plan.layout, values), early)
        self._synchronized = True
        if len(plan.layout.parameters) < len(parameters := self._parameters()):
            wrapping.drop_frozen(parameters)
        return sink is not None

    def _exchange(
        self, plan: Plan, values: Located, abstention: int, unscale: float, sink: Sink, early: Early = NOTHING
    ) -> None:
        intent = self._checks.intent(plan, self.wrapped, self._methods(), self._exchanges, values)
        handshake, self.report = run(
            plan, self._exchanges, values, abstention, unscale, intent, sink, self._remade_plan, early
        )
        self._exchanges += 1
        self._agreed()
        self._buddies.exchanged(self._memory, self._parameters(), self._exchanges, handshake, self.report)
        self._checks.heard(plan, handshake, self.report)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes inside only add to gradients: for all but the last of a step, as with DDP's ``no_sync()``.

        Without overlap it changes nothing, as nothing is sent before :meth:`step`.
        """
        with self._overlap.paused():
            yield

    @contextmanager
    def skip_synchronize(self) -> Iterator[None]:
        """``step()`` inside applies the gradients that :meth:`synchronize` has left, and does not vote again."""
        self._skip = True
        try:
            yield
        finally:
            self._skip = False

    @overload  # type: ignore[override]
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], T]) -> T: ...
    @uncompiled
    def step(self, closure: Callable[[], T] | None = None) -> T | None:
        """Vote, then let the wrapped optimizer step; if nobody voted, no rank steps. **Collective.**

        With ``every``: step, unless this rank's gradient has a NaN or Inf, and at a window's end exchange; only then is
        it collective.

        Args:
            closure: computes the loss and the gradients once, before the vote.

        Returns:
            The closure's loss, or None.

        Raises:
            SynchronizationError: after ``synchronize()`` without ``skip_synchronize()``; inside
                ``skip_synchronize()`` without ``synchronize()``, or after a vote on gradients of an unknown loss scale.
            ConsistencyError, DeadTrainingError: see :meth:`synchronize`.
        """
        if self._skip and closure is not None:
            raise SynchronizationError(
                "step(closure) under skip_synchronize() would apply what the closure leaves in the gradients, which "
                "nobody has voted on: compute the loss before optimizer.synchronize(), and call step() without closure"
            )
        with torch.inference_mode(False), torch.enable_grad():
            loss = None if closure is None else closure()
        with operation("DistributedSignOptimizer.step()"):
            try:
                if self._skip:
                    self._check_synchronized()
                    applied = False
                elif self._local is not None:
                    self._local.step(self)
                    return loss
                else:
                    with plain():
                        plan = self._told_plan(votes=True)
                    if plan.exchanges_models:
                        self._step_and_mix(plan)
                        return loss
                    with plain():
                        applied = self._synchronize(plan, alone=False)
            except BaseException:
                for left in ("found_inf", "grad_scale"):  # GradScaler takes them back only if step() returns
                    self.__dict__.pop(left, None)
                raise
            self._forget_gradients()
            if self.report is not None and not self.report.skipped:
                if self._skip:
                    self._checks.applied(self.wrapped)
                (applying.count_step if applied else applying.step)(self.wrapped)
        return loss

    def _step_and_mix(self, plan: Plan) -> None:
        """A step on this rank's own gradient, unless it is not finite, and then the exchange of models."""
        with plain(), current().telling("step()"):
            abstention, unscale = self._loss_scale.says(self)
            finite = abstention == header.VOTES and local_update(plan, self._exchanges, plan.gradients.read(), unscale)
            self._checks.stepped(finite)
        if finite:
            with current().telling("step()"):
                wrapping.drop_frozen(self._parameters())
                applying.step(self.wrapped)
        self._loss_scale.reset()
        with plain():
            self._exchange(plan, plan.gradients.models(), header.VOTES, 1.0, ModelSink(plan.layout))

    def _check_synchronized(self) -> None:
        """Raise :class:`SynchronizationError` unless gradients are decisions, without a loss scale."""
        if not self._synchronized:
            raise SynchronizationError(
                "step() under skip_synchronize() without synchronize() would apply this rank's own gradient and the "
                "replicas would drift apart: call optimizer.synchronize() first"
            )
        plan = self._current_plan()
        self._loss_scale.check(all(isinstance(m.rule, BallotRule) for m in plan.layout.methods), self)

    def set_epoch(self, epoch: int) -> None:
        """Tell methods that change with the epoch (DGC's warm-up) where training is, on every rank, from 0."""
        self._epoch = check_integer("epoch", epoch, 0)
        if self._local is not None:
            self._local.inner.set_epoch(epoch)

    @uncompiled
    @operation("DistributedSignOptimizer.join()")
    @plain()
    def join(self) -> int:
        """Sit out, abstaining, until every rank has called ``join()``. **Collective.**

        With ``every``, a window that has begun ends here, and its difference is exchanged.

        For ranks that run out of batches early. Call it on every rank when its batches end. The ranks still
        training go on voting without us; when all have joined, those that joined early get the parameters and
        the optimizer state of the last one. A scheduler stepped per batch must be brought level by its owner.
        It serves training loops with one DistributedSignOptimizer: two that take turns cannot both be sat out.

        Returns:
            The last rank to join (the lowest of those that joined at the same time).
        """
        return sitting_out.join(self) if self._local is None else self._local.join(self)

    @contextmanager
    def common_parameters(self) -> Iterator[None]:
        """With ``every``: inside, the model holds the parameters that all ranks have in common, to evaluate or export.

        Between two exchanges they are those of the last; afterwards this rank's own are back, bit for bit. A state
        that is saved inside leaves out what was done since then. Buffers stay as they are. Not collective.
        """
        with nullcontext() if self._local is None else self._local.windows.shown():
            yield

    @property
    def outer(self) -> Optimizer | None:
        """With ``every``, the optimizer of the common parameters, for a schedule of its own; else None."""
        return None if self._local is None else self._local.inner.wrapped

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, as torch does."""
        super().zero_grad(set_to_none)
        self._overlap.dropped()

    # ------------------------------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state dict, plus ``"mpisign"``: this rank's memory and the step number.

        Every rank's is its own: save one a rank to resume exactly. Plain types and tensors only, so that
        ``torch.load(weights_only=True)`` reads it.
        """
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        with wrapping.without_methods(self.wrapped):
            state: dict[str, Any] = self.wrapped.state_dict()
        group = known("state_dict()").group if is_initialized() else None
        if self._local is not None:
            state["mpisign"] = self._local.state_dict(self)
        else:
            state["mpisign"] = self._memory.state_dict(
                self._parameters(), self._exchanges, self._epoch, self.method.name, group
            )
        for after in self._optimizer_state_dict_post_hooks.values():
            state = after(self, state) or state
        return state

    @uncompiled
    @plain()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave on this rank; resuming is then exact. Not collective.

        A plain optimizer's state dict loads too, and so does another rank's or another method's, each with a
        warning that the memory starts fresh.

        Raises:
            CheckpointError: it was saved by a job of another size, by a newer version, for other parameters or another
                optimizer, or something in it is missing or damaged; the message names what. Nothing has been changed
                then.
        """
        group = current("load_state_dict()").group
        if not isinstance(state_dict, Mapping):
            raise CheckpointError(f"rank {group.rank}: {shown(state_dict)} is no state dict of an optimizer")
        state_dict = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = before(self, state_dict) or state_dict
        saved = state_dict.pop("mpisign", None)
        if self._local is not None:
            self._local.load(self, saved, state_dict)
        else:
            if isinstance(saved, Mapping) and KEY in saved:
                saved = None  # its memory is of differences
            memory = self._memory.restored(saved, self._parameters(), self._memories(), group)
            with wrapping.without_methods(self.wrapped):
                restoring.load(self.wrapped, state_dict, f"rank {group.rank}")
            self._memory, self._buddies = memory, Buddies(self.buddy_every)
            self._drop_plan()  # it holds the old memory
            if saved is not None:
                self._exchanges, self._epoch = saved["step"], saved["epoch"]
        self._forget_gradients()
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _met_newcomers(self) -> None:
        """A spare has stepped in, which knows nothing of earlier steps: all begin to compare anew."""
        self._checks = StepChecks()
        if self._local is not None:
            self._local.inner._met_newcomers()

    # ------------------------------------------------------------------------------ pickle, deepcopy, print

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._plan = self._session = None
        self._synchronized = self._skip = False
        self._loss_scale, self._checks, self._buddies = LossScale(), StepChecks(), Buddies(self.buddy_every)
        self._overlap = Overlap(self.overlap, self.backward_passes_per_step)
        self.report = None
        with wrapping.keep_defaults(self.wrapped):
            super().__setstate__({})  # torch makes its hook tables
        applying.forbid_alone(self.wrapped, self)

    def __repr__(self) -> str:
        every = "" if self._local is None else f"every={self._local.every}, "
        return (
            f"{type(self).__name__}({every}method={self.method.name}, zeros={self.policy.zeros!r}, "
            f"ties={self.policy.ties!r}, exchange={self.exchange!r}, wrapped={self.wrapped!r})"
        )
