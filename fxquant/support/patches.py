"""Every function of torch that fxquant replaces: what, why, on which versions it was tried, whom it serves, the undo.

It stands in the lowest room, since operators, captures and the backend replace one each. Two rules hold for all:

- **Guard.** Each entry of `PATCHES` calls torch's own function, unless the thread that calls is inside `Patch.acting`
  (a context variable says so), or, for those that are `always`, unless the graph at hand is ours: holds operators of
  ours, or is compiled by a backend of ours.
  So what anybody else compiles or exports, before, after or in another thread meanwhile, is what torch makes of it.
- **Undo.** The replacement is put in the function's place by the first that acts, and taken out by the last. Where
  somebody has replaced it once more, it is left where it is: there it calls torch's own function.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import torch

from fxquant.support.conversions import in_vectors
from fxquant.support.digest import source_digest

# Called with torch's own function and the arguments of the call.
Instead = Callable[..., Any]


class Patch:
    """One replaced function: ``module:Class.name``, or ``module:name``.

    Attributes:
        place: the function.
        why: what it is replaced for.
        tried: the versions of torch that it was tried on; in brackets, those whose sources were read for it.
        serves: whose calls reach ``instead``.
        instead: what these calls reach; None where `acting` is given it.
    """

    def __init__(
        self, place: str, *, why: str, tried: str, serves: str, instead: Instead | None = None, always: bool = False
    ) -> None:
        self.place, self.why, self.tried, self.serves, self.instead = place, why, tried, serves, instead
        self._asked: ContextVar[Instead | None] = ContextVar(place, default=instead if always else None)
        self._lock = threading.Lock()
        self._users = 0
        self._own: Callable[..., Any] | None = None  # torch's, while ours is in its place
        self._ours: Callable[..., Any] | None = None

    @contextlib.contextmanager
    def acting(self, instead: Instead | None = None) -> Iterator[None]:
        """Inside, in this thread, the function is replaced."""
        self.put()
        token = self._asked.set(instead or self.instead)
        try:
            yield
        finally:
            self._asked.reset(token)
            self.take()

    def put(self) -> None:
        """Puts the replacement in the function's place, where it is not."""
        with self._lock:
            self._users += 1
            owner, name = self._owner()
            if self._users == 1 and vars(owner)[name] is not self._ours:
                self._own = vars(owner)[name]
                self._ours = self._guarded(self._own)
                setattr(owner, name, self._ours)

    def take(self) -> None:
        """Undoes one `put`; the last puts torch's function back."""
        with self._lock:
            self._users -= 1
            owner, name = self._owner()
            if not self._users and vars(owner)[name] is self._ours:
                setattr(owner, name, self._own)
                self._own = self._ours = None

    def _owner(self) -> tuple[Any, str]:
        module, _, path = self.place.partition(":")
        *classes, name = path.split(".")
        return functools.reduce(getattr, classes, importlib.import_module(module)), name

    def _guarded(self, own: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(own)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            instead = self._asked.get() if self._ours is guarded else None
            return own(*args, **kwargs) if instead is None else instead(own, *args, **kwargs)

        return guarded


# ---------------------------------------------------------------- exports


def _enter_disabled(enter: Callable[..., Any], self: torch.autocast) -> Any:
    wanted, self._enabled = self._enabled, False
    try:
        return enter(self)
    finally:
        self._enabled = wanted


NO_AUTOCAST = Patch(
    "torch.amp.autocast_mode:autocast.__enter__",
    why="Autocast is a way to train: an exported graph computes in the precision of the parameters.",
    tried="2.13 (2.11, 2.14)",
    serves="torch.export of ours",
    instead=_enter_disabled,
)


def _call_region(compile_and_call: Callable[..., Any], fn: Any, args: Any, kwargs: Any = None) -> Any:
    if fn.__name__ != "_invoke_subgraph_placeholder_wrapper":
        return compile_and_call(fn, args, kwargs)
    region, given, named = args
    return region(*given, **named)


def _call_placeholder(_: Callable[..., Any], region: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return region(*args, **kwargs)


_WHY_REGIONS = "A region that is compiled once for all its calls has sites of its own in each: it is traced through."
_COMPILES = hasattr(torch._higher_order_ops.utils, "_hop_compile_and_call")  # not before torch 2.13
REGIONS = Patch(
    "torch._higher_order_ops.utils:_hop_compile_and_call"
    if _COMPILES
    # By this one Dynamo knows a region: what another thread compiled before an export may be compiled again.
    else "torch._higher_order_ops.invoke_subgraph:invoke_subgraph_placeholder",
    why=_WHY_REGIONS,
    tried="2.13 (2.11, 2.14)",
    serves="torch.export of ours",
    instead=_call_region if _COMPILES else _call_placeholder,
)


def _in_this_thread(
    patch_method: Callable[..., None], self: Any, cls: type, name: str, new_fn: Callable[..., Any], **kwargs: bool
) -> None:
    own, tracing = getattr(cls, name), threading.get_ident()

    @functools.wraps(new_fn)
    def traced(*given: Any, **named: Any) -> Any:
        return (new_fn if threading.get_ident() == tracing else own)(*given, **named)

    patch_method(self, cls, name, traced, **kwargs)


MODULE_CALLS = Patch(
    "torch.fx._symbolic_trace:_Patcher.patch_method",
    why="While torch.export traces, every module that any thread calls is entered into its trace, by a method of "
    "`torch.nn.Module` that it replaces. Here only those that this thread calls are.",
    tried="2.13 (2.11, 2.14)",
    serves="torch.export of ours",
    instead=_in_this_thread,
)

# ---------------------------------------------------------------- compiles of ours

_filled = [0, 0, 0]


def _fill_once(fill: Callable[..., None], self: Any) -> None:
    from torch._inductor import utils
    from torch._inductor.codegen import common

    rules, pointwise = utils.op_dtype_propagation_rules, common.pointwise_overrides_data
    tables = [len(rules), len(pointwise), len(utils.boolean_ops())]
    if tables != _filled or not vars(self):
        fill(self)
        _filled[:] = tables


DTYPE_RULES = Patch(
    "torch._inductor.dtype_propagation:DtypePropagationOpsHandler.__init__",
    why="Inductor's rules of dtypes are one object a process, which it fills anew for each operation that it "
    "generates: 76 µs, 14,000 times in a compile of four layers of a transformer. Here it is filled where a table that "
    "it is made from grew.",
    tried="2.11, 2.13, 2.15",
    serves="Inductor at work on a graph of our backend",
    instead=_fill_once,
)

_CALL = "async_compile.cpp_pybinding("


def _define_and_compile(
    define: Callable[..., Any], self: Any, kernel_name: str, kernel_body: str, *args: Any, **kwargs: Any
) -> Any:
    from torch._inductor.async_compile import AsyncCompile, get_compile_threads

    if kernel_body.startswith(_CALL) and get_compile_threads() > 1:
        call = ast.parse(kernel_body.strip(), mode="eval").body
        assert isinstance(call, ast.Call), "a call of async_compile.cpp_pybinding"
        AsyncCompile().cpp_pybinding(*map(ast.literal_eval, call.args))
    return define(self, kernel_name, kernel_body, *args, **kwargs)


COMPILE_EARLY = Patch(
    "torch._inductor.codegen.wrapper:PythonWrapperCodegen.define_kernel",
    why="Inductor generates the code of all kernels of a graph, then hands them to the compiler. Handed over each as "
    "it is done, they are compiled while Python generates the next: a quantized graph has twice the nodes of a plain "
    "one with as many kernels. Inductor asks for the same source again later, and is given the compilation under way.",
    tried="2.13, 2.15 (2.11)",
    serves="Inductor at work on a graph of our backend",
    instead=_define_and_compile,
)


def _with_ours(find: Callable[..., Any], self: Any) -> Any:
    ours = [n for n in self.module.graph.nodes if str(n.target) == "fxquant.integer_convolution.default"]
    was = [node.target for node in ours]
    try:
        for node in ours:
            node.target = torch.ops.aten.convolution.default
        found = find(self)
    finally:
        for node, target in zip(ours, was, strict=True):
            node.target = target
    reached = set(found)
    for node in self.module.graph.nodes:
        if getattr(node.meta.get("val"), "ndim", 0) > 3 and any(source in reached for source in node.all_input_nodes):
            reached.add(node)
            if str(node.target).startswith("fxquant."):
                found.add(node)
    return found


CHANNELS_LAST = Patch(
    "torch._inductor.graph:GraphLowering.find_nodes_prefer_channels_last",
    why="Inductor stores with its channels last what surrounds a convolution, which it knows by the name of torch's "
    "own. Around `fxquant::integer_convolution` it left them first, also in what is saved, and each convolution of "
    "backward turned its operands around: a step of a small CNN took 1.12 of plain, 0.93 as here. So did codes and "
    "masks that stand after the last convolution, where Inductor ends, as those of ReLUs do, which are backward's: so "
    "the loops of a bf16 ResNet's backward took 27 ms of a step of 183, 20 to 23 as here.",
    tried="2.13",
    serves="Inductor at work on a graph of our backend",
    instead=_with_ours,
)

CONVERSIONS = Patch(
    "torch._inductor.codegen.cpp:CppVecKernel.get_to_dtype_expr",
    why="In loops with halves, whose vectors hold twice as many numbers as a float's, codes and sums of integers were "
    "converted number by number: 16 times the time of a vector's. A bf16 step of a transformer spent 10 ms of 377 so.",
    tried="2.13",
    serves="Inductor at work on a graph of our backend",
    instead=in_vectors,
)

SCHEDULE = Patch(
    "torch._inductor.graph:GraphLowering.compile_to_module",
    why="`fxquant.cost` reads what Inductor has scheduled, and stops before kernels are written.",
    tried="2.13, 2.15",
    serves="graphs that `fxquant.cost` compiles",
)

# ---------------------------------------------------------------- buckets of DistributedDataParallel

# Cuts a graph into buckets: called with it, its inputs, and what compiles each part.
Split = Callable[[torch.fx.GraphModule, Sequence[Any], Callable[..., Any]], Callable[..., Any]]
_SPLIT: ContextVar[Split | None] = ContextVar("how the graph in hand is cut", default=None)


def quantizes_first(backend: Callable[..., Any]) -> Callable[..., Any]:
    """Marks a backend that hands its quantized graph to `in_buckets`."""
    vars(backend).update(fxquant_buckets=True)
    return backend


def _quantize_then_cut(cut: Callable[..., Any], self: Any, gm: Any, inputs: Sequence[Any], **options: Any) -> Any:
    backend = self.backend_compile_fn
    inner = getattr(backend, "_torchdynamo_orig_backend", backend)
    if not hasattr(getattr(inner, "compiler_fn", inner), "fxquant_buckets"):
        return cut(self, gm, inputs, **options)

    def split(quantized: torch.fx.GraphModule, inputs: Sequence[Any], compile_part: Callable[..., Any]) -> Any:
        self.backend_compile_fn = compile_part
        return cut(self, quantized, inputs)

    token = _SPLIT.set(split)
    try:
        return backend(gm, inputs, **options)
    finally:
        _SPLIT.reset(token)


def in_buckets(gm: torch.fx.GraphModule, inputs: Sequence[Any], compile_part: Callable[..., Any]) -> Callable[..., Any]:
    """A quantized graph compiled as a whole or, where torch cuts the graph in hand, in its parts."""
    split = _SPLIT.get()
    if split is None:
        return compile_part(gm, inputs)
    placeholders = gm.graph.find_nodes(op="placeholder")
    for node, value in zip(placeholders, inputs, strict=True):
        node.meta["example_value"] = value  # by which parameters are told, and weighed
    try:
        return split(gm, inputs, compile_part)
    finally:
        for node in placeholders:
            node.meta.pop("example_value", None)


BUCKETS = Patch(
    "torch._dynamo.backends.distributed:DDPOptimizer.compile_fn",
    why="torch cuts the graph of a model in DistributedDataParallel where a bucket of gradients is full, before any "
    "backend sees it. That parts operators from the bind of their state. Here the graph is quantized whole, then cut.",
    tried="2.13",
    serves="graphs that our backends compile, from the first model prepared on",
    instead=_quantize_then_cut,
    always=True,
)

# ---------------------------------------------------------------- caches


def _with_sources(init: Callable[..., None], self: Any, gm: torch.fx.GraphModule, *args: Any, **kwargs: Any) -> None:
    if _holds_our_operators(gm):
        self.fxquant = source_digest()
    init(self, gm, *args, **kwargs)


def _holds_our_operators(gm: torch.fx.GraphModule) -> bool:
    graphs = (module.graph for module in gm.modules() if isinstance(module, torch.fx.GraphModule))
    return any(n.op == "call_function" and str(n.target).startswith("fxquant.") for g in graphs for n in g.nodes)


CACHE_KEY = Patch(
    "torch._functorch._aot_autograd.autograd_cache:AOTAutogradCacheDetails.__init__",
    why="torch's cache of traced graphs knows an operator by its name: after an upgrade of fxquant it would replay "
    "what plain `backend='inductor'` traced of the old one. So the digest of our sources is in the keys of graphs with "
    "operators of ours. `torch.compiler.config.cache_key_tag` would change all keys, and in torch 2.13 is a setting of "
    "one thread; no key holds the table of decompositions or an operator's tags; uuids of passes are in all keys.",
    tried="2.13 (2.11, 2.14)",
    serves="graphs that hold operators of ours, from the first that Dynamo meets",
    instead=_with_sources,
    always=True,
)

PATCHES: tuple[Patch, ...] = (
    NO_AUTOCAST,
    REGIONS,
    MODULE_CALLS,
    DTYPE_RULES,
    COMPILE_EARLY,
    CHANNELS_LAST,
    CONVERSIONS,
    SCHEDULE,
    BUCKETS,
    CACHE_KEY,
)

OTHERS: Mapping[str, str] = {
    "fxquant/backend/inductor/lowerings.py: register_lowering": (
        "Inductor's table of lowerings has entries for our operators, from our first compile on. No other graph reads "
        "them; `torch._inductor.lowering.lowerings.pop(op)` undoes one."
    ),
    "fxquant/backend/inductor/lowerings.py: buffer.simplify_and_reorder": (
        "Set on single buffers that a lowering of ours has just made; gone with the graph."
    ),
    "fxquant/ops/plain_inductor.py: decompositions.update": (
        "Inductor's table of decompositions has entries for our operators, from the first that Dynamo meets. No other "
        "graph reads them; `fxquant.ops.plain_inductor.forget` takes them out."
    ),
    "fxquant/backend/inductor/compiling.py: gc.set_threshold": (
        "Old objects are looked at less often in the whole process while a graph of ours compiles: Python knows no "
        "threshold of one thread. Put back by the last compile, if nobody has set others meanwhile. torch 2.15 does "
        "so for every backend."
    ),
    "fxquant/backend/inductor/step.py: pgo.get_code_state": (
        "What Dynamo learnt of sizes while `fxquant.cost` traced is forgotten; other threads' compiles wait meanwhile."
    ),
    "fxquant/prepared/unfused.py: mha._is_fastpath_enabled": (
        "Off while torch.export runs one of a prepared model's layers of attention, then what it was. Under Dynamo "
        "only the trace sees the change."
    ),
    "fxquant/prepared/optimizers.py: register_optimizer_step_post_hook": (
        "From the first model with learned ranges on: warns once of a model whose ranges no optimizer holds. Changes "
        "no optimizer; `unwatch_optimizers` there removes it."
    ),
    "fxquant/backend/reuse.py: register_optimizer_step_post_hook": (
        "With options={'reuse_weights': True}: drops what was computed from the parameters that an optimizer has "
        "stepped. Changes no optimizer; `unwatch_optimizers` there removes it."
    ),
}
"""What else of fxquant is in a user's process: file and call → what it does to whom, and the undo."""
