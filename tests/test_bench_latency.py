"""The latency bench's helpers: its own net is the published one, runs take turns, a package that lacks is named."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.bench_modules import bench_module


@pytest.fixture
def latency(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    yield from bench_module(monkeypatch, "bench_latency", "latency_nets", "machine", "nets")


def test_efficientnet_lite0_has_the_published_parameters(latency: ModuleType) -> None:
    with torch.device("meta"):
        model = importlib.import_module("latency_nets").efficientnet_lite0()
    assert sum(parameter.numel() for parameter in model.parameters()) == 4_652_008
    assert sum(isinstance(module, nn.Conv2d) for module in model.modules()) == 49


def test_other_nets_have_the_published_parameters(latency: ModuleType) -> None:
    """YOLOv8n's 3,157,200 less the 16 constants of its decoding; of U-Net's widths, half."""
    nets = importlib.import_module("latency_nets")
    with torch.device("meta"):
        yolo, unet = nets.Yolo(), nets.UNet(width=64, classes=2)
        assert yolo(torch.empty(1, 3, 320, 320)).shape == (1, 64 + 80, 40 * 40 + 20 * 20 + 10 * 10)
        assert unet(torch.empty(1, 3, 64, 64)).shape == (1, 2, 64, 64)
    assert sum(parameter.numel() for parameter in yolo.parameters()) == 3_157_184
    assert sum(parameter.numel() for parameter in unet.parameters()) == 31_037_698


@pytest.mark.parametrize(("size", "kernel", "pads"), [(8, 3, (0, 1)), (7, 3, (1, 1)), (8, 5, (1, 2))])
def test_pads_are_tensorflows(latency: ModuleType, size: int, kernel: int, pads: tuple[int, int]) -> None:
    conv, x = importlib.import_module("latency_nets").Same(2, 3, kernel, 2, bias=False), torch.randn(1, 2, size, size)
    assert torch.equal(conv(x), F.conv2d(F.pad(x, pads * 2), conv.weight, None, 2))
    assert conv(x).shape[-1] == -(-size // 2)


def test_a_package_that_is_not_installed(latency: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(importlib.import_module("nets").Unavailable, match="vit_tiny needs timm: pip install timm"):
        latency.build("vit_tiny")
