"""Three architectures of the suite in PyTorch, in the same sizes."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention


@dataclass(frozen=True)
class Problem:
    """A model, a batch, and the loss of each example."""

    make: Callable[[], nn.Module]
    inputs: torch.Tensor
    targets: torch.Tensor

    def losses(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """`(B,)`: the cross entropy, its mean over positions where there are any."""
        if outputs.ndim == 2:
            return cross_entropy(outputs, targets, reduction="none")
        return (
            cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="none")
            .view(targets.shape)
            .mean(1)
        )


def mlp(small: bool) -> Problem:
    """As `jgd._bench.models.vectors.mlp`."""
    widths, size = ((32, 64, 64, 10), 8) if small else ((784, 1024, 1024, 10), 128)

    def make() -> nn.Module:
        a, b, c, d = widths
        return nn.Sequential(nn.Linear(a, b), nn.ReLU(), nn.Linear(b, c), nn.ReLU(), nn.Linear(c, d))

    return Problem(make, torch.randn(size, widths[0]), torch.randint(widths[-1], (size,)))


def cnn(small: bool) -> Problem:
    """As `jgd._bench.models.images.cnn`."""
    channels, side, size = ((3, 4, 8, 8), 8, 4) if small else ((3, 32, 64, 128), 32, 32)

    def make() -> nn.Module:
        a, b, c, d = channels
        convolution = lambda i, o: nn.Conv2d(i, o, 3, padding=1)
        first = [convolution(a, b), nn.ReLU(), nn.AvgPool2d(2), convolution(b, c), nn.ReLU(), nn.AvgPool2d(2)]
        rest = [convolution(c, d), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(d, 10)]
        return nn.Sequential(*first, *rest)

    return Problem(make, torch.randn(size, channels[0], side, side), torch.randint(10, (size,)))


class Layer(nn.Module):
    """As `jgd._bench.models.layers.transform`."""

    def __init__(self, d: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(d), nn.LayerNorm(d)
        self.query, self.key, self.value, self.out = (nn.Linear(d, d) for _ in range(4))
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attention, then two dense layers."""
        h = self.norm_attention(x)
        split = lambda y: y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        q, k, v = split(self.query(h)), split(self.key(h)), split(self.value(h))
        attended = scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norm_mlp(x)), approximate="tanh"))


class Transformer(nn.Module):
    """As `jgd._bench.models.sequences.transformer`. Positions are looked up: hooks know no bare parameter."""

    def __init__(self, d: int, layers: int, length: int, vocabulary: int, heads: int):
        super().__init__()
        self.embedding, self.positions = nn.Embedding(vocabulary, d), nn.Embedding(length, d)
        self.layers = nn.Sequential(*(Layer(d, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, vocabulary, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """The logits at each position."""
        positions = torch.arange(tokens.shape[1]).expand(tokens.shape).contiguous()  # as Opacus needs them
        return self.head(self.norm(self.layers(self.embedding(tokens) + self.positions(positions))))


def transformer(small: bool) -> Problem:
    """As `jgd._bench.models.sequences.transformer`."""
    d, layers, length, vocabulary, size, heads = (16, 1, 8, 32, 4, 2) if small else (256, 4, 128, 4096, 8, 4)
    tokens = torch.randint(vocabulary, (size, length + 1))
    return Problem(
        lambda: Transformer(d, layers, length, vocabulary, heads),
        tokens[:, :-1].contiguous(),
        tokens[:, 1:].contiguous(),
    )


PROBLEMS = {"mlp": mlp, "cnn": cnn, "transformer": transformer}
