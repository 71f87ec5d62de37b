"""Nets of real size for the latency bench, with random weights.

Those of torchvision, timm and transformers, and four that no package installed here has: EfficientNet-Lite0, MTCNN's
O-Net, a U-Net and YOLOv8's smallest.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from nets import Unavailable
from torch import Tensor, nn
from torch.nn import functional as F


class Same(nn.Conv2d):
    """A convolution padded as TensorFlow does it, by a Pad of its own."""

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride, size = self.kernel_size[0], self.stride[0], x.shape[-1]
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        padded = F.pad(x, [total // 2, total - total // 2] * 2) if total else x
        return F.conv2d(padded, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


def _unit(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, act: bool = True) -> nn.Sequential:
    parts: list[nn.Module] = [Same(inputs, outputs, kernel, stride, groups=groups, bias=False)]
    parts += [nn.BatchNorm2d(outputs), *([nn.ReLU6()] if act else [])]
    return nn.Sequential(*parts)


class Inverted(nn.Module):
    """MBConv without squeeze and excitation."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, factor: int) -> None:
        super().__init__()
        wide = inputs * factor
        parts = [_unit(inputs, wide, 1)] if factor > 1 else []
        parts += [_unit(wide, wide, kernel, stride, groups=wide), _unit(wide, outputs, 1, act=False)]
        self.body, self.adds = nn.Sequential(*parts), stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.adds else self.body(x)


def efficientnet_lite0() -> nn.Module:
    """EfficientNet-Lite0 (Liu, 2020), with the Pads of TensorFlow's convolutions."""
    stages = [(1, 16, 3, 1, 1), (2, 24, 3, 2, 6), (2, 40, 5, 2, 6), (3, 80, 3, 2, 6)]
    stages += [(3, 112, 5, 1, 6), (4, 192, 5, 2, 6), (1, 320, 3, 1, 6)]
    parts, width = [_unit(3, 32, 3, 2)], 32
    for count, outputs, kernel, stride, factor in stages:
        for number in range(count):
            parts.append(Inverted(width, outputs, kernel, 1 if number else stride, factor))
            width = outputs
    return nn.Sequential(*parts, _unit(320, 1280, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, 1000))


class Sentence(nn.Module):
    """A transformers encoder that gives its last hidden states."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, ids: Tensor) -> Tensor:
        return self.inner(ids).last_hidden_state


def _bert(layers: int, width: int) -> nn.Module:
    import transformers

    config = transformers.BertConfig(
        num_hidden_layers=layers, hidden_size=width, intermediate_size=4 * width, num_attention_heads=12
    )
    return Sentence(transformers.BertModel(config, add_pooling_layer=False))


def _torchvision(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import torchvision

        return torchvision.models.get_model(name, weights=None)

    return make


def _timm(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import timm

        return timm.create_model(name, pretrained=False)

    return make


class Face(nn.Module):
    """MTCNN's O-Net (Zhang et al., 2016): convolutions with PReLU, for pictures of 48×48."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(3, 32, 3), nn.PReLU(32), nn.MaxPool2d(3, 2, ceil_mode=True)),
            *(nn.Conv2d(32, 64, 3), nn.PReLU(64), nn.MaxPool2d(3, 2, ceil_mode=True)),
            *(nn.Conv2d(64, 64, 3), nn.PReLU(64), nn.MaxPool2d(2, 2, ceil_mode=True)),
            *(nn.Conv2d(64, 128, 2), nn.PReLU(128), nn.Flatten()),
            *(nn.Linear(1152, 256), nn.PReLU(256), nn.Linear(256, 16)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Double(nn.Sequential):
    """Two convolutions with BatchNorm and ReLU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        parts: list[nn.Module] = []
        for width in (inputs, outputs):
            parts += [nn.Conv2d(width, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        super().__init__(*parts)


class UNet(nn.Module):
    """U-Net (Ronneberger et al., 2015), padded, with BatchNorm, of half the published width."""

    def __init__(self, width: int = 32, classes: int = 21) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(5)]
        self.down = nn.ModuleList(Double(i, o) for i, o in zip([3, *widths[:-1]], widths, strict=True))
        self.up = nn.ModuleList(nn.ConvTranspose2d(2 * w, w, 2, 2) for w in reversed(widths[:-1]))
        self.merge = nn.ModuleList(Double(2 * w, w) for w in reversed(widths[:-1]))
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for number, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if number else x)
            kept.append(x)
        for up, merge, skip in zip(self.up, self.merge, reversed(kept[:-1]), strict=True):
            x = merge(torch.cat([skip, up(x)], 1))
        return self.head(x)


def _conv(inputs: int, outputs: int, kernel: int = 1, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs, eps=1e-3), nn.SiLU())


class Split(nn.Module):
    """YOLOv8's C2f: half of the channels goes through ``count`` bottlenecks, and all that they gave is concatenated."""

    def __init__(self, inputs: int, outputs: int, count: int, adds: bool) -> None:
        super().__init__()
        half, self.adds = outputs // 2, adds
        self.first, self.last = _conv(inputs, outputs), _conv((2 + count) * half, outputs)
        self.body = nn.ModuleList(nn.Sequential(_conv(half, half, 3), _conv(half, half, 3)) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.first(x).chunk(2, 1))
        for block in self.body:
            parts.append(parts[-1] + block(parts[-1]) if self.adds else block(parts[-1]))
        return self.last(torch.cat(parts, 1))


class Pyramid(nn.Module):
    """YOLOv8's SPPF: three max pools, one after the other."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.last = _conv(width, width // 2), _conv(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.first(x)]
        for _ in range(3):
            parts.append(F.max_pool2d(parts[-1], 5, 1, 2))
        return self.last(torch.cat(parts, 1))


class Yolo(nn.Module):
    """YOLOv8n (Jocher et al., 2023) up to the raw boxes and classes of its three scales, without the decoding."""

    def __init__(self, classes: int = 80) -> None:
        super().__init__()
        self.stem = nn.Sequential(_conv(3, 16, 3, 2), _conv(16, 32, 3, 2), Split(32, 32, 1, True))
        self.third = nn.Sequential(_conv(32, 64, 3, 2), Split(64, 64, 2, True))
        self.fourth = nn.Sequential(_conv(64, 128, 3, 2), Split(128, 128, 2, True))
        self.fifth = nn.Sequential(_conv(128, 256, 3, 2), Split(256, 256, 1, True), Pyramid(256))
        self.up = nn.ModuleList([Split(384, 128, 1, False), Split(192, 64, 1, False)])
        self.down = nn.ModuleList([_conv(64, 64, 3, 2), _conv(128, 128, 3, 2)])
        self.merge = nn.ModuleList([Split(192, 128, 1, False), Split(384, 256, 1, False)])

        def head(width: int, inner: int, outputs: int) -> nn.Sequential:
            return nn.Sequential(_conv(width, inner, 3), _conv(inner, inner, 3), nn.Conv2d(inner, outputs, 1))

        self.boxes = nn.ModuleList(head(width, 64, 64) for width in (64, 128, 256))
        self.classes = nn.ModuleList(head(width, 80, classes) for width in (64, 128, 256))

    def forward(self, x: Tensor) -> Tensor:
        third = self.third(self.stem(x))
        fourth = self.fourth(third)
        fifth = self.fifth(fourth)
        fourth = self.up[0](torch.cat([F.interpolate(fifth, scale_factor=2.0), fourth], 1))
        third = self.up[1](torch.cat([F.interpolate(fourth, scale_factor=2.0), third], 1))
        fourth = self.merge[0](torch.cat([self.down[0](third), fourth], 1))
        fifth = self.merge[1](torch.cat([self.down[1](fourth), fifth], 1))
        found = zip(self.boxes, self.classes, (third, fourth, fifth), strict=True)
        return torch.cat([torch.cat([boxes(y), classes(y)], 1).flatten(2) for boxes, classes, y in found], 2)


def _picture(size: int = 224, batch: int = 1) -> Tensor:
    return torch.randn(batch, 3, size, size)


def _tokens() -> Tensor:
    return torch.randint(0, 30000, (1, 128))


NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    **{n: (_torchvision(n), _picture) for n in ("resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_large")},
    "efficientnet_b0": (_torchvision("efficientnet_b0"), _picture),
    "convnext_tiny": (_torchvision("convnext_tiny"), _picture),
    "efficientnet_lite0": (efficientnet_lite0, _picture),
    "unet": (UNet, _picture),
    "yolov8n": (Yolo, lambda: _picture(320)),
    "onet": (Face, lambda: _picture(48, 8)),
    "vit_tiny": (_timm("vit_tiny_patch16_224"), _picture),
    "deit_small": (_timm("deit_small_patch16_224"), _picture),
    "minilm": (lambda: _bert(6, 384), _tokens),
    "bert_base": (lambda: _bert(12, 768), _tokens),
}


def build(name: str) -> tuple[nn.Module, Tensor]:
    """The float net in evaluation, with statistics of its input in every BatchNorm; and that input."""
    torch.manual_seed(0)
    make, data = NETS[name]
    try:
        model, x = make(), data()
    except ImportError as error:
        raise Unavailable(f"{name} needs {error.name}: pip install {error.name}") from error
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.momentum = None  # the average over what it sees
        model.train()(torch.cat([x, x]))
    return model.eval(), x
