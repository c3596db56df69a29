"""The networks that the benchmarks train: a transformer of 25.5 M parameters and ResNet-50, in plain torch."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import cross_entropy, relu

__all__ = ["MODELS", "ResNet50", "Task", "Transformer"]


class Task(nn.Module):
    """A network with data to train on: ``loss()`` is one forward pass over this rank's batch."""

    def loss(self) -> torch.Tensor:
        """Of the batch, as a call of the module gives it."""
        result: torch.Tensor = self(*self.batch)
        return result

    batch: tuple[torch.Tensor, ...]


class _Block(nn.Module):
    """Pre-norm attention and a perceptron four times as wide (Vaswani et al., 2017; Xiong et al., 2020)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.perceptron = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen = self.norm1(x)
        x = x + self.attention(seen, seen, seen, need_weights=False)[0]
        out: torch.Tensor = x + self.perceptron(self.norm2(x))
        return out


class Transformer(Task):
    """Eight blocks of width 512 over bytes: 25.5 M parameters. It learns to repeat its input."""

    def __init__(self, batch: int, rank: int, size: int = 64, width: int = 512, blocks: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        heads = max(1, width // 64)
        self.layers = nn.Sequential(
            nn.Embedding(256, width),
            *(_Block(width, heads) for _ in range(blocks)),
            nn.LayerNorm(width),
            nn.Linear(width, 256),
        )
        own = torch.Generator().manual_seed(1 + rank)
        self.batch = (torch.randint(256, (batch, size), generator=own),)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return cross_entropy(self.layers(tokens).flatten(0, 1), tokens.flatten())


def _convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs))


class _Bottleneck(nn.Module):
    """1x1, 3x3, 1x1, and a shortcut (He et al., 2015); the stride is in the 3x3."""

    def __init__(self, inputs: int, inner: int, stride: int) -> None:
        super().__init__()
        self.first = _convolution(inputs, inner, 1)
        self.second = _convolution(inner, inner, 3, stride)
        self.third = _convolution(inner, 4 * inner, 1)
        same = stride == 1 and inputs == 4 * inner
        self.shortcut = nn.Identity() if same else _convolution(inputs, 4 * inner, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return relu(self.third(relu(self.second(relu(self.first(x))))) + self.shortcut(x))


class ResNet50(Task):
    """He et al., "Deep residual learning for image recognition", 2015, Table 1, on images of noise."""

    def __init__(self, batch: int, rank: int, size: int = 64, width: int = 64, classes: int = 1000) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers: list[nn.Module] = [_convolution(3, width, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
        inputs = width
        for stage, blocks in enumerate((3, 4, 6, 3)):
            for block in range(blocks):
                inner = width << stage
                layers.append(_Bottleneck(inputs, inner, 2 if stage and not block else 1))
                inputs = 4 * inner
        self.layers = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))
        own = torch.Generator().manual_seed(1 + rank)
        images = torch.randn((batch, 3, size, size), generator=own)
        self.batch = images, torch.randint(classes, (batch,), generator=own)

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return cross_entropy(self.layers(images), labels)


MODELS: dict[str, type[Transformer] | type[ResNet50]] = {"transformer": Transformer, "resnet50": ResNet50}
