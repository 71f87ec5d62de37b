from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn
from torch.nn import functional as F

from fxquant.passes.fold_batch_norm import FoldBatchNorm
from fxquant.passes.insert_fake_quantize import InsertFakeQuantize
from fxquant.profiles import ONNXRUNTIME
from fxquant.recipes import INT8, Recipe
from fxquant.spec import CurrentTensor, QuantSpec
from tests.passes.graphs import INSERT, QUANTIZE, apply, captured, quantizing, show, untouched

FOLD = FoldBatchNorm()
# Only the weight is quantized finely enough to matter: activations get 16 bits, so that a reference can leave them out.
RECIPE = Recipe(name="weights", activation=QuantSpec(bits=16, signed=False, symmetric=False))
FINE = InsertFakeQuantize(recipe=RECIPE, profile=ONNXRUNTIME, stateless=True)


class Layer(nn.Module):
    """One weighted layer and its BatchNorm, with every statistic and parameter away from its initial value."""

    def __init__(self, head: nn.Module, norm: Any, gamma: list[float] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head, self.norm = head, norm
        with torch.no_grad():
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            if norm.affine:
                norm.weight.copy_(torch.tensor(gamma or [1.3, -0.7, 0.0, 1e-4]))
                norm.bias.normal_()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.head(x))


LAYERS: dict[str, tuple[Callable[[], Layer], tuple[int, ...]]] = {
    "conv1d": (lambda: Layer(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4)), (2, 3, 8)),
    "conv2d, no bias": (lambda: Layer(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)), (2, 3, 6, 6)),
    "conv2d, bias, groups": (lambda: Layer(nn.Conv2d(4, 4, 3, groups=2), nn.BatchNorm2d(4)), (2, 4, 6, 6)),
    "depthwise": (lambda: Layer(nn.Conv2d(4, 4, 3, groups=4, bias=False), nn.BatchNorm2d(4)), (2, 4, 6, 6)),
    "conv2d, not affine": (lambda: Layer(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False)), (2, 3, 6, 6)),
    "conv3d": (lambda: Layer(nn.Conv3d(2, 4, 2), nn.BatchNorm3d(4)), (2, 2, 4, 4, 4)),
    "linear": (lambda: Layer(nn.Linear(5, 4), nn.BatchNorm1d(4)), (6, 5)),
    "linear, no bias": (lambda: Layer(nn.Linear(5, 4, bias=False), nn.BatchNorm1d(4)), (6, 5)),
}


def column(vector: Tensor, weight: Tensor) -> Tensor:
    return vector.view([-1] + [1] * (weight.dim() - 1))


def quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of s8 narrow, one scale per output channel, in float64."""
    amax = weight.abs().flatten(1).amax(1).clamp(min=1e-30)
    scale = column(amax / 127, weight)
    return (weight / scale).round(), scale


def factor_of(layer: Layer, var: Tensor) -> Tensor:
    gamma = torch.ones(4) if layer.norm.weight is None else layer.norm.weight
    return gamma.double() / (var.double() + layer.norm.eps).sqrt()


def parts(layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, bias and β in float64, zeros where there are none."""
    head, norm = layer.head, layer.norm
    bias = torch.zeros(4) if head.bias is None else head.bias
    beta = torch.zeros(4) if norm.bias is None else norm.bias
    return head.weight.double(), bias.double(), beta.double()


def apply_head(layer: Layer, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    head = layer.head
    if isinstance(head, nn.Linear):
        return F.linear(x, weight, bias)
    conv = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[weight.dim() - 2]
    return conv(x, weight, bias, groups=head.groups)  # type: ignore[operator]


@pytest.mark.parametrize("name", LAYERS)
def test_eval_is_the_folded_network(name: str) -> None:
    build, shape = LAYERS[name]
    layer, x = build().eval(), torch.randn(shape)
    gm = captured(layer, x, passes=(FINE,))
    result = apply(FOLD, gm)
    assert result.rewrites == 1 and "batch_norm" not in gm.code
    compiled = torch.compile(layer, backend=quantizing(FINE, FOLD))
    weight, bias, beta = parts(layer)
    factor = factor_of(layer, layer.norm.running_var)
    code, scale = quantized(weight * column(factor, weight))
    expected = apply_head(layer, x.double(), code * scale, (bias - layer.norm.running_mean.double()) * factor + beta)
    torch.testing.assert_close(compiled(x).double(), expected, rtol=0, atol=3e-4 * expected.abs().max().item())


@pytest.mark.parametrize("name", LAYERS)
def test_training_scales_by_the_running_statistic_and_corrects_by_the_batch(name: str) -> None:
    """y = conv(x, FQ(w·γ/σ_running)) · σ_running/σ_batch + β − γ·μ_batch/σ_batch, statistics of the float conv's output
    with the quantized weight; γ = 0 included, since nothing is divided by it."""
    build, shape = LAYERS[name]
    layer, x = build().train(), torch.randn(shape)
    gm = captured(layer, x, passes=(FINE,))
    assert untouched(FOLD, gm).declines == []
    weight, bias, beta = parts(layer)
    running = (layer.norm.running_var.double() + layer.norm.eps).sqrt()
    gamma = torch.ones(4).double() if layer.norm.weight is None else layer.norm.weight.double()
    folded = weight * column(gamma / running, weight)
    code, scale = quantized(folded)
    plain_code, plain_scale = quantized(weight)
    y = apply_head(layer, x.double(), plain_code * plain_scale, bias)
    others = [d for d in range(y.dim()) if d != 1]
    mean, deviation = y.mean(others), (y.var(others, correction=0) + layer.norm.eps).sqrt()
    row = [1, -1] + [1] * (y.dim() - 2)
    scaled = apply_head(layer, x.double(), code * scale)
    expected = scaled * (running / deviation).view(row) + (beta + gamma * (bias - mean) / deviation).view(row)
    got = torch.compile(layer, backend=quantizing(FINE, FOLD))(x)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-3 * max(1.0, expected.abs().max().item()))


def test_codes_of_the_folded_weight_are_those_of_the_weight_up_to_sign() -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 16, 3, 3, dtype=torch.float64)
    factor = torch.randn(64, dtype=torch.float64) * torch.logspace(-6, 3, 64, dtype=torch.float64)
    steps = weight / quantized(weight)[1]
    ties = ((steps - steps.floor()) - 0.5).abs() < 1e-9
    plain, folded = quantized(weight)[0], quantized(weight * column(factor, weight))[0]
    assert torch.equal((plain * column(factor.sign(), weight))[~ties], folded[~ties])


def test_gradients_reach_weight_and_both_norm_parameters() -> None:
    layer, x = LAYERS["conv2d, no bias"][0]().eval(), torch.randn(2, 3, 6, 6)
    torch.compile(layer, backend=quantizing(FINE, FOLD))(x).square().sum().backward()
    got = [p.grad.clone() for p in layer.parameters() if p.grad is not None]
    layer.zero_grad()
    layer(x).square().sum().backward()
    for one, other in zip(got, (p.grad for p in layer.parameters()), strict=True):
        assert other is not None
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.02 * other.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_weights_keep_their_dtype(dtype: torch.dtype) -> None:
    layer = LAYERS["conv2d, bias, groups"][0]().eval()
    layer.head.to(dtype)
    gm = captured(layer, torch.randn(2, 4, 6, 6).to(dtype), passes=(INSERT,))
    apply(FOLD, gm)
    conv = next(node for node in gm.graph.nodes if "conv2d" in node.name)
    assert [a.meta["val"].dtype for a in conv.args[:3]] == [dtype] * 3


def test_autocast() -> None:
    layer, x = LAYERS["conv2d, no bias"][0]().eval(), torch.randn(2, 3, 6, 6)
    compiled = torch.compile(layer, backend=quantizing(FINE, FOLD))
    with torch.autocast("cpu", torch.bfloat16):
        got, plain = compiled(x), layer(x)
    assert got.dtype == plain.dtype == torch.bfloat16
    torch.testing.assert_close(got, plain, rtol=0, atol=0.05 * plain.abs().max().item())


def test_snapshot() -> None:
    layer = Layer(nn.Linear(5, 4, bias=False), nn.BatchNorm1d(4)).eval()
    gm = captured(layer, torch.randn(2, 5), passes=QUANTIZE)
    apply(FOLD, gm)
    plumbing = ("full_default", "resolve_min_max", "affine_qparams", "getitem", "detach_default = ")
    assert_expected_inline(
        "\n".join(s for s in show(gm).splitlines() if not s.startswith(plumbing)),
        """\
add_scalar = add(arg3_1, 1e-05)
rsqrt_default = rsqrt(add_scalar)
mul_tensor = mul(arg4_1, rsqrt_default)
view_default = view(mul_tensor, [-1, 1])
mul_tensor_1 = mul(arg0_1, view_default)
detach_default_1 = detach(mul_tensor_1)
symmetric_qparams_default = symmetric_qparams(detach_default_1, 0, 127)
fake_quantize_per_channel_affine_default = fake_quantize_per_channel(mul_tensor_1, getitem_4, getitem_5, 0, -127, 127)
fake_quantize_per_tensor_affine_tensor_qparams = fake_quantize_per_tensor(arg1_1, getitem_2, getitem_3, 0, 255)
neg_default = neg(arg2_1)
mul_tensor_2 = mul(neg_default, mul_tensor)
add_tensor = add(mul_tensor_2, arg5_1)
linear = linear(fake_quantize_per_tensor_affine_tensor_qparams, fake_quantize_per_channel_affine_default)
return [linear]""",
    )


class Shared(nn.Module):
    """One weight, with and without a norm behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Layer(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.layer.head(x)


def test_shared_weight_is_folded_for_one_use_only() -> None:
    model, x = Shared().eval(), torch.randn(3, 4)
    gm = captured(model, x, passes=(FINE,))
    assert apply(FOLD, gm).rewrites == 1
    torch.testing.assert_close(torch.compile(model, backend=quantizing(FINE, FOLD))(x), model(x), rtol=0, atol=0.1)


def reasons(model: Callable[..., Any], *args: Tensor, recipe: Recipe = INT8) -> list[str]:
    insert = InsertFakeQuantize(recipe=recipe, profile=ONNXRUNTIME, stateless=True)
    result = untouched(FOLD, captured(model, *args, passes=(insert,)))
    assert all(d.pass_name == "FoldBatchNorm" for d in result.declines)
    return [d.reason for d in result.declines]


def test_declines() -> None:
    layer, x = LAYERS["conv2d, no bias"][0]().eval(), torch.randn(2, 3, 6, 6)
    per_tensor = Recipe(name="coarse", weight=QuantSpec(narrow=True, range=CurrentTensor()))
    assert reasons(layer, x, recipe=per_tensor) == [
        "the weight before it has no scale per output channel taken from itself"
    ]
    assert reasons(layer, x, recipe=Recipe(name="none", kinds=frozenset({"linear"}))) == [
        "conv2d before it has no quantized weight"
    ]
    rows = Layer(nn.Linear(5, 4), nn.BatchNorm1d(4)).eval()
    assert reasons(lambda x: rows.norm(y := rows.head(x)) + y, torch.randn(6, 5)) == [
        "linear is used without its normalization too"
    ]
    assert reasons(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)).eval(), x) == ["relu before it has no quantized weight"]
    assert reasons(nn.Sequential(nn.BatchNorm2d(3)).eval(), x)[0].endswith("before it has no quantized weight")
    assert reasons(rows, torch.randn(2, 4, 5)) == ["linear has its channels in another dimension"]

    def doubled(x: Tensor) -> Tensor:
        n = layer.norm
        return F.batch_norm(layer.head(x), n.running_mean, n.running_var, n.weight * 2, n.bias)

    assert reasons(doubled, x) == ["its parameters or statistics are computed in the graph"]


def test_untouched_without_batch_norm() -> None:
    assert untouched(FOLD, captured(nn.Linear(3, 3), torch.randn(2, 3))).declines == []
