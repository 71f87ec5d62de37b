"""``fxquant::bind``: how a module's quantizer state becomes an input of the graph that runs the module.

The op computes nothing. Dynamo lifts the tensors in its arguments to graph inputs, as it does for any other
tensor, so every instance of a class brings its own state to a shared compiled graph.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxquant.ops.library import define


def _bind(key: str, modes: Sequence[int], state: Sequence[Tensor], group: str | None = None) -> None:
    return None


BIND = define("bind(str key, int[] modes, Tensor[] state, str? group=None) -> ()", _bind, decompose=False)
# Nothing uses its (absent) result; without this, tracers would drop it as dead code.
torch.fx.node.has_side_effect(BIND)


def bind(key: str, modes: Sequence[int], state: Sequence[Tensor], group: str | None = None) -> None:
    """Marks the frame of one owner: its site list's digest, a mode per site, and their state tensors.

    ``group`` names the process group whose ranks keep equal ranges: None for all ranks, ``""`` for no other.
    """
    BIND(key, modes, state, group)
