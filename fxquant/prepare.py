"""`prepare` puts a plan and its quantizers on a model; `strip` takes them off again."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn

from fxquant.capture import dynamo_graphs, own_code, untouched
from fxquant.errors import FxquantError, InvalidArgument, UnsupportedModel
from fxquant.graph import is_bind, kind_of, user_line
from fxquant.lift import Operand
from fxquant.ops.binding import bind
from fxquant.passes.base import run_all
from fxquant.passes.pipelines import normalizing_passes
from fxquant.place import Exceptions, Placement, place, weighted
from fxquant.plan import Declined, Edge, LocalSite, Plan, Site
from fxquant.profiles import Profile, get_profile
from fxquant.recipes import Recipe, get_recipe
from fxquant.regions import unreached
from fxquant.resolve import edges_of, enclosing, modules_around, positions
from fxquant.rules import Rule, Rulebook
from fxquant.spec import Range
from fxquant.state import (
    ATTRIBUTE,
    BoundForward,
    QuantizerSet,
    Root,
    bound_forward,
    freeze_batch_norm,
    owners,
    plan_of,
)


class Measured(abc.ABC):
    """A recipe that is found by running the model: `prepare` attaches ``base``, then calls `fit`."""

    base: str | Recipe

    @abc.abstractmethod
    def fit(self, model: nn.Module) -> None:
        """Gives a model that was just prepared by ``base`` its formats."""


def prepare(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    recipe: str | Recipe | Measured = "int8",
    target: str = "onnxruntime",
    rules: Iterable[Rule] | None = None,
    ranges: str | Range | None = None,
) -> nn.Module:
    """Decides which tensors of ``model`` are quantized for ``target`` and attaches their state, in place.

    The model runs once on the example inputs under Dynamo; parameters, buffers, modes and random state are left
    as they were. Compiled with ``backend="fxquant"`` it then trains quantized; run without compile it is still
    the float model. Returns the model.

    Args:
        model: any module that torch.compile can run, with floating-point parameters, not yet prepared.
        args: positional example inputs, a tuple; ``kwargs``: keyword ones.
        recipe: ``"int8"``, ``"w4a8"``, ``"int4_weight_only"`` (in groups of 32), a `Recipe`, or a `fxquant.Mixed` that
            measures formats on data.
        target: the runtime that the model will be deployed to: ``"onnxruntime"``, ``"openvino"``, ``"tensorrt"``, or
            ``"generic"`` for none in particular.
        rules: exceptions to the recipe, the first that matches decides: ``[fxquant.skip("head")]``.
        ranges: how activation ranges are found, if not as the recipe says: ``"moving_average"``, ``"delayed"`` (each
            step is quantized with the ranges that the step before left), a `MovingAverage`, or ``CurrentTensor()``
            (each batch has its own, which trains and cannot be exported).

    Raises:
        InvalidArgument: unknown recipe or target, a rule that matches nothing, a model prepared before, inputs the
            model cannot run on.
        UnsupportedModel: nothing to quantize, or parameters that are not floating point.
    """
    chosen, profile = _recipe(recipe).with_rules(rules or ()), get_profile(target)
    if ranges is not None:
        chosen = chosen.with_range(ranges)
    _check(model, args, kwargs)
    kwargs = dict(kwargs or {})
    plan = _make_plan(model, args, kwargs, chosen, profile)
    try:
        attach(model, plan)
        if isinstance(recipe, Measured):
            recipe.fit(model)
    except BaseException:
        detach(model)
        raise
    return model


def _recipe(recipe: str | Recipe | Measured) -> Recipe:
    if recipe == "mixed":
        raise InvalidArgument(
            "recipe 'mixed' must come with data and a budget: got its name alone. "
            "Write recipe=fxquant.Mixed(data=batches, weight_bytes=0.6)."
        )
    return get_recipe(recipe.base if isinstance(recipe, Measured) else recipe)


def strip(model: nn.Module) -> nn.Module:
    """Takes plan, quantizers and frozen BatchNorm modes off again: the float model, with its trained weights."""
    freeze_batch_norm(model, frozen=False)
    detach(model)
    return model


def detach(model: nn.Module) -> None:
    """Undoes `attach`, however far it came."""
    for _, module, _ in list(owners(model)):
        bound = bound_forward(module)
        if bound is not None:
            del module.__dict__["forward"]
            if bound.inner is not None:
                module.__dict__["forward"] = bound.inner
            bound.release()
        delattr(module, ATTRIBUTE)
    root = model.__dict__.get(Root.SLOT)
    if root is not None:
        root.detach()


def _check(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None) -> None:
    if not isinstance(model, nn.Module) or hasattr(model, "_orig_mod"):
        raise InvalidArgument(
            f"model must be a plain nn.Module: got {type(model).__name__}. Prepare first, torch.compile afterwards."
        )
    if not isinstance(args, tuple):
        raise InvalidArgument(
            f"args must be a tuple of example inputs: got {type(args).__name__}. Write (x,) for a single input."
        )
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise InvalidArgument(
            f"kwargs must be a mapping of names to example inputs: got {type(kwargs).__name__}. "
            "Settings of prepare, as recipe, are given by name."
        )
    compiled = [path or "the model itself" for path, module in model.named_modules() if _is_compiled(module)]
    if compiled:
        raise InvalidArgument(
            f"model must not be compiled yet: {compiled[0]} is. Prepare first, torch.compile or .compile() afterwards."
        )
    planned = [path or "the model itself" for path, module in model.named_modules() if plan_of(module) is not None]
    if planned or any(owners(model)):
        where = f"{planned[0]} has a plan" if planned else "it is a part of a prepared model"
        raise InvalidArgument(
            f"model must not be prepared twice: {where}. Call fxquant.strip on the prepared model first."
        )
    wrong = [(n, p.dtype) for n, p in model.named_parameters() if not (p.is_floating_point() or p.is_complex())]
    if wrong:
        name, dtype = wrong[0]
        raise UnsupportedModel(
            f"parameters must be floating point: got {dtype} for {name!r}. "
            "Prepare the float model, before any weight is quantized or packed."
        )


def _is_compiled(module: nn.Module) -> bool:
    return "_orig_mod" in module._modules or module._compiled_call_impl is not None


class _Marker:
    """A forward that only says which module's frame begins, while `prepare` looks at the graphs."""

    def __init__(self, module: nn.Module, path: str) -> None:
        self.module, self.path = module, path
        self.inner = module.__dict__.get("forward")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            bind(self.path, [], [])
        if self.inner is not None:
            return self.inner(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)


@contextlib.contextmanager
def frame_marks(model: nn.Module) -> Iterator[None]:
    """Inside, Dynamo's graphs show with a bind node where the frame of each module begins."""
    markers = [
        _Marker(module, path)
        for path, module in model.named_modules()
        if type(module).forward is not nn.Module.forward and not isinstance(module, torch.jit.ScriptModule)
    ]
    for marker in markers:
        call = own_code(_Marker.__call__, f"marker of {marker.path}")
        marker.module.__dict__["forward"] = types.MethodType(call, marker)
    try:
        yield
    finally:
        for marker in markers:
            del marker.module.__dict__["forward"]
            if marker.inner is not None:
                marker.module.__dict__["forward"] = marker.inner


def _make_plan(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], recipe: Recipe, profile: Profile
) -> Plan:
    with untouched(model), frame_marks(model):
        failed: Exception | None = None
        graphs: list[fx.GraphModule] = []
        try:
            graphs = dynamo_graphs(model, args, kwargs)
        except FxquantError:
            raise
        except Exception as error:
            failed = error
    if failed is not None:
        _blame(model, args, kwargs, failed)
    sites: dict[tuple[str, tuple[Edge, ...]], Site] = {}
    declined: list[Declined] = []
    for gm in graphs:
        run_all(normalizing_passes(), gm)
    layers = [node for gm in graphs for node in weighted(gm.graph, profile)]
    ends = (layers[0], layers[-1]) if layers else (None, None)
    book = Rulebook(recipe.rules)
    for gm in graphs:
        found = place(gm.graph, recipe, profile, Exceptions(book, modules_around(gm), ends))
        declined += (*found.described_declines(), *unreached(gm, profile))
        naming = _Naming(gm, sites)
        for placed in found.placed:
            naming.add(placed, declined)
    declined += left_out(model, graphs)
    _check_kinds(recipe, graphs, sites.values())
    book.check()
    if not sites:
        reasons = "; ".join(sorted({f"{d.where}: {d.reason}" for d in declined})) or "it runs no such operator"
        raise UnsupportedModel(
            f"model must hold an operator that {profile.name} runs on integers "
            f"({', '.join(sorted(profile.hard))}): found none to quantize ({reasons})."
        )
    return Plan(recipe=recipe.name, target=profile.name, sites=tuple(sites.values()), declined=tuple(declined))


def left_out(model: nn.Module, graphs: list[fx.GraphModule]) -> list[Declined]:
    """Modules none of whose own parameters any graph reads, as recurrent layers: Dynamo ran them in Python."""
    read: set[int] = set().union(*(gm.meta["parameters"] for gm in graphs))
    reason = "Dynamo made no graph of it on the example inputs: it stays float"
    own = ((path, [id(p) for p in module.parameters(recurse=False)]) for path, module in model.named_modules())
    return [Declined(where=path or "the model", reason=reason) for path, ids in own if ids and not read & set(ids)]


def _blame(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], failed: Exception) -> None:
    """Raises for a run under Dynamo that failed: runs the model again without, to tell whose fault it was."""
    try:
        with untouched(model), torch.no_grad():
            model(*args, **kwargs)
    except Exception as error:
        raise InvalidArgument(
            f"args and kwargs must run through the model: got {type(error).__name__}: {str(error).rstrip('.')}. "
            "Give prepare what the model's forward takes in training."
        ) from error
    raise UnsupportedModel(
        f"model must run under torch.compile: got {type(failed).__name__}: {str(failed).rstrip('.')}. "
        'It runs without; try torch.compile(model, backend="eager").'
    ) from failed


def _check_kinds(recipe: Recipe, graphs: list[fx.GraphModule], sites: Any) -> None:
    used = {edge.kind for site in sites for edge in site.local.edges}
    unmatched = sorted((recipe.kinds or frozenset()) - used)
    if unmatched:
        kinds = {kind.name for gm in graphs for kind in map(kind_of, gm.graph.nodes) if kind is not None}
        raise InvalidArgument(
            f"recipe {recipe.name!r} must match the model with each of its kinds: {', '.join(unmatched)} "
            f"matched no operator. The model has {', '.join(sorted(kinds)) or 'none of any kind'}."
        )


class _Naming:
    """Turns placements on nodes into sites on owners."""

    def __init__(self, gm: fx.GraphModule, sites: dict[tuple[str, tuple[Edge, ...]], Site]) -> None:
        self.sites = sites
        self.places = {(position[0], node): position for position, node in positions(gm).items()}
        self.root = next((enclosing(node, "")[0].path for node in gm.graph.nodes), "")
        self.taken: dict[str, set[str]] = {}  # names, by owner
        for site in sites.values():
            self.taken.setdefault(site.owner, set()).add(site.local.name)
        self.starts: dict[tuple[str, str | None], str] = {}
        for node in gm.graph.nodes:
            if is_bind(node):
                frame = enclosing(node, self.root)[-1]
                # Later binds in a frame are of modules whose forward was called by name, which begins no frame.
                self.starts.setdefault((frame.key, node.meta.get("region")), str(node.args[0]))

    def add(self, placed: Placement, declined: list[Declined]) -> None:
        first = placed.edges[0][0]
        owner = self._owner(placed.edges)
        if owner is None or self._is_of_repeated_module(placed):
            parts = self._parts(placed)
            for part in parts if len(parts) > 1 else ():
                self.add(part, declined)
            if len(parts) > 1:
                return
        if owner is None:
            where = " → ".join(frame.path for frame in enclosing(first, self.root)[1:]) or "the model's forward"
            declined.append(
                Declined(
                    where=first.name,
                    reason=f"a graph break or checkpoint lies between it and the start of {where}",
                    source=user_line(first),
                )
            )
            return
        key, path = owner
        edges = edges_of(self.places, key, placed.edges)
        if (path, edges) in self.sites:
            return  # another call of the same module: one quantizer serves both
        taken = self.taken.setdefault(path, set())
        local = LocalSite(name=_name(edges[0], taken), role=placed.role, spec=placed.spec, edges=edges)
        taken.add(local.name)
        self.sites[path, edges] = Site(
            owner=path, local=local, reason=placed.reason, source=user_line(first), matrix=placed.matrix
        )

    def _is_of_repeated_module(self, placed: Placement) -> bool:
        """Whether calls of one module read the weight, maybe as many as its input is long: each has its own site."""
        owners = [self._owner((edge,)) for edge in placed.edges]
        return placed.role == "weight" and len({owner and owner[1] for owner in owners}) == 1 < len(set(owners))

    def _parts(self, placed: Placement) -> list[Placement]:
        """One placement for each owner: quantizers of their own, which see the same tensor and find the same range."""
        groups: dict[tuple[object, object], list[Operand]] = {}
        for edge in placed.edges:
            groups.setdefault((self._owner((edge,)), edge[0].meta.get("region")), []).append(edge)
        return [dataclasses.replace(placed, edges=tuple(edges)) for edges in groups.values()]

    def _owner(self, operands: tuple[Operand, ...]) -> tuple[str, str] | None:
        """Call key and path of the innermost module whose frame starts in this graph and runs all the operators."""
        nodes = [node for node, _ in operands]
        regions = {node.meta.get("region") for node in nodes}
        if len(regions) > 1:
            return None
        region = next(iter(regions))
        shared = set.intersection(*({frame.key for frame in enclosing(node, self.root)} for node in nodes))
        for frame in reversed(enclosing(nodes[0], self.root)):
            if frame.key in shared and (frame.key, region) in self.starts:
                return frame.key, self.starts[frame.key, region]
        return None


def _name(edge: Edge, taken: set[str]) -> str:
    """``weight`` where the owner itself runs the operator, else with the operator's place in it."""
    own = not edge.path and edge.ordinal == 0 and edge.kind in ("conv", "linear", "embedding")
    if own and edge.operand not in taken:
        return edge.operand
    prefix = edge.path.replace(".", "_") + "_" if edge.path else ""
    name = f"{prefix}{edge.kind}{edge.ordinal}_{edge.operand}"
    while name in taken:
        name += "_"
    return name


def attach(model: nn.Module, plan: Plan) -> None:
    """Puts a plan, its quantizers and the forwards that bind them on a model; `detach` undoes it."""
    by_owner = plan.owners()
    modules = dict(model.named_modules())
    for path in by_owner:
        if hasattr(modules[path], ATTRIBUTE):
            raise UnsupportedModel(
                f"{path or 'model'} must not have an attribute {ATTRIBUTE!r} of its own: fxquant keeps state there. "
                "Rename it."
            )
    Root(model, plan).attach()
    devices = {path: next(modules[path].parameters(), torch.empty(0)).device for path in by_owner}
    for path, sites in by_owner.items():
        locals_ = tuple(site.local for site in sites)
        modules[path].add_module(ATTRIBUTE, QuantizerSet(locals_).to(devices[path]))
        modules[path].__dict__["forward"] = BoundForward(modules[path], locals_, plan.target).method
