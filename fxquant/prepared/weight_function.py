"""A weight's quantizer outside of a model's graphs, as these have it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, fx

from fxquant.capture.fake_inputs import fake_inputs
from fxquant.passes.captured.site_nodes import Insertion, SiteNodes
from fxquant.spec.mode import Mode
from fxquant.spec.quant_spec import QuantSpec


def weight_function(spec: QuantSpec, weight: Tensor, state: Sequence[Tensor], mode: Mode) -> fx.GraphModule:
    """What graphs compute of a weight of this form and the state of its range: a function of the two."""
    graph = fx.Graph()
    source, *nodes = fake_inputs(graph, [weight.detach(), *state])
    site = Insertion(label="", role="weight", spec=spec, edges=(), mode=mode, state=tuple(nodes))
    with graph.inserting_after((source, *nodes)[-1]):
        quantized = SiteNodes(graph, source, site).quantized()
    graph.output(source if quantized is None else quantized)
    return fx.GraphModule({}, graph)
