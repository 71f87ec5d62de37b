"""What a kernel is launched with: the C structs of ``cuda/*.cu``, field by field, and the codes in them."""

from __future__ import annotations

import ctypes

import torch

POINTER, INT64, INT32, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float

DTYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
"""What kernels read, and its name in theirs."""

NUMBER = 0
SCALES = {torch.float32: 1, torch.bfloat16: 2}
POINTS = {torch.int32: 1, torch.int64: 2, torch.float32: 3, torch.float16: 4}

SATURATE, TO_INFINITY, TO_NAN = range(3)
MX_FLOOR, MX_CEIL, FULL, FLOAT_SCALES = range(4)


class AffineArgs(ctypes.Structure):
    """``fxq::AffineArgs`` of affine.cu."""

    _fields_ = (
        ("x", POINTER),
        ("grad", POINTER),
        ("out", POINTER),
        ("mask", POINTER),
        ("range", POINTER),
        ("scale", POINTER),
        ("point", POINTER),
        ("count", INT64),
        ("channels", INT64),
        ("inner", INT64),
        ("row", INT64),
        ("scale_value", FLOAT),
        ("point_value", INT32),
        ("scale_type", INT32),
        ("point_type", INT32),
        ("quant_min", FLOAT),
        ("quant_max", FLOAT),
        ("aligned", INT32),
        ("reserved", INT32),
    )


class FloatGrid(ctypes.Structure):
    """``fxq::FloatGrid`` of arithmetic.cuh."""

    _fields_ = (
        ("max", FLOAT),
        ("limit", FLOAT),
        ("lift", FLOAT),
        ("lowest", FLOAT),
        ("overflow", INT32),
        ("mantissa_bits", INT32),
        ("emin", INT32),
    )


class FloatArgs(ctypes.Structure):
    """``fxq::FloatArgs`` of floating.cu."""

    _fields_ = (
        ("x", POINTER),
        ("out", POINTER),
        ("scale", POINTER),
        ("count", INT64),
        ("channels", INT64),
        ("inner", INT64),
        ("grid", FloatGrid),
        ("aligned", INT32),
    )


class AmaxArgs(ctypes.Structure):
    """``fxq::AmaxArgs`` of amax.cu."""

    _fields_ = (
        ("x", POINTER),
        ("out", POINTER),
        ("amax", POINTER),
        ("count", INT64),
        ("channels", INT64),
        ("inner", INT64),
        ("grid", FloatGrid),
        ("lowest", FLOAT),
        ("bound", FLOAT),
        ("floating", INT32),
        ("aligned", INT32),
    )


class Element(ctypes.Structure):
    """``fxq::Element`` of arithmetic.cuh."""

    _fields_ = (
        ("grid", FloatGrid),
        ("low", FLOAT),
        ("high", FLOAT),
        ("step", FLOAT),
        ("max", FLOAT),
        ("integer", INT32),
    )


class BlockArgs(ctypes.Structure):
    """``fxq::BlockArgs`` of floating.cu."""

    _fields_ = (
        ("x", POINTER),
        ("out", POINTER),
        ("tensor_amax", POINTER),
        ("count", INT64),
        ("element", Element),
        ("scales", FloatGrid),
        ("unit", FLOAT),
        ("reach", FLOAT),
        ("lanes", INT32),
        ("mode", INT32),
        ("aligned", INT32),
    )
