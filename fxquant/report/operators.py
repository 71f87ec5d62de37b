"""The operators of a prepared model as its graphs show them, with the sites on what they read: plain data."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import fx, nn

from fxquant.capture.aside import untouched
from fxquant.capture.dynamo import dynamo_graphs
from fxquant.errors import FxquantError, InvalidArgument
from fxquant.graph.dependence import changed_in_place, constant_nodes
from fxquant.graph.frames import user_line
from fxquant.graph.kinds import bias_of, kind_of, operands, unit_end
from fxquant.graph.lift import Lifting, Operand, lift
from fxquant.graph.meta import region_of, source_of
from fxquant.graph.moves import PARTING, passes_values
from fxquant.graph.nodes import call_nodes, is_bind, is_state, packet
from fxquant.graph.views import Bind, Item
from fxquant.passes.base import run_all
from fxquant.passes.pipelines import normalizing_passes
from fxquant.plan.plan import Declined, Plan, Site
from fxquant.plan.positions import enclosing, modules_around, positions
from fxquant.plan.unreached import left_out
from fxquant.prepared.bound_forward import bound_forward
from fxquant.prepared.frame_marks import frame_marks
from fxquant.report.forecast import Place, absolute, place_of
from fxquant.targets.profiles import get_profile

aten = torch.ops.aten

# Kinds whose kernels have BatchNorm and activation in them, where the target's profile says that it fuses those.
_FUSING = frozenset({"conv", "conv_transpose", "add"})


@dataclass(frozen=True, kw_only=True)
class Wire:
    """One tensor that goes into an operator.

    Attributes:
        operand: which, as in `fxquant.graph.KINDS`; empty for arguments that no quantizer can stand on.
        source: index of the operator that makes it; None for a parameter or constant.
        site: key of the quantizer whose codes it carries, None for float.
        serves: the edge of the plan that it is, as the whole model names it; empty on the way there.
    """

    operand: str
    source: int | None
    site: str | None = None
    serves: str = ""


@dataclass(frozen=True, kw_only=True)
class Operator:
    """One call of a graph, an input of it (role "input") or what it gives back ("output").

    ``place`` tells which operator of the plan it is, None for those that no site serves; ``head`` the one whose kernel
    it is a part of, as a BatchNorm of its convolution's; ``kernel`` what it is expected to become; ``declined`` why
    the solver left it, or a part of it, in float.
    """

    role: Literal["input", "operator", "mover", "output"]
    label: str
    name: str
    module: str = ""
    source: str = ""
    place: Place | None = None
    head: Place | None = None
    kernel: str = ""
    declined: tuple[str, ...] = ()
    wires: tuple[Wire, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Captured:
    """What one run on example inputs shows beside the plan.

    Attributes:
        graphs: the operators of each graph, in execution order.
        same_tensor: site key → other sites that quantize the same tensor.
        results: operator → whether its result is quantized.
        served: operator → operand → key of the site that serves it: also one on the result that the operand reads.
        readers: the graphs themselves with the sites found in them.
        unread: modules with parameters that no graph reads: Dynamo ran them in Python, or the inputs not at all.
    """

    graphs: tuple[tuple[Operator, ...], ...]
    same_tensor: dict[str, tuple[str, ...]] = field(default_factory=dict)
    results: dict[Place, bool] = field(default_factory=dict)
    served: dict[Place, dict[str, str]] = field(default_factory=dict)
    readers: tuple[Reader, ...] = ()
    unread: tuple[str, ...] = ()


def capture_operators(
    model: nn.Module, plan: Plan, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None
) -> Captured:
    """Runs a prepared model once on example inputs, in float, and reads its graphs; the model stays as it was.

    Raises InvalidArgument for inputs that the model cannot run on.
    """
    readers = [Reader(gm, plan) for gm in _graphs(model, args, dict(kwargs or {}))]
    if readers:
        readers[0].arguments = tuple(inspect.signature(model.forward).parameters)
    by_tensor = [keys for reader in readers for keys in reader.keys_by_tensor() if len(keys) > 1]
    shared: dict[str, dict[str, None]] = {}
    for keys in by_tensor:
        for key in keys:
            shared.setdefault(key, {}).update(dict.fromkeys(other for other in keys if other != key))
    served: dict[Place, dict[str, str]] = {}
    for reader in readers:
        for place, operand, key in reader.served():
            served.setdefault(place, {}).setdefault(operand, key)
    graphs = (reader.operators() for reader in readers)
    return Captured(
        # A graph of marks alone: Dynamo broke off before the first operator.
        graphs=tuple(graph for graph in graphs if any(one.role in ("operator", "mover") for one in graph)),
        same_tensor={key: tuple(others) for key, others in shared.items()},
        results=_all_true(result for reader in readers for result in reader.results()),
        served=served,
        readers=tuple(readers),
        unread=tuple(one.where for one in left_out(model, [reader.gm for reader in readers])),
    )


def _all_true(results: Iterable[tuple[Place, bool]]) -> dict[Place, bool]:
    found: dict[Place, bool] = {}
    for place, result in results:
        found[place] = found.get(place, True) and result
    return found


def _graphs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[fx.GraphModule]:
    """The graphs as `fxquant.prepare` saw them: without sites, every module's frame marked with its path."""
    if not isinstance(args, tuple):
        raise InvalidArgument(
            f"args must be a tuple of example inputs: got {type(args).__name__}. Write (x,) for a single input."
        )
    try:
        with untouched(model):
            for module in model.modules():
                module.__dict__.pop("_compiled_call_impl", None)
                bound = bound_forward(module)
                if bound is not None:
                    del module.__dict__["forward"]
                    if bound.inner is not None:
                        module.__dict__["forward"] = bound.inner
            with frame_marks(model):
                graphs = dynamo_graphs(model, args, kwargs)
    except FxquantError:
        raise
    except Exception as error:
        raise InvalidArgument(
            f"args and kwargs must run through the model: got {type(error).__name__}: {str(error).rstrip('.')}. "
            "Give explain what was given to fxquant.prepare."
        ) from error
    for gm in graphs:
        run_all(normalizing_passes(), gm)
    return graphs


class Reader:
    """One graph and the sites of the plan in it."""

    def __init__(self, gm: fx.GraphModule, plan: Plan) -> None:
        self.gm, self.plan, self.graph = gm, plan, gm.graph
        self.fuses = get_profile(plan.target).fuses
        self.constants = constant_nodes(self.graph)
        self.around = modules_around(gm)
        self.located = _locate(gm, plan)
        self.carried: dict[fx.Node, Site] = {}  # a value that is codes for all its users → whose
        self.lifted: dict[fx.Node, Site] = {}  # an op that moves codes → whose
        self.sources: dict[Operand, fx.Node] = {}
        self.arguments: tuple[str, ...] = ()  # of the model's forward, where the graph begins there
        self._follow()
        self.heads = self._heads()

    def _follow(self) -> None:
        """Finds the tensor of every site, as `fxquant.passes.insert_fake_quantize` does."""
        changed = changed_in_place(self.graph)
        by_site: dict[str, list[Operand]] = {}
        for operand, (site, _) in self.located.items():
            by_site.setdefault(site.key, []).append(operand)
        for found in by_site.values():
            site = self.located[found[0]][0]
            if site.local.role == "output":
                ends = {operand: unit_end(operand[0], self.fuses) for operand in found}
                self.sources.update(ends)
                self.carried.update(dict.fromkeys(ends.values(), site))
            elif site.local.role == "weight":
                self.sources.update((operand, operands(operand[0])[operand[1]]) for operand in found)
            else:
                lifting = lift(found, lambda n: passes_values(n) and n.all_input_nodes[0] not in changed)
                self.sources.update((operand, lifting.source(operand)) for operand in found)
                self.lifted.update(dict.fromkeys(lifting.lifted, site))
        for node in call_nodes(self.graph):
            if passes_values(node) and node.all_input_nodes and node.all_input_nodes[0] in self.carried:
                self.carried.setdefault(node, self.carried[node.all_input_nodes[0]])

    def keys_by_tensor(self) -> list[list[str]]:
        """Keys of the sites on each quantized tensor."""
        found: dict[fx.Node, dict[str, None]] = {}
        for operand, source in self.sources.items():
            found.setdefault(source, {})[self.located[operand][0].key] = None
        return [list(keys) for keys in found.values()]

    def served(self) -> Iterable[tuple[Place, str, str]]:
        """Operator, operand and site key, for every operand that is quantized."""
        for node, place in {node: place for (node, _), (_, place) in self.located.items()}.items():
            for name, value in operands(node).items():
                key = self.site(node, name, value)
                if key is not None:
                    yield place, name, key

    def results(self) -> Iterable[tuple[Place, bool]]:
        """Whether the result of each operator of the plan is quantized, behind what is fused into it."""
        lifting = Lifting(set(self.located), set(self.lifted))
        needs = get_profile(self.plan.target).needs_output
        for (node, _), (_, place) in self.located.items():
            fused = place[1] in needs
            end = unit_end(node, self.fuses) if fused else node
            # Where the bias is a node of its own, what is quantized is its sum, and the product is not.
            yield place, (fused or not _adds_bias(node)) and (end in self.carried or lifting.covers(end))

    def _heads(self) -> dict[fx.Node, Place]:
        """What a runtime computes inside the kernel of the operator before it."""
        found: dict[fx.Node, Place] = {}
        for (node, _), (_, place) in self.located.items():
            end = unit_end(node, self.fuses) if place[1] in _FUSING else node
            while end is not node:
                found[end] = place
                end = end.all_input_nodes[0]
        return found

    def operators(self) -> tuple[Operator, ...]:
        """The graph's operators in execution order; what is computed from parameters alone is left out."""
        index: dict[fx.Node, int] = {}
        found: list[Operator] = []
        declined = declines_of(self.plan.declined)
        for node in self.graph.nodes:
            if node.op == "placeholder" and not is_state(node) and node.users:
                made = Operator(role="input", label=_input_name(node, self.arguments), name=node.name)
            elif node.op == "output":
                made = Operator(role="output", label="output", name=node.name, wires=self._wires(node, index))
            elif self._is_shown(node):
                part = Item.of(node)
                if part is not None and part.source in index:
                    index[node] = index[part.source]
                    continue
                made = Operator(
                    # What takes tensors apart is, like what moves values, no work worth a large box.
                    role="mover" if passes_values(node) or packet(node) in PARTING else "operator",
                    label=label_of(node),
                    name=node.name,
                    module=self.path(node),
                    source=user_line(node),
                    place=self._place(node),
                    head=self.heads.get(node),
                    declined=declined.get((node.name, user_line(node)), ()),
                    wires=self._wires(node, index),
                )
            else:
                continue
            index[node] = len(found)
            found.append(made)
        return tuple(found)

    def path(self, node: fx.Node) -> str:
        """The module that runs the node, as the whole model names it."""
        return str(self.around(node)[-1][0])

    def own_places(self) -> dict[fx.Node, Place]:
        """Every operator that placement knows, as the module that runs it counts it in one call, site or not."""
        found: dict[fx.Node, Place] = {}
        for (_, below, kind, ordinal), node in positions(self.gm).items():
            if not below:  # of all the calls around a node the innermost comes last
                found[node] = (self.path(node), kind, ordinal)
        return found

    def _is_shown(self, node: fx.Node) -> bool:
        if node.op != "call_function" or is_bind(node) or node in self.constants:
            return False
        value = node.meta.get("val")
        return any(isinstance(part, torch.Tensor) for part in torch.utils._pytree.tree_leaves(value))

    def _place(self, node: fx.Node) -> Place | None:
        names = (*operands(node), "output")
        return next((self.located[node, name][1] for name in names if (node, name) in self.located), None)

    def _wires(self, node: fx.Node, index: dict[fx.Node, int]) -> tuple[Wire, ...]:
        read = operands(node)
        wires = []
        for name, value in read.items():
            site = self.site(node, name, value)
            serves = str(self._edge(node, name)) if (node, name) in self.located else ""
            if value in index or value in self.constants:
                wires.append(Wire(operand=name, source=index.get(value), site=site, serves=serves))
        others = [value for value in node.all_input_nodes if value not in read.values() and value in index]
        wires += [Wire(operand="", source=index[v], site=self.site(node, "", v)) for v in others]
        return tuple(wires)

    def site(self, node: fx.Node, name: str, value: fx.Node) -> str | None:
        """Key of the quantizer whose codes the operand carries."""
        if (node, name) in self.located:
            return self.located[node, name][0].key
        if value in self.carried:
            return self.carried[value].key
        return self.lifted[node].key if node in self.lifted else None

    def _edge(self, node: fx.Node, name: str) -> str:
        path, kind, ordinal = self.located[node, name][1]
        return f"{path + '.' if path else ''}{kind}{ordinal}.{name}"


def _locate(gm: fx.GraphModule, plan: Plan) -> dict[Operand, tuple[Site, Place]]:
    """Every operand of the graph that a site of the plan serves; outer owners first, as in compiled graphs."""
    starts: dict[tuple[str, Any], str] = {}
    for node in call_nodes(gm.graph):
        bind = Bind.of(node)
        if bind is not None:
            starts.setdefault((enclosing(node, "")[-1].key, region_of(node)), bind.key)
    places = positions(gm)
    found: dict[Operand, tuple[Site, Place]] = {}
    for site in sorted(plan.sites, key=lambda site: len(site.owner)):
        for (key, region), path in starts.items():
            for edge in site.local.edges if path == site.owner else ():
                served = places.get((key, edge.path, edge.kind, edge.ordinal))
                if served is not None and region_of(served) == region:
                    found.setdefault((served, edge.operand), (site, place_of(absolute(site, edge))))
    return found


def declines_of(declined: Iterable[Declined]) -> dict[tuple[str, str], tuple[str, ...]]:
    """(operator, source line) → reasons."""
    found: dict[tuple[str, str], tuple[str, ...]] = {}
    for one in declined:
        found[one.where, one.source] = (*found.get((one.where, one.source), ()), one.reason)
    return found


def _adds_bias(node: fx.Node) -> bool:
    if packet(node) is aten.linear:
        return bias_of(node) is not None
    return packet(node) in (aten.addmm, aten.baddbmm)


def label_of(node: fx.Node) -> str:
    kind = kind_of(node)
    if kind is not None:
        return kind.name
    target = packet(node)
    return getattr(target, "__name__", str(target)).rsplit(".", 1)[-1]


def _input_name(node: fx.Node, arguments: tuple[str, ...]) -> str:
    """As the user's forward calls it, where Dynamo says so."""
    named = re.fullmatch(r"L\['(.+?)'\](.*)", source_of(node))
    if named is None:
        return node.name
    name, rest = named.groups()
    number = re.fullmatch(r"\[(\d+)\](.*)", rest) if name == "args" else None
    if number is not None and int(number[1]) < len(arguments):
        return arguments[int(number[1])] + number[2]
    keyword = re.fullmatch(r"\['(.+?)'\](.*)", rest) if name == "kwargs" else None
    return "".join(keyword.groups() if keyword else (name, rest))
