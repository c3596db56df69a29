"""An optimizer's plan, and all that it is made of: parameters, methods, memory, and where the ranks are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

import torch
from torch.optim import Optimizer

from mpisign import wrapping
from mpisign.buddies import Buddies, check_buddy_every
from mpisign.checks import StepChecks
from mpisign.errors import SynchronizationError
from mpisign.exchange.audit import check_audit
from mpisign.exchange.choose import check_exchange
from mpisign.exchange.plan import Plan, make_plan
from mpisign.memory import Memory
from mpisign.memory.store import MemoryStore
from mpisign.method import Method
from mpisign.overlap import Overlap, check_overlap
from mpisign.policy import Policy, check_choice, check_integer, check_positive
from mpisign.session import Session, current
from mpisign.wrapper import Wrapper

__all__ = ["Apply", "Planned"]

Apply = Literal["auto", "optimizer"]


class Planned(Wrapper):
    """A wrapper with a plan, which is made anew only if what it was made of has changed."""

    method: Method
    policy: Policy
    exchange: str
    bucket_cap_mb: float | None
    overlap: bool | str = False
    backward_passes_per_step: int = 1
    audit: int = 0
    buddy_every: int | None = None
    apply: str
    clip_grad_norm: float | None = None  # of optimizers that were pickled before there was one
    _names: dict[torch.Tensor, str]  # in the order of the wire, which is the reverse
    _order: Sequence[int] = ()  # the places in the groups, of what is trained, of the plan's parameters
    _memory: MemoryStore
    _exchanges: int
    _epoch: int | None
    _synchronized: bool
    _plan: Plan | None
    _session: Session | None  # where it has its _number
    _number: int
    _overlap: Overlap
    _checks: StepChecks
    _buddies: Buddies

    def _configure(
        self,
        optimizer: Optimizer,
        named_parameters: Iterable[tuple[str, torch.Tensor]] | None,
        method: Method,
        policy: Policy,
        exchange: str,
        clip_grad_norm: float | None,
        bucket_cap_mb: float | None,
        apply: str,
        overlap: bool | str,
        backward_passes_per_step: int,
        audit: int,
        buddy_every: int | None,
    ) -> None:
        """Take what the user has said. Raises :class:`OptionError`."""
        methods = [method, *wrapping.methods_of(optimizer.param_groups)]
        self.audit = check_integer("audit", audit, 0)
        if bucket_cap_mb is not None:
            bucket_cap_mb = check_positive("bucket_cap_mb", bucket_cap_mb)
        if clip_grad_norm is not None:
            clip_grad_norm = check_positive("clip_grad_norm", clip_grad_norm, ", or None for never")
        check_choice("apply", apply, get_args(Apply))
        self.wrapped, self.method, self.policy, self.exchange = optimizer, method, policy, exchange
        self.clip_grad_norm, self.bucket_cap_mb, self.apply = clip_grad_norm, bucket_cap_mb, apply
        self.overlap = overlap
        self._check_methods(methods)
        self.backward_passes_per_step = check_integer("backward_passes_per_step", backward_passes_per_step, 1)
        self.buddy_every = check_buddy_every(buddy_every, methods)
        self._names = wrapping.names_of(optimizer, named_parameters)
        self._memory = MemoryStore(method.memory)

    def _check_methods(self, methods: Sequence[Method]) -> None:
        """Raise :class:`OptionError` where an option cannot be with one of them."""
        for method in methods:
            check_exchange(self.exchange, method)
            check_audit(self.audit, method)
        self.overlap = check_overlap(self.overlap, methods, self.clip_grad_norm)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the wrapped optimizer, on every rank before the same step.

        Raises:
            OptionError: its ``"method"`` is none, or options cannot be with it. Nothing has been added.
        """
        if isinstance(param_group, dict):  # else torch says what it is
            self._check_methods(wrapping.methods_of([param_group]))
        self.wrapped.add_param_group(param_group)

    def _current_plan(self) -> Plan:
        """The plan for parameters, methods and the group as they are now; made anew only if they changed."""
        session = current("DistributedSignOptimizer.step()")
        pairs: list[tuple[torch.Tensor, Method]] = []
        for group in self.param_groups:
            method = group.get("method", self.method).at(self._exchanges, self._epoch or 0)
            pairs += [(p, method) for p in group["params"] if p.requires_grad]
        plan = self._plan
        if plan is None or not self._fits(plan, pairs, session):
            names = self._all_names()
            places = {parameter: place for place, parameter in enumerate(names)}
            self._order = sorted(range(len(pairs)), key=lambda at: places[pairs[at][0]])
            active, methods = self._ordered(pairs)
            named = [(names[p], p) for p in active]
            if session is not self._session:
                self._session, self._number = session, session.next_number()
            store, options = self._memory, (self.policy, self.exchange, self.bucket_cap_mb)
            store.follow(self._parameters(), self._memories(), session.group)
            self._drop_plan()
            plan = make_plan(
                named,
                methods,
                *options,
                store,
                session.group,
                self._number,
                self.clip_grad_norm,
                session.network,
                self.overlap,
                self.audit,
            )
        self._plan = plan.telling()
        self._memory.follow_rates(self.param_groups)
        return self._plan

    def _fits(self, plan: Plan, pairs: Sequence[tuple[torch.Tensor, Method]], session: Session) -> bool:
        if plan.asks and session.network.asked:  # by another optimizer; ranks whose plan is younger have not asked
            return False
        return len(pairs) == len(self._order) and plan.fits(*self._ordered(pairs), session.group)

    def _ordered(self, pairs: Sequence[tuple[torch.Tensor, Method]]) -> tuple[list[torch.Tensor], list[Method]]:
        """Parameters, and their methods, in the order of a layout."""
        ordered = [pairs[at] for at in self._order]
        return [parameter for parameter, _ in ordered], [method for _, method in ordered]

    def _all_names(self) -> dict[torch.Tensor, str]:
        """The names of all parameters in the order of a layout: as they were named, then those of groups added since.

        Groups are often made by what a parameter is (decayed or not), and say nothing of when backward reaches it.
        """
        usual = wrapping.default_names(self.param_groups)
        named = {parameter: name for parameter, name in self._names.items() if parameter in usual}
        return {**named, **usual, **named}

    def _agreed(self) -> None:
        """All ranks have stepped by the present plan."""
        if self._plan is not None:
            self._plan = self._plan.telling()
            self._overlap.follow(self, self._plan)

    def _remade_plan(self) -> Plan:
        self._drop_plan()
        return self._current_plan()

    def _drop_plan(self) -> None:
        if self._plan is not None:
            self._plan.use.over()
        self._plan = None

    def _told_plan(self, *, votes: bool = False) -> Plan:
        """The same at the beginning of what all ranks do: if there can be none here, all are told. **Collective.**

        Args:
            votes: on gradients that must be none of an earlier vote's decisions.
        """
        with current("DistributedSignOptimizer.step()").telling("step()"):
            if votes and self._synchronized:
                raise SynchronizationError(
                    "synchronize() was called twice for the same gradients, which would vote on votes: apply them with "
                    "`with optimizer.skip_synchronize(): optimizer.step()`, or drop them with optimizer.zero_grad(); "
                    "model.zero_grad() does not tell the optimizer"
                )
            return self._current_plan()

    def _methods(self) -> list[Method]:
        """The method of each parameter group."""
        return [group.get("method", self.method) for group in self.param_groups]

    def _memories(self) -> dict[torch.Tensor, Memory]:
        """By parameter, the memory of its method as it is now."""
        step, epoch = self._exchanges, self._epoch or 0
        return {
            parameter: method.at(step, epoch).memory
            for group, method in zip(self.param_groups, self._methods(), strict=True)
            for parameter in group["params"]
        }
