"""The passes in the order in which each door runs them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from fxquant.passes.base import Pass
from fxquant.passes.captured.batch_range_updates import BatchRangeUpdates
from fxquant.passes.captured.decompose_recurrent_cells import DecomposeRecurrentCells
from fxquant.passes.captured.eliminate_redundant_fake_quantize import EliminateRedundantFakeQuantize
from fxquant.passes.captured.fold_batch_norm import FoldBatchNorm
from fxquant.passes.captured.fold_training_batch_norm import FoldTrainingBatchNorm
from fxquant.passes.captured.functionalize_activations import FunctionalizeActivations
from fxquant.passes.captured.hoist_views import HoistViews
from fxquant.passes.captured.insert_fake_quantize import InsertFakeQuantize
from fxquant.passes.captured.pass_gradients_through import PassGradientsThrough
from fxquant.passes.captured.quantize_bias import QuantizeBias
from fxquant.passes.captured.sink_weights import SinkWeights
from fxquant.passes.dynamo.dissolve_exported import DissolveExported
from fxquant.passes.dynamo.outline_transforms import OutlineTransforms
from fxquant.passes.export.decompose_attention import DecomposeAttention
from fxquant.passes.export.decompose_linear import DecomposeAddmm, DecomposeLinear
from fxquant.passes.export.decompose_pairs import DecomposePairs, FloatWeights
from fxquant.passes.export.freeze import Freeze
from fxquant.passes.export.gather_codes import GatherCodes
from fxquant.passes.export.hold_scales import HoldScales
from fxquant.passes.export.pack_codes import PackCodes
from fxquant.passes.export.quantize_at_products import QuantizeAtProducts, QuantizeResults
from fxquant.passes.export.quantize_before_repeats import QuantizeBeforeRepeats
from fxquant.passes.export.requantize_moved import RequantizeMoved
from fxquant.passes.export.separate_units import SeparateFloatWeights, SeparateRelu, SeparateSums
from fxquant.passes.export.use_integer_layers import UseIntegerLayers
from fxquant.passes.joint.save_quantized_activations import SaveQuantizedActivations
from fxquant.passes.joint.save_running_statistics import SaveRunningStatistics
from fxquant.passes.joint.tag_recompute import TagRecompute
from fxquant.passes.joint.use_integer_backward import IntegerBackward, UseIntegerBackward
from fxquant.passes.joint.use_integer_matmul import IntegerMatmul, UseIntegerMatmul
from fxquant.passes.post_grad.lower_fake_quantize import LowerFakeQuantize
from fxquant.passes.post_grad.materialize_shared import MaterializeShared
from fxquant.passes.post_grad.observe_in_rows import ObserveInRows
from fxquant.spec.recipes import Recipe
from fxquant.targets.profiles import Profile


def dynamo_passes() -> tuple[Pass, ...]:
    """On what torch.export wrote, before it is captured; bodies of Dynamo's are outlined as they are traced."""
    return (DissolveExported(), OutlineTransforms())


def normalizing_passes() -> tuple[Pass, ...]:
    """What comes before placement, in prepare, compile, explain and export alike: places are found by counting."""
    return (FunctionalizeActivations(), DecomposeRecurrentCells())


def training_passes(recipe: Recipe, profile: Profile, *, stateless: bool) -> tuple[Pass, ...]:
    """On the captured graph, in compile and in export."""
    return (
        *normalizing_passes(),
        InsertFakeQuantize(recipe=recipe, profile=profile, stateless=stateless),
        FoldBatchNorm(),
        FoldTrainingBatchNorm(),
        EliminateRedundantFakeQuantize(),
        QuantizeBias(profile=profile),
        BatchRangeUpdates(),
        PassGradientsThrough(),
    )


COMPILED: tuple[Pass, ...] = (HoistViews(), SinkWeights())
"""On the captured graph, after those, where it is compiled: what only compiled code is better for. Values are recorded
without, as export has them."""

Table = Callable[[], Mapping[Any, Callable[..., Any]]]


def joint_passes(
    decompositions: Table | None = None,
    *,
    integers: IntegerMatmul = False,
    by_default: bool = False,
    save_quantized: bool = True,
    integer_backward: IntegerBackward = IntegerBackward(),  # noqa: B008 - frozen
) -> tuple[Pass, ...]:
    """On AOTAutograd's joint graph of forward and backward, before it is partitioned.

    With ``decompositions``, the table of a compiler that fuses, gradients of fake-quants are lowered here: the
    partitioner then sees arithmetic that is cheap to recompute, and keeps what lies before it instead of every
    quantizer's input.
    ``integers``: whether products are taken of codes, ``by_default`` where nobody asked (`UseIntegerMatmul`); between
    the tags, which codes take over, and the lowering. ``integer_backward``: the same of products in backward, see
    `UseIntegerBackward`.
    ``save_quantized``: whether backward reads codes, see `SaveQuantizedActivations`; before the tags, which it would
    take for a user's.
    """
    tags: tuple[Pass, ...] = (SaveQuantizedActivations(),) if save_quantized else ()
    tags += (TagRecompute(), SaveRunningStatistics())
    if integers is not False:
        tags += (UseIntegerMatmul(mode=integers, by_default=by_default, decompositions=decompositions),)
    if integer_backward.mode is not False:
        tags += (UseIntegerBackward(options=integer_backward, decompositions=decompositions),)
    if decompositions is None:
        return tags
    return (*tags, LowerFakeQuantize(decompositions=decompositions, where="joint"))


def post_grad_passes(decompositions: Table = dict) -> tuple[Pass, ...]:
    """On Inductor's forward and backward graphs, before its own passes: what was not lowered before; what is stored."""
    return (LowerFakeQuantize(decompositions=decompositions, where="post-grad"), MaterializeShared(), ObserveInRows())


def export_passes(profile: Profile, *, float_pools: bool = False) -> tuple[Pass, ...]:
    """On the evaluation graph with its sites, after the training passes: integers, in the forms that a target fuses.

    ``float_pools``: the runtime takes maxima in float, in the type that the file will have.
    """
    passes: tuple[Pass, ...] = (
        QuantizeBeforeRepeats(),
        Freeze(),
        DecomposeLinear(bias_apart=profile.bias_apart),
        DecomposeAddmm(bias_apart=profile.bias_apart),
        RequantizeMoved(pads=profile.float_pads, volume_pools=profile.float_volume_pools, pools=float_pools),
        DecomposeAttention(),
        GatherCodes(),
    )
    if profile.bias_apart:
        passes += (SeparateSums(), SeparateRelu(), SeparateFloatWeights())
    return passes


PROGRAM_RUNTIMES = ("x86", "xnnpack")
"""Those that take a torch.export program and have wishes."""


def program_passes(runtime: str | None = None) -> tuple[Pass, ...]:
    """In the place of those for a file: PT2E's operators, as a runtime of `PROGRAM_RUNTIMES` wants them."""
    passes: tuple[Pass, ...] = (QuantizeBeforeRepeats(), Freeze(), QuantizeAtProducts())
    if runtime == "xnnpack":
        return (*passes, QuantizeResults(), FloatWeights(), DecomposePairs(activations=torch.int8))
    return (*passes, DecomposePairs())


def converted_passes(int4: frozenset[str]) -> tuple[Pass, ...]:
    """In the place of those for a file: integer layers for inference in torch. ``int4``: weights of 4 bits."""
    return (
        QuantizeBeforeRepeats(),
        Freeze(),
        QuantizeAtProducts(),
        GatherCodes(),
        HoldScales(),
        UseIntegerLayers(int4=int4),
        PackCodes(int4=int4),
    )
