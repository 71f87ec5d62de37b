"""Where a forward is cut into several graphs: which line, why, and what that means for a file."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.errors import ExportError, ExportWarning
from tests.nets import step

LINE = f"{__file__}:"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 4)


class Deciding(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if x.sum() > 0:
            x = x.relu()
        return self.second(x)


class Skipping(Net):
    """Layers are left out at random, in training."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or torch.rand(()) > 0.5:
            x = self.first(x)
        return self.second(x)


class Measuring(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.second(x) * float(x.max())


class Printing(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        print("half of it")
        return self.second(x)


class Whole(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.second(torch.where(x.sum() > 0, x.relu(), x))


def prepared(model: nn.Module) -> tuple[nn.Module, list[str]]:
    """The model prepared and calibrated, and what prepare says of its export."""
    torch._dynamo.reset()
    x = torch.randn(4, 8)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model = fxquant.prepare(model, (x,))
    fxquant.calibrate(model, [(x,)])
    return model, [str(each.message) for each in told if each.category is ExportWarning]


def line_of(code: str) -> int:
    (found,) = [n for n, line in enumerate(Path(__file__).read_text().splitlines(), 1) if line.strip() == code]
    return found


def test_a_decision_is_told_of_before_training_and_in_one_sentence_at_export(tmp_path: Path) -> None:
    model, told = prepared(Deciding())
    place = f"{LINE}{line_of('if x.sum() > 0:')}, `if x.sum() > 0:`"
    way = "Write decisions with torch.where, which takes both ways, or torch.cond"
    assert len(told) == 1
    assert told[0].startswith(
        f"forward decides by the value of a tensor at {place}. It trains in several graphs; where it "
        f"decides so in evaluation too, export_onnx and convert, which need one, refuse it. {way}"
    )
    with pytest.raises(ExportError) as caught:
        fxquant.export_onnx(model, (torch.randn(4, 8),), tmp_path / "net.onnx")
    assert str(caught.value).startswith(
        f"forward must not ask for the value of a tensor in Python: it does at {place}. A file does the same for all "
        f"inputs. {way}"
    )
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_number_that_python_computes_with_is_named_at_export(tmp_path: Path) -> None:
    """Dynamo ends its graph there too, but as often a value is only logged: nothing is said of it before."""
    model, told = prepared(Measuring())
    assert told == []
    code = "return self.second(x) * float(x.max())"
    with pytest.raises(ExportError) as caught:
        fxquant.export_onnx(model, (torch.randn(4, 8),), tmp_path / "net.onnx")
    assert f"in Python: it does at {LINE}{line_of(code)}, `{code}`. " in str(caught.value)


def test_explain_says_where_graphs_end_and_a_print_keeps_nobody_from_a_file(tmp_path: Path) -> None:
    model, told = prepared(Printing())
    assert told == []
    step(torch.compile(model, backend="fxquant_eager"), torch.randn(4, 8))
    code = 'print("half of it")'
    place = f"{LINE}{line_of(code)}, `{code}`"
    ends = [each for each in fxquant.explain(model).compile_declines if "the graph ends at" in each]
    assert len(ends) == 1 and f"the graph ends at {place}: " in ends[0]
    fxquant.export_onnx(model, (torch.randn(4, 8),), tmp_path / "net.onnx")
    assert (tmp_path / "net.onnx").exists()


def test_a_decision_of_training_alone_keeps_nobody_from_a_file(tmp_path: Path) -> None:
    model, told = prepared(Skipping())
    assert len(told) == 1 and "where it decides so in evaluation too" in told[0]
    fxquant.calibrate(model.eval(), [(torch.randn(4, 8),)])
    fxquant.export_onnx(model, (torch.randn(4, 8),), tmp_path / "net.onnx")
    assert fxquant.verify_onnx(model, (torch.randn(4, 8),), tmp_path / "net.onnx", rounds=0).compared_codes > 0


def test_nothing_is_said_of_one_graph() -> None:
    model, told = prepared(Whole())
    step(torch.compile(model, backend="fxquant_eager"), torch.randn(4, 8))
    assert told == [] and not [each for each in fxquant.explain(model).compile_declines if "ends at" in each]
