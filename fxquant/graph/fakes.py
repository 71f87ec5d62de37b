"""The fake values of nodes that passes make, computed once for equal operands."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fxquant.ops.metadata import Result, result_of

_Memo = dict[tuple[object, ...], Result]
_memo: contextvars.ContextVar[_Memo | None] = contextvars.ContextVar("fakes", default=None)

# Their results have sizes that are found out anew at each call.
_SIZED_BY_DATA = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


@contextlib.contextmanager
def memoized() -> Iterator[None]:
    """Inside, `computed` remembers what it found. Nested blocks, as of a pass run by a pass, share one memory."""
    if _memo.get() is not None:
        yield
        return
    token = _memo.set({})
    try:
        yield
    finally:
        _memo.reset(token)


def computed(mode: Any, op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """``op(*args, **kwargs)`` under the fake mode ``mode``, without gradient.

    An operator of Python costs as much on fake tensors as all its arithmetic, and a model has hundreds of sites with
    a handful of forms. Inside `memoized`, equal operands (of one size, stride, dtype and device; symbolic sizes count
    as the expressions that they are) give new fake tensors with the metadata found first. Always computed: operators
    that write to operands or return views of them, whose sizes depend on data, or whose results are no plain tensors.
    """
    memo = _memo.get()
    key = _key(mode, op, args, kwargs) if memo is not None and _is_functional(op) else None
    with mode, torch.no_grad():
        if memo is None or key is None:
            return op(*args, **kwargs)
        if key in memo:
            return memo[key].fresh()
        value = op(*args, **kwargs)
    found = result_of(value)
    if found is not None:
        memo[key] = found
    return value


def _is_functional(op: Any) -> bool:
    schema = getattr(op, "_schema", None)
    if schema is None or schema.is_mutable or any(result.alias_info is not None for result in schema.returns):
        return False
    return not any(tag in op.tags for tag in _SIZED_BY_DATA)


def _key(mode: Any, op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[object, ...] | None:
    """Equal for calls with equal results; None where an argument has no such form."""
    try:
        return (id(mode), op, _form(tuple(args)), tuple((name, _form(kwargs[name])) for name in sorted(kwargs)))
    except TypeError:
        return None


_SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)
_TORCH: tuple[type, ...] = (torch.dtype, torch.device, torch.layout, torch.memory_format)
_STATIC: tuple[type, ...] = (bool, int, float, complex, str, type(None), *_TORCH)


def _form(value: Any) -> object:
    """The part of an argument that a result's metadata can depend on. Raises TypeError for what is not known here."""
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.is_quantized:
            raise TypeError
        sizes = tuple(map(_form, (*value.shape, *value.stride(), value.storage_offset())))
        return value.dtype, value.device, value.is_conj(), value.is_neg(), value.requires_grad, sizes
    if isinstance(value, _SYMBOLS):
        return type(value), value.node.expr
    if isinstance(value, (tuple, list)):
        return type(value), tuple(map(_form, value))
    if isinstance(value, _STATIC):
        # 1, 1.0 and True are one key of a dict; 0.0 and -0.0 too, and nan is none.
        return type(value), repr(value) if isinstance(value, float) else value
    raise TypeError
