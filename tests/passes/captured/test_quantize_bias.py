"""QuantizeBias: the bias that onnxruntime's integer convolution adds, in training, evaluation and the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from expecttest import assert_expected_inline
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F

import fxquant
from fxquant.ops import fake_quantize_bias
from fxquant.passes.captured.fold_batch_norm import FoldBatchNorm
from fxquant.passes.captured.quantize_bias import QuantizeBias
from fxquant.targets.profiles import ONNXRUNTIME, OPENVINO, Profile
from fxquant.targets.session import EXACT_SUMS, run_outputs
from tests.onnx.models import calibrated
from tests.passes.graphs import QUANTIZE, apply, captured, show, untouched

PASS = QuantizeBias(profile=ONNXRUNTIME)
IMAGE = torch.randn(2, 3, 8, 8)


def test_the_units_are_those_of_the_sum() -> None:
    bias, weight_scale = torch.tensor([1.0, -0.3, 1e-9, 0.0]), torch.tensor([0.01, 0.02, 0.03, 0.04])
    found = fake_quantize_bias(bias, torch.tensor([0.1]), weight_scale)
    unit = (np.float32(0.1) * weight_scale.numpy()).astype(np.float32)
    np.testing.assert_array_equal(found.numpy(), np.rint(bias.numpy() / unit) * unit)


def test_a_bias_beyond_32_bits_stays() -> None:
    bias = torch.tensor([1.0, -1.0, float("inf"), 2.0], requires_grad=True)
    scale = torch.tensor([1e-20, 1e-12, 1.0, 0.3])
    found = fake_quantize_bias(bias, torch.tensor([0.01]), scale)
    assert found[:3].tolist() == [1.0, -1.0, float("inf")] and found[3] != 2.0
    found[3].backward()
    assert bias.grad is not None and bias.grad.tolist() == [0, 0, 0, 1]  # straight through


def test_convolutions_between_quantized_operands() -> None:
    layer = nn.Conv2d(3, 4, 3)
    gm = captured(lambda x: layer(F.max_pool2d(x, 2)), IMAGE, passes=QUANTIZE)
    assert apply(PASS, gm).rewrites == 1
    lines = [line for line in show(gm).splitlines() if "bias" in line or line.startswith("conv")]
    assert_expected_inline(
        "\n".join(lines) + "\n",
        """\
fake_quantize_bias_default = fake_quantize_bias(arg2_1, getitem_2, getitem_4)
conv2d = conv2d(max_pool2d, fake_quantize_per_channel_affine_default, fake_quantize_bias_default)
""",
    )


def test_a_folded_batch_norm_is_a_bias() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)).eval()
    gm = captured(model, IMAGE, passes=(*QUANTIZE, FoldBatchNorm()))
    assert apply(PASS, gm).rewrites == 1


@pytest.mark.parametrize(
    ("model", "profile"),
    [
        (nn.Conv2d(3, 4, 3), OPENVINO),
        (nn.Conv2d(3, 4, 3, bias=False), ONNXRUNTIME),
        (nn.Linear(8, 4), ONNXRUNTIME),
        (nn.ConvTranspose2d(3, 4, 3), ONNXRUNTIME),
    ],
    ids=["float-bias-target", "no-bias", "linear", "float-convolution"],
)
def test_others_keep_theirs(model: nn.Module, profile: Profile) -> None:
    untouched(QuantizeBias(profile=profile), captured(model, IMAGE, passes=QUANTIZE))


class Deep(nn.Module):
    """Four convolutions, of which one has a BatchNorm and one a residual."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convs = nn.ModuleList(nn.Conv2d(3 if i == 0 else 8, 8, 3, padding=1) for i in range(4))
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.convs[0](x))
        x = F.relu(self.norm(self.convs[1](x)))
        return self.convs[3](F.relu(self.convs[2](x)))


def test_the_optimized_file_computes_training_s_codes(tmp_path: Path) -> None:
    model, x = calibrated(Deep(), torch.randn(8, 3, 16, 16)), torch.randn(8, 3, 16, 16)
    path = tmp_path / "m.onnx"
    fxquant.export_onnx(model, (x,), path)
    file = onnx.load(path)
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in file.graph.initializer}
    biases = [name for name in held if name.endswith("bias__codes")]
    assert len(biases) == 4 and all(held[name].dtype == np.int32 for name in biases)
    report = fxquant.verify_onnx(model, (x,), path, rounds=0)
    assert [row.kernel for row in report.rows] == ["QLinearConv"] * 4
    feeds = {file.graph.input[0].name: x.numpy()}
    (optimized,) = run_outputs(path, feeds, optimize=True, config=EXACT_SUMS)
    (plain,) = run_outputs(path, feeds, optimize=False)
    # Every output is a code: an integer kernel gives another only where a float sum was within a last bit of the
    # border. With float biases, which onnxruntime rounds by itself, 193 of 10,000 differed.
    differing = np.abs(optimized - plain) > 1e-6
    assert differing.size == 16_384 and differing.mean() < 5e-4
