"""`ScaledQuantDescriptor` (also `QuantDescriptor`): how a tensor is to be quantized, as read-only data."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

from fxquant.errors import InvalidArgument
from fxquant.numerics.formats import float_format

CALIB_METHODS = ("max", "histogram")
_BLOCK_WORDS = ("type", "scale_bits", "scale_block_sizes")
Sizes = dict[int, int]
_DEFAULTS: dict[str, Any] = {
    "num_bits": 8,
    "name": None,
    "fake_quant": True,
    "axis": None,
    "block_sizes": None,
    "amax": None,
    "learn_amax": False,
    "scale_amax": None,
    "calib_method": "max",
    "unsigned": False,
    "narrow_range": False,
    "dynamic": False,
}


class ScaledQuantDescriptor:
    """Says how a tensor is quantized; a descriptor and a tensor define a quantized tensor.

    Args:
        num_bits: 1…16 for integer codes, or ``(E, M)``, the exponent and mantissa bits of a float format.
        name: free text.
        fake_quant: quantize and dequantize; else give integer-valued codes.
        axis: the dimension, or tuple of dimensions, each slice of which has its own amax; None for one amax.
        block_sizes: ``{axis: size}`` for one amax per block, with the optional keys ``"type"`` ("static", the default,
            or "dynamic"), ``"scale_bits"`` (format of the block scales) and ``"scale_block_sizes"``.
        amax: the range, a float or a list or array of floats, or the first value of a learned one.
        learn_amax: amax is a parameter.
        scale_amax: amax is multiplied by it.
        calib_method: ``"max"`` or ``"histogram"``.
        unsigned: codes from 0.
        narrow_range: signed codes that mirror at 0, as −127…127.
        dynamic: amax is taken from each input; nothing is calibrated.

    Raises:
        TypeError: an argument of another type than above.
        InvalidArgument: (a ValueError) a value out of range, or two arguments that exclude each other.

    Source: NVIDIA ModelOpt, ``ScaledQuantDescriptor``.

    >>> ScaledQuantDescriptor(num_bits=4, axis=0).dict()
    {'num_bits': 4, 'axis': 0}
    """

    def __init__(
        self,
        num_bits: int | tuple[int, int] = 8,
        name: str | None = None,
        fake_quant: bool = True,
        axis: int | tuple[int, ...] | None = None,
        block_sizes: Mapping[Any, Any] | None = None,
        amax: Any = None,
        learn_amax: bool = False,
        scale_amax: float | None = None,
        calib_method: str = "max",
        unsigned: bool = False,
        narrow_range: bool = False,
        dynamic: bool = False,
    ) -> None:
        self._num_bits = _bits("num_bits", num_bits)
        if name is not None and not isinstance(name, str):
            raise TypeError(f"name must be a string or None: got {_kind(name)}.")
        self._name = name
        self._axis = _axis(axis)
        self._block_sizes = _blocks(block_sizes)
        self._amax = _amax(amax)
        self._scale_amax = _scale_amax(scale_amax)
        if calib_method not in CALIB_METHODS:
            raise InvalidArgument(f"calib_method must be one of {CALIB_METHODS}: got {calib_method!r}.")
        self._calib_method = calib_method
        flags = {
            "fake_quant": fake_quant,
            "learn_amax": learn_amax,
            "unsigned": unsigned,
            "narrow_range": narrow_range,
            "dynamic": dynamic,
        }
        for key, flag in flags.items():
            if not isinstance(flag, bool):
                raise TypeError(f"{key} must be a bool: got {_kind(flag)}.")
        self._fake_quant, self._learn_amax, self._unsigned, self._narrow_range, self._dynamic = flags.values()
        self._check_together()

    def _check_together(self) -> None:
        if self._block_sizes is not None and self._axis is not None:
            raise InvalidArgument(f"axis must be None when block_sizes is set: got {self._axis}. Drop one of them.")
        if self._unsigned and isinstance(self._num_bits, tuple):
            raise InvalidArgument(f"unsigned must be False for a float format: got num_bits={self._num_bits}.")
        if self._num_bits == 1 and not self._unsigned:
            raise InvalidArgument("num_bits must be at least 2 for signed codes: got 1. Set unsigned=True.")
        if isinstance(self._num_bits, tuple) and not self._fake_quant:
            raise InvalidArgument(f"fake_quant must be True for a float format: got num_bits={self._num_bits}.")
        if self._learn_amax:
            for key in ("block_sizes", "dynamic"):
                if getattr(self, f"_{key}"):
                    raise InvalidArgument(f"learn_amax must be False with {key}: there is no one amax to learn.")
            if not self._fake_quant:
                raise InvalidArgument("learn_amax must be False without fake_quant: codes give amax no gradient.")

    @property
    def num_bits(self) -> int | tuple[int, int]:
        """Width of the integer codes, or (E, M)."""
        return self._num_bits

    @property
    def name(self) -> str | None:
        """The name."""
        return self._name

    @property
    def fake_quant(self) -> bool:
        """Whether the result is dequantized."""
        return self._fake_quant

    @property
    def axis(self) -> int | tuple[int, ...] | None:
        """The dimensions with an amax per slice."""
        return self._axis

    @property
    def block_sizes(self) -> dict[Any, Any] | None:
        """Sizes by axis, and the words that go with them; a copy."""
        return copy.deepcopy(self._block_sizes)

    @property
    def amax(self) -> Any:
        """None, a float, or a (nested) list of floats; a copy."""
        return copy.deepcopy(self._amax)

    @property
    def learn_amax(self) -> bool:
        """Whether amax is a parameter."""
        return self._learn_amax

    @property
    def scale_amax(self) -> float | None:
        """The factor on amax."""
        return self._scale_amax

    @property
    def calib_method(self) -> str:
        """``"max"`` or ``"histogram"``."""
        return self._calib_method

    @property
    def unsigned(self) -> bool:
        """Whether codes start at 0."""
        return self._unsigned

    @property
    def narrow_range(self) -> bool:
        """Whether the lowest signed code is left out."""
        return self._narrow_range

    @property
    def dynamic(self) -> bool:
        """Whether amax is taken from each input."""
        return self._dynamic

    def dict(self) -> dict[str, Any]:
        """What differs from the defaults; ``QuantDescriptor(**d.dict()) == d``."""
        fields = {key: getattr(self, key) for key in _DEFAULTS}
        return {key: value for key, value in fields.items() if value != _DEFAULTS[key]}

    @staticmethod
    def get_block_quant_axes_and_sizes(block_sizes: Mapping[Any, Any]) -> Sizes:
        """The part of ``block_sizes`` that is axis → size.

        >>> ScaledQuantDescriptor.get_block_quant_axes_and_sizes({-1: 32, "type": "dynamic"})
        {-1: 32}
        """
        return {key: size for key, size in block_sizes.items() if key not in _BLOCK_WORDS}

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ScaledQuantDescriptor):
            return NotImplemented
        return self.dict() == other.dict()

    def __repr__(self) -> str:
        shown = ", ".join(f"{key}={value!r}" for key, value in self.dict().items())
        return f"{type(self).__name__}({shown})"


QuantDescriptor = ScaledQuantDescriptor


def _kind(value: object) -> str:
    return f"{value!r} ({type(value).__name__})"


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _bits(name: str, value: Any) -> int | tuple[int, int]:
    if isinstance(value, tuple | list):
        if len(value) != 2 or not all(_is_int(part) for part in value):
            raise TypeError(f"{name} must be an integer or two integers (E, M): got {value!r}.")
        exponent, mantissa = value
        float_format((exponent, mantissa))
        return (exponent, mantissa)
    if not _is_int(value):
        raise TypeError(f"{name} must be an integer or two integers (E, M): got {_kind(value)}.")
    if not 1 <= value <= 16:
        raise InvalidArgument(f"{name} must be from 1 to 16: got {value}.")
    return int(value)


def _axis(value: Any) -> int | tuple[int, ...] | None:
    if value is None or _is_int(value):
        return value
    if not isinstance(value, tuple | list) or not all(_is_int(part) for part in value):
        raise TypeError(f"axis must be None, an integer or a tuple of integers: got {_kind(value)}.")
    if not value or len(set(value)) != len(value):
        raise InvalidArgument(f"axis must name each dimension once: got {value!r}.")
    return tuple(value)


def _blocks(value: Any) -> dict[Any, Any] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise TypeError(f"block_sizes must be None or a dict: got {_kind(value)}.")
    found = dict(value)
    if found.get("type", "static") not in ("static", "dynamic"):
        raise InvalidArgument(f"block_sizes['type'] must be 'static' or 'dynamic': got {found['type']!r}.")
    bits = found.get("scale_bits")
    if bits is not None and tuple(bits if isinstance(bits, tuple | list) else ()) != (8, 0):  # (8, 0) is E8M0
        bits = _bits("block_sizes['scale_bits']", bits)
    if bits is not None:
        found["scale_bits"] = tuple(bits) if isinstance(bits, tuple | list) else bits
    if found.get("scale_block_sizes") is not None:
        if bits is None:
            raise InvalidArgument("block_sizes['scale_block_sizes'] must go with 'scale_bits': got none.")
        found["scale_block_sizes"] = dict(found["scale_block_sizes"])
        _check_sizes("block_sizes['scale_block_sizes']", found["scale_block_sizes"])
    _check_sizes("block_sizes", ScaledQuantDescriptor.get_block_quant_axes_and_sizes(found))
    return found


def _check_sizes(name: str, sizes: Mapping[Any, Any]) -> None:
    for axis, size in sizes.items():
        if not _is_int(axis):
            raise InvalidArgument(f"{name} must have integers (axes) or {_BLOCK_WORDS} as keys: got {axis!r}.")
        if not _is_int(size) or size <= 0:
            raise InvalidArgument(f"{name}[{axis}] must be a positive integer: got {size!r}.")
    if not sizes:
        raise InvalidArgument(f"{name} must name an axis: got none. Write {{-1: 32}} for blocks of 32 on the last.")


def _amax(value: Any) -> Any:
    """As plain floats, so that descriptors compare, print and pickle without numpy."""
    if value is None:
        return None
    plain = value.tolist() if type(value).__module__.split(".")[0] == "numpy" else value
    if not isinstance(plain, float | list):
        raise TypeError(f"amax must be a float, a list or an ndarray: got {_kind(value)}.")
    return _floats(plain)


def _floats(value: Any) -> Any:
    if isinstance(value, list):
        return [_floats(part) for part in value]
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"amax must hold floats: got {_kind(value)}.")
    number = float(value)
    if not (math.isfinite(number) and number >= 0):
        raise InvalidArgument(f"amax must be finite and at least 0: got {number}.")
    return number


def _scale_amax(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"scale_amax must be a float or None: got {_kind(value)}.")
    factor = float(value)
    if not (math.isfinite(factor) and factor > 0):
        raise InvalidArgument(f"scale_amax must be finite and above 0: got {factor}.")
    return factor
