"""`export_program` in the runtimes that take one: what becomes integer products, and how far the outputs are off.

    python bench/bench_program.py [--nets cnn,transformer] [--out bench/results/program.jsonl]

A JSON line per net and runtime that is installed: x86 Inductor (`pip install torchao`), XNNPACK
(`pip install executorch`).
``off`` is the largest distance of an output to that of training's evaluated graph (`fxquant_eager`), as a part of its
spread; ``integers`` counts oneDNN's integer products, or what XNNPACK's delegate was given of ``products``.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from machine import emit, environment
from nets import NETS
from torch import Tensor
from torch._inductor.utils import run_and_get_code

import fxquant

Facts = dict[str, object]
PRODUCTS = ("aten.linear", "aten.conv", "aten.matmul", "aten.bmm")


def calls(graph: torch.fx.Graph, *names: str) -> int:
    """How many calls of operators whose names begin so."""
    return sum(n.op == "call_function" and str(n.target).startswith(names) for n in graph.nodes)


def by_x86(program: torch.export.ExportedProgram, x: Tensor) -> tuple[Tensor, Facts]:
    """torchao's lowering, compiled."""
    from torchao.quantization.pt2e.lowering import lower_pt2e_quantized_to_x86

    lowered = lower_pt2e_quantized_to_x86(program.module(), (x,))
    torch._dynamo.reset()
    with torch._inductor.config.patch(freezing=True, force_disable_caches=True):
        out, code = run_and_get_code(torch.compile(lowered), x)
    integers = sum(text.count(f"torch.ops.onednn.{name}_pointwise") for text in code for name in ("qlinear", "qconv"))
    return out, {"integers": integers, "version": importlib.metadata.version("torchao")}


def by_xnnpack(program: torch.export.ExportedProgram, x: Tensor) -> tuple[Tensor, Facts]:
    """ExecuTorch's runtime, with all that XNNPACK takes in its delegate."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    graph = edge.exported_program().graph
    left = sum("addmm" in str(n.target) or "convolution" in str(n.target) for n in graph.nodes)
    weights = sum("dequantize_per_channel" in str(n.target) for n in program.graph.nodes)
    code = edge.to_executorch().buffer
    loaded = Runtime.get().load_program(code)
    method = loaded.load_method("forward")
    outputs = method.execute([x])  # views of what the method holds
    facts: Facts = {"integers": weights - left, "bytes": len(code)}
    return outputs[0].clone(), {**facts, "version": importlib.metadata.version("executorch")}


RUNTIMES: dict[str, tuple[str, Callable[..., tuple[Tensor, Facts]]]] = {
    "x86": ("torchao", by_x86),
    "xnnpack": ("executorch", by_xnnpack),
}


def rows(name: str) -> list[Facts]:
    """One for each runtime that is installed."""
    torch.manual_seed(0)
    model, x = NETS[name]()
    fxquant.prepare(model, (x,))
    fxquant.calibrate(model, [(x,)])
    model.eval()
    found = []
    with torch.no_grad():
        expected = torch.compile(model, backend="fxquant_eager")(x)
        for runtime, (package, run) in RUNTIMES.items():
            try:
                importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                print(f"left out: {runtime}: pip install {package}", file=sys.stderr)
                continue
            program = fxquant.export_program(model, (x,), runtime=runtime, dynamic_batch=False)
            out, facts = run(program, x.clone())  # x86 Inductor adds a residual into the input itself
            out = out[0] if isinstance(out, tuple | list) else out
            off = float((out - expected).abs().max() / (expected.max() - expected.min()))
            products = calls(program.graph, *PRODUCTS)
            found.append({"net": name, "runtime": runtime, "products": products, "off": off, **facts})
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nets", default="cnn,transformer")
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    for name in chosen.nets.split(","):
        emit(({**row, **environment()} for row in rows(name)), chosen.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
