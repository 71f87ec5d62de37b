"""The bench's helpers: its nets build, its counts are right, a row has all its keys, a wrong name is refused."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

BENCH = Path(__file__).parent.parent / "bench"
MODULES = (
    "bench_step",
    "bench_memory",
    "bench_zoo",
    "kernels",
    "machine",
    "nets",
    "peers",
    "processes",
    "table",
    "variants",
    "where",
)
STEP_KEYS = [
    *("net", "dtype", "variant", "step_seconds", "step_ratio", "saved_bytes", "saved_ratio"),
    *("kernels", "weight_kernels", "extern_kernels", "extern_fake_quantize", "bytes_accessed"),
    *("graph_breaks", "recompiles", "gradient_error", "steps", "torch", "date", "cpu", "threads"),
]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The modules of bench/, imported as its scripts import each other, and forgotten afterwards."""
    monkeypatch.syspath_prepend(str(BENCH))
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    for name in MODULES:
        del sys.modules[name]


def tiny() -> tuple[nn.Module, torch.Tensor]:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)), torch.randn(4, 8)


# ---------------------------------------------------------------- nets


@pytest.mark.parametrize("net", ["cnn", "transformer", "resnet", "mixer", "zoo"])
def test_nets_build_in_training_mode_and_run(bench: SimpleNamespace, net: str) -> None:
    torch.manual_seed(0)
    try:
        model, x = bench.nets.NETS[net]()
    except bench.nets.Unavailable as error:
        assert net == "zoo" and "pip install transformers" in str(error)
        return
    assert model.training
    with torch.no_grad():
        out = model(x[:2])
    assert out.shape[0] == 2 and out.isfinite().all()


def test_resnet_has_the_layers_of_resnet_18(bench: SimpleNamespace) -> None:
    model = bench.nets.resnet(width=8)
    kinds = [type(m) for m in model.modules()]
    assert kinds.count(nn.Conv2d) == 17 + 3 and kinds.count(nn.Linear) == 1  # 18 with weights, 3 shortcuts
    assert kinds.count(nn.BatchNorm2d) == kinds.count(nn.Conv2d)
    assert [m.stride[0] for m in model.modules() if isinstance(m, nn.Conv2d)].count(2) == 6


def test_mixer_multiplies_in_linear_layers_only(bench: SimpleNamespace) -> None:
    model, _ = bench.nets.NETS["mixer"]()
    with_weights = {type(m) for m in model.modules() if any(p.dim() > 1 for p in m.parameters(recurse=False))}
    assert with_weights == {nn.Linear}


# ---------------------------------------------------------------- measuring


def test_saved_bytes_counts_each_storage_once_and_no_parameters(bench: SimpleNamespace) -> None:
    model = nn.Linear(8, 16, bias=False)
    x = torch.randn(4, 8)

    def step(x: torch.Tensor) -> torch.Tensor:
        h = model(x)  # keeps x and the weight: excluded
        return h.sin() + h.cos()  # both keep h

    # square() keeps the sum.
    assert bench.bench_step.saved_bytes(model, step, x) == 2 * 4 * 16 * 4
    assert model.weight.grad is None


@pytest.mark.parametrize(("changes", "peak"), [([], 0), ([3, 2, -4, 1], 5), ([-8, 4], 0), ([-8, 12], 4)])
def test_highest(bench: SimpleNamespace, changes: list[int], peak: int) -> None:
    assert bench.bench_memory.highest(changes) == peak


def test_peak_bytes_is_exact_and_the_same_twice(bench: SimpleNamespace) -> None:
    model = nn.Linear(4, 4, bias=False)
    x = torch.randn(1000, 4)

    def step(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            torch.empty(10**6, dtype=torch.uint8)  # freed at once: it is the peak, and nothing else is held yet
        return model(x[:1])

    first, second = (bench.bench_memory.peak_bytes(model, step, x) for _ in range(2))
    assert first == second == 10**6


def test_timed_takes_turns_and_clears_gradients(bench: SimpleNamespace) -> None:
    calls = []
    model, x = tiny()

    def called(name: str):  # type: ignore[no-untyped-def]
        def step(x: torch.Tensor) -> torch.Tensor:
            calls.append(name)
            return model(x)

        return step

    found = bench.bench_step.timed({name: (model, called(name)) for name in "ab"}, x, steps=3)
    assert calls == ["a", "b"] * 3
    assert found.keys() == {"a", "b"} and all(seconds > 0 for seconds in found.values())
    assert all(p.grad is None for p in model.parameters())


def test_gradient_check_says_how_far_off(bench: SimpleNamespace) -> None:
    good, near, far = ([[torch.full((4,), value)]] for value in (1.0, 1.1, 1.5))
    check = bench.bench_step.check_gradients
    assert check(good, good, "fp32") == 0.0
    assert check(near, good, "bf16") == pytest.approx(0.1)
    assert check([*good, *near], [*good, *good], "bf16") == pytest.approx(0.1), "the worst step counts"
    with pytest.raises(AssertionError, match=r"compiled gradients are off by 5\.00e-01"):
        check(far, good, "fp32")


def test_rows_of_several_processes_are_medians(bench: SimpleNamespace) -> None:
    def run(seconds: float, ratio: float, *more: str) -> list[dict[str, object]]:
        first = {"net": "cnn", "dtype": "fp32", "variant": "plain", "step_seconds": seconds, "step_ratio": ratio}
        return [{**first, "kernels": 3}, *({**first, "variant": name} for name in more)]

    found = bench.processes.medians([run(1.0, 0.9, "once"), run(4.0, 0.8), run(2.0, 0.7, "once")])
    row = {"net": "cnn", "dtype": "fp32", "variant": "plain", "step_seconds": 2.0, "step_ratio": 0.8}
    assert found == [{**row, "kernels": 3, "processes": 3}], "what one process left out has no row"


def test_processes_run_one_after_another(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    program = "import sys, pathlib, json; out = pathlib.Path(sys.argv[-1]);" + (
        "out.write_text(json.dumps({'net': sys.argv[sys.argv.index('--nets') + 1], 'step_ratio': 2.0})); sys.exit(3)"
    )
    monkeypatch.setattr(sys, "argv", ["-c"])
    inner = bench.processes.subprocess.run

    def run(command: list[str], **keys: Any) -> object:
        return inner([command[0], "-c", program, *command[2:]], **keys)

    monkeypatch.setattr(bench.processes.subprocess, "run", run)
    rows, status = bench.processes.run_again(2, ["--nets", "mixer", "--processes", "2"])
    assert rows == [{"net": "mixer", "step_ratio": 2.0, "processes": 2}] and status == 3


def test_where_float32_cannot_tell_float64_decides(bench: SimpleNamespace) -> None:
    good, far, nothing = ([[torch.full((4,), value)]] for value in (1.0, 1.5, torch.nan))
    check = bench.bench_step.check_gradients
    assert check(far, good, "fp32", lambda: 1e-15) == pytest.approx(0.5)
    with pytest.raises(AssertionError, match=r"compiled gradients are off by 5\.00e-01, in float64 by 1\.00e-06"):
        check(far, good, "fp32", lambda: 1e-6)
    with pytest.raises(AssertionError, match="compiled gradients are off by nan"):
        check([*good, *nothing], [*good, *good], "fp32", lambda: 1e-15)
    variants = bench.variants.VARIANTS
    assert variants["fxquant float products"].same_in_doubles and not variants["fxquant integer matmul"].same_in_doubles


def test_where_float64_is_no_graph_of_the_same_kind_the_last_bits_decide(bench: SimpleNamespace) -> None:
    good, far = ([[torch.full((4,), value)]] for value in (1.0, 1.5))
    check = bench.bench_step.check_gradients
    assert check(far, good, "fp32", rounding=lambda: 0.3) == pytest.approx(0.5)
    with pytest.raises(AssertionError, match=r"off by 5\.00e-01, eager ones by 2\.00e-01 after a change of the last"):
        check(far, good, "fp32", rounding=lambda: 0.2)
    with pytest.raises(AssertionError, match=r"in float64 by"):
        check(far, good, "fp32", lambda: 1e-6, lambda: 1.0)


def test_float64_is_asked_of_both_backends(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench.bench_step.GRADIENT_ERROR, "fp32", 0.0)
    seen: list[tuple[str, torch.dtype]] = []
    int8 = bench.variants.VARIANTS["fxquant int8"].build

    def build(model: nn.Module, x: torch.Tensor, backend: str = "fxquant") -> object:
        seen.append((backend, x.dtype))
        return int8(model, x, backend=backend)

    torch.manual_seed(0)
    bench.bench_step.warmed(bench.variants.Variant(build=build, ours=True), *tiny(), "fp32")
    assert seen[-2:] == [("fxquant", torch.float64), ("fxquant_eager", torch.float64)]


def test_loss_check_refuses_another_net_and_nan(bench: SimpleNamespace) -> None:
    model, x = tiny()
    loss = model(x).square().mean().item()
    bench.bench_step.check_loss(model, model, x, loss)
    with pytest.raises(AssertionError, match="the float net's"):
        bench.bench_step.check_loss(model, model, x, 2 * loss)
    with pytest.raises(AssertionError, match="loss is nan"):
        bench.bench_step.check_loss(model, lambda x: model(x) * float("nan"), x, loss)


# ---------------------------------------------------------------- rows


def test_a_row_has_all_keys_and_says_what_was_generated(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(bench.nets.NETS, "tiny", tiny)
    variants = bench.variants.chosen("int8,torch FakeQuantize eager")

    def broken(model: nn.Module, x: torch.Tensor) -> None:
        raise bench.nets.Unavailable("needs nothing (pip install nothing)")

    variants["absent"] = bench.variants.Variant(build=broken)
    failed: list[str] = []
    rows = bench.bench_step.run("tiny", "fp32", 2, variants, failed)
    assert failed == []
    assert "left out: tiny fp32 absent: needs nothing (pip install nothing)" in capsys.readouterr().err
    plain, ours, torchs = rows
    assert [list(row) for row in rows] == [STEP_KEYS] * 3
    assert (plain["variant"], plain["step_ratio"], plain["saved_ratio"]) == ("plain", 1.0, 1.0)
    assert ours["graph_breaks"] == ours["recompiles"] == ours["extern_fake_quantize"] == 0
    assert plain["weight_kernels"] == 0 < ours["weight_kernels"] < ours["kernels"]
    assert plain["bytes_accessed"] < ours["bytes_accessed"]
    assert torchs["kernels"] is torchs["gradient_error"] is None  # nothing was compiled
    assert 0 <= ours["gradient_error"] < bench.bench_step.GRADIENT_ERROR["fp32"]


def test_what_a_recompile_makes_replaces_what_was_before(bench: SimpleNamespace) -> None:
    torch._dynamo.reset()
    model, x = tiny()
    step = torch.compile(model)
    with bench.kernels.watch(model, x) as made:
        step(x).sum().backward()
        once = made.fields()
        model.eval()  # a guard: the same frame again
        step(x).sum().backward()
    assert once["kernels"] and once["extern_kernels"] and made.fields() == once
    assert sorted(backward for _, backward in made.graphs) == [False, True]


def test_nothing_compiled_is_no_count(bench: SimpleNamespace) -> None:
    model, x = tiny()
    with bench.kernels.watch(model, x) as made:
        model(x).sum().backward()
    assert set(made.fields().values()) == {None}


def test_of_ours_a_failure_is_reported_of_plain_it_ends_the_net(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(bench.nets.NETS, "tiny", tiny)

    def broken(model: nn.Module, x: torch.Tensor, backend: str = "") -> None:
        raise RuntimeError("not today")

    plain = bench.variants.VARIANTS["plain eager"]
    failed: list[str] = []
    ours = bench.variants.Variant(build=broken, ours=True)
    ready, _, _ = bench.bench_step.ready_variants("tiny", "fp32", {"plain": plain, "ours": ours}, failed)
    assert list(ready) == ["plain"] and failed == ["tiny fp32 ours"]
    assert "left out: tiny fp32 ours: RuntimeError: not today" in capsys.readouterr().err
    with pytest.raises(bench.bench_step.NoBaseline, match=r"^the plain compiled step fails: RuntimeError: not today$"):
        bench.bench_step.ready_variants("tiny", "fp32", {"plain": ours}, failed)


def test_without_a_baseline_the_other_nets_are_measured(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(net: str, *_: object) -> list[dict[str, object]]:
        if net == "cnn":
            raise bench.bench_step.NoBaseline("the plain compiled step fails: AssertionError: loss is nan")
        return [{"net": net, "variant": "plain"}]

    monkeypatch.setattr("sys.argv", ["bench_step.py", "--nets", "cnn,mixer", "--dtypes", "bf16"])
    assert bench.bench_step.main(run, "", steps=1) == 1
    printed = capsys.readouterr()
    assert '"net": "mixer"' in printed.out
    assert "left out: cnn bf16: the plain compiled step fails: AssertionError: loss is nan\n" in printed.err
    assert "failed: cnn bf16 plain\n" in printed.err


def test_what_never_stops_compiling_is_left_out_with_its_reason(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(bench.nets.NETS, "tiny", tiny)

    def restless(model: nn.Module, x: torch.Tensor) -> object:
        words = SimpleNamespace(last="")

        @torch.compile(backend="eager")
        def looking(x: torch.Tensor) -> torch.Tensor:
            return model(x) if words.last else x

        def step(x: torch.Tensor) -> torch.Tensor:
            words.last += "a"  # Dynamo guards the word
            return looking(x)

        return model, step

    variants = {"plain": bench.variants.VARIANTS["plain eager"], "restless": bench.variants.Variant(build=restless)}
    failed: list[str] = []
    rows = bench.bench_step.run("tiny", "fp32", 1, variants, failed)
    assert [row["variant"] for row in rows] == ["plain"] and not failed
    assert "left out: tiny fp32 restless: RuntimeError: it compiles in every step" in capsys.readouterr().err


def test_variants_are_chosen_by_parts_of_names_and_plain_is_with_them(bench: SimpleNamespace) -> None:
    assert list(bench.variants.chosen("brevitas")) == ["plain", "brevitas eager", "brevitas"]
    assert list(bench.variants.chosen("")) == list(bench.variants.VARIANTS)
    with pytest.raises(ValueError, match=r"--variants must name some of plain, .*: got nonsense\."):
        bench.variants.chosen("int8,nonsense")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--nets", "cnn,lenet"], r"--nets must be among cnn, .*: got lenet\."),
        (["--dtypes", "fp16"], r"--dtypes must be among fp32, bf16: got fp16\."),
        (["--steps", "0"], r"--steps must be at least 1: got 0\."),
        (["--variants", "nonsense"], r"--variants must name some of .*: got nonsense\."),
    ],
)
def test_wrong_arguments_end_with_their_message(
    bench: SimpleNamespace, capsys: pytest.CaptureFixture[str], given: list[str], message: str
) -> None:
    import re

    parser: argparse.ArgumentParser = bench.bench_step.arguments("", 15)
    with pytest.raises(SystemExit):
        bench.bench_step.asked(parser.parse_args(given), parser)
    assert re.search(message, capsys.readouterr().err)


# ---------------------------------------------------------------- peers and table


def test_a_missing_peer_says_how_to_install_it(bench: SimpleNamespace) -> None:
    with pytest.raises(bench.nets.Unavailable, match=r"needs no_such_peer \(pip install a-peer\)"):
        bench.peers.required("no_such_peer", "a-peer")


def test_torchs_modules_are_where_our_plan_quantizes(bench: SimpleNamespace) -> None:
    import fxquant

    torch.manual_seed(0)
    model, x = tiny()
    before = model(x)
    graph: ModuleType = bench.peers.torch_fake_quantize(model, x)
    modules = [m for m in graph.modules() if type(m).__name__ == "FusedMovingAvgObsFakeQuantize"]
    plan = fxquant.explain(fxquant.prepare(tiny()[0], (x,))).plan.sites
    assert len(modules) == len(plan)
    assert sorted(m.is_per_channel for m in modules) == sorted(s.local.spec.axis is not None for s in plan)
    assert {p.data_ptr() for p in graph.parameters()} == {p.data_ptr() for p in model.parameters()}
    out = graph(x)
    assert 0 < (out - before).norm() < 0.05 * before.norm()


def test_table_groups_by_columns_and_leaves_the_machine_out(bench: SimpleNamespace) -> None:
    machine = bench.machine.environment()
    rows = [{"net": "a", "bytes": 1234567, **machine}, {"seconds": 0.5}, {"net": "bcd", "bytes": None, **machine}]
    (columns, first), (others, second) = bench.table.grouped(rows)
    assert (columns, others, len(first), len(second)) == (["net", "bytes"], ["seconds"], 2, 1)
    assert bench.table.plain(columns, first) == "net      bytes\na    1 234 567\nbcd"


def test_table_prints_without_rich(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench.table.importlib.util, "find_spec", lambda name: None)
    bench.table.show([{"net": "a", "ratio": 1.0}])
    assert capsys.readouterr().out == "net  ratio\na      1.0\n\n"


# ---------------------------------------------------------------- zoo


def test_a_zoo_trained_only_is_judged_by_its_training(bench: SimpleNamespace) -> None:
    def seeded() -> tuple[nn.Module, torch.Tensor]:
        torch.manual_seed(0)
        return tiny()

    entry = SimpleNamespace(
        build=lambda: seeded()[0],
        inputs=lambda: ((seeded()[1],), {}),
        more_inputs=lambda: [],
        loss=lambda out: out.square().mean(),
    )
    zoo = SimpleNamespace(get=lambda name: entry)
    row = bench.bench_zoo.examine(zoo, "mlp", "onnxruntime", "fxquant", 5, "training")
    assert not [key for key in row if key.endswith("_error")]
    assert "fixed" not in row and row["backend"] == "fxquant"
    lines = bench.bench_zoo.summary([row]).splitlines()
    assert [" ".join(line.split()[1:]) for line in lines] == [
        "trains 1 of 1",
        "nothing added 1 of 1",
        "loss falls 1 of 1",
        "eager's step 1 of 1",
        "95 % of FLOPs 1 of 1",
    ]
    row["against_eager"]["gradients"] = 1.0
    assert "eager's step   0 of 1: not mlp" in bench.bench_zoo.summary([row])


# ---------------------------------------------------------------- where the time goes


def event(key: str, time: float, shapes: list[list[int]] | None = None, count: int = 2) -> SimpleNamespace:
    return SimpleNamespace(key=key, self_cpu_time_total=time, input_shapes=shapes or [], count=count)


def test_products_loops_and_the_rest_share_the_time(bench: SimpleNamespace) -> None:
    found: dict[tuple[str, str, str], Any] = {}
    linear = [[8, 16], [16, 4]]
    bench.where.add(
        found, "forward", [event("aten::_int_mm", 3.0, linear), event("## Call CompiledFxGraph abc ##", 2.0)]
    )
    backward = [event("aten::mm", 4.0, linear), event("aten::mm", 1.0, [[4, 8], [8, 16]]), event("aten::empty", 0.0)]
    bench.where.add(found, "backward", backward)
    rows = bench.where.rows(found, steps=2)
    keys = ("half", "what", "kind", "calls", "share")
    assert [tuple(row[key] for key in keys) for row in rows] == [
        ("backward", "mm 8x16 · 16x4", "float", 1, 0.4),
        ("forward", "_int_mm 8x16 · 16x4", "integer", 1, 0.3),
        ("forward", "loops", "loops", 0, 0.2),
        ("backward", "mm 4x8 · 8x16", "float", 1, 0.1),
        ("backward", "rest", "rest", 0, 0.0),
    ]


def test_a_profiled_step_shows_its_products(bench: SimpleNamespace) -> None:
    """Eager: three of a linear layer without a bias whose input has a gradient, two halves, shares of 1 in all."""
    model = nn.Linear(8, 16, bias=False)
    rows = bench.where.where((model, model), torch.randn(4, 8, requires_grad=True), steps=2)
    products = sorted((row["half"], row["what"], row["calls"]) for row in rows if row["kind"] == "float")
    assert [half for half, _, _ in products] == ["backward", "backward", "forward"]
    assert all(what.startswith("mm ") and calls == 1 for _, what, calls in products)
    assert sum(row["share"] for row in rows) == pytest.approx(1, abs=1e-3)
