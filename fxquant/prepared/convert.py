"""`convert`: a prepared model as a module whose weights are integers, for inference in torch."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree

from fxquant.capture.in_float32 import in_float32, widened
from fxquant.errors import ExportError, InvalidArgument, NotQuantizedWarning
from fxquant.graph.arguments import operand
from fxquant.graph.views import FakeQuant
from fxquant.ops.quantize import DEQUANTIZE_TENSOR
from fxquant.passes.export.constants import held_name
from fxquant.passes.export.freeze import Frozen
from fxquant.passes.export.hold_scales import LABEL
from fxquant.passes.export.integer_layers import IntegerLayer
from fxquant.passes.pipelines import converted_passes
from fxquant.plan.plan import Plan
from fxquant.prepared.deployed import opened, quantized_graph
from fxquant.prepared.program import on_its_own
from fxquant.prepared.root import require_plan, unwrap
from fxquant.prepared.unset import check_ranges, unset_as_deployed
from fxquant.support.progress import counting
from fxquant.support.table import megabytes

_SHARE = 1e-3  # of codes that may be the neighbour, by sums and products in another order
_NOISE = 1e-4  # of the spread of an output
_REPORT = "fxquant_report"


@dataclass(frozen=True, kw_only=True)
class ConvertReport:
    """What `convert` made.

    Attributes:
        integers: paths of the layers that run on integers.
        floats: what stays a float product or a note, each with its reason.
        state_bytes: of all that ``state_dict()`` holds.
        float_bytes: of the prepared model's parameters in float32.
    """

    integers: tuple[str, ...]
    floats: tuple[str, ...]
    state_bytes: int
    float_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return dict(vars(self))

    def __str__(self) -> str:
        lines = [
            f"{len(self.integers)} layers on integers; {megabytes(self.state_bytes)} of state, "
            f"{megabytes(self.float_bytes)} of parameters in float32",
            *(f"  float: {reason}" for reason in self.floats),
        ]
        return "\n".join(lines)


class ConvertedModel(fx.GraphModule):
    """What `convert` gives: the evaluation graph, with an `IntegerLayer` in the place of each layer.

    Linear layers and convolutions multiply codes in oneDNN's integer kernels, in eager and under plain
    ``torch.compile``, which fuses what stands between them; a layer whose result is quantized gives codes. Weights of 4
    bits are held two to a byte. What has no integer kernel is a float product of the same values, whose weight is held
    as codes all the same. Scales are buffers: ``state_dict()`` holds all that the module computes with, as plain
    tensors, and fits any conversion of the same plan. Beside it, each layer keeps its weight once more, as oneDNN's
    kernels have it. Everything float is float32, also where the model is of a half type.

    Sums of products are exact, also on CPUs whose kernels add pairs of products in 16 bits: there each layer multiplies
    two halves of its codes.
    """

    @property
    def report(self) -> ConvertReport:
        """What runs on integers, what stays float, and bytes."""
        found: ConvertReport = self.meta[_REPORT]
        return found

    def train(self, mode: bool = True) -> ConvertedModel:
        """Raises InvalidArgument but for ``mode=False``: integers have no gradients."""
        if mode:
            raise InvalidArgument(
                "a converted model must stay in evaluation: got train(). Train the prepared model and convert it."
            )
        super().train(False)
        return self


def convert(
    model: nn.Module,
    args: tuple[Any, ...],
    *,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_batch: bool = True,
    dynamic_shapes: Any = None,
    verify: bool = True,
) -> ConvertedModel:
    """A prepared, trained (or calibrated) model as a `ConvertedModel` with integer weights, for inference on a CPU.

    ::

        relu(linear(x, w, b))  →  codes = quantize(x, s, z); fc(codes, s, z)    fc.weight: int8 [out, in]

    Evaluation graph with BatchNorm folded. Codes are training's within the contract of ``docs/numerics.md``: kernels
    multiply by ``1 / s`` where training divides. ``report`` of the result says what stays float and why, as does a
    NotQuantizedWarning. The model, its modes and its compiled graphs stay as they were.

    Args:
        kwargs: keyword example inputs.
        dynamic_batch: as in `export_onnx`; a size that is left open may change.
        dynamic_shapes: as in `export_onnx`.
        verify: hold each quantized tensor and each output to the evaluated graph on the given inputs.

    Raises InvalidArgument (not prepared, not on the CPU), RangeNotSet, ExportError (torch.export failed; a format that
    has no integers, as small floats and scales of blocks and tokens; the module computes another thing).
    """
    plan = require_plan(model, "convert")
    plain = unwrap(model)
    _check_device(plain)
    notes = check_ranges(plain)
    args, named, sizes = opened(plain, args, kwargs, dynamic_batch, dynamic_shapes)
    with counting("convert"), in_float32(plain), unset_as_deployed(plain), torch.no_grad():
        inputs = widened((args, named))
        passes = converted_passes(_of_four_bits(plan))
        gm, evaluated, frozen = quantized_graph(plain, inputs[0], inputs[1], sizes, plan, passes)
        if frozen.notes:
            warnings.warn("; ".join(frozen.notes), NotQuantizedWarning, stacklevel=2)
        found = _alone(gm)
        found.meta[_REPORT] = _report(found, plain, (*notes, *frozen.notes))
        if verify:
            _check(found, evaluated, frozen, inputs)
    return found


def _report(converted: nn.Module, model: nn.Module, floats: tuple[str, ...]) -> ConvertReport:
    return ConvertReport(
        integers=tuple(path for path, module in converted.named_modules() if isinstance(module, IntegerLayer)),
        floats=floats,
        state_bytes=sum(value.numel() * value.element_size() for value in converted.state_dict().values()),
        float_bytes=4 * sum(p.numel() for p in model.parameters()),
    )


def _check_device(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.device.type != "cpu":
            raise InvalidArgument(
                f"a model to convert must be on the CPU, whose integer kernels it is for: got {parameter.device} "
                f"({name}). Move it with model.cpu(), or use export_onnx."
            )


def _of_four_bits(plan: Plan) -> frozenset[str]:
    """Weights whose codes fit half a byte, as `Freeze` names them."""
    fit = [site for site in plan.sites if site.local.role == "weight" and site.local.spec.quant_max <= 7]
    return frozenset(held_name(f"{site.key}.codes") for site in fit)


def _alone(gm: fx.GraphModule) -> ConvertedModel:
    """With a state of its own, and nothing in it that takes a gradient."""
    found = ConvertedModel(on_its_own(gm), gm.graph)
    for parameter in found.parameters():
        parameter.requires_grad_(False)
    return found.eval()


class _Recorded(fx.Interpreter):
    """Runs a converted graph and keeps the values that codes stand for, by site."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.values: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        """A node's value."""
        value = super().run_node(n)
        label = n.meta.get(LABEL)
        if label is not None:
            scale, zero_point = self._grid(n)
            self.values[label] = DEQUANTIZE_TENSOR(value, scale, zero_point)
        return value

    def _grid(self, codes: fx.Node) -> tuple[Tensor, Tensor]:
        if codes.op == "call_module":
            layer = self.fetch_attr(str(codes.target))
            return layer.output_scale, layer.output_zero_point
        return self.env[operand(codes, "scale")], self.env[operand(codes, "zero_point")]


class _Followed(fx.Interpreter):
    """Runs the evaluated graph on another's quantized values, each held to what it is computed from."""

    def __init__(self, gm: fx.GraphModule, labels: Mapping[str, str], values: Mapping[str, Tensor]) -> None:
        super().__init__(gm)
        self.labels, self.given = labels, values

    def run_node(self, n: fx.Node) -> Any:
        """A node's value; of a quantizer, the other's. ExportError where that is off."""
        ours = super().run_node(n)
        view, label = FakeQuant.of(n), self.labels.get(n.name, "")
        if view is None or label not in self.given:
            return ours
        theirs, scale = self.given[label].reshape(ours.shape), self._scale(view)
        steps = ((theirs - ours) / scale).abs()
        most, count = float(steps.max()) if steps.numel() else 0.0, int((steps > 0.5).sum())
        if not most < 1.5 or count > max(1, _SHARE * steps.numel()):
            raise ExportError(
                f"converted model must compute what the model does: got {count} of {steps.numel()} codes of {label} "
                f"off, by {most:.3g} at most. Please report it with the model."
            )
        return torch.empty_like(ours).copy_(theirs)

    def _scale(self, view: FakeQuant) -> Tensor:
        found = self.env[view.scale] if isinstance(view.scale, fx.Node) else torch.tensor(view.scale)
        return found.reshape(()) if found.numel() == 1 else found


def _check(converted: fx.GraphModule, evaluated: fx.GraphModule, frozen: Frozen, inputs: Any) -> None:
    """ExportError for the first tensor that is off, each from the converted graph's codes before it."""
    leaves = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in _pytree.tree_leaves(inputs)]
    recorded = _Recorded(converted)
    found = _pytree.tree_leaves(recorded.run(*leaves))
    followed = _Followed(evaluated, frozen.labels, recorded.values)
    expected = _pytree.tree_leaves(followed.run(*leaves))
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        if not isinstance(other, Tensor) or not other.is_floating_point() or not other.numel():
            continue
        spread = float(other.max() - other.min()) or 1.0
        off = float((one - other).abs().max())
        if not off <= _NOISE * spread:
            raise ExportError(
                f"converted model must compute what the model does: got output {number} off by {off:.3g}, "
                f"{off / spread:.0%} of its spread. Please report it with the model."
            )
