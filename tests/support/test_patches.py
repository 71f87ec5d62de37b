"""What is replaced of torch serves the thread that asked, graphs of ours only, and is gone afterwards."""

from __future__ import annotations

import ast
import gc
import json
import sys
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._dynamo.utils import counters

import fxquant
from fxquant.backend.inductor.compiling import collecting_rarely
from fxquant.capture.exported import exported_graph
from fxquant.ops import fake_quantize_per_tensor_affine, plain_inductor
from fxquant.support import patches
from fxquant.support.patches import BUCKETS, CACHE_KEY, NO_AUTOCAST, OTHERS, PATCHES, Patch
from tests import forked
from tests.house.sources import ROOT, package_modules
from tests.nets import prepared, step


def elsewhere(run: Callable[[], Any]) -> Any:
    """What it gives in another thread."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(run()), daemon=True)
    thread.start()
    thread.join(timeout=300)
    assert found, "the thread has ended with a result"
    return found[0]


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A module with a class, as torch might have one."""
    module = types.ModuleType("made_up")

    class Thing:
        def double(self, x: int) -> int:
            return 2 * x

    module.Thing = Thing  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "made_up", module)
    return module


def patch_of(place: str, instead: Any = None, **settings: bool) -> Patch:
    return Patch(place, why="", tried="", serves="", instead=instead, **settings)


def one_more(double: Callable[..., int], *args: Any) -> int:
    return double(*args) + 1


class TestPatch:
    def test_it_serves_the_thread_that_asked_and_no_other(self, made_up: Any) -> None:
        patch, thing = patch_of("made_up:Thing.double", one_more), made_up.Thing()
        with patch.acting():
            assert thing.double(3) == 7
            assert elsewhere(lambda: thing.double(3)) == 6
        assert thing.double(3) == 6

    def test_the_very_function_is_back(self, made_up: Any) -> None:
        own, patch = vars(made_up.Thing)["double"], patch_of("made_up:Thing.double", one_more)
        with patch.acting(), patch.acting():
            assert vars(made_up.Thing)["double"] is not own
            assert vars(made_up.Thing)["double"].__name__ == "double"
        assert vars(made_up.Thing)["double"] is own

    def test_also_after_an_error_and_where_regions_overlap(self, made_up: Any) -> None:
        own, patch = vars(made_up.Thing)["double"], patch_of("made_up:Thing.double", one_more)
        begun, over = threading.Event(), threading.Event()

        def long() -> int:
            with patch.acting():
                begun.set()
                assert over.wait(60)
                return made_up.Thing().double(3)

        found: list[int] = []
        thread = threading.Thread(target=lambda: found.append(long()))
        thread.start()
        assert begun.wait(60)
        with pytest.raises(ZeroDivisionError), patch.acting():
            raise ZeroDivisionError
        assert made_up.Thing().double(3) == 6 and vars(made_up.Thing)["double"] is not own
        over.set()
        thread.join(60)
        assert found == [7] and vars(made_up.Thing)["double"] is own

    def test_what_others_put_there_meanwhile_stays(self, made_up: Any) -> None:
        patch = patch_of("made_up:Thing.double", one_more)
        with patch.acting():
            ours = vars(made_up.Thing)["double"]
            theirs = lambda self, x: 100 * ours(self, x)  # noqa: E731
            made_up.Thing.double = theirs
        assert vars(made_up.Thing)["double"] is theirs and made_up.Thing().double(3) == 600
        with patch.acting():
            assert made_up.Thing().double(3) == 601
        assert vars(made_up.Thing)["double"] is theirs

    def test_a_caller_may_bring_what_is_called_instead(self, made_up: Any) -> None:
        made_up.triple = lambda x: 3 * x
        patch = patch_of("made_up:triple")
        with patch.acting(lambda triple, x: -triple(x)):
            assert made_up.triple(2) == -6
        assert made_up.triple(2) == 6

    def test_always_means_in_every_thread_until_taken(self, made_up: Any) -> None:
        patch = patch_of("made_up:Thing.double", one_more, always=True)
        patch.put()
        assert elsewhere(lambda: made_up.Thing().double(3)) == made_up.Thing().double(3) == 7
        patch.take()
        assert made_up.Thing().double(3) == 6


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.place.rpartition(".")[2].rpartition(":")[2])
class TestEach:
    def test_is_a_function_of_torch_that_this_torch_has(self, patch: Patch) -> None:
        owner, name = patch._owner()
        assert callable(vars(owner)[name]) and patch.place.startswith("torch.")

    def test_says_what_for_and_for_whom(self, patch: Patch) -> None:
        assert patch.why and patch.serves and "2." in patch.tried

    def test_is_not_in_place_while_nothing_of_ours_runs(self, patch: Patch) -> None:
        if patch not in (BUCKETS, CACHE_KEY):  # kept once there is something of ours
            owner, name = patch._owner()
            assert not hasattr(vars(owner)[name], "__wrapped__") or patch is NO_AUTOCAST
            assert vars(owner)[name] is not patch._ours or patch._ours is None


# ---------------------------------------------------------------- the list is whole


def foreign(tree: ast.Module) -> dict[str, str]:
    """Names that a module has from torch or the standard library → what they stand for."""
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = (getattr(node, "module", None) or "") + "." if isinstance(node, ast.ImportFrom) else ""
            for alias in node.names:
                found[alias.asname or alias.name.split(".")[0]] = module + alias.name
    return {name: origin for name, origin in found.items() if origin.split(".")[0] in ("torch", "gc", "unittest")}


def chain(node: ast.AST) -> list[str]:
    """``a.b.c`` → its names; empty for what is no such chain."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.insert(0, node.attr)
        node = node.value
    return [node.id, *names] if isinstance(node, ast.Name) else []


HOOKS = ("register_", "set_threshold", "update", "patch", "setdefault", "get_code_state")
# Operators of our own, and settings that are put back: in torch 2.13 those of one thread.
OURS = {"library.register_fake", "library.register_autograd", "library.register_vmap"}
OURS |= {"config.patch", "inductor.patch", "functorch.patch"}


def changes(source: str) -> Iterator[str]:
    """Where a source changes something of torch's: assignments to attributes, calls that register or replace."""
    tree = ast.parse(source)
    names = foreign(tree)
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign):
            yield from (".".join(parts) for t in targets if len(parts := chain(t)) > 1 and parts[0] in names)
        if isinstance(node, ast.Call):
            parts = chain(node.func)
            if parts and parts[0] in names and parts[-1].startswith(HOOKS):
                yield ".".join(parts[-2:])
            if parts == ["setattr"] and chain(node.args[0])[:1] and chain(node.args[0])[0] in {*names, "owner"}:
                yield "setattr"
        if isinstance(node, ast.Attribute) and node.attr == "simplify_and_reorder" and isinstance(node.ctx, ast.Store):
            yield "buffer.simplify_and_reorder"
    yield from (name for name, origin in names.items() if origin.startswith("unittest"))


def test_nothing_else_of_torch_is_replaced() -> None:
    found: set[str] = set()
    for path in {path.resolve() for path in package_modules().values()}:
        where = path.relative_to(ROOT).as_posix()
        if where != "fxquant/support/patches.py":
            found |= {f"{where}: {what}" for what in changes(path.read_text(encoding="utf-8")) if what not in OURS}
    assert found == set(OTHERS), "say in OTHERS what it does to whom, and how it is undone"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from torch._inductor import ir\nir.Loop.make = f", ["ir.Loop.make"]),
        ("import torch\ntorch.compiler.config.tag += 'x'", ["torch.compiler.config.tag"]),
        ("import gc\ngc.set_threshold(1)", ["gc.set_threshold"]),
        ("from unittest import mock", ["mock"]),
        ("import torch\nsetattr(torch.nn, 'x', 1)", ["setattr"]),
        (
            "def f():\n    from torch._inductor import decomposition\n    decomposition.table.update({})",
            ["table.update"],
        ),
        ("import torch\nx = torch.ones(1)\nself.x = x", []),
    ],
)
def test_the_search_itself(source: str, found: list[str]) -> None:
    assert list(changes(source)) == found


# ---------------------------------------------------------------- guards


def test_autocast_elsewhere_is_on_while_a_model_is_exported() -> None:
    x = torch.ones(2, 2)

    def product() -> torch.dtype:
        with torch.autocast("cpu", torch.bfloat16):
            return (x @ x).dtype

    with NO_AUTOCAST.acting():
        assert product() == torch.float32
        assert elsewhere(product) == torch.bfloat16
    assert product() == torch.bfloat16


def test_thresholds_that_others_set_meanwhile_stay() -> None:
    before = gc.get_threshold()
    try:
        with collecting_rarely():
            gc.set_threshold(321, 4, 5)
        assert gc.get_threshold() == (321, 4, 5)
    finally:
        gc.set_threshold(*before)


def graph_of(function: Callable[..., Any]) -> fx.GraphModule:
    return fx.symbolic_trace(function)


class TestCacheKey:
    """torch's cache of traced graphs knows our operators by name: after an upgrade it would replay the old ones."""

    def test_only_graphs_with_operators_of_ours_hold_the_sources(self) -> None:
        def key(gm: fx.GraphModule) -> dict[str, Any]:
            details = types.SimpleNamespace()
            patches._with_sources(lambda self, gm: None, details, gm)
            return vars(details)

        outer = graph_of(lambda x: x + 1)
        outer.body = graph_of(lambda x: torch.ops.fxquant.symmetric_qparams.default(x, 1, 127))
        assert key(graph_of(lambda x: x + 1)) == {}
        assert key(graph_of(lambda x: torch.ops.fxquant.fake_quantize_per_tensor_affine(x, 0.3, 0, -8, 7))) != {}
        assert key(outer) != {}, "in a body"

    def test_other_sources_are_not_taken_for_these(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def hits(function: Callable[[Tensor], Tensor], digest: str) -> int:
            torch._dynamo.reset()
            counters.clear()
            monkeypatch.setattr(patches, "source_digest", lambda: digest)
            torch.compile(function, backend="inductor")(torch.ones(3))
            return counters["aot_autograd"]["autograd_cache_hit"]

        def ours(x: Tensor) -> Tensor:
            return fake_quantize_per_tensor_affine(x, 0.3, 0, -8, 7)

        def theirs(x: Tensor) -> Tensor:
            return x + 1

        with torch._inductor.utils.fresh_cache(dir=str(tmp_path)):
            assert [hits(ours, "a"), hits(ours, "a"), hits(ours, "b")] == [0, 1, 0]
            assert [hits(theirs, "a"), hits(theirs, "b")] == [0, 1]
        assert "fxquant" not in torch.compiler.config.cache_key_tag

    def test_it_can_be_undone(self) -> None:
        from torch._inductor.decomposition import decompositions, select_decomp_table

        op = torch.ops.fxquant.fake_quantize_per_tensor_affine.default
        owner, name = CACHE_KEY._owner()
        plain_inductor.fuse_in_inductor()
        assert op in decompositions and op in select_decomp_table() and vars(owner)[name] is CACHE_KEY._ours
        plain_inductor.forget()
        assert op not in decompositions and op not in select_decomp_table()
        assert vars(owner)[name].__module__.startswith("torch.") and CACHE_KEY._ours is None
        plain_inductor.fuse_in_inductor()
        assert op in decompositions and vars(owner)[name] is CACHE_KEY._ours


# ---------------------------------------------------------------- a neighbour


# A plain step compiled into a fresh cache: the keys in it, the code without its number, and what Python has of state.
NEIGHBOUR = """
import gc, json, os, re, sys, torch
from pathlib import Path
from torch import nn
from torch._inductor.utils import fresh_cache
from tests.quick import header_is_read_once

quick = header_is_read_once()
quick.__enter__()

def neighbour():
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 32), nn.Tanh())
    x = torch.randn(16, 64)
    with fresh_cache():
        with torch.autocast("cpu", torch.bfloat16):
            y = torch.compile(model)(x)
        y.float().sum().backward()
        root = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
        entries = [path for kind in ("aotautograd", "fxgraph") for path in (root / kind).rglob("*")]
        keys = sorted(path.parent.name for path in entries if path.is_file())
        codes = sorted(re.sub("AOT ID.*", "", path.read_text()) for path in root.rglob("*.py"))
    grads = [p.grad.double().sum().item() for p in model.parameters()]
    return {"keys": keys, "codes": codes, "dtype": str(y.dtype), "gc": gc.get_threshold(), "grads": grads}
"""
ALONE = "print(json.dumps([neighbour(), 'fxquant' in sys.modules]))"
BESIDE_US = """
import contextlib
from fxquant.support.patches import PATCHES, SCHEDULE
from tests.support.test_patches import boom, elsewhere, ours_at_work
ours_at_work()
after = neighbour()
with contextlib.ExitStack() as stack:
    for patch in PATCHES:
        stack.enter_context(patch.acting(boom if patch is SCHEDULE else None))
    print(json.dumps([after, elsewhere(neighbour)]))
"""


def ours_at_work() -> None:
    """A quantized step, an export's capture, `cost`, and an operator of ours in a plain graph."""
    torch._dynamo.reset()
    x = torch.randn(3, 8)
    model = prepared(torch.nn.Linear(8, 4), x)
    step(torch.compile(model, backend="fxquant"), x)
    fxquant.cost(model, (x,))
    exported_graph(model, (x,), {}, None)
    torch.compile(lambda x: fake_quantize_per_tensor_affine(x, 0.3, 0, -8, 7))(x)


def boom(*_: Any) -> None:
    raise AssertionError("another thread's graph was taken for ours")


@pytest.mark.slow
def test_a_neighbour_compiles_as_in_a_process_without_us(vectors_are_known: None) -> None:
    """Byte for byte: cache keys, generated code, gradients; after us, and in another thread while we are at work."""
    runs = [forked.start(["-c", NEIGHBOUR + code]) for code in (ALONE, BESIDE_US)]
    (alone, loaded), (after, meanwhile) = (json.loads(run.wait().stdout.splitlines()[-1]) for run in runs)
    assert not loaded and len(alone["keys"]) == 3 and len(alone["codes"]) == 2
    assert after == alone
    assert meanwhile == alone
