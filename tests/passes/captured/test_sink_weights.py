from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, fx, nn
from torch._inductor.utils import run_and_get_code
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fxquant
from fxquant.graph.bodies import all_graphs
from fxquant.graph.nodes import packet
from fxquant.passes.base import PassResult
from fxquant.passes.captured.constant_weights import is_weight
from fxquant.passes.captured.sink_weights import SinkWeights
from tests.passes.graphs import QUANTIZE, apply, captured, show, untouched

PASS = SinkWeights()
X = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


class Tied(Two):
    """A weight that two layers read."""

    def forward(self, x: Tensor) -> Tensor:
        return self.first(self.second(self.first(x).sin()).cos())


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Two()

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x.sin(), use_reentrant=False)


class Autocast(Two):
    """Read inside a region, beginning outside of it."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        with torch.autocast("cpu", torch.bfloat16):
            return self.second(x.relu())


class Changed(Two):
    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        with torch.no_grad():
            self.second.weight.mul_(0.5)
        return self.second(y)


class Computed(Two):
    """A weight that is made from the input."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.first(x).relu(), self.second.weight * x.mean())


def distances(gm: fx.GraphModule) -> list[int]:
    """How many nodes stand between a weight and the first that reads it."""
    found = []
    for module in all_graphs(gm):
        order = {node: index for index, node in enumerate(module.graph.nodes)}
        found += [min(map(order.__getitem__, n.users)) - order[n] - 1 for n in module.graph.nodes if is_weight(n)]
    return found


def graph(model: nn.Module) -> fx.GraphModule:
    return captured(model, X, passes=QUANTIZE)


def weights_and_readers(gm: fx.GraphModule) -> str:
    return "\n".join(line for line in show(gm).splitlines() if re.search("symmetric|channel|linear", line)) + "\n"


def test_snapshot() -> None:
    torch.manual_seed(0)
    gm = graph(Two())
    before = weights_and_readers(gm)
    assert apply(PASS, gm).rewrites == 2
    assert_expected_inline(
        before + "\n" + weights_and_readers(gm),
        """\
symmetric_qparams_default_1 = symmetric_qparams(detach_default_3, 0, 127)
getitem_10 = getitem(symmetric_qparams_default_1, 0)
getitem_11 = getitem(symmetric_qparams_default_1, 1)
fake_quantize_per_channel_affine_default_1 = fake_quantize_per_channel(arg2_1, getitem_10, getitem_11, 0, -127, 127)
symmetric_qparams_default = symmetric_qparams(detach_default_1, 0, 127)
getitem_4 = getitem(symmetric_qparams_default, 0)
getitem_5 = getitem(symmetric_qparams_default, 1)
fake_quantize_per_channel_affine_default = fake_quantize_per_channel(arg0_1, getitem_4, getitem_5, 0, -127, 127)
linear = linear(fake_quantize_per_tensor_affine_tensor_qparams, fake_quantize_per_channel_affine_default)
relu = relu(linear)
linear_1 = linear(fake_quantize_per_tensor_affine_tensor_qparams_1, fake_quantize_per_channel_affine_default_1)
return [linear_1]

symmetric_qparams_default = symmetric_qparams(detach_default_1, 0, 127)
getitem_4 = getitem(symmetric_qparams_default, 0)
getitem_5 = getitem(symmetric_qparams_default, 1)
fake_quantize_per_channel_affine_default = fake_quantize_per_channel(arg0_1, getitem_4, getitem_5, 0, -127, 127)
linear = linear(fake_quantize_per_tensor_affine_tensor_qparams, fake_quantize_per_channel_affine_default)
relu = relu(linear)
symmetric_qparams_default_1 = symmetric_qparams(detach_default_3, 0, 127)
getitem_10 = getitem(symmetric_qparams_default_1, 0)
getitem_11 = getitem(symmetric_qparams_default_1, 1)
fake_quantize_per_channel_affine_default_1 = fake_quantize_per_channel(arg2_1, getitem_10, getitem_11, 0, -127, 127)
linear_1 = linear(fake_quantize_per_tensor_affine_tensor_qparams_1, fake_quantize_per_channel_affine_default_1)
return [linear_1]
""",
    )


@pytest.mark.parametrize("make", [Tied, Autocast, Computed], ids=lambda make: make.__name__)
def test_weights_stand_before_their_first_reader(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    gm = graph(make())
    there = distances(gm)
    assert max(there) > 0
    assert apply(PASS, gm).rewrites == sum(each > 0 for each in there)
    assert set(distances(gm)) == {0}


def test_weights_of_checkpointed_bodies_sink_in_those(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, list[int]]] = []
    rewrite = SinkWeights.rewrite

    def watched(self: SinkWeights, gm: fx.GraphModule, result: PassResult) -> int:
        done = rewrite(self, gm, result)
        seen.append((done, distances(gm)))
        return done

    monkeypatch.setattr(SinkWeights, "rewrite", watched)
    torch._dynamo.reset()
    model = fxquant.prepare(Checkpointed(), (X,))
    with torch._inductor.config.patch(force_disable_caches=True):
        torch.compile(model, backend="fxquant")(X)
    assert seen == [(2, [0, 0])]


def test_a_weight_that_the_graph_changes_stays() -> None:
    torch.manual_seed(0)
    gm = graph(Changed())
    there = distances(gm)
    assert apply(PASS, gm).rewrites == 1, "the other's"
    assert sum(each > 0 for each in there) == 2
    assert sum(each > 0 for each in distances(gm)) == 1


class ReadEarly(nn.Module):
    """The transposed weight is summed before the product that reads it quantized."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(X.shape[-1], X.shape[-1]))

    def forward(self, x: Tensor) -> Tensor:
        turned = self.weight.t()
        return (x + turned.sum()) @ turned


def test_what_others_read_earlier_stays_where_it_is() -> None:
    gm = graph(ReadEarly())
    apply(SinkWeights(), gm)
    order = {node: index for index, node in enumerate(gm.graph.nodes)}
    late = [(n.name, s.name) for n in gm.graph.nodes for s in n.all_input_nodes if order[s] > order[n]]
    assert late == [] and any(packet(n) is torch.ops.aten.t for n in gm.graph.nodes)


def test_untouched() -> None:
    untouched(PASS, captured(lambda x: x + 1, X))


def shape_of(code: str, name: str) -> str | None:
    found = re.search(rf"assert_size_stride\({name}, (\([^)]*\))", code)
    return found and found[1]


def test_compiled_code_writes_each_weight_in_front_of_its_own_layer() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(4)))
    x = torch.randn(8, 16)
    # In the order of the graph: Inductor's own search for less memory may find as much, and does in this small net.
    options = {"inductor": {"reorder_for_peak_memory": False}}
    step = torch.compile(fxquant.prepare(model, (x,)), backend="fxquant", options=options)
    _, codes = run_and_get_code(lambda: step(x).sum().backward())
    calls = [line for line in codes[0].split("def call", 1)[1].splitlines() if "cpp_fused" in line]
    weights = [{p for p in re.findall(r"primals_\d+", line) if shape_of(codes[0], p) == "(16, 16)"} for line in calls]
    assert [len(read) for read in weights] == [1, 1, 1, 1, 0], "at the start of the graph, the first read all four"
