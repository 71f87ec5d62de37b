"""What Inductor is told of graphs on a GPU, and of no others. No Triton and no GPU needed."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, fx
from torch._inductor import compile_fx as inductor
from torch._subclasses.fake_tensor import FakeTensorMode

from fxquant.backend import reports
from fxquant.backend.inductor.compile import compile_quantized
from fxquant.backend.inductor.gpu import exact_settings, is_on_gpu, overruled
from fxquant.errors import InvalidArgument
from fxquant.ops import plain_inductor
from fxquant.ops.plain_inductor import EXACT, Told
from fxquant.passes.base import Decline
from fxquant.passes.post_grad.keep_divisions import KeepDivisions


def graph_on(*devices: str) -> tuple[fx.GraphModule, list[Tensor]]:
    """A graph that adds its inputs up, one on each device."""
    with FakeTensorMode():
        inputs = [torch.empty(2, device=device) for device in devices]
    graph = fx.Graph()
    total: Any = 0
    for k, value in enumerate(inputs):
        node = graph.placeholder(f"x{k}")
        node.meta["val"] = value
        total = graph.call_function(torch.add, (node, total))
    graph.output((total,))
    return fx.GraphModule(torch.nn.Module(), graph), inputs


def told(
    *devices: str, options: dict[str, Any] | None = None, mode: str | None = None, log: reports.Log | None = None
) -> dict[str, Any]:
    """The settings that reach Inductor."""
    graph, inputs = graph_on(*devices)
    graph.meta[reports.LOG] = log or reports.Log()
    with mock.patch.object(inductor, "compile_fx") as compile:
        compile_quantized(graph, inputs, options=options, mode=mode)
    settings: dict[str, Any] = compile.call_args.kwargs["config_patches"]
    return settings


def test_the_settings_are_inductor_s() -> None:
    from torch._inductor import config

    known = config.get_config_copy()
    assert all(isinstance(known[name], bool) for name in EXACT)


def test_a_gpu_s_graph_has_them() -> None:
    settings = told("cuda")
    assert {name: settings[name] for name in EXACT} == dict(EXACT)
    assert settings["post_grad_custom_post_pass"].passes == (KeepDivisions(),)


def test_one_tensor_there_is_enough() -> None:
    assert EXACT.keys() <= told("cpu", "cuda").keys()


def test_a_tensor_made_inside_is_enough() -> None:
    graph, inputs = graph_on("cpu")
    assert not is_on_gpu(graph, inputs)
    with FakeTensorMode():
        next(iter(graph.graph.nodes)).meta["val"] = torch.empty(2, device="cuda")
    assert is_on_gpu(graph, inputs)


def test_a_cpu_s_graph_has_none() -> None:
    settings = told("cpu")
    assert not EXACT.keys() & settings.keys() and "post_grad_custom_post_pass" not in settings


def test_a_mode_is_kept_beside_them() -> None:
    settings = told("cuda", mode="reduce-overhead")
    assert settings["triton.cudagraphs"] is True and EXACT.keys() <= settings.keys()


OWN: dict[str, Any] = {"inductor": {"emulate_precision_casts": False, "max_autotune": True}}


class TestTheUserSOwn:
    def test_wins_and_is_reported(self) -> None:
        log = reports.Log()
        settings = told("cuda", options=OWN, log=log)
        assert settings["emulate_precision_casts"] is False and settings["max_autotune"] is True
        assert settings["eager_numerics.division_rounding"] is True
        (decline,) = log.report.declines
        assert str(decline) == (
            "fxquant declined graph: options['inductor'] sets emulate_precision_casts=False: on this GPU codes may "
            "differ from eager's"
        )

    def test_says_nothing_on_a_cpu(self) -> None:
        log = reports.Log()
        told("cpu", options=OWN, log=log)
        assert log.report.declines == ()

    def test_passes_come_first(self) -> None:
        def theirs(graph: fx.Graph) -> None:
            """Does nothing."""

        settings = told("cuda", options={"inductor": {"post_grad_custom_post_pass": theirs}})
        assert settings["post_grad_custom_post_pass"].before == (theirs,)

    def test_must_still_be_known(self) -> None:
        with pytest.raises(InvalidArgument, match="'eager_numerics'"):
            told("cuda", options={"inductor": {"eager_numerics": True}})

    def test_the_same_value_is_no_difference(self) -> None:
        assert overruled(dict(EXACT)) == () and exact_settings(EXACT) == {}

    def test_every_setting_is_reported(self) -> None:
        found = overruled(dict.fromkeys(EXACT, False))
        assert len(found) == len(EXACT) and all(isinstance(each, Decline) for each in found)


class TestPlainInductor:
    """It has the operators' arithmetic, but no settings of ours."""

    def seen(self, *devices: str) -> list[str]:
        warnings: list[str] = []
        with FakeTensorMode():
            inputs: Sequence[Tensor] = [torch.empty(2, device=device) for device in devices]
            total = Told(lambda *tensors: tensors[0], warnings.append)(*inputs)
        assert total is inputs[0]
        return warnings

    def test_is_warned_of_on_a_gpu(self) -> None:
        assert self.seen("cuda") == [
            "operators of fxquant must be compiled by backend='fxquant' to give eager's codes on a GPU: got another, "
            "without eager_numerics.division_rounding and eager_numerics.disable_ftz and emulate_precision_casts in "
            "torch._inductor.config. Set them, or use backend='fxquant' with options={'recipe': None}."
        ]

    def test_is_not_with_the_settings(self) -> None:
        with torch._inductor.config.patch(dict(EXACT)):
            assert self.seen("cuda") == []

    def test_is_not_on_a_cpu(self) -> None:
        assert self.seen("cpu") == []

    def test_a_warning_is_logged_once(self, caplog: pytest.LogCaptureFixture) -> None:
        plain_inductor._warn_once.cache_clear()
        with caplog.at_level(logging.WARNING, logger="fxquant"):
            plain_inductor._warn_once("that")
            plain_inductor._warn_once("that")
        assert [record.getMessage() for record in caplog.records] == ["that"]

    def test_its_decompositions_say_so(self) -> None:
        from torch._inductor import decomposition

        from fxquant.ops.fake_quantize import PER_TENSOR

        plain_inductor.fuse_in_inductor()
        assert isinstance(decomposition.decompositions[PER_TENSOR], Told)


GUIDE = (Path(__file__).resolve().parents[3] / "docs" / "gpu.md").read_text(encoding="utf-8")


def test_the_guide_names_every_setting() -> None:
    assert all(f"`{name}`" in GUIDE for name in EXACT)


def test_the_guide_s_example_runs() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    exec(compile(example, "gpu.md", "exec"), {})


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:tests/|test_|numerics/)[\w/]+\.py)`", GUIDE))))
def test_the_guide_points_to_what_is_there(path: str) -> None:
    root = Path(__file__).resolve().parents[3]
    assert any((root / folder / path).exists() for folder in (".", "tests/triton", "fxquant"))
