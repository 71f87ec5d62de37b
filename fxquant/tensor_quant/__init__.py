"""The API of NVIDIA ModelOpt's ``tensor_quant``: its names, argument orders and defaults, over `fxquant.ops`.

| what | where |
| --- | --- |
| ``TensorQuantFunction`` and its relatives, for ``.apply(x, amax, 8, False, True)`` | `functions` |
| ``tensor_quant(x, amax)`` and its relatives, plain functions with ``check=True`` for compiled code | `functions` |
| ``ScaledQuantDescriptor`` = ``QuantDescriptor`` | `descriptor` |
| ``MaxCalibrator``, ``HistogramCalibrator`` | `calibrators` |
| ``TensorQuantizer`` | `quantizer` |

Differs from the original where that is wrong: ``learn_amax`` works, FP8 saturates instead of giving NaN, an amax of 0
quantizes its own channel to 0 only, every function runs under ``torch.compile(fullgraph=True)`` and on CPU.
"""

from fxquant.tensor_quant.calibrators import Calibrator, HistogramCalibrator, MaxCalibrator
from fxquant.tensor_quant.descriptor import QuantDescriptor, ScaledQuantDescriptor
from fxquant.tensor_quant.functions import (
    FakeAffineTensorQuantFunction,
    FakeTensorQuantFunction,
    LegacyFakeTensorQuantFunction,
    ScaledE4M3Function,
    TensorQuantFunction,
    fake_affine_tensor_quant,
    fake_tensor_quant,
    scaled_e4m3,
    scaled_e4m3_abstract,
    tensor_quant,
)
from fxquant.tensor_quant.quantizer import TensorQuantizer

__all__ = [
    "Calibrator",
    "FakeAffineTensorQuantFunction",
    "FakeTensorQuantFunction",
    "HistogramCalibrator",
    "LegacyFakeTensorQuantFunction",
    "MaxCalibrator",
    "QuantDescriptor",
    "ScaledE4M3Function",
    "ScaledQuantDescriptor",
    "TensorQuantFunction",
    "TensorQuantizer",
    "fake_affine_tensor_quant",
    "fake_tensor_quant",
    "scaled_e4m3",
    "scaled_e4m3_abstract",
    "tensor_quant",
]
