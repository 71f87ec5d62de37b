"""A zoo of timm's and torchvision's models for `bench_zoo.py`: forty classifiers of different families, and more.

    python bench/bench_zoo.py bench/models.py --targets onnxruntime --steps 2 --brief --out bench/results/models.jsonl

Each is built by its own library with random weights and its own blocks, fewer of them where the constructor takes a
depth, and small images: the graph's kinds of operators count here, not its length. Of detectors, whose forward branches
on what was found, the part that can be compiled whole: backbone, pyramid and heads (`Dense`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

BATCH = 4
CLASSES = 10


def loss_of(output: Any) -> Tensor:
    """Mean square distance of every output from 1: a gradient into each of them."""
    return torch.stack([(leaf - 1).square().mean() for leaf in tree_leaves(output) if leaf.is_floating_point()]).sum()


@dataclass(frozen=True)
class Entry:
    """One model; ``size`` is the height and width of its images."""

    make: Callable[[], nn.Module]
    size: int = 64
    more_inputs: Callable[[], list[Any]] = field(default=list)
    loss: Callable[[Any], Tensor] = loss_of

    def build(self) -> nn.Module:
        """The model in training mode, with the same random weights each time."""
        torch.manual_seed(0)
        return settled(self.make().train(), self.inputs()[0])

    def inputs(self) -> tuple[tuple[Tensor], dict[str, Any]]:
        """A batch of random images."""
        images = torch.randn(BATCH, 3, self.size, self.size, generator=torch.Generator().manual_seed(1))
        return (images,), {}


def settled(model: nn.Module, args: tuple[Tensor]) -> nn.Module:
    """The model with the statistics of its inputs in every BatchNorm, as after training, and scales of layers near 1.

    Without, the evaluated output of a deep net at its initialization hardly depends on its input, and a branch that
    starts at 1e-6 times itself never reaches a code.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1 and 0 < parameter.abs().max() < 1e-2:
                parameter.fill_(0.5)
        if norms:
            model(*args)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model


def timm_model(name: str, size: int = 64, fused: bool = False, **changes: Any) -> Entry:
    """A model of timm; ``fused``: its branches merged, as for deployment."""

    def make() -> nn.Module:
        import timm
        from timm.utils.model import reparameterize_model

        model = timm.create_model(name, pretrained=False, num_classes=CLASSES, **changes)
        return reparameterize_model(model) if fused else model

    return Entry(make, size)


def torchvision_model(name: str, size: int = 64, **changes: Any) -> Entry:
    """A classifier or a segmentation net of torchvision."""

    def make() -> nn.Module:
        import torchvision

        return torchvision.models.get_model(name, weights=None, num_classes=CLASSES, **changes)

    return Entry(make, size)


def torchvision_class(name: str, size: int = 64, **arguments: Any) -> Entry:
    """A transformer of torchvision by its class: its functions have no depth to choose."""

    def make() -> nn.Module:
        import torchvision

        return getattr(torchvision.models, name)(num_classes=CLASSES, **arguments)

    return Entry(make, size)


class Dense(nn.Module):
    """What of a torchvision detector depends on no value: backbone, then the heads on every level of it."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.backbone = detector.backbone
        self.head = detector.rpn.head if hasattr(detector, "rpn") else detector.head

    def forward(self, x: Tensor) -> Any:
        return self.head(list(self.backbone(x).values()))


def detector(name: str, size: int) -> Entry:
    """The dense part of a torchvision detector."""

    def make() -> nn.Module:
        import torchvision

        build = getattr(torchvision.models.detection, name)
        return Dense(build(weights=None, weights_backbone=None, num_classes=CLASSES))

    return Entry(make, size)


SHALLOW: dict[str, Any] = {"layers": (1, 1, 1, 1)}
STAGES: dict[str, Any] = {"depths": (1, 1, 2, 1)}
MODELS: dict[str, Entry] = {
    "resnet18": timm_model("resnet18"),
    "resnet50": timm_model("resnet50", **SHALLOW),
    "resnext50": timm_model("resnext50_32x4d", **SHALLOW),
    "wide_resnet50": timm_model("wide_resnet50_2", **SHALLOW),
    "seresnet50": timm_model("seresnet50", **SHALLOW),
    "res2net50": timm_model("res2net50_26w_4s", **SHALLOW),
    "resnetv2": timm_model("resnetv2_50", **SHALLOW),
    "regnety": timm_model("regnety_002"),
    "densenet": timm_model("densenet121", block_config=(2, 2, 2, 2)),
    "googlenet": torchvision_model("googlenet", aux_logits=True, init_weights=False),
    "inception_v3": timm_model("inception_v3", size=80),
    "mobilenetv2": timm_model("mobilenetv2_050"),
    "mobilenetv3": timm_model("mobilenetv3_small_050"),
    "mobilenetv4": timm_model("mobilenetv4_conv_small_050"),
    "efficientnet_b0": timm_model("efficientnet_b0"),
    "efficientnetv2": timm_model("tf_efficientnetv2_b0"),
    "mnasnet": timm_model("mnasnet_small"),
    "shufflenet": torchvision_model("shufflenet_v2_x0_5"),
    "squeezenet": torchvision_model("squeezenet1_1"),
    "vgg11_bn": timm_model("vgg11_bn", mlp_ratio=0.0625),
    "ghostnet": timm_model("ghostnet_050"),
    "repvgg": timm_model("repvgg_a0"),
    "repvgg_fused": timm_model("repvgg_a0", fused=True),
    "hrnet": timm_model("hrnet_w18_small"),
    "nfnet": timm_model("nf_resnet26"),
    "convnext": timm_model("convnext_atto", **STAGES),
    "convnextv2": timm_model("convnextv2_atto", **STAGES),
    "vit": timm_model("vit_tiny_patch16_224", img_size=64, depth=2),
    "deit": timm_model("deit_tiny_distilled_patch16_224", img_size=64, depth=2),
    "swin": timm_model("swin_tiny_patch4_window7_224", img_size=64, window_size=4, depths=(2, 2), num_heads=(3, 6)),
    "swinv2": timm_model("swinv2_tiny_window8_256", img_size=64, window_size=4, depths=(2, 2), num_heads=(3, 6)),
    "maxvit": timm_model("maxvit_pico_rw_256", img_size=64, depths=(1, 1, 1, 1)),
    "coatnet": timm_model("coatnet_pico_rw_224", img_size=64, depths=(1, 1, 1, 1)),
    "mixer": timm_model("mixer_s32_224", img_size=64),
    "resmlp": timm_model("resmlp_12_224", img_size=64),
    "poolformer": timm_model("poolformer_s12"),
    "levit": timm_model("levit_128s", img_size=64),
    "xcit": timm_model("xcit_nano_12_p16_224", img_size=64, depth=2),
    "cait": timm_model("cait_xxs24_224", img_size=64, depth=2),
    "pit": timm_model("pit_ti_224", img_size=64, depth=(1, 1, 1)),
    "edgenext": timm_model("edgenext_xx_small", depths=(1, 1, 2, 1)),
    "fastvit": timm_model("fastvit_t8", layers=(1, 1, 1, 1)),
    "fastvit_fused": timm_model("fastvit_t8", layers=(1, 1, 1, 1), fused=True),
    "mobilevit": timm_model("mobilevit_xxs"),
    "beit": timm_model("beit_base_patch16_224", img_size=64, depth=2, embed_dim=96, num_heads=3),
    "eva02": timm_model("eva02_tiny_patch14_224", size=56, img_size=56, depth=2),
    "pvt_v2": timm_model("pvt_v2_b0"),
    "efficientformer": timm_model("efficientformer_l1", size=224, depths=(1, 1, 1, 2)),
    "tv_vit": torchvision_class(
        "VisionTransformer", image_size=64, patch_size=16, num_layers=2, num_heads=3, hidden_dim=96, mlp_dim=192
    ),
    "tv_swin": torchvision_class(
        "SwinTransformer", patch_size=[4, 4], embed_dim=96, depths=[2, 2], num_heads=[3, 6], window_size=[7, 7]
    ),
    "fcn": torchvision_model("fcn_resnet50", weights_backbone=None, aux_loss=True),
    "deeplabv3": torchvision_model("deeplabv3_mobilenet_v3_large", weights_backbone=None),
    "lraspp": torchvision_model("lraspp_mobilenet_v3_large", weights_backbone=None),
    "ssdlite": detector("ssdlite320_mobilenet_v3_large", 128),
    "fasterrcnn": detector("fasterrcnn_mobilenet_v3_large_fpn", 64),
    "retinanet": detector("retinanet_resnet50_fpn", 64),
}


def names() -> list[str]:
    """Names of all entries."""
    return list(MODELS)


def get(name: str) -> Entry:
    """The entry of that name."""
    return MODELS[name]
