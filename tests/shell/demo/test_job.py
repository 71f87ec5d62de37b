"""The work of the demo against an fxquant that does nothing: what is asked of it, in which order, and what is kept."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxquant
import fxquant.report
from fxquant.shell.demo import job
from fxquant.shell.demo.console import Console
from fxquant.shell.demo.data import Digits
from fxquant.shell.demo.job import Budget, Trained
from fxquant.shell.demo.nets import NETS
from fxquant.shell.demo.train import Schedule
from tests.shell.demo.made import Reader, few_digits

FEW = few_digits(torch.arange(70) % 10, torch.tensor([3, 1, 4, 1, 5]))
SHORT = Schedule(epochs=2, learning_rate=1e-3, frozen_epochs=1)
REPORT = SimpleNamespace(
    integer_share=1, differing_codes=4.0, compared_codes=99, latency_ratio=2, cascaded_codes=7, note="not kept"
)


class Asked:
    """What was called, and with what."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.models: set[int] = set()

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.calls]

    def __getitem__(self, name: str) -> Any:
        """The arguments of the one call of this name, without the model."""
        (found,) = (rest for called, rest in self.calls if called == name)
        return found


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    asked = Asked()

    def note(name: str, gives: Any = None) -> Any:
        def call(model: nn.Module, *rest: Any, **named: Any) -> Any:
            asked.calls.append((name, (rest, named)))
            asked.models.add(id(model))
            return model if gives is None else gives

        return call

    def backend(model: nn.Module, name: str) -> Any:
        asked.calls.append((name, model.training))
        return model

    for name in ("prepare", "calibrate", "freeze_batch_norm", "freeze_ranges"):
        monkeypatch.setattr(fxquant, name, note(name), raising=False)
    monkeypatch.setattr(fxquant, "export_onnx", note("export_onnx", "exported so"), raising=False)
    monkeypatch.setattr(fxquant, "verify_onnx", note("verify_onnx", REPORT), raising=False)
    monkeypatch.setattr(fxquant.report, "html", note("html"), raising=False)
    monkeypatch.setattr(fxquant.report, "sqnr", note("sqnr", {"quantizers.off": 40.0}), raising=False)
    monkeypatch.setattr(job, "compiled", backend)
    one = F.one_hot(torch.tensor([3, 1, 4, 0, 0]), 10).float()
    monkeypatch.setattr(job, "run_onnx", lambda path, images: asked.calls.append(("run_onnx", path)) or one)
    return asked


def quantized(tmp_path: Path, stream: io.StringIO | None = None) -> tuple[job.Quantized, Trained]:
    trained = Trained(net="own", model=Reader(), accuracy=0.75, curve=[1.0])
    console = Console(stream or io.StringIO())
    return job.quantize(trained, "w4a8", FEW, SHORT, seed=3, out=tmp_path, console=console), trained


# --- quantizing ----------------------------------------------------------------------------------------


def test_the_row_of_a_run(asked: Asked, tmp_path: Path) -> None:
    """The net reads all five digits, the file three: 3, 1, 4, and not 1 and 5."""
    run, _ = quantized(tmp_path)
    row = run.result
    assert (row.net, row.recipe, row.float_acc) == ("own", "w4a8", 0.75)
    assert row.ptq_acc == row.qat_acc == 1.0 and row.onnx_acc == row.same_class == 0.6
    assert (row.differing_codes, row.compared_codes, row.cascaded_codes) == (4, 99, 7)
    assert (row.integer_share, row.latency_ratio) == (1.0, 2.0)
    assert run.sqnr == {"quantizers.off": 40.0} and len(run.curve) == 2


def test_stages_of_a_run_and_what_they_are_given(asked: Asked, tmp_path: Path) -> None:
    quantized(tmp_path)
    assert asked.names == [
        "prepare", "calibrate", "fxquant_eager", "fxquant", "freeze_batch_norm", "freeze_ranges",
        "fxquant_eager", "export_onnx", "verify_onnx", "html", "run_onnx", "sqnr",
    ]  # fmt: skip
    (inputs,), named = asked["prepare"]
    assert named == {"recipe": "w4a8", "target": "onnxruntime"} and inputs[0] is not FEW.test_x
    ((batches,), _), path = asked["calibrate"], str(tmp_path / "own-w4a8.onnx")
    assert [len(x) for (x,) in batches] == [64, 6]
    for name, images in (("export_onnx", FEW.example), ("verify_onnx", FEW.test_x)):
        ((given,), where), _ = asked[name]
        assert torch.equal(given, images) and where == path
    assert asked["run_onnx"] == Path(path)
    assert [mode for name, mode in asked.calls if name == "fxquant_eager"] == [True, False], "told once it is trained"


def test_the_float_net_is_not_touched(asked: Asked, tmp_path: Path) -> None:
    _, trained = quantized(tmp_path)
    assert id(trained.model) not in asked.models and len(asked.models) == 1
    assert float(trained.model.off.detach()) == 0 and trained.model.off.grad is None


def test_fine_tuning_draws_other_batches_than_training_in_float(
    asked: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds: list[int] = []
    monkeypatch.setattr(job, "train", lambda *_, seed, **__: seeds.append(seed) or [0.0])
    monkeypatch.setitem(NETS, "own", Reader)
    job.train_float("own", FEW, SHORT, seed=3, console=Console(io.StringIO()))
    quantized(tmp_path)
    assert seeds == [3, 4]


@pytest.mark.parametrize("saturates", [False, True])
def test_what_is_said_of_a_run(asked: Asked, saturates: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "sums_saturate", lambda: saturates)
    stream = io.StringIO()
    run, _ = quantized(tmp_path, stream)
    assert stream.getvalue() == (
        "own w4a8 PTQ       100.0 %\n"
        f"own w4a8 QAT           1/2  loss {run.curve[0]:.3f}\n"
        f"own w4a8 QAT           2/2  loss {run.curve[1]:.3f}\n"
        "own w4a8 QAT       100.0 %; exporting and verifying\n"
        + "own w4a8           onnxruntime's sums saturate on this CPU: read with exact ones, see own-w4a8.txt\n"
        * saturates
    )


def test_freezing_comes_between_the_epochs(asked: Asked) -> None:
    model = Reader()
    steps = lambda loss: asked.calls.append(("step", None))  # noqa: E731
    curve = job.fine_tune(model, FEW, replace(SHORT, epochs=3), seed=0, advance=steps)
    assert asked.names == ["fxquant", "step", "step", "freeze_batch_norm", "freeze_ranges", "step"]
    assert len(curve) == 3 and not model.training


def test_what_export_and_verification_say_stands_beside_the_file(asked: Asked, tmp_path: Path) -> None:
    report = job.deploy(Reader(), FEW, tmp_path / "cnn-int8.onnx")
    assert report is REPORT
    assert (tmp_path / "cnn-int8.txt").read_text(encoding="utf-8") == f"exported so\n\n{REPORT}\n"
    ((images,), path), named = asked["html"]
    assert images is FEW.test_x and path == tmp_path / "cnn-int8.html" and named == {"verified": REPORT}


def test_a_proof_has_the_types_of_the_row() -> None:
    found = job.proof(REPORT)
    assert found == {
        "differing_codes": 4, "compared_codes": 99, "integer_share": 1.0, "latency_ratio": 2.0, "cascaded_codes": 7,
    }  # fmt: skip
    assert [type(value) for value in found.values()] == [int, int, float, float, int]


def test_graphs_are_compiled_for_fixed_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, dict[str, Any]]] = []
    monkeypatch.setattr(torch, "compile", lambda model, **options: seen.append((model, options)) or "form")
    model = Reader()
    assert job.compiled(model, "fxquant_eager") == "form"
    assert seen == [(model, {"backend": "fxquant_eager", "dynamic": False})]


# --- in float ------------------------------------------------------------------------------------------


def test_same_seed_same_training(digits: Digits) -> None:
    schedule = Schedule(epochs=2, learning_rate=3e-3, steps_per_epoch=3)
    console = Console(io.StringIO())
    first, again, other = (job.train_float("vit", digits, schedule, seed=seed, console=console) for seed in (5, 5, 6))
    assert first.curve == again.curve and first.accuracy == again.accuracy
    assert first.curve != other.curve


def test_what_float_training_gives_and_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NETS, "own", Reader)
    stream = io.StringIO()
    trained = job.train_float("own", FEW, SHORT, seed=0, console=Console(stream))
    assert isinstance(trained.model, Reader) and (trained.net, trained.accuracy, len(trained.curve)) == ("own", 1.0, 2)
    assert stream.getvalue() == (
        f"own float              1/2  loss {trained.curve[0]:.3f}\n"
        f"own float              2/2  loss {trained.curve[1]:.3f}\n"
        "own float          100.0 % of the held-out digits\n"
    )


def test_a_net_starts_from_its_seed_whatever_ran_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "train", lambda *_, **__: [0.0])
    first, again, other = (
        job.train_float("vit", few_digits(torch.arange(1), torch.arange(1)), SHORT, seed=seed, console=Console())
        for seed in (1, 1, 2)
    )
    same = [torch.equal(a, b) for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True)]
    assert all(same) and not torch.equal(first.model.head.weight, other.model.head.weight)


# --- schedules and the file ----------------------------------------------------------------------------


def test_budgets_cover_every_net() -> None:
    for budget in (Budget.full(), Budget.quick()):
        assert set(budget.floats) == set(NETS)
        assert 0 < budget.qat.frozen_epochs < budget.qat.epochs


def test_a_quick_run_is_a_handful_of_steps(digits: Digits) -> None:
    quick = Budget.quick()
    assert [schedule.steps(digits) for schedule in quick.floats.values()] == [8, 8] and quick.qat.steps(digits) == 4


def test_run_onnx_reads_the_file(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [helper.make_node("Flatten", ["x"], ["y"])], "flatten",
        [helper.make_tensor_value_info("x", kind, ["n", 1, 2, 5])],
        [helper.make_tensor_value_info("y", kind, ["n", 10])],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "flat.onnx")
    images = torch.randn(3, 1, 2, 5)
    assert torch.equal(job.run_onnx(tmp_path / "flat.onnx", images), images.flatten(1))
