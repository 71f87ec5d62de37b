"""Inductor's Triton kernels for our operators: written, compiled to PTX, and run without a GPU.

On a machine without one, tensors are fake and Inductor and Triton are told the properties of an H100; Inductor stops
where it would load what it wrote. On a machine with one, nothing is pretended.
"""

from __future__ import annotations

import contextlib
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves, tree_map

from fxquant.backend.inductor.compile import _with_passes, compile_quantized
from fxquant.backend.inductor.gpu import exact_passes, exact_settings
from fxquant.backend.reports import Log as _Log

HAS_GPU = torch.cuda.is_available()
CAPABILITY = torch.cuda.get_device_capability() if HAS_GPU else (9, 0)

_H100 = types.SimpleNamespace(
    name="NVIDIA H100",
    major=9,
    minor=0,
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    total_memory=80 * 2**30,
    shared_memory_per_block_optin=232448,
    gcnArchName="",
)
_ANSWERS: dict[str, Any] = {
    "is_available": True,
    "device_count": 1,
    "current_device": 0,
    "get_device_properties": _H100,
    "get_device_capability": (9, 0),
    "is_bf16_supported": True,
    "get_rng_state": torch.zeros(16, dtype=torch.uint8),
    "set_rng_state": None,
    "synchronize": None,
    "_exchange_device": 0,
    "_maybe_exchange_device": 0,
}


class _Stopped(BaseException):
    """Raised where Inductor would load what it wrote; no Exception, which Inductor wraps in its own."""


@dataclass(frozen=True)
class Kernel:
    """One generated kernel: its name and its Python file, decorators included."""

    name: str
    source: str


@contextlib.contextmanager
def pretended_gpu() -> Iterator[None]:
    """An H100 as far as Inductor and Triton ask; nothing where there is a GPU."""
    if HAS_GPU:
        yield
        return
    from torch._inductor.fx_passes import joint_graph, post_grad
    from torch._inductor.runtime import triton_helpers
    from torch._inductor.runtime.hints import DeviceProperties
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    # What was answered without a GPU, by any compile before, would be believed here; and the other way round after.
    kept = [answer for answer in vars(torch.utils._triton).values() if hasattr(answer, "cache_clear")]
    properties = DeviceProperties("cuda", 0, 132, 90, 9, 65536, 2048, 1024, 32)
    target = GPUTarget("cuda", 90, 32)
    with contextlib.ExitStack() as stack:
        for answer in kept:
            answer.cache_clear()
            stack.callback(answer.cache_clear)
        for name, answer in _ANSWERS.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, lambda *_, _answer=answer, **__: _answer))
        for module in (joint_graph, post_grad):  # patterns of attention and products are traced on real tensors
            stack.enter_context(mock.patch.object(module, "lazy_init", lambda *_: None))
        stack.enter_context(mock.patch.object(fake_tensor, "init_gpu_context", lambda *_: None))
        stack.enter_context(mock.patch.object(DeviceProperties, "create", lambda device: properties))
        active = types.SimpleNamespace(get_current_target=lambda: target)
        stack.enter_context(mock.patch.object(driver, "_active", active))
        stack.enter_context(mock.patch.object(triton_helpers, "set_driver_to_gpu", lambda: None))
        yield


def _on_cuda(value: Any) -> Any:
    """A device as CUDA, a fake tensor as one there; anything else as it is."""
    if isinstance(value, torch.device):
        return torch.device("cuda", 0)
    if not isinstance(value, Tensor):
        return value
    assert isinstance(value, FakeTensor)
    with value.fake_mode:
        return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device="cuda")


class Recorder:
    """An ``inner_compile`` that moves each graph to CUDA, and keeps what Inductor writes for it."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = dict(settings)
        self.written: list[str] = []

    def __call__(self, graph: fx.GraphModule, inputs: Sequence[Any], **given: Any) -> Callable[..., Any]:
        from torch._inductor import config
        from torch._inductor.compile_fx import compile_fx_inner
        from torch._inductor.graph import GraphLowering

        for node in graph.graph.nodes:
            node.args, node.kwargs = tree_map(_on_cuda, (node.args, node.kwargs))
        graph.recompile()
        with contextlib.ExitStack() as stack:
            stack.enter_context(pretended_gpu())
            stack.enter_context(config.patch({"fx_graph_cache": False, **self.settings}))
            stack.enter_context(
                mock.patch.object(GraphLowering, "compile_to_module", lambda lowering: self._stop(lowering))
            )
            stack.enter_context(contextlib.suppress(_Stopped))
            compile_fx_inner(graph, [_on_cuda(value) for value in inputs], **given)
        return _nothing

    def _stop(self, lowering: Any) -> Any:
        self.written.append(lowering.codegen()[0].value)
        raise _Stopped


def _nothing(*_: Any) -> Any:
    raise AssertionError("generated code is read here, not run")


_nothing._boxed_call = True  # type: ignore[attr-defined]  # it takes one list of inputs, as AOTAutograd may ask for


def exact() -> dict[str, Any]:
    """What backend "fxquant" tells Inductor of a graph on a GPU."""
    return _with_passes(exact_settings({}), _Log(), post_grad_custom_post_pass=exact_passes())


def generated(function: Callable[..., Any], inputs: Sequence[Tensor], settings: Mapping[str, Any]) -> list[str]:
    """What Inductor writes for ``function`` of tensors like ``inputs``, on CUDA: a file for each graph.

    Traced on the CPU, gradients taken inside ``function`` too, which needs no CUDA in torch.
    """

    def flat(*args: Tensor) -> list[Tensor]:
        return [value for value in tree_leaves(function(*args)) if isinstance(value, Tensor)]

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake = [mode.from_tensor(value) for value in inputs]
    with mode:
        graph = make_fx(flat)(*fake)
    recorder = Recorder(settings)
    with torch.no_grad():
        compile_quantized(graph, fake, inner_compile=recorder)
    return recorder.written


def kernels(written: str) -> list[Kernel]:
    """The Triton kernels of a file that Inductor wrote."""
    found = re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)'''", written, re.DOTALL)
    return [Kernel(name, source) for name, source in found]


def ptx(kernel: Kernel, *, version: int | None = None) -> str:
    """The kernel in PTX, compiled as Inductor would with its first configuration."""
    import triton
    from torch._inductor.codecache import PyCodeCache
    from torch._inductor.runtime import triton_heuristics

    compiled: list[Any] = []

    def stop(*args: Any, target: Any, options: Mapping[str, Any]) -> Any:
        compiled.append(compile(*args, target=target, options=dict(options)))
        raise _Stopped

    compile = triton.compile
    with pretended_gpu():
        tuner = getattr(PyCodeCache.load(kernel.source), kernel.name)
        with mock.patch.object(triton_heuristics.triton, "compile", stop), contextlib.suppress(_Stopped):
            tuner._precompile_config(tuner.configs[0])
    return compiled[0].asm["ptx"]
