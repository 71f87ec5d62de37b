"""`record`: one run of a prepared model, each use of a site under a name of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from fxquant.prepared.root import unwrap
from fxquant.probe.visitor import Use, Visit, visiting

# Called with a name and the use of a site; gives what goes on in the quantized tensor's place, None for that itself.
NamedVisit = Callable[[str, Use], Tensor | None]


def record(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None, visit: NamedVisit) -> Any:
    """Evaluates ``model`` through AOTAutograd and eager kernels; ``visit`` sees each site as it is computed.

    Names are the plan's keys; a site that is used again in the same run is called ``key@1``. Modes are restored.
    Returns the model's output. Raises InvalidArgument for an unprepared model.
    """
    with visiting(unwrap(model), "record") as run:
        return run(args, kwargs or {}, named(visit))


def named(visit: NamedVisit) -> Visit:
    """A visit of one run that gets ``key``, ``key@1``, … for the uses of one site."""
    seen: Counter[str] = Counter()

    def one(use: Use) -> Tensor | None:
        key = use.keys[0]
        number = seen[key]
        seen[key] += 1
        return visit(f"{key}@{number}" if number else key, use)

    return one
