"""What costs time in a process of many compiles and exports and changes no result, left out.

python -m tests.quick SCRIPT [ARGUMENT …]    a script, as `python SCRIPT` runs it
"""

from __future__ import annotations

import copy
import functools
import gc
import os
import runpy
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import sympy
import torch
from torch._inductor import codecache  # private; what is replaced in it was read in 2.13
from torch._inductor.codegen import common  # private; read in 2.13
from torch.utils import _config_module, _pytree, _traceback
from torch.utils._sympy.value_ranges import ValueRanges  # private; read in 2.13


def collect_rarely() -> None:
    """What is imported stays to the end: half a million objects that no collection need look through.

    A compile makes as many of its own, nearly all of which live until it ends: collected after every 700, a seventh of
    the Python.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 10, 10)


@contextmanager
def header_is_read_once() -> Iterator[None]:
    """Inductor has its header preprocessed in front of each g++ run, to see whether the precompiled one is of today.

    Headers stay as they are while tests run: a quarter of what a kernel costs.
    """
    precompile = codecache._precompile_header
    paths: dict[str, str] = {}

    def once(header: str, hashable_cmd_line: str, **command: Any) -> str:
        key = repr((header, hashable_cmd_line, sorted(command.items())))
        path = paths.get(key)
        if path is None or not os.path.exists(f"{path}.gch"):
            path = paths[key] = precompile(header, hashable_cmd_line, **command)
        return path

    with mock.patch.object(codecache, "_precompile_header", once):
        yield


@contextmanager
def guards_are_made_fast() -> Iterator[None]:
    """Dynamo flushes the caches of the processor to time a frame's guards, for a log: half the time of a small one.

    Each guard tells the line that it comes from, whose path is compared with torch's: ever the same few paths.
    """
    from torch._dynamo import guards  # private, and so is what is replaced; read in 2.13

    shorten = functools.cache(_traceback.shorten_filename)
    with ExitStack() as patches:
        if hasattr(guards, "profile_guard_manager"):
            patches.enter_context(mock.patch.object(guards, "profile_guard_manager", lambda *_: 0.0))
        patches.enter_context(mock.patch.object(_traceback, "shorten_filename", shorten))
        yield


SETTINGS_FOR_LOGS = (
    "_compiler_config_for_logging",
    "_functorch_config_for_logging",
    "_get_dynamo_config_for_logging",
    "_scrubbed_inductor_config_for_logging",
)
# Private; read in 2.13.
UNSET = _config_module._UNSET_SENTINEL
READ = _config_module.ConfigModule.__getattr__
IMMUTABLE = _config_module._IMMUTABLE_CONFIG_TYPES


def setting(config: _config_module.ConfigModule, name: str) -> Any:
    """A plain setting, as it was set or is by itself; all others as torch reads them."""
    entry = config._config.get(name)
    if entry is None or entry.alias is not None or entry.hide or entry.deprecated or entry.env_value_force is not UNSET:
        return READ(config, name)
    value = entry.user_override.get()
    if value is UNSET and entry.env_value_default is UNSET and entry.justknob is None:
        value = entry.default
        return value if isinstance(value, IMMUTABLE) else READ(config, name)
    return READ(config, name) if value is UNSET else value


@contextmanager
def nothing_is_logged() -> Iterator[None]:
    """Each compile prints its graphs, its cache key part by part and all settings, for logs that nobody reads.

    It collects garbage too, and asks for its settings half a million times in forty tests, each time through what may
    say what a setting is: an alias, the environment, a deprecation.
    """
    # Private, and so is what is replaced; read in 2.13.
    from torch._dynamo import utils
    from torch._functorch._aot_autograd import graph_compile

    replaced = [(utils, name, lambda: None) for name in SETTINGS_FOR_LOGS]
    replaced += [(graph_compile, "_log_joint_graph", lambda *_: None)]
    replaced += [(graph_compile, "_log_fw_bw_graphs", lambda *_: (None, None))]
    replaced += [(codecache.FxGraphCachePickler, "debug_lines", lambda *_: [])]
    with ExitStack() as patches:
        for owner, name, function in replaced:
            if hasattr(owner, name):
                patches.enter_context(mock.patch.object(owner, name, function))
        patches.enter_context(mock.patch.object(_config_module.ConfigModule, "__getattr__", setting))
        patches.enter_context(torch._dynamo.config.patch(run_gc_after_compile=False))
        yield


TREES = _pytree.tree_map
KINDS = _pytree.SUPPORTED_NODES  # private; read in 2.13


def tree_map(func: Callable[..., Any], tree: Any, *rests: Any, is_leaf: Callable[[Any], bool] | None = None) -> Any:
    """torch's, which takes a value that is no tree apart, and puts it together again."""
    if rests or is_leaf is not None:
        return TREES(func, tree, *rests, is_leaf=is_leaf)
    if not _is_tree(type(tree)):
        return func(tree)
    if type(tree) is tuple and not any(_is_tree(type(each)) for each in tree):
        return tuple([func(each) for each in tree])
    return TREES(func, tree)


def _is_tree(kind: type) -> bool:
    return kind in KINDS or hasattr(kind, "_fields")


def tighten(self: ValueRanges[Any], other: ValueRanges[Any]) -> ValueRanges[Any]:
    """torch's intersection, which has sympy compare the ends of an interval with themselves."""
    same = other is self or (other.lower is self.lower and other.upper is self.upper)
    return self if same else self & other


@contextmanager
def kernels_are_written_fast() -> Iterator[None]:
    """Each operation of a kernel is mapped over as a tree of one value, and bounded by what bounds it already.

    A loop's indices are simplified once for each place that reads them. A ninth of a large kernel's Python.
    """
    trees = SimpleNamespace(**{**vars(_pytree), "tree_map": tree_map})
    with (
        mock.patch.object(common, "pytree", trees),  # there alone: Dynamo knows torch's by what it is
        mock.patch.object(ValueRanges, "tighten", tighten),
        mock.patch.object(sympy, "simplify", functools.lru_cache(1 << 14)(sympy.simplify)),
    ):
        yield


@contextmanager
def torchlib_is_read_once() -> Iterator[None]:
    """torch.onnx.export parses the sources of a thousand operators in every call: half the time of a small model."""
    # Private; tried on 2.13. An export adds to its registry: each gets lists of its own.
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    read = functools.cache(ONNXRegistry.from_torchlib)

    def from_torchlib(cls: type[ONNXRegistry], *args: Any, **kwargs: Any) -> ONNXRegistry:
        registry = copy.copy(read(*args, **kwargs))
        registry.functions = {target: list(known) for target, known in registry.functions.items()}
        return registry

    # Once for each of sixty operators of an export, all of torch's are looked up, which are there from then on.
    once = functools.cache(torch._export.utils._materialize_cpp_cia_ops)
    with (
        mock.patch.object(ONNXRegistry, "from_torchlib", classmethod(from_torchlib)),
        mock.patch("torch._export.utils._materialize_cpp_cia_ops", once),
    ):
        yield


@contextmanager
def compiles_are_quick() -> Iterator[None]:
    with guards_are_made_fast(), nothing_is_logged(), header_is_read_once(), kernels_are_written_fast():
        yield


@contextmanager
def all_is_quick() -> Iterator[None]:
    """Exports too, whose half of torch takes seconds to import."""
    with compiles_are_quick(), torchlib_is_read_once():
        yield


def main(arguments: list[str]) -> None:
    with all_is_quick():
        collect_rarely()
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
