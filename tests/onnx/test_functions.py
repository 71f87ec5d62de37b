"""What torch's exporter reads of the functions that it is given, and how it then calls them."""

from __future__ import annotations

import inspect
from typing import Any

import onnx_ir as ir
import pytest
import torch

from fxquant.onnx.functions import constant, without_annotations
from fxquant.onnx.translate import translation_table


def annotated(x: Any, count: int, scale: float = 1.0) -> Any:
    return x, count, scale


def test_functions_stay_what_they_are_but_for_their_annotations() -> None:
    before = inspect.signature(annotated)
    (found,) = without_annotations({"op": annotated}).values()
    after = inspect.signature(found)
    assert found is annotated and found(1, 2) == (1, 2, 1.0)
    assert list(after.parameters) == list(before.parameters) and after.parameters["scale"].default == 1.0
    assert {each.annotation for each in after.parameters.values()} == {inspect.Parameter.empty}


def test_every_argument_of_an_operator_is_an_input_to_the_exporter() -> None:
    """An ``int`` with a type would be an attribute, and the exporter would pick functions by what fits it."""
    from torch.onnx._internal.exporter import _schemas  # private; tried on 2.13

    for op, function in translation_table().items():
        signature = _schemas.op_signature_from_function(function, "fxquant", "op")
        kinds = {type(each).__name__ for each in signature.params}
        assert kinds == {"Parameter"}, op
        assert not signature.outputs, op


@pytest.mark.parametrize("value", [torch.tensor([1.0, 2.0]).numpy(), torch.tensor(3, dtype=torch.int32).numpy()])
def test_a_constant_holds_its_value(value: Any) -> None:
    """As one node, whose tensor has the dtype and shape of the array."""
    tape: list[tuple[str, Any]] = []

    class Recorder:
        def Constant(self, **attributes: Any) -> str:
            tape.append(("Constant", attributes["value"]))
            return "node"

    assert constant(Recorder(), value) == "node"
    ((_, tensor),) = tape
    assert isinstance(tensor, ir.TensorProtocol)
    assert tensor.numpy().dtype == value.dtype and (tensor.numpy() == value).all() and tensor.shape == value.shape
