"""Batch normalization over the batches of all ranks: for small batches on each."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mpisign.collectives import allreduce
from mpisign.errors import GradientError
from mpisign.places import size
from mpisign.session import is_initialized

__all__ = ["SyncBatchNorm"]


class SyncBatchNorm(_BatchNorm):
    """BatchNorm whose mean and variance are those of all ranks' batches together, as Horovod's and torch's.

    In training, forward and backward are **collective**: every rank must run the same layers in the same order. Ranks
    may have batches of different sizes. Each layer costs one small :func:`mpisign.allreduce` forward and one
    backward. In evaluation it is plain BatchNorm, and never collective: without ``track_running_stats``, over this
    rank's batch. Ioffe and Szegedy, "Batch Normalization", 2015, Algorithm 1.

    Its gradients have none themselves: differentiating what ``create_graph=True`` has given raises
    :class:`~mpisign.GradientError`.

    Its arguments are those of ``torch.nn.BatchNorm1d``; its input is (n, channels, ...).
    """

    def _check_input_dim(self, input: torch.Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"SyncBatchNorm takes (n, channels, ...), and this is {tuple(input.shape)}")

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(n, channels, ...) to the same."""
        self._check_input_dim(input)
        if not self.training or not is_initialized() or size() == 1:
            return super().forward(input)
        out, mean, var, count = _Normalized.apply(input, self.weight, self.bias, self.eps)
        if self.track_running_stats and self.running_mean is not None:
            with torch.no_grad():
                assert self.num_batches_tracked is not None
                assert self.running_var is not None
                self.num_batches_tracked.add_(1)
                share = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
                unbiased = var * (count / max(count - 1, 1))
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), share)
        result: torch.Tensor = out
        return result

    @classmethod
    def convert(cls, module: nn.Module) -> nn.Module:
        """``module`` with every BatchNorm in it replaced by one of these, with its parameters and statistics."""
        if isinstance(module, _BatchNorm) and not isinstance(module, cls):
            new = cls(module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats)
            for key in ("weight", "bias"):
                setattr(new, key, getattr(module, key))  # the parameter itself, which an optimizer may hold
            for key in ("running_mean", "running_var", "num_batches_tracked"):
                setattr(new, key, getattr(module, key))
            new.training = module.training
            return new
        for name, child in module.named_children():
            setattr(module, name, cls.convert(child))
        return module


class _Normalized(torch.autograd.Function):
    """The normalized input, and mean, variance and number of the values of all ranks."""

    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, weight: Any, bias: Any, eps: float) -> tuple[Any, ...]:
        others = [0, *range(2, input.dim())]
        here = input.numel() // input.shape[1]
        if here:
            var, mean = torch.var_mean(input.float() if input.itemsize < 4 else input, others, correction=0)
            var, mean = var.double(), mean.double()
        else:  # a rank without a batch
            var = mean = input.new_zeros(input.shape[1], dtype=torch.float64)
        told = torch.cat([mean.new_tensor([here]), here * mean, here * (var + mean * mean)])
        count, sums, squares = allreduce(told, "sum").split([1, len(mean), len(mean)])
        mean = sums / count
        var = (squares / count - mean * mean).clamp_min(0)
        deviation = (var + eps).rsqrt()
        wide = torch.float32 if input.itemsize < 4 else input.dtype
        shape = [1, -1] + [1] * (input.dim() - 2)
        ctx.save_for_backward(input, weight, mean.to(wide), deviation.to(wide), count.to(wide))
        ctx.others, ctx.shape = others, shape
        out = (input.to(wide) - mean.to(wide).view(shape)) * deviation.to(wide).view(shape)
        if weight is not None:
            out = out * weight.to(wide).view(shape) + bias.to(wide).view(shape)
        ctx.mark_non_differentiable(mean, var)
        return out.to(input.dtype), mean, var, float(count)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor, *_: Any) -> tuple[Any, ...]:  # type: ignore[override]
        input, weight, mean, deviation, count = ctx.saved_tensors
        with torch.no_grad():
            wide = gradient.to(deviation.dtype)
            centered = (input.to(wide.dtype) - mean.view(ctx.shape)) * deviation.view(ctx.shape)
            of_bias, of_weight = wide.sum(ctx.others), (wide * centered).sum(ctx.others)
            told = allreduce(torch.cat([of_bias, of_weight]), "sum") / count
            usual, along = told.view(2, -1)
            scale = deviation if weight is None else deviation * weight.to(deviation.dtype)
            of_input = (wide - usual.view(ctx.shape) - centered * along.view(ctx.shape)) * scale.view(ctx.shape)
            found = [of_input.to(gradient.dtype)]
            if weight is not None:
                found += [of_weight.to(weight.dtype), of_bias.to(weight.dtype)]
        if torch.is_grad_enabled():  # create_graph=True
            found = [_Last.apply(its, gradient, input, weight) for its in found]
        return (*found, *[None] * (4 - len(found)))


class _Last(torch.autograd.Function):
    """A gradient that cannot be differentiated by what it was made of.

    torch's ``once_differentiable`` refuses only where the gradient that came in depends on something, and is silent
    where something else leads to the same parameters.
    """

    @staticmethod
    def forward(ctx: Any, found: torch.Tensor, *made_of: Any) -> torch.Tensor:
        return found.view_as(found)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[Any, ...]:  # type: ignore[override]
        raise GradientError(
            "gradients of SyncBatchNorm cannot be differentiated again, as a gradient penalty or a Hessian does: they "
            "are sums over all ranks. Use torch.nn.BatchNorm, or another norm"
        )
