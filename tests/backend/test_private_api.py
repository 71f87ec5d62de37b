"""A canary: every private symbol of torch that the sources use, and what of it they rely on.

A new torch fails here first. A symbol that is newly used must be written down here.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from fxquant.ops.plain_inductor import EXACT
from fxquant.support.patches import PATCHES
from tests.backend.private import Use, private_attributes, private_uses
from tests.house.sources import ROOT, package_modules

# Symbol → what is passed in a call, or what it is where it is not called. Tried on torch 2.13.
SYMBOLS: Mapping[str, str] = {
    "torch._C._dynamo.eval_frame.get_eval_frame_callback": "()",
    "torch._assert_async": "(_, _)",
    "torch._dynamo.backends.common.aot_autograd": (
        "(decompositions, fw_compiler, inference_compiler, keep_inference_input_mutations, partition_fn)"
    ),
    "torch._dynamo.config": "module",
    "torch._dynamo.config.allow_rnn": "value",
    "torch._dynamo.config.patch": "(_)",
    "torch._dynamo.convert_frame.compile_lock": "value",
    "torch._dynamo.exc.BackendCompilerFailed": "class",
    "torch._dynamo.exc.Unsupported": "class",
    "torch._dynamo.maybe_mark_dynamic": "(_, _)",
    "torch._dynamo.pgo.get_code_state": "()",
    "torch._dynamo.source.ConstantSource": "(_)",
    "torch._functorch._aot_autograd.autograd_cache.AOTAutogradCacheDetails.__init__": "function",
    "torch._functorch.config.patch": "(_)",
    "torch._guards.TracingContext": "class",
    "torch._guards.TracingContext.get": "()",
    "torch._guards.TracingContext.try_get": "()",
    "torch._higher_order_ops.invoke_subgraph.invoke_subgraph": "value",
    "torch._higher_order_ops.invoke_subgraph.invoke_subgraph_placeholder": "function",
    "torch._higher_order_ops.utils": "module",
    "torch._higher_order_ops.utils._hop_compile_and_call": "function",
    "torch._higher_order_ops.utils.reenter_make_fx": "(_)",
    "torch._higher_order_ops.wrap.tag_activation_checkpoint": "value",
    "torch._higher_order_ops.wrap.wrap": "value",
    "torch._inductor.async_compile.AsyncCompile": "()",
    "torch._inductor.async_compile.get_compile_threads": "()",
    "torch._inductor.codegen.common.pointwise_overrides_data": "value",
    "torch._inductor.codegen.cpp.CppVecKernel.get_to_dtype_expr": "function",
    "torch._inductor.codegen.wrapper.PythonWrapperCodegen.define_kernel": "function",
    "torch._inductor.compile_fx.compile_fx": "(_, _, inner_compile)",
    "torch._inductor.compile_fx.compile_fx_inner": "function",
    "torch._inductor.config": "module",
    "torch._inductor.config.get_config_copy": "()",
    "torch._inductor.config.patch": "(_)",
    "torch._inductor.cpp_builder.get_cpp_compiler": "()",
    "torch._inductor.custom_graph_pass.CustomGraphPass": "class",
    "torch._inductor.decomposition.decompositions.pop": "(_, _)",
    "torch._inductor.decomposition.decompositions.update": "(_)",
    "torch._inductor.decomposition.fast_random_decomps.cache_clear": "()",
    "torch._inductor.decomposition.select_decomp_table": "()",
    "torch._inductor.dtype_propagation.DtypePropagationOpsHandler.__init__": "function",
    "torch._inductor.exc.InvalidCxxCompiler": "class",
    "torch._inductor.graph.GraphLowering.compile_to_module": "function",
    "torch._inductor.graph.GraphLowering.find_nodes_prefer_channels_last": "function",
    "torch._inductor.ir": "module",
    "torch._inductor.ir.ComputedBuffer": "class",
    "torch._inductor.ir.MultiOutput": "class",
    "torch._inductor.ir.MultiOutputLayout": "class",
    "torch._inductor.ir.MutationLayoutSHOULDREMOVE": "class",
    "torch._inductor.ir.MutationLayoutSHOULDREMOVE.realize_into": "(_, _, unsafe_alias)",
    "torch._inductor.ir.NonOwningLayout": "class",
    "torch._inductor.ir.NoneLayout": "class",
    "torch._inductor.ir.Pointwise": "class",
    "torch._inductor.ir.Pointwise.create": "(device, dtype, inner_fn, ranges)",
    "torch._inductor.ir.StorageBox": "class",
    "torch._inductor.ir.TensorBox": "class",
    "torch._inductor.ir.TorchBindObject": "class",
    "torch._inductor.ir.get_fill_order": "(_, _)",
    "torch._inductor.list_mode_options": "(_)",
    "torch._inductor.lowering.lowerings": "value",
    "torch._inductor.lowering.register_lowering": "(_, type_promotion_kind)",
    "torch._inductor.scheduler.ExternKernelSchedulerNode": "class",
    "torch._inductor.scheduler.FusedSchedulerNode": "class",
    "torch._inductor.scheduler.NopKernelSchedulerNode": "class",
    "torch._inductor.scheduler.SchedulerNode": "class",
    "torch._inductor.utils.boolean_ops": "()",
    "torch._inductor.utils.op_dtype_propagation_rules": "value",
    "torch._inductor.virtualized.V.get_ops_handler": "()",
    "torch._inductor.virtualized.V.graph": "value",
    "torch._inductor.virtualized.V.graph.current_node": "value",
    "torch._inductor.virtualized.V.graph.sizevars.shape_env": "value",
    "torch._int_mm": "(_, _)",
    "torch._ops.HigherOrderOperator": "class",
    "torch._ops.OpOverload": "class",
    "torch._subclasses.fake_tensor.FakeTensorMode": "() (shape_env)",
    "torch._subclasses.fake_tensor.unset_fake_temporarily": "()",
    "torch.fx.experimental.proxy_tensor.disable_proxy_modes_tracing": "()",
    "torch.fx.experimental.proxy_tensor.get_proxy_mode": "()",
    "torch.fx.experimental.proxy_tensor.make_fx": "(_, decomposition_table) (_, pre_dispatch)",
    "torch.fx.experimental.proxy_tensor.track_tensor_tree": "(_, _, constant, tracer)",
    "torch.fx._symbolic_trace._Patcher.patch_method": "function",
    "torch.fx.experimental.symbolic_shapes.GuardOnDataDependentSymNode": "class",
    "torch.fx.experimental.symbolic_shapes.statically_known_true": "(_)",
    "torch.nn.modules.batchnorm._BatchNorm": "class",
    "torch.ops._c10d_functional": "module",
    "torch.ops.aten._assert_tensor_metadata": "value",
    "torch.utils._pytree.tree_leaves": "(_)",
    "torch.utils._pytree.tree_map": "(_, _)",
    "torch.backends.mha._is_fastpath_enabled": "value",
    "torch.ops.aten._transformer_encoder_layer_fwd": "value",
    "torch._dynamo.backends.distributed.DDPOptimizer.compile_fn": "function",
    "torch.amp.autocast_mode._enter_autocast": "function",
    "torch.amp.autocast_mode._exit_autocast": "function",
}
OLDER = {  # symbols that this torch may lack: a newer or older one has another in its place
    "torch._higher_order_ops.utils._hop_compile_and_call": "invoke_subgraph_placeholder before torch 2.13",
}
# Of what a patch stands in for: the parameters that the replacement names.
REPLACED: Mapping[str, tuple[str, ...]] = {
    "torch.amp.autocast_mode:autocast.__enter__": ("self",),
    "torch._higher_order_ops.utils:_hop_compile_and_call": ("fn", "args", "kwargs"),
    "torch._higher_order_ops.invoke_subgraph:invoke_subgraph_placeholder": ("func",),
    "torch.fx._symbolic_trace:_Patcher.patch_method": ("self", "cls", "name", "new_fn"),
    "torch._inductor.dtype_propagation:DtypePropagationOpsHandler.__init__": ("self",),
    "torch._inductor.codegen.wrapper:PythonWrapperCodegen.define_kernel": ("self", "kernel_name", "kernel_body"),
    "torch._inductor.codegen.cpp:CppVecKernel.get_to_dtype_expr": ("self", "src", "dtype", "src_dtype"),
    "torch._inductor.graph:GraphLowering.compile_to_module": ("self",),
    "torch._inductor.graph:GraphLowering.find_nodes_prefer_channels_last": ("self",),
    "torch._dynamo.backends.distributed:DDPOptimizer.compile_fn": ("self", "gm", "example_inputs"),
    "torch._functorch._aot_autograd.autograd_cache:AOTAutogradCacheDetails.__init__": ("self", "gm"),
}
# Private attributes of objects, by what has them.
ATTRIBUTES: Mapping[str, Callable[[], object]] = {
    "_cdata": lambda: torch.ones(1).untyped_storage(),
    "_codegen": torch.fx.Graph,
    "_compiled_call_impl": torch.nn.Module,
    "_flat_weights": lambda: torch.nn.GRU(1, 1),
    "_flat_weights_names": lambda: torch.nn.GRU(1, 1),
    "_getframe": lambda: sys,
    "_int_mm": lambda: torch.ops.aten,
    "_overloadname": lambda: torch.ops.aten.add.Tensor,
    "_parameters": torch.nn.Module,
    "_safe_softmax": lambda: torch.ops.aten,
    "_scaled_mm": lambda: torch.ops.aten,
    "_schema": lambda: torch.ops.aten.add.Tensor,
    "_softmax": lambda: torch.ops.aten,
    "_to_copy": lambda: torch.ops.aten,
    "_trilinear": lambda: torch.ops.aten,
    "_unsafe_view": lambda: torch.ops.aten,
    "_update_scheduler": lambda: resolve("torch._inductor.graph.GraphLowering"),
    "_version": lambda: torch.ones(1),
}
# Private attributes that are set for torch to read: by which file of ours, and the module that reads them.
READ_BY_TORCH: Mapping[str, tuple[str, str]] = {
    "_boxed_call": ("fxquant/backend/inductor/scheduled.py", "torch._functorch._aot_autograd.utils"),
    "_dynamo_source": ("fxquant/graph/static_inputs.py", "torch._functorch._aot_autograd.frontend_utils"),
    "_param_name_to_source": ("fxquant/graph/static_inputs.py", "torch._functorch._aot_autograd.frontend_utils"),
}
SETTINGS: Mapping[str, tuple[str, ...]] = {
    "torch._inductor.config": (
        "realize_reads_threshold",
        "graph_partition",
        "freezing",
        "fx_graph_cache",
        "fx_graph_remote_cache",
        "triton.cudagraphs",
        "joint_custom_post_pass",
        "post_grad_custom_pre_pass",
        "post_grad_custom_post_pass",
        *EXACT,
    ),
    "torch._functorch.config": ("enable_autograd_cache", "force_non_lazy_backward_lowering"),
    "torch._dynamo.config": ("recompile_limit", "accumulated_recompile_limit"),
}


def sources() -> dict[str, str]:
    paths = {path.resolve() for path in package_modules().values()}
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in sorted(paths)}


@functools.cache
def uses() -> Mapping[str, Use]:
    return private_uses(sources())


def resolve(symbol: str) -> Any:
    """The object of a dotted name; of Inductor's graph in progress, an attribute by its class's source."""
    head, parts = "torch._inductor.virtualized.V.graph.", symbol.split(".")
    if symbol.startswith(head):
        lowering = resolve("torch._inductor.graph.GraphLowering")
        first = symbol.removeprefix(head).split(".")[0]
        if f"self.{first}" not in inspect.getsource(lowering):
            raise AttributeError(first)
        return first
    depth = len(parts)
    while not is_module(".".join(parts[:depth])):  # a module may be hidden by what its package takes from it
        depth -= 1
    return functools.reduce(getattr, parts[depth:], importlib.import_module(".".join(parts[:depth])))


def is_module(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        return False
    return True


def kind_of(found: object) -> str:
    for kind, types_ in (("module", types.ModuleType), ("class", type), ("function", types.FunctionType)):
        if isinstance(found, types_):
            return kind
    return "value"


def written(use: Use) -> str:
    """``(_, _, inner_compile)`` for two positional arguments and a keyword; one for each form of call."""
    forms = (("_",) * count + keywords for count, keywords in sorted(use.calls))
    return " ".join(f"({', '.join(form)})" for form in forms)


def complaint(found: Any, use: Use, expected: str) -> str | None:
    """What of it is not as it was, or None."""
    if not use.calls:
        return None if kind_of(found) == expected else f"must be a {expected}: is a {kind_of(found)}"
    if not callable(found):
        return f"must be callable: is {found!r}"
    try:
        signature = inspect.signature(found)
    except ValueError:
        return None  # of C: it has none
    for count, keywords in use.calls:
        try:
            signature.bind(*range(count), **dict.fromkeys(keywords))
        except TypeError as error:
            return f"must take {expected}: got {signature}: {error}"
    return None


def test_the_list_is_whole() -> None:
    listed, used = set(SYMBOLS), set(uses())
    new = [f"{name} ({', '.join(sorted(uses()[name].files))})" for name in sorted(used - listed)]
    assert not new, f"private symbols of torch that SYMBOLS must name: {new}"
    assert not listed - used, f"no longer used: {sorted(listed - used)}"


@pytest.mark.parametrize("symbol", SYMBOLS)
def test_symbol(symbol: str) -> None:
    use, expected = uses()[symbol], SYMBOLS[symbol]
    assert not use.calls or written(use) == expected, f"{symbol} is called otherwise than SYMBOLS says"
    where = f"{symbol} of torch {torch.__version__}, which {', '.join(sorted(use.files))} uses,"
    try:
        found = resolve(symbol)
    except (AttributeError, ImportError) as error:
        if symbol in OLDER:
            pytest.skip(OLDER[symbol])
        pytest.fail(f"{where} is not there: {error}")
    problem = complaint(found, use, expected)
    assert problem is None, f"{where} {problem}"


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.place)
def test_what_is_replaced_takes_what_the_replacement_names(patch: Any) -> None:
    found = resolve(patch.place.replace(":", "."))
    given = tuple(inspect.signature(found).parameters)
    wanted = REPLACED[patch.place]
    assert given[: len(wanted)] == wanted, f"{patch.place} takes {given}: fxquant/support/patches.py names {wanted}"


def test_private_attributes_are_there() -> None:
    used = private_attributes(sources())
    assert set(used) - set(READ_BY_TORCH) == set(ATTRIBUTES), "name new ones, take out what is no longer used"
    for name, holder in ATTRIBUTES.items():
        assert hasattr(holder(), name), f"{name}, which {sorted(used[name])} reads, is gone from {holder()}"


@pytest.mark.parametrize("name", READ_BY_TORCH)
def test_what_is_set_for_torch_is_read(name: str) -> None:
    file, module = READ_BY_TORCH[name]
    assert name in sources()[file], f"{file} does not set {name} any more"
    text = inspect.getsource(importlib.import_module(module))
    assert name in text, f"{name}, which {file} sets, is not read by {module} of torch {torch.__version__} any more"


@pytest.mark.parametrize("module", SETTINGS)
def test_settings_are_there(module: str) -> None:
    known = importlib.import_module(module).get_config_copy()  # type: ignore[attr-defined]
    missing = [name for name in SETTINGS[module] if name not in known]
    assert not missing, f"{module} has no {missing} in torch {torch.__version__}"


# ---------------------------------------------------------------- the search and the sentences


SOURCE = """
import torch
from torch._inductor import ir as nodes
from torch._guards import TracingContext
def f(x):
    nodes.Pointwise.create(x, dtype=None)
    torch.utils._pytree.tree_map(*x)
    torch.nn.functional.relu(x)
    return TracingContext, x._hidden, "torch._inductor.graph:GraphLowering.run"
"""


def test_the_search_finds_imports_chains_calls_and_places() -> None:
    found = private_uses({"here.py": SOURCE})
    assert {name: sorted(use.calls) for name, use in found.items()} == {
        "torch._inductor.ir.Pointwise.create": [(1, ("dtype",))],
        "torch.utils._pytree.tree_map": [],
        "torch._guards.TracingContext": [],
        "torch._inductor.graph.GraphLowering.run": [],
    }
    assert all(use.files == {"here.py"} for use in found.values())
    assert private_attributes({"here.py": SOURCE}) == {"_hidden": {"here.py"}}


def narrow(a: int) -> None: ...


@pytest.mark.parametrize(
    ("found", "calls", "expected", "said"),
    [
        (narrow, {(1, ())}, "(_)", None),
        (narrow, {(1, ("b",))}, "(_, b)", "must take (_, b): got (a: 'int') -> 'None': got an unexpected keyword"),
        (narrow, {(2, ())}, "(_, _)", "too many positional arguments"),
        (narrow, set(), "class", "must be a class: is a function"),
        (3, {(0, ())}, "()", "must be callable: is 3"),
        (inspect, set(), "module", None),
    ],
)
def test_a_change_is_told(found: Any, calls: Any, expected: str, said: str | None) -> None:
    problem = complaint(found, Use("x", {"here.py"}, calls), expected)
    assert problem is None if said is None else said in str(problem)


def test_what_is_gone_is_told() -> None:
    with pytest.raises((AttributeError, ImportError), match="never_was"):
        resolve("torch._inductor.never_was")
