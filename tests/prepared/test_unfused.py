"""Modules that torch evaluates by a fused operator: compiled and exported, they take the branch of training."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.errors import NotQuantizedWarning
from fxquant.prepared.quantizer import quantizers
from tests.nets import counted, eager_runs, prepared, ranges, step, unset

EAGER = "fxquant_eager"


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


def layer() -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)


NETS = {"attention": SelfAttention, "encoder": lambda: nn.TransformerEncoder(layer(), 1)}


def net(name: str) -> nn.Module:
    torch._dynamo.reset()
    torch.manual_seed(0)
    made: nn.Module = NETS[name]()
    return made


X = torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", NETS)
def test_evaluation_without_gradients_is_that_with_gradients(name: str) -> None:
    """Where a parameter wants a gradient torch itself takes the branch of training: the oracle."""
    model = prepared(net(name), X)
    compiled = torch.compile(model, backend=EAGER)
    step(compiled, X)
    model.eval()
    expected = compiled(X).detach()
    with torch.no_grad(), counted() as graphs:
        assert torch.equal(compiled(X), expected)
    assert (graphs["breaks"], eager_runs(model)) == (0, 0)
    with torch.no_grad():
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(torch.compile(twin, backend=EAGER)(X), expected)


@pytest.mark.parametrize("name", NETS)
def test_plain_python_and_the_switch_of_torch_stay_as_they_were(name: str) -> None:
    plain = net(name).eval()
    model = prepared(copy.deepcopy(plain), X)
    compiled = torch.compile(model, backend=EAGER)
    with torch.no_grad():
        expected = plain(X)
        compiled(X)
        assert torch.backends.mha.get_fastpath_enabled()
        assert torch.equal(model(X), expected)
    fxquant.strip(model)
    assert not any("forward" in m.__dict__ for m in model.modules())


@pytest.mark.parametrize("name", NETS)
def test_every_door_sees_every_site(name: str, tmp_path: Path) -> None:
    keys = dict(quantizers(prepared(net(name), X))).keys()
    model = prepared(net(name).eval().requires_grad_(False), X)  # torch would fuse here too
    assert dict(quantizers(model)).keys() == keys
    fxquant.calibrate(model, [X])
    assert not unset(model)
    if name == "attention":
        return
    fxquant.export_onnx(model, (X,), tmp_path / "m.onnx")
    found = fxquant.verify_onnx(model, (X,), tmp_path / "m.onnx", rounds=1)
    assert {row.key for row in found.codes} == set(ranges(model))
    explained = fxquant.explain(model, (X,))
    assert explained.coverage is not None and not explained.coverage.most_float()


def test_padding_does_not_turn_into_nested_tensors() -> None:
    model = prepared(net("encoder"), X)
    padding = torch.zeros(3, 7, dtype=torch.bool)
    padding[0, 5:] = True
    compiled = torch.compile(model, backend=EAGER)
    step(compiled, X, src_key_padding_mask=padding)
    model.eval()
    expected = compiled(X, src_key_padding_mask=padding).detach()
    with torch.no_grad():
        assert torch.equal(compiled(X, src_key_padding_mask=padding), expected)


def test_a_fused_operator_in_a_graph_is_told() -> None:
    """A model that was not prepared has forwards of torch alone."""
    model: Any = net("encoder").eval()
    with torch.no_grad(), pytest.warns(NotQuantizedWarning, match="set_fastpath_enabled"):
        out = torch.compile(model, backend=EAGER)(X)
        torch.testing.assert_close(out, model(X))
