"""Module frames: which call of which module a node stands in, and the user's line."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import fx

from fxquant.graph.meta import source_of

# From a module to what stands in its forward's place, by a bound method or by a slot, and back to the module.
_BOUND = re.compile(r"\.(?:forward|\w+\.__self__|_fxquant_\w+)(?:\.inner\.__self__)*\.module(?=\.|$)")
# ``.__dict__['_modules']['a']`` where the code has set an attribute of the module meanwhile.
_MEMBER = re.compile(r"(?:\.__dict__\['_modules'\]|\._modules|\.__dict__)?(?:\['([^']+)'\]|\[(\d+)\])")
_ROOT = re.compile(r"^[LG]\['[^']*'\]")
_CALL = re.compile(r"@\d+")
_WRAPPER = re.compile(r"(?:^|\.)(?:_checkpoint_wrapped_module|_fsdp_wrapped_module|_orig_mod)(?=\.|$)")


def without_wrappers(path: str) -> str:
    """A module's path as it was before torch's wrappers took the place of modules around it."""
    return _WRAPPER.sub("", path).removeprefix(".")


def normalize_path(path: str) -> str:
    """Dynamo's or export's spelling of a module path as dotted names: ``L['self'].module.a[0]`` → ``….a.0``."""
    root = _ROOT.match(path)
    head, tail = (root.group(), path[root.end() :]) if root else ("", path)
    tail = _MEMBER.sub(lambda m: "." + (m.group(1) or m.group(2)), tail)
    tail = _BOUND.sub("", tail)
    return head + _WRAPPER.sub("", _CALL.sub("", tail))


@dataclass(frozen=True)
class Frame:
    """One call of one module as a graph shows it: ``key`` tells calls apart, ``path`` modules."""

    key: str
    path: str


def frames(node: fx.Node) -> tuple[Frame, ...]:
    """The module calls around a node, outermost first; empty for code of the compiled frame itself."""
    stack = node.meta.get("nn_module_stack") or {}
    found = (Frame(key, normalize_path(path)) for key, (path, _) in stack.items())
    return tuple(frame for frame in found if frame.path)


def relative(path: str, owner: str) -> str:
    """``path`` as seen from ``owner`` (its own path: the empty string)."""
    return path[len(owner) :].lstrip(".") if path.startswith(owner) else path


def is_outside(path: str) -> bool:
    """Whether a `relative` path is not below the owner, but Dynamo's expression of a module elsewhere."""
    return _ROOT.match(path) is not None


def root_path(graph: fx.Graph) -> str:
    """The path prefix of the frame that was compiled, as module paths inside it spell it."""
    for node in graph.nodes:
        head = re.split(r"\._(?:modules|parameters|buffers)\[", source_of(node), maxsplit=1)
        if len(head) == 2:
            return normalize_path(head[0])
    return ""


_FUNCTIONS = ("torch/nn/functional.py", "torch/functional.py", "torch/_tensor.py")  # as good as the call itself
_LIBRARIES = (str(Path(inspect.getfile(torch)).parent), str(Path(__file__).parents[1]))


def is_library(file: str) -> bool:
    """Whether a source file is torch's or ours."""
    return file.startswith(_LIBRARIES)


def user_line(node: fx.Node) -> str:
    """``file:line`` of the innermost code that made the node and is neither torch's nor ours; else empty."""
    own = [line for line in _lines(node) if not is_library(line[0])]
    return f"{own[-1][0]}:{own[-1][1]}" if own else ""


def own_line(node: fx.Node) -> str:
    """`user_line` of what such code calls itself, not by a module of torch's: ``file:line``, without folders.

    In a function that a module's ``forward`` calls, the line in forward stands before it, since that is all that
    torch.export keeps of the calls that lead to an operator: ``"net.py:20 heads.py:7"``.
    """
    lines = _lines(node)
    while lines and lines[-1][0].endswith(_FUNCTIONS):
        lines.pop()
    if not lines or is_library(lines[-1][0]):
        return ""
    forwards = [line for line in lines if line[2] == "forward" and not is_library(line[0])]
    told = dict.fromkeys((*forwards[-1:], lines[-1]))
    return " ".join(f"{Path(file).name}:{number}" for file, number, _ in told)


def _lines(node: fx.Node) -> list[tuple[str, str, str]]:
    """File, line and function of each call that a node stands in, innermost last."""
    return re.findall(r'File "([^"]+)", line (\d+)(?:, in (\S+))?', node.meta.get("stack_trace") or "")
