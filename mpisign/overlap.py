"""Messages that leave while backward runs: as soon as the last gradient of one is there, it is on its way.

Nobody has agreed on this step yet, so what leaves may have to be dropped: the handshake of the step settles it. What
one rank does early depends on no other rank, and so does whether it does anything.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from mpisign.errors import GradientError, MpisignError, OptionError, SynchronizationError
from mpisign.exchange import header
from mpisign.exchange.plan import Plan
from mpisign.exchange.round import Round
from mpisign.exchange.run import Early
from mpisign.method import Method
from mpisign.plain import plain, uncompiled
from mpisign.session import Session, current, is_initialized
from mpisign.warning import warn

__all__ = ["OVERLAP", "Overlap", "check_overlap"]

logger = logging.getLogger(__name__)

OVERLAP = (True, False, "auto")
WINDOWS = 3  # steps in which all was as it must be, after which "auto" begins
ATTEMPTS = 12  # steps that "auto" looks at, or in which nothing leaves early until that is said

PATIENCE = 0.01  # seconds until what is on its way is looked at again

ADVICE = (
    "wrap all backward passes of a step but the last in `with optimizer.no_sync():`, or say backward_passes_per_step=, "
    "clip between optimizer.synchronize() and optimizer.step(), or turn it off with overlap=False"
)

GONE = -1  # instead of how many messages a rank has sent: its optimizer is no more, nor its buffers

_owners: Any = WeakTensorKeyDictionary()  # of parameters: whose hooks are on them
_under_way: set[Overlap] = set()  # MPI reads and writes what belongs to them, whoever else has forgotten them
_stranded: list[Any] = []

_NOTHING: tuple[Callable[[], Any], int] = (lambda: None), 0


def check_overlap(option: object, methods: Sequence[Method] = (), clip: float | None = None) -> bool | Literal["auto"]:
    """Raise :class:`OptionError` unless it is one of ``OVERLAP``, and True where something could leave early."""
    if option not in OVERLAP or not isinstance(option, (bool, str)):
        raise OptionError(f"overlap={option!r} is not known: choose one of True, False, 'auto'")
    whole = [one.name for one in methods if all(phase.needs_all for phase in one.phases)]
    whole += ["clip_grad_norm="] if clip is not None else []
    if option is True and whole:
        raise OptionError(
            f"overlap=True sends gradients while backward makes others, and {whole[-1]} needs all of them first: drop "
            f"one of the two, or say overlap='auto'"
        )
    return option if isinstance(option, bool) else "auto"


class Overlap:
    """Of one optimizer: hooks on its parameters, and the round that they have begun.

    Args:
        option: one of ``OVERLAP``.
        passes: how many backward passes make a gradient.
    """

    _plan: Plan | None  # on which all ranks have agreed in their last step, if messages may leave early by it
    _round: Round | None  # with what has left
    _fault: MpisignError | None  # to be raised in the step
    _reason: str  # why what has left must not count, if the program is not as it must be
    _dropped: bool  # it must not count, and nobody is to blame
    _scaled: bool  # by a GradScaler
    _counts: list[int]  # by parameter, how often its gradient was added to
    _marks: list[tuple[Callable[[], Any], int]]  # by parameter, its gradient, and which version of that was there
    _rates: list[float]  # of what memories follow, when the first message was made
    _since: int  # how many gradients were there by then

    def __init__(self, option: bool | str, passes: int) -> None:
        self._strict, self._passes = option is True, passes
        self._off = option is False  # for good
        self._on = option is True
        self._clean = self._looked = self._drops = self._vain = 0
        self._paused = 0  # inside no_sync()
        self._known = False  # to the session, which will end
        self._barred = False  # from talking in the thread in which backward runs
        self._advanced = 0.0
        self._owner: Callable[[], Any] = lambda: None
        self._handles: list[Any] = []
        self._restart(None)

    # --------------------------------------------------------------------------------------------- a step

    def follow(self, owner: Any, plan: Plan) -> None:
        """After a step: all ranks have agreed on ``plan``, and the next backward may send by it."""
        if plan.early and not self._known:
            self._known = True
            session = current()
            session.farewells.callback(_leave, session, weakref.ref(self), plan.number)
            if session.membership is not None:
                session.membership.watch(self)
        if plan.early and not self._off:
            if self._plan is None or plan.use is not self._plan.use:
                self._install(owner, plan)
        else:
            self._uninstall()
        self._restart(plan if plan.early else None)

    def early(self, plan: Plan, scaled: bool) -> Early:
        """What this rank has sent before a step by ``plan``. Raises what has gone wrong in a hook.

        Args:
            scaled: a GradScaler has a say in it.
        """
        membership = current().membership
        if membership is not None and membership.is_loss(self._fault):
            membership.recover()
            self._restart(None)
        if self._fault is not None:
            raise self._fault
        self._scaled = scaled
        if plan is not self._plan or self._dropped:
            void = True
        else:
            self._reason = self._reason or self._found()
            void = bool(self._reason) or (self._round is not None and self._rates != self._learning_rates())
        if self._round is None:
            self._watch(clean=not void)
        elif not void:
            self._drops = 0
        if self._on and not void:
            self._watch_effect()
        return Early(self._plan, self._round, void, self._were_dropped)

    def sitting_out(self) -> Early:
        """What this rank has sent before a step in which it has no gradient."""
        return Early(self._plan, self._round, self._round is not None, self._were_dropped)

    def _were_dropped(self) -> None:
        """What was sent early, by whomever, was dropped. **Collective.**

        Raises:
            SynchronizationError: on all ranks, if overlap was demanded and is not possible as the program is.
        """
        reason = "" if self._round is None or self._off else self._reason
        if self._round is not None and not self._reason:
            self._drops += 1
            if self._drops >= WINDOWS and not self._off:
                self._drops = 0
                reason = f"gradients, parameters or rates have changed before the step, {WINDOWS} times on end"
        if reason and (self._scaled or not self._strict):
            self._stop(f"rank {current().rank}: messages leave after backward from now on, not while it runs: {reason}")
            reason = ""
        self._restart(self._plan)
        if not self._strict:
            return
        reasons = current().gather_values(reason, str, "a plan")
        told = [f"on rank {rank} {its}" for rank, its in enumerate(reasons) if its]
        if told:
            raise SynchronizationError(f"overlap=True, and {'; '.join(told[:3])}: {ADVICE}")

    def dropped(self) -> None:
        """The gradients of which some may have been sent are none any more."""
        self._dropped = self._dropped or self._round is not None
        self._counts = [0] * len(self._counts)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Backward inside only adds to gradients."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1

    def lost(self, recovering: object) -> None:
        """Ranks have died: what has left will not arrive, unless it is of the round that is being recovered."""
        if recovering is None or self._round is not recovering:
            if self._round is not None:
                self._round.plan.store.drop()
            self._restart(None)

    def leave(self, session: Session, number: int) -> None:
        """Before the job ends: take back what was sent for a step that does not come. **Collective.**

        Args:
            number: of the optimizer.
        """
        most, all_here = _meet(session, 0 if self._round is None else self._round.submitted)
        if most and not all_here:
            _strand(session, number, self._round)
        elif most and self._plan is not None and most <= len(self._plan.batches):
            left = self._round
            if left is None:
                step = self._plan.use.step + 1
                left = Round(self._plan, step, abstention=header.JOINED, reversible=True, session=session)
            left.abandon(most)
        self._uninstall()
        self._restart(None)
        self._known = False

    # --------------------------------------------------------------------------------------------- hooks

    def _restart(self, plan: Plan | None) -> None:
        count = 0 if plan is None else len(plan.layout.parameters)
        self._plan, self._counts, self._marks, self._rates = plan, [0] * count, [_NOTHING] * count, []
        self._round, self._fault, self._reason, self._dropped, self._scaled = None, None, "", False, False
        _under_way.discard(self)

    def _install(self, owner: Any, plan: Plan) -> None:
        self._uninstall()
        if self._owner() is not owner:
            weakref.finalize(owner, _remove, self._handles).atexit = False
        self._owner, me = weakref.ref(owner), weakref.ref(self)
        for place, parameter in enumerate(plan.layout.parameters):
            before = _owners.get(parameter)
            before = None if before is None else before()
            if before is not None and before is not self:
                before._stop("another DistributedSignOptimizer has the same parameters", quiet=True)
            _owners[parameter] = me
            self._handles.append(parameter.register_post_accumulate_grad_hook(_hook(me, place)))  # type: ignore[arg-type]

    def _uninstall(self) -> None:
        _remove(self._handles)

    def _stop(self, why: str, *, quiet: bool = False) -> None:
        self._off, self._on = True, False
        self._uninstall()
        if quiet:
            logger.info("%s", why)
        else:
            warn(why)

    def _fired(self, place: int, parameter: torch.Tensor) -> None:
        """A gradient is there, or more of one."""
        if self._off or self._paused or self._plan is None or self._plan.layout.parameters[place] is not parameter:
            return
        owner = self._owner()
        if owner is None or owner._synchronized or not is_initialized():
            return
        self._counts[place] += 1
        self._plan.use.comes_after_this()
        gradient = parameter.grad
        if self._counts[place] < self._passes or gradient is None or self._fault is not None:
            return
        if self._counts[place] == self._passes:
            self._marks[place] = _mark(gradient)
        if self._on and not self._reason and not self._dropped:
            if self._round is None and not self._ready(self._plan, 0):
                return
            try:
                self._send(owner, self._plan)
            except MpisignError as error:  # raised in the step, where all ranks are
                self._fault = error

    def _send(self, owner: Any, plan: Plan) -> None:
        session = current()
        a_round, now = self._round, time.monotonic()
        if a_round is not None and now - self._advanced < PATIENCE and not self._goes_on(plan, a_round):
            return
        self._advanced = now
        with session.turn.at_once() as mine, plain():
            if not mine or session.watchdog.broken:
                self._barred = not session.turn.may_talk()
                return
            if self._round is None:
                if plan.store.unsummed or owner._current_plan() is not plan:
                    return
                self._set_out(owner, plan)
            a_round = self._round
            assert a_round is not None
            while self._goes_on(plan, a_round):
                batch = plan.batches[a_round.submitted]
                try:
                    values = plan.gradients.chosen(batch.places)
                except GradientError:
                    self._dropped = True  # and raised in the step
                    return
                for place in batch.places:
                    gradient = plan.layout.parameters[place].grad
                    assert gradient is not None
                    self._marks[place] = _mark(gradient)
                a_round.submit(batch, values, wait=False)
            a_round.advance()

    def _set_out(self, owner: Any, plan: Plan) -> None:
        """Begin the round of the step that comes."""
        self._rates, self._since = self._learning_rates(), sum(self._counts)
        self._round = Round(plan, owner._exchanges, reversible=True)
        _under_way.add(self)
        self._round.begin()

    def _goes_on(self, plan: Plan, a_round: Round) -> bool:
        return a_round.submitted < len(plan.batches) and self._ready(plan, a_round.submitted)

    def _ready(self, plan: Plan, batch: int) -> bool:
        return all(self._counts[place] == self._passes for place in plan.batches[batch].places)

    def _learning_rates(self) -> list[float]:
        """Of what a memory follows, which is what it was when messages were made of it."""
        owner, plan = self._owner(), self._plan
        if owner is None or plan is None or not any(method.memory.follows_lr for method in plan.layout.methods):
            return []
        return [float(group.get("lr", 1.0)) for group in owner.param_groups]

    # -------------------------------------------------------------------------------------------- windows

    def _found(self) -> str:
        """Why what has been sent of these gradients, or would have been, must not count; "" if it may."""
        if self._scaled:
            return "a GradScaler decides on the whole gradient in its step"
        assert self._plan is not None
        names = self._plan.layout.names
        for place, parameter in enumerate(self._plan.layout.parameters):
            gradient, count = parameter.grad, self._counts[place]
            if count > self._passes:
                return f"the gradient of {names[place]!r} was added to {count} times"
            its, version = self._marks[place]
            if count == self._passes and (gradient is None or gradient is not its() or gradient._version != version):
                return f"the gradient of {names[place]!r} was changed after backward"
        return ""

    def _watch(self, *, clean: bool) -> None:
        """Take note of a step in which nothing was sent early."""
        if self._barred and not self._off:
            self._stop(
                "no overlap: backward runs in another thread than the one that has started MPI, which was started for "
                "that one alone: unset MPI4PY_RC_THREADS and MPI4PY_RC_THREAD_LEVEL, or say overlap=False"
            )
        if self._on or self._off or self._plan is None:
            return
        self._looked += 1
        self._clean = self._clean + 1 if clean and any(self._counts) else 0
        if self._clean >= WINDOWS:
            self._on = True
        elif self._looked >= ATTEMPTS:
            self._stop(f"no overlap: {self._reason or 'gradients are not made by one backward a step'}", quiet=True)

    def _watch_effect(self) -> None:
        """Say once if nothing has left before the last gradient was there, step after step: overlap gains nothing."""
        plan, made = self._plan, sum(self._counts)
        if plan is None or not made or len(plan.batches) == 1 or self._vain == ATTEMPTS:
            return
        self._vain = self._vain + 1 if self._round is None or self._since == made else 0
        if self._vain < ATTEMPTS:
            return
        names = [plan.layout.names[place] for place in plan.batches[0].places]
        missing = [name for name, place in zip(names, plan.batches[0].places, strict=True) if not self._counts[place]]
        why = f"{missing[0]!r} has got no gradient" if missing else f"{names[-1]!r} is among backward's last"
        warn(
            f"rank {current().rank}: overlap has had no effect for {ATTEMPTS} steps, as messages leave in their order, "
            f"and the first of {len(plan.batches)} was not complete before backward has ended: {why}. Pass "
            f"named_parameters=model.named_parameters(), register modules in the order in which forward calls them, "
            f"freeze what is not used, or say overlap=False"
        )


def _hook(overlap: weakref.ref[Overlap], place: int) -> Callable[[torch.Tensor], None]:
    @uncompiled
    def fired(parameter: torch.Tensor) -> None:
        its = overlap()
        if its is not None:
            its._fired(place, parameter)

    return fired


def _mark(gradient: torch.Tensor) -> tuple[Callable[[], Any], int]:
    return weakref.ref(gradient), gradient._version


def _leave(session: Session, overlap: weakref.ref[Overlap], number: int) -> None:
    if session.membership is not None and session.membership.recovered:
        return  # nothing is waited for, and a spare that has made no step has not been told to come here
    its = overlap()
    if its is not None:
        its.leave(session, number)
        return
    most, _ = _meet(session, GONE)
    if most:
        _strand(session, number, None)


def _meet(session: Session, sent: int) -> tuple[int, bool]:
    """How many messages the most has sent, and whether all ranks still have what they would take part with."""
    heard = session.meet("a plan", sent)
    return int(heard.max()), bool((heard != GONE).all())


def _strand(session: Session, number: int, left: Round | None) -> None:
    """Nobody can take back what was sent, so MPI keeps it, and all that belongs to it, until the process ends."""
    _stranded.append((session.group.lines.pop(number, None), left))


def _remove(handles: list[Any]) -> None:
    while handles:
        handles.pop().remove()
