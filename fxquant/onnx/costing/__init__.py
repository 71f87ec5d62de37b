"""Tables of costs, measured: small files of one kind of layer each, timed as integers and in float."""

from fxquant.onnx.costing.measure import measure_costs, save_costs

__all__ = ["measure_costs", "save_costs"]
