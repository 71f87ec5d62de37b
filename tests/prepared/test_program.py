"""`export_program`: numbers of the file, codes of weights as buffers, open sizes, saved and loaded, bad input."""

from __future__ import annotations

import io
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, fx, nn

import fxquant
from fxquant.errors import ExportError, InvalidArgument, NotQuantizedWarning, RangeNotSet
from fxquant.passes.export.decompose_pairs import DecomposePairs
from fxquant.passes.export.pairs import Pair
from tests.nets import Attention, ConvNet, Mlp


def calibrated(net: nn.Module, x: Tensor, **keywords: Any) -> nn.Module:
    model = fxquant.prepare(net, (x,), **keywords)
    fxquant.calibrate(model, [(x,)])
    return model.eval()


@pytest.fixture(scope="module")
def convnet() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    return calibrated(ConvNet(8), x), x


@pytest.fixture(scope="module")
def program(convnet: tuple[nn.Module, Tensor]) -> torch.export.ExportedProgram:
    return fxquant.export_program(convnet[0], (convnet[1],))


def operators(program: torch.export.ExportedProgram) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


def test_numbers_are_those_of_the_file(
    convnet: tuple[nn.Module, Tensor], program: torch.export.ExportedProgram, tmp_path: Any
) -> None:
    model, x = convnet
    fxquant.export_onnx(model, (x,), tmp_path / "m.onnx")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", options, providers=["CPUExecutionProvider"])
    more = torch.randn(5, 3, 8, 8)
    for value in (x, more):
        (expected,) = session.run(None, {session.get_inputs()[0].name: value.numpy()})
        found = program.module()(value)
        # No value of these is at a tie, where torch's reciprocal would give another code.
        torch.testing.assert_close(found, torch.from_numpy(expected), rtol=1e-5, atol=1e-6)


def test_it_holds_codes_and_no_float_weights(program: torch.export.ExportedProgram) -> None:
    kinds = {name: value.dtype for name, value in program.state_dict.items()}
    assert sum(kind == torch.int8 for kind in kinds.values()) == 3
    assert all(value.dim() < 2 for value in program.state_dict.values() if value.is_floating_point())
    assert not [name for name in operators(program) if "fxquant" in name or "batch_norm" in name]


def test_it_is_saved_and_loaded(convnet: tuple[nn.Module, Tensor], program: torch.export.ExportedProgram) -> None:
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    x = convnet[1]
    assert torch.equal(torch.export.load(file).module()(x), program.module()(x))


def test_xnnpack_has_int8_codes_and_float_products_with_float_results(convnet: tuple[nn.Module, Tensor]) -> None:
    model, x = convnet
    with pytest.warns(NotQuantizedWarning, match="head__weight__codes_values: the result of its product is not quanti"):
        program = fxquant.export_program(model, (x,), runtime="xnnpack", dynamic_batch=False)
    kinds = {node.args[5] for node in program.graph.nodes if "quantize_per_tensor" in str(node.target)}
    assert kinds == {torch.int8}
    (head,) = (node for node in program.graph.nodes if node.target is torch.ops.aten.linear.default)
    assert head.args[1].op == "placeholder", "its result is the model's, in float"
    assert sum("dequantize_per_channel" in name for name in operators(program)) == 2
    planned = fxquant.export_program(model, (x,), dynamic_batch=False)
    torch.testing.assert_close(program.module()(x), planned.module()(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("net", [Mlp, Attention])
def test_products_read_pairs(net: type[nn.Module]) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 8) if net is Attention else torch.randn(3, 8)
    program = fxquant.export_program(calibrated(net(8), x), (x,))
    products = [n for n in program.graph.nodes if str(n.target).split(".")[1:2] in (["linear"], ["matmul"], ["bmm"])]
    assert products
    for node in products:
        assert "dequantize_per_tensor" in str(node.args[0].target), node.format_node()


def test_the_model_stays_as_it_was(convnet: tuple[nn.Module, Tensor]) -> None:
    model, x = convnet
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    program = fxquant.export_program(model, (x,), dynamic_batch=False)
    for value in program.state_dict.values():  # as lowerings do
        value.detach().zero_()
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.eval()


@pytest.mark.parametrize("moved", [1, 40])
def test_a_program_that_computes_another_thing_is_refused(
    convnet: tuple[nn.Module, Tensor], moved: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each code of one quantizer is off by one, or by many."""
    pair = DecomposePairs._pair

    def off(self: DecomposePairs, gm: fx.GraphModule, view: Pair) -> fx.Node:
        node = pair(self, gm, view)
        if view.label.startswith("head.input"):
            node.args = (*node.args[:2], node.args[2] + moved, *node.args[3:])
        return node

    monkeypatch.setattr(DecomposePairs, "_pair", off)
    model, x = convnet
    with pytest.raises(ExportError, match="program must compute what the model does: got output 0 off by"):
        fxquant.export_program(model, (x,))
    fxquant.export_program(model, (x,), verify=False)


def test_bad_input(convnet: tuple[nn.Module, Tensor]) -> None:
    model, x = convnet
    with pytest.raises(InvalidArgument, match=r"runtime must be among 'x86', 'xnnpack', or None: got 'onnxruntime'"):
        fxquant.export_program(model, (x,), runtime="onnxruntime")
    with pytest.raises(InvalidArgument, match="export_program"):
        fxquant.export_program(ConvNet(8), (x,))
    with pytest.raises(RangeNotSet):
        fxquant.export_program(fxquant.prepare(Mlp(8), (torch.randn(2, 8),)), (torch.randn(2, 8),))
    small = calibrated(Mlp(8), torch.randn(3, 8), recipe="fp8", target="generic")
    with pytest.raises(ExportError, match="must have a format that quantized_decomposed has: got codes of e4m3"):
        fxquant.export_program(small, (torch.randn(3, 8),))
