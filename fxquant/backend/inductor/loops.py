"""How Inductor's C++ shares a loop over rows."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch

from fxquant.passes.base import Pass

_one_by_one: ContextVar[frozenset[int]] = ContextVar("bodies that stay scalar", default=frozenset())


@functools.cache
def keep_rows_together() -> None:
    """Tells Inductor, once a process; what others compile stays as it is.

    ::

        for each row:     for its columns: sum            for each row:
        for 16 rows:      mean = sum / n           →          for its columns: sum
        for each row:     for its columns: (x − mean)²        mean = sum / n
        …                                                     for its columns: (x − mean)²

    Inductor plans one loop over the rows for such a chain, as of a LayerNorm's mean, variance and range, or a weight's
    largest magnitude, scale and codes. Then it takes the values of 16 rows at a time in a vector, finds that the loops
    do not agree, and generates all of them again, apart: a row has left the cache when it is read the second time. One
    value a row is cheap. Taken one by one it leaves the loops in agreement.

    Three layers of a transformer compile with 3 % fewer calls of Python functions; a step takes as long as before.

    The numbers are those of Inductor's scalar code: basic operations and square roots are as in a vector, to the bit;
    an exponential or a logarithm may differ in the last place.
    """
    from torch._inductor.codegen import cpp  # private; tried on 2.13 and 2.15, read in 2.11

    generate, select = cpp.CppScheduling.codegen_outer_loop_node, cpp.TilingSelect.select_tiling

    @functools.wraps(generate)
    def generate_together(self: Any, node: Any) -> None:
        bodies = frozenset(map(id, _values_of_rows(node))) if is_ours() else frozenset()
        token = _one_by_one.set(bodies)
        try:
            generate(self, node)
        finally:
            _one_by_one.reset(token)

    @functools.wraps(select)
    def select_unless_scalar(self: Any, functions: Any, sizes: Any) -> Any:
        factors, indices, *others = select(self, functions, sizes)
        if not _one_by_one.get().isdisjoint(map(id, cpp._get_loop_body(functions))):
            factors, indices = [], []
        return (factors, indices, *others)

    cpp.CppScheduling.codegen_outer_loop_node = generate_together  # type: ignore[method-assign]
    cpp.TilingSelect.select_tiling = select_unless_scalar  # type: ignore[assignment, method-assign]


def is_ours() -> bool:
    """Whether the graph that Inductor is at work on comes from our backend."""
    from torch._inductor import config

    return any(isinstance(each, Pass) for each in getattr(config.post_grad_custom_pre_pass, "passes", ()))


def _values_of_rows(node: Any) -> Iterator[Any]:
    """The bodies that have no loop of their own inside the shared one, if those that have take their vectors there."""
    depth = node.outer_loop_fusion_depth
    parts = [(part, max((s.group[1] for s in part.get_nodes()), key=_levels)) for part in node.get_outer_nodes()]
    deeper = [part for part, ranges in parts if _levels(ranges) > depth]
    if deeper and all(_vectors_lie_inside(part, depth) for part in deeper):
        for part, ranges in parts:
            if _levels(ranges) == depth:
                yield from (each._body for each in part.get_nodes())


def _levels(ranges: tuple[Any, Any]) -> int:
    return len(ranges[0]) + len(ranges[1])


def _vectors_lie_inside(part: Any, depth: int) -> bool:
    from torch._inductor import cpu_vec_isa  # private; tried on 2.13 and 2.15, read in 2.11
    from torch._inductor.codegen.cpp import TilingSelect  # private; tried on 2.13 and 2.15, read in 2.11

    isa = cpu_vec_isa.pick_vec_isa()
    if not isa:
        return False
    bodies, sizes = [s._body for s in part.get_nodes()], [s.group[1] for s in part.get_nodes()]
    levels = max(map(_levels, sizes))
    indices = TilingSelect()._select_tiling_indices(bodies, sizes, isa.nelements(dtype=torch.float))
    return all(index % levels >= depth for index in indices)
