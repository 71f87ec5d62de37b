"""From a canonical graph to a file: torch.onnx's exporter, int4 packing, and a write that is whole or not at all."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import fx

from fxquant.capture.open_sizes import OpenSizes
from fxquant.capture.reexported import program_of
from fxquant.errors import ExportError, FxquantError
from fxquant.onnx.translate import translation_table
from fxquant.support.require import require

# Protocol buffers end at 2 GiB; beyond, weights go into a file beside the model.
_EXTERNAL_BYTES = 1_800_000_000


def to_onnx(
    gm: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any], sizes: OpenSizes | None, opset: int
) -> Any:
    """A graph of `exported_graph` through torch.onnx's exporter, fxquant's ops as native Q/DQ: an ONNXProgram."""
    (returned,) = gm.graph.output_node().args
    for number, value in enumerate(torch.utils._pytree.tree_leaves(returned)):
        if not isinstance(value, fx.Node) and value is not None:
            raise ExportError(
                f"outputs must be tensors or sizes: got the constant {value!r} as output {number}. "
                "Return it as a tensor, or leave it out."
            )
    table = translation_table(opset)
    with warnings.catch_warnings(), _quiet("torch.onnx"), _quiet("onnx_ir"), _quiet("onnxscript"):
        warnings.simplefilter("ignore")
        try:
            program = torch.onnx.export(
                program_of(gm, args, kwargs, sizes),
                dynamo=True,
                custom_translation_table=table,
                opset_version=opset,
                verbose=False,
            )
        except Exception as error:
            raise ExportError(f"model must translate to ONNX: got {type(error).__name__}: {error}") from error
    assert program is not None
    _own_outputs(program.model.graph)
    for node in program.model.graph:
        node.metadata_props.clear()  # stack traces with the paths of this machine
    return program


def _own_outputs(graph: Any) -> None:
    """Outputs that are an initializer, an input, or an output before, behind an Identity: a file holds no such ones."""
    import onnx_ir as ir

    seen = set()
    for index, value in enumerate(graph.outputs):
        if value.producer() is None or value.name in seen:
            node = ir.node("Identity", inputs=[value])
            (own,) = node.outputs
            own.name, own.shape, own.type = f"{value.name}_output{index}", value.shape, value.type
            graph.append(node)
            graph.outputs[index] = own
        seen.add(value.name)


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def save(program: Any, destination: Path, check: Callable[[Path], None] | None = None) -> int:
    """Writes beside the destination and moves into place, so that no half file is ever there; returns bytes written.

    ``check`` is given the whole file before it moves; what it raises leaves the destination as it was.
    """
    onnx = require("onnx")
    with tempfile.TemporaryDirectory(dir=destination.parent, prefix=".fxquant-") as folder:
        temporary = Path(folder) / destination.name
        size = sum(v.const_value.nbytes for v in program.model.graph.initializers.values() if v.const_value is not None)
        try:
            program.save(temporary, external_data=size > _EXTERNAL_BYTES)
            onnx.checker.check_model(os.fspath(temporary))
        except FxquantError:
            raise
        except Exception as error:
            raise ExportError(f"{destination.name} must be a valid ONNX model: got {error}") from error
        if check is not None:
            check(temporary)
        return move_into_place(Path(folder), destination)


def move_into_place(folder: Path, destination: Path) -> int:
    """Moves what was written in a folder beside the destination: what that file refers to first. Returns its bytes."""
    files = sorted(folder.iterdir(), key=lambda p: p.name == destination.name)
    total = sum(written.stat().st_size for written in files)
    for written in files:
        shutil.move(written, destination.parent / written.name)
    return total


def _as_int4(graph: Any, value: Any) -> Any:
    """The int4 form of an initializer, made once."""
    import ml_dtypes
    import onnx_ir as ir

    name = f"{value.name}_int4"
    if name not in graph.initializers:
        small = value.const_value.numpy().astype(ml_dtypes.int4)
        kind, tensor = ir.TensorType(ir.DataType.INT4), ir.tensor(small, name=name)
        graph.register_initializer(ir.Value(name=name, shape=ir.Shape(small.shape), type=kind, const_value=tensor))
    return graph.initializers[name]


def pack_int4(model: Any, *, only_blocks: bool, convolutions: bool = True, channels: bool = True) -> list[str]:
    """Codes in −8…7 as ONNX int4, with their zero points; ``only_blocks``: those of weights per group.

    ``convolutions``, ``channels``: those of convolutions, and with other scales than of groups, too; else a note.
    """
    import onnx_ir as ir

    packed, left = 0, {"of convolutions": 0, "without groups": 0}
    for node in list(model.graph):
        if node.op_type != "DequantizeLinear":
            continue
        block = node.attributes.get("block_size")  # the exporter writes its default too, 0 for no blocks
        is_block = block is not None and block.as_int() != 0
        if only_blocks and not is_block:
            continue
        codes, zero_point = node.inputs[0], node.inputs[2] if len(node.inputs) > 2 else None
        if codes is None or codes.const_value is None or codes.const_value.dtype != ir.DataType.INT8:
            continue
        array = codes.const_value.numpy()
        if array.min() < -8 or array.max() > 7:
            continue
        if not convolutions and any(use.node.op_type == "Conv" for use in node.outputs[0].uses()):
            left["of convolutions"] += 1
            continue
        if not channels and not is_block:
            left["without groups"] += 1
            continue
        for index, value in ((0, codes), (2, zero_point)):
            if value is not None:  # of int4 codes it is 0
                node.replace_input_with(index, _as_int4(model.graph, value))
        packed += 1
    for name in [n for n, v in model.graph.initializers.items() if not v.uses()]:
        del model.graph.initializers[name]
    notes = [f"{packed} weights stored as int4"] if packed or not only_blocks else []
    why = {"of convolutions": "the runtime has no int4 ones", "without groups": "beside half types it has no int4 ones"}
    return notes + [f"{count} weights {which} stay int8: {why[which]}" for which, count in left.items() if count]
