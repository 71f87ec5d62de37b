"""Now `fxquant.numerics.formats`."""

from fxquant.numerics.formats import FLOAT_FORMATS, FloatFormat, float_format

__all__ = ["FLOAT_FORMATS", "FloatFormat", "float_format"]
