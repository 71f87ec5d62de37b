"""Now `fxquant.targets`."""

from fxquant.targets.profiles import GENERIC, ONNXRUNTIME, OPENVINO, PROFILES, TENSORRT, Profile, get_profile

__all__ = ["GENERIC", "ONNXRUNTIME", "OPENVINO", "PROFILES", "TENSORRT", "Profile", "get_profile"]
