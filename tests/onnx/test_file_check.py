"""A file that computes another thing than the evaluated graph, told by its first tensor; what is excused, and noted."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, fx

from fxquant.errors import ExportError
from fxquant.onnx.file_check import FileCheck
from tests.onnx.graphs import Graph
from tests.passes.export.test_freeze import quantized_input
from tests.passes.export.written import Written

aten = torch.ops.aten
X = torch.linspace(-2.0, 6.0, 12).reshape(3, 4)
SCALE = 0.1  # of both quantizers, with zero point 3


def evaluated(between: Callable[[Written, fx.Node], fx.Node]) -> tuple[fx.GraphModule, dict[str, str]]:
    """``FQ(between(FQ(x)))``, and the labels "first" and "second" of the two."""
    g = Written()
    first = quantized_input(g, g.input(3, 4), "first")
    second = quantized_input(g, between(g, first), "second")
    return g.done(second), {first.name: "first", second.name: "second"}


def written(folder: Path, between: Callable[[Graph, str], str], second: float = SCALE) -> Path:
    """The same as a file."""
    g = Graph()
    x = g.qdq(g.input(3, 4), SCALE, 3, name="first")
    return g.save(folder, g.qdq(between(g, x), second, 3, name="second"))


def check(
    path: Path, gm: fx.GraphModule, labels: dict[str, str], x: Tensor = X, *, must_run: bool = False
) -> list[str]:
    held = FileCheck(gm, ((x,), {}), ((x,), {}), labels, must_run=must_run)
    held(path)
    return held.notes


def doubled(factor: float) -> Callable[[Graph, str], str]:
    return lambda g, x: g.op("Mul", x, g.const(np.float32(factor)))


def double(g: Written, x: fx.Node) -> fx.Node:
    return g.call(aten.mul.Tensor, x, 2.0)


def test_the_same_file_passes_without_a_word(tmp_path: Path) -> None:
    assert check(written(tmp_path, doubled(2.0)), *evaluated(double)) == []


def test_it_passes_in_onnx_s_own_evaluator_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    path = written(tmp_path, doubled(2.0))
    assert check(path, *evaluated(double)) == []
    with pytest.raises(ExportError, match="another second: "):
        check(written(tmp_path, doubled(2.1)), *evaluated(double))


def test_a_value_that_is_off_by_more_than_half_a_code_names_its_tensor(tmp_path: Path) -> None:
    match = r"must compute what the evaluated graph does: got another second: 8 of 12 values are off, by 0\.6 at most"
    with pytest.raises(ExportError, match=match):
        check(written(tmp_path, doubled(2.1)), *evaluated(double))


def test_an_offset_below_half_a_code_passes(tmp_path: Path) -> None:
    assert check(written(tmp_path, lambda g, x: g.op("Add", x, g.const(np.float32(0.04)))), *evaluated(keep)) == []
    with pytest.raises(ExportError, match="another second: "):
        check(written(tmp_path, lambda g, x: g.op("Add", x, g.const(np.float32(0.06)))), *evaluated(keep))


def keep(g: Written, x: fx.Node) -> fx.Node:
    return g.call(aten.mul.Tensor, x, 1.0)


def test_a_scale_that_is_another_names_the_tensor_that_it_quantizes(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="another second: "):
        check(written(tmp_path, doubled(2.0), second=0.2), *evaluated(double))


def test_an_output_after_the_last_quantizer_is_held_too(tmp_path: Path) -> None:
    g, f = Written(), Graph()
    first = quantized_input(g, g.input(3, 4), "first")
    gm = g.done(g.call(aten.add.Tensor, first, 1.0))
    f.save(tmp_path, f.op("Add", f.qdq(f.input(3, 4), SCALE, 3, name="first"), f.const(np.float32(1.1)), name="y"))
    with pytest.raises(ExportError, match=r"another y: 12 of 12 values are off, by 0\.1 at most"):
        check(tmp_path / "model.onnx", gm, {first.name: "first"})


def test_what_follows_a_comparison_is_a_note(tmp_path: Path) -> None:
    def above(g: Written, x: fx.Node) -> fx.Node:
        return g.call(aten.mul.Tensor, x, g.call(aten.gt.Scalar, x, 1.0))

    def above_less(g: Graph, x: str) -> str:
        kept = g.op("Cast", g.op("Greater", x, g.const(np.float32(0.5))), to=1)
        return g.op("Mul", x, kept)

    (note,) = check(written(tmp_path, above_less), *evaluated(above))
    assert note.startswith("the evaluated graph has another second: 1 of 12 values are off, by 0.9")
    assert note.endswith(", after a comparison or a choice")


def test_random_numbers_are_not_compared(tmp_path: Path) -> None:
    def noisy(g: Written, x: fx.Node) -> fx.Node:
        return g.call(aten.add.Tensor, x, g.call(aten.rand_like.default, x))

    notes = check(written(tmp_path, lambda g, x: g.op("Add", x, g.op("RandomUniformLike", x))), *evaluated(noisy))
    assert notes == ["not checked against the evaluated graph: what depends on random numbers"]


def test_dropout_that_is_off_is_not_random(tmp_path: Path) -> None:
    def dropped(g: Written, x: fx.Node) -> fx.Node:
        return g.call(aten.dropout.default, double(g, x), 0.5, False)

    assert check(written(tmp_path, doubled(2.0)), *evaluated(dropped)) == []


def test_a_file_that_the_runtime_refuses_is_a_note_or_an_error(tmp_path: Path) -> None:
    refused = written(tmp_path, doubled(2.0)), *evaluated(double), X[:2]
    (note,) = check(*refused)
    assert note.startswith("not checked against the evaluated graph: ExportError: The model must run in onnxruntime")
    with pytest.raises(
        ExportError, match=r"^The model must run in onnxruntime: .* export_onnx\(…, verify=False\) writes"
    ):
        check(*refused, must_run=True)


def test_a_file_of_an_opset_after_the_runtime_s_is_checked_all_the_same(tmp_path: Path) -> None:
    path = written(tmp_path, doubled(2.0))
    newer = onnx.load(path)
    newer.opset_import[0].version = onnx.defs.onnx_opset_version()
    onnx.save(newer, path)
    (note,) = check(path, *evaluated(double), must_run=True)
    told = (
        rf"onnxruntime [\d.]+ is older than the file's opset {newer.opset_import[0].version} or format \d+: checked in"
    )
    assert re.match(told, note)
    with pytest.raises(ExportError, match="another second: "):
        check(path, *evaluated(lambda g, x: g.call(aten.mul.Tensor, x, 2.1)), must_run=True)


def test_a_buffer_that_the_graph_writes_stays_as_it_was(tmp_path: Path) -> None:
    g = Written()
    x = g.input(3, 4)
    cache = g.held("cache", torch.zeros(3, 4))
    first = quantized_input(g, g.call(aten.copy_.default, cache, x), "first")
    gm = g.done(first)
    f = Graph()
    path = f.save(tmp_path, f.qdq(f.input(3, 4), SCALE, 3, name="first"))
    assert check(path, gm, {first.name: "first"}) == []
    assert torch.equal(gm.get_buffer("cache"), torch.zeros(3, 4))
