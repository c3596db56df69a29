"""``every=``: the wrapped optimizer steps on each rank's own gradients, and every so often the ranks exchange how far.

Stich, "Local SGD Converges Fast and Communicates Little", 2019; with an outer optimizer Reddi et al., "Adaptive
Federated Optimization", 2021, Algorithm 1, and Douillard et al., "DiLoCo: Distributed Low-Communication Training of
Language Models", 2023, Algorithm 1. The exchange itself is that of a :class:`~mpisign.DistributedSignOptimizer` around
the outer optimizer, whose parameters are the common ones and whose gradient is the difference: all that holds for
votes on gradients holds here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Optimizer

from mpisign import applying, restoring, sitting_out, sync, wrapping
from mpisign.averages import warn_of_averaging
from mpisign.backends import backend_for
from mpisign.bitmap.tensors import is_dense
from mpisign.buddies import Buddies
from mpisign.codecs import SignBits, Trits
from mpisign.collectives import average
from mpisign.errors import CheckpointError, ConsistencyError, GradientError, OptionError, SynchronizationError
from mpisign.exchange import header
from mpisign.exchange.local import clipped
from mpisign.layout import check_supported
from mpisign.memory import OneBitAdam
from mpisign.memory.noise import Noise
from mpisign.method import Method
from mpisign.plain import plain
from mpisign.planned import Planned
from mpisign.policy import check_integer
from mpisign.session import current
from mpisign.travel import Travel
from mpisign.windows import KEY, Windows

__all__ = ["LocalSteps", "Outer"]

Outer = Callable[[list[dict[str, Any]]], Optimizer]
"""Makes the outer optimizer, of parameter groups as torch's optimizers take them."""


def check_method(method: Method, has_rate: bool) -> None:
    """Raise :class:`OptionError`, with the reason, if a method makes no sense on differences of parameters.

    Args:
        has_rate: whether an outer optimizer was given.
    """
    named = f"every= and method={method.name}"
    instead = "take mpisign.scaled_vote(), mpisign.ef_signsgd(), mpisign.double_squeeze() or mpisign.mean()"
    memory = method.memory
    if method.exchanges_models:
        raise OptionError(f"{named} do not go together: it exchanges parameters itself, at every step; {instead}")
    if isinstance(memory, OneBitAdam):
        raise OptionError(
            f"{named} do not go together: it makes a step of Adam's of the ranks' gradients, and here Adam is what you "
            f"wrap: DistributedSignOptimizer(torch.optim.AdamW(...), every=...); {instead}"
        )
    if memory.running:
        raise OptionError(
            f"{named} do not go together: it sends changes of an estimate that follows a gradient, from which the "
            f"next one differs little, and differences follow the learning rate and a window's noise; {instead}"
        )
    if isinstance(memory, Noise) or memory.needs_maximum:
        raise OptionError(
            f"{named} do not go together: its noise and bounds are in units of gradients, and differences "
            f"shrink with the learning rate; {instead}"
        )
    if not has_rate and isinstance(method.codec, (SignBits, Trits)):
        raise OptionError(
            f"{named} need a rate, as what it decides is +-1 and not a distance: give "
            f"outer=lambda parameters: torch.optim.SGD(parameters, lr=1e-3), about what a parameter moves in a window, "
            f"or take mpisign.scaled_vote(), which votes on the distance, too"
        )


class LocalSteps:
    """Of one optimizer, its owner: windows of local steps, and the optimizer that exchanges at their ends.

    Args:
        wrapper: makes the optimizer that exchanges, a :class:`~mpisign.DistributedSignOptimizer`.
        every, outer, average_buffers, delay: see :class:`mpisign.DistributedSignOptimizer`.

    Raises:
        OptionError: one of them is impossible, or a method is.
        GradientError: a parameter is of a type that cannot be exchanged.
    """

    def __init__(
        self,
        owner: Planned,
        wrapper: Callable[..., Any],
        every: int,
        outer: Outer | None,
        average_buffers: nn.Module | None,
        delay: int,
    ) -> None:
        self.every = check_integer("every", every, 1)
        self.delay = check_integer("delay", delay, 0)
        if self.delay >= self.every:
            raise OptionError(
                f"delay={delay} is no part of a window of every={every} steps: the next difference would leave before "
                f"this one is decided; choose {every - 1} at most"
            )
        self._has_rate = outer is not None
        names = self._checked(owner)
        if owner.overlap is True:
            raise OptionError("overlap=True hides exchanges of gradients behind backward, and every= has none: drop it")
        if owner.backward_passes_per_step != 1:
            raise OptionError(
                f"backward_passes_per_step={owner.backward_passes_per_step} is for overlap, and with every= nothing "
                f"leaves while backward runs: leave it out, and call step() after as many backward passes as you like"
            )
        if average_buffers is not None and not isinstance(average_buffers, nn.Module):
            raise OptionError(f"average_buffers={type(average_buffers).__name__} is no module: pass the model itself")
        self._buffers = average_buffers
        self._begun = False
        self._seen: tuple[list[Any], list[Method]] = [], []
        self.windows = Windows(owner._parameters())
        groups = [
            {"params": self.windows.common(group["params"]), **self._options(group)} for group in owner.param_groups
        ]
        given = [list(map(id, group["params"])) for group in groups]
        named = zip(names.values(), self.windows.common([*names]), strict=True)
        made = SGD(groups, lr=1.0) if outer is None else outer(groups)
        if not isinstance(made, Optimizer):
            raise OptionError(f"outer= has made a {type(made).__name__}, and must make a torch.optim.Optimizer")
        if [list(map(id, group["params"])) for group in made.param_groups] != given:
            raise OptionError("outer= must make an optimizer of just the parameter groups it is given, in their order")
        self.inner = wrapper(
            made,
            named,
            method=owner.method,
            zeros=owner.policy.zeros,
            ties=owner.policy.ties,
            exchange=owner.exchange,
            seed=owner.policy.seed,
            bucket_cap_mb=owner.bucket_cap_mb,
            apply=owner.apply,
            audit=owner.audit,
            buddy_every=owner.buddy_every,
        )
        if self.delay:  # said later, as a method that needs all gradients first has them: its messages just wait
            self.inner.overlap = True
            self.inner._drop_plan()
        self._listen()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy has nothing of what is on its way: it sends anew."""
        self.__dict__.update(state)
        self._listen()

    def _listen(self) -> None:
        if self.delay:
            self.inner._overlap = Travel()

    def _match(self, owner: Planned) -> None:
        """Let the outer optimizer have the groups and parameters that the wrapped one has by now."""
        outer, groups, parameters = self.inner.wrapped, owner.wrapped.param_groups, owner._parameters()
        needs, methods = self.windows.needs, owner._methods()
        forms = [
            (at, id(p), p.shape, p.dtype, p.device, p.requires_grad, needs(p))
            for at, group in enumerate(groups)
            for p in group["params"]
        ]
        seen = forms, methods
        if seen == self._seen and len(groups) == len(outer.param_groups):
            for its, group in zip(outer.param_groups, groups, strict=True):
                its.update(self._options(group))
            return
        names = self._checked(owner)
        self._seen = seen
        self.windows.follow(parameters)
        for at, group in enumerate(groups):
            its = {"params": self.windows.common(group["params"]), **self._options(group)}
            if at == len(outer.param_groups):
                outer.add_param_group(its)
            else:
                outer.param_groups[at].pop("method", None)
                outer.param_groups[at].update(its)
        del outer.param_groups[len(groups) :]
        for gone in outer.state.keys() - set(self.windows.common(parameters)):
            if isinstance(gone, torch.Tensor):
                del outer.state[gone]
        self.inner._names = dict(zip(self.windows.common([*names]), names.values(), strict=True))

    def _checked(self, owner: Planned) -> dict[torch.Tensor, str]:
        """The names of the parameters. Raises if one that is trained, or a method, cannot be exchanged."""
        for method in owner._methods():
            check_method(method, self._has_rate)
        names = owner._all_names()
        for parameter in owner._parameters():
            if parameter.requires_grad:
                check_supported(names[parameter], parameter)
        return names

    def _options(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """Of an outer parameter group, besides its own. Ranks compare options, and so ``every`` with them."""
        return {"every": self.every, "delay": self.delay, **({"method": group["method"]} if "method" in group else {})}

    def _begin(self, owner: Planned) -> None:
        """Before a step, or before sitting out."""
        self._match(owner)
        if self.windows.is_shown:
            raise SynchronizationError(
                "a step inside `with optimizer.common_parameters():` would move the common parameters in place of this "
                "rank's own: leave it first"
            )
        if not self._begun:
            warn_of_averaging(owner._parameters())
            self._begun = True
        self.windows.begin()

    # ---------------------------------------------------------------------------------------------- steps

    def step(self, owner: Planned) -> None:
        """A local step, if the gradient is finite, and an exchange, if a window ends. **Collective** then."""
        with plain(), current().telling("step()"):
            self._begin(owner)
            abstention, unscale = owner._loss_scale.says(owner)
            wrapping.drop_frozen(owner._parameters())  # torch's optimizers would go on by their momentum
            moving = [p for p in owner._parameters() if p.grad is not None]
            for parameter in moving:
                if (gradient := parameter.grad) is not None and gradient.is_sparse:
                    parameter.grad = gradient.coalesce()  # of rows that come twice the sum has the norm
                if unscale != 1.0 and gradient is not None and gradient.dtype == torch.float16:
                    name = self.inner._names[self.windows.common([parameter])[0]]
                    raise GradientError(
                        f"rank {current().rank}: the gradient of {name!r} is {gradient.dtype}, in which a GradScaler's "
                        f"scale cannot be taken out of it: what is small would be 0. Keep the parameters in float32, "
                        f"and compute the loss under torch.autocast(..., dtype=torch.float16)"
                    )
            finite = abstention == header.VOTES and _prepared([p.grad for p in moving], unscale, owner.clip_grad_norm)
            owner._checks.stepped(finite)
        if finite:
            with current().telling("step()"):
                applying.step(owner.wrapped)
        owner._forget_gradients()
        self.windows.stepped(moving if finite else [])
        if self.windows.is_undecided and self.windows.position >= self.delay:
            self._meet(owner)
        if self.windows.position >= self.every:
            if self.delay:
                self.windows.part()
                current().parted += 1
            else:
                self._exchange(owner)
        if self.windows.is_undecided:
            with plain():
                self._travel()

    def _travel(self) -> None:
        """Let the differences of the last window leave, if they have not, and go on with what has come."""
        travel, membership = self.inner._overlap, current().membership
        try:
            if travel.may_leave(self.inner):
                self.windows.differ_as_sent()
                travel.depart(self.inner)
                for common in self.inner._parameters():
                    common.grad = None
            travel.advance()
        except Exception as error:
            if membership is None or not membership.is_loss(error):
                raise
            membership.recover()  # they leave again in the step that needs the decision

    def _meet(self, owner: Planned) -> None:
        """Go on from what is decided on the last window. **Collective.**"""
        with plain():
            self.windows.differ_as_sent()
        self.inner.step()
        current().whole = False
        with plain():
            self.windows.meet()
        self._exchanged(owner)

    def _exchange(self, owner: Planned) -> None:
        """End a window, and wait for what is decided on it. **Collective.**"""
        with plain():
            self.windows.differ()
        self.inner.step()
        with plain():
            self.windows.end()
        self._exchanged(owner)

    def _exchanged(self, owner: Planned) -> None:
        owner.report = self.inner.report
        self._average_buffers(votes=True)

    def join(self, owner: Planned) -> int:
        """End a window that has begun, then sit out until all have joined. **Collective.**"""
        with current().telling("step()"):
            self._begin(owner)
        if self.windows.is_undecided:
            self._meet(owner)
        if self.windows.position:
            self._exchange(owner)
            self.windows.begin()
        last = sitting_out.join(self.inner, lambda: self._average_buffers(votes=False))
        self.windows.end()
        owner.report = self.inner.report or owner.report
        return last

    def _average_buffers(self, *, votes: bool) -> None:
        """Let each floating-point buffer be the mean of those ranks' whose is finite. **Collective.**"""
        if self._buffers is None:
            return
        with plain():
            buffers = [_once(b.detach()) for b in self._buffers.buffers() if b.is_floating_point() and b.numel()]
            if not buffers:
                return
            mine = [b.reshape(-1).double().cpu() for b in buffers]
            counts = [votes and bool(its.isfinite().all()) for its in mine]
            told = [its if counted else torch.zeros_like(its) for its, counted in zip(mine, counts, strict=True)]
            told.append(torch.tensor(counts, dtype=torch.float64, device="cpu"))
            *means, shares = average(torch.cat(told), name="buffers").split([len(its) for its in told])
            for buffer, its, share in zip(buffers, means, shares.tolist(), strict=True):
                if share:  # else it is finite nowhere, such as a mask
                    buffer.copy_((its / share).view(buffer.shape))

    # --------------------------------------------------------------------------------------------- states

    def state_dict(self, owner: Planned) -> dict[str, Any]:
        """What belongs under ``"mpisign"``."""
        self._match(owner)
        outer = self.inner.state_dict()
        memory: dict[str, Any] = outer.pop("mpisign")
        for group in outer["param_groups"]:
            for name in ("every", "delay"):
                group.pop(name, None)
        memory[KEY] = {"every": self.every, **self.windows.state_dict(), "outer": outer}
        return memory

    def load(self, owner: Planned, saved: dict[str, Any] | None, wrapped: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave, and the wrapped optimizer's state. Raises :class:`CheckpointError`."""
        group, inner = current("load_state_dict()").group, self.inner
        whose = f"rank {group.rank}"
        self._match(owner)
        local = saved.get(KEY) if isinstance(saved, Mapping) else None
        if local is None:  # of gradients, or of none: their memory is in other units than one of differences
            saved = None
        memory = inner._memory.restored(saved, inner._parameters(), inner._memories(), group)
        if local is not None:
            local = self.windows.checked(local, whose)
            if not isinstance(local.get("outer"), Mapping):
                raise CheckpointError(f"{whose}: in this state ['mpisign']['local_steps']['outer'] is no dict")
        with wrapping.without_methods(owner.wrapped), restoring.as_it_was(owner.wrapped):
            restoring.load(owner.wrapped, wrapped, whose)
            if local is not None:
                with wrapping.without_methods(inner.wrapped):
                    restoring.load(inner.wrapped, local["outer"], f"{whose}: outer")
        inner._memory, inner._buddies = memory, Buddies(inner.buddy_every)
        inner._overlap.dropped()
        inner._drop_plan()
        if local is None or saved is None:
            self.windows.forget()
        else:
            self.windows.load(local)
            inner._exchanges, inner._epoch = saved["step"], saved["epoch"]

    def in_common(self, owner: Planned) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and values of what is the same on all ranks, besides what the outer optimizer keeps."""
        with plain():
            self._match(owner)
        names = self.inner._names
        pairs = zip(owner._parameters(), self.inner._parameters(), strict=True)
        yield from ((f"the common {names[c]!r}", c.detach()) for p, c in pairs if p.requires_grad)

    def broadcast(self, owner: Planned, root_rank: int) -> None:
        """Give all ranks ``root_rank``'s common parameters, outer state and place in the window. **Collective.**

        What was on its way is given up.
        """
        act = "broadcast_optimizer_state()"
        self.windows.take_over()
        told = self.windows.state_dict()
        told["known"] = sorted(told.pop("common"))
        del told["sent"], told["moved"]
        schema = {"position": int, "touched": [int], "trained": [int], "known": [int]}
        told = current(act).spread_value(told, schema, root_rank, act)
        sync.broadcast_parameters(self.in_common(owner), root_rank)
        with wrapping.without_methods(self.inner.wrapped):
            sync.broadcast_optimizer_state(self.inner.wrapped, root_rank)
        with current(act).telling(act):
            here = dict(enumerate(common.detach() for common in self.inner._parameters()))
            try:
                known = {place: here.get(place) for place in told["known"]}
                told |= {"common": known, "sent": {}, "moved": []}
                self.windows.load(self.windows.checked(told, f"rank {root_rank}"))
                self.windows.give_up()
                self.inner._overlap.dropped()
            except CheckpointError as error:
                raise ConsistencyError(f"{act}: {error}") from error


def _once(tensor: torch.Tensor) -> torch.Tensor:
    """A view that has each element once, where ``expand()`` has made a tensor that cannot be written to."""
    return tensor[tuple(slice(None if stride else 1) for stride in tensor.stride())]


def _prepared(gradients: Sequence[Any], unscale: float, clip: float | None) -> bool:
    """Take the loss scale out of gradients, in place, and clip them. Returns whether all are finite."""
    if not gradients:
        return True
    values = [g._values() if g.is_sparse else g for g in gradients]
    dense = [v if is_dense(v) else v.contiguous() for v in values]
    backend = backend_for(dense[0].device)
    if int(backend.first_bad(dense)) < len(dense):
        return False
    factor = unscale if clip is None else clipped(backend, dense, unscale, clip)
    if factor != 1.0:
        for value in values:
            value.mul_(factor)
    return True
