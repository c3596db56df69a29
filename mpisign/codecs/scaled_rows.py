"""One bit for each coordinate and one scale for each row: what a scaled vote is cast and comes down in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from mpisign.backends import WORD, Flag, backend_for
from mpisign.bitmap.host import words_for
from mpisign.bitmap.tensors import strides_of
from mpisign.codecs.codec import Codec, Part, Planes
from mpisign.policy import Policy, StepContext

__all__ = ["ScaledRows"]

LEAST = 64  # elements of a row that has a scale of its own: with fewer, that would cost more than half a bit each


@dataclass(frozen=True)
class ScaledRows(Codec):
    """``(||row||_1 / n) sign(p)``, row by row: first the rows' scales, fp32 numbers, then the signs as words.

    A row is what has one index in the first dimension of a parameter of two or more. A parameter of fewer, or with
    less than 64 elements a row, is one row. Where a row is cut, each part goes with the scale of the whole. A row of
    zeros has the scale 0; other exact zeros get what the policy says, a coin by default. With ``zeros="abstain"`` a
    second plane says which values are not zero.

    Args:
        rows, each, lo, elements: set for a parameter, and for a part of one: how many rows it has, how many elements of
            one lie side by side on the wire, with which element a message begins, and how many it has.
        silence: a decision has the second plane in any case.
    """

    rows: int = 1
    each: int = 1
    lo: int = 0
    elements: int = 0
    silence: bool = False
    name = "scaled_rows"

    def of(self, parameter: torch.Tensor) -> ScaledRows:
        rows, elements = parameter.shape[0] if parameter.dim() > 1 else 1, parameter.numel()
        if rows < 2 or elements // rows < LEAST:
            return ScaledRows(1, max(elements, 1), 0, elements)
        return ScaledRows(rows, strides_of(parameter)[0], 0, elements)

    def part(self, lo: int, hi: int) -> ScaledRows:
        return replace(self, lo=lo, elements=hi - lo)

    @property
    def runs(self) -> int:
        """How many stretches of one row each there are in a message, which are more than rows if those lie apart."""
        return -(-(self.lo + self.elements) // self.each) - self.lo // self.each if self.elements else 0

    @property
    def scales(self) -> int:
        """How many scales there are in a message, of the rows from the first element's on, row 0 after the last."""
        return min(self.rows, self.runs)

    def length(self, elements: int) -> int:
        return self.scales + words_for(elements)

    def planes(self, policy: Policy) -> int:
        return 2 if self.silence or policy.zeros == "abstain" else 1

    def encode(self, values: torch.Tensor, message: Planes, context: StepContext, first_word: int) -> Flag:
        return self._write(values, self._scales_of(values), message, context, first_word)

    def encode_parts(self, values: torch.Tensor, parts: Sequence[Part], context: StepContext) -> Flag:
        finite: Flag = True
        scales = self._scales_of(values)
        for part in parts:
            codec = part.codec
            assert isinstance(codec, ScaledRows)
            here = (codec.lo // codec.each + torch.arange(codec.scales, device=scales.device)) % codec.rows
            its = values[part.lo : part.hi]
            finite = finite & codec._write(its, scales[here], part.message, context, part.first_word)
        return finite

    def add(self, message: torch.Tensor, out: torch.Tensor, alpha: float) -> None:
        scratch = out.new_empty(0)
        for span in backend_for(out.device).blocks(out.numel()):
            out[span].add_(self._decode(message, scratch.resize_(span.stop - span.start), span), alpha=alpha)

    def decode(self, decision: torch.Tensor, out: torch.Tensor, context: StepContext | None = None) -> None:
        for span in backend_for(out.device).blocks(out.numel()):
            self._decode(decision, out[span], span)

    def split(self, plane: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The scales (r,) fp32 and the words (k,) in a plane of a message, both as views."""
        return plane[: self.scales].view(torch.float32), plane[self.scales :]

    def words_of(self, rows: torch.Tensor) -> torch.Tensor:
        """A bitmap (k,) that is 1 on the elements of the ``rows`` (r,) that are true, in the order of the scales."""
        k, by_run = words_for(self.elements), self._by_run(rows, slice(0, self.runs))
        if (self.each | self.lo) % 32 == 0 or self.rows == 1:
            at = torch.arange(k, device=rows.device).mul_(32)
            words = by_run[self._run_of(at)].to(WORD).neg_()
        else:
            words, backend = torch.empty(k, dtype=WORD, device=rows.device), backend_for(rows.device)
            for span in backend.blocks(self.elements):
                at = torch.arange(span.start, span.stop, device=rows.device)
                signs = by_run[self._run_of(at)].float().sub_(0.5)
                backend.pack(signs, words[span.start // 32 : words_for(span.stop)], zeros="positive")
        if self.elements % 32:
            words[-1:] &= (1 << self.elements % 32) - 1
        return words

    # ---------------------------------------------------------------------------------------------- inside

    def _by_run(self, by_scale: torch.Tensor, runs: slice) -> torch.Tensor:
        """What belongs to the scales (r,), for some of the runs."""
        if self.runs == self.scales:
            return by_scale[runs]
        return by_scale[torch.arange(runs.start, runs.stop, device=by_scale.device) % self.rows]

    def _run_of(self, at: torch.Tensor) -> torch.Tensor:
        """The run in which each of the message's elements is."""
        return at.add_(self.lo % self.each).div_(self.each, rounding_mode="floor")

    def _stretches(self, values: torch.Tensor, start: int = 0) -> list[tuple[slice, torch.Tensor]]:
        """Elements from number ``start`` of the message on, as runs and a view (runs, elements of each)."""
        found, at = [], 0
        while at < len(values):
            run, into = divmod(self.lo % self.each + start + at, self.each)
            count = 1 if into else max(1, (len(values) - at) // self.each)
            stop = min(at + count * self.each - into, len(values))
            found.append((slice(run, run + count), values[at:stop].view(count, -1)))
            at = stop
        return found

    def _scales_of(self, values: torch.Tensor) -> torch.Tensor:
        """The mean magnitude of each row (r,), of which all ``values`` that there are are given."""
        backend = backend_for(values.device)
        norms = torch.zeros(self.runs, dtype=torch.float64, device=values.device)
        sizes = torch.zeros_like(norms)
        for runs, view in self._stretches(values):
            norms[runs], sizes[runs] = backend.magnitudes(view), float(view.shape[1])
        scales = self.scales
        if self.runs > scales:  # rows that lie apart
            row = torch.arange(self.runs, device=values.device) % self.rows
            norms, sizes = (norms.new_zeros(scales).index_add_(0, row, its) for its in (norms, sizes))
        return (norms / sizes).float()

    def _write(
        self, values: torch.Tensor, scales: torch.Tensor, message: Planes, context: StepContext, first_word: int
    ) -> Flag:
        (head, words), backend, zeros = self.split(message[0]), backend_for(values.device), context.policy.zeros
        nonzero = None
        if len(message) > 1:
            message[1][: self.scales] = 0
            nonzero = self.split(message[1])[1]
        head.copy_(scales)
        zeros, key = "coin" if zeros == "rows" else zeros, context.zeros_key
        finite = backend.pack(values, words, zeros=zeros, key=key, first_word=first_word, nonzero=nonzero)
        return finite & backend.all_finite(scales)  # which overflow where fp64 values are too large for fp32

    def _decode(self, message: torch.Tensor, out: torch.Tensor, span: slice) -> torch.Tensor:
        """Write the elements ``span`` of the message into ``out``."""
        (scales, words), here = self.split(message[0]), slice(span.start // 32, words_for(span.stop))
        nonzero = self.split(message[1])[1][here] if len(message) > 1 else None
        backend_for(out.device).unpack(words[here], out, nonzero=nonzero)
        for runs, view in self._stretches(out, span.start):
            view.mul_(self._by_run(scales, runs)[:, None])
        return out
