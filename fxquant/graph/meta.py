"""What fxquant writes into ``node.meta``, beside torch's ``val``, ``nn_module_stack``, ``recompute`` and the like."""

from __future__ import annotations

from typing import Any, Protocol

from torch import fx

from fxquant.spec.mode import Mode
from fxquant.spec.quant_spec import QuantSpec

# Of placeholders, written by capture.
SOURCE = "source"  # Dynamo's expression of an input: ``L['self']._modules['fc']._parameters['weight']``
STATE = "state"  # whether it is a parameter or buffer

# Of calls.
REGION = "region"  # name of the user's checkpoint region, for planning, where its body is inlined
SITE = "site"  # of a fake-quant: the `Site` that it is inserted for
STANDS_FOR = "stands_for"  # of a fake-quant: labels of the equal sites that it serves too
_RANGE_GROUP = "fxquant.range_group"
_RUNNING_STATISTIC = "fxquant.running_statistic"  # within ``custom``, which AOTAutograd hands on to what it makes
_SAVED_AS_CODES = "fxquant.saved_as_codes"
_MASKED_GRADIENT = "fxquant.masked_gradient"


class Site(Protocol):
    """What a fake-quant is inserted for: `fxquant.passes.captured.insert_fake_quantize.Insertion` to readers."""

    @property
    def label(self) -> str:
        """Its name in reports."""

    @property
    def role(self) -> str:
        """ "weight", "activation" or "output"."""

    @property
    def spec(self) -> QuantSpec:
        """Its format."""

    @property
    def mode(self) -> Mode:
        """What becomes of its range in this graph."""

    @property
    def state(self) -> tuple[fx.Node, ...]:
        """The inputs that hold its range, where it has one."""


def site_of(node: fx.Node) -> Site | None:
    """The site of a fake-quant; None of other nodes, and of fake-quants that a model calls itself."""
    return node.meta.get(SITE)


def add_stand_in(node: fx.Node, label: str) -> None:
    """Says that a fake-quant serves another site too."""
    node.meta.setdefault(STANDS_FOR, []).append(label)


def sites_served(node: fx.Node) -> tuple[str, ...]:
    """Labels of the sites that a fake-quant serves beside its own."""
    return tuple(node.meta.get(STANDS_FOR, ()))


def region_of(node: fx.Node) -> str | None:
    """The user's checkpoint region around a node, None outside."""
    return node.meta.get(REGION)


def source_of(node: fx.Node) -> str:
    """Dynamo's expression of an input; empty for other nodes."""
    return node.meta.get(SOURCE, "") if node.op == "placeholder" else ""


def mark_observation(average: fx.Node, group: str) -> None:
    """Says that ``average``, an `average_min_max` whose results are copied into the state, is to be done at the end.

    ``group`` names the process group whose ranks take part; ``""`` for this process alone.
    """
    average.meta[_RANGE_GROUP] = group


def is_observation(node: fx.Node) -> bool:
    """Whether the node is marked by `mark_observation`."""
    return _RANGE_GROUP in node.meta


def take_observation(average: fx.Node) -> str:
    """Unmarks an observation; its process group."""
    return average.meta.pop(_RANGE_GROUP)


def mark_running_statistic(node: fx.Node) -> None:
    """Marks a node of the captured graph that reads a buffer which the graph updates later."""
    node.meta["custom"] = {**node.meta.get("custom", {}), _RUNNING_STATISTIC: True}


def is_running_statistic(node: fx.Node) -> bool:
    """Whether the node, or the captured one that it was traced from, is marked by `mark_running_statistic`."""
    return _RUNNING_STATISTIC in node.meta.get("custom", {})


def mark_saved_as_codes(site: fx.Node) -> None:
    """Says that backward reads codes instead of a fake-quant's result."""
    site.meta[_SAVED_AS_CODES] = True


def is_saved_as_codes(site: fx.Node) -> bool:
    """Whether backward reads nothing of a fake-quant node itself."""
    return _SAVED_AS_CODES in site.meta


def mark_masked_gradient(node: fx.Node) -> None:
    """Says that ``node`` is a gradient times a clip mask, both computed from tensors in memory."""
    node.meta[_MASKED_GRADIENT] = True


def is_masked_gradient(node: fx.Node) -> bool:
    """Whether the node is marked by `mark_masked_gradient`."""
    return _MASKED_GRADIENT in node.meta


def copied_meta(like: fx.Node, *keys: str) -> dict[str, Any]:
    """Those of the keys that a node has, for one that is made of it."""
    return {key: like.meta[key] for key in keys if key in like.meta}
