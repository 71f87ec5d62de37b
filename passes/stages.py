"""The stages of a graph on its way through fxquant, each with a description that a machine checks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxquant.graph.meta import SITE, SOURCE, STANDS_FOR, STATE
from fxquant.ops import fake_quantize, qdq, qparams, quantize, saved
from fxquant.ops.bias import FAKE_QUANTIZE_BIAS
from fxquant.ops.elements import DEQUANTIZE_ELEMENTS, QUANTIZE_ELEMENTS
from fxquant.ops.int4 import UNPACK_INT4
from fxquant.ops.integer_matmul import INTEGER_CONVOLUTION
from fxquant.ops.learned import LEARNED_OPS
from fxquant.ops.marks import BIND, MATERIALIZE, STAND_IN
from fxquant.ops.rounding_words import ROUNDING_WORDS

_KEY = "fxquant_stage"  # in the meta of a graph module: its stage's name, as keys of caches hold that meta


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What a graph is while the passes of one stage run on it.

    Attributes:
        name: as errors have it.
        marks: operators that only fxquant writes, of those that may stand here. What a user may call stands anywhere.
        makes: operators of fxquant that a pass may put here; what stood here before, it may copy.
        inputs: meta keys of placeholders: all of them have these, or none (parameters are then attributes).
        owns: meta keys that belong to the graph: a pass that changes one has edited it.
        is_ours: nobody else's pass has run on it, so that a node without its value is our mistake.
    """

    name: str
    marks: frozenset[Any] = frozenset()
    makes: frozenset[Any] = frozenset()
    inputs: tuple[str, ...] = ()
    owns: tuple[str, ...] = ()
    is_ours: bool = False

    def __str__(self) -> str:
        return self.name


DYNAMO = Stage(name="dynamo", marks=frozenset({BIND}))
"""What Dynamo or torch.export wrote: calls of Python and of torch, with blocks and transforms as they were traced."""

CAPTURED = Stage(
    name="captured",
    marks=frozenset({BIND, STAND_IN}),
    makes=frozenset(
        {*fake_quantize.FAKE_QUANTIZE, *qparams.QPARAM_OPS, *LEARNED_OPS, FAKE_QUANTIZE_BIAS, STAND_IN},
    ),
    inputs=(SOURCE, STATE),
    owns=("val", "custom", SITE, STANDS_FOR, SOURCE, STATE),
    is_ours=True,
)
"""The ATen training graph that both doors lead to: ``val`` on every call, a fake-quant node a site."""

JOINT = Stage(
    name="joint",
    marks=frozenset({INTEGER_CONVOLUTION, ROUNDING_WORDS}),
    makes=frozenset(
        {
            *quantize.QUANTIZE,
            *quantize.DEQUANTIZE,
            QUANTIZE_ELEMENTS,
            DEQUANTIZE_ELEMENTS,
            *saved.FORWARD,
            *saved.BACKWARD,
            INTEGER_CONVOLUTION,
            ROUNDING_WORDS,
        },
    ),
    owns=("val", "recompute"),
)
"""AOTAutograd's graph of forward and backward, or of inference, before it is partitioned."""

POST_GRAD = Stage(
    name="post_grad",
    marks=frozenset({*JOINT.marks, MATERIALIZE}),
    makes=frozenset({MATERIALIZE}),
    owns=("val", "recompute"),
)
"""What Inductor lowers next: forward or backward."""

EXPORT = Stage(
    name="export",
    makes=frozenset(
        {
            *(qdq.DEQUANTIZE, qdq.QUANTIZE_DEQUANTIZE, qdq.QUANTIZE_DEQUANTIZE_BLOCKS),
            *(quantize.QUANTIZE_TENSOR, quantize.DEQUANTIZE_TENSOR, UNPACK_INT4),
        },
    ),
    owns=("val", SITE, STANDS_FOR),
    is_ours=True,
)
"""The evaluation graph on its way to a file: parameters are attributes, sites become constants and labelled pairs."""

STAGES = (DYNAMO, CAPTURED, JOINT, POST_GRAD, EXPORT)
_BY_NAME = {stage.name: stage for stage in STAGES}
_MARKS: frozenset[Any] = frozenset().union(*(stage.marks for stage in STAGES))


def enter(gm: fx.GraphModule, stage: Stage) -> fx.GraphModule:
    """Says of which stage a graph is from here on; graphs of other compilers come unsaid."""
    gm.meta[_KEY] = stage.name
    return gm


def stage_of(gm: fx.GraphModule) -> Stage | None:
    """What `enter` said, None of a graph that it was not said of."""
    return _BY_NAME.get(gm.meta.get(_KEY, ""))


def operators(nodes: Iterable[fx.Node]) -> frozenset[Any]:
    """The operators of fxquant among those that nodes call."""
    targets = {node.target for node in nodes}
    return frozenset(t for t in targets if isinstance(t, torch._ops.OpOverload) and t.namespace == "fxquant")


def misfit(gm: fx.GraphModule, found: frozenset[Any], stage: Stage) -> str | None:
    """Why a graph that holds the operators ``found`` is none of a stage, or None."""
    known = stage_of(gm)
    if known is not None and known.name != stage.name:
        return f"the {known} graph"
    for op in sorted(found & (_MARKS - stage.marks), key=str):
        return f"one that holds {op}"
    for node in gm.graph.find_nodes(op="placeholder") if stage.inputs else ():
        missing = [key for key in stage.inputs if key not in node.meta]
        if missing and len(missing) < len(stage.inputs):
            return f"one whose input {node.name} has no meta[{missing[0]!r}]"
    return None
