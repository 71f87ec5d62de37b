"""What products and quantizers cost in a runtime, measured once: tables by target and CPU, and how they are read."""

from fxquant.targets.costs.table import EDGES, Cost, CostTable, Line, Row, Size, cpu_class, shipped

__all__ = ["EDGES", "Cost", "CostTable", "Line", "Row", "Size", "cpu_class", "shipped"]
