"""Frames: which call of which module a node stands in, spelled alike for Dynamo and export."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import fx

import fxquant
from fxquant.graph.frames import Frame, frames, is_outside, normalize_path, relative, root_path, user_line

aten = torch.ops.aten


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("", ""),
        ("fc", "fc"),
        ("blocks.0.fc", "blocks.0.fc"),
        ("L['self']", "L['self']"),
        ("L['self'].fc", "L['self'].fc"),
        ("L['self']._modules['fc']", "L['self'].fc"),
        ("L['self']._modules['blocks']._modules['0'].fc", "L['self'].blocks.0.fc"),
        ("L['self'].blocks[0].fc", "L['self'].blocks.0.fc"),
        ("L['self'].heads['left']", "L['self'].heads.left"),
        ("L['self'].forward.module.fc", "L['self'].fc"),
        ("L['self'].forward.__self__.module._modules['fc']", "L['self'].fc"),
        ("L['self'].blocks[0].__dict__['_modules']['fc'].proj", "L['self'].blocks.0.fc.proj"),
        ("L['self'].__dict__['forward'].__self__.module.__dict__['_modules']['1x1']", "L['self'].1x1"),
        ("L['self'].a.forward.__self__.inner.__self__.module.fc", "L['self'].a.fc"),
        ("L['self'].forward.__self__.inner.__self__.inner.__self__.module.fc", "L['self'].fc"),
        ("L['self']._old_forward.__self__.module.fc", "L['self'].fc"),
        ("L['owner']._fxquant_bound.module.a._modules['0']", "L['owner'].a.0"),
        ("L['self'].a._checkpoint_wrapped_module.fc", "L['self'].a.fc"),
        ("L['self']._modules['a']._modules['_orig_mod']", "L['self'].a"),
        ("a._fsdp_wrapped_module", "a"),
        ("L['self'].forward.modules", "L['self'].forward.modules"),
        ("L['self'].fc@1", "L['self'].fc"),
        ("blocks.0@12.fc@3", "blocks.0.fc"),
        ("G['model'].fc", "G['model'].fc"),
    ],
)
def test_normalize_path(path: str, expected: str) -> None:
    assert normalize_path(path) == expected
    assert normalize_path(expected) == expected


@pytest.mark.parametrize(
    ("path", "owner", "expected"),
    [("a.b.c", "a.b", "c"), ("a.b", "a.b", ""), ("a.b", "", "a.b"), ("x.y", "a", "x.y")],
)
def test_relative(path: str, owner: str, expected: str) -> None:
    assert relative(path, owner) == expected


def test_an_expression_is_no_path_below_an_owner() -> None:
    assert is_outside("L['self'].blocks.0.fc") and is_outside("G['model']")
    assert not any(map(is_outside, ("", "fc", "blocks.0", "1x1")))


def node_in(stack: dict[str, tuple[str, type]] | None, trace: str | None = None) -> fx.Node:
    graph = fx.Graph()
    node = graph.call_function(aten.relu.default, (graph.placeholder("x"),))
    node.meta.update(nn_module_stack=stack, stack_trace=trace)
    return node


def test_frames_from_the_outside_in() -> None:
    stack = {
        "self": ("", torch.nn.Module),
        "k0": ("L['self']._modules['block']", torch.nn.Module),
        "k1": ("L['self']._modules['block'].fc@1", torch.nn.Linear),
    }
    assert frames(node_in(stack)) == (Frame("k0", "L['self'].block"), Frame("k1", "L['self'].block.fc"))


def test_code_of_the_frame_itself_has_no_frames() -> None:
    assert frames(node_in(None)) == () == frames(node_in({}))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("L['self']._modules['fc']._parameters['weight']", "L['self']"),
        ("L['self'].block._modules['fc']._parameters['weight']", "L['self'].block"),
        ("L['self']._buffers['scale']", "L['self']"),
        ("L['x']", ""),
        ("", ""),
    ],
)
def test_root_path_is_where_parameters_begin(source: str, expected: str) -> None:
    graph = fx.Graph()
    graph.placeholder("x").meta["source"] = "L['x']"
    graph.placeholder("w").meta["source"] = source
    assert root_path(graph) == expected


def test_only_inputs_tell_the_root() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.call_function(aten.relu.default, (x,)).meta["source"] = "L['self']._parameters['weight']"
    assert root_path(graph) == ""


def test_user_line_is_the_innermost_of_the_users() -> None:
    torchs, ours = Path(torch.__file__).parent / "nn/modules/linear.py", Path(fxquant.__file__).parent / "demo/nets.py"
    lines = [
        f'File "{path}", line {n}, in forward' for n, path in enumerate(("/a/net.py", "/a/block.py", torchs, ours))
    ]
    assert user_line(node_in(None, "\n".join(lines))) == "/a/block.py:1"
    assert user_line(node_in(None, lines[2])) == ""
    assert user_line(node_in(None)) == ""
