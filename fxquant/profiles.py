"""Target profiles: what a deployment runtime can run as integers, as data.

Placement, lint and verify read the same profile. Facts are measured on the runtime where it can be installed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from fxquant.errors import InvalidArgument


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Operator traits of one runtime, by op kind (see `fxquant.graph`).

    Attributes:
        hard: kinds whose inputs are quantized wherever they stand.
        soft: kinds with an integer kernel that pays only between quantized neighbours.
        needs_output: kinds that run as integers only if their output is quantized too.
        fuses: activations that the runtime fuses into a kind of ``needs_output`` before that quantizer.
        joins_scale: whether a concat's operands and result must share one scale.
        refused: kind → why it stays in float.
        opset: the ONNX opset written by default, and the highest the runtime loads.
    """

    name: str
    hard: frozenset[str]
    soft: frozenset[str]
    needs_output: frozenset[str]
    fuses: frozenset[str]
    joins_scale: bool
    refused: dict[str, str] = field(default_factory=dict)
    opset: int = 21
    highest_opset: int = 26


ONNXRUNTIME = Profile(
    name="onnxruntime",
    hard=frozenset({"conv", "linear", "matmul", "einsum", "embedding", "sdpa"}),
    soft=frozenset({"add", "cat", "avg_pool"}),
    needs_output=frozenset({"conv"}),
    fuses=frozenset({"relu", "relu6"}),
    joins_scale=False,
    refused={
        "conv_transpose": "onnxruntime has no integer ConvTranspose kernel",
        "recurrent_cell": "a fused recurrent cell is not looked into: its products stay float",
        "mv": "products of a matrix and a vector stay float",
    },
)

PROFILES: dict[str, Profile] = {profile.name: profile for profile in (ONNXRUNTIME,)}


def get_profile(target: str) -> Profile:
    """The profile of a target name; InvalidArgument names the known ones."""
    if target not in PROFILES:
        known = ", ".join(repr(name) for name in PROFILES)
        raise InvalidArgument(f"target must be one of {known}: got {target!r}.")
    return PROFILES[target]
