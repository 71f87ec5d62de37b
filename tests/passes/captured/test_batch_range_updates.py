from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, fx
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fxquant.graph.bodies import execution_order
from fxquant.ops.marks import bind
from fxquant.passes.captured import insert_fake_quantize
from fxquant.passes.captured.batch_range_updates import BatchRangeUpdates
from fxquant.passes.captured.insert_fake_quantize import InsertFakeQuantize
from fxquant.plan.plan import Edge, LocalSite
from fxquant.plan.site_lists import register
from fxquant.spec.mode import Mode
from fxquant.spec.quant_spec import QuantSpec
from fxquant.spec.ranges import MovingAverage
from fxquant.spec.recipes import INT8
from fxquant.targets.profiles import ONNXRUNTIME
from tests.passes.graphs import apply, captured, evaluate, show, untouched

PASS = BatchRangeUpdates()
INSERT = InsertFakeQuantize(recipe=INT8, profile=ONNXRUNTIME)
X, W = torch.tensor([[-2.0, 0.1, 5.0]]), torch.eye(3)
ALL_REDUCE = torch.ops._c10d_functional.all_reduce.default


def site(ordinal: int = 0, constant: float = 0.01) -> LocalSite:
    spec = QuantSpec(signed=False, symmetric=False, range=MovingAverage(constant=constant, delayed=True))
    edge = Edge(path="", kind="linear", ordinal=ordinal, operand="input")
    return LocalSite(name=f"input{ordinal}", role="activation", spec=spec, edges=(edge,))


ONE = register((site(),), "onnxruntime")
OTHER = register((site(1),), "onnxruntime")
TWO = register((site(0), site(1, 0.5)), "onnxruntime")


def one(x: Tensor, w: Tensor, low: Tensor, high: Tensor, mode: Mode = Mode.DELAYED) -> Tensor:
    bind(ONE, [int(mode)], [low, high])
    return F.linear(x, w)


def other(x: Tensor, w: Tensor, low: Tensor, high: Tensor) -> Tensor:
    bind(OTHER, [int(Mode.DELAYED)], [low, high])
    return F.linear(x, w)


def two(x: Tensor, w: Tensor, low: Tensor, high: Tensor, low2: Tensor, high2: Tensor) -> Tensor:
    bind(TWO, [int(Mode.DELAYED)] * 2, [low, high, low2, high2])
    return F.linear(F.linear(x, w), w)


def one_state(x: Tensor, w: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Two sites on one pair of tensors, as two uses of a module have them."""
    bind(TWO, [int(Mode.DELAYED)] * 2, [low, high, low, high])
    return F.linear(2 * F.linear(x, w), w)


def state() -> tuple[Tensor, Tensor]:
    return torch.tensor([-1.0]), torch.tensor([3.0])


def inserted(model: Callable[..., Any], *args: Tensor) -> fx.GraphModule:
    gm = captured(model, *args)
    INSERT.run(gm)
    return gm


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a job of several processes, as far as graphs are concerned."""
    monkeypatch.setattr(insert_fake_quantize, "process_group", lambda wanted: "0" if wanted is None else wanted)


def test_one_update_snapshot() -> None:
    gm = inserted(one, X, W, *state())
    assert apply(PASS, gm).rewrites == 1
    assert_expected_inline(
        show(gm),
        """\
detach_default = detach(arg2_1)
affine_qparams_default = affine_qparams(arg0_1, arg1_1, 0, 255, False)
getitem = getitem(affine_qparams_default, 0)
getitem_1 = getitem(affine_qparams_default, 1)
fake_quantize_per_tensor_affine_tensor_qparams = fake_quantize_per_tensor(arg2_1, getitem, getitem_1, 0, 255)
linear = linear(fake_quantize_per_tensor_affine_tensor_qparams, arg3_1)
detach_default_1 = detach(arg2_1)
batch_min_max_default = batch_min_max(detach_default_1)
getitem_2 = getitem(batch_min_max_default, 0)
getitem_3 = getitem(batch_min_max_default, 1)
average_min_max_default_1 = average_min_max(getitem_2, getitem_3, arg0_1, arg1_1, 0.01)
getitem_6 = getitem(average_min_max_default_1, 0)
getitem_7 = getitem(average_min_max_default_1, 1)
copy__default_2 = copy_(arg0_1, getitem_6)
copy__default_3 = copy_(arg1_1, getitem_7)
return [linear]
""",
    )


def test_the_graph_computes_with_the_range_at_entry_and_stores_the_next() -> None:
    low, high = state()
    gm = inserted(one, X, W, low, high)
    apply(PASS, gm)
    y = evaluate(gm, one, X, W, low, high)
    step = torch.tensor(4 / 255)
    assert torch.equal(y, torch.stack([(X[0, 0] * 0 - 64 * step), torch.round(0.1 / step) * step, 191 * step])[None])
    assert (low.item(), high.item()) == pytest.approx((-1.01, 3.02))


def test_each_range_by_its_own_constant() -> None:
    ranges = [*state(), *state()]
    gm = inserted(two, X, W, *ranges)
    assert apply(PASS, gm).rewrites == 2
    evaluate(gm, two, X, W, *ranges)
    assert [r.item() for r in ranges[:2]] == pytest.approx([-1.01, 3.02])
    # The second sees the first's result, clipped to the range at entry: −64 and 191 steps of 4 / 255.
    assert [r.item() for r in ranges[2:]] == pytest.approx([(-1 - 256 / 255) / 2, (3 + 764 / 255) / 2])


def test_a_state_that_is_observed_twice_moves_twice_and_is_written_once() -> None:
    low, high = state()
    gm = inserted(one_state, X, W, low, high)
    assert apply(PASS, gm).rewrites == 2
    assert show(gm).count(" = copy_(") == 2 and show(gm).count(" = affine_qparams(") == 2
    evaluate(gm, one_state, X, W, low, high)
    assert low.item() == pytest.approx((-1.01 - 512 / 255) / 2)
    assert high.item() == pytest.approx((3.02 + 1528 / 255) / 2)


@pytest.mark.usefixtures("group")
def test_one_reduction_for_all_ranges_of_a_graph() -> None:
    gm = inserted(two, X, W, *state(), *state())
    assert apply(PASS, gm).rewrites == 2
    (reduce,) = (node for node in gm.graph.nodes if node.target is ALL_REDUCE)
    assert reduce.args[1:] == ("max", "0") and tuple(reduce.meta["val"].shape) == (4,)
    assert show(gm).index("all_reduce") > show(gm).rindex(" = linear(")
    averages = [line for line in show(gm).splitlines() if " = average_min_max(" in line]
    assert len(averages) == 2 and averages[0].endswith("0.01)") and averages[1].endswith("0.5)")


@pytest.mark.usefixtures("group")
def test_a_range_updated_before_use_is_kept_only_reduced() -> None:
    def model(x: Tensor, w: Tensor, low: Tensor, high: Tensor) -> Tensor:
        bind(TWO, [int(Mode.TRAIN)] * 2, [low, high, low, high])
        return F.linear(F.linear(x, w), w)

    gm = inserted(model, X, W, *state())
    assert apply(PASS, gm).rewrites == 2
    averages = [node for node in gm.graph.nodes if node.name.startswith("average_min_max")]
    used, then, *kept = averages
    assert [a.op for a in used.args[2:4]] == ["placeholder"] * 2, "this rank's own, from the range at entry"
    assert all(a.args[0] is used for a in then.args[2:4]), "the second use goes on from it"
    assert [a.op for a in kept[0].args[2:4]] == ["placeholder"] * 2 and len(kept) == 2
    assert show(gm).count(" = copy_(") == 2 and show(gm).count("all_reduce(") == 1


def test_no_group_without_other_processes() -> None:
    gm = inserted(lambda x, w, low, high: one(x, w, low, high, Mode.TRAIN), X, W, *state())
    assert untouched(PASS, gm).declines == [] and " = update_min_max(" in show(gm)


def test_extremes_of_checkpointed_bodies_are_results_of_theirs() -> None:
    def model(x: Tensor, w: Tensor, low: Tensor, high: Tensor, low2: Tensor, high2: Tensor) -> Tensor:
        body = checkpoint(one, x, w, low, high, use_reentrant=False)
        return checkpoint(other, body, w, low2, high2, use_reentrant=False)

    w = W.clone().requires_grad_()
    gm = inserted(model, X, w, *state(), *state())
    assert apply(PASS, gm).rewrites == 2
    inside = [node for node in execution_order(gm) if node.graph is not gm.graph]
    assert not any(node.target is torch.ops.aten.copy_.default for node in inside)
    assert sum(node.name.startswith("batch_min_max") for node in inside) == 2
    assert show(gm).count(" = average_min_max(") == 2 and show(gm).count(" = copy_(") == 4
    calls = [node for node in gm.graph.nodes if "tag_activation_checkpoint" in str(node.target)]
    assert [len(node.meta["val"]) for node in calls] == [3, 3]


def test_untouched_without_observations() -> None:
    gm = captured(lambda x, w: F.linear(x, w), X, W)
    assert untouched(PASS, gm).declines == []
