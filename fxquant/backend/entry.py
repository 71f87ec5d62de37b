"""The torch.compile backends ``"fxquant"`` and ``"fxquant_eager"``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx

from fxquant.backend.eager import aot_eager
from fxquant.backend.inductor.compile import compile_quantized
from fxquant.backend.inductor.compiling import collecting_rarely
from fxquant.backend.inductor.require_compiler import require_compiler
from fxquant.backend.options import Options
from fxquant.backend.quantize import quantize_graph
from fxquant.backend.reuse import reused
from fxquant.errors import InvalidArgument
from fxquant.graph.bodies import execution_order
from fxquant.graph.meta import site_of
from fxquant.passes.pipelines import joint_passes
from fxquant.prepared.looks import settle_after, tell_of_unset
from fxquant.spec.mode import Mode
from fxquant.support.patches import in_buckets, quantizes_first


@quantizes_first
@collecting_rarely()
def fxquant(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Backend ``"fxquant"``: the QAT graph of ``gm``, compiled by Inductor.

    ``mode`` is torch.compile's. ``options``:

    - ``recipe`` and ``target``, for a model that was not prepared; recipe None places nothing, for a model that calls
      ``fxquant.ops`` itself.
    - ``inductor``: a mapping of Inductor's own settings.
    - ``integer_matmul``: whether forward products are taken of integer codes: True, False, or "auto", which measures
      where that is faster (`fxquant.passes.joint.use_integer_matmul`). Left out, large products are as with "auto" on a
      CPU with dot products of 8-bit integers (VNNI, AMX), and all others float.
    - ``integer_backward``: whether products of backward are taken of integer codes too, the gradient rounded to 8 bits
      for each: True, False (the default), "auto", or a mapping with ``mode``, one of these, ``rounding``, of
      parameters' gradients: "stochastic" (the default) or "nearest", and ``outliers``, the share of each sum that stays
      float, where gradients are largest: 0 (the default) to 0.25 (`fxquant.passes.joint.use_integer_backward`).
    - ``save_quantized``: False keeps floats for backward where codes and packed masks would do
      (`fxquant.passes.joint.save_quantized_activations`).
    - ``reuse_weights``: True keeps quantized weights from call to call, one more copy of them, and quantizes those
      again that have changed: by an optimizer, or in a way that autograd counts. Writes through ``p.data`` it counts
      not (`fxquant.backend.reuse`). It excludes ``integer_matmul`` and ``integer_backward``, and has no effect where
      torch.distributed is initialized.
    """
    require_compiler(example_inputs)
    quantized = quantize_graph(gm, example_inputs, options)
    looks = _looks(quantized)
    compiler = functools.partial(compile_quantized, mode=mode, options=options)
    compiled = in_buckets(quantized, example_inputs, compiler)
    return looks(compiled)


def _looks(gm: fx.GraphModule) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """What is to be looked at after calls, where ranges may be unset at entry."""
    sites = [site for node in execution_order(gm) if (site := site_of(node)) is not None]
    if any(site.mode is Mode.FIRST for site in sites):
        return settle_after
    state = {node for site in sites if site.mode is Mode.RESOLVE for node in site.state}
    places = [place for place, node in enumerate(gm.graph.find_nodes(op="placeholder")) if node in state]
    return functools.partial(tell_of_unset, places=places) if places else lambda compiled: compiled


@quantizes_first
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
    looks = _looks(quantized)
    passes = joint_passes(**Options.read(options).joint)
    compiler = functools.partial(aot_eager, runner=lambda graph: graph, passes=passes)
    if Options.read(options).reuse_weights:
        compiled = reused(quantized, example_inputs, compiler, compiler, "fxquant_eager")
    else:
        compiled = in_buckets(quantized, example_inputs, compiler)
    return looks(compiled)
