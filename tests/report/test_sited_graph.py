"""What a run on example inputs shows: sites in graphs, the list of operators, products."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
from expecttest import assert_expected_inline
from torch import Tensor, nn

import fxquant
from fxquant.errors import InvalidArgument
from fxquant.plan.plan import Plan
from fxquant.prepared.root import plan_of
from fxquant.report.example_run import ExampleRun, run_on_examples
from fxquant.report.operators import Operator
from fxquant.report.products import products_of
from fxquant.report.sited_graph import SitedGraph
from tests.report.nets import FLAT, IMAGE, MAPS, TOKENS, Forked, Products, Repeated, Residual

NETS: dict[str, tuple[type[nn.Module], Tensor]] = {
    "residual": (Residual, IMAGE),
    "products": (Products, TOKENS),
    "forked": (Forked, FLAT),
    "repeated": (Repeated, MAPS),
}


@dataclasses.dataclass(frozen=True)
class Shown:
    """A net's plan and its run on its example inputs."""

    plan: Plan
    run: ExampleRun

    @property
    def operators(self) -> list[Operator]:
        return [one for graph in self.run.graphs for one in graph]


@pytest.fixture(scope="module")
def nets() -> dict[str, Shown]:
    return {name: shown(net(), x) for name, (net, x) in NETS.items()}


def shown(net: nn.Module, x: Tensor, **options: str) -> Shown:
    model = fxquant.prepare(net, (x,), **options)
    plan = plan_of(model)
    assert plan is not None
    return Shown(plan, run_on_examples(model, plan, (x,), None))


def listed(operators: tuple[Operator, ...]) -> str:
    """A line for each operator: what it is, who runs it, and by operand where it reads and through which site."""
    return "\n".join(
        " ".join([one.role, one.label, one.module or "-", *map(_wire, one.wires)]).strip() for one in operators
    )


def _wire(wire: object) -> str:
    fields = vars(wire)
    source = "parameter" if fields["source"] is None else fields["source"]
    return f"{fields['operand'] or '·'}={source}" + (f":{fields['site']}" if fields["site"] else "")


# ---------------------------------------------------------------- the list of operators


def test_operators_of_a_residual_net(nets: dict[str, Shown]) -> None:
    (graph,) = nets["residual"].run.graphs
    assert_expected_inline(
        listed(graph),
        """\
input x -
operator conv stem input=0:stem.input weight=parameter:stem.weight
operator batch_norm norm ·=1
operator relu - ·=2
operator conv body input=3:body_conv0_input weight=parameter:body.weight
operator add - lhs=4:add0_lhs rhs=3:body_conv0_input
operator relu - ·=5
operator cat - operand0=3:body_conv0_input operand1=6:cat0_operand1
operator conv mix input=7:mix.input weight=parameter:mix.weight
operator avg_pool - input=8:avg_pool0_input
mover flatten - ·=9:head.input
operator linear head input=10:head.input weight=parameter:head.weight
output output - ·=11""",
    )


def test_parts_of_one_value_lead_to_its_operator_and_movers_carry_codes(nets: dict[str, Shown]) -> None:
    (graph,) = nets["products"].run.graphs
    assert_expected_inline(
        listed(graph[2:9]),
        """\
mover unsqueeze - ·=1
mover chunk - ·=2
operator sdpa - query=3:sdpa0_query key=3:sdpa0_key value=3:sdpa0_value
mover select - ·=4
mover transpose - ·=5:matmul0_lhs
operator matmul - lhs=5:matmul0_lhs rhs=6:matmul0_lhs
operator matmul - lhs=7:matmul1_lhs rhs=5:matmul0_lhs""",
    )


def test_a_graph_break_parts_the_list_and_marks_alone_are_no_graph(nets: dict[str, Shown]) -> None:
    run = nets["repeated"].run
    assert [len(graph) for graph in run.graphs] == [8, 3] and len(run.sited) == 3
    assert [one.label for one in run.graphs[1]] == ["x", "linear", "output"]


@pytest.mark.parametrize("name", NETS)
def test_every_edge_of_the_plan_is_served_once_and_says_so(nets: dict[str, Shown], name: str) -> None:
    case = nets[name]
    edges = {
        f"{'.'.join(filter(None, (site.owner, str(edge))))}": site.key
        for site in case.plan.sites
        for edge in site.local.edges
        if site.local.role != "output"
    }
    serving = [(wire.serves, wire.site) for one in case.operators for wire in one.wires if wire.serves]
    assert dict(serving) == edges
    if name != "repeated":  # there one layer is called twice, and its weight serves both calls
        assert len(serving) == len(edges)


@pytest.mark.parametrize("name", NETS)
def test_wires_lead_back_to_earlier_operators(nets: dict[str, Shown], name: str) -> None:
    for graph in nets[name].run.graphs:
        for number, one in enumerate(graph):
            assert all(wire.source is None or wire.source < number for wire in one.wires)
            assert (one.role == "input") <= (not one.wires)


def test_keyword_inputs_have_their_names() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def forward(self, first: Tensor, *, pair: tuple[Tensor, Tensor]) -> Tensor:
            return self.fc(first) + pair[0] * pair[1]

    kwargs = {"pair": (2 * FLAT, FLAT + 1)}
    model = fxquant.prepare(Named(), (FLAT,), kwargs)
    plan = plan_of(model)
    assert plan is not None
    (graph,) = run_on_examples(model, plan, (FLAT,), kwargs).graphs
    assert [one.label for one in graph if one.role == "input"] == ["first", "pair[0]", "pair[1]"]


# ---------------------------------------------------------------- sites in a graph


def sited(nets: dict[str, Shown], name: str) -> Iterator[SitedGraph]:
    return iter(nets[name].run.sited)


def test_what_a_runtime_fuses_belongs_to_the_operator_before_it(nets: dict[str, Shown]) -> None:
    (graph,) = sited(nets, "residual")
    heads = {node.name: place for node, place in graph.heads.items()}
    stem, add = ("stem", "conv", 0), ("", "add", 0)
    assert heads == {"batch_norm": stem, "relu": stem, "relu_1": add}


def test_a_mover_between_a_site_and_its_reader_carries_codes(nets: dict[str, Shown]) -> None:
    (graph,) = sited(nets, "residual")
    assert {node.name: site.key for node, site in graph.lifted.items()} == {"flatten": "head.input"}
    (graph,) = sited(nets, "products")
    assert {node.name: site.key for node, site in graph.lifted.items()} == {"transpose": "matmul0_lhs"}


def test_the_result_of_an_output_site_is_codes_for_all_its_readers(nets: dict[str, Shown]) -> None:
    _, graph, _ = sited(nets, "repeated")
    assert {node.name: site.key for node, site in graph.carried.items()} == {
        "relu": "conv.output",
        "conv2d_1": "conv.output",
    }
    (mean,) = [node for node in graph.graph.nodes if node.name == "mean"]
    assert graph.site(mean, "", mean.all_input_nodes[0]) == "conv.output"
    assert graph.place(mean) is None and graph.edge(mean, "input") == ""


def test_places_name_the_module_the_kind_and_the_count(nets: dict[str, Shown]) -> None:
    (graph,) = sited(nets, "products")
    assert {node.name: place for node, place in graph.own_places().items()} == {
        "linear": ("qkv", "linear", 0),
        "scaled_dot_product_attention": ("", "sdpa", 0),
        "matmul": ("", "matmul", 0),
        "matmul_1": ("", "matmul", 1),
        "linear_1": ("head", "linear", 0),
    }
    assert all(graph.place(node) == place for node, place in graph.own_places().items())


# ---------------------------------------------------------------- one run


def test_operands_are_served_by_the_site_whose_codes_they_read(nets: dict[str, Shown]) -> None:
    served = nets["products"].run.served
    assert served["", "matmul", 1] == {"lhs": "matmul1_lhs", "rhs": "matmul0_lhs"}
    assert served["qkv", "linear", 0] == {"input": "qkv.input", "weight": "qkv.weight"}
    assert nets["forked"].run.served["b", "linear", 0]["input"] == "a_linear0_input"


def test_a_result_is_quantized_where_all_its_readers_read_codes(nets: dict[str, Shown]) -> None:
    assert nets["residual"].run.results == {
        ("body", "conv", 0): True,
        ("", "add", 0): False,  # its relu reads it in float
        ("", "cat", 0): True,
        ("", "avg_pool", 0): True,
        ("mix", "conv", 0): True,
        ("stem", "conv", 0): True,
        ("head", "linear", 0): False,
    }
    assert nets["products"].run.results["", "matmul", 0] and not nets["products"].run.results["", "sdpa", 0]


def test_sites_on_one_tensor_are_named_to_each_other(nets: dict[str, Shown]) -> None:
    assert nets["repeated"].run.same_tensor == {"conv.input": ("conv.output",), "conv.output": ("conv.input",)}
    assert all(not nets[name].run.same_tensor for name in ("residual", "products", "forked"))


def test_a_module_that_the_inputs_leave_out_is_not_in_the_graphs() -> None:
    model = fxquant.prepare(Repeated(), (MAPS,))
    plan = plan_of(model)
    assert plan is not None
    run = run_on_examples(model, plan, (MAPS,), {"extra": False})
    assert run.unread == ("extra",)
    assert "extra.input" not in {wire.site for graph in run.graphs for one in graph for wire in one.wires}


@pytest.mark.parametrize(
    ("args", "message"),
    [(FLAT, r"args must be a tuple of example inputs: got Tensor"), ((IMAGE,), "must run through the model: got ")],
    ids=["no tuple", "another shape"],
)
def test_inputs_that_do_not_fit(args: tuple[Tensor], message: str) -> None:
    model = fxquant.prepare(Forked(), (FLAT,))
    plan = plan_of(model)
    assert plan is not None
    with pytest.raises(InvalidArgument, match=message):
        run_on_examples(model, plan, args, None)


# ---------------------------------------------------------------- products


def test_products_of_attention_are_two_and_the_second_reads_probabilities(nets: dict[str, Shown]) -> None:
    (graph,) = sited(nets, "products")
    rows = [(one.kind, one.module, one.flops, one.quantized, one.second) for one in products_of(graph, graph.plan)]
    tokens = 2 * 4  # of 8 features
    assert rows == [
        ("linear", "qkv", 2 * tokens * 8 * 24, True, False),
        ("sdpa", "", 2 * 2 * 4 * 4 * 8, True, False),
        ("sdpa", "", 2 * 2 * 4 * 4 * 8, False, True),
        ("matmul", "", 2 * 2 * 4 * 4 * 8, True, False),
        ("matmul", "", 2 * 2 * 4 * 4 * 8, True, False),
        ("linear", "head", 2 * tokens * 8 * 8, True, False),
    ]


def test_a_product_left_in_float_has_the_plan_s_reason() -> None:
    model = fxquant.prepare(Forked(), (FLAT,), rules=[fxquant.skip("b")])
    plan = plan_of(model)
    assert plan is not None
    (graph,) = run_on_examples(model, plan, (FLAT,), None).sited
    first, second = products_of(graph, plan)
    assert first.quantized and first.reason == ""
    assert not second.quantized and "Rule(path='b', spec=None)" in second.reason and second.name == "linear_1"
