"""Modules that were replaced, wrapped, merged or taken out after prepare: said so, never float in silence."""

from __future__ import annotations

import copy
import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.errors import InvalidArgument, NotQuantizedWarning
from fxquant.prepared.quantizer import quantizers
from fxquant.targets.session import EXACT_SUMS, session
from tests.nets import prepared, ranges, step, unset
from tests.onnx.agreement import assert_codes_agree

EAGER = "fxquant_eager"
X = torch.linspace(-9, 9, 4 * 8).sin().reshape(4, 8)
IMAGES = torch.linspace(-9, 9, 2 * 3 * 6 * 6).sin().reshape(2, 3, 6, 6)
pytestmark = pytest.mark.usefixtures("cold")


def layers() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    prepared(model, X)
    return model


@pytest.mark.parametrize(
    "use",
    [
        fxquant.explain,
        fxquant.freeze_ranges,
        lambda m: fxquant.override(m, {"0.weight": None}),
        lambda m: fxquant.calibrate(m, [X], progress=False),
        lambda m: fxquant.export_onnx(m, (X,), "never.onnx"),
        lambda m: fxquant.sensitivity(m, [X], progress=False),
    ],
)
def test_a_layer_that_was_replaced_is_named(use: Callable[[nn.Module], Any]) -> None:
    model = layers()
    model[2] = nn.Linear(8, 3)
    with pytest.raises(InvalidArgument, match=r"others in the place of 2 sites \(2.input, 2.weight\)"):
        use(model)


def test_training_it_says_once_what_is_float() -> None:
    model = layers()
    model[2] = nn.Linear(8, 3)
    with pytest.warns(NotQuantizedWarning, match=r"2 quantized tensors of Sequential .* is float: 2.input, 2.weight"):
        step(torch.compile(model, backend=EAGER), X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(torch.compile(model, backend=EAGER), torch.cat([X, X]))
    assert model.load_state_dict(model.state_dict()) is not None
    fxquant.strip(model)
    fxquant.prepare(model, (X,))
    step(torch.compile(model, backend=EAGER), X)
    assert not unset(model) and len(ranges(model)) == 2


@pytest.mark.parametrize("left", [nn.Identity(), None])
def test_a_layer_that_was_taken_out_is_missed_by_nobody(left: nn.Module | None, tmp_path: Path) -> None:
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head, self.aux = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(torch.relu(self.body(x)))
            return y + self.aux(y) if isinstance(self.aux, nn.Linear) else y

    model = Auxiliary()
    fxquant.calibrate(prepared(model, X), [X], progress=False)
    model.aux = left
    step(torch.compile(model, backend=EAGER), X)
    left_over = {f"{layer}.{operand}" for layer in ("body", "head") for operand in ("input", "weight")}
    assert {row.key for row in fxquant.explain(model).rows} == left_over
    fxquant.freeze_ranges(model)
    report = fxquant.export_onnx(model.eval(), (X,), tmp_path / "m.onnx")
    assert set(report.weights) == {"body.weight", "head.weight"}


# Wrappers of torch's around parts


class Residual(nn.Module):
    """The root owns the sites of its sum."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.a(x))
        return torch.relu(self.b(y) + y)


def test_a_part_that_is_compiled_by_itself() -> None:
    plain = prepared(Residual(), IMAGES)
    model = copy.deepcopy(plain)
    model.b = torch.compile(model.b, backend=EAGER)
    outs = [step(torch.compile(each, backend=EAGER), IMAGES) for each in (plain, model)]
    assert torch.equal(*outs) and ranges(model) == ranges(plain)
    assert {row.key.replace("._orig_mod", "") for row in fxquant.explain(model).rows} == {*dict(quantizers(plain))}


@pytest.mark.filterwarnings("ignore:.*reentrant")
def test_checkpointing_after_prepare_is_told() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = prepared(Residual(), IMAGES)
    model.b = checkpoint_wrapper(model.b)
    with pytest.warns(NotQuantizedWarning, match=r"which fxquant.prepare did not see.*: b_conv0_input"):
        step(torch.compile(model, backend=EAGER), IMAGES)
    assert len(fxquant.explain(model).rows) == 6
    assert not any(prepared(Residual(), IMAGES).load_state_dict(model.state_dict()))
    fxquant.freeze_ranges(model)
    other = prepared(Residual(), IMAGES)
    other.load_state_dict(model.state_dict())
    assert not any(quantizer.observing for _, quantizer in quantizers(other))
    fxquant.strip(model)
    fxquant.prepare(model, (IMAGES,))
    with warnings.catch_warnings():
        warnings.simplefilter("error", NotQuantizedWarning)
        step(torch.compile(model, backend=EAGER), IMAGES)
    assert len(fxquant.explain(model).rows) == len(list(quantizers(model)))


# Low-rank adapters, merged


class Adapted(nn.Module):
    """As peft's lora.Linear: a base layer and a product of two small ones; the sum is its own."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.down, self.up = nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base_layer(x) + self.up(self.down(x))
        return y

    def merged(self) -> nn.Linear:
        with torch.no_grad():
            self.base_layer.weight += self.up.weight @ self.down.weight
        return self.base_layer


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(torch.relu(self.proj(x)))
        return y


def test_adapters_that_were_merged_after_prepare_are_told(tmp_path: Path) -> None:
    model = Net()
    model.proj = Adapted(model.proj)
    prepared(model, X)
    step(torch.compile(model, backend=EAGER), X)
    expected = model(X)
    model.proj = model.proj.merged()
    with pytest.raises(InvalidArgument, match=r"given a model whose layers .*proj.base_layer.weight"):
        fxquant.export_onnx(model, (X,), tmp_path / "m.onnx")
    with pytest.warns(NotQuantizedWarning, match=r"not where they were prepared.*proj.down.weight"):
        step(torch.compile(model, backend=EAGER), X)
    outer = nn.Sequential(model)  # another whole around the same layers, as a merge gives out
    fxquant.calibrate(fxquant.prepare(fxquant.strip(outer), (X,)), [X], progress=False)
    torch.testing.assert_close(outer(X), expected, atol=1e-6, rtol=1e-6)
    model = outer
    fxquant.export_onnx(model, (X,), tmp_path / "m.onnx")


def test_adapters_around_prepared_layers_are_merged_into_what_was_prepared(tmp_path: Path) -> None:
    model = prepared(Net(), X)
    step(torch.compile(model, backend=EAGER), X)
    model.proj = Adapted(model.proj)
    model.proj = model.proj.merged()
    assert [row.status for row in fxquant.explain(model).rows] == ["compiled"] * 4
    fxquant.export_onnx(model.eval(), (X,), tmp_path / "m.onnx")


def test_a_part_of_a_prepared_model_is_named_as_such() -> None:
    whole = nn.ModuleDict({"net": Net()})
    model = prepared(Net(), X)
    whole["net"].proj = model.proj
    with pytest.raises(InvalidArgument, match=r"a part of one or what was merged .*\(net.proj has quant"):
        fxquant.explain(whole)


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs peft")
def test_peft_s_own_merge(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["proj"], r=2, init_lora_weights=False)
    model = peft.get_peft_model(Net(), config)
    prepared(model, X)
    step(torch.compile(model, backend=EAGER), X)
    expected = model.eval()(X)
    merged = model.merge_and_unload()
    with pytest.raises(InvalidArgument, match="a part of one or what was merged from it"):
        fxquant.export_onnx(merged, (X,), tmp_path / "m.onnx")
    fxquant.calibrate(fxquant.prepare(fxquant.strip(merged), (X,)), [X], progress=False)
    torch.testing.assert_close(merged(X), expected, atol=1e-5, rtol=1e-5)
    fxquant.export_onnx(merged, (X,), tmp_path / "m.onnx")


# Others


def test_prepare_leaves_tables_that_a_lookup_scales() -> None:
    model = nn.Sequential(nn.Embedding(10, 8, max_norm=1.0), nn.Linear(8, 4))
    nn.init.normal_(model[0].weight, std=3)
    twin, before = copy.deepcopy(model), model[0].weight.clone()
    tokens = torch.arange(4)
    prepared(model, tokens)
    assert torch.equal(model[0].weight, before)
    torch.compile(model, backend=EAGER)(tokens)
    twin(tokens)
    assert torch.equal(model[0].weight, twin[0].weight), "training scales the rows that it looked up, as torch does"


def test_tables_that_a_lookup_scales_are_exported_as_it_leaves_them(tmp_path: Path) -> None:
    model, tokens = nn.Sequential(nn.Embedding(10, 8, max_norm=1.0), nn.Linear(8, 4)), torch.arange(10)
    nn.init.normal_(model[0].weight, std=3)
    prepared(model, tokens[:4])
    looked_up = fxquant.calibrate(copy.deepcopy(model), [tokens], progress=False)
    model.load_state_dict({**looked_up.state_dict(), "0.weight": model[0].weight.detach().clone()})
    table, before = model[0].weight, model[0].weight.clone()
    fxquant.export_onnx(model, (tokens[:4],), tmp_path / "m.onnx", verify=False)
    assert model[0].weight is table and torch.equal(table, before) and model[0].max_norm == 1.0
    built = session(tmp_path / "m.onnx", optimize=True, config=EXACT_SUMS)
    (found,) = built.run(None, {built.get_inputs()[0].name: tokens.numpy()})
    rows = before / before.norm(dim=1, keepdim=True).clamp(min=1.0)
    torch.testing.assert_close(torch.from_numpy(found), model[1](rows).detach(), atol=0.03, rtol=0)
    assert_codes_agree(fxquant.verify_onnx(model, (tokens[:4],), tmp_path / "m.onnx"))


def test_experts_without_a_token_stay_unset() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.experts = nn.Linear(8, 2), nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
            nn.init.zeros_(self.gate.weight)
            self.gate.bias.data = torch.tensor([1.0, 0.0])

        def forward(self, x: Tensor) -> Tensor:
            chosen, out = self.gate(x).argmax(-1), torch.zeros_like(x)
            for number, expert in enumerate(self.experts):
                rows = (chosen == number).nonzero().squeeze(-1)
                out = out.index_add(0, rows, expert(x[rows]))
            return out

    model = prepared(Experts(), X)
    compiled = torch.compile(model, backend=EAGER)
    assert step(compiled, X).isfinite().all()
    assert unset(model) == ["experts.1.input"]
    assert all(value.isfinite().all() for value in model.state_dict().values())
    model.eval()
    assert compiled(X).isfinite().all()
    model.train().gate.bias.data = torch.tensor([0.0, 1.0])
    step(compiled, X)
    assert ranges(model)["experts.1.input"] == (X.min().item(), X.max().item())
    assert dict(quantizers(model))["experts.0.input"].is_set()
