"""`convert`: codes of the file, integer weights and their bytes, state, open sizes, bad input."""

from __future__ import annotations

import copy
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, fx, nn
from torch._inductor.utils import run_and_get_code

import fxquant
from fxquant.errors import ExportError, InvalidArgument, NotQuantizedWarning, RangeNotSet
from fxquant.passes.export import integer_layers
from fxquant.passes.export.hold_scales import LABEL
from fxquant.passes.export.integer_layers import IntegerLayer
from fxquant.prepared.convert import ConvertedModel
from fxquant.targets.session import input_names, run_codes, run_outputs
from tests.nets import Attention, Block, ConvNet, Mlp, TiedLanguageModel


def calibrated(net: nn.Module, x: Tensor, **keywords: Any) -> nn.Module:
    model = fxquant.prepare(net, (x,), **keywords)
    fxquant.calibrate(model, [(x,)], progress=False)
    return model.eval()


class Convolutions(nn.Module):
    """One dimension, three, groups, strides, a pad of "same", a clamp."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Conv1d(4, 8, 3, padding="same", dilation=2)
        self.grouped = nn.Conv2d(8, 8, (3, 1), stride=(2, 1), padding=(1, 0), groups=8)
        self.box = nn.Conv3d(1, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.line(x).clamp(-0.5, 0.5).view(-1, 8, 4, 4)
        return self.box(nn.functional.relu6(self.grouped(y))[:, None])


NETS: dict[str, tuple[type[nn.Module], tuple[int, ...], dict[str, Any]]] = {
    "convnet": (ConvNet, (4, 3, 8, 8), {}),
    "convolutions": (Convolutions, (2, 4, 16), {}),
    "block": (Block, (3, 5, 16), {}),
    "attention": (Attention, (3, 5, 8), {}),
    "w4a8": (Mlp, (3, 8), {"recipe": "w4a8"}),
    "signed": (Mlp, (3, 8), {"target": "tensorrt"}),
}


@pytest.fixture(scope="module", params=NETS)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, ConvertedModel, Tensor]:
    torch.manual_seed(0)
    net, shape, keywords = NETS[request.param]
    x = torch.randn(shape)
    model = calibrated(net(), x, **keywords)
    return model, fxquant.convert(model, (x,)), x


class Codes(fx.Interpreter):
    """Codes by site, in the integers of the plan."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.found: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if LABEL in n.meta:
            self.found[n.meta[LABEL]] = value
        return value


def test_codes_and_outputs_are_those_of_the_file(
    case: tuple[nn.Module, ConvertedModel, Tensor], tmp_path: Path
) -> None:
    model, converted, x = case
    path = tmp_path / "m.onnx"
    fxquant.export_onnx(model, (x,), path, verify=False)
    x = torch.randn(2 * x.shape[0], *x.shape[1:], generator=torch.Generator().manual_seed(1))
    feeds = {input_names(path)[0]: x.numpy()}
    theirs, run = run_codes(path, feeds), Codes(converted)
    run.run(x)
    shared = run.found.keys() & theirs.keys()
    assert shared, "sites have the same names"
    compared = differing = 0
    for label in shared:
        ours = run.found[label].numpy().astype(int) - (128 if theirs[label].dtype == np.int8 else 0)
        distance = np.abs(ours - theirs[label].reshape(ours.shape).astype(int))
        assert distance.max() <= 1
        compared, differing = compared + distance.size, differing + int((distance > 0).sum())
    assert differing <= max(1, compared // 10_000)
    (expected,) = run_outputs(path, feeds, optimize=False)
    torch.testing.assert_close(converted(x), torch.from_numpy(expected), rtol=1e-4, atol=1e-5)


def test_layers_stand_at_their_paths_with_integer_weights(case: tuple[nn.Module, ConvertedModel, Tensor]) -> None:
    model, converted, _ = case
    layers = {path: m for path, m in converted.named_modules() if isinstance(m, IntegerLayer)}
    assert converted.report.integers == tuple(layers)
    wanted = {path for path, m in model.named_modules() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)}
    wanted -= {"attention.out_proj"}  # which MultiheadAttention computes itself
    assert wanted <= layers.keys()
    for path in wanted:
        assert layers[path].codes().dtype == torch.int8
        assert layers[path].codes().shape == model.get_submodule(path).weight.shape  # type: ignore[union-attr]
    assert not any(v.is_floating_point() and v.dim() > 1 for v in converted.state_dict().values())


@pytest.mark.parametrize(("recipe", "parts"), [("int8", 4), ("w4a8", 8)])
def test_bytes_of_the_state(recipe: str, parts: int) -> None:
    x = torch.randn(2, 256)
    model = calibrated(nn.Sequential(nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 8)), x, recipe=recipe)
    converted = fxquant.convert(model, (x,), verify=False)
    weights = 256 * 128 + 128 * 8
    # A scale and a bias for each channel; a scale and a zero point for the input and for codes between.
    around = 2 * 4 * (128 + 8) + 2 * 2 * 4
    assert converted.report.state_bytes == weights * 4 // parts + around
    assert converted.report.state_bytes < 0.3 * converted.report.float_bytes
    assert f"2 layers on integers; {converted.report.state_bytes / 1e3:.1f} kB of state" in str(converted.report)


def test_it_compiles_to_integer_kernels_with_the_same_bits() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    converted = fxquant.convert(calibrated(ConvNet(8), x), (x,))
    with torch.no_grad():
        out, code = run_and_get_code(torch.compile(converted), x)
        assert torch.equal(out, converted(x))
    kernels = sum(text.count("= torch.ops.onednn.qconv_pointwise.tensor(") for text in code)
    assert kernels == 3 * (2 if converted.conv1._halved else 1)
    assert not any(re.search(r"extern_kernels\.\w", text) for text in code), "no float product is left"


def test_state_goes_where_tensors_go(tmp_path: Path) -> None:
    """Another calibration's state brings its scales, also those that kernels take as numbers."""
    torch.manual_seed(0)
    x = torch.randn(3, 8)
    ours, theirs = (fxquant.convert(calibrated(Mlp(8), x * by), (x * by,)) for by in (1, 3))
    expected = ours(x)
    assert not torch.allclose(theirs(x), expected)
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    theirs.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(theirs(x), expected)
    save_file(ours.state_dict(), tmp_path / "m.safetensors")
    other = fxquant.convert(calibrated(Mlp(8), x), (x,))
    other.load_state_dict(load_file(tmp_path / "m.safetensors"), assign=True)
    assert torch.equal(other(x), expected)
    assert torch.equal(copy.deepcopy(ours).float().to("cpu")(x), expected)


@pytest.mark.parametrize("halved", [False, True])
def test_the_kernel_s_sums_are_exact(halved: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever way the codes are multiplied, against float64."""
    monkeypatch.setattr(integer_layers, "widest_exact_code", lambda: 127 if halved else 255)
    most = 127 if halved else 60  # which 16 bits hold on every machine
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-most, most + 1, (16, 32), generator=generator, dtype=torch.int8)
    codes[0] = most
    x = torch.randint(0, 256, (5, 32), generator=generator, dtype=torch.uint8)
    x[0] = 255
    layer = IntegerLayer(codes, torch.ones(16), torch.full((16,), 0.5), window=None, largest=255)
    assert layer._halved is halved
    found = layer(x, torch.tensor(1.0), torch.tensor(7, dtype=torch.int32))
    assert torch.equal(found.double(), (x.double() - 7) @ codes.double().t() + 0.5)
    layer.give_codes(torch.tensor(500.0), torch.tensor(100, dtype=torch.int32), integer_layers.Epilogue(low=-20000.0))
    expected = (found.clamp(min=-20000) / 500).round().add(100).clamp(0, 255)
    assert (layer(x, torch.tensor(1.0), torch.tensor(7, dtype=torch.int32)).float() - expected).abs().max() <= 0


def test_what_stays_float_is_told() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4, 8)

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose1d(4, 4, 2, stride=2)
            self.out = nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.up(x)
            return self.out(y) @ self.out(y).transpose(1, 2)

    model = calibrated(Mixed(), x, target="openvino")
    with pytest.warns(NotQuantizedWarning, match="up stays a float product: torch has no transposed convolution"):
        converted = fxquant.convert(model, (x,))
    assert "matmul stays a float product: torch has no product of two integer activations" in str(converted.report)
    held = converted.state_dict()
    (name,) = (name for name in held if name.startswith("up__") and name.endswith("weight__codes"))
    assert held[name].dtype == torch.int8, "its weight is held as codes all the same"


def test_a_layer_that_is_called_twice_is_held_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.same = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.same(torch.tanh(self.same(x)))

    torch.manual_seed(0)
    x = torch.randn(3, 8)
    model = calibrated(Twice(), x)
    converted = fxquant.convert(model, (x,))
    assert converted.report.integers == ("same",)
    with torch.no_grad():
        expected = torch.compile(model, backend="fxquant_eager")(x)
    torch.testing.assert_close(converted(x), expected, rtol=1e-5, atol=1e-6)


def test_tables_are_codes() -> None:
    torch.manual_seed(0)
    tokens = torch.randint(0, 11, (3, 5))
    model = calibrated(TiedLanguageModel(), tokens)
    converted = fxquant.convert(model, (tokens,))
    kinds = [value.dtype for value in converted.state_dict().values() if value.dim() > 1 and value.shape[1] > 1]
    assert kinds and set(kinds) == {torch.int8}
    with torch.no_grad():
        expected = torch.compile(model, backend="fxquant_eager")(tokens)
    torch.testing.assert_close(converted(tokens), expected, rtol=1e-5, atol=1e-6)


def test_a_module_that_computes_another_thing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    products = IntegerLayer._products

    def off(self: IntegerLayer, x: Tensor, *rest: Any, **keywords: Any) -> Tensor:
        return products(self, x ^ 32, *rest, **keywords)

    torch.manual_seed(0)
    x = torch.randn(3, 8)
    model = calibrated(Mlp(8), x)
    monkeypatch.setattr(IntegerLayer, "_products", off)
    with pytest.raises(ExportError, match=r"must compute what the model does: got .* codes of second.in"):
        fxquant.convert(model, (x,))
    fxquant.convert(model, (x,), verify=False)


def test_bad_input() -> None:
    x = torch.randn(3, 8)
    with pytest.raises(InvalidArgument, match="convert"):
        fxquant.convert(Mlp(8), (x,))
    with pytest.raises(RangeNotSet, match="activation ranges must be set"):
        fxquant.convert(fxquant.prepare(Mlp(8), (x,)), (x,))
    small = calibrated(Mlp(8), x, recipe="fp8", target="generic")
    with pytest.raises(ExportError, match="must have a format that integer kernels multiply: got codes of e4m3"):
        fxquant.convert(small, (x,))
    model = calibrated(Mlp(8), x)
    converted = fxquant.convert(model, (x,))
    with pytest.raises(InvalidArgument, match=r"a converted model must stay in evaluation: got train\(\)"):
        converted.train()
    assert converted.eval() is converted
    with pytest.raises(InvalidArgument, match=r"must stay on the CPU, in float32 .*: got torch.float16"):
        converted.half()
    assert not any(p.requires_grad for p in converted.parameters())
    with pytest.raises(InvalidArgument, match=r"a model to convert must be on the CPU.*: got meta \(first.weight\)"):
        fxquant.convert(model.to("meta"), (x,))
