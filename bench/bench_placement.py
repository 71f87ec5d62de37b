"""Time of placement on synthetic ATen graphs, to see that it grows with their nodes and no faster.

    python bench/bench_placement.py [--sizes 1000,4000,16000] [--graphs NAME,…] [--rounds 3] [--insert] [--out …]

A JSON line per graph and size, then a table: median seconds of `fxquant.plan.solver.place` (solve), of what `prepare`
does with its answer (name: positions, owners, sites) and, on demand, of `InsertFakeQuantize` on the sites (insert:
mostly fake tensors of what it adds), each with its ratio to the next smaller size. Graphs and sizes take turns;
Python's garbage collector waits, as with `timeit`. Before timing, the plan is held to be complete: every product has
all its operands quantized.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from machine import emit, environment
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from fxquant.graph.kinds import kind_of, operands
from fxquant.graph.lift import lift
from fxquant.graph.moves import passes_values
from fxquant.graph.nodes import call_nodes, is_bind
from fxquant.ops.marks import BIND
from fxquant.passes.captured.insert_fake_quantize import InsertFakeQuantize
from fxquant.plan.naming import Naming
from fxquant.plan.plan import Edge, FloatPlace, Site
from fxquant.plan.site_lists import register
from fxquant.plan.solver import Placements, place
from fxquant.spec.mode import Mode
from fxquant.spec.recipes import INT8
from fxquant.support.table import table
from fxquant.targets.profiles import ONNXRUNTIME

aten = torch.ops.aten
PHASES = ("solve", "name", "insert")


@dataclass
class Builder:
    """Appends ATen calls with fake values to a graph, block by block, each under a module of its own."""

    graph: fx.Graph = field(default_factory=fx.Graph)
    mode: FakeTensorMode = field(default_factory=FakeTensorMode)
    fakes: dict[tuple[int, ...], torch.Tensor] = field(default_factory=dict)
    last_input: fx.Node | None = None
    block: str = ""

    def fake(self, *shape: int) -> torch.Tensor:
        if shape not in self.fakes:
            with self.mode:
                self.fakes[shape] = torch.empty(shape)
        return self.fakes[shape]

    def input(self, *shape: int, state: bool = True) -> fx.Node:
        """A placeholder, in front of all calls."""
        behind = self.last_input or self.graph._root
        with self.graph.inserting_after(behind):
            node = self.graph.placeholder(f"in_{len(self.graph.nodes)}")
        node.meta.update(val=self.fake(*shape), state=state, source="")
        self.last_input = node
        return node

    def call(self, op: Any, *args: Any, shape: tuple[int, ...]) -> fx.Node:
        node = self.graph.call_function(op, args)
        node.meta["val"] = self.fake(*shape)
        self._describe(node)
        return node

    def begin(self, block: str) -> None:
        """The frame of another module begins."""
        self.block = block
        self._describe(self.graph.call_function(BIND, (block, [], [])))

    def _describe(self, node: fx.Node) -> None:
        if self.block:
            node.meta["nn_module_stack"] = {self.block: (f"L['self'].{self.block}", torch.nn.Module)}

    def conv(self, x: fx.Node, inputs: int, outputs: int) -> fx.Node:
        """Convolution, BatchNorm, ReLU."""
        weight, scales = self.input(outputs, inputs, 3, 3), [self.input(outputs) for _ in range(4)]
        shape = (2, outputs, 8, 8)
        y = self.call(aten.conv2d.default, x, weight, None, [1, 1], [1, 1], shape=shape)
        return self.call(aten.batch_norm.default, y, *scales, True, 0.1, 1e-5, False, shape=shape)

    def relu(self, x: fx.Node) -> fx.Node:
        return self.call(aten.relu.default, x, shape=tuple(x.meta["val"].shape))

    def linear(self, x: fx.Node, outputs: int) -> fx.Node:
        *rows, inputs = x.meta["val"].shape
        weight, bias = self.input(outputs, inputs), self.input(outputs)
        return self.call(aten.linear.default, x, weight, bias, shape=(*rows, outputs))


def residual(b: Builder, size: int) -> fx.Node:
    """Residual blocks; every fourth result is also read by six side branches through one max pool."""
    x = b.relu(b.conv(b.input(2, 8, 8, 8, state=False), 8, 8))
    for number in range(size):
        if len(b.graph.nodes) >= size:
            break
        b.begin(f"block{number}")
        y = b.conv(b.relu(b.conv(x, 8, 8)), 8, 8)
        x = b.relu(b.call(aten.add.Tensor, y, x, shape=(2, 8, 8, 8)))
        if number % 4 == 3:
            pooled = b.call(aten.max_pool2d.default, x, [3, 3], [1, 1], [1, 1], shape=(2, 8, 8, 8))
            for _ in range(6):
                x = b.call(aten.add.Tensor, b.conv(pooled, 8, 8), x, shape=(2, 8, 8, 8))
    return x


def dense(b: Builder, size: int) -> fx.Node:
    """Dense blocks of twelve layers, each of which reads the concat of all before it."""
    x = b.relu(b.conv(b.input(2, 8, 8, 8, state=False), 8, 8))
    number = 0
    while len(b.graph.nodes) < size:
        b.begin(f"dense{number}")
        number += 1
        features = [x]
        for layer in range(12):
            shape = (2, 8 * len(features), 8, 8)
            joined = b.call(aten.cat.default, list(features), 1, shape=shape) if layer else x
            features.append(b.relu(b.conv(joined, shape[1], 8)))
        x = b.call(aten.max_pool2d.default, features[-1], [3, 3], [1, 1], [1, 1], shape=(2, 8, 8, 8))
    return x


def transformer(b: Builder, size: int) -> fx.Node:
    """Attention and MLP; one mask-like table is reshaped once and read by every layer."""
    x, shape, heads = b.input(2, 6, 16, state=False), (2, 6, 16), (2, 4, 6, 4)
    shared = b.call(aten.view.default, b.input(2, 24, 4, state=False), list(heads), shape=heads)
    number = 0
    while len(b.graph.nodes) < size:
        b.begin(f"layer{number}")
        number += 1
        y = b.call(aten.layer_norm.default, x, [16], b.input(16), b.input(16), shape=shape)
        parts = []
        for _ in range(3):
            part = b.call(aten.view.default, b.linear(y, 16), [2, 6, 4, 4], shape=(2, 6, 4, 4))
            parts.append(b.call(aten.permute.default, part, [0, 2, 1, 3], shape=heads))
        parts[1] = b.call(aten.mul.Tensor, parts[1], shared, shape=heads)
        y = b.call(aten.scaled_dot_product_attention.default, *parts, shape=heads)
        y = b.call(aten.permute.default, y, [0, 2, 1, 3], shape=(2, 6, 4, 4))
        y = b.linear(b.call(aten.reshape.default, y, list(shape), shape=shape), 16)
        x = b.call(aten.add.Tensor, x, y, shape=shape)
        y = b.call(aten.layer_norm.default, x, [16], b.input(16), b.input(16), shape=shape)
        y = b.linear(b.call(aten.gelu.default, b.linear(y, 64), shape=(2, 6, 64)), 16)
        x = b.call(aten.add.Tensor, x, y, shape=shape)
    return x


GRAPHS: dict[str, Callable[[Builder, int], fx.Node]] = {
    "residual": residual,
    "dense": dense,
    "transformer": transformer,
}


def build(name: str, size: int) -> tuple[fx.GraphModule, Builder]:
    """A graph of at least ``size`` nodes, as `prepare` sees one."""
    builder = Builder()
    builder.graph.call_function(BIND, ("", [], []))
    builder.graph.output(GRAPHS[name](builder, size))
    gm = fx.GraphModule(torch.nn.Module(), builder.graph)
    gm.graph.lint()
    return gm, builder


def check(gm: fx.GraphModule, found: Placements) -> None:
    """Every operand of every product is quantized, by a site of its own or by one on what it reads."""
    by_role = {role: {e for p in found.placed if p.role == role for e in p.edges} for role in ("weight", "activation")}
    outputs = {node for p in found.placed if p.role == "output" for node, _ in p.edges}
    wanted = {(n, name) for n in products(gm) for name in operands(n)}
    lifting = lift(wanted, passes_values)
    for edge in wanted - by_role["weight"] - by_role["activation"]:
        source = lifting.source(edge)
        while source not in outputs:  # through the BatchNorm and ReLU that end the unit
            assert source.all_input_nodes and source.op == "call_function", f"{edge} has no quantizer"
            source = source.all_input_nodes[0]
    hard = set(products(gm))
    assert not [why for node, why in found.declined if node in hard]


def products(gm: fx.GraphModule) -> list[fx.Node]:
    """Convolutions, linear layers and attention."""
    kinds = ((node, kind_of(node)) for node in call_nodes(gm.graph))
    return [node for node, kind in kinds if kind is not None and kind.name in ("conv", "linear", "sdpa")]


def name_sites(gm: fx.GraphModule, found: Placements) -> list[Site]:
    """The sites as `prepare` names them."""
    sites: dict[tuple[str, tuple[Edge, ...]], Site] = {}
    declined: list[FloatPlace] = []
    naming = Naming(gm, sites)
    for placed in found.placed:
        naming.add(placed, declined)
    assert not declined, declined[0]
    return list(sites.values())


def bind_sites(gm: fx.GraphModule, builder: Builder, sites: list[Site]) -> None:
    """Puts the sites into the graph's bind nodes, in training, with inputs for their ranges."""
    by_owner: dict[str, list[Site]] = {}
    for site in sites:
        by_owner.setdefault(site.owner, []).append(site)
    for node in [node for node in gm.graph.nodes if is_bind(node)]:
        own = [site.local for site in by_owner.get(str(node.args[0]), [])]
        state = [builder.input(1) for local in own for _ in local.spec.range.state_names]
        node.args = (register(tuple(own)), [Mode.TRAIN] * len(own), state)


def measure(name: str, size: int, insert: bool) -> tuple[dict[str, float], int, int]:
    """Seconds of each phase on a new graph; its nodes and sites."""
    gm, builder = build(name, size)
    nodes, seconds = len(gm.graph.nodes), {}
    started = time.perf_counter()
    found = place(gm.graph, INT8, ONNXRUNTIME)
    seconds["solve"] = time.perf_counter() - started
    started = time.perf_counter()
    sites = name_sites(gm, found)
    seconds["name"] = time.perf_counter() - started
    if not insert:
        return seconds, nodes, len(sites)
    bind_sites(gm, builder, sites)
    started = time.perf_counter()
    result = InsertFakeQuantize(recipe=INT8, profile=ONNXRUNTIME).run(gm)
    seconds["insert"] = time.perf_counter() - started
    assert result.rewrites >= len(sites) and not result.declines, result.declines[:3]
    return seconds, nodes, len(sites)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="1000,4000,16000")
    parser.add_argument("--graphs", default=",".join(GRAPHS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--insert", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    sizes = [int(size) for size in options.sizes.split(",")]
    cases = [(name, size) for name in options.graphs.split(",") for size in sizes]
    for name, size in cases:
        gm, _ = build(name, size)
        check(gm, place(gm.graph, INT8, ONNXRUNTIME))
    runs = {case: [] for case in cases}
    for _ in range(options.rounds):
        for case in cases:
            gc.collect()
            gc.disable()
            runs[case].append(measure(*case, options.insert))
            gc.enable()
    rows, before, phases = [], {}, PHASES if options.insert else PHASES[:2]
    for (name, _), found in runs.items():
        row: dict[str, object] = {"graph": name, "nodes": found[0][1], "sites": found[0][2], "rounds": options.rounds}
        for phase in phases:
            seconds = statistics.median(each[0][phase] for each in found)
            row[f"{phase}_seconds"] = round(seconds, 5)
            row[f"{phase}_ratio"] = round(seconds / before[name, phase], 2) if (name, phase) in before else None
            before[name, phase] = seconds
        rows.append({**row, **environment()})
    emit(rows, options.out)
    header = ["graph", "nodes", "sites", *(f"{phase} [s] (ratio)" for phase in phases)]
    cells = [[r["graph"], r["nodes"], r["sites"], *(_cell(r, phase) for phase in phases)] for r in rows]
    print(table(header, cells))


def _cell(row: dict[str, Any], phase: str) -> str:
    ratio = row[f"{phase}_ratio"]
    return f"{row[f'{phase}_seconds']:.4f}" + (f" ({ratio:.1f})" if ratio else "")


if __name__ == "__main__":
    main()
