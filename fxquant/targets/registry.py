"""Every target by its name."""

from __future__ import annotations

import dataclasses
import functools

from fxquant.errors import InvalidArgument
from fxquant.targets import generic, onnxruntime, openvino, tensorrt
from fxquant.targets.target import Runtime, Target

# In the order in which messages name them.
TARGETS: dict[str, Target] = {
    target.name: target for target in (onnxruntime.TARGET, openvino.TARGET, tensorrt.TARGET, generic.TARGET)
}


def get_target(name: str, argument: str = "target") -> Target:
    """The target of a name; InvalidArgument names the ``argument``, and the known ones."""
    if not isinstance(name, str) or name not in TARGETS:
        known = ", ".join(repr(known) for known in TARGETS)
        raise InvalidArgument(f"{argument} must be one of {known}: got {name!r}.")
    return TARGETS[name]


def configured(target: Target, *, capability: str | None = None, timeout: float | None = None) -> Runtime | None:
    """The target's runtime, compiling for one compute capability and within some seconds, where they are given.

    Raises InvalidArgument where it does not know them.
    """
    found, given = target.runtime, {"capability": capability, "timeout": timeout}
    known = () if found is None else found.capabilities
    if capability is not None and capability not in known:
        what = f"one of {', '.join(map(repr, known))}" if known else "left out"
        raise InvalidArgument(f"capability must be {what} for {target.name}: got {capability!r}.")
    if timeout is not None:
        if found is None or not found.has_timeout:
            raise InvalidArgument(f"timeout must be left out for {target.name}, which builds nothing: got {timeout!r}.")
        if not timeout > 0:
            raise InvalidArgument(f"timeout must be seconds, above 0: got {timeout!r}.")
    options = {name: value for name, value in given.items() if value is not None}
    if found is None or not options:
        return found
    return dataclasses.replace(
        found,
        run=functools.partial(found.run, **options),
        kernels=functools.partial(found.kernels, **options),
    )
