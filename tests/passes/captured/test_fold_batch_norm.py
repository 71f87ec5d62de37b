from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn
from torch.nn import functional as F

import fxquant
from fxquant.capture.exported import exported_graph
from fxquant.capture.open_sizes import open_batch
from fxquant.passes.captured.fold_batch_norm import FoldBatchNorm
from fxquant.passes.captured.insert_fake_quantize import InsertFakeQuantize
from fxquant.spec.quant_spec import QuantSpec
from fxquant.spec.ranges import CurrentTensor
from fxquant.spec.recipes import INT8, Recipe
from fxquant.spec.rules import Rule
from fxquant.targets.profiles import GENERIC, ONNXRUNTIME
from tests.passes.graphs import INSERT, QUANTIZE, apply, captured, quantizing, show, untouched

FOLD = FoldBatchNorm()
# Activations stay float, so that a reference can leave them out.
FLOAT = (Rule(operand="activation", spec=None),)
SCHEMES = {
    "per channel": Recipe(name="channels", rules=FLOAT),
    "per tensor": Recipe(name="tensor", weight=QuantSpec(narrow=True, range=CurrentTensor()), rules=FLOAT),
}


def inserting(scheme: str) -> InsertFakeQuantize:
    return InsertFakeQuantize(recipe=SCHEMES[scheme], profile=GENERIC, stateless=True)


FINE = inserting("per channel")


@pytest.fixture(autouse=True)
def cold() -> None:
    torch._dynamo.reset()  # all layers share one forward: past the recompile limit it would run in float


class Layer(nn.Module):
    """One weighted layer and its BatchNorm, with every statistic and parameter away from its initial value."""

    def __init__(self, head: nn.Module, norm: Any, gamma: list[float] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head, self.norm = head, norm
        for parameter in head.parameters():
            nn.init.uniform_(parameter, -0.5, 0.5)
        with torch.no_grad():
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            if norm.affine:
                norm.weight.copy_(torch.tensor(gamma or [1.3, -0.7, 0.0, 1e-4]))
                norm.bias.normal_()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.head(x))


N1, N2, N3 = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d
T1, T2, T3 = nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d
LAYERS: dict[str, tuple[Callable[[], Layer], tuple[int, ...]]] = {
    "conv1d": (lambda: Layer(nn.Conv1d(3, 4, 3), N1(4)), (2, 3, 8)),
    "conv2d, no bias": (lambda: Layer(nn.Conv2d(3, 4, 3, bias=False), N2(4, momentum=0.4)), (2, 3, 6, 6)),
    "conv2d, bias, groups": (lambda: Layer(nn.Conv2d(4, 4, 3, groups=2), N2(4, eps=0.1)), (2, 4, 6, 6)),
    "depthwise": (lambda: Layer(nn.Conv2d(4, 4, 3, groups=4, bias=False), N2(4)), (2, 4, 6, 6)),
    "conv2d, not affine": (lambda: Layer(nn.Conv2d(3, 4, 3, padding=1), N2(4, affine=False)), (2, 3, 6, 6)),
    "conv3d": (lambda: Layer(nn.Conv3d(2, 4, 2), N3(4)), (2, 2, 4, 4, 4)),
    "linear": (lambda: Layer(nn.Linear(5, 4), N1(4)), (6, 5)),
    "linear, no bias": (lambda: Layer(nn.Linear(5, 4, bias=False), N1(4)), (6, 5)),
    "transposed 1d": (lambda: Layer(T1(3, 4, 3, stride=2), N1(4)), (2, 3, 5)),
    "transposed 2d": (lambda: Layer(T2(3, 4, 3, 2, 1, output_padding=1), N2(4, momentum=0.4)), (2, 3, 4, 4)),
    "transposed 2d, no bias": (lambda: Layer(T2(3, 4, 2, bias=False), N2(4)), (2, 3, 4, 4)),
    "transposed 2d, groups": (lambda: Layer(T2(6, 4, 3, groups=2), N2(4, momentum=0.4)), (2, 6, 4, 4)),
    "transposed 2d, depthwise": (lambda: Layer(T2(4, 4, 3, groups=4, bias=False), N2(4)), (2, 4, 4, 4)),
    "transposed 3d, groups": (lambda: Layer(T3(4, 4, 2, groups=2), N3(4, affine=False)), (2, 4, 3, 3, 3)),
}


def is_transposed(layer: Layer) -> bool:
    return isinstance(layer.head, (T1, T2, T3))


def fake(weight: Tensor, axis: int | None) -> Tensor:
    """s8 narrow, one scale per index of an axis or one for all; gradients pass."""
    others = [d for d in range(weight.dim()) if d != axis]
    scale = (weight.detach().abs().amax(others, keepdim=True).float() / 127).clamp(min=1e-15)
    return weight + ((weight / scale).round() * scale - weight).detach()


def row(vector: Tensor, like: Tensor) -> Tensor:
    return vector.view([1, -1] + [1] * (like.dim() - 2))


def times(layer: Layer, weight: Tensor, factor: Tensor) -> Tensor:
    """Every output channel of the weight by its factor, group by group."""
    if not is_transposed(layer):
        return weight * row(factor, weight).transpose(0, 1)
    groups = layer.head.groups
    parts = zip(weight.chunk(groups), factor.chunk(groups), strict=True)
    return torch.cat([part * row(own, part) for part, own in parts])


def apply_head(layer: Layer, x: Tensor, weight: Tensor) -> Tensor:
    """The layer with another weight and without its bias."""
    bias = {} if layer.head.bias is None else {"bias": torch.zeros_like(layer.head.bias)}
    return torch.func.functional_call(layer.head, {"weight": weight, **bias}, x)


def bias_of(module: nn.Module, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if module.bias is None else module.bias


def axis_of(layer: Layer, scheme: str) -> int | None:
    return None if scheme == "per tensor" else int(is_transposed(layer))


def by_running(layer: Layer, x: Tensor, scheme: str) -> Tensor:
    """BatchNorm by hand with running statistics, on the layer with its folded weight quantized."""
    norm = layer.norm
    deviation = (norm.running_var + norm.eps).sqrt()
    factor = (torch.ones_like(deviation) if norm.weight is None else norm.weight) / deviation
    y = apply_head(layer, x, fake(times(layer, layer.head.weight, factor), axis_of(layer, scheme)))
    shift = (bias_of(layer.head, factor) - norm.running_mean) * factor + bias_of(norm, factor)
    return y + row(shift, y)


Step = tuple[Tensor, dict[str, Tensor | None]]


class Apart(nn.Module):
    """Layers side by side, each with an input of its own: one compile for all of them."""

    def __init__(self, layers: list[Layer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        return [layer(x) for layer, x in zip(self.layers, xs, strict=True)]


def steps_apart(
    layers: list[Layer], run: Callable[[list[Tensor]], list[Tensor]], shapes: list[tuple[int, ...]], count: int = 2
) -> list[list[Step]]:
    """For each layer, results and gradients of training steps, each from what the one before left."""
    optimizers = [torch.optim.SGD(layer.parameters(), lr=0.02) for layer in layers]
    generators = [torch.Generator().manual_seed(1) for _ in layers]
    found: list[list[Step]] = [[] for _ in layers]
    for _ in range(count):
        xs = [
            torch.randn(shape, generator=generator).to(layer.norm.running_var.dtype).requires_grad_()
            for layer, shape, generator in zip(layers, shapes, generators, strict=True)
        ]
        ys = run(xs)
        for optimizer in optimizers:
            optimizer.zero_grad()
        weighted = [(y * torch.randn(y.shape, generator=g)).sum() for y, g in zip(ys, generators, strict=True)]
        torch.autograd.backward(weighted)
        for layer, x, y, own in zip(layers, xs, ys, found, strict=True):
            gradients = {n: p.grad for n, p in layer.named_parameters()} | {"x": x.grad}
            own.append(copy.deepcopy((y.detach(), gradients)))
        for optimizer in optimizers:
            optimizer.step()
    return found


def steps(layer: Layer, run: Callable[[Tensor], Tensor], shape: tuple[int, ...], count: int = 2) -> list[Step]:
    (found,) = steps_apart([layer], lambda xs: [run(x) for x in xs], [shape], count)
    return found


def assert_same_steps(got: list[Step], expected: list[Step], rtol: float = 1e-6, atol: float = 1e-6) -> None:
    for (y, gradients), (want, want_gradients) in zip(got, expected, strict=True):
        torch.testing.assert_close(y, want, rtol=rtol, atol=atol)
        torch.testing.assert_close(gradients, want_gradients, rtol=rtol, atol=atol)


SHAPES = [shape for _, shape in LAYERS.values()]
every_scheme = pytest.mark.parametrize("scheme", SCHEMES)


def every_layer() -> list[Layer]:
    return [build().double() for build, _ in LAYERS.values()]


@contextmanager
def of_layer(name: str) -> Iterator[None]:
    """Failures inside say which layer they are of."""
    try:
        yield
    except AssertionError as error:
        raise AssertionError(f"{name}: {error}") from error


@every_scheme
def test_eval_is_the_folded_network(scheme: str) -> None:
    layers, xs = every_layer(), [torch.randn(shape).double() for shape in SHAPES]
    model = Apart(layers).eval()
    gm = captured(model, xs, passes=(inserting(scheme),))
    result = apply(FOLD, gm)
    assert result.rewrites == len(LAYERS) and not result.declines and "batch_norm" not in gm.code
    with torch.no_grad():
        found = torch.compile(model, backend=quantizing(inserting(scheme), FOLD))(xs)
    for name, layer, x, got in zip(LAYERS, layers, xs, found, strict=True):
        with of_layer(name):
            torch.testing.assert_close(got, by_running(layer, x, scheme), rtol=1e-6, atol=1e-6)


@every_scheme
def test_frozen_statistics_train_the_folded_network(scheme: str) -> None:
    layers = every_layer()
    model = Apart(layers).train()
    for layer in layers:
        layer.norm.eval()
    oracles = copy.deepcopy(layers)
    found = steps_apart(layers, torch.compile(model, backend=quantizing(inserting(scheme), FOLD)), SHAPES)
    for name, layer, oracle, shape, got in zip(LAYERS, layers, oracles, SHAPES, found, strict=True):
        with of_layer(name):
            assert_same_steps(got, steps(oracle, lambda x, o=oracle: by_running(o, x, scheme), shape))
            torch.testing.assert_close(dict(layer.named_buffers()), dict(oracle.named_buffers()), rtol=0, atol=0)


def column(vector: Tensor, weight: Tensor) -> Tensor:
    return vector.view([-1] + [1] * (weight.dim() - 1))


def quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of s8 narrow, one scale per output channel, in float64."""
    scale = column(weight.abs().flatten(1).amax(1).clamp(min=1e-30) / 127, weight)
    return (weight / scale).round(), scale


def test_codes_of_the_folded_weight_are_those_of_the_weight_up_to_sign() -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 16, 3, 3, dtype=torch.float64)
    factor = torch.randn(64, dtype=torch.float64) * torch.logspace(-6, 3, 64, dtype=torch.float64)
    steps = weight / quantized(weight)[1]
    ties = ((steps - steps.floor()) - 0.5).abs() < 1e-9
    plain, folded = quantized(weight)[0], quantized(weight * column(factor, weight))[0]
    assert torch.equal((plain * column(factor.sign(), weight))[~ties], folded[~ties])


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
    """One weight, with and without a norm after it."""

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


class Flattened(nn.Module):
    """LeViT's normalized linear: the batch is merged into the tokens, and parted by the size of what was merged."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Layer(nn.Linear(5, 4, bias=False), nn.BatchNorm1d(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer.head(x)
        return self.layer.norm(y.flatten(0, 1)).reshape_as(y)


def test_reading_a_size_is_no_use_of_the_values() -> None:
    model, x = Flattened().double().eval(), torch.randn(3, 7, 5).double()
    expected = by_running(model.layer, x.flatten(0, 1), "per channel").reshape(3, 7, 4)
    with torch.no_grad():
        gm = exported_graph(model, (x,), {}, open_batch((x,), {}))
    inserting("per channel").run(gm)
    (linear,) = (node for node in gm.graph.nodes if node.target is torch.ops.aten.linear.default)
    assert len(linear.users) == 2  # torch.export keeps reshape_as
    result = apply(FOLD, gm)
    assert result.rewrites == 1 and not result.declines and "batch_norm" not in gm.code
    torch.testing.assert_close(gm(x), expected, rtol=1e-6, atol=1e-6)


def reasons(model: Callable[..., Any], *args: Tensor, recipe: Recipe = INT8) -> list[str]:
    insert = InsertFakeQuantize(recipe=recipe, profile=ONNXRUNTIME, stateless=True)
    result = untouched(FOLD, captured(model, *args, passes=(insert,)))
    assert all(d.pass_name == "FoldBatchNorm" for d in result.declines)
    return [d.reason for d in result.declines]


def plain(head: nn.Module) -> Layer:
    return Layer(head, nn.BatchNorm1d(4)).eval()


def test_declines() -> None:
    layer, x = LAYERS["conv2d, no bias"][0]().eval(), torch.randn(2, 3, 6, 6)
    assert reasons(layer, x, recipe=Recipe(name="none", kinds=frozenset({"linear"}))) == [
        "conv2d before it has no quantized weight"
    ]
    rows = plain(nn.Linear(5, 4))
    assert reasons(lambda x: rows.norm(y := rows.head(x)) + y, torch.randn(6, 5)) == [
        "linear is used without its normalization too"
    ]
    assert reasons(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)).eval(), x) == ["relu before it has no quantized weight"]
    assert reasons(nn.Sequential(nn.BatchNorm2d(3)).eval(), x)[0].endswith("before it has no quantized weight")
    assert reasons(rows, torch.randn(2, 4, 5)) == ["linear has its channels in another dimension"]
    unbatched = plain(nn.Conv1d(3, 4, 3))
    assert reasons(unbatched, torch.randn(3, 6)) == ["conv1d has its channels in another dimension"]

    def added(x: Tensor) -> Tensor:
        return rows.norm(torch.addmm(rows.head.bias, x, columns))

    columns = nn.Parameter(torch.randn(5, 4))
    assert reasons(added, torch.randn(6, 5)) == ["addmm before it is neither a convolution nor a linear"]

    def doubled(x: Tensor) -> Tensor:
        n = layer.norm
        return F.batch_norm(layer.head(x), n.running_mean, n.running_var, n.weight * 2, n.bias)

    assert reasons(doubled, x) == ["its parameters or statistics are computed in the graph"]


def test_a_scale_from_elsewhere_is_declined() -> None:
    rows = plain(nn.Linear(5, 4))

    def fixed(x: Tensor) -> Tensor:
        weight = fxquant.ops.fake_quantize_per_tensor_affine(rows.head.weight, 0.01, 0, -127, 127)
        return rows.norm(F.linear(x, weight, rows.head.bias))

    result = untouched(FOLD, captured(fixed, torch.randn(6, 5)))
    assert [d.reason for d in result.declines] == ["the weight before it has no scale taken from itself"]


def test_untouched_without_batch_norm() -> None:
    assert untouched(FOLD, captured(nn.Linear(3, 3), torch.randn(2, 3))).declines == []
