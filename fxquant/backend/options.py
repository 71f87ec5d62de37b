"""The backends' options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fxquant.errors import InvalidArgument
from fxquant.passes.joint.product_times import never_faster
from fxquant.passes.joint.use_integer_backward import MOST_OUTLIERS, IntegerBackward
from fxquant.passes.joint.use_integer_matmul import IntegerMatmul
from fxquant.spec.recipes import Recipe, get_recipe
from fxquant.targets.profiles import get_profile

_OPTIONS = ("recipe", "target", "inductor", "integer_matmul", "integer_backward", "save_quantized", "reuse_weights")


@dataclass(frozen=True, kw_only=True)
class Options:
    recipe: Recipe | None
    target: str
    given: tuple[str, ...]
    integers: IntegerMatmul
    by_default: bool
    integer_backward: IntegerBackward
    save_quantized: bool
    reuse_weights: bool

    @property
    def joint(self) -> dict[str, Any]:
        """What `joint_passes` is told."""
        return {
            "integers": self.integers,
            "by_default": self.by_default,
            "integer_backward": self.integer_backward,
            "save_quantized": self.save_quantized,
        }

    @classmethod
    def read(cls, options: Mapping[str, Any] | None) -> Options:
        found = dict(options or {})
        unknown = sorted(found.keys() - set(_OPTIONS))
        if unknown:
            raise InvalidArgument(
                f"options must be among {', '.join(map(repr, _OPTIONS))}: got {', '.join(map(repr, unknown))}. "
                "Inductor's own settings go into options={'inductor': {...}}."
            )
        given = tuple(repr(name) for name in ("recipe", "target") if name in found)
        target = str(found.get("target", "onnxruntime"))
        get_profile(target)
        recipe = found.get("recipe", "int8")
        by_default = "integer_matmul" not in found
        integers = found.get("integer_matmul", _by_default(found.get("reuse_weights", False)))
        if integers not in (True, False, "auto"):
            raise InvalidArgument(f"options['integer_matmul'] must be True, False or 'auto': got {integers!r}.")
        save = found.get("save_quantized", True)
        if not isinstance(save, bool):
            raise InvalidArgument(f"options['save_quantized'] must be True or False: got {save!r}.")
        reuse = found.get("reuse_weights", False)
        if not isinstance(reuse, bool):
            raise InvalidArgument(f"options['reuse_weights'] must be True or False: got {reuse!r}.")
        if reuse and integers is not False:
            raise InvalidArgument(
                f"options['reuse_weights'] must be False where options['integer_matmul'] is {integers!r}: got True. "
                "Weights are kept as floats, and those products are taken of codes: leave one of the two out."
            )
        backward = _integer_backward(found.get("integer_backward", False))
        if reuse and backward.mode is not False:
            raise InvalidArgument(
                f"options['reuse_weights'] must be False where options['integer_backward'] is {backward.mode!r}: got "
                "True. Weights are kept as floats, and those products are taken of codes: leave one of the two out."
            )
        chosen = None if recipe is None else get_recipe(recipe)
        return cls(
            recipe=chosen,
            target=target,
            given=given,
            integers=integers,
            by_default=by_default,
            integer_backward=backward,
            save_quantized=save,
            reuse_weights=reuse,
        )


def _by_default(reuse: object) -> IntegerMatmul:
    """``integer_matmul`` where nobody asked: integers where they are faster, if the CPU can be faster with them."""
    return False if reuse or never_faster("cpu") else "auto"


def _integer_backward(given: object) -> IntegerBackward:
    """The option as what the pass is told; InvalidArgument where it is none."""
    fields: dict[Any, Any] = dict(given) if isinstance(given, Mapping) else {"mode": given}
    unknown = ", ".join(sorted(map(repr, fields.keys() - {"mode", "rounding", "outliers"})))
    if unknown:
        raise InvalidArgument(
            f"options['integer_backward'] must hold 'mode', 'rounding' and 'outliers' only: got {unknown}."
        )
    mode, rounding = fields.get("mode", True), fields.get("rounding", "stochastic")
    if not (isinstance(mode, bool) or mode == "auto"):
        where = "options['integer_backward']" + ("['mode']" if isinstance(given, Mapping) else "")
        raise InvalidArgument(f"{where} must be True, False or 'auto': got {mode!r}.")
    if rounding not in ("stochastic", "nearest"):
        raise InvalidArgument(
            f"options['integer_backward']['rounding'] must be 'stochastic' or 'nearest': got {rounding!r}."
        )
    outliers = fields.get("outliers", 0.0)
    if isinstance(outliers, bool) or not isinstance(outliers, (int, float)) or not 0 <= outliers <= MOST_OUTLIERS:
        raise InvalidArgument(
            f"options['integer_backward']['outliers'] must be a share from 0 to {MOST_OUTLIERS}: got {outliers!r}."
        )
    return IntegerBackward(mode=mode, rounding=rounding, outliers=float(outliers))
