"""Files of a half type: what is half in them, what stays float32, their edges, and what is refused before a file is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

import fxquant
from tests.onnx.models import calibrated
from tests.onnx.nets import NETS, TOKENS

FLOAT, FLOAT16, BFLOAT16 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16
KINDS = {torch.float16: FLOAT16, torch.bfloat16: BFLOAT16, torch.float32: FLOAT}
HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])


def net(name: str, target: str = "tensorrt", dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    make, x = NETS[name]
    torch.manual_seed(0)
    return calibrated(make().to(dtype), x.to(dtype), target=target), x.to(dtype)


def written(model: nn.Module, x: Tensor, folder: Path, **options: Any) -> onnx.ModelProto:
    """The file, held to ONNX's types and shapes."""
    fxquant.export_onnx(model, (x,), folder / "net.onnx", **options)
    onnx.checker.check_model(folder / "net.onnx", full_check=True)
    return onnx.load(folder / "net.onnx")


def types(model: onnx.ModelProto) -> dict[str, int]:
    """Name → element type, as ONNX infers them: what the file says of its values is not asked."""
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    del bare.graph.value_info[:]
    graph = onnx.shape_inference.infer_shapes(bare, check_type=True, strict_mode=True).graph
    found = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.output, *graph.value_info)}
    return found | {tensor.name: tensor.data_type for tensor in graph.initializer}


def scales(model: onnx.ModelProto) -> set[str]:
    return {n.input[1] for n in model.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")}


def of(model: onnx.ModelProto, *ops: str) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type in ops]


def edges(model: onnx.ModelProto) -> list[int]:
    return [v.type.tensor_type.elem_type for v in (*model.graph.input, *model.graph.output)]


@HALVES
@pytest.mark.parametrize("name", ["residual-with-downsample", "attention-operator", "squeeze-and-excitation"])
def test_all_that_is_float_is_half_but_for_scales_and_edges(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, x = net(name)
    file = written(model, x, tmp_path, float_dtype=dtype)
    assert {o.domain: o.version for o in file.opset_import}[""] == 23 and edges(file) == [FLOAT, FLOAT]
    kinds = types(file)
    float32 = {name for name, kind in kinds.items() if kind == FLOAT}
    assert float32 == scales(file) | {file.graph.input[0].name, file.graph.output[0].name}
    for node in of(file, "DequantizeLinear"):
        assert kinds[node.output[0]] == KINDS[dtype]
        assert KINDS[dtype] in [a.i for a in node.attribute if a.name == "output_dtype"]
    casts = of(file, "Cast")
    assert len(casts) <= 2 and {n.input[0] for n in casts} | {n.output[0] for n in casts} >= {file.graph.output[0].name}


@HALVES
def test_before_opset_23_a_cast_stands_on_either_side_of_a_pair(dtype: torch.dtype, tmp_path: Path) -> None:
    model, x = net("residual-with-downsample")
    file = written(model, x, tmp_path, float_dtype=dtype, opset=22)
    kinds, makers = types(file), {node.output[0]: node for node in file.graph.node}
    assert {kinds[name] for name in scales(file)} == {FLOAT}
    for node in of(file, "Conv", "Add", "Relu"):
        assert {kinds[name] for name in (*node.input, *node.output)} == {KINDS[dtype]}
    for node in of(file, "QuantizeLinear"):
        before = makers.get(node.input[0])
        assert kinds[node.input[0]] == FLOAT and (before is None or before.op_type == "Cast")
    for node in of(file, "Conv"):
        assert all(makers[makers[name].input[0]].op_type == "DequantizeLinear" for name in node.input[:2])


def test_scales_and_codes_are_those_of_the_float32_file(tmp_path: Path) -> None:
    model, x = net("attention-operator")

    def held(file: onnx.ModelProto) -> dict[str, tuple[Any, ...]]:
        arrays = {t.name: numpy_helper.to_array(t) for t in file.graph.initializer}
        return {
            n.output[0]: tuple(arrays[i].tobytes() for i in n.input if i in arrays)
            for n in of(file, "QuantizeLinear", "DequantizeLinear")
        }

    single = held(written(model, x, tmp_path, float_dtype=torch.float32, opset=23))
    assert held(written(model, x, tmp_path, float_dtype=torch.float16)) == single


@pytest.mark.parametrize("io", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("compute", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_inputs_and_outputs_are_of_the_type_that_is_asked(
    io: torch.dtype, compute: torch.dtype, tmp_path: Path
) -> None:
    model, x = net("mlp")
    file = written(model, x, tmp_path, float_dtype=compute, io_dtype=io)
    assert edges(file) == [KINDS[io], KINDS[io]] and len(of(file, "Cast")) == (
        0 if io == compute else 2 - (io == torch.float32)
    )
    verified = fxquant.verify_onnx(model, (x,), tmp_path / "net.onnx", rounds=0)
    assert verified.compared_codes == 360 and verified.largest_code_difference <= 1


def test_a_model_s_own_integers_stay(tmp_path: Path) -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.fc = nn.Embedding(10, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.fc(self.table(x))
            return y, y.float().argmax(-1)

    x = torch.arange(6).reshape(2, 3)
    model = calibrated(Tokens(), x, target="tensorrt")
    file = written(model, x, tmp_path, float_dtype=torch.float16, io_dtype=torch.float16)
    assert edges(file) == [TensorProto.INT64, FLOAT16, TensorProto.INT64]


# ---------------------------------------------------------------- what stays float32


class Positions(nn.Module):
    """Sinusoids of a position, which a half cannot tell from the next; `steps` come as numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.register_buffer("frequencies", 10000.0 ** -(torch.arange(4) / 4))

    def forward(self, x: Tensor, steps: Tensor) -> Tensor:
        angles = steps.float()[:, None] * self.frequencies
        return self.fc(x + torch.cat([angles.sin(), angles.cos()], -1))


def test_angles_stay_float32(tmp_path: Path) -> None:
    torch.manual_seed(0)
    args = torch.randn(4, 8), torch.tensor([3, 500, 2047, 9001])
    model = fxquant.prepare(Positions(), args, target="tensorrt")
    fxquant.calibrate(model, [args], progress=False)
    report = fxquant.export_onnx(model.eval(), args, tmp_path / "net.onnx", float_dtype=torch.float16)
    file = onnx.load(tmp_path / "net.onnx")
    kinds = types(file)
    (product,) = (n for n in of(file, "Mul"))
    assert {kinds[name] for name in product.input} == {FLOAT} and kinds[of(file, "Concat")[0].output[0]] == FLOAT16
    assert report.typed_difference is not None and report.typed_difference < 2e-3


class Norm(nn.Module):
    """RMSNorm, written out."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out, self.weight = nn.Linear(8, 8), nn.Linear(8, 8), nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x) * 1000
        return self.out(y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight)


def test_sums_of_squares_under_a_root_stay_float32(tmp_path: Path) -> None:
    model = calibrated(Norm(), TOKENS, target="tensorrt")
    file = written(model, TOKENS, tmp_path, float_dtype=torch.float16, opset=22)  # 23 has an operator of its own
    kinds = types(file)
    assert kinds[of(file, "ReduceMean")[0].input[0]] == FLOAT and kinds[of(file, "Sqrt")[0].input[0]] == FLOAT
    assert {kinds[name] for name in of(file, "MatMul")[1].input} == {FLOAT16}


def test_a_mask_of_float32_s_least_value_is_half_s(tmp_path: Path) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor, keep: Tensor) -> Tensor:
            scores = self.q(x) @ self.k(x).transpose(1, 2)
            return torch.softmax(scores + torch.where(keep, 0.0, torch.finfo(torch.float32).min), -1)

    torch.manual_seed(0)
    keep = torch.ones(3, 5, 5, dtype=torch.bool).tril()
    keep[0, 0] = False  # a row without any
    model = fxquant.prepare(Masked(), (TOKENS, keep), target="tensorrt")
    fxquant.calibrate(model, [(TOKENS, keep)], progress=False)
    report = fxquant.export_onnx(model.eval(), (TOKENS, keep), tmp_path / "net.onnx", float_dtype=torch.float16)
    held = [numpy_helper.to_array(t) for t in onnx.load(tmp_path / "net.onnx").graph.initializer]
    assert min(float(a.min()) for a in held if a.dtype == np.float16 and a.size) == -65504.0
    assert any("1 constants beyond float16 are its largest value" in note for note in report.notes)
    assert report.typed_difference is not None and report.typed_difference < 0.01


# ---------------------------------------------------------------- the rewrite alone


def typed(node: onnx.NodeProto | list[onnx.NodeProto], inputs: dict[str, Any], shape: Any = None, **more: Any) -> Any:
    """A graph of some nodes, ``y`` its output, in bfloat16: as text, name of op → its operands' and results' types."""
    import onnx_ir as ir

    from fxquant.onnx.typed import type_floats

    nodes = node if isinstance(node, list) else [node]
    given = [helper.make_tensor_value_info(k, v[0], v[1]) for k, v in inputs.items() if isinstance(v, tuple)]
    held = [numpy_helper.from_array(v, k) for k, v in inputs.items() if not isinstance(v, tuple)]
    result = helper.make_tensor_value_info("y", FLOAT, shape)
    graph = helper.make_graph(nodes, "g", given, [result], held)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    type_floats(model, torch.bfloat16, 23, **more)
    done = ir.to_proto(model)
    onnx.checker.check_model(done, full_check=True)
    kinds = types(done)
    return [(n.op_type, [kinds[i] for i in n.input if i], [kinds[o] for o in n.output]) for n in done.graph.node]


VECTOR = (FLOAT, [2, 3])


def test_an_operator_that_the_standard_has_not_in_bfloat16_stays() -> None:
    nodes = [
        helper.make_node("Neg", ["a"], ["b"]),
        helper.make_node("Einsum", ["b"], ["c"], equation="ij->ji"),
        helper.make_node("Neg", ["c"], ["y"]),
    ]
    shown = [(op, *reads, *gives) for op, reads, gives in typed(nodes, {"a": VECTOR})]
    assert ("Einsum", FLOAT, FLOAT) in shown and shown.count(("Neg", BFLOAT16, BFLOAT16)) == 2


def test_one_that_the_runtime_has_not_stays_and_what_moves_its_result_too() -> None:
    nodes = [
        helper.make_node("Neg", ["a"], ["b"]),
        helper.make_node("Sigmoid", ["b"], ["c"]),
        helper.make_node("Transpose", ["c"], ["d"], perm=[1, 0]),
        helper.make_node("Neg", ["d"], ["y"]),
    ]
    shown = typed(nodes, {"a": VECTOR}, without=("Sigmoid",))
    assert ("Sigmoid", [FLOAT], [FLOAT]) in shown and ("Transpose", [FLOAT], [FLOAT]) in shown
    assert [each for each in shown if each[0] == "Neg"] == [("Neg", [BFLOAT16], [BFLOAT16])] * 2


def test_scales_of_a_resize_stay() -> None:
    image = (FLOAT, [1, 2, 4, 4])
    sizes = np.array([1, 1, 2, 2], np.float32)
    shown = typed(helper.make_node("Resize", ["x", "", "s"], ["y"], mode="nearest"), {"x": image, "s": sizes})
    assert ("Resize", [BFLOAT16, FLOAT], [BFLOAT16]) in shown


def test_bodies_are_of_the_type_too() -> None:
    def branch(name: str, op: str) -> onnx.GraphProto:
        inner = helper.make_node(op, ["b"], [name])
        return helper.make_graph([inner], name, [], [helper.make_tensor_value_info(name, FLOAT, [2, 3])])

    nodes = [
        helper.make_node("Neg", ["a"], ["b"]),
        helper.make_node("If", ["is"], ["y"], then_branch=branch("t", "Abs"), else_branch=branch("e", "Neg")),
    ]
    shown = typed(nodes, {"a": VECTOR, "is": (TensorProto.BOOL, [])})
    assert ("If", [TensorProto.BOOL], [BFLOAT16]) in shown


def test_a_loop_carries_it() -> None:
    info = helper.make_tensor_value_info
    body = helper.make_graph(
        [helper.make_node("Add", ["v", "v"], ["w"]), helper.make_node("Identity", ["go"], ["on"])],
        "body",
        [info("i", TensorProto.INT64, []), info("go", TensorProto.BOOL, []), info("v", FLOAT, [2, 3])],
        [info("on", TensorProto.BOOL, []), info("w", FLOAT, [2, 3])],
    )
    loop = helper.make_node("Loop", ["n", "", "a"], ["y"], body=body)
    shown = typed(loop, {"n": np.array(3, np.int64), "a": VECTOR}, [2, 3])
    assert ("Loop", [TensorProto.INT64, BFLOAT16], [BFLOAT16]) in shown


@pytest.mark.parametrize(
    "node",
    [
        helper.make_node("Cast", ["x"], ["f"], to=FLOAT),
        helper.make_node("ConstantOfShape", ["x"], ["f"], value=numpy_helper.from_array(np.ones(1, np.float32))),
        helper.make_node("ConstantOfShape", ["x"], ["f"]),
        helper.make_node("RandomNormal", [], ["f"], shape=[2]),
        helper.make_node("Constant", [], ["f"], value_floats=[1.0, 2.0]),
    ],
    ids=lambda node: f"{node.op_type}{len(node.attribute)}",
)
def test_what_says_its_own_type_says_the_other(node: onnx.NodeProto) -> None:
    shown = typed([node, helper.make_node("Neg", ["f"], ["y"])], {"x": (TensorProto.INT64, [2])})
    assert ("Neg", [BFLOAT16], [BFLOAT16]) in shown


def test_a_computed_scale_is_computed_in_float32() -> None:
    nodes = [
        helper.make_node("Neg", ["a"], ["b"]),
        helper.make_node("ReduceMax", ["b"], ["m"], keepdims=0),
        helper.make_node("Div", ["m", "n"], ["s"]),
        helper.make_node("QuantizeLinear", ["b", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    given = {"a": VECTOR, "n": np.float32(127.0), "z": np.array(0, np.int8)}
    shown = typed(nodes, given)
    assert ("Div", [FLOAT, FLOAT], [FLOAT]) in shown and ("ReduceMax", [FLOAT], [FLOAT]) in shown
    assert ("QuantizeLinear", [BFLOAT16, FLOAT, TensorProto.INT8], [TensorProto.INT8]) in shown


def test_bfloat16_constants_are_rounded_to_nearest(tmp_path: Path) -> None:
    model, x = net("mlp")
    file = written(model, x, tmp_path, float_dtype=torch.bfloat16)
    (bias,) = (t for t in file.graph.initializer if t.name.startswith("0.bias"))
    assert np.array_equal(numpy_helper.to_array(bias), model[0].bias.detach().numpy().astype(ml_dtypes.bfloat16))
