"""Graphs within graphs: checkpoints, regions, control flow, torch.func transforms and autocast.

Each form compiles as often as plain torch.compile, gives the numbers of its plain spelling, and exports.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._higher_order_ops import scan, while_loop
from torch.func import grad, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint

import fxquant
from fxquant.capture.dynamo import capture
from fxquant.capture.exported import exported_graph
from fxquant.errors import UnsupportedModel
from fxquant.graph.bodies import is_transform
from fxquant.graph.nodes import is_bind
from fxquant.passes.dynamo.outline_transforms import OutlineTransforms, Whole
from fxquant.passes.stages import DYNAMO
from fxquant.prepared.quantizer import quantizers
from fxquant.prepared.root import plan_of
from tests.nets import counted, eager_runs, grads, prepared, ranges, step, unset
from tests.onnx.agreement import assert_codes_agree

EAGER = "fxquant_eager"

pytestmark = pytest.mark.usefixtures("cold")

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


class Pair(nn.Module):
    """Two linears, joined by the caller."""

    def __init__(self, run: Callable[..., Tensor]) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def three_steps(run: Callable[..., Tensor], dtype: torch.dtype = torch.float64) -> list[Any]:
    """Outputs, gradients and ranges of three steps; float64, so that equal graphs give equal codes."""
    torch.manual_seed(0)
    model = prepared(Pair(run).to(dtype), X.to(dtype))
    compiled = torch.compile(model, backend=EAGER)
    found: list[Any] = []
    for scale in (1.0, 20.0, 0.3):
        model.zero_grad()
        found.append((step(compiled, X.to(dtype) * scale), grads(model)))
    assert not unset(model) and not eager_runs(model)
    return [*found, list(ranges(model).values())]


def assert_counts(run: Callable[..., Tensor]) -> nn.Module:
    """As many graphs and breaks as plain, also when other sizes come; the trained model."""
    results = []
    for backend in ("aot_eager", EAGER):
        torch.manual_seed(0)
        model = Pair(run) if backend == "aot_eager" else prepared(Pair(run), X)
        with counted() as found:
            compiled = torch.compile(model, backend=backend)
            for size in (4, 4, 6):
                step(compiled, torch.randn(size, 8))
        results.append(found)
    assert results[0] == results[1]
    assert not unset(model) and not eager_runs(model)
    return model


def assert_verifies(model: nn.Module, path: Path, share: float = 1.0) -> None:
    fxquant.export_onnx(model, (X,), path)
    report = fxquant.verify_onnx(model, (X,), path, rounds=0)
    assert_codes_agree(report)
    assert report.integer_share == share


def reasons(model: nn.Module) -> list[str]:
    plan = plan_of(model)
    assert plan is not None
    return [declined.reason for declined in plan.declined]


def plainly(m: Any, x: Tensor) -> Tensor:
    return m.two(torch.tanh(m.one(x)))


def nested_functions(m: Any, x: Tensor) -> Tensor:
    def inner(y: Tensor) -> Tensor:
        return torch.tanh(m.one(y))

    return checkpoint(lambda y: m.two(checkpoint(inner, y, use_reentrant=False)), x, use_reentrant=False)


def nested_in_sequence(m: Any, x: Tensor) -> Tensor:
    def outer(y: Tensor) -> Tensor:
        return m.two(torch.tanh(checkpoint(m.one, y, use_reentrant=False)))

    return checkpoint(outer, x, use_reentrant=False)


def compiled_region(m: Any, x: Tensor) -> Tensor:
    @torch.compiler.nested_compile_region
    def region(y: Tensor) -> Tensor:
        return torch.tanh(m.one(y))

    return m.two(region(x))


@pytest.mark.parametrize("run", [nested_functions, nested_in_sequence, compiled_region])
def test_a_region_changes_no_number(run: Callable[..., Tensor]) -> None:
    torch.testing.assert_close(three_steps(run), three_steps(plainly), rtol=0, atol=0)


@pytest.mark.parametrize("run", [nested_functions, nested_in_sequence, compiled_region])
def test_a_region_adds_no_graph_and_exports(run: Callable[..., Tensor], tmp_path: Path) -> None:
    model = assert_counts(run)
    assert set(ranges(model)) == {"one.input", "two.input"}
    assert_verifies(model, tmp_path / "net.onnx")


def called_twice(m: Any, x: Tensor) -> Tensor:
    @torch.compiler.nested_compile_region
    def region(y: Tensor) -> Tensor:
        return torch.tanh(m.one(y))

    return m.two(region(region(x)))


def test_a_region_that_runs_twice_is_quantized_in_both_calls(tmp_path: Path) -> None:
    def unrolled(m: Any, x: Tensor) -> Tensor:
        return m.two(torch.tanh(m.one(torch.tanh(m.one(x)))))

    torch.testing.assert_close(three_steps(called_twice), three_steps(unrolled), rtol=0, atol=0)
    assert_verifies(assert_counts(called_twice), tmp_path / "net.onnx")


def branching(m: Any, x: Tensor) -> Tensor:
    return m.two(torch.cond(x.sum() > -1e9, lambda y: m.one(y), lambda y: m.one(y).relu(), (x,)))


def scanning(m: Any, x: Tensor) -> Tensor:
    def body(carried: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        state = torch.tanh(m.one(row) + carried)
        return state, state.clone()

    return m.two(scan(body, torch.zeros_like(x[0]), x, dim=0)[1])


def looping(m: Any, x: Tensor) -> Tensor:
    def go_on(i: Tensor, y: Tensor) -> Tensor:
        return i < 3

    def body(i: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return i + 1, torch.tanh(m.one(y))

    with torch.no_grad():  # while_loop has no backward
        state = while_loop(go_on, body, (torch.tensor(0), x))[1]
    return m.two(state)


@pytest.mark.parametrize(
    ("run", "name", "count"), [(branching, "cond", 2), (looping, "while_loop", 1), (scanning, "scan", 1)]
)
def test_control_flow_stays_float_beside_quantized_layers(
    run: Callable[..., Tensor], name: str, count: int, tmp_path: Path
) -> None:
    model = assert_counts(run)
    assert set(ranges(model)) == {"two.input"}
    assert reasons(model)[:count] == [f"the body of {name} cannot update a range: it stays float"] * count
    compiled = torch.compile(model.eval(), backend=EAGER)
    torch.testing.assert_close(compiled(X), compiled(X), rtol=0, atol=0)
    assert_verifies(model, tmp_path / "net.onnx", share=1 / (count + 1))


@pytest.mark.parametrize("form", ["cond", "while_loop"])
def test_a_layer_that_also_runs_in_a_branch_is_quantized_outside(form: str) -> None:
    """The mark of its frame, and the state that it brought, are taken out of the body."""

    def run(m: Any, x: Tensor) -> Tensor:
        if form == "cond":
            return m.one(torch.cond(x.sum() > -1e9, lambda y: m.one(y), lambda y: -y, (x,)))
        with torch.no_grad():
            go_on, body = (lambda i, y: i < 1), (lambda i, y: (i + 1, m.one(y)))
            state = while_loop(go_on, body, (torch.tensor(0), x))[1]
        return m.one(state)

    model = prepared(Pair(run), X)
    step(torch.compile(model, backend=EAGER), X)
    with torch.no_grad():
        want = model.one(X)  # the branch, in float
    assert list(ranges(model).values()) == [pytest.approx((want.min().item(), want.max().item()))]


def test_a_model_of_branches_alone_is_refused_with_the_reason() -> None:
    with pytest.raises(UnsupportedModel, match="the body of cond cannot update a range"):
        prepared(Pair(lambda m, x: torch.cond(x.sum() > 0, lambda y: m.one(y), lambda y: m.two(y), (x,))), X)


TRANSFORMS: dict[str, Callable[..., Tensor]] = {
    "vmap": lambda m, x: vmap(lambda y: torch.tanh(m.one(y)))(x),
    "grad": lambda m, x: grad(lambda y: torch.tanh(m.one(y)).sum())(x),
    "jacrev": lambda m, x: jacrev(lambda y: torch.tanh(m.one(y)))(x[0]),
    "jvp": lambda m, x: jvp(lambda y: torch.tanh(m.one(y)), (x,), (torch.ones_like(x),))[1],
    "grad of vmap": lambda m, x: grad(lambda y: vmap(m.one)(y).square().sum())(x),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_stays_float_and_right(name: str) -> None:
    transform = TRANSFORMS[name]
    torch.manual_seed(0)
    model = prepared(Pair(lambda m, x: m.two(transform(m, x))), X)
    expected = Pair(lambda m, x: m.two(x))
    expected.load_state_dict({k: v for k, v in model.state_dict().items() if "quantizers" not in k})
    prepared(expected, X)
    assert [r for r in reasons(model) if "torch.func" in r]
    assert set(ranges(model)) == {"two.input"}
    got = step(torch.compile(model, backend=EAGER), X)
    inner = transform(model, X)  # eager: the float layer, with gradients to its weight
    want = torch.compile(expected, backend=EAGER)(inner)
    want.square().mean().backward()
    torch.testing.assert_close(got, want.detach(), rtol=0, atol=1e-5)
    assert ranges(model)["two.input"] == pytest.approx(ranges(expected)["two.input"])
    torch.testing.assert_close(model.two.weight.grad, expected.two.weight.grad, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["vmap", "grad", "jacrev"])
def test_a_transform_adds_no_graph(name: str) -> None:
    transform = TRANSFORMS[name]
    assert_counts(lambda m, x: m.two(transform(m, x)))


def test_vmap_exports(tmp_path: Path) -> None:
    model = assert_counts(lambda m, x: m.two(TRANSFORMS["vmap"](m, x)))
    assert_verifies(model, tmp_path / "net.onnx", share=0.5)


def dynamo_graph(function: Callable[..., Any], *args: Tensor) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Dynamo's own graph of a call, and the captured one."""
    found: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        found.extend((gm, capture(gm, inputs)))
        return gm.forward

    torch.compile(function, backend=backend)(*args)
    assert len(found) == 2
    return found[0], found[1]


def test_each_transform_is_one_call_of_its_own() -> None:
    def two(x: Tensor) -> Tensor:
        return grad(lambda y: y.sin().sum())(vmap(torch.cos)(x).relu()).exp()

    gm, captured = dynamo_graph(two, X)
    assert not any(map(is_transform, gm.graph.nodes)), "Dynamo's graph is left as it was"
    calls = [node for node in captured.graph.nodes if is_transform(node)]
    names = [str(node.target) for node in captured.graph.nodes if node.op == "call_function"]
    assert names == ["wrap", "<built-in function getitem>", "aten.relu.default", *names[:2], "aten.exp.default"]
    assert all(isinstance(captured.get_submodule(str(call.args[0].target)), Whole) for call in calls)
    torch.testing.assert_close(captured(X)[0], two(X))


def test_what_is_wrapped_for_a_transform_does_not_leave_its_call() -> None:
    gm, _ = dynamo_graph(lambda x: jacrev(torch.tanh)(x[0]) @ x[0], X)  # uses its vjp after the transform's end
    assert OutlineTransforms().run(gm, DYNAMO).rewrites == 1
    assert sum(map(is_transform, gm.graph.nodes)) == 1


def autocast_with_an_island(m: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        y = m.one(x)
        with torch.autocast("cpu", enabled=False):
            y = torch.tanh(y.float())
        return m.two(y)


def test_autocast_keeps_float32_state() -> None:
    model = assert_counts(autocast_with_an_island)
    assert {q.min_val.dtype for _, q in quantizers(model) if q.stateful} == {torch.float32}
    assert all(g.dtype == torch.float32 for g in grads(model).values())
    compiled = torch.compile(model, backend=EAGER)
    assert compiled(X).dtype == torch.bfloat16
    first, second = ranges(model).values()
    assert first[0] < -1.0 and first[1] > 1.0 and -1.0 <= second[0] < second[1] <= 1.0, "of x, and of a tanh"


def test_autocast_around_the_step_equals_autocast_inside() -> None:
    def inside(m: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return plainly(m, x)

    found = []
    for run, around in ((inside, False), (plainly, True)):
        torch.manual_seed(0)
        model = prepared(Pair(run), X)
        compiled = torch.compile(model, backend=EAGER)
        with torch.autocast("cpu", torch.bfloat16, enabled=around):
            out = compiled(X)
        out.float().sum().backward()
        found.append((out.detach(), grads(model), ranges(model)))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_an_export_leaves_autocast_behind() -> None:
    model = assert_counts(autocast_with_an_island).eval()
    graph = exported_graph(model, (X,), {}, None)
    dtypes = {n.meta["val"].dtype for n in graph.graph.nodes if isinstance(n.meta.get("val"), Tensor)}
    assert dtypes == {torch.float32}
    names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function" and not is_bind(node)]
    assert [name for name in names if "linear" in name or "wrap" in name] == ["aten.linear.default"] * 2
    with torch.autocast("cpu", torch.bfloat16):
        assert model.one(X).dtype == torch.bfloat16, "autocast works again"


def test_an_autocast_model_exports(tmp_path: Path) -> None:
    model = assert_counts(lambda m, x: autocast_with_an_island(m, x).float())
    fxquant.export_onnx(model, (X,), tmp_path / "net.onnx")
    report = fxquant.verify_onnx(model, (X,), tmp_path / "net.onnx", rounds=0)
    assert report.integer_share == 1.0 and report.input_differing_codes == 0
    assert report.largest_code_difference <= 1, "bfloat16's rounding, which the file does not have"
