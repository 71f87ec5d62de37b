"""How each tool takes part in the accuracy bench: float net, calibration batches and format → what trains quantized.

All get what fxquant's recipe of that name means where they can say it; a format that a tool has not raises
`nets.Unavailable` with the reason. Versions tried: torch 2.13, brevitas 0.13, nvidia-modelopt 0.47, torchao 0.18. They
differ in what they quantize: Brevitas, ModelOpt and torchao the inputs and weights of layers, torchao of ``nn.Linear``
alone; fxquant also both sides of additions and the products inside attention, as an integer runtime needs. The tool
"fxquant tokens" has scales per token (``w4a4_dynamic`` for w4a4), as torchao; "fxquant layers" quantizes no more than
the layers' own; "fxquant integers" takes products of codes, in backward too. Rows of a tool "…, tables too" and "…,
attention in 4 bits" are of the recipes as they were, with embeddings or attention in the format of all else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from accuracy_peers import PEERS, Peer
from nets import Unavailable
from torch import Tensor, nn

import fxquant
from fxquant.prepared.quantizer import quantizers
from fxquant.spec.recipes import RECIPES, Recipe

FORMATS = ("int8", "w4a8", "w4a4", "w2a8", "fp8", "mxfp4", "nvfp4")
EAGER = "fxquant_eager"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Built:
    """A net that trains quantized.

    Attributes:
        model: the module with the parameters.
        forward: what runs it.
        groups: a learning rate → an optimizer's parameter groups.
        runs_on: the backend, for the row.
        layers: how many of the net's layers have quantized weights, for the row.
    """

    model: nn.Module
    forward: Callable[[Tensor], Tensor]
    groups: Callable[[float], list[Any]]
    runs_on: str
    layers: str | None = None

    @classmethod
    def plain(cls, model: nn.Module) -> Built:
        """Run as it is, all parameters at one rate."""
        return cls(model=model, forward=model, groups=lambda peak: list(model.parameters()), runs_on="eager torch")


Build = Callable[[nn.Module, list[Tensor], str], Built]


@dataclasses.dataclass(frozen=True)
class Tool:
    """A way to train quantized; what another's raises is why it has no row, what ours raises ends the bench."""

    build: Build
    ours: bool = True


def _float(model: nn.Module, batches: list[Tensor], format: str) -> Built:
    return Built.plain(model)


def _ours(model: nn.Module, batches: list[Tensor], recipe: Recipe, options: dict[str, Any] | None = None) -> Built:
    """Prepared for no runtime in particular, its ranges from the batches; ``options`` are the backend's."""
    try:
        fxquant.prepare(model, (batches[0],), recipe=recipe, target="generic")
    except fxquant.errors.FxquantError as error:
        if "matched no operator" not in str(error) and "found none to quantize" not in str(error):
            raise
        raise Unavailable(f"no operator of this net takes {recipe.weight}") from error
    fxquant.calibrate(model, [(x,) for x in batches], progress=False)
    layers = sum(isinstance(module, (nn.Conv2d, nn.Linear, nn.Embedding)) for module in model.modules())
    quantized = sum(quantizer.site.role == "weight" for _, quantizer in quantizers(model))
    return Built(
        model=model,
        forward=torch.compile(model, backend=EAGER, dynamic=False, options=options),
        groups=lambda peak: fxquant.parameter_groups(model, lr=peak),
        runs_on=EAGER,
        layers=f"{quantized} of {layers}",
    )


def _peer(make: Peer) -> Build:
    """Another's, run as it is."""

    def build(model: nn.Module, batches: list[Tensor], format: str) -> Built:
        return Built.plain(make(model, batches, format))

    return build


def _fxquant(model: nn.Module, batches: list[Tensor], format: str) -> Built:
    """The recipe as it is."""
    return _ours(model, batches, RECIPES[format])


def _tokens(model: nn.Module, batches: list[Tensor], format: str) -> Built:
    """The recipe with activations whose scales are those of each token."""
    if f"{format}_dynamic" not in RECIPES:
        raise Unavailable("no recipe of this format has a scale per token")
    return _ours(model, batches, RECIPES[f"{format}_dynamic"])


def _integers(model: nn.Module, batches: list[Tensor], format: str) -> Built:
    """The recipe with products of codes in forward and backward, wherever that is possible."""
    return _ours(model, batches, RECIPES[format], {"integer_matmul": True, "integer_backward": True})


def _layers(model: nn.Module, batches: list[Tensor], format: str) -> Built:
    """The recipe for convolutions and linears alone, as peers place it."""
    convolutions = any(isinstance(module, nn.Conv2d) for module in model.modules())
    kinds = frozenset({"conv", "linear"} if convolutions else {"linear"})
    return _ours(model, batches, dataclasses.replace(RECIPES[format], kinds=kinds))


def _learned(model: nn.Module, batches: list[Tensor], format: str) -> Built:
    """The recipe with scales of weights and activations that are trained, by LSQ."""
    recipe = RECIPES[format]
    if recipe.weight.scale_format is not None:
        raise Unavailable("a scale that is rounded to another format is of the current group")
    specs = {name: dataclasses.replace(getattr(recipe, name), range=fxquant.Learned()) for name in _ROLES}
    return _ours(model, batches, dataclasses.replace(recipe, **specs))


def _extremes(model: nn.Module, batches: list[Tensor], format: str) -> Built:
    """The recipe with ranges from extremes: of the current weight, and a moving average of activations'."""
    recipe = RECIPES[format]
    ranges = zip(_ROLES, (fxquant.CurrentTensor(), fxquant.MovingAverage()), strict=True)
    specs = {name: dataclasses.replace(getattr(recipe, name), range=found) for name, found in ranges}
    return _ours(model, batches, dataclasses.replace(recipe, **specs))


_ROLES = ("weight", "activation")

TOOLS: dict[str, Tool] = {
    "float": Tool(_float),
    "fxquant": Tool(_fxquant),
    "fxquant tokens": Tool(_tokens),
    "fxquant integers": Tool(_integers),
    "fxquant learned": Tool(_learned),
    "fxquant extremes": Tool(_extremes),
    "fxquant layers": Tool(_layers),
    **{name: Tool(_peer(make), ours=False) for name, make in PEERS.items()},
}
