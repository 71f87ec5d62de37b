"""Small nets that models have in common, and what tests ask of a prepared one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters

import fxquant
from fxquant.prepared.bound_forward import bound_forward
from fxquant.prepared.quantizer import quantizers


class Mlp(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


class ConvNet(nn.Module):
    """Conv, BatchNorm, in-place ReLU, a residual sum, pool and head."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.head = nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.conv2(x) + x)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Blocks(nn.Module):
    def __init__(self, count: int = 12, between: Callable[[], Any] | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Mlp() for _ in range(count)])
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
            if self.between is not None:
                self.between()
        return x


class Convs(nn.Module):
    """Two convolutions with BatchNorm and a residual, after one without."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.a, self.b = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.norm_a, self.norm_b = nn.BatchNorm2d(width), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return F.relu(self.norm_b(self.b(self.norm_a(self.a(x)).relu())) + x)


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, 2, width // 2).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class TiedLanguageModel(nn.Module):
    def __init__(self, vocabulary: int = 11, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.mix = nn.Linear(width, width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.embed(tokens))))


class Attention(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        mixed, _ = self.attention(x, x, x, need_weights=False)
        return self.out(mixed)


def prepared(model: nn.Module, *args: Any, **keywords: Any) -> nn.Module:
    return fxquant.prepare(model, args, **keywords)


def ranges(model: nn.Module) -> dict[str, tuple[float, float]]:
    """Site key -> stored range, for the sites that keep one."""
    return {key: (q.min_val.item(), q.max_val.item()) for key, q in quantizers(model) if q.stateful}


def unset(model: nn.Module) -> list[str]:
    """Sites whose range no compiled step has set."""
    return [key for key, q in quantizers(model) if not q.is_set()]


def eager_runs(model: nn.Module) -> int:
    found = (bound_forward(module) for module in model.modules())
    return sum(bound.eager_runs for bound in found if bound is not None)


def step(compiled: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
    """One forward and backward; the result, detached."""
    out = compiled(*args, **kwargs)
    out.float().square().mean().backward()
    return out.detach()


def kept_bytes(model: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """What autograd keeps, each storage once, without parameters, buffers and the input."""
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), x)}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in known:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    run(x).sum().backward()  # compiles the backward
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = run(x)
    out.sum().backward()
    model.zero_grad()
    return sum(kept.values())


def grads(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Graphs compiled and graph breaks, counted from a cold Dynamo; filled in at the end."""
    torch._dynamo.reset()
    counters.clear()
    found: dict[str, int] = {}
    yield found
    found["graphs"] = counters["stats"]["unique_graphs"]
    found["breaks"] = sum(counters["graph_break"].values())
    torch._dynamo.reset()


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bool((a.view(torch.int32) == b.view(torch.int32)).all())
