"""Bytes of steps written by hand: to whom each read, write and allocation is charged, and sizes with an open batch."""

from __future__ import annotations

import pytest
import sympy
import torch
from torch import fx

from fxquant.report.step_bytes import BATCH, Bytes, Saved, as_number, bytes_by_site, saved_of, simplified, total_of
from tests.report.steps_by_hand import S0, Nodes, kept, kernel, step

aten = torch.ops.aten
A, B = "a.weight", "b.input"


@pytest.fixture
def nodes() -> Nodes:
    return Nodes()


# ---------------------------------------------------------------- sums


def test_bytes_add_by_column_and_move_what_is_read_and_written() -> None:
    total = Bytes(read=1, written=20, saved=300) + Bytes(read=4, written=50, saved=600)
    assert total == Bytes(read=5, written=70, saved=900)
    assert total.moved == 75  # what is saved was written already


def test_open_sizes_come_out_expanded_and_numbers_as_int() -> None:
    half = Bytes(read=BATCH * 4, written=8)
    total = half + Bytes(read=3 * (BATCH + 2), written=BATCH - BATCH + 1)
    assert (total.read, total.written) == (7 * BATCH + 6, 9)
    assert type(total.written) is int
    back = total + Bytes(read=-7 * BATCH)
    assert back.read == 6 and type(back.read) is int
    assert half.moved == 4 * BATCH + 8


def test_bytes_as_plain_values() -> None:
    assert Bytes(read=4 * BATCH + 8, written=3).to_dict() == {"read": "4*batch + 8", "written": 3, "saved": 0}


@pytest.mark.parametrize(
    ("size", "number"), [(7, 7), (sympy.Integer(7), 7), (BATCH * 5 + 1, 11), (BATCH**2, 4)], ids=str
)
def test_an_open_size_sorts_as_of_two_samples(size: int | sympy.Expr, number: int) -> None:
    assert as_number(size) == number


def test_simplified() -> None:
    assert type(simplified(sympy.Integer(3))) is int and simplified(sympy.Integer(3)) == 3
    assert str(simplified(4 * (BATCH + 1))) == "4*batch + 4"


# ---------------------------------------------------------------- reads and writes


def test_reads_and_writes_go_to_the_site_that_they_are_of(nodes: Nodes) -> None:
    a, b, model = nodes.call(aten.amax, A), nodes.call(aten.round, B), nodes.call(aten.mm)
    found = bytes_by_site(
        step(
            [
                kernel(reads=[(100, [a])], writes=[(4, [a])]),
                kernel(reads=[(20, [b]), (3, [a])], writes=[(7, [b])]),
                kernel(reads=[(1000, [model])], writes=[(500, [model])]),
            ]
        )
    )
    assert dict(found) == {
        A: Bytes(read=103, written=4),
        B: Bytes(read=20, written=7),
        None: Bytes(read=1000, written=500),
    }


CHARGED: dict[str, tuple[list[str | None], str | None]] = {
    "one site": ([A], A),
    "two loops of one site": ([A, A], A),
    "several sites: the first": ([B, A], B),
    "a site and the model": ([A, None], None),
    "the model and a site": ([None, A], None),
    "the model": ([None], None),
    "nobody": ([], None),
}


@pytest.mark.parametrize("case", CHARGED)
def test_a_tensor_is_charged_to_a_site_where_no_loop_works_for_the_model(nodes: Nodes, case: str) -> None:
    sites, expected = CHARGED[case]
    users = [nodes.call(aten.mul, site) for site in sites]
    found = bytes_by_site(step([kernel(reads=[(64, users)])]))
    assert dict(found) == {expected: Bytes(read=64)}


def test_the_gradient_of_a_quantizer_is_its_own_too(nodes: Nodes) -> None:
    gradient = nodes.call(aten.where, A, backward=True)
    assert dict(bytes_by_site(step([kernel(writes=[(16, [gradient])])]))) == {A: Bytes(written=16)}


def test_symbols_of_the_batch_are_one_and_others_stay(nodes: Nodes) -> None:
    other, length = sympy.symbols("s1 s7", integer=True, positive=True)
    a = nodes.call(aten.amax, A)
    one = step([kernel(reads=[(4 * S0, [a]), (8 * other, [a]), (2 * length, [a])])], batch=[S0, other])
    assert bytes_by_site(one)[A].read == 12 * BATCH + 2 * length


# ---------------------------------------------------------------- what is kept


def one_saved(size: int, node: fx.Node, readers: list[fx.Node]) -> Saved:
    (found,) = saved_of(step([], [kept(size, node, readers)]))
    return found


def test_what_a_quantizer_made_is_charged_to_it_whoever_reads_it(nodes: Nodes) -> None:
    found = one_saved(8, nodes.call(aten.round, A), [nodes.call(aten.mm)])
    assert (found.site, found.made_by, found.serves) == (A, f"quantizer {A}", ("mm",))
    assert one_saved(8, nodes.call(aten.round, A), [nodes.call(aten.where, B, backward=True)]).site == A


def test_what_only_quantizers_read_is_charged_to_the_first_of_them(nodes: Nodes) -> None:
    made = nodes.call(aten.relu)
    a, b = nodes.call(aten.where, A, backward=True), nodes.call(aten.where, B, backward=True)
    assert one_saved(8, made, [b, a]).site == B
    assert one_saved(8, made, [a, nodes.call(aten.mm)]).site is None
    assert one_saved(8, made, []).site is None


def test_readers_are_named_once_in_their_order(nodes: Nodes) -> None:
    read = [nodes.call(aten.mul), nodes.call(aten.where, A), nodes.call(aten.mul), nodes.call(aten.add)]
    assert one_saved(8, nodes.call(aten.relu), read).serves == ("mul", f"quantizer {A}", "add")


def test_an_operator_is_named_with_the_module_that_it_ran_in(nodes: Nodes) -> None:
    assert one_saved(8, nodes.call(aten.relu.default, module="head"), []).made_by == "relu in head"
    gradient = nodes.call(aten.mm.default, module="head", backward=True)
    assert one_saved(8, nodes.call(aten.relu), [gradient]).serves == ("mm in head",)
    decomposed = nodes.call(aten.mul.Tensor)
    decomposed.meta["original_aten"] = aten.gelu.default  # what the user called, before it was decomposed
    assert one_saved(8, decomposed, []).made_by == "gelu"


def test_a_copy_of_an_input_is_no_operator_s(nodes: Nodes) -> None:
    x = nodes.input("primals_1")
    x.meta["nn_module_stack"] = {"0": ("L['self']", torch.nn.Module)}
    assert one_saved(8, x, []).made_by == "a parameter or input"


def test_an_allocation_has_its_size_type_shape_and_line(nodes: Nodes) -> None:
    made = nodes.call(aten.relu)
    made.meta["stack_trace"] = 'File "/src/net.py", line 12, in forward\n    return x.relu()'
    one = step([], [kept(16 * S0, made, [], shape=(S0, 4))], batch=[S0])
    (found,) = saved_of(one)
    assert (found.size, found.dtype, found.shape) == (16 * BATCH, "float32", (BATCH, 4))
    assert found.source == "/src/net.py:12"
    assert found.to_dict() == {
        "size": "16*batch",
        "dtype": "float32",
        "shape": ["batch", 4],
        "site": None,
        "made_by": "relu",
        "serves": [],
        "source": "/src/net.py:12",
    }


def test_the_total_is_that_of_all_kernels_and_all_allocations(nodes: Nodes) -> None:
    a, model = nodes.call(aten.amax, A), nodes.call(aten.mm)
    one = step(
        [kernel(reads=[(10, [a])], writes=[(2 * S0, [a])]), kernel(reads=[(S0, [model])], writes=[(5, [model])])],
        [kept(3, a, [a]), kept(4 * S0, model, [model])],
        batch=[S0],
    )
    assert total_of(one) == Bytes(read=BATCH + 10, written=2 * BATCH + 5, saved=4 * BATCH + 3)
    assert total_of(step([])) == Bytes()
