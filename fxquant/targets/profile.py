"""What a deployment runtime can run as integers, as data: placement, the passes, export and lint read the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal

from fxquant.errors import InvalidArgument
from fxquant.numerics.division import Rounding
from fxquant.spec.quant_spec import QuantSpec
from fxquant.targets.cards import Cards


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Operator traits of one runtime, by op kind (see `fxquant.graph`).

    Attributes:
        hard: kinds whose inputs are quantized wherever they stand.
        soft: kinds with an integer kernel that pays only between quantized neighbours.
        needs_output: kinds that run as integers only if their output is quantized too.
        fuses: activations that the runtime fuses into a kind of ``needs_output`` before that quantizer.
        skips: kinds of ``hard`` that an Add after them fuses into: of that Add only the other operand is quantized,
            and if adds are ``soft`` only where the result is too.
        symmetric: activations have zero point 0, in signed codes.
        symmetric_operands: operands (``"matmul.rhs"``) that have, where other activations need not. A matmul with a
            weight counts as linear.
        zero_based_operands: operands with zero point 0, in codes of either sign.
        faster_zero_based: operands that are faster so, and get it where values on both sides of zero are about alike:
            one-sided ones, as of GELU, would have half of the codes. Only of 8 bits or more.
        float_operands: operand → why it stays in float though its operator is of ``hard``.
        bias_apart: what the runtime would merge into a float product is written apart: a bias is subtracted, a ReLU
            that is read in float is a maximum, and so is what stands after a weight in float.
        integer_bias: a convolution adds its bias as int32 codes of scale (input scale · weight scale).
        implied_zero: where int8 codes are moved, a DequantizeLinear leaves out its zero point, see
            `fxquant.onnx.zero_points`.
        splits_weights: it takes a product apart whose result is split in three, see `fxquant.onnx.whole_products`.
        unpacks: it computes the weights of recurrent layers as it loads a file that has them as codes times scales, and
            before every run where a DequantizeLinear does.
        onnxruntime_forms: sums before a norm, SiLU and PReLU are written as onnxruntime runs them fastest, see
            `fxquant.onnx.runtime_forms`.
        float_pads: a pad runs in float, so that what is padded is quantized again after it, to the same codes.
        float_volume_pools: so does a max pool over three dimensions.
        activation_bits, weight_bits: code widths that the runtime knows.
        families: formats beyond integers that it runs, by `QuantSpec.family`; None: any.
        block_form: how activations in blocks are written: by ONNX's own operators; the same with
            products of tokens as MatMulInteger ("integer"); by TensorRT's ("trt").
        one_kind_of_codes: a product reads integers, or one kind of small float, of both operands.
        group_bits, group_sizes: the same for weights per group, and how many codes may share a scale; None: any number.
        lone_groups: a weight may be a single group, with one scale in all.
        int4_convolutions: convolutions take weights that are stored as int4.
        int4_half_scales: int4 codes become floats of a half type by half scales alone, see `fxquant.onnx.typed`.
        float_beside_groups: a weight per group is multiplied by float activations, never by codes.
        fused_half_attention: why ``scaled_dot_product_attention`` stays float in half types; empty where it need not.
        rounding: how activations are rounded; None: as their format says.
        float_pools: float types in which a maximum over a window runs in float, so that it is quantized again after.
        half_types: half types of the float parts beside which its products run on integers.
        without: half type → ONNX operators that it does not run in it, which stay float32.
        strongly_typed: what is float runs in the type that the file has: half is faster than float32.
        cards: devices that a file can be for, and what they lack; None: any that runs the runtime.
        refused: kind → why it stays in float.
        opset, highest_opset: the ONNX opset written by default, which is the lowest, and the highest that it loads.
    """

    name: str
    hard: frozenset[str]
    soft: frozenset[str]
    needs_output: frozenset[str] = frozenset()
    fuses: frozenset[str] = frozenset({"relu", "relu6"})
    skips: frozenset[str] = frozenset()
    symmetric: bool = False
    symmetric_operands: frozenset[str] = frozenset()
    zero_based_operands: frozenset[str] = frozenset()
    faster_zero_based: frozenset[str] = frozenset()
    float_operands: dict[str, str] = field(default_factory=dict)
    bias_apart: bool = False
    integer_bias: bool = False
    implied_zero: bool = False
    onnxruntime_forms: bool = False
    float_pads: bool = False
    splits_weights: bool = False
    unpacks: bool = False
    float_volume_pools: bool = False
    activation_bits: range = range(2, 17)
    weight_bits: range = range(2, 17)
    families: frozenset[str] | None = frozenset()
    one_kind_of_codes: bool = False
    block_form: Literal["onnx", "integer", "trt"] = "onnx"
    group_bits: range = range(2, 17)
    group_sizes: tuple[int, ...] | None = None
    lone_groups: bool = True
    int4_convolutions: bool = True
    int4_half_scales: bool = False
    float_beside_groups: bool = False
    fused_half_attention: str = ""
    rounding: Rounding | None = None
    float_pools: tuple[str, ...] = ()
    half_types: tuple[str, ...] = ("float16", "bfloat16")
    without: dict[str, frozenset[str]] = field(default_factory=dict)
    strongly_typed: bool = False
    cards: Cards | None = None
    refused: dict[str, str] = field(default_factory=dict)
    opset: int = 21
    highest_opset: int = 26

    def fit(
        self, spec: QuantSpec, operands: Collection[str] = (), *, is_positive: bool = False, is_even: bool = False
    ) -> QuantSpec:
        """An activation's format as this runtime takes it for some operands: another zero point at most.

        The codes of a tensor without negative values (``is_positive``) have zero point 0 in any format. Values that lie
        on both sides of zero alike (``is_even``) lose nothing by it.
        """
        needed = self.symmetric_operands if is_positive else self.symmetric_operands | self.zero_based_operands
        if is_even and spec.bits >= 8 and spec.group_size is None:  # with fewer codes each counts
            needed |= self.faster_zero_based
        if not (self.symmetric or needed.intersection(operands)) or (spec.signed and spec.symmetric):
            return spec
        return dataclasses.replace(spec, signed=True, symmetric=True)

    def rounded(self, spec: QuantSpec) -> QuantSpec:
        """An activation's format with the rounding that this runtime has, which divides by scales of groups."""
        if spec.group_size is not None or self.rounding in (None, spec.rounding):
            return spec
        return dataclasses.replace(spec, rounding=self.rounding)

    def check_format(self, role: str, spec: QuantSpec, subject: str) -> None:
        """Raises InvalidArgument for a width that the runtime has no codes for, or groups of another size."""
        if spec.family:
            self._check_family(role, spec, subject)
            return
        known = self.weight_bits if role == "weight" else self.activation_bits
        if spec.group_size is not None:
            self._check_group_size(spec.group_size, subject)
            known = range(max(known.start, self.group_bits.start), min(known.stop, self.group_bits.stop))
        if spec.bits not in known:
            what = "an activation" if role != "weight" else "a weight" if spec.group_size is None else "groups"
            bits = f"{known.start} to {known.stop - 1}" if len(known) > 1 else f"{known.start}"
            raise InvalidArgument(
                f"{subject} must have {bits} bits for target {self.name!r}: got {spec.bits} for {what}."
            )

    def _check_family(self, role: str, spec: QuantSpec, subject: str) -> None:
        if self.families is not None and spec.family not in self.families:
            what = "a weight" if role == "weight" else "an activation"
            others = "".join(f", {family}" for family in sorted(self.families))
            raise InvalidArgument(
                f"{subject} must have a format that target {self.name!r} runs: got {spec} for {what}. "
                f"It runs integers{others}; target='generic' takes any format."
            )

    def _check_group_size(self, size: int, subject: str) -> None:
        if self.group_sizes is not None and size not in self.group_sizes:
            *first, last = map(str, self.group_sizes)
            sizes = " or ".join([", ".join(first), last] if first else [last])
            raise InvalidArgument(
                f"{subject} must have groups of {sizes} for target {self.name!r}: got {size}. "
                f"Give the weights QuantSpec(group_size={self.group_sizes[0]}, …)."
            )

    def check_opset(self, opset: int | None) -> int:
        """The opset to write: the one given, or the default. Raises InvalidArgument for one that it does not load."""
        chosen = self.opset if opset is None else opset
        if not self.opset <= chosen <= self.highest_opset:
            raise InvalidArgument(
                f"opset must be from {self.opset} to {self.highest_opset} for {self.name}: got {chosen}."
            )
        return chosen


# What several runtimes have in common.

PRODUCT_KINDS = frozenset({"conv", "linear", "matmul", "einsum", "sdpa"})

FLOAT_CELLS = {
    "rnn": "a file holds a recurrent layer without gates as its steps: its products stay float",
    "mv": "products of a matrix and a vector stay float",
    "bilinear": "no runtime multiplies two activations and a weight in one integer kernel",
}

# Attention is kept whole, so that its probabilities are float and nothing is won by integers beside them.
FLOAT_VALUE = {"sdpa.value": "it is multiplied by probabilities in float"}
