"""From the nodes of a file to rules: each leaves its layers float and no other operator that the file knows of."""

from __future__ import annotations

import json
import types

import onnx
import pytest

from fxquant.onnx.site_edges import SITES, Sites, write_sites
from fxquant.onnx.tuning.graph import QdqGraph
from fxquant.onnx.tuning.rules import Instructions, Modules
from fxquant.plan.plan import Edge, LocalSite, Plan, Site
from fxquant.spec.quant_spec import QuantSpec
from fxquant.spec.rules import skip
from tests.onnx.graphs import Graph

Edges = dict[str, list[tuple[str, str, int, str]]]


def modules(layers: dict[str, tuple[str, str]], edges: Edges) -> Modules:
    """Products by name: the site of the activation that each reads, and that of its weight ("" for none)."""
    graph = Graph()
    x, codes, results = graph.input(2, 8), {}, []
    for name, (activation, weight) in layers.items():
        read = graph.qdq(x, name=activation) if activation not in [n.output[0] for n in graph.nodes] else None
        read = read or next(n.output[0] for n in graph.nodes if n.op_type != "QuantizeLinear" and activation in n.input)
        held = graph.weight(8, 8, axis=1)
        codes[graph.nodes[-1].input[0]] = weight
        results.append(graph.op("MatMul", read, held, name=name))
    model = graph.model(*results)
    said = {"sites": edges, "codes": {name: site for name, site in codes.items() if site}}
    onnx.helper.set_model_props(model, {SITES: json.dumps(said)})
    return Modules(QdqGraph(model=model, folder=""))


def linear(path: str, ordinal: int = 0) -> list[tuple[str, str, int, str]]:
    return [(path, "linear", ordinal, "weight")]


def read(*paths: str) -> list[tuple[str, str, int, str]]:
    return [(path, "linear", 0, "input") for path in paths]


QKV = modules(
    {"one": ("a.input", "a.q.weight"), "two": ("a.input", "a.k.weight"), "three": ("b.input", "b.weight")},
    {
        "a.input": read("a.q", "a.k"), "a.q.weight": linear("a.q"), "a.k.weight": linear("a.k"),
        "b.input": read("b"), "b.weight": linear("b"),
    },
)  # fmt: skip


def test_a_layer_is_told_from_the_others_that_read_its_input() -> None:
    assert [QKV.path(name) for name in ("one", "two", "three")] == ["a.q", "a.k", "b"]
    assert QKV.instructions(["two"]) == Instructions(rules=(skip("a.k"),))
    assert QKV.instructions(["one", "three"]).rules == (skip("a.q"), skip("b"))
    assert QKV.instructions([]) == Instructions()


def test_what_the_module_runs_itself_beside_its_parts() -> None:
    found = modules(
        {"own": ("a.linear0_input", "a.linear0_weight"), "part": ("a.up.input", "a.up.weight")},
        {
            "a.linear0_input": read("a"), "a.linear0_weight": linear("a"),
            "a.up.input": [("a.up", "conv", 0, "input")], "a.up.weight": [("a.up", "conv", 0, "weight")],
        },
    )  # fmt: skip
    assert found.instructions(["own"]).rules == (skip("a", kind="linear"),), "the part is a convolution"
    assert found.instructions(["own", "part"]).rules == (skip("a"), skip("a.up"))
    assert found.instructions(["part"]).rules == (skip("a.up"),)


def test_one_of_two_alike_in_a_module_is_an_override() -> None:
    found = modules(
        {"first": ("a.linear0_input", "a.linear0_weight"), "second": ("a.linear1_input", "a.linear1_weight")},
        {
            "a.linear0_input": [("a", "linear", 0, "input")], "a.linear0_weight": linear("a"),
            "a.linear1_input": [("a", "linear", 1, "input")], "a.linear1_weight": linear("a", 1),
        },
    )  # fmt: skip
    assert found.instructions(["second"]) == Instructions(override=("a.linear1_input", "a.linear1_weight"))
    assert found.instructions(["first", "second"]) == Instructions(rules=(skip("a"),))


def test_an_override_leaves_an_input_that_others_read() -> None:
    found = modules(
        {"first": ("a.linear0_input", "a.linear0_weight"), "second": ("a.linear0_input", "a.linear1_weight")},
        {
            "a.linear0_input": [("a", "linear", 0, "input"), ("a", "linear", 1, "input")],
            "a.linear0_weight": linear("a"), "a.linear1_weight": linear("a", 1),
        },
    )  # fmt: skip
    assert found.instructions(["second"]).override == ("a.linear1_weight",)


def test_one_product_of_attention_by_its_operands() -> None:
    edges: Edges = {name: [("a", "sdpa", 0, name)] for name in ("key", "value")}
    found = modules({"scores": ("key", ""), "sums": ("value", "")}, edges)
    assert found.instructions(["scores"]).rules == (skip("a", kind="sdpa", operand="key"),)
    assert found.instructions(["scores", "sums"]).rules == (skip("a"),)


def test_operators_that_are_no_layers_are_not_meant() -> None:
    """An add of the module itself, and the result of the layer's own kernel."""
    edges: Edges = {
        "a.input": read("a"), "a.weight": linear("a"), "a.add0_rhs": [("a", "add", 0, "rhs")],
        "a.output": [("a", "linear", 0, "output")],
    }  # fmt: skip
    found = modules({"one": ("a.input", "a.weight")}, edges)
    assert found.instructions(["one"]).rules == (skip("a", kind="linear"),)
    del edges["a.add0_rhs"]
    assert modules({"one": ("a.input", "a.weight")}, edges).instructions(["one"]).rules == (skip("a"),)


def test_a_path_with_signs_of_a_glob_means_itself() -> None:
    edges: Edges = {"k": read("a.[x]"), "w": linear("a.[x]"), "l": read("a.x"), "v": linear("a.x")}
    found = modules({"one": ("k", "w"), "two": ("l", "v")}, edges).instructions(["one"])
    assert found.rules == (skip("a.[[]x]"),)


def test_the_model_itself() -> None:
    edges: Edges = {"k": read(""), "w": linear(""), "l": read("x"), "v": linear("x")}
    found = modules({"one": ("k", "w"), "two": ("l", "v")}, edges)
    assert found.path("one") == "" and found.instructions(["one"]).rules == (skip(""),)


def test_a_weight_of_two_operators_is_told_by_the_input() -> None:
    edges: Edges = {"k": read("a"), "l": read("b"), "w": linear("a") + linear("b")}
    found = modules({"one": ("k", "w"), "two": ("l", "w")}, edges)
    assert (found.path("one"), found.path("two")) == ("a", "b")
    assert found.instructions(["two"]).rules == (skip("b"),)


@pytest.mark.parametrize(
    "edges",
    [{}, {"k": read("a"), "w": linear("b")}, {"k": read("a", "b"), "w": linear("a") + linear("b")}],
    ids=["nothing said", "no operator reads both", "two that do"],
)
def test_unknown(edges: Edges) -> None:
    found = modules({"one": ("k", "w")}, edges)
    assert found.path("one") is None and found.instructions(["one"]) == Instructions(unknown=("one",))


def test_a_site_of_a_later_call_is_that_of_the_first() -> None:
    found = modules({"one": ("k@1", "w")}, {"k": read("a"), "w": linear("a")})
    assert found.path("one") == "a"


def test_a_file_that_says_nothing() -> None:
    graph = Graph()
    sites = Sites(graph.model(graph.op("Relu", graph.input(2))))
    assert sites.edges == {} and sites.key("x") is None


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("a__w__codes", "a.w"), ("a__w__codes_t", "a.w"), ("a__w__codes_t_int4", "a.w"), ("a__w__codes_", "a.w"),
        ("a__w__codes__int4", "a.w"), ("a__w__codes_t_", "a.w"), ("a__w__scale", None), ("b__codes", None),
    ],
)  # fmt: skip
def test_codes_by_the_names_that_export_gives(name: str, label: str | None) -> None:
    model = types.SimpleNamespace(graph=types.SimpleNamespace(initializers={name: None}), metadata_props={})
    edges = (Edge(path="x", kind="conv", ordinal=1, operand="y"),)
    local = LocalSite(name="w", role="weight", spec=QuantSpec(), edges=edges)
    plan = Plan(recipe="int8", target="onnxruntime", sites=(Site(owner="a", local=local, reason=""),))
    write_sites(model, plan, ["a.w"], ["other@2"])
    said = json.loads(model.metadata_props[SITES])
    assert said["codes"] == ({name: label} if label else {})
    assert said["sites"] == ({"a.w": [["a.x", "conv", 1, "y"]]} if label else {}), "only what the file holds"
