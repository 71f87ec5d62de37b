"""Where tensors can have a scale per group of consecutive values, or per token, and why not elsewhere."""

from __future__ import annotations

from torch import fx

from fxquant.graph.kinds import Kind, kind_of, operands
from fxquant.spec.quant_spec import TOKEN, QuantSpec

_KINDS = frozenset({"linear", "matmul", "embedding"})


def matrix_of(node: fx.Node, name: str) -> tuple[int, int] | None:
    """Channel axis and length of a channel of an operator's weight, None where groups have no one axis to run along.

    Channels are the outputs of a product, ``[N, K]`` or ``[K, N]``, and the rows of an embedding.
    """
    kind, weight = kind_of(node), operands(node)[name].meta["val"]
    if kind is None or kind.name not in _KINDS or kind.weight != name or weight.dim() != 2:
        return None
    axis = 0 if kind.weight_axis is None else kind.weight_axis % 2
    length = weight.shape[1 - axis]
    return (axis, int(length)) if isinstance(length, int) else None


def why_not_grouped(node: fx.Node, name: str, spec: QuantSpec) -> str | None:
    """Why an operator's weight cannot have this format, per group; None if it can."""
    kind, weight = kind_of(node), operands(node)[name].meta["val"]
    assert kind is not None
    matrix = matrix_of(node, name)
    if matrix is None:
        return _why_no_matrix(kind, name, weight.dim(), spec)
    _, length = matrix
    assert spec.group_size is not None, "asked of formats per group only"
    if length % spec.group_size:
        return f"groups of {spec.group_size} must divide the {length} values of a channel"
    return None


def is_one_group(node: fx.Node, name: str, spec: QuantSpec) -> bool:
    """Whether a weight is one group: a single channel, no longer than a group."""
    return operands(node)[name].meta["val"].numel() == spec.group_size


def _why_no_matrix(kind: Kind, name: str, dims: int, spec: QuantSpec) -> str:
    if kind.name in _KINDS:
        return f"groups of {spec.group_size} are for matrices, and this weight has {dims} dimensions"
    return (
        f"groups of {spec.group_size} run along the one axis of a matrix that a product sums over, and the weight of "
        f"{kind.name} has another form: give it a format per channel, fxquant.Rule(kind={kind.name!r}, "
        f"operand={name!r}, spec=QuantSpec(bits={spec.bits}, narrow={spec.narrow}, axis=0, range=CurrentTensor()))"
    )


def why_not_blocked(node: fx.Node, name: str, spec: QuantSpec, has_weight: bool) -> str | None:
    """Why an activation cannot have this format, per token or group, before an operator; None if it can.

    Groups run along the last axis, which a linear and a matrix product with a weight on the right sum over.
    """
    kind, value = kind_of(node), operands(node)[name].meta["val"]
    assert kind is not None and spec.group_size is not None, "asked of formats per group only"
    what = "a scale per token is" if spec.group_size == TOKEN else f"groups of {spec.group_size} are"
    if kind.name not in ("linear", "matmul"):
        return f"{what} for matrix products, and {kind.name} sums over more, or other, axes"
    if not has_weight:
        return f"{what} for products with a weight: no runtime multiplies two activations so"
    length = value.shape[-1]
    if spec.group_size == TOKEN:
        return None
    if not isinstance(length, int):
        return f"groups of {spec.group_size} must divide the last axis of its {name}, whose length is open"
    if length % spec.group_size:
        return f"groups of {spec.group_size} must divide the {length} values along the last axis of its {name}"
    return None
