"""The profiles that come with fxquant, by name."""

from fxquant.targets.profile import Profile
from fxquant.targets.registry import TARGETS, get_profile

PROFILES: dict[str, Profile] = {name: target.profile for name, target in TARGETS.items()}
ONNXRUNTIME, OPENVINO = PROFILES["onnxruntime"], PROFILES["openvino"]
TENSORRT, GENERIC = PROFILES["tensorrt"], PROFILES["generic"]

__all__ = ["GENERIC", "ONNXRUNTIME", "OPENVINO", "PROFILES", "TENSORRT", "Profile", "get_profile"]
