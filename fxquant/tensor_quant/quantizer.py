"""`TensorQuantizer`: a module that quantizes what goes through it, as a descriptor says."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.errors import InvalidArgument, RangeNotSet
from fxquant.numerics.blocks import Blocks
from fxquant.numerics.formats import float_format
from fxquant.ops.amax import (
    fake_tensor_quant,
    fake_tensor_quant_learnable,
    scaled_float,
    scaled_float_learnable,
    tensor_quant,
)
from fxquant.ops.blocks import fake_quantize_blocks, fake_quantize_mx, fake_quantize_nvfp4
from fxquant.tensor_quant.calibrators import Calibrator, HistogramCalibrator, MaxCalibrator, reduced_amax
from fxquant.tensor_quant.descriptor import QuantDescriptor

_E8M0 = (8, 0)
_NVFP4 = ((2, 1), (4, 3))


class _BlockMaxCalibrator(MaxCalibrator):
    """The largest magnitude of each block, in the shape of the grid of blocks."""

    def __init__(self, num_bits: int | tuple[int, int], sizes: Mapping[int, int], unsigned: bool) -> None:
        super().__init__(num_bits, None, unsigned)
        self._sizes = dict(sizes)

    def _reduce(self, x: Tensor) -> Tensor:
        sizes = dict(sorted((axis % x.dim(), size) for axis, size in self._sizes.items()))
        at = Blocks(tuple(sizes), tuple(sizes.values()))
        return at.amax(at.split(x.detach().to(torch.float32))).reshape(at.counts(x))


def _described(name: str, doc: str) -> Any:
    """A property over the descriptor's field; setting one that changes amax's shape drops amax."""

    def read(self: TensorQuantizer) -> Any:
        return getattr(self._descriptor, name)

    def write(self: TensorQuantizer, value: Any) -> None:
        if value == read(self):
            return
        self._describe(QuantDescriptor(**{**self._descriptor.dict(), name: value}))
        if name in ("axis", "block_sizes"):
            self.reset_amax()

    return property(read, write, doc=doc)


class TensorQuantizer(nn.Module):
    """Quantizes its input, or collects statistics of it, or passes it on.

    ``amax`` comes from the descriptor, from `load_calib_amax`, or from assignment; without one, and with
    ``dynamic=True``, from each input. It is a float32 buffer ``_amax``, or a parameter with ``learn_amax=True``
    (calibrate before the optimizer is made), and keeps float32 when the module is converted.

    Args:
        quant_desc: the `QuantDescriptor`.
        disabled: pass every input on as it is.
        if_quant: quantize.
        if_calib: collect statistics (eager only: it reads values).

    | block_sizes | arithmetic |
    | --- | --- |
    | None | `fake_tensor_quant`, `scaled_float`, their learnable forms; `tensor_quant` with fake_quant=False |
    | scale_bits (8, 0), dynamic | `fake_quantize_mx`, scales rounded up (NVIDIA's convention) |
    | num_bits (2, 1), scale_bits (4, 3), dynamic | `fake_quantize_nvfp4`, amax of the tensor |
    | other | `fake_quantize_blocks`: amax per block, calibrated if static |

    >>> quantizer = TensorQuantizer(QuantDescriptor(num_bits=4, amax=1.0, narrow_range=True))
    >>> quantizer(torch.tensor([-2.0, 0.3, 1.0]))
    tensor([-1.0000,  0.2857,  1.0000])
    """

    _amax: Tensor | None

    num_bits = _described("num_bits", "Width of the codes, or (E, M).")
    unsigned = _described("unsigned", "Whether codes start at 0.")
    narrow_range = _described("narrow_range", "Whether the lowest signed code is left out.")
    fake_quant = _described("fake_quant", "Whether results are dequantized.")
    axis = _described("axis", "The dimensions with an amax per slice.")
    block_sizes = _described("block_sizes", "Sizes by axis, with what goes with them.")
    scale_amax = _described("scale_amax", "The factor on amax.")
    dynamic = _described("dynamic", "Whether amax is taken from each input.")

    def __init__(
        self,
        quant_desc: QuantDescriptor | None = None,
        *,
        disabled: bool = False,
        if_quant: bool = True,
        if_calib: bool = False,
    ) -> None:
        super().__init__()
        descriptor = QuantDescriptor() if quant_desc is None else quant_desc
        self._disabled = disabled
        self._if_quant = if_quant
        self._scale: Tensor | None = None
        self._learn_amax = descriptor.learn_amax
        if self._learn_amax:
            self.register_parameter("_amax", None)
        else:
            self.register_buffer("_amax", None)
        self._describe(descriptor)
        if descriptor.amax is not None:
            self.amax = descriptor.amax
        self._if_calib = False
        if if_calib:
            self.enable_calib()

    def _describe(self, descriptor: QuantDescriptor) -> None:
        self._calibrator = _calibrator(descriptor)
        self._quantize = _chosen(descriptor)
        self._descriptor = descriptor

    @property
    def calibrator(self) -> Calibrator | None:
        """What collects statistics; None where amax is never used."""
        return self._calibrator

    @property
    def amax(self) -> Tensor | None:
        """The range, float32; None before it is known. A number, list or tensor can be assigned, of its shape."""
        return self._amax

    @amax.setter
    def amax(self, value: Any) -> None:
        new = torch.as_tensor(value).detach().to(torch.float32).clone()
        old = self._amax
        if old is None:
            self._amax = nn.Parameter(new) if self._learn_amax else new
            return
        if old.shape != new.shape:
            raise InvalidArgument(
                f"amax must keep its shape {tuple(old.shape)}: got {tuple(new.shape)}. Call reset_amax() first."
            )
        with torch.no_grad():
            old.copy_(new)

    def reset_amax(self) -> None:
        """Forgets amax and what was collected."""
        self._amax = None
        if self._calibrator is not None:
            self._calibrator.reset()

    @property
    def scale(self) -> Tensor:
        """What the last codes are divided by to dequantize; with ``fake_quant=False`` only."""
        if self._scale is None:
            raise RangeNotSet("scale must have been computed: got none. Run an input through with fake_quant=False.")
        return self._scale

    @property
    def is_enabled(self) -> bool:
        """Whether inputs are quantized or watched."""
        return not self._disabled

    def disable(self) -> None:
        """Passes every input on as it is, until `enable`."""
        self._disabled = True

    def enable(self) -> None:
        """Undoes `disable`."""
        self._disabled = False

    def enable_quant(self) -> None:
        """Quantizes from now on."""
        self._if_quant = True

    def disable_quant(self) -> None:
        """Quantizes no more; statistics may still be collected."""
        self._if_quant = False

    def enable_calib(self) -> None:
        """Collects statistics from now on."""
        if self._calibrator is None:
            raise InvalidArgument(f"calibration must have a use: got {self._descriptor}, whose scales follow the data.")
        self._if_calib = True

    def disable_calib(self) -> None:
        """Collects no more."""
        self._if_calib = False

    def load_calib_amax(self, *args: Any, strict: bool = True, **kwargs: Any) -> None:
        """Sets amax to what the calibrator computes, whose arguments these are (``method=…`` of a histogram).

        Raises RangeNotSet where nothing was collected; a warning with ``strict=False``.
        """
        if self._calibrator is None:
            raise InvalidArgument(f"calibration must have a use: got {self._descriptor}, whose scales follow the data.")
        found = self._calibrator.compute_amax(*args, **kwargs)
        if found is None:
            message = "amax must come from data: the calibrator saw none. Run inputs through after enable_calib()."
            if strict:
                raise RangeNotSet(message)
            warnings.warn(message, stacklevel=2)
            return
        old = self._amax
        if old is not None and old.shape != found.shape:
            self._amax = None
        self.amax = found

    def forward(self, inputs: Tensor) -> Tensor:
        """The quantized input, in its shape and dtype."""
        if self._disabled:
            return inputs
        if self._if_calib and self._calibrator is not None:
            self._calibrator.collect(inputs)
        return self._quantize(self, inputs) if self._if_quant else inputs

    def _range(self, inputs: Tensor) -> Tensor:
        found = None if self._descriptor.dynamic else self._amax
        reach = reduced_amax(inputs, self._descriptor.axis) if found is None else found
        factor = self._descriptor.scale_amax
        return reach if factor is None else reach * factor

    def _stored(self) -> Tensor | None:
        """amax times its factor; None where the op takes it from the input."""
        factor = self._descriptor.scale_amax
        return self._amax if factor is None or self._amax is None else self._amax * factor

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TensorQuantizer:
        before = None if self._amax is None else self._amax.detach()
        super()._apply(fn, recurse)
        now = self._amax
        if before is not None and now is not None and now.dtype != before.dtype:
            # A range rounded to half precision would move every code.
            now.data = before.to(now.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """A fresh module does not know the shape of its amax."""
        found = state_dict.get(f"{prefix}_amax")
        if found is not None and (self._amax is None or self._amax.shape != found.shape):
            device = found.device if self._amax is None else self._amax.device
            empty = torch.empty(found.shape, dtype=torch.float32, device=device)
            self._amax = nn.Parameter(empty) if self._learn_amax else empty
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """``8bit fake axis=0 amax=[0.5, 1.2] quant calib``."""
        if self._disabled:
            return "disabled"
        shown = self._descriptor
        words = [
            f"{shown.num_bits}bit" if isinstance(shown.num_bits, int) else f"E{shown.num_bits[0]}M{shown.num_bits[1]}"
        ]
        words += [word for word in ("unsigned", "narrow_range") if getattr(shown, word)]
        words.append("fake" if shown.fake_quant else "codes")
        if shown.block_sizes is not None:
            words.append(f"block_sizes={shown.block_sizes}")
        else:
            words.append("per-tensor" if shown.axis is None else f"axis={shown.axis}")
        words.append(f"amax={self._short_amax()}" + ("" if shown.scale_amax is None else f"*{shown.scale_amax}"))
        words += [] if self._calibrator is None else [f"calibrator={type(self._calibrator).__name__}"]
        words += [word for word, on in (("quant", self._if_quant), ("calib", self._if_calib)) if on]
        return " ".join(words)

    def _short_amax(self) -> str:
        if self._amax is None or self._descriptor.dynamic:
            return "dynamic"
        learned = " learned" if self._learn_amax else ""
        if self._amax.is_meta:
            return f"meta{learned}"
        if self._amax.numel() == 1:
            return f"{self._amax.item():.4f}{learned}"
        if self._amax.numel() == 0:
            return f"[]{learned}"
        return f"[{self._amax.min().item():.4f}, {self._amax.max().item():.4f}]({self._amax.numel()}){learned}"


_Quantize = Callable[[TensorQuantizer, Tensor], Tensor]


def _is_dynamic(descriptor: QuantDescriptor) -> bool:
    return descriptor.dynamic or (descriptor.block_sizes or {}).get("type") == "dynamic"


def _is_nvfp4(descriptor: QuantDescriptor) -> bool:
    return (descriptor.num_bits, (descriptor.block_sizes or {}).get("scale_bits")) == _NVFP4


def _calibrator(descriptor: QuantDescriptor) -> Calibrator | None:
    blocks = descriptor.block_sizes
    axis = descriptor.axis
    if blocks is not None and not _is_dynamic(descriptor):
        if descriptor.calib_method != "max":
            raise InvalidArgument(f"calib_method must be 'max' for blocks: got {descriptor.calib_method!r}.")
        sizes = QuantDescriptor.get_block_quant_axes_and_sizes(blocks)
        return _BlockMaxCalibrator(descriptor.num_bits, sizes, descriptor.unsigned)
    if descriptor.dynamic or (blocks is not None and not _is_nvfp4(descriptor)):
        return None
    if descriptor.calib_method == "histogram":
        return HistogramCalibrator(descriptor.num_bits, axis, descriptor.unsigned)
    return MaxCalibrator(descriptor.num_bits, axis, descriptor.unsigned)


def _chosen(descriptor: QuantDescriptor) -> _Quantize:
    """The arithmetic of a descriptor; InvalidArgument where there is none."""
    blocks = descriptor.block_sizes
    if blocks is None:
        return _whole if descriptor.fake_quant else _codes
    if not descriptor.fake_quant:
        raise InvalidArgument("fake_quant must be True with block_sizes: codes of blocks have no one scale.")
    if blocks.get("scale_bits") == _E8M0:
        if not _is_dynamic(descriptor):
            raise InvalidArgument("block_sizes['type'] must be 'dynamic' with scale_bits (8, 0): MX follows the data.")
        _mx_element(descriptor)
        return _mx
    return _nvfp4 if _is_nvfp4(descriptor) and _is_dynamic(descriptor) else _blocks


def _whole(quantizer: TensorQuantizer, x: Tensor) -> Tensor:
    d, amax = quantizer._descriptor, quantizer._range(x)
    if isinstance(d.num_bits, tuple):
        return (scaled_float_learnable if quantizer._learn_amax else scaled_float)(x, amax, *d.num_bits)
    quantize = fake_tensor_quant_learnable if quantizer._learn_amax else fake_tensor_quant
    return quantize(x, amax, d.num_bits, d.unsigned, d.narrow_range)


def _codes(quantizer: TensorQuantizer, x: Tensor) -> Tensor:
    d = quantizer._descriptor
    assert isinstance(d.num_bits, int)  # the descriptor allows codes of integers only
    codes, scale = tensor_quant(x, quantizer._range(x), d.num_bits, d.unsigned, d.narrow_range)
    quantizer._scale = scale.detach()
    return codes


def _mx_element(descriptor: QuantDescriptor) -> str:
    if isinstance(descriptor.num_bits, tuple):
        return float_format(descriptor.num_bits).name
    if descriptor.num_bits != 8 or descriptor.unsigned:
        raise InvalidArgument(f"num_bits must be (E, M) or signed 8 with scale_bits (8, 0): got {descriptor}.")
    return "int8"


def _mx(quantizer: TensorQuantizer, x: Tensor) -> Tensor:
    d = quantizer._descriptor
    sizes = QuantDescriptor.get_block_quant_axes_and_sizes(d.block_sizes or {})
    return fake_quantize_mx(x, sizes, _mx_element(d), scale_rounding="ceil")


def _nvfp4(quantizer: TensorQuantizer, x: Tensor) -> Tensor:
    d = quantizer._descriptor
    sizes = QuantDescriptor.get_block_quant_axes_and_sizes(d.block_sizes or {})
    return fake_quantize_nvfp4(x, None if d.dynamic else quantizer._stored(), sizes)


def _blocks(quantizer: TensorQuantizer, x: Tensor) -> Tensor:
    d = quantizer._descriptor
    blocks = d.block_sizes or {}
    return fake_quantize_blocks(
        x,
        QuantDescriptor.get_block_quant_axes_and_sizes(blocks),
        d.num_bits,
        amax=None if _is_dynamic(d) else quantizer._stored(),
        unsigned=d.unsigned,
        narrow=d.narrow_range,
        scale_bits=blocks.get("scale_bits"),
        scale_block_sizes=blocks.get("scale_block_sizes"),
    )
