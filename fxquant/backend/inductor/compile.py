"""Inductor on the QAT graph, with our passes in its hooks."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx

from fxquant.backend.inductor import gpu
from fxquant.backend.inductor.compiling import compiling_ours
from fxquant.backend.inductor.lowerings import register_lowerings
from fxquant.backend.options import Options
from fxquant.backend.reports import Log, log_of, run_after
from fxquant.backend.reuse import reused
from fxquant.errors import InvalidArgument
from fxquant.ops.library import ARITHMETIC, DECOMPOSITIONS
from fxquant.passes.base import Pass
from fxquant.passes.pipelines import COMPILED, joint_passes, post_grad_passes
from fxquant.passes.stages import CAPTURED, DYNAMO, JOINT, POST_GRAD, Stage, stage_of
from fxquant.support.digest import source_digest

# A code is computed from 4 to 8 tensors, most of them of one element, and read by what clamps it and by its clip mask.
# At Inductor's 4 it stores such codes as floats. Bytes that a step moves at 4 and at 8: CNN 849 and 721 MB, ResNet 1028
# and 907, mixer 1204 and 1170, transformer the same.
# Partitions are for CUDA graphs; to find that there is only one takes 4 % of the Python calls of a compile.
_ON_CPU = {"realize_reads_threshold": 8, "graph_partition": False}


def compile_quantized(
    quantized: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    inner_compile: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Inductor on the QAT graph, with our passes in its hooks. ``inner_compile`` takes the place of its back end."""
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner  # private; tried on 2.13 and 2.15
    from torch._inductor.decomposition import select_decomp_table  # private; tried on 2.13 and 2.15

    register_lowerings()
    told = log_of(quantized)
    if stage_of(quantized) is not DYNAMO:  # one with nothing to quantize is as Dynamo made it
        run_after(COMPILED, quantized, told, CAPTURED)
    patches = {**(list_mode_options(mode) if mode else {}), **inductor_settings(options)}
    if gpu.is_on_gpu(quantized, example_inputs):
        told.add(gpu.overruled(patches))
        patches = {**patches, **gpu.exact_settings(patches)}
        patches = _with_passes(patches, told, post_grad_custom_post_pass=gpu.exact_passes())
    else:
        patches = {**_ON_CPU, **_layouts(options), **patches}
    patches = _with_passes(
        patches,
        told,
        joint_custom_post_pass=joint_passes(select_decomp_table, **Options.read(options).joint),
        post_grad_custom_pre_pass=post_grad_passes(select_decomp_table),
    )
    theirs = {op: decompose for op, decompose in select_decomp_table().items() if op not in ARITHMETIC}
    table = _DecompositionTable({**theirs, **DECOMPOSITIONS})
    inner = compiling_ours()(inner_compile or compile_fx_inner)  # backward is compiled when this function has ended
    compiler: Any = functools.partial(compile_fx, decompositions=table, inner_compile=inner)
    whole = functools.partial(compiler, config_patches=patches)
    if not Options.read(options).reuse_weights:
        return whole(quantized, example_inputs)
    # What is kept must not lie in memory that CUDA graphs write to again, nor weights be constants of a frozen graph.
    part = functools.partial(compiler, config_patches={**patches, "triton.cudagraphs": False, "freezing": False})
    return reused(quantized, example_inputs, whole, part, "fxquant")


def _layouts(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """That Inductor chooses layouts in a graph whose convolutions are all of integers too, which are none to it.

    Where there is no convolution it changes nothing (`fxquant.support.patches.CHANNELS_LAST`).
    """
    return {} if Options.read(options).integers is False else {"force_layout_optimization": True}


class _DecompositionTable(dict):
    """Inductor's table with our qparams in it; in cache keys it stands for itself by the digest of our sources."""

    def __reduce__(self) -> tuple[Any, ...]:
        # The key pickles the table (torch 2.13), and it holds functions that cannot be: no cache would be used.
        return _DecompositionTable, ((("sources", source_digest()),),)


def inductor_settings(options: Mapping[str, Any] | None) -> dict[str, Any]:
    from torch._inductor import config

    found = dict((options or {}).get("inductor", {}))
    unknown = sorted(found.keys() - config.get_config_copy().keys())
    if unknown:
        raise InvalidArgument(
            f"options['inductor'] must hold Inductor's own settings: got {', '.join(map(repr, unknown))}. "
            "torch.compile's list_options() shows them."
        )
    return found


def _with_passes(patches: dict[str, Any], told: Log, **ours: tuple[Pass, ...]) -> dict[str, Any]:
    """Our passes in Inductor's hooks, behind what the user put there."""
    from torch._inductor import config  # the hooks are public settings

    for hook, passes in ours.items():
        existing = patches.get(hook, getattr(config, hook))
        before = existing if isinstance(existing, (list, tuple)) else [existing] if existing is not None else []
        patches[hook] = _graph_pass(passes, tuple(before), told, JOINT if hook.startswith("joint") else POST_GRAD)
    return patches


def _graph_pass(passes: tuple[Pass, ...], before: tuple[Any, ...], told: Log, stage: Stage) -> Any:
    from torch._inductor.custom_graph_pass import CustomGraphPass

    @dataclasses.dataclass
    class FxquantPasses(CustomGraphPass):
        """Our passes as one Inductor hook, whose uuid keys Inductor's caches."""

        passes: tuple[Pass, ...]
        before: tuple[Any, ...]

        def __call__(self, graph: fx.Graph) -> None:
            for each in self.before:
                each(graph)
            assert graph.owning_module is not None, "Inductor's graphs have a module"
            run_after(self.passes, graph.owning_module, told, stage)

        def uuid(self) -> Any | None:
            theirs = [each.uuid() if hasattr(each, "uuid") else None for each in self.before]
            if None in theirs:
                return None  # a pass without identity turns caching off, as it does without us
            return (*theirs, *(each.uuid() for each in self.passes))

    return FxquantPasses(passes, before)
