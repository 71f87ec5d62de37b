"""Other ways to quantization-aware training, each a function ``(float net, batch) → module that trains quantized``.

All get what fxquant's "int8" means where they can say it: 8-bit weights per channel, 8-bit activations per tensor
with a tracked range, in training mode. Packages are imported when asked for; `nets.Unavailable` says what is missing
and how to install it. Versions tried: torch 2.13, torchao 0.18, nvidia-modelopt 0.47, brevitas 0.13; all run on CPU.
torch's FusedMovingAvgObsFakeQuantize, which torchao's PT2E uses too, refuses bf16: no rows under autocast there.
Each has its own requirements, so each gets its own environment, with fxquant in it to be timed side by side:

    python -m venv /tmp/peer && /tmp/peer/bin/pip install torch==2.13.0 nvidia-modelopt huggingface_hub requests -e .
    /tmp/peer/bin/python bench/bench_step.py --variants fxquant,modelopt
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from nets import Unavailable
from torch import Tensor, nn

Peer = Callable[[nn.Module, Tensor], nn.Module]


def required(module: str, package: str) -> ModuleType:
    """The module, or Unavailable with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Unavailable(f"needs {module} (pip install {package}): {error}") from error


def torch_fake_quantize(model: nn.Module, x: Tensor) -> nn.Module:
    """torch's own FusedMovingAvgObsFakeQuantize modules, at the places that fxquant's int8 recipe chooses.

    The exported training graph of the net, with a module call in place of each of our fake-quant nodes. BatchNorm
    stays behind its convolution, unfolded: less work than ours.
    """
    from fxquant.capture.exported import exported_graph
    from fxquant.graph.edit import drop_dead_nodes
    from fxquant.ops import fake_quantize
    from fxquant.passes.base import run_all
    from fxquant.passes.captured.insert_fake_quantize import InsertFakeQuantize
    from fxquant.passes.pipelines import normalizing_passes
    from fxquant.spec.recipes import INT8
    from fxquant.targets.profiles import get_profile

    gm = exported_graph(model, (x,), {}, None)
    insert = InsertFakeQuantize(recipe=INT8, profile=get_profile("onnxruntime"), stateless=True)
    run_all((*normalizing_passes(), insert), gm)
    sites = [node for node in gm.graph.nodes if node.target in fake_quantize.FAKE_QUANTIZE]
    for number, node in enumerate(sites):
        name = f"fake_quantize{number}"
        gm.add_submodule(name, _torch_module(node.meta["site"].spec))
        with gm.graph.inserting_before(node):
            node.replace_all_uses_with(gm.graph.call_module(name, (node.args[0],)))
        gm.graph.erase_node(node)
    drop_dead_nodes(gm.graph)
    gm.recompile()
    return gm


def _torch_module(spec: Any) -> nn.Module:
    from torch.ao import quantization as ao

    per_tensor = spec.axis is None
    schemes = {(True, True): torch.per_tensor_symmetric, (True, False): torch.per_tensor_affine}
    return ao.FusedMovingAvgObsFakeQuantize(
        observer=ao.MovingAverageMinMaxObserver if per_tensor else ao.MovingAveragePerChannelMinMaxObserver,
        quant_min=spec.quant_min,
        quant_max=spec.quant_max,
        dtype=torch.qint8 if spec.signed else torch.quint8,
        qscheme=schemes.get((per_tensor, spec.symmetric), torch.per_channel_symmetric),
        **({} if per_tensor else {"ch_axis": spec.axis}),
    )


def torchao_pt2e(model: nn.Module, x: Tensor) -> nn.Module:
    """torchao's PT2E QAT with the X86Inductor quantizer's default QAT configuration: convolutions and linears."""
    pt2e = required("torchao.quantization.pt2e.quantize_pt2e", "torchao")
    x86 = required("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer", "torchao")
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config(is_qat=True))
    exported = torch.export.export(model, (x,)).module(check_guards=False)
    return pt2e.prepare_qat_pt2e(exported, quantizer)


def torchao_linear(model: nn.Module, x: Tensor) -> nn.Module:
    """torchao's QATConfig: linears only, weights per channel, activations per token with the range of the moment."""
    ao = required("torchao.quantization", "torchao")
    qat = required("torchao.quantization.qat", "torchao")
    kinds = [type(module) for module in model.modules()]
    if kinds.count(nn.Conv2d) > kinds.count(nn.Linear):
        raise Unavailable("QATConfig quantizes nn.Linear only, and this net is made of convolutions")
    activation = qat.IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
    weight = qat.IntxFakeQuantizeConfig(torch.int8, "per_channel")
    ao.quantize_(model, qat.QATConfig(activation_config=activation, weight_config=weight, step="prepare"))
    return model


def torchao_int8_training(model: nn.Module, x: Tensor) -> nn.Module:
    """torchao's int8 mixed-precision training: no QAT, but all three products of each linear layer of int8 codes."""
    ao = required("torchao.quantization", "torchao")
    training = required("torchao.prototype.quantized_training", "torchao")
    if not any(isinstance(module, nn.Linear) for module in model.modules()):
        raise Unavailable("it multiplies in nn.Linear only, and this net has none")
    ao.quantize_(model, training.int8_mixed_precision_training())
    return model


def modelopt(model: nn.Module, x: Tensor) -> nn.Module:
    """NVIDIA ModelOpt's INT8_DEFAULT_CFG, calibrated on the batch; ranges stay as calibrated while it trains."""
    mtq = required("modelopt.torch.quantization", "nvidia-modelopt huggingface_hub requests")
    return mtq.quantize(model, mtq.INT8_DEFAULT_CFG, forward_loop=lambda m: m(x))


def brevitas(model: nn.Module, x: Tensor) -> nn.Module:
    """Brevitas' layers in place of convolutions and linears: weights per channel, inputs with a learned scale."""
    qnn = required("brevitas.nn", "brevitas")
    quant = required("brevitas.quant", "brevitas")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = required("brevitas.graph.quantize", "brevitas")
    formats = {"weight_quant": quant.Int8WeightPerChannelFloat, "input_quant": quant.Int8ActPerTensorFloat}
    layers = {nn.Conv2d: (qnn.QuantConv2d, formats), nn.Linear: (qnn.QuantLinear, formats)}
    return graph.layerwise_quantize(model, compute_layer_map=layers)


PEERS: dict[str, Peer] = {
    "torch FakeQuantize": torch_fake_quantize,
    "torchao pt2e": torchao_pt2e,
    "torchao linear": torchao_linear,
    "torchao int8 training": torchao_int8_training,
    "modelopt": modelopt,
    "brevitas": brevitas,
}
