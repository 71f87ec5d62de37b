"""The profiles by the names of their targets."""

from fxquant.targets.profile import Profile
from fxquant.targets.registry import TARGETS, get_target

PROFILES: dict[str, Profile] = {name: target.profile for name, target in TARGETS.items()}
ONNXRUNTIME, OPENVINO = PROFILES["onnxruntime"], PROFILES["openvino"]
TENSORRT, GENERIC = PROFILES["tensorrt"], PROFILES["generic"]

__all__ = ["GENERIC", "ONNXRUNTIME", "OPENVINO", "PROFILES", "TENSORRT", "Profile", "get_profile"]


def get_profile(target: str) -> Profile:
    """The profile of a target's name; InvalidArgument names the known ones."""
    return get_target(target).profile
