"""Which inputs of a compiled graph stay at their address: what CUDA graphs need to know, held without CUDA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._guards import TracingContext
from torch._inductor.compile_fx import compile_fx_inner

from fxquant.backend.inductor.compile import compile_quantized
from fxquant.backend.quantize import quantize_graph
from fxquant.capture.dynamo import capture
from tests.nets import ConvNet, Mlp, prepared, step

pytestmark = pytest.mark.usefixtures("cold")


class WithConstants(nn.Module):
    """Numbers that Dynamo's graph makes on the way; the captured graph holds them as attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = Mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x) * torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8]) + x.new_tensor([2.0])


NETS: dict[str, tuple[type[nn.Module], tuple[int, ...], int]] = {
    "mlp": (Mlp, (4, 8), 0),
    "convnet": (ConvNet, (2, 3, 8, 8), 0),
    "constants": (WithConstants, (4, 8), 2),
}


@pytest.mark.parametrize("net", NETS)
def test_parameters_buffers_and_ranges_stay_and_the_batch_does_not(net: str) -> None:
    make, shape, constants = NETS[net]
    x = torch.randn(shape)
    model = prepared(make(), x)
    forward: list[tuple[int, int]] = []

    def inner(gm: fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Any:
        if not kwargs.get("is_backward"):
            context = TracingContext.get()
            assert context.fw_metadata is not None
            assert list(kwargs["static_input_idxs"]) == context.fw_metadata.static_input_indices
            forward.append((len(context.fw_metadata.static_input_indices), len(inputs)))
        return compile_fx_inner(gm, inputs, **kwargs)

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        return compile_quantized(quantize_graph(gm, inputs), inputs, inner_compile=inner)

    with torch._functorch.config.patch(enable_autograd_cache=False):
        out = step(torch.compile(model, backend=backend, fullgraph=True), x)
    ((static, given),) = forward
    own = len(list(model.parameters())) + sum(value.dtype != torch.uint8 for value in model.buffers()) + constants
    assert (static, given) == (own, own + 1), "all but the batch"
    torch._dynamo.reset()
    assert torch.equal(out, step(torch.compile(prepared(model_like(model, make), x), backend="fxquant"), x))


def model_like(model: nn.Module, make: type[nn.Module]) -> nn.Module:
    """A float net with the parameters of ``model``."""
    net = make()
    net.load_state_dict({name: value for name, value in model.state_dict().items() if name in net.state_dict()})
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
    return net


def test_a_graph_that_is_not_dynamo_s_stays_without_sources() -> None:
    seen: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        del gm.meta["dynamo_compile_id"]
        seen.append(capture(gm, inputs))
        return gm

    torch.compile(Mlp(), backend=backend)(torch.randn(2, 8))
    (captured,) = seen
    assert "dynamo_compile_id" not in captured.meta and not hasattr(captured, "_param_name_to_source")


def test_one_tensor_given_twice_is_still_told_apart() -> None:
    """AOTAutograd now has sources to guard by: another pair of tensors must not get the graph of one."""
    model = prepared(TwoInputs(), torch.randn(4, 8), torch.randn(4, 8))
    same, eager = (torch.compile(model, backend=backend) for backend in ("fxquant", "fxquant_eager"))
    a, b = torch.randn(4, 8), torch.randn(4, 8)
    with torch.no_grad():
        model.eval()
        for pair in ((a, a), (a, b), (b, b)):
            torch.testing.assert_close(same(*pair), eager(*pair))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = Mlp()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.mlp(x) + y
