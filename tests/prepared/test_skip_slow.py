"""``prepare(skip_slow=…)``: products that are faster in float stay there, from the plan to the file."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.errors import InvalidArgument, UnsupportedModel
from fxquant.prepared.root import require_plan
from fxquant.targets.costs import CostTable, Size, cpu_class, shipped
from tests.costs import table_of

X = torch.randn(2, 8, 6, 6)
DEPTHWISE = "1"


def net() -> nn.Module:
    torch.manual_seed(0)
    first, deep = nn.Sequential(nn.Conv2d(8, 8, 1), nn.SiLU()), nn.Conv2d(8, 8, 3, padding=1, groups=8)
    return nn.Sequential(first, deep, nn.SiLU(), nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(288, 4))


@pytest.fixture(scope="module")
def table() -> CostTable:
    """Of a runtime whose depthwise convolutions are slow on integers, and nothing else."""
    return table_of(
        {
            Size(op="pointwise", rows=36, depth=8, columns=8): (10.0, 40.0),
            Size(op="depthwise", rows=36, depth=9, columns=8): (40.0, 10.0),
            Size(op="linear", rows=1, depth=288, columns=4): (10.0, 40.0),
        }
    )


def quantized_layers(model: nn.Module) -> set[str]:
    return {site.owner for site in require_plan(model, "test").sites if site.local.role == "weight"}


def test_the_slow_layer_is_float_in_plan_report_file_and_checkpoint(table: CostTable, tmp_path: Path) -> None:
    """A table in a file, its reason in `explain`, the file verified; a checkpoint needs no table."""
    (tmp_path / "costs.json").write_text(table.to_json())
    model = fxquant.prepare(net(), (X,), skip_slow=tmp_path / "costs.json")
    assert quantized_layers(model) == {"0.0", "3", "5"}
    assert "by itself 40 µs, 10 in float" in " ".join(str(fxquant.explain(model)).split())
    fxquant.calibrate(model, [X], progress=False)
    path = tmp_path / "net.onnx"
    fxquant.export_onnx(model.eval(), (X,), path)
    report = fxquant.verify_onnx(model, (X,), path)
    assert "3 of 4 conv/gemm/matmul nodes run on integers" in str(report)
    again = fxquant.prepare(net(), (X,), skip_slow=table)
    again.load_state_dict(copy.deepcopy(model.state_dict()))
    with torch.no_grad():
        assert torch.equal(again.eval()(X), model(X))


def test_without_it_all_layers_are_integers(table: CostTable) -> None:
    assert quantized_layers(fxquant.prepare(net(), (X,))) == {"0.0", "1", "3", "5"}


def test_a_rule_keeps_a_slow_layer(table: CostTable) -> None:
    spec = fxquant.QuantSpec(bits=4, narrow=True, axis=0, range=fxquant.CurrentTensor())
    rules = [fxquant.Rule(spec=spec, path=DEPTHWISE, operand="weight")]
    assert DEPTHWISE in quantized_layers(fxquant.prepare(net(), (X,), rules=rules, skip_slow=table))


def test_the_batch_of_the_example_does_not_count(table: CostTable) -> None:
    """Tables are of one example; a larger example batch decides alike."""
    model = fxquant.prepare(net(), (torch.randn(32, 8, 6, 6),), skip_slow=table)
    assert DEPTHWISE not in quantized_layers(model)


def test_our_own_table_leaves_stems_float() -> None:
    """As measured: three channels in, and a depthwise convolution on large pictures, between other operators."""
    block = nn.Sequential(
        *(nn.Conv2d(3, 32, 3, stride=2, padding=1), nn.SiLU(), nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.SiLU()),
        *(nn.Conv2d(32, 96, 1), nn.ReLU(), nn.Conv2d(96, 96, 1)),
    )
    model = fxquant.prepare(block, (torch.randn(1, 3, 224, 224),), skip_slow="x86_64-vnni")
    assert quantized_layers(model) == {"4", "6"}


@pytest.mark.parametrize(
    ("target", "given", "told"),
    [
        ("openvino", True, "skip_slow must be for a target whose costs are measured, 'onnxruntime': got 'openvino'"),
        ("openvino", "table", "skip_slow must hold costs of target 'openvino': got a table of 'onnxruntime'"),
        ("onnxruntime", "x86_64-vmni", "of class 'x86_64-vmni': fxquant has one for x86_64-amx, x86_64-vnni"),
        ("onnxruntime", "nowhere.json", "a table of costs must be a file: got 'nowhere.json'"),
        ("onnxruntime", "folder/costs", "a table of costs must be a file: got 'folder/costs'"),
        ("onnxruntime", None, "must be True, a class of CPU, a file of `fxquant costs` or a CostTable: got None"),
        ("onnxruntime", 1, "or a CostTable: got 1"),
    ],
    ids=["no table", "another target", "another class", "no file", "a path", "none", "a number"],
)
def test_bad_input_leaves_the_model(target: str, given: object, told: str, table: CostTable) -> None:
    model = net()
    with pytest.raises(InvalidArgument, match=told):
        fxquant.prepare(model, (X,), target=target, skip_slow=table if given == "table" else given)  # type: ignore[arg-type]
    fxquant.prepare(model, (X,))


def test_a_cpu_without_a_table_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    shipped.cache_clear()
    assert cpu_class().startswith("riscv64")
    with pytest.raises(InvalidArgument, match=r"of class 'riscv64.*`fxquant costs"):
        fxquant.prepare(net(), (X,), skip_slow=True)


def test_a_net_that_is_faster_in_float_is_told(table: CostTable) -> None:
    deep = nn.Sequential(nn.SiLU(), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.SiLU())
    with pytest.raises(UnsupportedModel, match="skip_slow leaves all of its products in float"):
        fxquant.prepare(deep, (X,), skip_slow=table)


@pytest.mark.parametrize("recipe", ["int8_dynamic", "int4_weight_only"])
def test_formats_that_the_table_has_not_are_refused(recipe: str, table: CostTable) -> None:
    with pytest.raises(InvalidArgument, match=f"whose costs are measured: recipe '{recipe}' has"):
        fxquant.prepare(net(), (X,), recipe=recipe, skip_slow=table)


def test_a_mask_that_is_used_first_is_no_batch(table: CostTable) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = net()

        def forward(self, mask: Tensor, x: Tensor) -> Tensor:
            return self.body(x * mask.sum())

    model = fxquant.prepare(Masked(), (torch.ones(36, 36), X[:1]), skip_slow=table)
    assert quantized_layers(model) == {"body.0.0", "body.3", "body.5"}
