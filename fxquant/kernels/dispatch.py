"""The one place that decides what an eager op on CUDA tensors runs on: our kernels, or aten.

Compiled graphs never come here: Inductor writes Triton from the decompositions. ``HAS_KERNEL`` of `fxquant.ops.library`
registers `take` under the CUDA dispatch key for the ops in `ENTRIES`; what it decides, and why, is `status`.

    using("aten")                      → aten
    no kernel can be built             → aten, warned about once; KernelUnavailable under using("cuda")
    a call that no kernel serves       → aten, logged once at debug level, listed in ``status().declined``
    else                               → the kernel
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxquant.errors import InvalidArgument, KernelUnavailable
from fxquant.kernels import affine, amax, floating
from fxquant.kernels.affine import Qparams
from fxquant.kernels.driver import CudaLauncher
from fxquant.kernels.launch import Declined, Launcher, require
from fxquant.numerics.blocks import Element, IntegerGrid
from fxquant.numerics.formats import FLOAT_FORMATS, FloatFormat

PATHS = ("auto", "cuda", "aten")
_log = logging.getLogger("fxquant.kernels")


@dataclass(frozen=True, kw_only=True)
class KernelStatus:
    """What eager ops on CUDA tensors take, "cuda" (our kernels) or "aten", and why.

    ``declined``: calls that aten took although the path is "cuda", each with its reason.
    """

    path: str
    reason: str
    declined: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"eager ops on CUDA tensors take {self.path}: {self.reason}"]
        return "\n".join([*lines, *(f"  but aten for {one}" for one in self.declined)])


class _State:
    """Of the process, not of a thread: backward runs in threads of autograd's."""

    def __init__(self) -> None:
        self.asked = "auto"
        self.launcher: CudaLauncher = CudaLauncher()
        self.failure: KernelUnavailable | None = None
        self.declined: dict[str, None] = {}


_state = _State()


@contextlib.contextmanager
def using(path: str) -> Iterator[None]:
    """Chooses what eager ops on CUDA tensors take within, in every thread.

    Args:
        path: "auto", our kernels where they can be built, the default; "cuda", our kernels or an error; "aten".

    Raises:
        InvalidArgument: another path.
        KernelUnavailable: "cuda" where no kernel can be built, with the reason.
    """
    if path not in PATHS:
        raise InvalidArgument(f'`path` must be one of {PATHS}: got {path!r}. Take "auto".')
    if path == "cuda":
        _require_kernels()
    before, _state.asked = _state.asked, path
    try:
        yield
    finally:
        _state.asked = before


def _require_kernels() -> None:
    if not torch.cuda.is_available():
        raise KernelUnavailable(f'`path` must be "auto" or "aten" here: got \'cuda\', but {_no_device()}.')
    _state.launcher.prepare("affine", "f32", torch.device("cuda", torch.cuda.current_device()))


def _no_device() -> str:
    built = "torch is built without CUDA" if torch.version.cuda is None else "torch sees no CUDA device"
    return f"{built} (torch {torch.__version__})"


def status(*, build: bool = True) -> KernelStatus:
    """What eager ops on CUDA tensors take now, and why.

    ``build``: whether kernels may be compiled to find out (seconds, once per machine); else what is known so far.
    """
    declined = tuple(_state.declined)
    if _state.asked == "aten":
        return KernelStatus(path="aten", reason='asked for by using("aten")', declined=declined)
    if not torch.cuda.is_available():
        return KernelStatus(path="aten", reason=_no_device(), declined=declined)
    if build and _state.failure is None:
        try:
            _require_kernels()
        except KernelUnavailable as error:
            _failed(error)
    if _state.failure is not None:
        return KernelStatus(path="aten", reason=str(_state.failure), declined=declined)
    by = ", ".join(f"{name} for {architecture}" for architecture, name in _state.launcher.built.items())
    reason = f"compiled by {by}" if by else "compiled at first use"
    return KernelStatus(path="cuda", reason=reason, declined=declined)


def launcher() -> Launcher:
    """What launches on CUDA, to call `fxquant.kernels.affine` and `fxquant.kernels.floating` without an operator.

    Raises KernelUnavailable where no kernel can be built.
    """
    _require_kernels()
    return _state.launcher


def asked_for() -> bool:
    """Whether a path was chosen by `using`."""
    return _state.asked != "auto"


def _failed(error: KernelUnavailable) -> None:
    """One warning a process; the calls that follow, of any family, take aten at once."""
    if _state.failure is None:
        _state.failure = error
        _log.warning("eager ops on CUDA tensors take aten: %s", error)


def take(name: str, aten: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """One call of op ``name`` on CUDA tensors: the kernel's result, else that of ``aten``."""
    if _state.asked == "aten" or (_state.failure is not None and _state.asked == "auto"):
        return aten(*args, **kwargs)
    try:
        return ENTRIES[name](_state.launcher, *args, **kwargs)
    except Declined as reason:
        text = f"{name}: {reason}"
        if text not in _state.declined:
            _state.declined[text] = None
            _log.debug("aten computes %s", text)
    except KernelUnavailable as error:
        if _state.asked == "cuda":
            raise
        _failed(error)
    return aten(*args, **kwargs)


# The operators' own signatures behind the launcher; each becomes one call of `affine`, `floating` or `amax`.
def _per_tensor(launch, x, scale, point, low, high, *, rounding="reciprocal", pass_through=False):  # type: ignore[no-untyped-def]
    return affine.fake_quantize(launch, x, Qparams(scale, point, low, high, rounding))


def _per_channel(launch, x, scale, point, axis, low, high, *, rounding="reciprocal", pass_through=False):  # type: ignore[no-untyped-def]
    return affine.fake_quantize(launch, x, Qparams(scale, point, low, high, rounding, axis))


def _per_tensor_backward(launch, grad, x, scale, point, low, high, *, rounding="reciprocal"):  # type: ignore[no-untyped-def]
    return affine.backward(launch, grad, x, Qparams(scale, point, low, high, rounding))


def _per_channel_backward(launch, grad, x, scale, point, axis, low, high, *, rounding="reciprocal"):  # type: ignore[no-untyped-def]
    return affine.backward(launch, grad, x, Qparams(scale, point, low, high, rounding, axis))


def _quantize(launch, x, scale, point, low, high, dtype=torch.int8, *, rounding="divide"):  # type: ignore[no-untyped-def]
    return affine.quantize(launch, x, Qparams(scale, point, low, high, rounding), dtype)


def _quantize_channel(launch, x, scale, point, axis, low, high, dtype=torch.int8, *, rounding="divide"):  # type: ignore[no-untyped-def]
    return affine.quantize(launch, x, Qparams(scale, point, low, high, rounding, axis), dtype)


def _float(launch, x, scale, format, seed=None, *, saturate=True):  # type: ignore[no-untyped-def]
    return floating.fake_quantize_float(launch, x, scale, format, seed, saturate)


def _quantize_float(launch, x, scale, dtype, *, saturate=True):  # type: ignore[no-untyped-def]
    return floating.quantize_float(launch, x, scale, dtype, saturate)


def _mx(launch, x, seed=None, *, axes, sizes, element, scale_rounding="floor"):  # type: ignore[no-untyped-def]
    return floating.fake_quantize_mx(launch, x, seed, axes, sizes, element, scale_rounding)


def _blocks(launch, x, seed=None, **static):  # type: ignore[no-untyped-def]
    return _blocks_amax(launch, x, None, None, seed, **static)


def _blocks_amax(  # type: ignore[no-untyped-def]
    launch, x, block_amax, tensor_amax, seed=None, *, axes, sizes, element, quant_min, quant_max,
    scale_format=None, scale_bits=0, scale_axes=(), scale_sizes=(),
):  # fmt: skip
    require(seed is None, "no kernel rounds by chance")
    require(block_amax is None, "no kernel reads the largest magnitude of each block")
    require(not scale_bits, "no kernel quantizes scales by blocks of them")
    require(tensor_amax is None or scale_format is not None, "its amax has no use without float scales")
    grid = _element(element, quant_min, quant_max)
    return floating.fake_quantize_blocks(launch, x, tensor_amax, axes, sizes, grid, scale_format)


def _element(name: str | None, quant_min: int, quant_max: int) -> Element:
    if name is None:
        require(quant_min <= 0 < quant_max, "its codes do not hold 0 and something above")
        return IntegerGrid(quant_min, quant_max)
    require(name in FLOAT_FORMATS, f"no element is called {name!r}")
    return FLOAT_FORMATS[name]


def _tensor_quant(launch, x, reach, num_bits=8, unsigned=False, narrow_range=True):  # type: ignore[no-untyped-def]
    return amax.fake_tensor_quant(launch, x, reach, num_bits, unsigned, narrow_range)


def _scaled_float(launch, x, reach, E=4, M=3):  # type: ignore[no-untyped-def]
    return amax.scaled_float(launch, x, reach, _format(E, M))


def _format(exponent_bits: int, mantissa_bits: int) -> FloatFormat:
    for found in FLOAT_FORMATS.values():
        if (found.exponent_bits, found.mantissa_bits) == (exponent_bits, mantissa_bits):
            return found
    raise Declined(f"no format has {exponent_bits} and {mantissa_bits} bits")


Entry = Callable[..., Tensor]

ENTRIES: dict[str, Entry] = {
    "fake_quantize_per_tensor_affine": _per_tensor,
    "fake_quantize_per_tensor_affine.tensor_qparams": _per_tensor,
    "fake_quantize_per_channel_affine": _per_channel,
    "fake_quantize_per_tensor_affine_backward": _per_tensor_backward,
    "fake_quantize_per_channel_affine_backward": _per_channel_backward,
    "quantize_per_tensor": _quantize,
    "quantize_per_tensor.tensor_qparams": _quantize,
    "quantize_per_channel": _quantize_channel,
    "fake_quantize_float": _float,
    "quantize_float": _quantize_float,
    "fake_quantize_mx": _mx,
    "fake_quantize_blocks": _blocks,
    "fake_quantize_blocks.amax": _blocks_amax,
    "fake_tensor_quant": _tensor_quant,
    "fake_tensor_quant.pass_through": _tensor_quant,
    "fake_tensor_quant_learnable": _tensor_quant,
    "scaled_float": _scaled_float,
    "scaled_float.pass_through": _scaled_float,
    "scaled_float_learnable": _scaled_float,
}
"""Op → its launch, with the launcher before the op's own arguments."""
