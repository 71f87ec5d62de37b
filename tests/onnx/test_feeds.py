"""Inputs for a file: by name or in order, and what is said of those that it does not take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.errors import InvalidArgument
from fxquant.onnx.feeds import feeds_of


class Lookup(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(10, 8), nn.Linear(8, 4)

    def forward(self, ids: Tensor, weights: Tensor) -> Tensor:
        return self.out(self.table(ids) * weights)


IDS, WEIGHTS = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.rand(2, 3, 1)


@pytest.fixture(scope="module")
def file(tmp_path_factory: Any) -> tuple[nn.Module, Path]:
    model = fxquant.prepare(Lookup(), (IDS, WEIGHTS))
    fxquant.calibrate(model, [(IDS, WEIGHTS)])
    path = tmp_path_factory.mktemp("feeds") / "net.onnx"
    fxquant.export_onnx(model, (IDS, WEIGHTS), path)
    return model, path


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((IDS.int(), WEIGHTS), "input 'ids' of {path} must be int64: got int32. Give what the model was exported with"),
        ((IDS, WEIGHTS > 0), "input 'weights' of {path} must be float32: got bool."),
        ((IDS[:, :2], WEIGHTS[:, :2]), "input 'ids' of {path} must have shape ({batch}, 3): got (2, 2). Give"),
        ((IDS, WEIGHTS[0]), "input 'weights' of {path} must have shape ({batch}, 3, 1): got (3, 1)."),
        ((IDS, WEIGHTS[..., 0]), "input 'weights' of {path} must have shape ({batch}, 3, 1): got (2, 3)."),
        ((IDS,), "args and kwargs must hold the file's 2 inputs (ids, weights): got 1 tensors."),
    ],
    ids=["another integer", "truth values", "a shorter row", "no batch", "a dimension less", "one too few"],
)
def test_what_a_file_does_not_take(file: tuple[nn.Module, Path], args: tuple[Any, ...], message: str) -> None:
    model, path = file
    import onnx

    batch = onnx.load(path).graph.input[0].type.tensor_type.shape.dim[0].dim_param
    with pytest.raises(InvalidArgument) as caught:
        fxquant.verify_onnx(model, args, path, rounds=0)
    assert str(caught.value).startswith(message.format(path=path, batch=batch))


def test_floats_are_given_the_file_s_type_and_open_sizes_are_open(file: tuple[nn.Module, Path]) -> None:
    _, path = file
    feeds = feeds_of(path, (IDS.repeat(3, 1),), {"weights": WEIGHTS.repeat(3, 1, 1).double()})
    assert {name: (value.dtype.name, value.shape) for name, value in feeds.items()} == {
        "ids": ("int64", (6, 3)),
        "weights": ("float32", (6, 3, 1)),
    }


def test_a_runtime_that_is_not_known_is_named_as_such(file: tuple[nn.Module, Path]) -> None:
    model, path = file
    with pytest.raises(InvalidArgument, match=r"^runtime must be one of 'onnxruntime', .*: got 'tflite'\.$"):
        fxquant.verify_onnx(model, (IDS, WEIGHTS), path, runtime="tflite")
