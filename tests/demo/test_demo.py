"""The demo: its nets and data, what it writes, and the whole run, once against fakes and once for real."""

from __future__ import annotations

import io
import json
from dataclasses import asdict, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import fxquant
import fxquant.demo
import fxquant.report
from fxquant.demo import extras, job, plot
from fxquant.demo.console import COLUMNS, Console, cells
from fxquant.demo.job import Budget, Quantized, Trained
from fxquant.demo.nets import NETS
from fxquant.demo.results import Result, replaced, write
from fxquant.demo.train import SMOOTHING, Schedule, accuracy, divergence, score, train
from fxquant.errors import InvalidArgument, MissingDependency

SCHEMA = {
    "net": str,
    "recipe": str,
    "float_acc": float,
    "ptq_acc": float,
    "qat_acc": float,
    "onnx_acc": float,
    "differing_codes": int,
    "compared_codes": int,
    "integer_share": float,
    "latency_ratio": float,
    "cascaded_codes": int,
    "same_class": float,
}


def result(net: str = "cnn", recipe: str = "int8", **changed: Any) -> Result:
    values: dict[str, Any] = {
        "net": net, "recipe": recipe, "float_acc": 0.99, "ptq_acc": 0.97, "qat_acc": 0.985, "onnx_acc": 0.985,
        "differing_codes": 0, "compared_codes": 123456, "integer_share": 1.0, "latency_ratio": 0.5,
        "cascaded_codes": 3, "same_class": 1.0,
    }  # fmt: skip
    return Result(**{**values, **changed})


@pytest.fixture(scope="module")
def digits() -> Any:
    pytest.importorskip("sklearn")
    from fxquant.demo import data

    return data.load(0)


# --- nets ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("batch", [1, 5])
def test_nets_give_one_logit_a_class(net: str, batch: int) -> None:
    model = NETS[net]().eval()
    assert model(torch.randn(batch, 1, 8, 8)).shape == (batch, 10)


@pytest.mark.parametrize("net", NETS)
def test_every_parameter_of_a_net_learns(net: str) -> None:
    model = NETS[net]()
    divergence(model(torch.randn(8, 1, 8, 8)), torch.arange(8)).backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert idle == []


def test_cnn_holds_what_the_demo_claims() -> None:
    kinds = [type(module) for module in NETS["cnn"]().modules()]
    assert kinds.count(nn.BatchNorm2d) == kinds.count(nn.Conv2d) == 8
    assert nn.MaxPool2d in kinds


def test_an_image_is_read_the_same_in_any_batch() -> None:
    images = torch.randn(6, 1, 8, 8)
    for build in NETS.values():
        model = build().eval()
        torch.testing.assert_close(model(images)[2:3], model(images[2:3]))


# --- data ----------------------------------------------------------------------------------------------


def test_split_is_disjoint_and_complete(digits: Any) -> None:
    train_rows, test_rows = set(digits.train_index.tolist()), set(digits.test_index.tolist())
    assert not train_rows & test_rows
    assert train_rows | test_rows == set(range(1797))
    assert digits.train_x.shape == (1347, 1, 8, 8) and digits.test_x.shape == (450, 1, 8, 8)


def test_split_is_stratified(digits: Any) -> None:
    total = torch.bincount(torch.cat([digits.train_y, digits.test_y]), minlength=10)
    held_out = torch.bincount(digits.test_y, minlength=10)
    assert ((held_out - 0.25 * total).abs() <= 1).all()


def test_same_seed_same_split_other_seed_other_split(digits: Any) -> None:
    from fxquant.demo import data

    again, other = data.load(0), data.load(1)
    assert torch.equal(again.test_index, digits.test_index) and torch.equal(again.test_x, digits.test_x)
    assert not torch.equal(other.test_index, digits.test_index)


def test_images_and_labels_are_the_original_rows(digits: Any) -> None:
    from sklearn.datasets import load_digits

    raw = load_digits()
    assert digits.test_y.tolist() == raw.target[digits.test_index.numpy()].tolist()
    pixels = torch.from_numpy(raw.images[digits.test_index.numpy()]).float().unsqueeze(1)
    scale = digits.train_x.max() - digits.train_x.min()
    torch.testing.assert_close((digits.test_x - digits.train_x.min()) / scale * 16, pixels, atol=1e-4, rtol=0)


def test_standardized_by_the_training_images_alone(digits: Any) -> None:
    torch.testing.assert_close(digits.train_x.mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(digits.train_x.std(), torch.tensor(1.0), atol=1e-5, rtol=0)


def test_an_epoch_is_shuffled_in_full_batches_and_repeats_with_its_seed(digits: Any) -> None:
    from fxquant.demo import data

    first, again, other = (list(data.epoch(digits, torch.Generator().manual_seed(seed))) for seed in (3, 3, 4))
    assert len(first) == 1347 // 64 and all(images.shape == (64, 1, 8, 8) for images, _ in first)
    assert all(torch.equal(a, b) and torch.equal(c, d) for (a, c), (b, d) in zip(first, again, strict=True))
    assert not torch.equal(first[0][1], other[0][1])


def test_distorting_is_mild_and_stays_in_range(digits: Any) -> None:
    from fxquant.demo import data

    images = digits.train_x[:64]
    moved = data.distort(images, torch.Generator().manual_seed(0))
    assert moved.shape == images.shape and not torch.equal(moved, images)
    assert moved.min() >= images.min() - 1e-5 and moved.max() <= images.max() + 1e-5
    similar = torch.nn.functional.cosine_similarity(moved.flatten(1), images.flatten(1))
    assert similar.mean() > 0.8


def test_blank_paper_stays_blank() -> None:
    from fxquant.demo import data

    blank = torch.full((4, 1, 8, 8), -0.8)
    assert torch.equal(data.distort(blank, torch.Generator().manual_seed(0)), blank)


# --- training ------------------------------------------------------------------------------------------


def test_divergence_is_kl_to_the_smoothed_labels() -> None:
    logits, labels = torch.randn(7, 10, dtype=torch.float64), torch.arange(7)
    target = torch.full((7, 10), SMOOTHING / 10, dtype=torch.float64)
    target[torch.arange(7), labels] += 1 - SMOOTHING
    expected = torch.nn.functional.kl_div(logits.log_softmax(1), target, reduction="batchmean")
    torch.testing.assert_close(divergence(logits, labels), expected)
    assert float(divergence(target.log(), labels)) == pytest.approx(0, abs=1e-12)


def test_rate_rises_to_the_peak_then_falls_to_nothing() -> None:
    schedule = Schedule(epochs=1, learning_rate=1.0, warmup=0.1)
    rates = [schedule.rate(step, 100) for step in range(100)]
    assert rates[9] == rates[10] == 1 and rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[-1] < 1e-3


def test_same_seed_same_training(digits: Any) -> None:
    schedule = Schedule(epochs=2, learning_rate=3e-3, steps_per_epoch=3)
    console = Console(io.StringIO())
    first, again, other = (job.train_float("vit", digits, schedule, seed=seed, console=console) for seed in (5, 5, 6))
    assert first.curve == again.curve and first.accuracy == again.accuracy
    assert first.curve != other.curve


def test_freeze_comes_once_before_the_last_epochs(digits: Any) -> None:
    model, seen, order = NETS["vit"](), [], []
    schedule = Schedule(epochs=3, learning_rate=1e-3, frozen_epochs=1, steps_per_epoch=2)
    train(
        model, model, digits, schedule, seed=0,
        advance=lambda loss: (seen.append(loss), order.append("step")), freeze=lambda: order.append("freeze"),
    )  # fmt: skip
    assert order == ["step"] * 4 + ["freeze"] + ["step"] * 2
    assert schedule.steps(digits) == len(seen) == 6


@pytest.mark.parametrize("training", [True, False])
def test_accuracy_puts_the_mode_back(digits: Any, training: bool) -> None:
    model = NETS["cnn"]().train(training)
    modes = []
    accuracy(model, lambda x: (modes.append(model.training), model(x))[1], digits)
    assert modes == [False] and model.training is training


def test_score_counts_right_answers(digits: Any) -> None:
    logits = torch.nn.functional.one_hot(digits.test_y, 10).float()
    assert score(logits, digits) == 1.0
    logits[:45] = logits[:45].roll(1, dims=1)
    assert score(logits, digits) == pytest.approx(0.9)


# --- what is written -----------------------------------------------------------------------------------


def test_results_have_the_schema(tmp_path: Path) -> None:
    assert [f.name for f in fields(Result)] == list(SCHEMA)
    write([result(), result("vit", "w4a8")], tmp_path / "results.json")
    rows = json.loads((tmp_path / "results.json").read_text())
    assert [(row["net"], row["recipe"]) for row in rows] == [("cnn", "int8"), ("vit", "w4a8")]
    assert all({key: type(value) for key, value in row.items()} == SCHEMA for row in rows)


def test_results_that_cannot_be_written_leave_the_old_ones(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write([result()], path)
    before = path.read_text()
    with pytest.raises(ValueError):
        write([result(latency_ratio=float("nan"))], path)
    assert path.read_text() == before and list(tmp_path.iterdir()) == [path]


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), replaced(tmp_path / "results.json") as temporary:
        temporary.write_text("[{")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("module", extras.PACKAGES)
def test_a_missing_package_is_named_with_its_install_line(module: str, monkeypatch: Any) -> None:
    def absent(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    monkeypatch.setattr("importlib.import_module", absent)
    with pytest.raises(MissingDependency) as caught:
        extras.require(f"{module}.inner")
    assert extras.PACKAGES[module] in str(caught.value)
    assert 'pip install "fxquant[demo]"' in str(caught.value)


def test_a_package_that_is_broken_inside_is_not_called_missing(monkeypatch: Any) -> None:
    def broken(name: str) -> Any:
        raise ModuleNotFoundError("No module named 'scipy'", name="scipy")

    monkeypatch.setattr("importlib.import_module", broken)
    with pytest.raises(ModuleNotFoundError, match="scipy") as caught:
        extras.require("sklearn")
    assert not isinstance(caught.value, MissingDependency)


# --- console -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_rich", [True, False])
def test_table_shows_every_number(with_rich: bool) -> None:
    stream = io.StringIO()
    console = Console(stream)
    if not with_rich:
        console.rich = None
    console.table([result(), result("vit", "w4a8", differing_codes=7)])
    text = stream.getvalue()
    assert all(word in text for word in ("99.0", "97.0", "98.5", "7 / 123,456", "100 %", "0.50"))
    assert all(word in text for name in COLUMNS for word in name.split())


def test_table_fits_a_terminal_of_80_columns() -> None:
    pytest.importorskip("rich")
    stream = io.StringIO()
    console = Console(stream)
    console.rich.width = 80
    console.table([result(differing_codes=12_345, compared_codes=12_345_678)])
    assert all(cell in stream.getvalue() for cell in ("cnn", "12,345 / 12,345,678", "100 %", "0.50"))
    assert "…" not in stream.getvalue()


def test_cells_match_the_columns() -> None:
    assert len(cells(result())) == len(COLUMNS)


@pytest.mark.parametrize("total", [1, 3, 100])
def test_a_log_gets_a_few_lines_not_a_bar(total: int) -> None:
    stream = io.StringIO()
    with Console(stream).bar("cnn float", total) as advance:
        for _ in range(total):
            advance(0.5)
    lines = stream.getvalue().splitlines()
    assert len(lines) == min(total, 4) and f"{total}/{total}" in lines[-1] and "0.500" in lines[-1]


# --- plot ----------------------------------------------------------------------------------------------


def fake_panel(net: str, recipes: tuple[str, ...] = ("int8", "w4a8"), sites: int = 6) -> plot.Panel:
    sqnr = {f"block{i}.conv1.quantizers.weight": 30.0 + i for i in range(sites)}
    sqnr |= {f"block{i}.quantizers.relu": 25.0 + i for i in range(sites)} | {"q.exact": float("inf")}
    runs = [Quantized(result=result(net, recipe), curve=[0.2, 0.1], sqnr=sqnr) for recipe in recipes]
    return plot.Panel(trained=Trained(net=net, model=nn.Identity(), accuracy=0.99, curve=[2.0, 1.0, 0.5]), runs=runs)


@pytest.mark.parametrize("panels", [[fake_panel("cnn")], [fake_panel("cnn"), fake_panel("vit", sites=0)]])
def test_plot_is_written_and_nothing_else(panels: list[plot.Panel], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot.draw(panels, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]


def test_every_sqnr_of_every_net_is_inside_the_plot() -> None:
    pytest.importorskip("matplotlib")
    near, far = fake_panel("cnn", sites=2), fake_panel("vit", sites=40)
    for panels in ([near, far], [far, near]):
        figure = plot.compose(panels)
        for axis in figure.axes[2:]:
            low, high = axis.get_xlim()
            shown = [x for points in axis.collections for x, _ in points.get_offsets()]
            assert shown and all(low < x < high for x in shown)


def test_plot_lists_weights_then_activations_once_each() -> None:
    listed = plot.rows(fake_panel("cnn", sites=2).runs)
    assert [name for _, name in listed] == [
        "weights", "block0.conv1", "block1.conv1", "activations", "block0.relu", "block1.relu", "q.exact",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("layer1.0.conv1.quantizers.weight", "layer1.0.conv1"),
        ("block1.quantizers.relu_1", "block1.relu_1"),
        ("quantizers.weight", "weight"),
    ],
)
def test_readable_site_names(key: str, name: str) -> None:
    assert plot.readable(key) == name


def test_a_long_site_name_loses_its_middle() -> None:
    name = plot.readable("encoder." * 9 + "quantizers.scaled_dot_product_attention")
    assert len(name) == 34 and name.startswith("encoder.") and name.endswith("attention")


# --- the whole run -------------------------------------------------------------------------------------


@pytest.fixture
def faked(monkeypatch: Any) -> list[str]:
    """fxquant's API replaced by one that does nothing but keep a list of what was called."""
    calls: list[str] = []

    def note(name: str, gives: Any = None) -> Any:
        def call(model: nn.Module, *rest: Any, **named: Any) -> Any:
            calls.append(name)
            return model if gives is None else gives

        return call

    report = SimpleNamespace(
        integer_share=1.0, differing_codes=0, compared_codes=99, latency_ratio=0.5, cascaded_codes=0
    )
    for name in ("prepare", "calibrate", "freeze_batch_norm", "freeze_ranges"):
        monkeypatch.setattr(fxquant, name, note(name), raising=False)
    monkeypatch.setattr(fxquant, "export_onnx", note("export_onnx", "exported"), raising=False)
    monkeypatch.setattr(fxquant, "verify_onnx", note("verify_onnx", report), raising=False)
    monkeypatch.setattr(fxquant.report, "sqnr", note("sqnr", {"a.quantizers.weight": 40.0}), raising=False)
    monkeypatch.setattr(job, "compiled", lambda model, backend: (calls.append(backend), model)[1])
    monkeypatch.setattr(job, "run_onnx", lambda path, images: torch.eye(10)[torch.zeros(len(images)).long()])
    return calls


def test_stages_come_in_order_and_everything_is_written(faked: list[str], tmp_path: Path, capsys: Any) -> None:
    assert fxquant.demo.main(["--quick", "--out", str(tmp_path), "--nets", "cnn", "--recipes", "int8"]) == 0
    assert faked == [
        "prepare", "calibrate", "fxquant_eager", "fxquant", "freeze_batch_norm", "freeze_ranges",
        "fxquant_eager", "export_onnx", "verify_onnx", "sqnr",
    ]  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "curves.png", "cnn-int8.txt"}
    (row,) = json.loads((tmp_path / "results.json").read_text())
    assert {key: type(value) for key, value in row.items()} == SCHEMA
    assert str(tmp_path) in capsys.readouterr().out


def test_the_float_net_is_left_alone_and_numbers_repeat(faked: list[str], tmp_path: Path) -> None:
    rows = []
    for folder in ("a", "b"):
        assert fxquant.demo.main(["--quick", "--out", str(tmp_path / folder), "--nets", "vit"]) == 0
        rows.append(json.loads((tmp_path / folder / "results.json").read_text()))
    assert rows[0] == rows[1]
    assert rows[0][0]["qat_acc"] == rows[0][1]["qat_acc"]  # both fakes start from float


@pytest.mark.parametrize(("raised", "code"), [(KeyboardInterrupt(), 130), (InvalidArgument("no"), 1)])
def test_a_run_cut_short_leaves_no_results(
    faked: list[str], raised: BaseException, code: int, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise raised

    write([result()], tmp_path / "results.json")  # of an earlier run, whose files this one replaces
    monkeypatch.setattr(fxquant, "export_onnx", stop, raising=False)
    assert fxquant.demo.main(["--quick", "--out", str(tmp_path), "--nets", "cnn"]) == code
    assert not (tmp_path / "results.json").exists()
    assert "fxquant demo:" in capsys.readouterr().err


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


def test_budgets_cover_every_net() -> None:
    for budget in (Budget.full(), Budget.quick()):
        assert set(budget.floats) == set(NETS)
        assert 0 < budget.qat.frozen_epochs < budget.qat.epochs


@pytest.mark.slow
def test_quick_end_to_end(tmp_path: Path) -> None:
    arguments = ["--quick", "--out", str(tmp_path), "--nets", "cnn", "--recipes", "int8"]
    assert fxquant.demo.main(arguments) == 0
    (row,) = json.loads((tmp_path / "results.json").read_text())
    assert {key: type(value) for key, value in row.items()} == SCHEMA
    assert row["compared_codes"] > 0 and 0 < row["integer_share"] <= 1
    assert row["onnx_acc"] == pytest.approx(row["qat_acc"], abs=0.01)
    assert {"curves.png", "cnn-int8.onnx", "cnn-int8.txt"} <= {path.name for path in tmp_path.iterdir()}


def test_results_are_plain_values() -> None:
    assert all(isinstance(value, str | int | float) for value in asdict(result()).values())
