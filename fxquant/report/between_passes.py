"""The graphs of a prepared model between two passes: what each one did, and what it left."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from fxquant.capture.aside import compiled_aside, evaluating, untouched
from fxquant.capture.dynamo import capture
from fxquant.capture.exported import exported_graph
from fxquant.errors import InvalidArgument
from fxquant.graph.bodies import nested_graphs
from fxquant.passes.base import Pass, run_all
from fxquant.passes.pipelines import COMPILED, export_passes, training_passes
from fxquant.passes.stages import CAPTURED, EXPORT, Stage
from fxquant.prepared.bound_forward import exporting
from fxquant.prepared.root import require_plan, unwrap
from fxquant.spec.recipes import get_recipe
from fxquant.targets.profiles import get_profile

Passes = Sequence[tuple[Stage, Pass]]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One pass over one graph, or the capture before the first.

    Attributes:
        number: of the graph, from 1: a model whose code Dynamo cannot follow has several.
        graph: one line a node; None where the pass changed nothing.
    """

    number: int
    stage: str
    name: str
    rewrites: int = 0
    declines: tuple[str, ...] = ()
    seconds: float = 0.0
    graph: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**vars(self), "declines": list(self.declines)}

    def __str__(self) -> str:
        edits = "1 rewrite" if self.rewrites == 1 else f"{self.rewrites} rewrites"
        heading = f"graph {self.number}, {self.stage}: {self.name}, {edits}, {self.seconds * 1e3:.1f} ms"
        told = [heading, *(f"  declined {each}" for each in self.declines)]
        return "\n".join(told if self.graph is None else [*told, self.graph])


def steps(
    model: nn.Module, args: tuple[Any, ...], *, export: bool = False, until: str | None = None
) -> tuple[Step, ...]:
    """What each pass does to the graphs of a prepared model, up to the pass named ``until``, in the order of running.

    The model runs once, in its mode, and stays as it was. ``export``: the graph and the passes of `fxquant.export_onnx`
    instead of those of a compile; ranges must be set then.

    Raises:
        InvalidArgument: not prepared; no such pass.
    """
    plan = require_plan(model, "passes")
    profile, plain = get_profile(plan.target), unwrap(model)
    training = training_passes(get_recipe("int8"), profile, stateless=False)
    passes = [(CAPTURED, each) for each in (training if export else (*training, *COMPILED))]
    passes += [(EXPORT, each) for each in export_passes(profile)] if export else []
    known = [each.name for _, each in passes]
    if until is not None and until not in known:
        raise InvalidArgument(f"until must name a pass: got {until!r}. They are {', '.join(known)}.")
    chosen = passes if until is None else passes[: known.index(until) + 1]
    return tuple(_exported(plain, args, chosen) if export else _compiled(plain, args, chosen))


def _compiled(model: nn.Module, args: tuple[Any, ...], passes: Passes) -> list[Step]:
    """The graphs that Dynamo makes of one call."""
    found: list[Step] = []
    graphs: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        graphs.append(capture(gm, inputs))
        found.extend(steps_of(graphs[-1], passes, len(graphs)))
        return gm.forward

    with untouched(model), compiled_aside(model, backend, dynamic=False) as compiled:
        compiled(*args)
    return found


def _exported(model: nn.Module, args: tuple[Any, ...], passes: Passes) -> Iterator[Step]:
    with evaluating(model), exporting(), torch.no_grad():
        gm = exported_graph(model, args, {}, None)
    return steps_of(gm, passes, 1)


def steps_of(gm: fx.GraphModule, passes: Passes, number: int) -> Iterator[Step]:
    """What is captured, then what each pass does to it; ``number`` is the graph's."""
    yield Step(number=number, stage=CAPTURED.name, name="captured", graph=_drawn(gm))
    for stage, each in passes:
        result = run_all((each,), gm, stage)
        yield Step(
            number=number,
            stage=stage.name,
            name=each.name,
            rewrites=result.rewrites,
            declines=tuple(f"{decline.node}: {decline.reason}" for decline in result.declines),
            seconds=result.seconds,
            graph=_drawn(gm) if result.modified else None,
        )


def _drawn(gm: fx.GraphModule, indent: str = "  ") -> str:
    return "\n".join(_lines(gm, indent))


def _lines(gm: fx.GraphModule, indent: str) -> Iterable[str]:
    """One line a node, ``name = operator(operands)  dtype[sizes]``; a body stands, further in, under what runs it."""
    for node in gm.graph.nodes:
        if node.op == "output":
            yield f"{indent}return {node.args[0]}"
            continue
        given = [*map(str, node.args), *(f"{name}={value}" for name, value in node.kwargs.items())]
        call = f"{node.target}({', '.join(given)})" if node.op == "call_function" else f"{node.op} {node.target}"
        yield f"{indent}{node.name} = {call}{_value(node)}"
        for body in nested_graphs(gm, node) if node.op == "call_function" else ():
            yield from _lines(body, indent + "    ")


def _value(node: fx.Node) -> str:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return ""
    return f"  {str(value.dtype).removeprefix('torch.')}[{', '.join(map(str, value.shape))}]"
