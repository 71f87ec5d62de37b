"""Operands of products: what they come from, which axis has their scales, and whether their zero point is known."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from fxquant.ops import affine_qparams, fake_quantize
from fxquant.passes.joint.quantized_products import (
    Operand,
    StaysFloat,
    is_backward,
    is_fake_quantize,
    is_signed,
    operand_of,
    operands_of,
    origin,
)
from tests.passes.graphs import by_keyword

aten = torch.ops.aten
Moved = Callable[[Tensor], Tensor]
Point = Callable[[Tensor, Tensor], Tensor]  # of a scale and an input
X, SCALES, POINTS = torch.ones(2, 3, 4), torch.ones(3), torch.zeros(3, dtype=torch.int32)
ONE, POINT = torch.ones(1), torch.zeros(1, dtype=torch.int32)


def result(function: Callable[..., Tensor], *args: Tensor) -> fx.Node:
    """The node that a traced function gives."""
    gm = make_fx(function, tracing_mode="fake")(*args)
    (node,) = gm.graph.output_node().all_input_nodes
    node.graph.owning = gm  # the graph holds its module only weakly
    return node


def channels(moved: Moved, named: bool = False) -> Operand:
    """The operand that `moved` makes of a tensor [2, 3, 4] with a scale for each slice of axis 1."""
    quantize = fake_quantize.PER_CHANNEL
    node = result(lambda x, s, z: moved(quantize(x, s, z, 1, -127, 127)), X, SCALES, POINTS)
    if named:
        by_keyword(node.graph.owning)
    return operand_of(*origin(node))


def tensor(low: int, high: int, point: Point, dtype: torch.dtype = torch.float32) -> Operand:
    """The operand that is a tensor with one scale and a zero point that is made so."""
    quantize = fake_quantize.PER_TENSOR
    return operand_of(*origin(result(lambda x, s, z: quantize(x, s, point(s, z), low, high), X.to(dtype), ONE, POINT)))


# --- what moves values ---------------------------------------------------------------------------------

TURNED: dict[str, tuple[Moved, int, int]] = {
    "not at all": (lambda y: y, 1, 0),
    "transposed": (lambda y: y.transpose(0, 1), 0, 1),
    "transposed from the end": (lambda y: y.transpose(-1, -2), 2, 1),
    "transposed beside it": (lambda y: y.transpose(0, 2), 1, 1),
    "permuted": (lambda y: y.permute(2, 0, 1), 2, 1),
    "permuted from the end": (lambda y: y.permute(-2, -1, 0), 0, 1),
    "there and back": (lambda y: y.transpose(0, 1).permute(1, 2, 0), 2, 2),
    "copied and cast": (lambda y: y.clone().to(torch.bfloat16).transpose(1, 2), 2, 3),
}


@pytest.mark.parametrize("named", [False, True], ids=["", "by keyword"])
@pytest.mark.parametrize("name", TURNED)
def test_the_axis_that_has_the_scales(name: str, named: bool) -> None:
    moved, axis, moves = TURNED[name]
    found = channels(moved, named)
    assert found.axis == axis and len(found.moves) == moves and is_fake_quantize(found.source)


def test_a_matrix_is_turned() -> None:
    def turned(w: Tensor, s: Tensor, z: Tensor) -> Tensor:
        return fake_quantize.PER_CHANNEL(w, s, z, 0, -127, 127).t()

    assert operand_of(*origin(result(turned, torch.ones(3, 4), SCALES, POINTS))).axis == 1


@pytest.mark.parametrize(
    ("moved", "name"), [(lambda y: y.reshape(6, 4), "view"), (lambda y: y.unsqueeze(0).squeeze(0), "unsqueeze")]
)
def test_channels_that_are_lost_on_the_way(moved: Moved, name: str) -> None:
    with pytest.raises(StaysFloat, match=f"^{name} moves the channels of fake_quantize_per_channel_affine$"):
        channels(moved)


def test_moves_come_in_the_order_in_which_they_run() -> None:
    node = result(lambda x: x.relu().t().to(torch.bfloat16).reshape(-1), torch.ones(2, 3))
    source, moves = origin(node)
    assert source.name == "relu" and moves[0].name == "t" and moves[-1] is node
    assert all(after.args[0] is before for before, after in zip((source, *moves), moves, strict=False))


def test_what_counts_in_integers_is_no_move() -> None:
    node = result(lambda x: x.to(torch.int32).t().to(torch.float32).t(), torch.ones(2, 3))
    source, moves = origin(node)
    assert source.meta["val"].dtype == torch.float32 and source.args[0].meta["val"].dtype == torch.int32
    assert [move.name for move in moves] == [node.name]


# --- formats -------------------------------------------------------------------------------------------


def given(scale: Tensor, zero: Tensor) -> Tensor:
    return zero


@pytest.mark.parametrize(("low", "high"), [(-128, 127), (0, 255), (-1, 0), (0, 1)])
def test_ranges_that_are_codes_of_8_bits(low: int, high: int) -> None:
    found = tensor(low, high, given)
    assert found.limits == (low, high) and found.axis is None and found.moves == ()


@pytest.mark.parametrize(("low", "high"), [(-129, 0), (0, 256), (-1, 128), (-128, 255)])
def test_ranges_that_are_not(low: int, high: int) -> None:
    message = rf"^the codes of fake_quantize\S* have more than 8 bits: \[{low}, {high}\]$"
    with pytest.raises(StaysFloat, match=message):
        tensor(low, high, given)


@pytest.mark.parametrize(
    ("point", "dtype", "reason"),
    [
        (given, torch.float64, r"^fake_quantize\S* is float64$"),
        (lambda s, z: s, torch.float32, r"^the zero point of fake_quantize\S* is no integer$"),
    ],
    ids=["float64", "a float zero point"],
)
def test_declined(point: Point, dtype: torch.dtype, reason: str) -> None:
    with pytest.raises(StaysFloat, match=reason):
        tensor(0, 255, point, dtype)


def made(symmetric: bool, low: int) -> Point:
    return lambda scale, zero: affine_qparams(scale, scale, low, 127, symmetric)[1]


POINTS_OF: dict[str, tuple[Point, bool]] = {
    "an input": (given, False),
    "full of 0": (lambda s, z: torch.full((1,), 0, dtype=torch.int32), True),
    "full of 5": (lambda s, z: torch.full((1,), 5, dtype=torch.int32), False),
    "like it, of 0": (lambda s, z: torch.full_like(z, 0), True),
    "like it, of 5": (lambda s, z: torch.full_like(z, 5), False),
    "zeros": (lambda s, z: torch.zeros(1, dtype=torch.int32), True),
    "zeros, spread": (lambda s, z: torch.zeros((), dtype=torch.int32).expand(1).clone(), True),
    "an input, spread": (lambda s, z: z.reshape(()).expand(1).clone(), False),
    "a sum": (lambda s, z: torch.zeros_like(z) + z, False),
    "of a symmetric range": (made(True, -128), True),
    "of a symmetric range without a sign": (made(True, 0), False),
    "of a range": (made(False, -128), False),
}


@pytest.mark.parametrize("name", POINTS_OF)
def test_whether_a_zero_point_is_known_to_be_0(name: str) -> None:
    point, known = POINTS_OF[name]
    found = tensor(-128, 127, point)
    assert found.zero is (None if known else found.quant.zero_point)


# --- products ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("named", [False, True], ids=["", "by keyword"])
@pytest.mark.parametrize(
    ("product", "args"),
    [
        (lambda x, w: aten.mm(x, w), (torch.ones(2, 3), torch.ones(3, 4))),
        (lambda x, w: aten.addmm(aten.sum(w, [0]), x, w), (torch.ones(2, 3), torch.ones(3, 4))),
        (lambda x, w: aten.bmm(x, w), (torch.ones(1, 2, 3), torch.ones(1, 3, 4))),
        (lambda x, w: torch.conv1d(x, w), (torch.ones(1, 3, 5), torch.ones(2, 3, 2))),
    ],
    ids=["mm", "addmm", "bmm", "convolution"],
)
def test_what_a_product_multiplies(product: Callable[..., Tensor], args: tuple[Tensor, ...], named: bool) -> None:
    node = result(product, *args)
    if named:
        by_keyword(node.graph.owning)
    assert [operand.name for operand in operands_of(node)] == ["x_1", "w_1"]


def test_halves() -> None:
    node = result(lambda x: x.relu(), X)
    assert not is_backward(node)
    node.meta["partitioner_tag"] = "is_forward"
    assert not is_backward(node)
    node.meta["partitioner_tag"] = "is_backward"
    assert is_backward(node)


@pytest.mark.parametrize(
    ("product", "device", "low", "expected"),
    [
        (aten.mm.default, "cpu", 0, False),
        (aten.mm.default, "cpu", -128, True),
        (aten.mm.default, "cuda", 0, True),
        (aten.convolution.default, "cpu", -128, False),
    ],
)
def test_which_left_codes_have_a_sign(product: object, device: str, low: int, expected: bool) -> None:
    lhs = tensor(low, 127, given)
    node = lhs.source.graph.call_function(product, (lhs.source, lhs.source))
    node.meta["val"] = FakeTensor(FakeTensorMode(), torch.empty(2, 2, device="meta"), torch.device(device))
    assert is_signed(node, lhs) is expected
