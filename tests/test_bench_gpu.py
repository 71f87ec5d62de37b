"""bench/gpu on CPU: its clock and budget, what it refuses to time, what it says of a figure, and all of it, tiny."""

from __future__ import annotations

import functools
import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

BENCH = Path(__file__).parent.parent / "bench"
MODULES = ("bench_gpu", "pointwise", "steps", "clock", "sizes", "bench_step", "bench_memory", "kernels", "machine")
MODULES += ("nets", "peers", "table", "variants")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The modules of bench/gpu and bench/, imported as its scripts import each other, and forgotten afterwards."""
    monkeypatch.setattr(sys, "path", [str(BENCH / "gpu"), str(BENCH), *sys.path])
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    for name in MODULES:
        del sys.modules[name]
    torch._dynamo.reset()


class Recorder:
    """Notes that keep what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.failed: list[str] = []
        self.reasons: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def fail(self, what: str, error: Exception) -> None:
        self.failed.append(what)
        self.reasons.append(str(error))


# ---------------------------------------------------------------- clock


def test_a_budget_runs_out_and_has_parts(bench: SimpleNamespace) -> None:
    now = [100.0]
    budget = bench.clock.Budget(10, lambda: now[0])
    now[0] = 104.0
    part = budget.part(0.5)
    assert (budget.left, part.left) == (6.0, 3.0)
    now[0] = 111.0
    assert (budget.left, part.left) == (-1.0, -4.0)
    assert budget.part(0.5).left == 0.0


def test_calls_take_turns_after_warming_up(bench: SimpleNamespace) -> None:
    clock = bench.clock.Clock("cpu")
    for measure in (clock.seconds, clock.step_seconds):
        calls: list[str] = []
        found = measure({name: functools.partial(calls.append, name) for name in "ab"}, rounds=3, warmups=2)
        assert calls == [*"aabb", *"ab" * 3]
        assert found.keys() == {"a", "b"} and all(0 <= seconds < 1 for seconds in found.values())


def test_notes_say_a_failure_in_a_line_and_remember_it(
    bench: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    notes = bench.clock.Notes()
    notes.say("a line")
    notes.fail("nvfp4", ValueError("one\n  two"))
    assert capsys.readouterr().err == "a line\nfailed: nvfp4: ValueError: one two\n"
    assert notes.failed == ["nvfp4"]


# ---------------------------------------------------------------- what is wanted


def row(bench: SimpleNamespace, **given: Any) -> dict[str, object]:
    return {"op": bench.pointwise.OPS[0].name, "way": "triton", "share": 0.9, **given}


@pytest.mark.parametrize(("share", "verdict"), [(0.9, "pass"), (0.899, "FAIL"), (1.02, "pass")])
def test_a_share_of_bandwidth_is_judged(bench: SimpleNamespace, share: float, verdict: str) -> None:
    (found,) = bench.bench_gpu.verdicts([row(bench, share=share), row(bench, way="aten", share=0.1)])
    name = f"{bench.pointwise.OPS[0].name}, triton: share of copy bandwidth"
    assert found == {"figure": name, "is": share, "wanted": ">= 0.90", "": verdict}


def test_steps_are_judged_by_time_memory_and_integers(bench: SimpleNamespace) -> None:
    rows = [
        {"net": "resnet", "variant": "plain", "step_ratio": 1.0, "peak_ratio": 1.0},
        {"net": "resnet", "variant": "fxquant int8", "step_ratio": 1.05, "peak_ratio": 0.91},
        {"net": "resnet", "variant": "fxquant integer matmul", "step_ratio": 1.001, "peak_ratio": 0.5},
        {"net": "resnet", "variant": "fxquant delayed ranges", "step_ratio": 9.0, "peak_ratio": 9.0},
    ]
    found = bench.bench_gpu.verdicts(rows)
    assert [(each["is"], each["wanted"], each[""]) for each in found] == [
        (1.05, "<= 1.05", "pass"),
        (0.91, "<= 0.90", "FAIL"),
        (1.001, "<= 1.00", "FAIL"),
    ]


def test_what_was_not_timed_is_not_judged(bench: SimpleNamespace) -> None:
    assert bench.bench_gpu.verdicts([row(bench, share=None), {"bandwidth": "copy"}]) == []


# ---------------------------------------------------------------- operators


def test_every_operator_runs_and_the_cpu_agrees_with_itself(bench: SimpleNamespace) -> None:
    ops = bench.pointwise.OPS
    assert len({op.name for op in ops}) == len(ops)
    for op in ops:
        assert bench.pointwise.small_differs(op, "cpu") == 0
        x = torch.randn(32, bench.pointwise.COLUMNS).to(op.dtype)
        args = op.arguments(x)
        for make in op.others.values():
            way = make()
            assert way is None or way(*args) is not None


def test_the_gradient_of_torch_is_ours_of_its_rounding(bench: SimpleNamespace) -> None:
    x = torch.randn(4, bench.pointwise.COLUMNS) * 9
    dy, _, scale, point = bench.pointwise.gradient(x)
    ours = bench.pointwise.PER_TENSOR_BACKWARD(dy, x, scale, point, *bench.pointwise.QPARAMS)
    theirs = bench.pointwise.torchs_gradient(dy, x, scale, point)
    assert torch.equal(ours, theirs) and bool((ours == 0).any())


def test_differing_counts_bits_over_all_tensors_and_takes_nan_for_nan(bench: SimpleNamespace) -> None:
    nan = float("nan")
    one = (torch.tensor([1.0, nan, 2.0]), [torch.tensor([1, 2], dtype=torch.int8)])
    other = (torch.tensor([1.0, nan, 2.5]), [torch.tensor([3, 2], dtype=torch.int8)])
    assert bench.pointwise.differing(one, one) == 0
    assert bench.pointwise.differing(one, other) == 2
    with pytest.raises(AssertionError):
        bench.pointwise.differing(one[0], one[0].double())


def test_a_wrong_result_is_not_timed_and_says_so(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    pointwise, sizes = bench.pointwise, bench.sizes.TINY
    (op,) = [op for op in pointwise.OPS if op.name == "int8 codes, bf16"]

    def ways(op: Any, device: str, notes: Any) -> dict[str, Any]:
        def wrong(*args: torch.Tensor) -> torch.Tensor:
            found = op.ours(*args)
            found.view(-1)[7] ^= 1
            return found

        return {"triton": wrong, "aten": op.ours}

    monkeypatch.setattr(pointwise, "ways_of", ways)
    bad, good = pointwise.op_rows(op, bench.clock.Clock("cpu"), sizes, 1e9, "cpu", Recorder())
    assert (bad["differing"], bad["microseconds"], bad["share"]) == (1, None, None)
    assert good["differing"] == 0 and good["microseconds"] > 0
    out = torch.zeros(1)
    monkeypatch.setattr(bench.bench_gpu, "measured", lambda *given: iter([[bad]]))
    assert bench.bench_gpu.main(["--device", "cpu", "--tiny"]) == 1
    assert not out.any()


def test_a_failure_is_said_and_the_rest_goes_on(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def rows(op: Any, *rest: Any) -> list[dict[str, object]]:
        if op.name.startswith("int8"):
            raise RuntimeError("not today")
        return [{"op": op.name}]

    monkeypatch.setattr(bench.pointwise, "op_rows", rows)
    notes = Recorder()
    budget = bench.clock.Budget(100)
    found = list(bench.pointwise.run(bench.clock.Clock("cpu"), bench.sizes.TINY, 1.0, "cpu", budget, notes))
    assert found == [[{"op": "per tensor divide, bf16"}]]
    assert (notes.failed, notes.reasons) == (["int8 codes, bf16"], ["not today"])


def test_what_does_not_fit_the_time_is_left_out(bench: SimpleNamespace) -> None:
    notes, spent = Recorder(), bench.clock.Budget(0)
    clock, sizes = bench.clock.Clock("cpu"), bench.sizes.TINY
    assert list(bench.pointwise.run(clock, sizes, 1.0, "cpu", spent, notes)) == []
    assert list(bench.steps.run(clock, sizes, "cpu", spent, notes)) == []
    assert notes.said == [
        "left out: per tensor divide, bf16: the time for operators is used up",
        "left out: int8 codes, bf16: the time for operators is used up",
        "left out: transformer plain, fxquant int8, fxquant integer matmul: the time for steps is used up",
        "left out: resnet plain, fxquant int8: the time for steps is used up",
    ]


# ---------------------------------------------------------------- nets and command line


def test_the_nets_are_resnet_50_and_twelve_layers_of_1024(bench: SimpleNamespace) -> None:
    with torch.device("meta"):
        resnet, images = bench.steps.resnet(bench.sizes.CARD)
        transformer, tokens = bench.steps.transformer(bench.sizes.CARD)
    kinds = [type(m) for m in resnet.modules()]
    assert kinds.count(nn.Conv2d) == 53 and kinds.count(nn.Linear) == 1
    assert sum(p.numel() for p in resnet.parameters()) == 25_557_032  # torchvision's
    assert resnet(images).shape == (64, 1000)
    assert len(transformer) == 12 and transformer[0].up.weight.shape == (4096, 1024)
    assert transformer(tokens).shape == tokens.shape == (16, 512, 1024)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_cuda_it_ends_with_what_to_do(bench: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.bench_gpu.main([])
    message = r"--device cuda must find a CUDA device: torch finds none\. Take --device cpu --tiny to try it out\."
    assert re.search(message, capsys.readouterr().err)


def test_an_unknown_phase_is_refused(bench: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.bench_gpu.main(["--device", "cpu", "--phases", "steps,lunch"])
    assert "--phases must be among check, kernels, steps: got lunch." in capsys.readouterr().err


def test_a_failed_check_keeps_steps_from_being_timed(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def off(*given: Any) -> None:
        raise AssertionError("compiled gradients are off by 5.00e-01")

    monkeypatch.setattr(bench.steps, "gradients", lambda *given: [])
    monkeypatch.setattr(bench.steps, "check_gradients", off)
    notes, budget = Recorder(), bench.clock.Budget(100)
    assert list(bench.bench_gpu.measured(["check", "steps"], bench.sizes.TINY, "cpu", budget, notes)) == []
    assert notes.reasons == ["compiled gradients are off by 5.00e-01"]
    assert notes.said == ["left out: steps: their gradients may be wrong (check transformer)"]


def test_what_cannot_be_counted_is_still_timed(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: Any) -> None:
        raise AttributeError("no scheduler here")

    monkeypatch.setattr(bench.steps, "watch", broken)
    notes = Recorder()
    found = bench.steps.ready("transformer", "plain", bench.sizes.TINY, "cpu", notes)
    assert notes.said == ["not counted: transformer plain: AttributeError: no scheduler here"]
    assert found.facts["kernels"] is None and found.facts["graph_breaks"] == 0


def test_of_ours_a_failure_leaves_the_others(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def ready(net: str, name: str, *rest: Any) -> str:
        if name != "plain":
            raise RuntimeError("not today")
        return name

    monkeypatch.setattr(bench.steps, "ready", ready)
    notes, budget = Recorder(), bench.clock.Budget(100)
    names = ("plain", "fxquant int8")
    assert bench.steps.ready_variants("resnet", names, bench.sizes.TINY, "cpu", budget, notes) == {"plain": "plain"}
    assert (notes.failed, notes.reasons) == (["resnet fxquant int8"], ["not today"])


@pytest.mark.slow
def test_all_of_it_tiny(bench: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "gpu.jsonl"
    assert bench.bench_gpu.main(["--device", "cpu", "--tiny", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [json.loads(line) for line in printed.splitlines() if line.startswith("{")] == rows
    assert {"check", "bandwidth", "op", "variant"} <= {key for each in rows for key in each}
    ops = [each for each in rows if "op" in each]
    assert [each["way"] for each in ops] == ["triton", "aten"] * 2 and not any(each["differing"] for each in ops)
    steps = [each for each in rows if "variant" in each]
    assert [each["variant"] for each in steps if each["net"] == "resnet"] == ["plain", "fxquant int8"]
    assert all(each["peak_bytes"] > each["saved_bytes"] > 0 and each["graph_breaks"] == 0 for each in steps)
    assert all(each["device"] == "cpu" and each["torch"] == torch.__version__ for each in rows)
    judged = [line.split(":")[0] + line.split(":")[1][:5] for line in printed.splitlines() if "plain = 1" in line]
    assert judged == ["transformer step", "transformer peak", "transformer step", "resnet step", "resnet peak"]
