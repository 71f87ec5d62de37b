"""What the compiler makes of a quantized model: its code, what it keeps for backward, its caches; and DDP."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters
from torch._inductor.utils import run_fw_bw_and_get_code

from fxquant import ops
from fxquant.backend.reports import compile_reports
from fxquant.errors import UnsupportedModel
from fxquant.passes import base
from fxquant.passes.base import Decline, PassResult
from fxquant.passes.pipelines import joint_passes, post_grad_passes, training_passes
from fxquant.passes.post_grad.lower_fake_quantize import LowerFakeQuantize
from fxquant.passes.stages import Stage
from fxquant.spec.recipes import INT8, W4A8
from fxquant.targets.profiles import get_profile
from tests.nets import ConvNet, Mlp, eager_runs, grads, prepared, ranges, step, unset

IMAGE = (4, 3, 10, 10)
ACTIVATION = 4 * 8 * 10 * 10  # elements of every hidden activation of ConvNet(8) on IMAGE


@pytest.fixture(autouse=True)
def cold() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield


# ---------------------------------------------------------------- unprepared models


def test_an_unprepared_model_trains_with_ranges_of_the_batch() -> None:
    model = ConvNet()
    keys = list(model.state_dict())
    compiled = torch.compile(model, backend="fxquant_eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    x, target = torch.randn(8, 3, 6, 6), torch.arange(8) % 5
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(compiled(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert list(model.state_dict()) == keys
    assert compile_reports()[-1].quantized == 8
    assert compile_reports()[-1].digests == ()


@pytest.mark.parametrize(("recipe", "bits"), [(None, 8), ("int8", 8), ("w4a8", 4)])
def test_the_recipe_option_sets_the_weight_format(recipe: str | None, bits: int) -> None:
    model = nn.Linear(8, 8, bias=False)
    options = {"recipe": recipe} if recipe else None
    out = torch.compile(model, backend="fxquant_eager", options=options)(torch.eye(8))
    # Rows of the identity quantize exactly, so the output is the fake-quantized weight.
    high = 2 ** (bits - 1) - 1
    codes = out.t() / (model.weight.abs().amax(1, keepdim=True) / high)
    assert torch.allclose(codes, codes.round(), atol=1e-4)
    assert codes.abs().max().round() == high
    assert (len(codes.round().unique()) > 15) is (bits == 8)


def test_a_frozen_unprepared_model_is_quantized_too() -> None:
    model = nn.Linear(8, 8, bias=False).requires_grad_(False)
    x = torch.randn(3, 8)
    assert not torch.equal(torch.compile(model, backend="fxquant_eager")(x), model(x))


def test_code_without_a_model_stays_float() -> None:
    a, b = torch.randn(8, 8), torch.randn(8, 8)
    assert torch.equal(torch.compile(torch.matmul, backend="fxquant_eager")(a, b), a @ b)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_an_optimizer_steps_compiled_as_it_does_without(kind: Any) -> None:
    found = []
    for compiled in (True, False):
        torch.manual_seed(0)
        model = nn.Linear(8, 4)
        optimizer = kind(model.parameters(), lr=0.1)
        run = torch.compile(optimizer.step, backend="fxquant_eager") if compiled else optimizer.step
        for scale in (1.0, 3.0):
            step(model, torch.randn(2, 8) * scale)
            run()
        found.append(list(model.parameters()))
    torch.testing.assert_close(found[0], found[1])
    assert compile_reports()[-1].quantized == 0


def test_a_whole_train_step_compiles_as_its_parts_do() -> None:
    batches, found = [torch.randn(4, 8) for _ in range(3)], []
    for whole in (True, False):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = prepared(Mlp(), batches[0])
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        run = model if whole else torch.compile(model, backend="fxquant_eager")

        def train(x: Tensor) -> Tensor:
            loss = run(x).square().mean()  # noqa: B023
            loss.backward()
            optimizer.step()  # noqa: B023
            optimizer.zero_grad()  # noqa: B023
            return loss.detach()

        if whole:
            train = torch.compile(train, backend="fxquant_eager")
        found.append(([train(x) for x in batches], ranges(model), list(model.parameters())))
    torch.testing.assert_close(found[0], found[1])
    assert not unset(model)


# ---------------------------------------------------------------- Inductor


@dataclass
class Compiled:
    model: nn.Module
    forward: str
    backward: str
    saved: list[Tensor]
    plain_saved: list[Tensor]


@pytest.fixture(scope="module")
def conv() -> Compiled:
    torch._dynamo.reset()
    torch.manual_seed(0)
    x = torch.randn(IMAGE)
    model, plain = prepared(ConvNet(8), x), ConvNet(8)
    saved: dict[str, list[Tensor]] = {}
    for backend, net in (("inductor", plain), ("fxquant", model)):
        compiled = torch.compile(net, backend=backend)
        found = saved[backend] = []

        def run(compiled: Any = compiled, found: list[Tensor] = found) -> Tensor:
            def keep(tensor: Tensor) -> Tensor:
                found.append(tensor)
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                return compiled(x)

        with torch._inductor.config.patch(fx_graph_cache=False):
            _, codes = run_fw_bw_and_get_code(lambda compiled=compiled: compiled(x))
        run()
    forward, backward = codes
    torch._dynamo.reset()
    return Compiled(model, forward, backward, saved["fxquant"], saved["inductor"])


def called(code: str) -> set[str]:
    return set(re.findall(r"torch\.ops\.(\w+\.\w+)", code))


def test_no_operator_of_ours_is_left_in_generated_code(conv: Compiled) -> None:
    for code in (conv.forward, conv.backward):
        assert not {name for name in called(code) if name.startswith("fxquant.")}
        assert "torch.ops.fxquant" not in code and "fallback" not in code
        assert "round" in code or "nearbyint" in code, "fake-quants are in the fused kernels"


def buffers(code: str) -> list[tuple[int, str]]:
    """(elements, dtype) of everything that the code allocates."""
    made = []
    for shape, dtype in re.findall(r"empty_strided_cpu\(\(([\d, ]*)\), \([\d, ]*\), torch\.(\w+)\)", code):
        size = 1
        for length in shape.split(","):
            size *= int(length) if length.strip() else 1
        made.append((size, dtype))
    return made


def test_masks_are_materialized_packed_or_not_at_all(conv: Compiled) -> None:
    for code in (conv.forward, conv.backward):
        found = buffers(code)
        assert any(size >= ACTIVATION for size, _ in found), "the pattern reads what Inductor writes"
        assert [size for size, dtype in found if dtype == "bool" and size >= ACTIVATION // 8] == []
        large = {size for size, dtype in found if dtype == "uint8" and size >= ACTIVATION // 8}
        assert large <= {ACTIVATION // 8, ACTIVATION}


def test_no_mask_and_no_second_copy_is_kept_for_backward(conv: Compiled) -> None:
    large = [t for t in conv.saved if t.numel() >= ACTIVATION]
    assert large and {t.dtype for t in large} == {torch.float32}
    assert not [t for t in conv.saved if t.dtype == torch.bool and t.numel() >= ACTIVATION // 8]
    plain = [t for t in conv.plain_saved if t.numel() >= ACTIVATION]
    assert len(large) <= len(plain), "lowered before the partition, quantized values cost backward nothing"


def test_the_compiled_step_updates_every_range(conv: Compiled) -> None:
    assert not unset(conv.model) and not eager_runs(conv.model)
    assert set(grads(conv.model)) == {name for name, _ in conv.model.named_parameters()}


# ---------------------------------------------------------------- caches


@pytest.mark.usefixtures("uncompiled")
def test_a_second_identical_compile_hits_the_graph_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    x = torch.randn(3, 8)

    def compile_once(make: Any) -> dict[str, int]:
        torch._dynamo.reset()
        counters.clear()
        model = make()
        step(torch.compile(model, backend="fxquant"), x)
        found = counters["inductor"]
        return {"hit": found["fxgraph_cache_hit"], "miss": found["fxgraph_cache_miss"]}

    def linear(recipe: str = "int8") -> nn.Module:
        return prepared(nn.Linear(8, 4), x, recipe=recipe)

    assert compile_once(linear) == {"hit": 0, "miss": 2}
    assert compile_once(linear) == {"hit": 2, "miss": 0}
    assert compile_once(lambda: linear("w4a8"))["miss"] >= 1
    with monkeypatch.context() as patched:
        patched.setattr(base, "source_digest", lambda: "of other sources")
        assert compile_once(linear) == {"hit": 0, "miss": 2}


def test_uuids_follow_options() -> None:
    profile = get_profile("onnxruntime")
    ids = [
        tuple(each.uuid() for each in training_passes(recipe, profile, stateless=stateless))
        for recipe in (INT8, W4A8)
        for stateless in (False, True)
    ]
    assert len(set(ids)) == 4
    every = (*joint_passes(), *post_grad_passes(), *training_passes(INT8, profile, stateless=True))
    assert len({each.uuid() for each in every}) == len(every)
    assert LowerFakeQuantize().uuid() == LowerFakeQuantize().uuid()


def test_a_pass_of_the_users_runs_in_front_of_ours() -> None:
    seen: list[int] = []

    def mine(graph: torch.fx.Graph) -> None:
        seen.append(sum("fxquant" in str(node.target) for node in graph.nodes))

    model = prepared(nn.Linear(4, 4), torch.randn(2, 4))
    options = {"inductor": {"joint_custom_post_pass": mine}}
    out = torch.compile(model, backend="fxquant", options=options)(torch.randn(2, 4))
    assert seen and seen[0] > 0, "the user's pass sees fake-quants whole"
    assert torch.isfinite(out).all() and not unset(model)


# ---------------------------------------------------------------- DDP


@pytest.fixture
def process_group() -> Iterator[None]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("optimize_ddp", [True, False])
@pytest.mark.usefixtures("process_group")
def test_distributed_data_parallel(optimize_ddp: bool) -> None:
    x = torch.randn(4, 3, 6, 6)
    found = []
    for wrap in (nn.parallel.DistributedDataParallel, lambda net: net):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = prepared(ConvNet(), x)
        wrapped = wrap(model)
        with torch._dynamo.config.patch(optimize_ddp=optimize_ddp):
            compiled = torch.compile(wrapped, backend="fxquant_eager")
            for scale in (1.0, 3.0):
                model.zero_grad()
                step(compiled, x * scale)
        assert not unset(model) and not eager_runs(model)
        found.append((ranges(model), grads(model)))
    assert found[0][0] == found[1][0]
    torch.testing.assert_close(found[0][1], found[1][1])


@pytest.mark.parametrize("name", ["moving_average", "delayed"])
@pytest.mark.usefixtures("process_group")
def test_a_model_of_several_buckets_trains_as_without(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "_DEFAULT_FIRST_BUCKET_BYTES", 64)
    x, found = torch.randn(4, 8), []
    for buckets in (True, False):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = prepared(Mlp(), x, ranges=name)
        wrapped = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=1e-4)  # type: ignore[arg-type]
        before = counters["aot_autograd"]["total"]
        with torch._dynamo.config.patch(optimize_ddp=buckets):
            compiled = torch.compile(wrapped, backend="fxquant_eager")
            outs = [step(compiled, x * scale) for scale in (1.0, 3.0)]
        graphs = 2 if name == "delayed" else 1  # of which one takes the first ranges
        assert (counters["aot_autograd"]["total"] - before > graphs) is buckets
        assert not unset(model) and not eager_runs(model)
        found.append((outs, ranges(model), grads(model)))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


@pytest.mark.usefixtures("process_group")
def test_tensor_parallelism_is_refused_and_shards_that_are_gathered_are_not() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    x, mesh = torch.randn(4, 8), init_device_mesh("cpu", (1,))
    model = parallelize_module(Mlp(), mesh, {"first": ColwiseParallel()})
    with pytest.raises(UnsupportedModel, match=r"plain ones: got a DTensor.*Tensor parallelism is not supported"):
        prepared(model, x)
    assert not any("forward" in module.__dict__ for module in model.modules())
    torch._dynamo.reset()
    sharded = fully_shard(Mlp(), mesh=mesh)
    step(torch.compile(prepared(sharded, x), backend="fxquant_eager"), x)
    assert not unset(sharded)


@pytest.mark.usefixtures("process_group")
def test_tensor_parallelism_of_a_prepared_model_is_refused() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    x, mesh = torch.randn(4, 8), init_device_mesh("cpu", (1,))
    match = r"plain ones: got a DTensor, as parallelize_module makes.*Tensor parallelism is not supported"
    with pytest.raises(UnsupportedModel, match=match):
        parallelize_module(prepared(Mlp(), x), mesh, {"first": RowwiseParallel()})
    model = parallelize_module(prepared(Mlp(), x), mesh, {"first": ColwiseParallel()})
    assert model(x).shape == Mlp()(x).shape  # the float model runs
    with pytest.raises(UnsupportedModel, match=match):
        step(torch.compile(model, backend="fxquant_eager"), x)


def test_a_late_backward_is_reported_with_its_own_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without torch's caches, a backward graph is compiled when it first runs: here after another model's forward."""
    run, hour = LowerFakeQuantize.run, 3600.0
    said = Decline(pass_name="test", node="none", reason="a graph was lowered")

    def slow(self: LowerFakeQuantize, gm: fx.GraphModule, stage: Stage | None = None) -> PassResult:
        result = run(self, gm, stage)
        result.seconds += hour
        result.declines.append(said)
        return result

    def hooks() -> list[tuple[int, int]]:
        """Of the last two compiles: runs of that pass by the hours charged, and by what it said."""
        reports = compile_reports()[-2:]
        return [(int(report.seconds // hour), report.declines.count(said)) for report in reports]

    monkeypatch.setattr(LowerFakeQuantize, "run", slow)
    x = torch.randn(4, 8)
    with torch._functorch.config.patch(enable_autograd_cache=False):
        first, second = (torch.compile(nn.Linear(8, width), backend="fxquant")(x).sum() for width in (4, 6))
        assert hooks() == [(2, 2), (2, 2)], "joint and forward graphs"
        first.backward()
        assert hooks() == [(3, 3), (2, 2)]
        second.backward()
        assert hooks() == [(3, 3), (3, 3)]


@pytest.mark.parametrize("backend", ["fxquant", "fxquant_eager"])
@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda x: torch.ops.aten.mul.Tensor(x, 3) + 1, id="torch's"),
        pytest.param(lambda x: ops.fake_quantize_per_tensor_affine(x, 0.5, 0, -8, 7) + 1, id="ours"),
    ],
)
def test_code_without_parameters_that_calls_operators_by_name(function: Any, backend: str) -> None:
    torch._dynamo.reset()
    x = torch.linspace(-6, 6, 7)
    assert torch.equal(torch.compile(function, backend=backend, fullgraph=True)(x), function(x))


def test_deterministic_algorithms_are_so_on_several_threads() -> None:
    """Inductor adds an embedding's gradient by atomic operations, in the order in which threads come, unless told."""
    model = prepared(nn.Sequential(nn.Embedding(4, 32), nn.Linear(32, 4)), torch.zeros(2, 3, dtype=torch.long))
    tokens, factors, threads = torch.zeros(64, 32, dtype=torch.long), torch.randn(64, 32, 4), torch.get_num_threads()
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)
    try:
        compiled, found = torch.compile(model, backend="fxquant"), []
        for _ in range(20):
            model.zero_grad()
            (compiled(tokens) * factors).sum().backward()
            found.append(model[0].weight.grad.clone())
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)
    assert all(torch.equal(each, found[2]) for each in found[2:]), "the first ones found the ranges"
