"""A model of half or double precision, in float32 for a while."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fxquant.capture.in_float32 import in_float32, is_other, output_types, widened


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(2, 2), nn.BatchNorm1d(2)
        self.fc.half()
        self.register_buffer("scale", torch.tensor([0.1, 3.0], dtype=torch.bfloat16))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.fc(x)
        return {"y": y, "z": self.norm(y.float()), "n": y.argmax()}


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_itself_again(fails: bool) -> None:
    model = Net()
    model.fc.weight.grad = grad = torch.ones_like(model.fc.weight)
    before = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    held = {name: (value.data_ptr(), value.dtype) for name, value in before.items()}
    try:
        with in_float32(model):
            assert not is_other(model) and model.fc.weight.grad is None
            assert all(now is before[name] for name, now in model.named_parameters())
            assert torch.equal(model.scale, before["scale"].float())
            if fails:
                raise KeyError
    except KeyError:
        pass
    assert model.fc.weight.grad is grad
    after = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert all(after[name] is value for name, value in before.items())
    assert {name: (value.data_ptr(), value.dtype) for name, value in after.items()} == held


def test_what_is_other() -> None:
    assert is_other(Net()) and not is_other(nn.Linear(2, 2)) and is_other(nn.Linear(2, 2).double())
    only_a_buffer = nn.Module()
    only_a_buffer.register_buffer("b", torch.zeros(1, dtype=torch.bfloat16))
    assert is_other(only_a_buffer)


def test_types_of_outputs_from_a_run_that_leaves_no_trace() -> None:
    model = Net()
    assert output_types(model, (torch.ones(3, 2, dtype=torch.float16),), {}) == [
        torch.float16,
        torch.float32,
        torch.int64,
    ]
    assert model.training and model.norm.num_batches_tracked == 0


def test_inputs() -> None:
    values = {"a": [torch.ones(1, dtype=torch.bfloat16), torch.ones(1, dtype=torch.float64)], "b": 3}
    wide = widened(values)
    assert [value.dtype for value in wide["a"]] == [torch.float32, torch.float32] and wide["b"] == 3
