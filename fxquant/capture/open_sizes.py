"""Which sizes of a model's inputs are left open, written as the inputs are, and as torch.export wants it."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.errors import InvalidArgument

OpenSizes = tuple[tuple[Any, ...], dict[str, Any]]
"""A spec of `torch.export` in the place of each input: of the arguments, and of the keywords by name."""


def open_batch(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> OpenSizes:
    """Dimension 0 of every tensor that shares the first one's batch size, as far as the model leaves it open."""
    leaves = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.dim()]
    size = leaves[0].shape[0] if leaves else 0

    def spec(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim() and value.shape[0] == size:
            return {0: torch.export.Dim.AUTO}
        return None

    positional, named = torch.utils._pytree.tree_map(spec, (args, dict(kwargs)))
    return positional, named


def open_as_asked(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], asked: Any) -> OpenSizes:
    """What torch.export takes as ``dynamic_shapes``: by parameter name, in their order, or a ``ShapesCollection``.

    Raises InvalidArgument for names that are no parameters that the inputs go to.
    """
    parameters = inspect.signature(model.forward).parameters
    given = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    if hasattr(asked, "dynamic_shapes"):
        asked = asked.dynamic_shapes(model, args, kwargs)
    by_name = dict(asked) if isinstance(asked, Mapping) else dict(zip(given, asked, strict=False))
    if not by_name.keys() <= given.keys():
        raise InvalidArgument(
            f"dynamic_shapes must name the parameters that inputs are given for, {list(given)}: got {list(by_name)}."
        )
    positional: list[Any] = []
    named: dict[str, Any] = {}
    for name, value in given.items():
        spec, kind = by_name.get(name), parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            positional += spec or [None] * len(value)
        elif kind is inspect.Parameter.VAR_KEYWORD:
            named |= spec or dict.fromkeys(value)
        elif name in kwargs:
            named[name] = spec
        else:
            positional.append(spec)
    return tuple(positional), named


def by_parameter(forward: Callable[..., Any], sizes: OpenSizes | None) -> dict[str, Any] | None:
    """The form that torch.export takes for a callable: a spec for each parameter."""
    return None if sizes is None else dict(inspect.signature(forward).bind(*sizes[0], **sizes[1]).arguments)


@contextlib.contextmanager
def keywords_named(model: nn.Module, kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Inside, ``forward(x, **more)`` has a signature with a parameter for each keyword that it is given.

    torch.export finds no sizes for what stands in ``**more``; tried on 2.13.
    """
    forward, kinds = model.forward, inspect.Parameter
    signature = inspect.signature(forward)
    plain = [p for p in signature.parameters.values() if p.kind is not kinds.VAR_KEYWORD]
    if len(plain) == len(signature.parameters):
        yield
        return

    def named(*args: Any, **given: Any) -> Any:
        return forward(*args, **given)

    known = {p.name for p in plain}
    extra = [kinds(name, kinds.KEYWORD_ONLY) for name in kwargs if name not in known]
    named.__dict__["__signature__"] = signature.replace(parameters=[*plain, *extra])
    own = model.__dict__.get("forward")
    model.__dict__["forward"] = named
    try:
        yield
    finally:
        if own is None:
            del model.__dict__["forward"]
        else:
            model.__dict__["forward"] = own
