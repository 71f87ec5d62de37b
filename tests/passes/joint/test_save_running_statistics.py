"""What was read of running statistics is saved, whoever asked for something else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import CheckpointPolicy

from fxquant.errors import InvariantViolated
from fxquant.graph.meta import mark_running_statistic
from fxquant.passes.joint.save_running_statistics import SaveRunningStatistics
from fxquant.passes.stages import CAPTURED, enter
from tests.passes.graphs import apply, untouched

SAVE = CheckpointPolicy.MUST_SAVE
aten = torch.ops.aten


def graph(*marked: Any) -> fx.GraphModule:
    """``x · rsqrt(var)``, then an update of ``var``; calls of ``marked`` read it before."""

    def step(x: Tensor, var: Tensor) -> Tensor:
        y = aten.mul(x, aten.rsqrt(aten.clone(var)))
        aten.copy_(var, aten.mean(x, [0]))
        return y

    gm = make_fx(step, tracing_mode="fake")(torch.ones(2, 3), torch.ones(3))
    for node in gm.graph.nodes:
        if node.target in marked:
            mark_running_statistic(node)
    return gm


def tags(gm: fx.GraphModule) -> dict[str, object]:
    return {node.name: node.meta["recompute"] for node in gm.graph.nodes if "recompute" in node.meta}


def test_marked_values_are_saved_and_no_others() -> None:
    gm = graph(aten.clone.default, aten.rsqrt.default)
    assert apply(SaveRunningStatistics(), gm).rewrites == 2
    assert tags(gm) == {"clone": SAVE, "rsqrt": SAVE}


@pytest.mark.parametrize("policy", [CheckpointPolicy.MUST_RECOMPUTE, CheckpointPolicy.PREFER_RECOMPUTE])
def test_a_users_checkpoint_region_gives_way(policy: CheckpointPolicy) -> None:
    gm = graph(aten.clone.default)
    for node in gm.graph.nodes:
        if node.op == "call_function":
            node.meta["recompute"] = policy
    assert apply(SaveRunningStatistics(), gm).rewrites == 1
    assert tags(gm) == {"clone": SAVE, **dict.fromkeys(("rsqrt", "mul", "mean", "copy_"), policy)}


def test_what_is_saved_already_is_no_rewrite() -> None:
    gm = graph(aten.clone.default)
    next(node for node in gm.graph.nodes if node.name == "clone").meta["recompute"] = SAVE
    untouched(SaveRunningStatistics(), gm)


def test_an_input_is_there_anyway() -> None:
    gm = graph()
    for node in gm.graph.find_nodes(op="placeholder"):
        mark_running_statistic(node)
    untouched(SaveRunningStatistics(), gm)
    assert tags(gm) == {}


def test_it_is_too_early_before_the_joint_graph() -> None:
    with pytest.raises(InvariantViolated, match=r"SaveRunningStatistics must run on the joint graph: got the captured"):
        SaveRunningStatistics().run(enter(graph(aten.clone.default), CAPTURED))
