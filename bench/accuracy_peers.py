"""Brevitas, ModelOpt and torchao in the accuracy bench: a float net in, its quantized twin out, by our format's name.

Each takes its own defaults for what our recipe's name leaves open; what it has not raises `nets.Unavailable`.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from nets import Unavailable
from peers import required
from torch import Tensor, nn

Peer = Callable[[nn.Module, list[Tensor], str], nn.Module]

INTEGERS = {"int8": (8, 8), "w4a8": (4, 8), "w4a4": (4, 4), "w2a8": (2, 8)}
"""Bits of weights and activations."""


def brevitas(model: nn.Module, batches: list[Tensor], format: str) -> nn.Module:
    """Its layers for convolutions and linears: weights per channel of the current maximum, inputs with a learned scale.

    Integers of inputs have a zero point, as ours. Calibrated by its own ``calibration_mode``.
    """
    qnn = required("brevitas.nn", "brevitas")
    quant = required("brevitas.quant", "brevitas")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = required("brevitas.graph.quantize", "brevitas")
        calibrate = required("brevitas.graph.calibrate", "brevitas")
    if format in INTEGERS:
        bits = dict(zip(("weight_bit_width", "input_bit_width"), INTEGERS[format], strict=True))
        kinds = {
            "weight_quant": quant.Int8WeightPerChannelFloat,
            "input_quant": quant.ShiftedUint8ActPerTensorFloat,
            **bits,
        }
    elif format == "fp8":
        kinds = {
            "weight_quant": quant.Fp8e4m3OCPWeightPerChannelFloat,
            "input_quant": quant.Fp8e4m3OCPActPerTensorFloat,
        }
    else:
        raise Unavailable("Brevitas names no quantizers of this format")
    model = graph.layerwise_quantize(
        model, compute_layer_map={nn.Conv2d: (qnn.QuantConv2d, kinds), nn.Linear: (qnn.QuantLinear, kinds)}
    )
    model.eval()
    with torch.no_grad(), calibrate.calibration_mode(model):
        for x in batches:
            model(x)
    return model


def modelopt(model: nn.Module, batches: list[Tensor], format: str) -> nn.Module:
    """Its default configuration of the format, or of int8 with other widths; ranges stay as calibrated."""
    mtq = required("modelopt.torch.quantization", "nvidia-modelopt huggingface_hub requests")
    named = {"fp8": "FP8_DEFAULT_CFG", "mxfp4": "MXFP4_DEFAULT_CFG", "nvfp4": "NVFP4_DEFAULT_CFG"}
    config = copy.deepcopy(getattr(mtq, named.get(format, "INT8_DEFAULT_CFG")))
    if format in INTEGERS:
        widths = dict(zip(("*weight_quantizer", "*input_quantizer"), INTEGERS[format], strict=True))
        for rule in config["quant_cfg"]:
            if rule["quantizer_name"] in widths:
                rule["cfg"]["num_bits"] = widths[rule["quantizer_name"]]
    elif format != "fp8":  # blocks run along the last axis, which is not what a convolution sums over
        config["quant_cfg"].append({"quantizer_name": "*", "parent_class": "nn.Conv2d", "enable": False})
    model.eval()

    def run(quantized: nn.Module) -> None:
        with torch.no_grad():
            for x in batches:
                quantized(x)

    return mtq.quantize(model, config, forward_loop=run)


def torchao(model: nn.Module, batches: list[Tensor], format: str) -> nn.Module:
    """QATConfig on ``nn.Linear``: weights per channel, activations per token with the range of the moment."""
    ao = required("torchao.quantization", "torchao")
    qat = required("torchao.quantization.qat", "torchao")
    kinds = [type(module) for module in model.modules()]
    if kinds.count(nn.Conv2d) > kinds.count(nn.Linear):
        raise Unavailable("QATConfig quantizes nn.Linear only, and this net is made of convolutions")
    activation: Any
    if format in INTEGERS:
        weight, activation = (getattr(torch, f"int{bits}") for bits in INTEGERS[format])
        activation = qat.IntxFakeQuantizeConfig(activation, "per_token", is_symmetric=False)
        weight = qat.IntxFakeQuantizeConfig(weight, "per_channel")
    elif format == "fp8":
        activation = weight = qat.Float8FakeQuantizeConfig()
    else:
        prototype = required("torchao.prototype.qat", "torchao")
        kind = prototype.NVFP4FakeQuantizeConfig if format == "nvfp4" else prototype.MXFakeQuantizeConfig
        activation = weight = kind()
    ao.quantize_(model, qat.QATConfig(activation_config=activation, weight_config=weight, step="prepare"))
    return model


PEERS: dict[str, Peer] = {"brevitas": brevitas, "modelopt": modelopt, "torchao": torchao}
