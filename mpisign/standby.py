"""Spares: where the last ranks of a job wait, and what they are given when they step in for ranks that have died."""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from mpisign.checkpoint import local
from mpisign.checkpoint.saving import wait
from mpisign.checkpoint.state import State, Stateful, check_loadable, check_stateful, collect, put_back, reseed
from mpisign.cuts import cut
from mpisign.errors import CheckpointError, ConsistencyError, OptionError
from mpisign.optimizer import DistributedSignOptimizer
from mpisign.plain import plain, uncompiled
from mpisign.sampler import ElasticSampler
from mpisign.session import Session, operation
from mpisign.spares import STANDBY
from mpisign.windows import KEY

__all__ = ["Standby"]

logger = logging.getLogger(__name__)

TAG = 0x6D76
KEPT = [(int, str, [int], str)]  # place, field, shape and dtype of what a rank remembers

Memory = Mapping[int, Mapping[str, torch.Tensor]]


class Standby:
    """Where spares wait, and what they need to step in. **Collective**, with ``init(spares=)``; else nothing happens.

    Make it when all that a training step needs is there, so that a spare has it, too, after a checkpoint is loaded, and
    before the first step::

        mpisign.init(on_failure="continue", spares=1)
        ...
        standby = mpisign.Standby(model=model, optimizer=optimizer, scheduler=scheduler, sampler=sampler)
        for epoch in range(sampler.epoch, 90):
            ...

    Here the spares leave the others: :func:`mpisign.rank` and :func:`mpisign.size` are those of the ranks that train.
    On a spare it does not return before it has stepped in. If it is not needed, its process ends, with 0.

    When ranks have died, spares take their places as soon as all that are left are between two steps: where ``sampler``
    deals anew, or without one at the next :meth:`admit`. A spare gets rank 0's parameters, buffers, state of the
    wrapped optimizer, schedule, loss scale and place in the epoch, the mean of the memories of all ranks, and a random
    state of its own. It votes from the next step on. With ``every`` it begins within the window, at the common
    parameters.

    Args:
        model, optimizer, scheduler, scaler: as for :func:`mpisign.checkpoint.save`.
        sampler: an :class:`~mpisign.ElasticSampler`; the loop must be the one of its documentation.
        extra: anything else that must be brought level, with ``state_dict()`` and ``load_state_dict()`` of plain types
            and tensors.

    Raises:
        NotInitializedError: :func:`mpisign.init` has not been called.
        OptionError: one of them is something else.
    """

    @uncompiled
    @plain()
    def __init__(
        self,
        *,
        model: torch.nn.Module,
        optimizer: Stateful,
        scheduler: Stateful | None = None,
        scaler: Stateful | None = None,
        sampler: ElasticSampler | None = None,
        extra: Stateful | None = None,
    ) -> None:
        check_stateful(model=model, optimizer=optimizer, scheduler=scheduler, scaler=scaler, extra=extra)
        if sampler is not None and not isinstance(sampler, ElasticSampler):
            raise OptionError(
                f"sampler={type(sampler).__name__} is no mpisign.ElasticSampler: leave it out, and admit()"
            )
        self._model, self._optimizer, self._sampler = model, optimizer, sampler
        self._others = {"scheduler": scheduler, "scaler": scaler, "extra": extra}
        self._deserted = False  # no spare is left
        with operation(STANDBY) as session:
            spares = None if session.membership is None else session.membership.spares
            if spares is None or not spares.number:
                self._deserted = True
                return
            if spares.have_left:
                raise OptionError(
                    "Standby() was made before, and spares wait in one place: make one, for all that trains"
                )
            wait()  # for a save of which those that wait would not hear the end
            with session.telling(STANDBY):
                check_loadable(self._given()[0])
            spares.leave()
            if spares.is_one_that_waits:
                spares.wait(lambda joining: self._hand_over(session, joining))
                self._deserted = len(session.there) < spares.wanted  # as on those who were there before
                if sampler is not None:
                    sampler.step_in()
        if sampler is not None:
            sampler.before_dealing(self.admit)

    @uncompiled
    @plain()
    def admit(self) -> bool:
        """Let spares take the places of those who have died. Call it between two steps, on all ranks. **Collective**.

        Costs nothing while nobody has died. An ``ElasticSampler`` that was given calls it.

        Returns:
            Whether a spare has stepped in.
        """
        with operation("Standby.admit()") as session:
            spares = None if session.membership is None else session.membership.spares
            if spares is None or self._deserted or len(session.there) >= spares.wanted:
                return False
            try:
                wait()  # for a save in which those that step in have no part
            except CheckpointError as error:
                logger.error("%s", error)
            came = spares.let_in(lambda joining: self._hand_over(session, joining))
            self._deserted = not came or len(session.there) < spares.wanted  # all that waited have come
            return came

    # -------------------------------------------------------------------------------------------- what is given

    def _hand_over(self, session: Session, joining: tuple[int, ...]) -> None:
        """Bring the spares with these identities level. **Collective** over the new group, in which they are."""
        newcomers = [session.group.identities.index(its) for its in joining]
        session.meet(STANDBY)
        mine: Memory = {}
        message = np.zeros(0, np.uint8)
        if session.rank not in newcomers:
            with session.telling(STANDBY):
                given, mine = self._given()
                if session.rank == 0:
                    message = _packed({**given, "commits": session.commits, "counted": list(session.counted)})
        means = _means(session, mine, newcomers)
        if session.rank == 0:
            _send(session, message, newcomers)
        elif session.rank in newcomers:
            self._take(session, _unpacked(_receive(session)), means)
        if isinstance(self._optimizer, DistributedSignOptimizer):
            self._optimizer._met_newcomers()

    def _given(self) -> tuple[State, Memory]:
        """What newcomers get if this is rank 0, and what it remembers, of which they get the mean."""
        shared, own = collect(self._model, self._optimizer, self._others["scheduler"], self._others["scaler"])
        local.divide(shared, own, self._model, self._optimizer)
        extra = self._others["extra"]
        shared["extra"] = None if extra is None else extra.state_dict()
        memory = own["mpisign"] or {}
        mine: Memory = memory.get("memory", {})
        if self._sampler is not None:
            shared["sampler"] = self._sampler.position()
        kept = {key: value for key, value in memory.items() if key not in ("memory", "secret")}
        return {"shared": shared, "own": {**own, "mpisign": kept or None}}, mine

    def _take(self, session: Session, given: State, means: dict[int, dict[str, torch.Tensor]]) -> None:
        shared, own = given["shared"], given["own"]
        session.commits, session.counted = given["commits"], tuple(given["counted"])
        memory = own["mpisign"]
        if memory is not None:
            begun = memory.get(KEY)
            memory |= {"rank": session.rank, "size": session.size, "memory": means, "secret": ""}
            local.restart(shared, memory, own, [], "a survivor's state")
            if begun is not None:
                _catch_up(memory[KEY], begun)
            shared["optimizer"]["mpisign"] = memory
        put_back("model", self._model, shared["model"])
        put_back("optimizer", self._optimizer, shared["optimizer"])
        for name, target in self._others.items():
            if target is not None:
                put_back(name, target, shared[name])
        if self._sampler is not None:
            self._sampler.load_state_dict(shared["sampler"])
        reseed(own["random"], session.rank, session.size)


def _catch_up(state: dict[str, Any], begun: Mapping[str, Any]) -> None:
    """Local steps of one who has made none of those that others have, in ``begun``, at the common parameters."""
    state["position"] = begun["position"]
    if begun["sent"]:  # a decision is on its way, in which it has no part
        state["sent"] = {place: state["common"][place].clone() for place in begun["sent"] if place in state["common"]}


def _means(session: Session, mine: Memory, newcomers: Sequence[int]) -> dict[int, dict[str, torch.Tensor]]:
    """On newcomers, the means of what the others remember; who remembers nothing counts as zeros. **Collective.**"""
    mine_by = {(place, field): its for place, kept in mine.items() for field, its in kept.items()}
    said = [[place, field, list(its.shape), str(its.dtype)] for (place, field), its in mine_by.items()]
    everyones = session.gather_values(said, KEPT, STANDBY)
    forms = {(place, field): (tuple(shape), dtype) for told in everyones for place, field, shape, dtype in told}
    for told in everyones:
        for place, field, shape, dtype in told:
            if forms[place, field] != (tuple(shape), dtype):
                raise ConsistencyError(
                    f"{STANDBY}: ranks remember {field!r} of parameter {place} in different shapes or types (this is "
                    f"rank {session.rank})"
                )
    means: dict[int, dict[str, torch.Tensor]] = {}
    for (place, field), (shape, dtype) in forms.items():
        kept = mine_by.get((place, field))
        its = torch.zeros(shape, dtype=torch.float64, device="cpu") if kept is None else kept.detach().double().cpu()
        mean = _sum(session, its.contiguous(), newcomers) / (session.size - len(newcomers))
        kind = getattr(torch, dtype.removeprefix("torch."))
        means.setdefault(place, {})[field] = torch.from_numpy(mean.astype(np.float64)).to(kind)
    return means


def _sum(session: Session, values: torch.Tensor, roots: Sequence[int]) -> np.ndarray[Any, np.dtype[np.longdouble]]:
    """The sum over all ranks, on ``roots``, of fp64 values; of equal ones the mean is the same, to the last bit."""
    said = values.view(-1).numpy().astype(np.longdouble)
    heard = np.empty_like(said)
    for root in roots:
        for start, length in cut(said.size, said.itemsize):
            its = said[start : start + length], heard[start : start + length]
            session.wait(session.post(session.group.comm.Ireduce(*its, root=root), *its))
    return heard.reshape(values.shape)


def _packed(given: State) -> np.ndarray[Any, np.dtype[np.uint8]]:
    file = io.BytesIO()
    torch.save(given, file)
    return np.frombuffer(file.getbuffer(), np.uint8)


def _unpacked(message: np.ndarray[Any, np.dtype[np.uint8]]) -> State:
    given: State = torch.load(io.BytesIO(message.data), weights_only=True, map_location="cpu")
    return given


def _send(session: Session, message: np.ndarray[Any, np.dtype[np.uint8]], newcomers: Sequence[int]) -> None:
    comm = session.group.comm
    with session.watchdog.guard(STANDBY):
        for newcomer in newcomers:
            comm.Send(np.array([message.size], np.int64), newcomer, TAG)
            for start, length in cut(message.size):
                comm.Send(message[start : start + length], newcomer, TAG)


def _receive(session: Session) -> np.ndarray[Any, np.dtype[np.uint8]]:
    comm, size = session.group.comm, np.zeros(1, np.int64)
    with session.watchdog.guard(STANDBY):
        comm.Recv(size, 0, TAG)
        message = np.empty(int(size[0]), np.uint8)
        for start, length in cut(message.size):
            comm.Recv(message[start : start + length], 0, TAG)
    return message
