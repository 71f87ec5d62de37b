"""Which weighted nodes of an exported model run as integers in onnxruntime: read from the optimized graph."""

from __future__ import annotations

import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from fxquant.support.require import require
from fxquant.targets.document import ModelPath, Wiring, all_nodes, folder_of, load_model
from fxquant.targets.onnxruntime_reasons import WEIGHT_ONLY, reason
from fxquant.targets.session import data_folder, session
from fxquant.targets.target import WEIGHTED, KernelRow

if TYPE_CHECKING:
    import onnx


INTEGER = (
    "QLinearConv",
    "QGemm",
    "QLinearMatMul",
    "MatMulIntegerToFloat",
    "MatMulInteger",
    "ConvInteger",
    "DynamicQuantizeMatMul",
    "QAttention",
)

# Ops that onnxruntime puts beside a node it rewrites, under names made from that node's name.
_PLUMBING = ("QuantizeLinear", "DequantizeLinear", "Transpose", "Cast", "Add", "Reshape")


def kernel_rows(path: ModelPath) -> tuple[KernelRow, ...]:
    """One row per Conv, ConvTranspose, Gemm, MatMul and Attention of the model at ``path``, in graph order.

    Raises ``ExportError`` where the model does not load.
    """
    model = load_model(path)
    wiring = Wiring(model=model, folder=folder_of(path))
    exported = [node for node in all_nodes(model.graph) if node.op_type in WEIGHTED]
    return tuple(
        KernelRow(
            name=node.name or node.output[0],
            op_type=node.op_type,
            kernel=kernel,
            integer=kernel in INTEGER,
            reason=None if kernel in INTEGER else reason(node, kernel, wiring),
        )
        for node, kernel in zip(exported, _optimized_ops(model, exported, path), strict=True)
    )


def _optimized_ops(model: onnx.ModelProto, exported: list[onnx.NodeProto], path: ModelPath) -> list[str]:
    """The optimized op of each node, found by a mark that its name carries through the optimizer.

    onnxruntime adds to names as it fuses (``fused a``, ``a_token_3``, ``a/MatMulAddFusion``), so a name of
    ours, delimited on both sides, is found where the user's could be missing, or another's beginning.
    """
    names = [node.name for node in exported]
    for index, node in enumerate(exported):
        node.name = f"<fxq{index}>"
    marked = model.SerializeToString()
    for node, name in zip(exported, names, strict=True):
        node.name = name
    config = data_folder(path) | {
        # It renames float convolutions after their outputs and turns none into integers.
        "optimization.disable_specified_optimizers": "NchwcTransformer",
        # Weights past the 2 GiB of a protobuf; they are not read back.
        "session.optimized_model_external_initializers_file_name": "weights.bin",
        "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
    }
    with TemporaryDirectory() as folder:
        target = Path(folder) / "optimized.onnx"
        session(marked, optimize=True, optimized_path=target, config=config)
        optimized = require("onnx").load(str(target), load_external_data=False)
    found: dict[int, list[str]] = {}
    for node in all_nodes(optimized.graph):
        for index in re.findall(r"<fxq(\d+)>", node.name):
            if node.op_type not in _PLUMBING:
                found.setdefault(int(index), []).append(node.op_type)
    rank = {op: place for place, op in enumerate((*INTEGER, *WEIGHT_ONLY))}
    return [min(found.get(i, ["none"]), key=lambda op: rank.get(op, len(rank))) for i in range(len(exported))]
