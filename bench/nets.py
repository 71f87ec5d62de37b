"""The nets that the benches train: a builder each, of a float model in training mode and one batch.

All are small enough for a laptop, and hold one layer kind each: convolutions with BatchNorm (``cnn``, ``resnet``),
attention (``transformer``), nothing but linear layers (``mixer``), and somebody else's code (``zoo``).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Unavailable(Exception):
    """A net or variant cannot run here; the message says why and what to install."""


class Block(nn.Module):
    """Residual block of two 3×3 convolutions with BatchNorm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(h)) + x)


class Strided(nn.Module):
    """ResNet's basic block: the first convolution may stride and widen, a 1×1 convolution then brings the input along.

    ``y = relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x))``
    """

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride=stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.shortcut = (
            nn.Sequential(nn.Conv2d(inputs, width, 1, stride=stride, bias=False), nn.BatchNorm2d(width))
            if stride != 1 or inputs != width
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(h)) + self.shortcut(x))


class Layer(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        each = (batch, length, 3, self.heads, width // self.heads)
        q, k, v = self.qkv(self.norm1(x)).view(each).permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, width)
        x = x + self.proj(attended)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Mix(nn.Module):
    """MLP-Mixer layer: one MLP along the tokens, one along the channels."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.tokens = nn.Sequential(nn.Linear(tokens, 2 * tokens), nn.GELU(), nn.Linear(2 * tokens, tokens))
        self.channels = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


def resnet(width: int = 32) -> nn.Module:
    """ResNet-18 for images of 32×32: a 3×3 stem, four stages of two blocks; half as wide as He et al. (2015)."""
    blocks: list[nn.Module] = []
    inputs = width
    for stage, stride in enumerate((1, 2, 2, 2)):
        outputs = width * 2**stage
        blocks += [Strided(inputs, outputs, stride), Strided(outputs, outputs, 1)]
        inputs = outputs
    stem = (nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))


class Logits(nn.Module):
    """A transformers classifier that gives its logits alone."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, pixels: Tensor) -> Tensor:
        return self.inner(pixel_values=pixels).logits


def public_zoo() -> tuple[nn.Module, Tensor]:
    """A small ViT as transformers writes it, with random weights; raises Unavailable without transformers."""
    try:
        import transformers
    except ImportError as error:
        raise Unavailable(f"needs transformers (pip install transformers): {error}") from error
    config = transformers.ViTConfig(
        hidden_size=192,
        num_hidden_layers=4,
        num_attention_heads=3,
        intermediate_size=768,
        image_size=32,
        patch_size=4,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=10,
    )
    return Logits(transformers.ViTForImageClassification(config)).train(), torch.randn(16, 3, 32, 32)


NETS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "cnn": lambda: (
        nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), *(Block(32) for _ in range(4))),
        torch.randn(32, 3, 32, 32),
    ),
    "transformer": lambda: (nn.Sequential(*(Layer(256) for _ in range(4))), torch.randn(16, 128, 256)),
    "resnet": lambda: (resnet(), torch.randn(32, 3, 32, 32)),
    "mixer": lambda: (nn.Sequential(*(Mix(64, 256) for _ in range(4))), torch.randn(32, 64, 256)),
    "zoo": public_zoo,
}
