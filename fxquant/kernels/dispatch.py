"""The one place that decides what an eager op on CUDA tensors runs on: our kernels, or aten.

Compiled graphs never come here: Inductor writes Triton from the decompositions. `fxquant.ops.library` registers
`take` under the CUDA dispatch key for the ops in `ENTRIES`, which are ``KERNELS`` of `fxquant.ops.lowering_table`;
what it decides, and why, is `status`.

    using("aten")                      → aten
    no kernel can be built             → aten, warned about once; KernelUnavailable under using("cuda")
    a call that no kernel serves       → aten, logged once at debug level, listed in ``status().declined``
    else                               → the kernel
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fxquant.errors import InvalidArgument, KernelUnavailable
from fxquant.kernels.driver import CudaLauncher
from fxquant.kernels.entries import ENTRIES
from fxquant.kernels.launch import Launcher, NotServed

PATHS = ("auto", "cuda", "aten")
_log = logging.getLogger("fxquant.kernels")


@dataclass(frozen=True, kw_only=True)
class KernelStatus:
    """What eager ops on CUDA tensors take, "cuda" (our kernels) or "aten", and why.

    ``declined``: calls that aten took although the path is "cuda", each with its reason.
    """

    path: str
    reason: str
    declined: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"eager ops on CUDA tensors take {self.path}: {self.reason}"]
        return "\n".join([*lines, *(f"  but aten for {one}" for one in self.declined)])


class _State:
    """Of the process, not of a thread: backward runs in threads of autograd's."""

    def __init__(self) -> None:
        self.asked = "auto"
        self.launcher: CudaLauncher = CudaLauncher()
        self.failure: KernelUnavailable | None = None
        self.declined: dict[str, None] = {}


_state = _State()


@contextlib.contextmanager
def using(path: str) -> Iterator[None]:
    """Chooses what eager ops on CUDA tensors take within, in every thread.

    Args:
        path: "auto", our kernels where they can be built, the default; "cuda", our kernels or an error; "aten".

    Raises:
        InvalidArgument: another path.
        KernelUnavailable: "cuda" where no kernel can be built, with the reason.
    """
    if path not in PATHS:
        raise InvalidArgument(f'`path` must be one of {PATHS}: got {path!r}. Take "auto".')
    if path == "cuda":
        _require_kernels()
    before, _state.asked = _state.asked, path
    try:
        yield
    finally:
        _state.asked = before


def _require_kernels() -> None:
    if not torch.cuda.is_available():
        raise KernelUnavailable(f'`path` must be "auto" or "aten" here: got \'cuda\', but {_no_device()}.')
    _state.launcher.prepare("affine", "f32", torch.device("cuda", torch.cuda.current_device()))


def _no_device() -> str:
    built = "torch is built without CUDA" if torch.version.cuda is None else "torch sees no CUDA device"
    return f"{built} (torch {torch.__version__})"


def status(*, build: bool = True) -> KernelStatus:
    """What eager ops on CUDA tensors take now, and why.

    ``build``: whether kernels may be compiled to find out (seconds, once per machine); else what is known so far.
    """
    declined = tuple(_state.declined)
    if _state.asked == "aten":
        return KernelStatus(path="aten", reason='asked for by using("aten")', declined=declined)
    if not torch.cuda.is_available():
        return KernelStatus(path="aten", reason=_no_device(), declined=declined)
    if build and _state.failure is None:
        try:
            _require_kernels()
        except KernelUnavailable as error:
            _failed(error)
    if _state.failure is not None:
        return KernelStatus(path="aten", reason=str(_state.failure), declined=declined)
    by = ", ".join(f"{name} for {architecture}" for architecture, name in _state.launcher.built.items())
    reason = f"compiled by {by}" if by else "compiled at first use"
    return KernelStatus(path="cuda", reason=reason, declined=declined)


def launcher() -> Launcher:
    """What launches on CUDA, to call `fxquant.kernels.affine` and `fxquant.kernels.floating` without an operator.

    Raises KernelUnavailable where no kernel can be built.
    """
    _require_kernels()
    return _state.launcher


def asked_for() -> bool:
    """Whether a path was chosen by `using`."""
    return _state.asked != "auto"


def _failed(error: KernelUnavailable) -> None:
    """One warning a process; the calls that follow, of any family, take aten at once."""
    if _state.failure is None:
        _state.failure = error
        _log.warning("eager ops on CUDA tensors take aten: %s", error)


def take(name: str, aten: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """One call of op ``name`` on CUDA tensors: the kernel's result, else that of ``aten``."""
    if _state.asked == "aten" or (_state.failure is not None and _state.asked == "auto"):
        return aten(*args, **kwargs)
    try:
        return ENTRIES[name](_state.launcher, *args, **kwargs)
    except NotServed as reason:
        text = f"{name}: {reason}"
        if text not in _state.declined:
            _state.declined[text] = None
            _log.debug("aten computes %s", text)
    except KernelUnavailable as error:
        if _state.asked == "cuda":
            raise
        _failed(error)
    return aten(*args, **kwargs)
