"""The order of the passes through each door, and that none is left out of all."""

from __future__ import annotations

import importlib
import itertools
import pkgutil
from collections.abc import Sequence
from dataclasses import replace

import pytest

import fxquant.passes
from fxquant.passes.base import Pass
from fxquant.passes.joint.use_integer_backward import IntegerBackward
from fxquant.passes.pipelines import (
    COMPILED,
    converted_passes,
    dynamo_passes,
    export_passes,
    joint_passes,
    normalizing_passes,
    post_grad_passes,
    program_passes,
    training_passes,
)
from fxquant.passes.stages import CAPTURED, DYNAMO, EXPORT, JOINT, POST_GRAD, Stage
from fxquant.spec.recipes import INT8
from fxquant.targets.profiles import ONNXRUNTIME

PLAIN = replace(ONNXRUNTIME, bias_apart=False, float_pads=False)
TRAINING = training_passes(INT8, ONNXRUNTIME, stateless=False)


def names(passes: Sequence[Pass]) -> list[str]:
    return [each.name for each in passes]


def before(passes: Sequence[Pass], *order: str) -> bool:
    """Whether these come in this order."""
    places = [names(passes).index(name) for name in order]
    return places == sorted(places)


DOORS: list[tuple[Stage, Sequence[Pass]]] = [
    (DYNAMO, dynamo_passes()),
    (CAPTURED, (*TRAINING, *COMPILED)),
    (JOINT, joint_passes(dict, integers=True, integer_backward=IntegerBackward(mode=True))),
    (POST_GRAD, post_grad_passes()),
    (EXPORT, export_passes(replace(ONNXRUNTIME, bias_apart=True))),
    (EXPORT, program_passes("xnnpack")),
    (EXPORT, converted_passes(frozenset())),
]


@pytest.mark.parametrize(("stage", "passes"), DOORS, ids=[f"{at}, {stage}" for at, (stage, _) in enumerate(DOORS)])
def test_each_runs_on_its_own_graph_and_once(stage: Stage, passes: Sequence[Pass]) -> None:
    assert all(stage in each.stages for each in passes)
    assert len(set(names(passes))) == len(passes)


# SplitWeights is given a model's inputs, SilenceBodies a whole, KeepDivisions belongs to Inductor's eager form.
APART = {"SplitWeights", "SilenceBodies", "KeepDivisions"}


def test_none_is_forgotten() -> None:
    found = {
        value.__name__
        for module in pkgutil.walk_packages(fxquant.passes.__path__, "fxquant.passes.")
        for value in vars(importlib.import_module(module.name)).values()
        if isinstance(value, type) and issubclass(value, Pass) and value is not Pass
    }
    assert found - {name for _, passes in DOORS for name in names(passes)} == APART


def test_places_are_counted_on_normal_graphs() -> None:
    assert TRAINING[: len(normalizing_passes())] == normalizing_passes()
    assert before(TRAINING, "FunctionalizeActivations", "DecomposeRecurrentCells", "InsertFakeQuantize")


def test_sites_are_shared_once_they_stand_where_they_stay() -> None:
    order = ("InsertFakeQuantize", "FoldBatchNorm", "FoldTrainingBatchNorm", "EliminateRedundantFakeQuantize")
    assert before(TRAINING, *order, "QuantizeBias", "BatchRangeUpdates")


# What a joint graph needs for each choice: how backward keeps values, how products are taken, where sites are lowered.
@pytest.mark.parametrize(
    ("table", "integers", "save_quantized"), list(itertools.product((None, dict), (False, True, "auto"), (True, False)))
)
def test_passes_of_a_joint_graph(table: type | None, integers: bool, save_quantized: bool) -> None:
    passes = joint_passes(table, integers=integers, save_quantized=save_quantized)
    expected = ["SaveQuantizedActivations"] * save_quantized + ["TagRecompute", "SaveRunningStatistics"]
    expected += ["UseIntegerMatmul"] * (integers is not False) + ["LowerFakeQuantize"] * (table is not None)
    assert names(passes) == expected
    if integers is not False:
        (product,) = (each for each in passes if each.name == "UseIntegerMatmul")
        assert (product.mode, product.by_default, product.decompositions) == (integers, False, table)
    if table is not None:
        assert passes[-1].where == "joint" and passes[-1].decompositions is dict


def test_what_a_target_needs_of_a_file() -> None:
    common = ["QuantizeBeforeRepeats", "Freeze", "DecomposeLinear", "DecomposeAddmm", "RequantizeMoved"]
    common += ["DecomposeAttention", "GatherCodes"]
    assert names(export_passes(PLAIN)) == common
    apart = export_passes(replace(PLAIN, bias_apart=True))
    assert names(apart) == [*common, "SeparateSums", "SeparateRelu", "SeparateFloatWeights"]
    assert [each.bias_apart for each in apart[2:4]] == [True, True]
    assert [each.bias_apart for each in export_passes(PLAIN)[2:4]] == [False, False]
    for flag in (False, True):
        moved = export_passes(replace(PLAIN, float_pads=flag, float_volume_pools=not flag))[4]
        assert (moved.pads, moved.volume_pools) == (flag, not flag)


def test_options_reach_the_passes_that_have_them() -> None:
    (insert,) = (each for each in TRAINING if each.name == "InsertFakeQuantize")
    assert (insert.recipe, insert.profile, insert.stateless) == (INT8, ONNXRUNTIME, False)
    (bias,) = (each for each in TRAINING if each.name == "QuantizeBias")
    assert bias.profile is ONNXRUNTIME
    assert post_grad_passes(dict)[0].where == "post-grad"
