"""What the step and memory benches compare: name → how to make a net trainable that way.

``plain`` is the float net under torch.compile: the yardstick. A builder gets a float net of its own and the batch,
and returns the module that trains and the function that runs it; it raises Unavailable, with the reason, where this
machine or this version cannot. Builders of fxquant's variants take the backend, so that one can be held to the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from nets import Unavailable
from peers import PEERS
from torch import Tensor, nn

import fxquant
from fxquant.backend.options import Options

Step = Callable[[Tensor], Tensor]
Built = tuple[nn.Module, Step]

DTYPES = {"fp32": None, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to train a net.

    Attributes:
        build: the float net and its batch → the module with the parameters, and the step.
        ours: whether ``build`` takes ``backend``, "fxquant" or "fxquant_eager". A failure of another's is printed and
            its row left out; after one of ours the bench goes on and ends with status 1.
        same_in_doubles: whether a float64 net is compiled to the same graph, so that float64 can speak for float32.
    """

    build: Callable[..., Built]
    ours: bool = False
    same_in_doubles: bool = True


def autocast(step: Step, dtype: str) -> Step:
    """The step under CPU autocast to ``dtype``; its result in float32."""
    low = DTYPES[dtype]
    if low is None:
        return step

    def run(x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, low):
            out = step(x)
        return out.float()

    return run


def _plain(model: nn.Module, x: Tensor) -> Built:
    return model, torch.compile(model)


def _eager(model: nn.Module, x: Tensor) -> Built:
    return model, model


def _fxquant(options: Mapping[str, Any] | None = None, **prepare: Any) -> Variant:
    """`fxquant.prepare` with ``prepare``, and backend="fxquant" with ``options``."""

    def build(model: nn.Module, x: Tensor, backend: str = "fxquant") -> Built:
        prepared = fxquant.prepare(model, (x,), **prepare)
        return prepared, torch.compile(prepared, backend=backend, options=dict(options) if options else None)

    # Integer products are of float32 and halves.
    read = Options.read(options)
    floats = read.integers is False and read.integer_backward.mode is False
    return Variant(build=build, ours=True, same_in_doubles=floats)


def _peer(make: Callable[[nn.Module, Tensor], nn.Module], compiled: bool) -> Variant:
    def build(model: nn.Module, x: Tensor) -> Built:
        quantized = make(model, x)
        return quantized, torch.compile(quantized) if compiled else quantized

    return Variant(build=build)


def _learned(bits: int) -> fxquant.Recipe:
    """Every scale trained (LSQ), of weights per channel."""
    lsq = fxquant.Learned(method="lsq")
    return fxquant.Recipe(
        name=f"lsq w{bits}a{bits}",
        activation=fxquant.QuantSpec(bits=bits, signed=False, symmetric=False, range=lsq),
        weight=fxquant.QuantSpec(bits=bits, narrow=True, axis=0, range=lsq),
    )


def _recipe(name: str) -> Variant:
    """A recipe by its name, for no runtime in particular; Unavailable for a net without an operator that takes it."""
    inner = _fxquant(recipe=name, target="generic")

    def build(model: nn.Module, x: Tensor, backend: str = "fxquant") -> Built:
        try:
            return inner.build(model, x, backend=backend)
        except fxquant.errors.FxquantError as error:
            if "found none to quantize" not in str(error):
                raise
            raise Unavailable(f"no operator of this net takes recipe {name}") from error

    return Variant(build=build, ours=True)


RECIPES = ("w4a8", "w4a4", "w2a8", "int4_weight_only", "fp8", "mxfp8", "mxfp4", "nvfp4")

VARIANTS: dict[str, Variant] = {
    "plain": Variant(build=_plain),
    "plain eager": Variant(build=_eager),
    "fxquant int8": _fxquant(),
    "fxquant floats saved": _fxquant({"save_quantized": False}),
    "fxquant delayed ranges": _fxquant(ranges="delayed"),
    "fxquant lsq w8a8": _fxquant(recipe=_learned(8)),
    "fxquant lsq w4a4": _fxquant(recipe=_learned(4)),
    "fxquant float products": _fxquant({"integer_matmul": False}),
    "fxquant integer matmul": _fxquant({"integer_matmul": True}),
    "fxquant integer auto": _fxquant({"integer_matmul": "auto"}),
    "fxquant integer step": _fxquant({"integer_matmul": "auto", "integer_backward": "auto"}),
    "fxquant integer step, outliers float": _fxquant({"integer_backward": {"mode": "auto", "outliers": 0.01}}),
}
VARIANTS |= {f"fxquant {_name}": _recipe(_name) for _name in RECIPES}
VARIANTS |= {"fxquant per token": _recipe("int8_dynamic"), "fxquant per token w4a4": _recipe("w4a4_dynamic")}
for _name, _make in PEERS.items():
    VARIANTS[f"{_name} eager"] = _peer(_make, compiled=False)
    VARIANTS[_name] = _peer(_make, compiled=True)


def chosen(words: str) -> dict[str, Variant]:
    """The variants whose name holds one of the comma-separated words, all for none; plain is always with them."""
    wanted = [word.strip() for word in words.split(",") if word.strip()]
    unknown = [word for word in wanted if not any(word in name for name in VARIANTS)]
    if unknown:
        raise ValueError(f"--variants must name some of {', '.join(VARIANTS)}: got {', '.join(unknown)}.")
    found = {name: v for name, v in VARIANTS.items() if not wanted or any(word in name for word in wanted)}
    return {"plain": VARIANTS["plain"], **found}
