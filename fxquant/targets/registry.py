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


def get_target(name: str) -> Target:
    """The target of a name; InvalidArgument names the known ones."""
    if not isinstance(name, str) or name not in TARGETS:
        known = ", ".join(repr(known) for known in TARGETS)
        raise InvalidArgument(f"target must be one of {known}: got {name!r}.")
    return TARGETS[name]


def for_capability(target: Target, capability: str) -> Runtime:
    """The target's runtime, compiling for one compute capability. Raises InvalidArgument where it does not know it."""
    known = () if target.runtime is None else target.runtime.capabilities
    if capability not in known or target.runtime is None:
        what = f"one of {', '.join(map(repr, known))}" if known else "left out"
        raise InvalidArgument(f"capability must be {what} for {target.name}: got {capability!r}.")
    return dataclasses.replace(
        target.runtime,
        run=functools.partial(target.runtime.run, capability=capability),
        kernels=functools.partial(target.runtime.kernels, capability=capability),
    )
