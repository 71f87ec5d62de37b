"""Every target by its name."""

from __future__ import annotations

from fxquant.errors import InvalidArgument
from fxquant.targets import generic, onnxruntime, openvino, tensorrt
from fxquant.targets.target import Target

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
