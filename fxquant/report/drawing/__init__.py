"""The operators of a prepared model as a drawn graph: a layered layout of our own, written as SVG.

Layers by longest path, order within a layer by medians, places by least squares. Nothing in it depends on hashes:
the same model gives the same bytes.
"""

from fxquant.report.drawing.document import draw_svg
from fxquant.report.drawing.svg import Shown

__all__ = ["Shown", "draw_svg"]
