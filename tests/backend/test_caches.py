"""Compiled code from the caches of torch: found again by a second process, and never stale."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters

from fxquant.backend.reports import compile_reports
from fxquant.passes.base import PassResult
from fxquant.passes.post_grad.lower_fake_quantize import LowerFakeQuantize
from fxquant.passes.stages import Stage
from fxquant.spec.ranges import CurrentTensor
from fxquant.spec.recipes import INT8
from tests import forked
from tests.nets import grads, prepared, step

ROOT = Path(__file__).resolve().parents[2]

# One training step of a prepared net, in a process of its own.
STEP = """
import json, sys, torch, fxquant
from torch._dynamo.utils import counters
from tests.nets import grads, prepared, step
from tests.quick import compiles_are_quick

torch.manual_seed(0)
model, x = torch.nn.Linear(8, 4), torch.randn(3, 8)
with compiles_are_quick():
    step(torch.compile(prepared(model, x, recipe=sys.argv[1]), backend="fxquant"), x)
print(json.dumps({
    "autograd": [counters["aot_autograd"]["autograd_cache_" + kind] for kind in ("hit", "miss", "bypass")],
    "graphs": [counters["inductor"]["fxgraph_cache_" + kind] for kind in ("hit", "miss", "bypass")],
    "gradients": {name: grad.flatten().tolist() for name, grad in grads(model).items()},
    "sources": fxquant.__file__,
}))
"""


@dataclass(frozen=True)
class Found:
    """(hits, misses, bypasses) of AOTAutograd's cache and of Inductor's, the gradients, and where fxquant lay."""

    autograd: list[int]
    graphs: list[int]
    gradients: dict[str, list[float]]
    sources: str


def elsewhere(cache: Path, package: Path, recipe: str = "int8") -> Found:
    """`STEP` in another process, with fxquant from ``package``."""
    path = os.pathsep.join(map(str, (package, ROOT)))
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), "PYTHONPATH": path}
    done = forked.run(["-c", STEP, recipe], env, cwd=cache)
    assert done.returncode == 0, done.stderr
    return Found(**json.loads(done.stdout.splitlines()[-1]))


def copied_package(folder: Path) -> Path:
    """A copy of the sources: the tree of the tests may be edited while they run."""
    leave = shutil.ignore_patterns("__pycache__", "passes")
    shutil.copytree(ROOT / "fxquant", folder / "fxquant", ignore=leave)
    shutil.copytree(ROOT / "passes", folder / "fxquant" / "passes", ignore=leave)
    return folder


def test_a_second_process_compiles_nothing(vectors_are_known: None, tmp_path: Path) -> None:
    cache, package = tmp_path / "cache", copied_package(tmp_path)
    cache.mkdir()
    first, second = (elsewhere(cache, package) for _ in range(2))
    assert first.sources.startswith(str(package)), "the copy was imported"
    assert first.autograd == [0, 1, 0] and first.graphs == [0, 2, 0]
    assert second.autograd == [1, 0, 0] and second.graphs == [2, 0, 0]
    assert second.gradients == first.gradients

    other = elsewhere(cache, package, recipe="w4a8")
    assert other.autograd == [0, 1, 0] and other.graphs[1] >= 1
    assert other.gradients != first.gradients

    with (package / "fxquant" / "passes" / "lower_fake_quantize.py").open("a", encoding="utf-8") as file:
        file.write("#")
    changed = elsewhere(cache, package)
    assert changed.autograd == [0, 1, 0] and changed.graphs == [0, 2, 0], "a pass has changed by a byte"
    assert changed.gradients == first.gradients


# ---------------------------------------------------------------- in one process


@dataclass(frozen=True)
class Compiled:
    """(hits, misses) of one compile, and the gradients of its first step."""

    autograd: tuple[int, int]
    graphs: tuple[int, int]
    gradients: dict[str, Tensor]

    def same_numbers(self, other: Compiled) -> bool:
        """Whether all gradients are those of the other, to the bit."""
        return all(torch.equal(grad, other.gradients[name]) for name, grad in self.gradients.items())


def compiled(x: Tensor, *, recipe: Any = "int8", train: bool = True, **options: Any) -> Compiled:
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    model = prepared(nn.Linear(8, 4), x, recipe=recipe)
    model.train(train)
    step(torch.compile(model, backend="fxquant", options=options or None), x)
    autograd, graphs = counters["aot_autograd"], counters["inductor"]
    return Compiled(
        (autograd["autograd_cache_hit"], autograd["autograd_cache_miss"]),
        (graphs["fxgraph_cache_hit"], graphs["fxgraph_cache_miss"]),
        grads(model),
    )


@pytest.fixture
def x(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """What a linear is compiled with, and a cache that is empty."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.manual_seed(1)
    return torch.randn(3, 8)


HIT, MISS = ((1, 0), (2, 0)), ((0, 1), (0, 2))


def test_options_and_recipes_are_keys(x: Tensor) -> None:
    first = compiled(x)
    assert (first.autograd, first.graphs) == MISS
    other = compiled(x, inductor={"max_fusion_size": 7})
    assert (other.autograd, other.graphs) == MISS
    # No fusion: other kernels of the same arithmetic, none of them from the cache.
    apart = compiled(x, inductor={"max_fusion_size": 1})
    assert apart.graphs[0] == 0
    assert other.same_numbers(first) and apart.same_numbers(first)
    # The first step of a moving average is a range of the batch: other code, the same numbers.
    for recipe, same in (("w4a8", False), (INT8.with_range(CurrentTensor()), True)):
        other = compiled(x, recipe=recipe)
        assert other.autograd == (0, 1) and other.graphs[1] >= 1
        assert other.same_numbers(first) is same
    evaluating = compiled(x, train=False)
    assert evaluating.autograd == (0, 1), "evaluation is not taken for training"
    again = compiled(x)
    assert (again.autograd, again.graphs) == HIT
    assert again.same_numbers(first)


def test_seconds_are_of_every_hook_that_ran(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Joint graph, forward and backward; a graph from the cache meets the hook of the captured graph only."""
    run, hour, calls = LowerFakeQuantize.run, 3600.0, []

    def slow(self: LowerFakeQuantize, gm: fx.GraphModule, stage: Stage | None = None) -> PassResult:
        result = run(self, gm, stage)
        calls.append(gm)
        result.seconds += hour
        return result

    monkeypatch.setattr(LowerFakeQuantize, "run", slow)
    compiled(x)
    assert len(calls) == 3 and compile_reports()[-1].seconds // hour == 3
    compiled(x)
    assert len(calls) == 3 and 0 < compile_reports()[-1].seconds < hour
