"""Pads, BatchNorm in all its forms, recurrent cells, dynamic sizes, and what is no float tensor."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxquant
from fxquant.backend.reports import compile_reports
from fxquant.prepared.root import plan_of
from tests.nets import counted, grads, prepared, ranges, step, unset
from tests.onnx.agreement import assert_codes_agree

EAGER = "fxquant_eager"

pytestmark = pytest.mark.usefixtures("cold")

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(4, 8, generator=GENERATOR)
IMAGE = torch.randn(2, 3, 8, 8, generator=GENERATOR)


class Run(nn.Module):
    """Named layers, joined by the caller."""

    def __init__(self, run: Callable[..., Any], **layers: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.run = run

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def conv(**options: Any) -> nn.Conv2d:
    return nn.Conv2d(3, 3, 3, **options)


def declined(model: nn.Module) -> dict[str, str]:
    plan = plan_of(model)
    assert plan is not None
    return {each.where: each.reason for each in plan.declined}


# ---------------------------------------------------------------- pads


def padded(pad: Callable[[Tensor], Tensor]) -> nn.Module:
    return Run(lambda m, x: m.two(pad(torch.relu(m.one(x)))), one=conv(), two=conv())


MOVING: dict[str, Callable[[Tensor], Tensor]] = {
    "zeros": lambda x: F.pad(x, (1, 1, 1, 1)),
    "zero module": nn.ZeroPad2d(1),
    "reflect": nn.ReflectionPad2d(1),
    "replicate": nn.ReplicationPad2d(1),
    "circular": lambda x: F.pad(x, (1, 1, 1, 1), mode="circular"),
    "constant_pad_nd": lambda x: torch.constant_pad_nd(x, (1, 1, 1, 1)),
}


@pytest.mark.parametrize("target", ["onnxruntime", "openvino", "tensorrt"])
@pytest.mark.parametrize("name", ["zeros", "reflect"])
def test_a_pad_moves_values_and_one_quantizer_serves_both_sides(name: str, target: str, tmp_path: Path) -> None:
    model = prepared(padded(MOVING[name]), IMAGE, target=target)
    assert {"one.output", "two.input"} & set(ranges(model)) == {"two.input"}
    step(torch.compile(model, backend=EAGER), IMAGE)
    path = tmp_path / "net.onnx"
    fxquant.export_onnx(model, (IMAGE,), path)
    graph = onnx.load(path).graph
    makers = {output: node for node in graph.node for output in node.output}
    second = [node for node in graph.node if node.op_type == "Conv"][1]
    before = makers[makers[second.input[0]].input[0]]
    if name == "reflect" and target == "onnxruntime":  # its Pad is float: the codes are made again after it
        assert before.op_type == "QuantizeLinear" and makers[before.input[0]].op_type == "Pad"
    elif name == "reflect":  # no Q/DQ between Pad and Conv
        assert makers[second.input[0]].op_type == "Pad" and before.op_type == "DequantizeLinear"
    else:  # zeros are the convolution's own padding
        assert not [node for node in graph.node if node.op_type == "Pad"]
        assert makers[second.input[0]].op_type == "DequantizeLinear"
        assert [list(a.ints) for a in second.attribute if a.name == "pads"] == [[1, 1, 1, 1]]


@pytest.mark.parametrize("name", MOVING)
def test_a_padded_convolution_runs_on_integers_with_training_codes(name: str, tmp_path: Path) -> None:
    model = prepared(padded(MOVING[name]), IMAGE)
    assert "one.output" not in ranges(model)
    step(torch.compile(model, backend=EAGER), IMAGE)
    fxquant.export_onnx(model, (IMAGE,), tmp_path / "net.onnx")
    report = fxquant.verify_onnx(model, (IMAGE,), tmp_path / "net.onnx", rounds=0)
    assert_codes_agree(report)
    assert report.integer_share == 1.0


def test_a_pad_with_another_value_has_quantizers_on_both_sides() -> None:
    model = prepared(padded(lambda x: F.pad(x, (1, 1, 1, 1), value=1.0)), IMAGE)
    assert {"one.output", "two.input"} <= set(ranges(model))


# ---------------------------------------------------------------- BatchNorm


def transposed(m: Any, x: Tensor) -> Tensor:
    return m.last(torch.relu(m.norm(m.first(x).transpose(1, 2).contiguous())).transpose(1, 2))


def permuted(m: Any, x: Tensor) -> Tensor:
    return m.last(torch.relu(m.norm(m.first(x).permute(0, 2, 1).contiguous())).permute(0, 2, 1))


def flattened(m: Any, x: Tensor) -> Tensor:
    h = m.first(x)
    return m.last(torch.relu(m.norm(h.reshape(-1, 6))).view(*h.shape))


@pytest.mark.parametrize("run", [transposed, permuted, flattened])
def test_batch_norm_folds_into_a_linear_through_what_moves_its_result(run: Callable[..., Tensor]) -> None:
    tokens = torch.randn(3, 5, 8).double()
    net = Run(run, first=nn.Linear(8, 6), norm=nn.BatchNorm1d(6), last=nn.Linear(6, 8)).double()
    model = prepared(net, tokens)
    compiled = torch.compile(model, backend=EAGER)
    for _ in range(2):
        step(compiled, tokens)
    model.eval()
    got = compiled(tokens)
    assert not compile_reports()[-1].declines
    # The same network, folded by hand before anything is quantized.
    factor = net.norm.weight / (net.norm.running_var + net.norm.eps).sqrt()
    folded = Run(lambda m, x: m.last(torch.relu(m.first(x))), first=nn.Linear(8, 6), last=nn.Linear(6, 8)).double()
    with torch.no_grad():
        folded.first.weight.copy_(net.first.weight * factor[:, None])
        folded.first.bias.copy_((net.first.bias - net.norm.running_mean) * factor + net.norm.bias)
        folded.last.load_state_dict({k: v for k, v in net.last.state_dict().items() if "quantizers" not in k})
    prepared(folded, tokens)
    state = {k: v for k, v in model.state_dict().items() if "_val" in k}
    folded.load_state_dict({**folded.state_dict(), **state, "quantizers_plan": torch.empty(0)})
    torch.testing.assert_close(got, torch.compile(folded.eval(), backend=EAGER)(tokens), rtol=1e-6, atol=1e-7)


def test_batch_norm_over_another_dimension_stays_with_the_reason() -> None:
    tokens = torch.randn(3, 5, 8)
    model = prepared(nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(6, 8)), tokens)
    compiled = torch.compile(model, backend=EAGER)
    step(compiled, tokens)
    model.eval()
    compiled(tokens)
    assert [d.reason for d in compile_reports()[-1].declines] == ["linear has its channels in another dimension"]


class Frozen(nn.BatchNorm2d):
    """Normalizes with running statistics in training too."""

    def train(self, mode: bool = True) -> nn.Module:
        return super().train(False)


NORMS: dict[str, Callable[[], nn.Module]] = {
    "no statistics": lambda: nn.BatchNorm2d(3, track_running_stats=False),
    "no affine": lambda: nn.BatchNorm2d(3, affine=False),
    "frozen": lambda: Frozen(3),
    "sync": lambda: nn.SyncBatchNorm(3),
}


@pytest.mark.parametrize("name", NORMS)
def test_forms_of_batch_norm(name: str, tmp_path: Path) -> None:
    results = []
    for backend in ("aot_eager", EAGER):
        net = nn.Sequential(conv(), NORMS[name](), nn.ReLU(), conv())
        model = net if backend == "aot_eager" else prepared(net, IMAGE)
        with counted() as found:
            step(torch.compile(model, backend=backend), IMAGE)
        results.append(found)
    assert results[0] == results[1] == {"graphs": 1, "breaks": 0}
    assert set(grads(model)) == {key for key, _ in model.named_parameters()}
    fxquant.export_onnx(model, (IMAGE,), tmp_path / "net.onnx")
    assert_codes_agree(fxquant.verify_onnx(model, (IMAGE,), tmp_path / "net.onnx", rounds=0))


def test_a_cumulative_average_breaks_no_more_than_plain() -> None:
    """Dynamo cannot trace ``momentum=None``, which reads its counter; the layers around it are quantized."""
    results = []
    for backend in ("aot_eager", EAGER):
        net = nn.Sequential(conv(), nn.BatchNorm2d(3, momentum=None), nn.ReLU(), conv())
        model = net if backend == "aot_eager" else prepared(net, IMAGE)
        with counted() as found:
            step(torch.compile(model, backend=backend), IMAGE)
        results.append(found["breaks"])
    assert results[0] == results[1] == 1
    assert not unset(model) and {"0.input", "3.input"} <= set(ranges(model))


# ---------------------------------------------------------------- recurrent layers, vectors


@pytest.mark.parametrize("layer", [nn.GRUCell, nn.LSTMCell, nn.RNNCell])
def test_products_of_cells_are_quantized_where_their_operands_have_a_range(layer: type[nn.Module]) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        state = m.cell(x)
        return m.out(state[0] if isinstance(state, tuple) else state)

    model = prepared(Run(run, cell=layer(8, 8), out=nn.Linear(8, 8)), X)
    assert any("all zeros, which have no range" in reason for reason in declined(model).values())  # the first state
    step(torch.compile(model, backend=EAGER), X)
    assert set(ranges(model)) == {"cell.input", "out.input"} and not unset(model)


VECTORS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "mv": lambda m, x: torch.mv(m.one(x), m.vector),
    "addmv": lambda m, x: torch.addmv(m.vector, m.one.weight, m.one(x)[0]),
    "dot": lambda m, x: torch.dot(m.vector, m.one(x)[0]),
    "bilinear": lambda m, x: F.bilinear(m.one(x), x, m.cube),
}


@pytest.mark.parametrize("name", VECTORS)
def test_products_that_no_runtime_has_as_integers_say_so(name: str) -> None:
    vector, cube = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(2, 8, 8))
    model = prepared(Run(VECTORS[name], one=nn.Linear(8, 8), vector=vector, cube=cube), X)
    reason = "no runtime multiplies" if name == "bilinear" else "products of a matrix and a vector"
    assert declined(model)[name].startswith(reason)
    step(torch.compile(model, backend=EAGER), X)
    assert not unset(model)


# ---------------------------------------------------------------- sizes, outputs, branches, other dtypes


@pytest.mark.parametrize("dimension", [0, 1])
def test_marked_sizes_compile_once(dimension: int) -> None:
    results = []
    for backend in ("aot_eager", EAGER):
        net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        model = net if backend == "aot_eager" else prepared(net, torch.randn(2, 4, 8))
        compiled = torch.compile(model, backend=backend)
        with counted() as found:
            for size in (3, 5, 9):
                x = torch.randn(*((size, 4, 8) if dimension == 0 else (4, size, 8)))
                torch._dynamo.mark_dynamic(x, dimension)
                step(compiled, x)
        results.append(found)
    assert results[0] == results[1] == {"graphs": 1, "breaks": 0}
    assert not unset(model)


@dataclasses.dataclass
class Result:
    value: Tensor
    other: dict[str, Tensor | None]


def test_a_dataclass_and_a_dictionary_come_out() -> None:
    layers = {"one": nn.Linear(8, 8), "two": nn.Linear(8, 8)}
    model = prepared(Run(lambda m, x: Result(m.one(x), {"b": m.two(x), "none": None}), **layers), X)
    with counted() as found:
        got = torch.compile(model, backend=EAGER)(X)
        (got.value.sum() + got.other["b"].sum()).backward()
    assert found == {"graphs": 1, "breaks": 0}
    assert isinstance(got, Result) and not unset(model)


def test_a_branch_on_data_breaks_as_plain_does() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        h = torch.relu(m.one(x))
        return m.two(h) if h.sum().item() > -1 else m.three(h)

    results = []
    for backend in ("aot_eager", EAGER):
        layers = {name: nn.Linear(8, 8) for name in ("one", "two", "three")}
        model = Run(run, **layers) if backend == "aot_eager" else prepared(Run(run, **layers), X)
        with counted() as found:
            step(torch.compile(model, backend=backend), X)
        results.append(found["breaks"])
    assert results[0] == results[1]
    assert set(ranges(model)) == {"one.input", "two.input"} and not unset(model)
    assert declined(model) == {"three": "Dynamo made no graph of it on the example inputs: it stays float"}


class Spectral(nn.Module):
    """A product of complex tensors, as in Fourier layers, and one of integers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.complex = nn.Parameter(torch.randn(8, 8, dtype=torch.complex64))
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        waves = torch.fft.ifft(torch.fft.fft(self.layer(x)) @ self.complex).real
        counts = (4 * x).long() @ torch.ones(8, 8, dtype=torch.long)
        return waves * self.scale * (x > 0) + counts


def test_complex_integer_and_boolean_paths_are_left_alone() -> None:
    model = prepared(Spectral(), X)
    assert set(ranges(model)) == {"layer.input"}
    step(torch.compile(model, backend=EAGER), X)
    assert set(grads(model)) == {"layer.weight", "layer.bias", "complex", "scale"}


def test_an_empty_batch_moves_no_range() -> None:
    model = prepared(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), X)
    compiled = torch.compile(model, backend=EAGER)
    step(compiled, X)
    seen = ranges(model)
    out = compiled(X[:0])
    out.sum().backward()
    assert out.shape == (0, 8) and ranges(model) == seen
