"""AOTAutograd with our joint passes, run op by op."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from fxquant.backend.reports import log_of, run_after
from fxquant.ops.library import DECOMPOSITIONS
from fxquant.ops.lowering_table import becomes
from fxquant.passes.base import Pass
from fxquant.passes.pipelines import joint_passes
from fxquant.passes.stages import JOINT


def aot_eager(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    runner: Callable[[fx.GraphModule], Callable[..., Any]],
    passes: tuple[Pass, ...] | None = None,
) -> Callable[..., Any]:
    """AOTAutograd with our joint passes, or others; ``runner`` makes each of the two graphs callable."""
    behind, told = joint_passes() if passes is None else passes, log_of(gm)
    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd  # private; tried on 2.13 and 2.15

    def partition(joint: fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Any:
        run_after(behind, joint, told, JOINT)
        return min_cut_rematerialization_partition(joint, inputs, **kwargs)

    def compiler(graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        return make_boxed_func(runner(graph))

    def inference(graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        run_after(behind, graph, told, JOINT)
        return compiler(graph, inputs)

    backend = aot_autograd(
        fw_compiler=compiler,
        inference_compiler=inference,
        partition_fn=partition,
        keep_inference_input_mutations=True,
        decompositions={op: DECOMPOSITIONS[op] for op in DECOMPOSITIONS if becomes(op, "aot eager") == "arithmetic"},
    )
    return backend(gm, example_inputs)
