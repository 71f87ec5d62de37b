"""What version 0.1 wrote and named, before modules got their rooms, still loads: models, checkpoints, imports."""

from __future__ import annotations

import importlib
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

import fxquant
from fxquant import CurrentTensor, Fixed, MovingAverage, QuantSpec, Rule
from fxquant.prepared.quantizer import quantizers
from fxquant.targets.cpu import integer_matrices
from tests import forked
from tests.formerly.write_old import images, net, trained

DATA = Path(__file__).parent / "data"
OUTPUTS: dict[str, torch.Tensor] = torch.load(DATA / "outputs.pt")
NAMES = {
    "fxquant.backend": ("fxquant", "fxquant_eager", "compile_reports", "CompileReport"),
    "fxquant.calibrate": ("calibrate",),
    "fxquant.errors": ("FxquantError", "InvalidArgument"),
    "fxquant.formats": ("FLOAT_FORMATS", "FloatFormat", "float_format"),
    "fxquant.kernels": ("status", "using"),
    "fxquant.onnx": ("export_onnx", "verify_onnx", "lint_onnx", "translation_table"),
    "fxquant.ops": ("fake_quantize_per_tensor_affine", "bind"),
    "fxquant.override": ("override",),
    "fxquant.passes.base": ("Pass", "PassResult", "Decline"),
    "fxquant.passes.pipelines": ("training_passes", "joint_passes", "post_grad_passes"),
    "fxquant.plan": ("Declined", "Edge", "LocalSite", "Mode", "Plan", "Site"),
    "fxquant.prepare": ("prepare", "strip", "attach", "detach", "Measured"),
    "fxquant.profiles": ("Profile", "PROFILES", "get_profile", "ONNXRUNTIME", "OPENVINO", "TENSORRT", "GENERIC"),
    "fxquant.recipes": ("INT8", "W4A8", "INT4_WEIGHT_ONLY", "RECIPES", "Recipe", "get_recipe"),
    "fxquant.report": ("Mixed", "cost", "explain", "mixed", "sensitivity", "sqnr", "Coverage", "MixedRecipe"),
    "fxquant.rules": ("Rule", "Rulebook", "Where", "skip", "first_layer", "last_layer"),
    "fxquant.spec": ("CurrentTensor", "Fixed", "MovingAverage", "QuantSpec", "Range", "get_range", "RANGES"),
    "fxquant.state": ("Quantizer", "QuantizerSet", "Root", "BoundForward", "plan_of", "freeze_ranges", "owners"),
    "fxquant.tensor_quant": ("TensorQuantizer", "QuantDescriptor", "fake_tensor_quant"),
}


def evaluated(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = torch.compile(model, backend="fxquant_eager")(images())
    return result


def assert_the_same(found: torch.Tensor, then: torch.Tensor) -> None:
    """To the bit on CPUs like that which wrote the files; others add up in another order, and differ in last places.

    One with AVX512 and AMX does too, by 1.5e-8.
    """
    if torch.backends.cpu.get_cpu_capability() == "AVX512" and not integer_matrices():
        assert torch.equal(found, then)
    torch.testing.assert_close(found, then, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["plain", "delayed"])
def test_a_whole_model_loads_and_evaluates_as_it_did(name: str, cold: None) -> None:
    model = torch.load(DATA / f"{name}.pt", weights_only=False)
    assert_the_same(evaluated(model), OUTPUTS[name])
    assert len(fxquant.explain(model).rows) == len(list(quantizers(model)))


def test_it_trains_on_as_today_s_does(cold: None) -> None:
    old, new = torch.load(DATA / "plain.pt", weights_only=False), trained()
    results = []
    for model in (old, new):
        model.zero_grad()
        torch.compile(model.train(), backend="fxquant_eager")(images()).square().mean().backward()
        grads = {name: p.grad for name, p in model.named_parameters()}
        results.append({**model.state_dict(), **grads})
        del results[-1]["quantizers_plan"]
    assert results[0].keys() == results[1].keys() and len(results[0]) > 12
    for key, value in results[0].items():
        assert_the_same(value, results[1][key])


def test_it_is_saved_again_and_stripped(tmp_path: Path, cold: None) -> None:
    model = torch.load(DATA / "delayed.pt", weights_only=False)
    torch.save(model, tmp_path / "again.pt")
    again = torch.load(tmp_path / "again.pt", weights_only=False)
    assert_the_same(evaluated(again), OUTPUTS["delayed"])
    assert again[0][1].train(True).training is False, "its BatchNorm is frozen"
    fxquant.strip(again)
    assert not list(quantizers(again)) and again[0][1].train(True).training
    assert {name for name, _ in again.named_parameters()} == {name for name, _ in net().named_parameters()}


def test_a_checkpoint_loads(cold: None) -> None:
    model = fxquant.prepare(net(), (images(),)).eval()
    model.load_state_dict(torch.load(DATA / "checkpoint.pt", weights_only=False))
    assert_the_same(evaluated(model), OUTPUTS["plain"])


def test_a_checkpoint_of_another_recipe_is_still_refused() -> None:
    model = fxquant.prepare(net(), (images(),), recipe="w4a8")
    with pytest.raises(fxquant.errors.PlanMismatch, match="3 sites differ"):
        model.load_state_dict(torch.load(DATA / "checkpoint.pt", weights_only=False))


def test_settings_load() -> None:
    found: dict[str, Any] = pickle.loads((DATA / "settings.pickle").read_bytes())
    assert found["recipe"] == fxquant.Recipe(name="int8")
    weight = QuantSpec(bits=4, range=CurrentTensor())
    assert found["rule"] == Rule(path="head", operand="weight", spec=weight)
    assert found["spec"] == QuantSpec(range=Fixed(min=0.0, max=6.0))
    assert found["range"] == MovingAverage(constant=0.1, delayed=True)
    assert not found["plan"].difference(fxquant.prepare(net(), (images(),)).__dict__["_fxquant_root"].plan)
    assert found["format"].max == 448.0


@pytest.mark.parametrize("module", NAMES)
def test_a_module_has_its_old_name(module: str) -> None:
    loaded = importlib.import_module(module)
    assert [name for name in NAMES[module] if not hasattr(loaded, name)] == []


@pytest.mark.parametrize("name", ["formats", "plan", "profiles", "recipes", "rules", "spec", "state"])
def test_a_module_is_an_attribute_of_the_package(name: str) -> None:
    code = f"import fxquant; assert fxquant.{name}.__name__ == 'fxquant.{name}'"
    forked.run(["-c", code]).check_returncode()


def test_functions_stay_functions_whoever_imports_the_modules() -> None:
    for module in NAMES:
        importlib.import_module(module)
    for name in ("prepare", "override", "calibrate", "cost", "explain", "mixed", "sensitivity", "sync_ranges"):
        assert callable(getattr(fxquant, name)), name


def test_an_old_name_is_found_first_thing_in_a_process() -> None:
    code = "import pickle, pathlib, sys; pickle.loads(pathlib.Path(sys.argv[1]).read_bytes()); import fxquant.state"
    forked.run(["-c", code, str(DATA / "settings.pickle")]).check_returncode()
