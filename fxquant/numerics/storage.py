"""Which integer type of ONNX holds a range of codes."""

from __future__ import annotations

_STORAGE = ((0, 255, "uint8"), (-128, 127, "int8"), (0, 65535, "uint16"), (-32768, 32767, "int16"))


def storage(quant_min: int, quant_max: int) -> tuple[str, int, int]:
    """Name and limits of the narrowest ONNX integer type that holds the codes."""
    for low, high, name in _STORAGE:
        if low <= quant_min and quant_max <= high:
            return name, low, high
    raise AssertionError(f"no integer type of at most 16 bits holds [{quant_min}, {quant_max}]")
