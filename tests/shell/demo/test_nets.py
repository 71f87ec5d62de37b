"""The demo's nets: what they hold, what they compute, and that nothing in them is idle."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.shell.demo.nets import NETS, Attention, ResidualBlock, TransformerBlock, VisionTransformer
from fxquant.shell.demo.train import divergence

PARAMETERS = {
    "cnn": (
        24 * 9 + 2 * 24  # stem
        + 2 * (24 * 24 * 9 + 2 * 24)  # block1
        + (24 * 48 * 9 + 2 * 48) + (48 * 48 * 9 + 2 * 48) + (24 * 48 + 2 * 48)  # block2 and its shortcut
        + 2 * (48 * 48 * 9 + 2 * 48)  # block3
        + 48 * 10 + 10
    ),
    "vit": (
        64 * 4 + 64 + 64 + 17 * 64  # patches, class token, positions
        + 2 * (2 * 64 + 192 * 65 + 64 * 65 + 2 * 64 + 128 * 65 + 64 * 129)  # blocks
        + 2 * 64 + 10 * 65
    ),
}  # fmt: skip


def randomized(module: nn.Module) -> nn.Module:
    """Without weights that start at 0 or 1, which hide what is left out."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return module.eval()


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("batch", [1, 5])
def test_nets_give_one_logit_a_class(net: str, batch: int) -> None:
    model = NETS[net]().eval()
    assert model(torch.randn(batch, 1, 8, 8)).shape == (batch, 10)


@pytest.mark.parametrize("net", NETS)
def test_nets_have_as_many_parameters_as_their_layers(net: str) -> None:
    assert sum(p.numel() for p in NETS[net]().parameters()) == PARAMETERS[net]


@pytest.mark.parametrize("net", NETS)
def test_every_parameter_of_a_net_learns(net: str) -> None:
    model = NETS[net]()
    divergence(model(torch.randn(8, 1, 8, 8)), torch.arange(8)).backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert idle == []


def test_cnn_holds_what_the_demo_claims() -> None:
    kinds = [type(module) for module in NETS["cnn"]().modules()]
    assert kinds.count(nn.BatchNorm2d) == kinds.count(nn.Conv2d) == 8
    assert nn.MaxPool2d in kinds


def test_an_image_is_read_the_same_in_any_batch() -> None:
    images = torch.randn(6, 1, 8, 8)
    for build in NETS.values():
        model = build().eval()
        torch.testing.assert_close(model(images)[2:3], model(images[2:3]))


@pytest.mark.parametrize(("inputs", "outputs", "stride", "changes"), [
    (4, 4, 1, False), (4, 6, 1, True), (4, 4, 2, True), (4, 6, 2, True),
])  # fmt: skip
def test_a_shortcut_changes_what_the_block_changes(inputs: int, outputs: int, stride: int, changes: bool) -> None:
    block, x = randomized(ResidualBlock(inputs, outputs, stride)), torch.randn(2, inputs, 8, 8)
    with torch.no_grad():
        for part in (block.bn2.weight, block.bn2.bias):  # the branch gives 0: what is left is the shortcut
            part.zero_()
        y = block(x)
        assert (block.downsample is not None) == changes
        if not changes:
            assert torch.equal(y, x.clamp(min=0))
            return
        conv, norm = block.downsample
        sampled = torch.einsum("oi,nihw->nohw", conv.weight[:, :, 0, 0], x[:, :, ::stride, ::stride])
        scale = norm.weight / (1 + norm.eps) ** 0.5
        expected = sampled * scale.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)
    torch.testing.assert_close(y, expected.clamp(min=0))


def test_a_block_without_its_shortcut() -> None:
    """Two convolutions that hand on what they read, the first seen through its relu."""
    block = ResidualBlock(3, 3).eval()
    x = torch.randn(2, 3, 5, 5)
    with torch.no_grad():
        for conv in (block.conv1, block.conv2):
            nn.init.dirac_(conv.weight)
        y = block(x)
    once = 1 / (1 + 1e-5) ** 0.5
    torch.testing.assert_close(y, ((x * once).clamp(min=0) * once + x).clamp(min=0))


def test_attention_is_a_softmax_of_products_for_each_head() -> None:
    attention, x = randomized(Attention(12, 3)), torch.randn(2, 5, 12)
    with torch.no_grad():
        found = attention(x)
        q, k, v = F.linear(x, attention.qkv.weight, attention.qkv.bias).split(12, dim=-1)
        heads = []
        for part in (slice(0, 4), slice(4, 8), slice(8, 12)):
            scores = torch.einsum("bic,bjc->bij", q[..., part], k[..., part]) / 2  # √4
            heads.append(torch.einsum("bij,bjc->bic", scores.exp() / scores.exp().sum(-1, keepdim=True), v[..., part]))
        expected = F.linear(torch.cat(heads, -1), attention.proj.weight, attention.proj.bias)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("silent", ["attn.proj", "fc2"])
def test_both_halves_of_a_transformer_block_add_to_their_input(silent: str) -> None:
    block, x = randomized(TransformerBlock(8, 2, 16)), torch.randn(2, 5, 8)
    with torch.no_grad():
        for parameter in block.get_submodule(silent).parameters():
            parameter.zero_()
        if silent == "fc2":
            expected = x + block.attn(block.norm1(x))
        else:
            hidden = F.linear(F.layer_norm(x, (8,), block.norm2.weight, block.norm2.bias), *block.fc1.parameters())
            expected = x + F.linear(0.5 * hidden * (1 + torch.erf(hidden / 2**0.5)), *block.fc2.parameters())
        torch.testing.assert_close(block(x), expected)


def shuffled(images: Tensor, order: Tensor) -> Tensor:
    """Images with their 16 patches of 2×2 in another order."""
    patches = images.reshape(-1, 4, 2, 4, 2).transpose(2, 3).reshape(-1, 16, 2, 2)[:, order]
    return patches.reshape(-1, 4, 4, 2, 2).transpose(2, 3).reshape(-1, 1, 8, 8)


def test_patches_have_no_order_but_by_their_positions() -> None:
    model, images = randomized(VisionTransformer()), torch.randn(3, 1, 8, 8)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert not torch.allclose(model(images), model(shuffled(images, order)), atol=1e-2)
        model.pos_embed.zero_()
        torch.testing.assert_close(model(images), model(shuffled(images, order)), atol=1e-4, rtol=1e-4)


def test_the_class_token_is_what_the_head_reads() -> None:
    model = randomized(VisionTransformer(depth=0))
    with torch.no_grad():
        token = F.layer_norm((model.cls_token + model.pos_embed[:, :1])[:, 0], (64,), *model.norm.parameters())
        expected = F.linear(token, *model.head.parameters()).expand(3, -1)
        torch.testing.assert_close(model(torch.randn(3, 1, 8, 8)), expected)
