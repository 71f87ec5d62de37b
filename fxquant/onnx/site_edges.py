"""Which operators of the user's model read a quantized tensor of a file: told in the file's metadata."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from fxquant.passes.export.constants import held_name
from fxquant.plan.plan import Plan

if TYPE_CHECKING:
    import onnx

SITES = "fxquant.sites"


class SiteEdge(NamedTuple):
    """One operand of one operator of the model: the module that runs it, its kind, which of that kind, the operand."""

    path: str
    kind: str
    ordinal: int
    operand: str

    @property
    def operator(self) -> tuple[str, str, int]:
        """The operator alone."""
        return self.path, self.kind, self.ordinal


def write_sites(model: Any, plan: Plan, weights: Iterable[str], activations: Iterable[str]) -> None:
    """Into the metadata of an exporter's model: site → its edges, and codes → the site of the weight they are."""
    edges = {
        site.key: [[_joined(site.owner, e.path), e.kind, e.ordinal, e.operand] for e in site.local.edges]
        for site in plan.sites
    }
    stems = {held_name(f"{label}.codes"): label for label in weights}
    codes = {name: label for name in model.graph.initializers if (label := _label(name, stems)) is not None}
    used = {*codes.values(), *(label.partition("@")[0] for label in activations)}
    sites = {key: listed for key, listed in edges.items() if key in used}
    model.metadata_props[SITES] = json.dumps({"sites": sites, "codes": codes}, separators=(",", ":"))


def _joined(owner: str, path: str) -> str:
    return ".".join(part for part in (owner, path) if part)


def _label(name: str, stems: dict[str, str]) -> str | None:
    """The weight that an initializer holds the codes of: they may be transposed, then packed."""
    found = name.removesuffix("_int4")
    for form in (found, found.rstrip("_"), found.rstrip("_").removesuffix("_t")):
        label = stems.get(form) or stems.get(form.rstrip("_"))
        if label is not None:
            return label
    return None


class Sites:
    """What a file says of its sites; nothing where another tool wrote it.

    Attributes:
        edges: site key → the operands that read it.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        text = next((entry.value for entry in model.metadata_props if entry.key == SITES), "{}")
        found = json.loads(text)
        self.edges = {key: [SiteEdge(*edge) for edge in listed] for key, listed in found.get("sites", {}).items()}
        self._codes: dict[str, str] = found.get("codes", {})

    def key(self, value: str) -> str | None:
        """The site of a QuantizeLinear's result, or of an initializer that holds codes."""
        key = self._codes.get(value, value.partition("@")[0])
        return key if key in self.edges else None
