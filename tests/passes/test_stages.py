"""Stages: which graphs a pass takes, and what it may leave there."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

import fxquant.passes
from fxquant.errors import InvariantViolated
from fxquant.graph.edit import call
from fxquant.graph.nodes import call_nodes
from fxquant.ops import bind
from fxquant.ops.fake_quantize import PER_TENSOR_BACKWARD, PER_TENSOR_SCALAR
from fxquant.ops.marks import MATERIALIZE, STAND_IN
from fxquant.ops.qdq import QUANTIZE_DEQUANTIZE
from fxquant.ops.saved import PACK_PLANES
from fxquant.passes.base import Pass, PassResult, run_all
from fxquant.passes.captured.fold_batch_norm import FoldBatchNorm
from fxquant.passes.captured.hoist_views import HoistViews
from fxquant.passes.joint.tag_recompute import TagRecompute
from fxquant.passes.pipelines import joint_passes, post_grad_passes
from fxquant.passes.post_grad.keep_divisions import KeepDivisions
from fxquant.passes.post_grad.lower_fake_quantize import LowerFakeQuantize
from fxquant.passes.post_grad.materialize_shared import MaterializeShared
from fxquant.passes.stages import CAPTURED, DYNAMO, EXPORT, JOINT, POST_GRAD, STAGES, Stage, enter, operators, stage_of
from tests.passes.graphs import QUANTIZE, captured


def traced(function: Callable[..., Any]) -> fx.GraphModule:
    """A graph that nobody has said a stage of, with inputs that say nothing either."""
    return make_fx(function, tracing_mode="fake")(torch.ones(2, 3))


def test_every_pass_names_its_stages() -> None:
    """Each stands in the folder of one of them."""
    names = [found.name for found in pkgutil.walk_packages(fxquant.passes.__path__, "fxquant.passes.")]
    classes = [
        value
        for name in names
        for value in vars(importlib.import_module(name)).values()
        if isinstance(value, type) and issubclass(value, Pass) and value is not Pass and value.__module__ == name
    ]
    assert len(classes) > 15
    for each in classes:
        folder = each.__module__.split(".")[2]
        assert folder in [stage.name for stage in each.stages] and set(each.stages) <= set(STAGES), each


@pytest.mark.parametrize(
    ("each", "stage", "message"),
    [
        (FoldBatchNorm(), JOINT, r"FoldBatchNorm must run on the captured graph: got the joint graph\."),
        (TagRecompute(), CAPTURED, r"TagRecompute must run on the joint graph: got the captured graph\."),
        (
            LowerFakeQuantize(),
            EXPORT,
            r"LowerFakeQuantize must run on the joint or post_grad graph: got the export graph\.",
        ),
        (KeepDivisions(), DYNAMO, r"KeepDivisions must run on the post_grad graph: got the dynamo graph\."),
    ],
)
def test_a_graph_of_another_stage_is_refused_by_name(each: Pass, stage: Stage, message: str) -> None:
    gm = enter(traced(lambda x: x + 1), stage)
    with pytest.raises(InvariantViolated, match=f"^{message}$"):
        each.run(gm)
    with pytest.raises(InvariantViolated, match=f"^{message}$"):
        each.run(traced(lambda x: x + 1), stage)


def test_the_second_pass_is_asked_too() -> None:
    with pytest.raises(InvariantViolated, match="TagRecompute must run on the joint graph: got the captured graph"):
        run_all((HoistViews(), TagRecompute()), enter(traced(lambda x: x + 1), CAPTURED))


MARKED: dict[str, tuple[Callable[[Tensor], Any], Pass, str | None]] = {
    "marks of owners": (
        lambda x: (bind("k", [0], [x]), x + 1),
        TagRecompute(),
        "the joint graph: got one that holds fxquant.bind.default",
    ),
    "marks of owners, where they belong": (lambda x: (bind("k", [0], [x]), x + 1), HoistViews(), None),
    "stored values": (
        lambda x: MATERIALIZE(x) + 1,
        HoistViews(),
        "the captured graph: got one that holds fxquant.materialize.default",
    ),
    "stored values, where they belong": (lambda x: MATERIALIZE(x) + 1, KeepDivisions(), None),
    "packed masks, which a user may call": (lambda x: PACK_PLANES(x.repeat(1, 8) > 0, 1, 1), HoistViews(), None),
    "packed masks, after": (lambda x: PACK_PLANES(x.repeat(1, 8) > 0, 1, 1), KeepDivisions(), None),
    "stand-ins": (
        lambda x: STAND_IN(x, x),
        KeepDivisions(),
        "the post_grad graph: got one that holds fxquant.stand_in.default",
    ),
    "what a user may call": (lambda x: QUANTIZE_DEQUANTIZE(x, 0.1, 0, -128, 127, "mine"), HoistViews(), None),
    "gradients that a user may take": (
        lambda x: PER_TENSOR_BACKWARD(x, x, x[0, :1], x[0, :1].int(), 0, 15),
        HoistViews(),
        None,
    ),
}


@pytest.mark.parametrize("name", MARKED)
def test_a_graph_that_nobody_named_is_judged_by_its_operators(name: str) -> None:
    function, each, message = MARKED[name]
    gm = traced(function)
    if message is None:
        assert not each.run(gm).modified
    else:
        with pytest.raises(InvariantViolated, match=f"{type(each).__name__} must run on {message}"):
            each.run(gm)
    assert stage_of(gm) is None


def test_inputs_that_are_described_are_all_described() -> None:
    gm = traced(lambda x: x + 1)
    (x,) = gm.graph.find_nodes(op="placeholder")
    x.meta["source"] = ""
    with pytest.raises(InvariantViolated, match=r"got one whose input x_1 has no meta\['state'\]"):
        HoistViews().run(gm)
    x.meta["state"] = False
    assert not HoistViews().run(gm).modified


@dataclass(frozen=True, kw_only=True)
class Put(Pass):
    """Puts a call of an operator after the first node that is none."""

    stages: ClassVar = (CAPTURED, JOINT, POST_GRAD, EXPORT)

    op: Any
    args: tuple[Any, ...] = ()
    valued: bool = True

    def rewrite(self, gm: fx.GraphModule, result: PassResult) -> int:
        """Edits the graph itself."""
        node = next(call_nodes(gm.graph))
        with gm.graph.inserting_after(node):
            made = call(gm.graph, self.op, node, *self.args, like=node)
        if not self.valued:
            del made.meta["val"]
        return 1


FAKE_QUANTIZE = (PER_TENSOR_SCALAR, (0.1, 0, -128, 127))
PAIR = (QUANTIZE_DEQUANTIZE, (0.1, 0, -128, 127, "label"))


@pytest.mark.parametrize(
    ("made", "stage", "allowed"),
    [
        (FAKE_QUANTIZE, CAPTURED, True),
        (FAKE_QUANTIZE, JOINT, False),
        (FAKE_QUANTIZE, EXPORT, False),
        (PAIR, EXPORT, True),
        (PAIR, CAPTURED, False),
        (PAIR, POST_GRAD, False),
        ((MATERIALIZE, ()), POST_GRAD, True),
        ((MATERIALIZE, ()), JOINT, False),
        ((torch.ops.aten.relu.default, ()), JOINT, True),
    ],
)
def test_what_a_pass_may_put_there(made: tuple[Any, tuple[Any, ...]], stage: Stage, allowed: bool) -> None:
    gm, put = enter(traced(lambda x: x + 1), stage), Put(op=made[0], args=made[1])
    if allowed:
        assert put.run(gm).modified
        return
    message = rf"^after Put: {made[0]} must not be put into the {stage} graph\.$"
    with pytest.raises(InvariantViolated, match=message):
        put.run(gm)


def test_what_stood_there_may_be_copied() -> None:
    gm = enter(traced(lambda x: QUANTIZE_DEQUANTIZE(x, *PAIR[1])), CAPTURED)
    assert Put(op=PAIR[0], args=PAIR[1]).run(gm).modified


@pytest.mark.parametrize("stage", [CAPTURED, JOINT, POST_GRAD, EXPORT])
def test_a_node_without_its_value(stage: Stage) -> None:
    gm = enter(traced(lambda x: x + 1), stage)
    with pytest.raises(InvariantViolated, match=r"^after Put: relu_default must have meta\['val'\]: got "):
        Put(op=torch.ops.aten.relu.default, valued=False).run(gm)


@pytest.mark.parametrize(("stage", "judged"), [(CAPTURED, True), (EXPORT, True), (JOINT, False), (POST_GRAD, False)])
def test_what_others_left_without_a_value(stage: Stage, judged: bool) -> None:
    """Inductor runs passes of its own, and of users, on the same graphs."""
    gm = enter(traced(lambda x: (x + 1).neg()), stage)
    _, other = call_nodes(gm.graph)
    del other.meta["val"]
    put = Put(op=torch.ops.aten.relu.default)
    if not judged:
        assert put.run(gm).modified
        return
    with pytest.raises(InvariantViolated, match=r"^before Put: neg must have meta\['val'\]: got "):
        put.run(gm)


def test_a_stack_of_modules_is_a_dict() -> None:
    gm = enter(traced(lambda x: x + 1), CAPTURED)
    next(call_nodes(gm.graph)).meta["nn_module_stack"] = ["layer"]
    with pytest.raises(InvariantViolated, match=r"before HoistViews: meta\['nn_module_stack'\] of add must be a dict"):
        HoistViews().run(gm)


def test_capture_and_hooks_name_their_graphs() -> None:
    gm = captured(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), torch.ones(2, 3), passes=QUANTIZE)
    assert stage_of(gm) is CAPTURED
    assert operators(gm.graph.nodes) >= {next(n.target for n in gm.graph.nodes if "site" in n.meta)}
    for stage, passes in ((JOINT, joint_passes()), (POST_GRAD, post_grad_passes())):
        assert all(stage in each.stages for each in passes)
    assert MaterializeShared().stages == (POST_GRAD,)
