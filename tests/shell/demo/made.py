"""Results, panels and digits as the demo has them, made by hand."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.shell.demo.data import Digits
from fxquant.shell.demo.job import Quantized, Trained
from fxquant.shell.demo.plot import Panel
from fxquant.shell.demo.results import Result

SCHEMA = {
    "net": str,
    "recipe": str,
    "float_acc": float,
    "ptq_acc": float,
    "qat_acc": float,
    "onnx_acc": float,
    "differing_codes": int,
    "compared_codes": int,
    "integer_share": float,
    "latency_ratio": float,
    "cascaded_codes": int,
    "same_class": float,
}


def result(net: str = "cnn", recipe: str = "int8", **changed: Any) -> Result:
    """A row; what is not named has a good run's value."""
    values: dict[str, Any] = {
        "net": net, "recipe": recipe, "float_acc": 0.99, "ptq_acc": 0.97, "qat_acc": 0.985, "onnx_acc": 0.985,
        "differing_codes": 0, "compared_codes": 123456, "integer_share": 1.0, "latency_ratio": 0.5,
        "cascaded_codes": 3, "same_class": 1.0,
    }  # fmt: skip
    return Result(**{**values, **changed})


def run(sqnr: dict[str, float], recipe: str = "int8", net: str = "cnn") -> Quantized:
    """A run of two epochs that kept its sites so well."""
    return Quantized(result=result(net, recipe), curve=[0.2, 0.1], sqnr=sqnr)


def panel(net: str, recipes: tuple[str, ...] = ("int8", "w4a8"), sites: int = 6) -> Panel:
    """A net of ``sites`` weights and as many activations, and one site more that lost nothing."""
    sqnr = {f"block{i}.conv1.quantizers.weight": 30.0 + i for i in range(sites)}
    sqnr |= {f"block{i}.quantizers.relu": 25.0 + i for i in range(sites)} | {"q.exact": float("inf")}
    return of_runs(*(run(sqnr, recipe, net) for recipe in recipes), net=net)


def of_runs(*runs: Quantized, net: str = "cnn") -> Panel:
    """A net of three epochs in float, and its runs."""
    trained = Trained(net=net, model=nn.Identity(), accuracy=0.99, curve=[2.0, 1.0, 0.5])
    return Panel(trained=trained, runs=runs)


def few_digits(train_y: Tensor, test_y: Tensor) -> Digits:
    """Images all of whose pixels are their label, and as many of each kind as there are labels."""
    images = [y.float().reshape(-1, 1, 1, 1).expand(-1, 1, 8, 8).contiguous() for y in (train_y, test_y)]
    count = len(train_y)
    return Digits(
        train_x=images[0], train_y=train_y, test_x=images[1], test_y=test_y,
        train_index=torch.arange(count), test_index=torch.arange(count, count + len(test_y)),
    )  # fmt: skip


class Reader(nn.Module):
    """Reads a digit off a pixel, each logit shifted by ``off``: those of `few_digits` are read right."""

    def __init__(self) -> None:
        super().__init__()
        self.off = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return F.one_hot(x[:, 0, 4, 4].round().long().clamp(0, 9), 10) + self.off
