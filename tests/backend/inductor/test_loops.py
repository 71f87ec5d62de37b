"""A loop over rows that Inductor plans is one loop: what stays scalar for it, and what stays as it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor import metrics
from torch._inductor.utils import run_and_get_code

import fxquant
from fxquant.backend.inductor import loops
from tests.ops.oracle import assert_same_bits

ROOT = "1 / std::sqrt"  # of one number; of a vector it is .rsqrt()


class Normalized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x))


class PerChannel(nn.Module):
    """Channels are neighbours in memory: a vector is of 16 channels, and so are the values of a channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).relu()


def stepped(model: nn.Module, x: Tensor, backend: str) -> tuple[list[int], str, list[Tensor]]:
    """Of one compiled step: how many loops each shared loop over rows holds, the code of forward, the gradients."""
    torch._dynamo.reset()
    metrics.reset()
    model.zero_grad()
    step: Any = torch.compile(model, backend=backend)
    with torch._inductor.config.patch(force_disable_caches=True):
        _, codes = run_and_get_code(lambda: step(x).square().sum().backward())
    counts = [count.inner_kernel_number for count in metrics.cpp_outer_loop_fused_inner_counts]
    return counts, codes[0], [p.grad for p in model.parameters() if p.grad is not None]


def quantized(kind: type[nn.Module], x: Tensor) -> nn.Module:
    torch.manual_seed(0)
    return fxquant.prepare(kind(), (x,))


def test_a_row_is_read_again_while_it_is_in_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    together, code, gradients = stepped(quantized(Normalized, x), x, "fxquant")
    monkeypatch.setattr(loops, "is_ours", lambda: False)
    apart, other, expected = stepped(quantized(Normalized, x), x, "fxquant")
    assert 5 in together and 5 not in apart, "sum, mean, squares, root, extremes of a row"
    assert 3 in together and 3 not in apart, "largest magnitude, scale and codes of a weight's row"
    assert ROOT in code and ROOT not in other
    for found, wanted in zip(gradients, expected, strict=True):
        assert_same_bits(found, wanted)


def test_what_others_compile_stays_as_it_is() -> None:
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    loops.keep_rows_together()
    _, code, _ = stepped(Normalized(), x, "inductor")
    assert ROOT not in code


def test_vectors_of_channels_keep_their_values_in_vectors() -> None:
    x = torch.randn(4, 16, 8, 8, generator=torch.Generator().manual_seed(0)).to(memory_format=torch.channels_last)
    together, code, _ = stepped(quantized(PerChannel, x), x, "fxquant")
    assert max(together) > 3, "mean, variance and range of a channel share their loop without"
    assert ROOT not in code
