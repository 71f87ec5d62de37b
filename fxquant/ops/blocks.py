"""``fxquant::fake_quantize_mx`` and ``fxquant::fake_quantize_blocks``: one scale per block, NVFP4 among them.

A block is a box: ``block_sizes`` maps axes to sizes, ``{-1: 32}`` is 32 consecutive elements of the last dimension.
The arithmetic is `fxquant.numerics.blocks`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fxquant.errors import InvalidArgument
from fxquant.numerics import blocks
from fxquant.numerics.blocks import MXINT8, Blocks, Element, IntegerGrid, ScaleFormat
from fxquant.numerics.formats import FLOAT_FORMATS, float_format
from fxquant.ops.checks import can_read, check_floating
from fxquant.ops.library import define
from fxquant.ops.stochastic import as_seed, check_seed

SCALE_ROUNDINGS = ("floor", "ceil")


def _check_blocks(x: Tensor, axes: Sequence[int], sizes: Sequence[int], name: str = "block_sizes") -> Blocks:
    given = dict(zip(axes, sizes, strict=True))
    if x.dim() == 0:
        raise InvalidArgument("`input` must have a dimension to cut into blocks: got a 0-d tensor. Use x.reshape(1).")
    if not given:
        raise InvalidArgument(f"`{name}` must name an axis: got {{}}. Give {{-1: 32}} for 32 elements of the last one.")
    found: dict[int, int] = {}
    for axis, size in zip(axes, sizes, strict=True):
        if not -x.dim() <= axis < x.dim():
            raise InvalidArgument(
                f"`{name}` must name axes from {-x.dim()} to {x.dim() - 1}: got axis {axis} in {given}. "
                f"The tensor has {x.dim()} dimensions."
            )
        if axis % x.dim() in found:
            raise InvalidArgument(f"`{name}` must name each axis once: got {given} for {x.dim()} dimensions. Drop one.")
        if size <= 0:
            raise InvalidArgument(f"`{name}` must hold sizes above 0: got {size} in {given}. Drop the axis instead.")
        found[axis % x.dim()] = size
    order = sorted(found)
    return Blocks(tuple(order), tuple(found[axis] for axis in order))


def _mx_element(element: str) -> Element:
    if element == "int8":
        return MXINT8
    if element not in FLOAT_FORMATS:
        known = ", ".join(map(repr, (*FLOAT_FORMATS, "int8")))
        raise InvalidArgument(f"`element` must name an MX element: got {element!r}. Known ones: {known}.")
    return FLOAT_FORMATS[element]


def _mx(
    x: Tensor,
    seed: Tensor | None = None,
    *,
    axes: Sequence[int],
    sizes: Sequence[int],
    element: str,
    scale_rounding: str = "floor",
) -> Tensor:
    check_floating("input", x)
    check_seed(seed)
    if scale_rounding not in SCALE_ROUNDINGS:
        raise InvalidArgument(
            f"`scale_rounding` must be one of {SCALE_ROUNDINGS}: got {scale_rounding!r}. The OCP specification floors."
        )
    at = _check_blocks(x, axes, sizes)
    return blocks.fake_quantize_mx(x, at, _mx_element(element), scale_rounding, seed)


def _element(element: str | None, quant_min: int, quant_max: int) -> Element:
    if element is not None:
        return float_format(element)
    if not quant_min <= 0 < quant_max:
        raise InvalidArgument(
            f"`quant_max` must be above 0 and `quant_min` not: got {quant_max} and {quant_min}. Codes of blocks hold 0."
        )
    return IntegerGrid(quant_min, quant_max)


def _scales(
    x: Tensor, at: Blocks, format: str | None, bits: int, axes: Sequence[int], sizes: Sequence[int]
) -> ScaleFormat | None:
    if format is not None:
        return ScaleFormat(float_format(format))
    if bits:
        return ScaleFormat(IntegerGrid(0, 2**bits - 1), _check_blocks(x, axes, sizes, "scale_block_sizes"))
    return None


def _blocks(x: Tensor, seed: Tensor | None = None, **static: Any) -> Tensor:
    return _blocks_amax(x, None, None, seed, **static)


def _blocks_amax(
    x: Tensor,
    amax: Tensor | None,
    tensor_amax: Tensor | None,
    seed: Tensor | None = None,
    *,
    axes: Sequence[int],
    sizes: Sequence[int],
    element: str | None,
    quant_min: int,
    quant_max: int,
    scale_format: str | None = None,
    scale_bits: int = 0,
    scale_axes: Sequence[int] = (),
    scale_sizes: Sequence[int] = (),
) -> Tensor:
    check_floating("input", x)
    check_seed(seed)
    at = _check_blocks(x, axes, sizes)
    _check_amax(x, at, amax, tensor_amax)
    scales = _scales(x, at, scale_format, scale_bits, scale_axes, scale_sizes)
    grid = _element(element, quant_min, quant_max)
    return blocks.fake_quantize_blocks(x, at, grid, scales, amax, tensor_amax, seed)


def _check_amax(x: Tensor, at: Blocks, amax: Tensor | None, tensor_amax: Tensor | None) -> None:
    if tensor_amax is not None and tensor_amax.numel() != 1:
        raise InvalidArgument(
            f"`amax` of the tensor must have one element: got shape {tuple(tensor_amax.shape)}. "
            "Those of blocks follow from the input."
        )
    if amax is None:
        return
    grid = at.counts(x)
    pairs = zip(reversed(amax.shape), reversed(grid), strict=False)
    if amax.dim() > x.dim() or not all(found in (1, wanted) for found, wanted in pairs):
        raise InvalidArgument(
            f"`amax` must have the shape of the grid of blocks, {tuple(grid)}, or broadcast to it: "
            f"got shape {tuple(amax.shape)}. Give one value per block."
        )


def _check_values(
    x: Tensor, amax: Tensor | None, tensor_amax: Tensor | None, seed: Tensor | None = None, **_: Any
) -> None:
    for given in (amax, tensor_amax):
        if given is not None and can_read(given) and not bool((given >= 0).all()):
            bad = given[~(given >= 0)].reshape(-1)[0].item()
            raise InvalidArgument(f"`amax` must be at least 0: got {bad}. Take it from the absolute values.")


def _straight_through(a: Any, grad: Tensor) -> dict[str, Tensor]:
    return {"input": grad}


def _clipped(a: Any, grad: Tensor) -> dict[str, Tensor]:
    at = _check_blocks(a.input, a.axes, a.sizes)
    return {"input": blocks.within_amax(grad, a.input, at, a.amax, a.tensor_amax)}


# No `lift`: the largest of a tensor, and the positions that random numbers follow from, are those of one sample.
# Plain numbers are keyword-only: torch.vmap then leaves lists of them alone.
_STATIC = (
    "int[] axes, int[] sizes, str? element, int quant_min, int quant_max, "
    "str? scale_format=None, int scale_bits=0, int[] scale_axes=[], int[] scale_sizes=[]"
)

FAKE_QUANTIZE_MX = define(
    "fake_quantize_mx(Tensor input, Tensor? seed=None, *, int[] axes, int[] sizes, str element, "
    'str scale_rounding="floor") -> Tensor',
    _mx,
    backward=_straight_through,
    saves=(),
)
FAKE_QUANTIZE_BLOCKS = define(
    f"fake_quantize_blocks(Tensor input, Tensor? seed=None, *, {_STATIC}) -> Tensor",
    _blocks,
    backward=_straight_through,
    saves=(),
)
FAKE_QUANTIZE_BLOCKS_AMAX = define(
    "fake_quantize_blocks.amax(Tensor input, Tensor? amax, Tensor? tensor_amax, Tensor? seed=None, *, "
    f"{_STATIC}) -> Tensor",
    _blocks_amax,
    check=_check_values,
    backward=_clipped,
    saves=("input", "amax", "tensor_amax"),
)


def _seed(seed: int | Tensor | None, x: Tensor) -> Tensor | None:
    return None if seed is None else as_seed(seed, x)


def _boxes(sizes: Mapping[int, int]) -> dict[str, Any]:
    return {"axes": list(sizes), "sizes": list(sizes.values())}


def fake_quantize_mx(
    input: Tensor,
    block_sizes: Mapping[int, int] | None = None,
    element: str = "e4m3",
    *,
    scale_rounding: str = "floor",
    seed: int | Tensor | None = None,
) -> Tensor:
    """Fake-quantizes to a microscaling (MX) format: small elements, and a power of two for each block.

    y = round(x / s) · s, rounded half to even on the element's grid and saturating at its largest value, max::

        s = 2^(floor(log2 amax) − floor(log2 max))    scale_rounding="floor": OCP MX v1.0, what lies above max saturates
        s = min {2^k : amax ≤ max · 2^k}              scale_rounding="ceil": NVIDIA's, nothing saturates

    with amax the largest |x| of the block, and s kept in [2^−127, 2^127] (E8M0).

    Args:
        input: any floating dtype, at least one dimension; y has its shape and dtype. Arithmetic in float32, in float64
            for float64; a value that rounds beyond the input's dtype becomes inf.
        block_sizes: axis → size, ``{-1: 32}`` by default. A size need not divide its dimension.
        element: "e4m3", "e5m2", "e3m2", "e2m3", "e2m1" or "int8" (multiples of 2^−6 up to ±127/64).
        scale_rounding: "floor" or "ceil".
        seed: rounds elements up or down by chance instead, reproducibly: see `fake_quantize_stochastic`.

    An amax of 0, inf or NaN has scale 1: NaN stays NaN, ±inf becomes ±max. Gradient: dy everywhere
    (straight-through; nothing is saved for it).

    Raises:
        InvalidArgument: an axis out of range or named twice, a size below 1, a 0-d input, an unknown element or
            scale_rounding, a seed of another dtype or shape.
        NotImplementedError: an integer input.

    Source: OCP Microscaling Formats (MX) v1.0, sections 5 and 6.3.
    """
    sizes = {-1: 32} if block_sizes is None else block_sizes
    return FAKE_QUANTIZE_MX(input, _seed(seed, input), **_boxes(sizes), element=element, scale_rounding=scale_rounding)


def fake_quantize_nvfp4(
    input: Tensor,
    amax: float | Tensor | None = None,
    block_sizes: Mapping[int, int] | None = None,
    *,
    seed: int | Tensor | None = None,
) -> Tensor:
    """Fake-quantizes to NVFP4: e2m1 elements, an e4m3 scale per block, a float32 scale per tensor.

    g = amax / (6 · 448);  s = e4m3((amax_block / 6) / g) · g;  y = e2m1(x / s) · s, and 0 where s is 0.

    Args:
        input: any floating dtype, at least one dimension; y has its shape and dtype. Scales are float32, elements are
            divided in float32, in float64 for float64.
        amax: the largest magnitude to hold, a number or a tensor of one element; the input's own by default.
        block_sizes: axis → size, ``{-1: 16}`` by default. A size need not divide its dimension.
        seed: rounds elements up or down by chance instead, reproducibly: see `fake_quantize_stochastic`.

    NaN stays NaN, and like ±inf gives its block the largest scale, 448 · g; an amax that is 0, inf or NaN has g = 1.
    Gradient: dy everywhere (straight-through; nothing is saved for it); with ``amax`` given, where |x| ≤ amax.

    Raises:
        InvalidArgument: an axis out of range or named twice, a size below 1, a 0-d input, an amax of several elements
            or, where that can be seen, below 0 or NaN; a seed of another dtype or shape.
        NotImplementedError: an integer input.

    Source: NVIDIA, "Pretraining Large Language Models with NVFP4", 2025.
    """
    sizes = {-1: 16} if block_sizes is None else block_sizes
    static = {**_boxes(sizes), "element": "e2m1", "quant_min": 0, "quant_max": 0, "scale_format": "e4m3"}
    if amax is None:
        return FAKE_QUANTIZE_BLOCKS(input, _seed(seed, input), **static)
    amax = amax if isinstance(amax, Tensor) else torch.full((), amax, dtype=torch.float32, device=input.device)
    return FAKE_QUANTIZE_BLOCKS_AMAX(input, None, amax, _seed(seed, input), **static)


def _range(num_bits: int, unsigned: bool, narrow: bool) -> tuple[int, int]:
    least = 1 if unsigned else 2
    if not least <= num_bits <= 16:
        raise InvalidArgument(f"`num_bits` must be from {least} to 16: got {num_bits}. A float format is (E, M).")
    quant_max = 2 ** (num_bits if unsigned else num_bits - 1) - 1
    return 0 if unsigned else -quant_max if narrow else -quant_max - 1, quant_max


def _scale_arguments(scale_bits: int | tuple[int, int] | None, sizes: Mapping[int, int] | None) -> dict[str, Any]:
    integer = isinstance(scale_bits, int)
    if integer != (sizes is not None):
        raise InvalidArgument(
            "`scale_block_sizes` must go with an integer `scale_bits`, and with nothing else: "
            f"got {sizes} and {scale_bits}. Float scales have one factor per tensor."
        )
    if scale_bits is None:
        return {}
    if not isinstance(scale_bits, int):
        return {"scale_format": float_format(scale_bits).name}
    if not 1 <= scale_bits <= 16:
        raise InvalidArgument(f"`scale_bits` must be from 1 to 16: got {scale_bits}. A float format is (E, M).")
    sizes = sizes or {}
    return {"scale_bits": scale_bits, "scale_axes": list(sizes), "scale_sizes": list(sizes.values())}


def fake_quantize_blocks(
    input: Tensor,
    block_sizes: Mapping[int, int],
    num_bits: int | tuple[int, int] = 4,
    *,
    amax: Tensor | None = None,
    unsigned: bool = False,
    narrow: bool = False,
    scale_bits: int | tuple[int, int] | None = None,
    scale_block_sizes: Mapping[int, int] | None = None,
    tensor_amax: Tensor | None = None,
    seed: int | Tensor | None = None,
) -> Tensor:
    """Fake-quantizes with one scale per block: y = clamp(round(x / s), low, high) · s, with s = amax / high.

    The scales can be quantized in turn::

        s = format(amax / high / g) · g, g = tensor_amax / (high · format.max)    scale_bits=(E, M): one g per tensor
        s = round(s / t) · t, t = max s of its block / (2^scale_bits − 1)         scale_bits=n, with scale_block_sizes

    Args:
        input: any floating dtype, at least one dimension; y has its shape and dtype. Arithmetic in float32, in float64
            for float64; scales of the first form are float32.
        block_sizes: axis → size. A size need not divide its dimension.
        num_bits: the width of an integer code; or (exponent, mantissa) bits of a float format, with high its max.
        amax: the largest magnitude of each block, of the shape of their grid (the input's, with ceil(D / size) in
            place of D) or one that broadcasts to it; the blocks' own by default.
        unsigned: codes from 0 to 2^num_bits − 1, else from −2^(num_bits−1) to 2^(num_bits−1) − 1.
        narrow: leave out the lowest signed code, so that codes mirror at 0; unsigned codes have none to leave out.
        scale_bits: how scales are quantized; None leaves them in full precision.
        scale_block_sizes: axis → size, of blocks in the grid of scales, for an integer scale_bits.
        tensor_amax: one element; what amax is at most. The largest amax by default.
        seed: rounds elements up or down by chance instead, reproducibly: see `fake_quantize_stochastic`.

    NaN stays NaN. An amax of 0 gives 0. An amax that is inf or NaN has scale 1, with float scales the largest one,
    format.max · g; a tensor_amax that is 0, inf or NaN has g = 1. Gradient: dy everywhere (straight-through; nothing
    is saved for it); with ``amax`` or ``tensor_amax`` given, where |x| is at most each; none to them.

    Raises:
        InvalidArgument: an axis out of range or named twice, a size below 1, a 0-d input, bits out of range, an
            unknown format, an amax that does not fit or, where that can be seen, is below 0 or NaN.
        NotImplementedError: an integer input.

    Source: for quantized scales, Dettmers et al., "QLoRA", NeurIPS 2023, and NVFP4.
    """
    element, low, high = None, 0, 0
    if isinstance(num_bits, int):
        low, high = _range(num_bits, unsigned, narrow)
    else:
        element = float_format(num_bits).name
        if unsigned:
            raise InvalidArgument(f"`unsigned` must be False for a float format: got True with {num_bits}. Drop it.")
    static = {**_boxes(block_sizes), "element": element, "quant_min": low, "quant_max": high}
    static |= _scale_arguments(scale_bits, scale_block_sizes)
    if tensor_amax is not None and "scale_format" not in static:
        raise InvalidArgument(
            f"`tensor_amax` must go with float scales: got scale_bits={scale_bits}. Use scale_bits=(4, 3), or `amax`."
        )
    if amax is None and tensor_amax is None:
        return FAKE_QUANTIZE_BLOCKS(input, _seed(seed, input), **static)
    return FAKE_QUANTIZE_BLOCKS_AMAX(input, amax, tensor_amax, _seed(seed, input), **static)
