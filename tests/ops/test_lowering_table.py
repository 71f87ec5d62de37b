"""The table against what each of its readers does: an operator is traced through every stage, and looked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from fxquant import ops
from fxquant.backend.eager import aot_eager
from fxquant.backend.inductor.compile import compile_quantized
from fxquant.graph.edit import copied
from fxquant.kernels.entries import ENTRIES
from fxquant.ops import lowering_table
from fxquant.ops.integer_matmul import INTEGER_CONVOLUTION
from fxquant.ops.library import ARITHMETIC
from fxquant.ops.lowering_table import KERNELS, ROLES, Form, Stage, becomes
from fxquant.ops.marks import BIND
from fxquant.ops.plain_inductor import fuse_in_inductor
from fxquant.ops.qdq import DEQUANTIZE, QUANTIZE_DEQUANTIZE, QUANTIZE_DEQUANTIZE_BLOCKS
from fxquant.ops.rounding_words import ROUNDING_WORDS
from fxquant.passes.base import PassResult
from fxquant.passes.post_grad.lower_fake_quantize import LowerFakeQuantize
from tests.ops.cases import Case
from tests.ops.test_every_op import CASES

Table = Mapping[Any, Callable[..., Any]]

CODES, POINT = torch.zeros(2, 3, dtype=torch.int8), torch.tensor([0])
OTHERS = (
    Case("bind", BIND, lambda x: ("key", [0], [x])),
    Case("dequantize_affine", DEQUANTIZE, lambda x: (CODES, torch.ones(()), torch.tensor(0), None)),
    Case("quantize_dequantize", QUANTIZE_DEQUANTIZE, lambda x: (x, 0.1, 0, -8, 7, "site")),
    Case(
        "quantize_dequantize_blocks",
        QUANTIZE_DEQUANTIZE_BLOCKS,
        lambda x: (x, 8, -6, 6, True, "e2m1", "e4m3", 2.0, "site"),
    ),
    Case(
        "integer_convolution",
        INTEGER_CONVOLUTION,
        lambda x: (torch.zeros(1, 8, 4).to(torch.uint8), torch.zeros(8, 8, 3).to(torch.int8), POINT, [1], [0], [1], 1),
    ),
    Case("rounding_words", ROUNDING_WORDS, lambda x: (2,), kwargs={"device": torch.device("cpu")}),
)
BY_OPERATOR = {case.op: case for case in reversed((*CASES, *OTHERS))}


def operator_name(op: Any) -> str:
    return op.name().removeprefix("fxquant::")


def traced(op: Any, table: Table | None = None) -> fx.GraphModule:
    """A graph with one call of the operator."""
    case = BY_OPERATOR[op]
    x = torch.randn(case.shape, generator=torch.Generator().manual_seed(0))
    leaves, form = tree_flatten(case.args(x))  # a list holds tensors too

    def call(*given: Tensor) -> Any:
        rest = iter(given)
        args = tree_unflatten([next(rest) if isinstance(a, Tensor) else a for a in leaves], form)
        return op(*args, **case.kwargs)

    tensors = [a for a in leaves if isinstance(a, Tensor)]
    return make_fx(call, decomposition_table=dict(table or {}), tracing_mode="fake")(*tensors)


def moved(gm: fx.GraphModule, device: str) -> fx.GraphModule:
    """A copy whose values are said to lie on a device, which this machine need not have."""
    gm = copied(gm)
    for node in gm.graph.nodes:
        if "val" in node.meta:
            node.meta["val"] = tree_map_only(Tensor, lambda value: on(value, device), node.meta["val"])
    return gm


def on(value: Any, device: str) -> Tensor:
    with value.fake_mode:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)


def form_in(gm: fx.GraphModule, op: Any) -> Form:
    return "node" if op in {node.target for node in gm.graph.nodes} else "arithmetic"


def tables_of(monkeypatch: pytest.MonkeyPatch) -> dict[Stage, Table]:
    """The decompositions that the three ways to compile hand to AOTAutograd and to Inductor."""
    import torch._dynamo.backends.common
    import torch._inductor.compile_fx
    from torch._inductor.decomposition import select_decomp_table

    found: dict[Stage, Table] = {}

    def keep(stage: Stage) -> Callable[..., Any]:
        def stand_in(*args: Any, decompositions: Table, **kwargs: Any) -> Callable[..., Any]:
            found[stage] = decompositions
            return lambda *inputs: None

        return stand_in

    gm = make_fx(torch.neg, tracing_mode="fake")(torch.ones(2))
    monkeypatch.setattr(torch._inductor.compile_fx, "compile_fx", keep("aot"))
    monkeypatch.setattr(torch._dynamo.backends.common, "aot_autograd", keep("aot eager"))
    compile_quantized(gm, [torch.ones(2)])
    aot_eager(gm, [torch.ones(2)], lambda graph: graph)
    fuse_in_inductor()
    found["plain"] = select_decomp_table()
    return found


@pytest.fixture(scope="module")
def tables() -> dict[Stage, Table]:
    with pytest.MonkeyPatch.context() as patch:
        return tables_of(patch)


def test_every_operator_is_asked_about() -> None:
    registered = {
        name.removeprefix("fxquant::")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("fxquant::") and "tests" not in name
    }
    assert registered == set(map(operator_name, BY_OPERATOR))
    assert set(ROLES) <= registered and registered >= KERNELS


@pytest.mark.parametrize("stage", ["plain", "aot", "aot eager"])
def test_what_a_compiler_takes_apart_as_it_traces(stage: Stage, tables: dict[Stage, Table]) -> None:
    found = {operator_name(op): form_in(traced(op, tables[stage]), op) for op in BY_OPERATOR}
    assert found == {name: becomes(name, stage) for name in found}


@pytest.fixture(scope="module")
def calls() -> dict[Any, fx.GraphModule]:
    return {op: traced(op) for op in BY_OPERATOR}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("where", ["joint", "beside integers", "post-grad", "anywhere"])
def test_what_the_pass_replaces(where: Any, device: str, calls: dict[Any, fx.GraphModule]) -> None:
    found = {}
    for op, gm in calls.items():
        gm = moved(gm, device)
        LowerFakeQuantize(where=where).rewrite(gm, PassResult())  # whatever stage may hold such a graph
        found[operator_name(op)] = form_in(gm, op)
    assert found == {name: becomes(name, where, device) for name in found}


def test_what_inductor_lowers_whole(tables: dict[Stage, Table]) -> None:
    """`tables` has compiled, and so has told Inductor; what it was not told of is called.

    Inductor notes a fallback of its own once it has met such a call, in whatever test.
    """
    from torch._inductor.lowering import fallbacks, lowerings

    found = {operator_name(op): "whole" if op in lowerings and op not in fallbacks else "node" for op in BY_OPERATOR}
    assert found == {name: becomes(name, "inductor") for name in found}


def test_what_an_eager_call_runs() -> None:
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    for op in ARITHMETIC:
        assert has(op.name(), "CompositeExplicitAutograd") and not has(op.name(), "CPU")
        assert becomes(op, "eager", "cpu") == "arithmetic"
        expected = "kernel" if has(op.name(), "CUDA") else "arithmetic"
        assert becomes(op, "eager", "cuda") == expected
        assert (operator_name(op) in ENTRIES) == (expected == "kernel")
    assert BY_OPERATOR.keys() - ARITHMETIC.keys() == {INTEGER_CONVOLUTION, ROUNDING_WORDS}
    assert becomes(INTEGER_CONVOLUTION, "eager") == "kernel" and has(INTEGER_CONVOLUTION.name(), "CPU")


def test_another_row_is_another_decision(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pass asks the table, and nothing else."""
    op = ops.fake_quantize.PER_TENSOR
    name = operator_name(op)
    row = replace(ROLES[name], joint="arithmetic", anywhere="node")
    monkeypatch.setattr(lowering_table, "ROLES", {**ROLES, name: row})
    found = {}
    for where in ("joint", "anywhere"):
        gm = traced(op)
        LowerFakeQuantize(where=where).rewrite(gm, PassResult())  # whatever stage may hold such a graph
        found[where] = form_in(gm, op)
    assert found == {"joint": "arithmetic", "anywhere": "node"}


AFFINE = {
    "fake_quantize_per_tensor_affine",
    "fake_quantize_per_tensor_affine.tensor_qparams",
    "fake_quantize_per_channel_affine",
}
GRADIENTS = {"fake_quantize_per_tensor_affine_backward", "fake_quantize_per_channel_affine_backward"}
CODING = {
    *("quantize_per_tensor", "quantize_per_tensor.tensor_qparams", "quantize_per_channel"),
    *("clip_mask_per_tensor_affine", "pack_planes", "quantize_elements"),
}
READING = {
    *("dequantize_per_tensor", "dequantize_per_tensor.tensor_qparams", "dequantize_per_channel"),
    *("unpack_planes", "dequantize_elements"),
}
STATE = {"average_min_max", "affine_qparams"}
ALL_FOUR = AFFINE | GRADIENTS | CODING | READING


@dataclass(frozen=True)
class Decision:
    """Which operators become something at a stage; all others become the other thing."""

    stage: Stage
    device: str
    form: Form
    operators: set[str]

    def __str__(self) -> str:
        return f"{self.stage} {self.device} {self.form}"


DECISIONS = (
    Decision("plain", "cpu", "node", {"bind", "integer_convolution", "rounding_words"}),
    Decision("aot eager", "cpu", "arithmetic", {"stand_in"}),
    Decision(
        *("aot", "cpu", "node"),
        AFFINE
        | GRADIENTS
        | STATE
        | {"bind", "materialize", "integer_convolution", "learned_start", "rounding_words"}
        | {"dequantize_affine", "quantize_dequantize", "quantize_dequantize_blocks"},
    ),
    Decision("joint", "cpu", "arithmetic", GRADIENTS),
    Decision("joint", "cuda", "arithmetic", GRADIENTS),
    Decision("beside integers", "cpu", "arithmetic", AFFINE | GRADIENTS | CODING),
    Decision("post-grad", "cpu", "arithmetic", set()),
    Decision("post-grad", "cuda", "arithmetic", ALL_FOUR),
    Decision("anywhere", "cpu", "arithmetic", ALL_FOUR),
    Decision("inductor", "cpu", "whole", ALL_FOUR | STATE | {"materialize"}),
    Decision("eager", "cpu", "kernel", {"integer_convolution"}),
    Decision("eager", "cuda", "kernel", set(ENTRIES) | {"integer_convolution"}),
)


@pytest.mark.parametrize("decision", DECISIONS, ids=str)
def test_the_decisions(decision: Decision) -> None:
    """By stage, where the table goes by operator: a row that changed by mistake changes these."""
    names = set(map(operator_name, BY_OPERATOR))
    assert {n for n in names if becomes(n, decision.stage, decision.device) == decision.form} == decision.operators


def test_every_stage_has_an_answer() -> None:
    for op in BY_OPERATOR:
        for stage in get_args(Stage):
            for device in ("cpu", "cuda", "meta"):
                assert becomes(op, stage, device) in get_args(Form)
