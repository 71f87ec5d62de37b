"""The cases of `tests.ops` as functions of tensors only, forward and backward in one, on hard values."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from tests.ops.cases import Case
from tests.ops.oracle import SPECIALS

FAMILIES = ("affine", "amax", "formats", "learnable", "quantize", "saved")
# Not arithmetic: forms for export, and marks.
_NO_KERNEL = ("export", "bind", "materialize")


@dataclass(frozen=True)
class Operator:
    """One operator with its gradients.

    Attributes:
        function: of ``inputs``; gives the results and the gradients.
        exact: how many of those have no sum in them whose order a device chooses.
    """

    function: Callable[..., list[Tensor]]
    inputs: list[Tensor]
    exact: int


CASES: dict[str, Case] = {
    f"{family}: {case.name}": case
    for family in FAMILIES
    for case in importlib.import_module(f"tests.ops.cases_{family}").CASES
    if not any(word in case.name for word in _NO_KERNEL)
}


def operator(case: Case, dtype: torch.dtype) -> Operator:
    given = _arguments(case, dtype)
    places = [i for i, value in enumerate(given) if isinstance(value, Tensor)]
    names = [argument.name for argument in case.op._schema.arguments]

    def function(*tensors: Tensor) -> list[Tensor]:
        args = list(given)
        for place, tensor in zip(places, tensors, strict=True):
            learned = names[place] in case.grads
            args[place] = tensor.detach().requires_grad_() if learned else tensor
        results = tree_leaves(case.op(*args, **case.kwargs))
        if not case.grads:
            return results
        leaves = [args[names.index(name)] for name in case.grads]
        incoming = torch.ones_like(results[0])
        if results[0].shape == args[0].shape and args[0].is_floating_point():
            incoming = incoming * args[0].detach()
        return [*results, *torch.autograd.grad(results[0], leaves, incoming)]

    with torch.no_grad():
        results = tree_leaves(case.op(*given, **case.kwargs))
    exact = len(results) + ("input" in case.grads)
    return Operator(function, [given[place].detach() for place in places], exact)


def _arguments(case: Case, dtype: torch.dtype) -> list[Any]:
    """Specials, ties and plain values; plain ones only where the operator refuses others."""
    generator = torch.Generator().manual_seed(0)
    plain = torch.randn(case.shape, generator=generator) * 2
    hard = plain.clone()
    flat = hard.view(-1)
    # In a sum, huge values that cancel would leave nothing but the order of addition.
    specials = [v for v in SPECIALS if set(case.grads) <= {"input"} or not 1e20 < abs(v) < math.inf]
    flat[: len(specials)] = torch.tensor(specials)
    flat[20:60] = (torch.arange(40) - 20) * 0.05
    try:
        given = list(case.args(hard.to(dtype)))
        case.op(*given, **case.kwargs)
    except (ValueError, TypeError, RuntimeError):
        given = list(case.args(plain.to(dtype)))
    return given
