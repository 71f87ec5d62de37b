"""The torch.compile backends ``"fxquant"`` and ``"fxquant_eager"``.

Touches private API of Inductor and AOTAutograd; each use says on which versions it was tried.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import importlib.util
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from fxquant import gpu
from fxquant.capture import capture
from fxquant.compiling import collecting_rarely, compile_as_generated
from fxquant.errors import CompilerMissing, InvalidArgument, UnsupportedModel
from fxquant.graph import is_bind
from fxquant.loops import keep_rows_together
from fxquant.lowerings import register_lowerings
from fxquant.ops.library import ARITHMETIC, DECOMPOSITIONS
from fxquant.ops.stand_in import STAND_IN
from fxquant.passes.base import Decline, Pass, PassResult, run_all, source_digest
from fxquant.passes.pipelines import COMPILED, joint_passes, post_grad_passes, training_passes
from fxquant.passes.use_integer_matmul import IntegerMatmul, UseIntegerMatmul
from fxquant.plan import Mode, target_of
from fxquant.profiles import get_profile
from fxquant.recipes import Recipe, get_recipe
from fxquant.resolve import bound_sites, execution_order
from fxquant.reuse import Compile, reuse_weights
from fxquant.state import of_prepared_model, settle_after

log = logging.getLogger("fxquant")

_OPTIONS = ("recipe", "target", "inductor", "integer_matmul", "save_quantized", "reuse_weights")


@dataclass(frozen=True, kw_only=True)
class CompileReport:
    """What one call of a backend did to one graph.

    Attributes:
        digests: site lists bound in the graph; empty for an unprepared model.
        quantized: fake-quant nodes inserted.
        declines: what passes left alone and why.
        integer: products that are taken of integer codes; not counted where the compiled graph came from a cache.
        reused: quantized weights that are kept from call to call (``options={"reuse_weights": True}``).
        seconds: time in capture and in passes at every hook, without Inductor; a cached graph meets no later hook.
    """

    digests: tuple[str, ...]
    quantized: int
    declines: tuple[Decline, ...]
    seconds: float
    integer: int = 0
    reused: int = 0


# A code is computed from 4 to 8 tensors, most of them of one element, and read by what clamps it and by its clip mask.
# At Inductor's 4 it stores such codes as floats. Bytes that a step moves at 4 and at 8: CNN 849 and 721 MB, ResNet 1028
# and 907, mixer 1204 and 1170, transformer the same.
# Partitions are for CUDA graphs; to find that there is only one takes 4 % of the Python calls of a compile.
_ON_CPU = {"realize_reads_threshold": 8, "graph_partition": False}


@dataclass
class _Log:
    """The report of one compile. Its hooks hold it: those of a backward may run after other compiles."""

    report: CompileReport = CompileReport(digests=(), quantized=0, declines=(), seconds=0.0)

    def add(self, declines: Iterable[Decline], *, seconds: float = 0.0, integer: int = 0, reused: int = 0) -> None:
        """What is said behind the report."""
        was, found = self.report, tuple(declines)
        self.report = dataclasses.replace(
            was,
            declines=(*was.declines, *found),
            seconds=was.seconds + seconds,
            integer=was.integer + integer,
            reused=was.reused + reused,
        )
        for decline in found:
            log.info("%s", decline)


_LOGS: collections.deque[_Log] = collections.deque(maxlen=256)
_LOG = "fxquant_log"  # in the meta of a QAT graph: the log of its compile


def compile_reports() -> tuple[CompileReport, ...]:
    """Reports of this process's latest compiles, oldest first."""
    return tuple(each.report for each in _LOGS)


@contextlib.contextmanager
def unreported() -> Iterator[None]:
    """Compiles inside are no part of training: reports are put back as they were."""
    before = tuple(_LOGS)
    try:
        yield
    finally:
        _LOGS.clear()
        _LOGS.extend(before)


@collecting_rarely()
def fxquant(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Backend ``"fxquant"``: the QAT graph of ``gm``, compiled by Inductor.

    ``mode`` is torch.compile's. ``options``: ``recipe`` and ``target`` for a model that was not prepared (recipe None
    places nothing: for a model that calls ``fxquant.ops`` itself), ``inductor``, a mapping of Inductor settings, and
    ``integer_matmul``: whether forward products are taken of integer codes, True, False (the default) or "auto",
    which measures where that is faster (`fxquant.passes.use_integer_matmul`). ``save_quantized`` False keeps floats for
    backward where codes and packed masks would do (`fxquant.passes.save_quantized_activations`). ``reuse_weights`` True
    keeps quantized weights from call to call, one more copy of them, and quantizes those again that have changed:
    by an optimizer, or in a way that autograd counts. Writes through ``p.data`` it counts not (`fxquant.reuse`). It
    excludes ``integer_matmul``, and has no effect where torch.distributed is initialized.
    """
    _require_compiler(example_inputs)
    quantized = quantize_graph(gm, example_inputs, options)
    looks = _takes_first_ranges(quantized)
    compiled = compile_quantized(quantized, example_inputs, mode=mode, options=options)
    return settle_after(compiled) if looks else compiled


def _takes_first_ranges(gm: fx.GraphModule) -> bool:
    """Whether a delayed range may be unset at entry."""
    sites = (node.meta["site"] for node in execution_order(gm) if "site" in node.meta)
    return any(site.mode is Mode.FIRST for site in sites)


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
    keep_rows_together()
    compile_as_generated()
    told = _log_of(quantized)
    _run_behind(COMPILED, quantized, told)
    patches = {**(list_mode_options(mode) if mode else {}), **_inductor_settings(options)}
    if gpu.is_on_gpu(quantized, example_inputs):
        told.add(gpu.overruled(patches))
        patches = {**patches, **gpu.exact_settings(patches)}
        patches = _with_passes(patches, told, post_grad_custom_post_pass=gpu.exact_passes())
    else:
        patches = {**_ON_CPU, **patches}
    patches = _with_passes(
        patches,
        told,
        joint_custom_post_pass=joint_passes(select_decomp_table, **_Options.read(options).joint),
        post_grad_custom_pre_pass=post_grad_passes(select_decomp_table),
    )
    theirs = {op: decompose for op, decompose in select_decomp_table().items() if op not in ARITHMETIC}
    table = _DecompositionTable({**theirs, **DECOMPOSITIONS})
    inner = collecting_rarely()(inner_compile or compile_fx_inner)  # backward is compiled when this function has ended
    compiler: Any = functools.partial(compile_fx, decompositions=table, inner_compile=inner)
    whole = functools.partial(compiler, config_patches=patches)
    if not _Options.read(options).reuse_weights:
        return whole(quantized, example_inputs)
    # What is kept must not lie in memory that CUDA graphs write to again, nor weights be constants of a frozen graph.
    part = functools.partial(compiler, config_patches={**patches, "triton.cudagraphs": False, "freezing": False})
    return _reused(quantized, example_inputs, whole, part, "fxquant")


def fuse_in_inductor() -> None:
    """Lets ``torch.compile`` without our backend fuse calls of ``fxquant.ops``, which would otherwise stay calls.

    Adds our operators to Inductor's decompositions, and the digest of our sources to ``cache_key_tag``: torch's cache
    of traced graphs knows an operator by its name only. Happens by itself when Dynamo first meets one of them.
    """
    from torch._inductor import decomposition  # private; tried on 2.13 and 2.15

    # Without a result there is nothing to compute, only a mark that must not vanish.
    fusible = {op: gpu.Told(arithmetic, _warn_once) for op, arithmetic in ARITHMETIC.items() if op._schema.returns}
    decomposition.decompositions.update(fusible)
    decomposition.fast_random_decomps.cache_clear()  # a copy of the table, made when it was first asked for
    tag = f"fxquant {source_digest()}"
    if tag not in torch.compiler.config.cache_key_tag:
        torch.compiler.config.cache_key_tag += tag


@functools.cache
def _warn_once(message: str) -> None:
    log.warning("%s", message)


def fxquant_eager(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Backend ``"fxquant_eager"``: the same graph through AOTAutograd and the same joint passes, run op by op.

    For debugging, and the reference that compiled code is held to. ``mode`` must be absent: nothing is compiled.
    """
    if mode is not None:
        raise InvalidArgument(f"mode must be left out with backend 'fxquant_eager': got {mode!r}.")
    quantized = quantize_graph(gm, example_inputs, options)
    looks = _takes_first_ranges(quantized)
    passes = joint_passes(**_Options.read(options).joint)
    compiler = functools.partial(aot_eager, runner=lambda graph: graph, passes=passes)
    if _Options.read(options).reuse_weights:
        compiled = _reused(quantized, example_inputs, compiler, compiler, "fxquant_eager")
    else:
        compiled = compiler(quantized, example_inputs)
    return settle_after(compiled) if looks else compiled


def _reused(
    quantized: fx.GraphModule, example_inputs: Sequence[Any], whole: Compile, part: Compile, backend: str
) -> Callable[..., Any]:
    compiled, result = reuse_weights(quantized, example_inputs, whole=whole, part=part, backend=backend)
    _log_of(quantized).add(result.declines, reused=result.rewrites)
    return compiled


def aot_eager(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    runner: Callable[[fx.GraphModule], Callable[..., Any]],
    passes: tuple[Pass, ...] | None = None,
) -> Callable[..., Any]:
    """AOTAutograd with our joint passes, or others; ``runner`` makes each of the two graphs callable."""
    behind, told = joint_passes() if passes is None else passes, _log_of(gm)
    from functorch.compile import (  # type: ignore[import-untyped]
        make_boxed_func,
        min_cut_rematerialization_partition,
    )
    from torch._dynamo.backends.common import aot_autograd  # private; tried on 2.13 and 2.15

    def partition(joint: fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Any:
        _run_behind(behind, joint, told)
        return min_cut_rematerialization_partition(joint, inputs, **kwargs)

    def compiler(graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        return make_boxed_func(runner(graph))

    def inference(graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        _run_behind(behind, graph, told)
        return compiler(graph, inputs)

    backend = aot_autograd(
        fw_compiler=compiler,
        inference_compiler=inference,
        partition_fn=partition,
        keep_inference_input_mutations=True,
        decompositions={STAND_IN: DECOMPOSITIONS[STAND_IN]},
    )
    return backend(gm, example_inputs)


def quantize_graph(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: Mapping[str, Any] | None = None
) -> fx.GraphModule:
    """Dynamo's graph as the captured QAT graph: what both backends hand on."""
    started = time.perf_counter()
    chosen = _Options.read(options)
    # Without gradients there is nothing to checkpoint.
    captured = capture(gm, example_inputs, inline_checkpoints=not torch.is_grad_enabled())
    digests = tuple(str(node.args[0]) for node in execution_order(captured) if is_bind(node))
    prepared = bool(digests) or of_prepared_model(example_inputs)
    if prepared and chosen.given:
        raise InvalidArgument(
            f"options must not set {' and '.join(chosen.given)} for a prepared model: its plan decides. "
            "Give them to fxquant.prepare."
        )
    _refuse_buckets(captured)
    if chosen.recipe is None:
        result = PassResult(declines=[_left_alone(captured, "recipe=None places nothing")])
    else:
        stateless = not prepared and any(map(_is_trainable, example_inputs))
        target = _target(digests) or chosen.target
        passes = training_passes(chosen.recipe, get_profile(target), stateless=stateless)
        result = run_all(passes, captured)
        if not digests and not stateless:
            result.declines.append(_left_alone(captured))
    result.seconds = time.perf_counter() - started
    _report(captured, digests, result)
    return captured


def _target(digests: Iterable[str]) -> str | None:
    """What the prepared parts of a graph are for; None where there are none."""
    found = sorted({target_of(key) for key in digests})
    if len(found) > 1:
        raise UnsupportedModel(
            f"models that run in one graph must be prepared for one target: got {' and '.join(found)}. "
            "Prepare them for the same, or compile them apart."
        )
    return found[0] if found else None


def _refuse_buckets(gm: fx.GraphModule) -> None:
    """DDP's bucket splitter may part an owner's operators from its state, and would leave them float unseen."""
    if nn.parallel.DistributedDataParallel._get_active_ddp_module() is None:  # private; tried on 2.13 and 2.15
        return
    _, missing = bound_sites(gm)
    if missing:
        names = ", ".join(absent.site.name for absent in missing[:4])
        raise UnsupportedModel(
            "a prepared model must reach the backend whole under DistributedDataParallel: Dynamo cut its graph into "
            f"buckets, and {len(missing)} sites of this one have their operators in another ({names}). "
            "Set torch._dynamo.config.optimize_ddp = False."
        )


def _is_trainable(value: Any) -> bool:
    """Whether an input shows that the graph belongs to a model: code around one, as an optimizer's, stays float."""
    if not isinstance(value, torch.Tensor):
        return False
    return isinstance(value, nn.Parameter) or (value.is_leaf and value.requires_grad)


_NO_SITES = "a part of a prepared model without sites, or code without parameters: it stays float"


def _left_alone(gm: fx.GraphModule, reason: str = _NO_SITES) -> Decline:
    first = next((node.name for node in gm.graph.nodes if node.op == "call_function"), "graph")
    return Decline(pass_name="fxquant", node=first, reason=reason)


def _report(gm: fx.GraphModule, digests: tuple[str, ...], result: PassResult) -> None:
    count = sum(1 for node in execution_order(gm) if "site" in node.meta)
    # A graph that only observes (calibration) has nothing for the later passes: what they say of it means nothing.
    declines = tuple(result.declines) if count or not digests else ()
    told = gm.meta[_LOG] = _Log(CompileReport(digests=digests, quantized=count, declines=(), seconds=result.seconds))
    told.add(declines)
    _LOGS.append(told)


def _log_of(gm: fx.GraphModule) -> _Log:
    """What `quantize_graph` left; of a graph that it did not make, nothing is reported."""
    return gm.meta.get(_LOG) or _Log()


def _run_behind(passes: tuple[Pass, ...], gm: fx.GraphModule, told: _Log) -> None:
    """Runs passes that come behind the report of their compile, and adds to it what they say."""
    for each in passes:
        result = each.run(gm)
        integer = result.rewrites if isinstance(each, UseIntegerMatmul) else 0
        told.add(result.declines, seconds=result.seconds, integer=integer)


@dataclass(frozen=True, kw_only=True)
class _Options:
    recipe: Recipe | None
    target: str
    given: tuple[str, ...]
    integers: IntegerMatmul
    save_quantized: bool
    reuse_weights: bool

    @property
    def joint(self) -> dict[str, Any]:
        """What `joint_passes` is told."""
        return {"integers": self.integers, "save_quantized": self.save_quantized}

    @classmethod
    def read(cls, options: Mapping[str, Any] | None) -> _Options:
        found = dict(options or {})
        unknown = sorted(found.keys() - set(_OPTIONS))
        if unknown:
            raise InvalidArgument(
                f"options must be among {', '.join(map(repr, _OPTIONS))}: got {', '.join(map(repr, unknown))}. "
                "Inductor's own settings go into options={'inductor': {...}}."
            )
        given = tuple(repr(name) for name in ("recipe", "target") if name in found)
        target = str(found.get("target", "onnxruntime"))
        get_profile(target)
        recipe = found.get("recipe", "int8")
        integers = found.get("integer_matmul", False)
        if integers not in (True, False, "auto"):
            raise InvalidArgument(f"options['integer_matmul'] must be True, False or 'auto': got {integers!r}.")
        save = found.get("save_quantized", True)
        if not isinstance(save, bool):
            raise InvalidArgument(f"options['save_quantized'] must be True or False: got {save!r}.")
        reuse = found.get("reuse_weights", False)
        if not isinstance(reuse, bool):
            raise InvalidArgument(f"options['reuse_weights'] must be True or False: got {reuse!r}.")
        if reuse and integers is not False:
            raise InvalidArgument(
                f"options['reuse_weights'] must be False where options['integer_matmul'] is {integers!r}: got True. "
                "Weights are kept as floats, and those products are taken of codes: leave one of the two out."
            )
        chosen = None if recipe is None else get_recipe(recipe)
        return cls(
            recipe=chosen,
            target=target,
            given=given,
            integers=integers,
            save_quantized=save,
            reuse_weights=reuse,
        )


class _DecompositionTable(dict):
    """Inductor's table with our qparams in it; in cache keys it stands for itself by the digest of our sources."""

    def __reduce__(self) -> tuple[Any, ...]:
        # The key pickles the table (torch 2.13), and it holds functions that cannot be: no cache would be used.
        return _DecompositionTable, ((("sources", source_digest()),),)


def _inductor_settings(options: Mapping[str, Any] | None) -> dict[str, Any]:
    from torch._inductor import config

    found = dict((options or {}).get("inductor", {}))
    unknown = sorted(found.keys() - config.get_config_copy().keys())
    if unknown:
        raise InvalidArgument(
            f"options['inductor'] must hold Inductor's own settings: got {', '.join(map(repr, unknown))}. "
            "torch.compile's list_options() shows them."
        )
    return found


def _require_compiler(example_inputs: Sequence[Any]) -> None:
    """Says early, and in words, that Inductor will find no compiler for a device."""
    from torch._inductor.cpp_builder import get_cpp_compiler  # private; tried on 2.13 and 2.15
    from torch._inductor.exc import InvalidCxxCompiler  # private; tried on 2.13 and 2.15

    devices = {t.device.type for t in example_inputs if isinstance(t, torch.Tensor)}
    if "cuda" in devices and importlib.util.find_spec("triton") is None:
        raise CompilerMissing(
            "backend 'fxquant' must find Triton to run on CUDA: found none. Install triton, or use "
            "backend='fxquant_eager', whose operators run on kernels of fxquant's own."
        )
    if "cpu" not in devices:
        return
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise CompilerMissing(
            "backend 'fxquant' must find a C++ compiler to run on CPU: found none. Install g++ or clang++, point "
            "CXX at one, or use backend='fxquant_eager', which needs none."
        ) from error


def _with_passes(patches: dict[str, Any], told: _Log, **ours: tuple[Pass, ...]) -> dict[str, Any]:
    """Our passes in Inductor's hooks, behind what the user put there."""
    from torch._inductor import config  # the hooks are public settings

    for hook, passes in ours.items():
        existing = patches.get(hook, getattr(config, hook))
        before = existing if isinstance(existing, (list, tuple)) else [existing] if existing is not None else []
        patches[hook] = _graph_pass(passes, tuple(before), told)
    return patches


def _graph_pass(passes: tuple[Pass, ...], before: tuple[Any, ...], told: _Log) -> Any:
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
            _run_behind(self.passes, graph.owning_module, told)

        def uuid(self) -> Any | None:
            theirs = [each.uuid() if hasattr(each, "uuid") else None for each in self.before]
            if None in theirs:
                return None  # a pass without identity turns caching off, as it does without us
            return (*theirs, *(each.uuid() for each in self.passes))

    return FxquantPasses(passes, before)
