"""Where an operator becomes arithmetic: by what it is for, by the stage of a compilation, by the device.

Whoever meets an operator asks `becomes`, and nobody decides for himself::

    eager             a call on tensors                                       `fxquant.ops.library.define`
    plain             torch.compile(backend="inductor")                       `fxquant.ops.plain_inductor`
    aot eager         AOTAutograd of the backend "fxquant_eager"              `fxquant.backend.eager`
    aot               AOTAutograd of the backend "fxquant"                    `fxquant.backend.inductor.compile`
    joint             its joint graph of forward and backward                 `LowerFakeQuantize`
    beside integers   the same where products are taken of codes              `LowerFakeQuantize`
    post-grad         forward and backward, after the partitioner             `LowerFakeQuantize`
    inductor          what Inductor makes of a node                           `fxquant.backend.inductor.lowerings`
    anywhere          no stage: a graph by itself, for tests and for people   `LowerFakeQuantize`

and it answers with one of

    arithmetic        operations of ATen take its place
    node              it stays what it is; after the last stage, a call of the eager operator
    whole             one expression or loop of Inductor's, which sees no operations of it as nodes
    kernel            a handwritten one; ours where it can be built and serves the call, else arithmetic
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch._ops import OpOverload

Form = Literal["arithmetic", "node", "whole", "kernel"]
Stage = Literal["eager", "plain", "aot eager", "aot", "joint", "beside integers", "post-grad", "inductor", "anywhere"]


@dataclass(frozen=True, kw_only=True)
class Role:
    """What operators of one purpose become, stage by stage; by default a function that AOTAutograd takes apart.

    ``eager`` is a kernel where one is listed (`KERNELS`) and the tensors are on CUDA. ``post_grad`` holds on CPU,
    ``post_grad_elsewhere`` on other devices.
    """

    eager: Form = "arithmetic"
    plain: Form = "arithmetic"
    aot_eager: Form = "node"
    aot: Form = "arithmetic"
    joint: Form = "node"
    beside_integers: Form = "node"
    post_grad: Form = "node"
    post_grad_elsewhere: Form = "node"
    inductor: Form = "node"
    anywhere: Form = "node"


# Has no node after AOTAutograd, which cannot know what it fuses with; the backend "fxquant_eager" calls it.
FUNCTION = Role()

# One node a site to the end of our passes: places, export and the partitioner's tags need it, and tags say what is
# recomputed. Where products take codes, the partitioner has to see how codes are computed: else it keeps fake-quantized
# floats beside them, of a mixer's block 250 kB instead of 119. Inductor on CPU takes it whole, which spares it half of
# the nodes of a graph; not on GPUs, where `KeepDivisions` looks for the divisions.
FAKE_QUANTIZE = Role(
    aot="node",
    beside_integers="arithmetic",
    post_grad_elsewhere="arithmetic",
    inductor="whole",
    anywhere="arithmetic",
)

# Arithmetic before the partitioner: it then sees what is cheap to recompute, and keeps what lies before it instead of
# every quantizer's input.
GRADIENT = Role(
    aot="node",
    joint="arithmetic",
    beside_integers="arithmetic",
    post_grad_elsewhere="arithmetic",
    inductor="whole",
    anywhere="arithmetic",
)

# What is stored for backward, or multiplied: put into a joint graph by our passes, after AOTAutograd, as one node.
CODES = Role(
    beside_integers="arithmetic",
    post_grad_elsewhere="arithmetic",
    inductor="whole",
    anywhere="arithmetic",
)

# What reads those. As nodes that do not fuse, in the joint graph, they make the partitioner count what they read as
# stored; else it takes a byte for two, no better than bfloat16.
READER = Role(
    post_grad_elsewhere="arithmetic",
    inductor="whole",
    anywhere="arithmetic",
)

# A range's update, and scale and zero point of a range, are stored without what they are computed from: as a node for
# each operation, Inductor stores every value that is a function of a range, once the range is updated in place, 26
# buffers a site. On GPUs too.
STATE = Role(aot="node", inductor="whole")

# Runs once, for a state that is not set: a search over a tensor, of which no kernel is worth generating.
START = Role(aot="node")

# What it gives is a buffer of its own, or the copy has no use.
COPY = Role(aot="node", inductor="whole")

# Only the half that computes nothing is traced, by either backend; the other half is there for autograd before.
STAND_IN = Role(aot_eager="arithmetic")

# Without a result there is nothing to compute, only a mark that must not vanish.
MARK = Role(plain="node", aot="node")

# Stands for ONNX nodes in a graph on its way to export, which no compiler meets.
EXPORT = Role(aot="node")

# Not made of operations of ATen's: oneDNN's kernel, on CPU.
FOREIGN = Role(eager="kernel", plain="node", aot="node")

# Drawn from a generator: called once a step, whoever compiles it.
DRAWN = Role(plain="node", aot="node")

ROLES: Mapping[str, Role] = {
    **dict.fromkeys(
        (
            "fake_quantize_per_tensor_affine",
            "fake_quantize_per_tensor_affine.tensor_qparams",
            "fake_quantize_per_channel_affine",
        ),
        FAKE_QUANTIZE,
    ),
    **dict.fromkeys(
        ("fake_quantize_per_tensor_affine_backward", "fake_quantize_per_channel_affine_backward"), GRADIENT
    ),
    **dict.fromkeys(
        (
            *("quantize_per_tensor", "quantize_per_tensor.tensor_qparams", "quantize_per_channel"),
            *("clip_mask_per_tensor_affine", "pack_planes", "quantize_elements"),
        ),
        CODES,
    ),
    **dict.fromkeys(
        (
            *("dequantize_per_tensor", "dequantize_per_tensor.tensor_qparams", "dequantize_per_channel"),
            *("unpack_planes", "dequantize_elements"),
        ),
        READER,
    ),
    **dict.fromkeys(("average_min_max", "affine_qparams"), STATE),
    "learned_start": START,
    "materialize": COPY,
    "stand_in": STAND_IN,
    "bind": MARK,
    **dict.fromkeys(("dequantize_affine", "quantize_dequantize", "quantize_dequantize_blocks"), EXPORT),
    "integer_convolution": FOREIGN,
    "rounding_words": DRAWN,
}
"""Operator → role, by its name in the namespace ``fxquant``; every other is a `FUNCTION`."""

KERNELS = frozenset(
    {
        "fake_quantize_per_tensor_affine",
        "fake_quantize_per_tensor_affine.tensor_qparams",
        "fake_quantize_per_channel_affine",
        "fake_quantize_per_tensor_affine_backward",
        "fake_quantize_per_channel_affine_backward",
        "quantize_per_tensor",
        "quantize_per_tensor.tensor_qparams",
        "quantize_per_channel",
        "fake_quantize_float",
        "quantize_float",
        "fake_quantize_mx",
        "fake_quantize_blocks",
        "fake_quantize_blocks.amax",
        "fake_tensor_quant",
        "fake_tensor_quant.pass_through",
        "fake_tensor_quant_learnable",
        "scaled_float",
        "scaled_float.pass_through",
        "scaled_float_learnable",
    }
)
"""Operators whose eager calls on CUDA tensors go by way of `fxquant.kernels.dispatch`: the names in its ENTRIES."""


def becomes(op: OpOverload | str, stage: Stage, device: str = "cpu") -> Form:
    """What an operator becomes at a stage, on a type of device.

    >>> becomes("fake_quantize_per_channel_affine", "post-grad"), becomes("pack_planes", "post-grad", "cuda")
    ('node', 'arithmetic')
    """
    name = op if isinstance(op, str) else op.name().removeprefix("fxquant::")
    role = ROLES.get(name, FUNCTION)
    if stage == "eager" and device == "cuda" and name in KERNELS:
        return "kernel"
    if stage == "post-grad" and device != "cpu":
        return role.post_grad_elsewhere
    found: Form = getattr(role, stage.replace(" ", "_").replace("-", "_"))
    return found
