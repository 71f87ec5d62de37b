"""What every operator keeps, over the cases that its family lists: the same checks for all of them."""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from torch.utils._pytree import tree_leaves

from fxquant.support.patches import DTYPE_RULES
from tests.ops.cases import FLOATS, Case
from tests.ops.oracle import assert_same_bits, hard_values

FAMILIES = sorted(path.stem.removeprefix("cases_") for path in Path(__file__).parent.glob("cases_*.py"))
BY_FAMILY: dict[str, list[Case]] = {
    family: importlib.import_module(f"tests.ops.cases_{family}").CASES for family in FAMILIES
}
CASES = [case for cases in BY_FAMILY.values() for case in cases]
TAKING_X = [case for case in CASES if case.takes_x]
GPU = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")])
DEVICES = ["cpu", GPU]


def is_batched(case: Case) -> bool:
    """Whether a compiler may leave its first size open; the others stay nodes, or take no x."""
    return case.takes_x and case.fuses


each_case = pytest.mark.parametrize("case", CASES, ids=str)
each_taking_x = pytest.mark.parametrize("case", TAKING_X, ids=str)


def random(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)


def hard(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    """Specials, ties and plain values, shuffled, as often as they fit: in place of the smallest shape, a larger one."""
    pool = torch.cat([hard_values(0.1, 0, 15, dtype), hard_values(0.1, -8, 7, dtype), random((300,), dtype)])
    rest = int(torch.tensor(shape[1:]).prod())
    rows = -(-len(pool) // rest)
    order = torch.randperm(rows * rest, generator=torch.Generator().manual_seed(1)) % len(pool)
    return pool[order].reshape(rows, *shape[1:]).to(device)


def tensors(found: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]


def ramp(out: Tensor) -> Tensor:
    return torch.linspace(-1, 1, out.numel(), device=out.device).reshape(out.shape).to(out.dtype)


def with_leaves(case: Case, x: Tensor) -> tuple[list[Any], list[Tensor]]:
    """The case's arguments, and those among them that receive a gradient, made leaves."""
    args = list(case.args(x))
    names = [argument.name for argument in case.op._schema.arguments]
    leaves = []
    for name in case.grads:
        index = names.index(name)
        args[index] = args[index].detach().clone().requires_grad_()
        leaves.append(args[index])
    return args, leaves


def gradients(outputs: list[Tensor], leaves: list[Tensor]) -> tuple[Tensor, ...]:
    differentiable = [out for out in outputs if out.requires_grad]
    return torch.autograd.grad(differentiable, leaves, [ramp(out) for out in differentiable]) if leaves else ()


def values_and_gradients(case: Case, x: Tensor) -> list[Tensor]:
    """All outputs, and the gradient of everything that receives one."""
    args, leaves = with_leaves(case, x)
    outputs = tensors(case.op(*args, **case.kwargs))
    return [*(out.detach() for out in outputs), *gradients(outputs, leaves)]


def assert_all_same(got: list[Tensor], expected: list[Tensor]) -> None:
    assert len(got) == len(expected) > 0
    for one, other in zip(got, expected, strict=True):
        assert_same_bits(one, other)


def test_every_op_has_a_case() -> None:
    defined = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fxquant::")}
    names = {n.replace("::", ".") if "." in n else n.replace("::", ".") + ".default" for n in defined}
    # Of integers, and of no tensor: tests/passes/joint/test_use_integer_matmul.py, tests/numerics/test_gradients.py
    elsewhere = {"fxquant.integer_convolution.default", "fxquant.rounding_words.default"}
    assert names - elsewhere == {str(case.op) for case in CASES}
    assert len({case.name for case in CASES}) == len(CASES)


@each_case
def test_opcheck(case: Case) -> None:
    args, _ = with_leaves(case, random(case.shape))
    found = torch.library.opcheck(case.op, tuple(args), case.kwargs, test_utils=checks_for(case, args))
    assert set(found.values()) == {"SUCCESS"}


FIRST = {case.op: case for case in reversed(CASES)}


def checks_for(case: Case, args: list[Any]) -> tuple[str, ...]:
    """opcheck's tests; that of the schema compares with allclose, which float8 lacks.

    The graph of open sizes is taken of one case of each operator, where the test of open batches has the others.
    """
    found = ("test_autograd_registration", "test_faketensor")
    if not any(isinstance(arg, Tensor) and arg.is_floating_point() and arg.dtype.itemsize == 1 for arg in args):
        found = ("test_schema", *found)
    return (*found, "test_aot_dispatch_dynamic") if case is FIRST[case.op] or not is_batched(case) else found


def layouts(shape: tuple[int, ...]) -> dict[str, Tensor]:
    x = random(shape)
    larger = random(tuple(2 * n + 1 for n in shape))
    return {
        "transposed": x.transpose(0, -1).contiguous().transpose(0, -1),
        "sliced": larger[tuple(slice(1, 2 * n + 1, 2) for n in shape)],
        "expanded": x[:1].expand(shape),
        "channels last": random((2, *shape)).to(memory_format=torch.channels_last)[0],
    }


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "channels last"])
@each_taking_x
def test_layouts(case: Case, layout: str) -> None:
    x = layouts(case.shape)[layout]
    assert not x.is_contiguous()
    assert_all_same(values_and_gradients(case, x), values_and_gradients(case, x.contiguous()))


@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 8), (1,)], ids=str)
@pytest.mark.parametrize("case", [case for case in TAKING_X if case.elementwise], ids=str)
def test_degenerate_shapes(case: Case, shape: tuple[int, ...]) -> None:
    x = random(shape)
    outputs = values_and_gradients(case, x)
    if "input" in case.grads:
        assert outputs[0].shape == x.shape
    if x.numel() and case.grads == ("input",):
        one = values_and_gradients(case, x.reshape(1, 1))
        assert_all_same([out.reshape(()) for out in outputs], [out.reshape(()) for out in one])


@each_taking_x
def test_vmap(case: Case) -> None:
    xs = torch.stack([random(case.shape) * k for k in (1, 2, 3)])
    call = functools.partial(case.op, **case.kwargs)
    rest = case.args(xs[0])[1:]
    for dim in (0, 2):
        batch = xs.movedim(0, dim).contiguous()
        got = tensors(torch.vmap(lambda x: call(x, *rest), in_dims=dim)(batch))
        expected = [tensors(call(x, *rest)) for x in xs]
        assert_all_same(got, [torch.stack(each) for each in zip(*expected, strict=True)])


@pytest.mark.parametrize("case", [case for case in TAKING_X if case.grads], ids=str)
def test_gradient_through_vmap(case: Case) -> None:
    xs = torch.stack([random(case.shape) * k for k in (1, 2, 3)])
    rest = case.args(xs[0])[1:]

    def gradient(call: Any) -> Tensor:
        leaf = xs.clone().requires_grad_()
        first = tensors(call(leaf))[0]
        return torch.autograd.grad(first, leaf, torch.ones_like(first))[0]

    def one(x: Tensor) -> Any:
        return tensors(case.op(x, *rest, **case.kwargs))[0]

    assert_same_bits(gradient(torch.vmap(one)), gradient(lambda x: torch.stack([one(each) for each in x])))


def compiled_in(family: list[Case]) -> list[tuple[Case, torch.dtype]]:
    """Each case in float32, and each other dtype in one case of each operator, in turn.

    How a dtype is loaded and stored is the same code for all operators.
    """
    pairs = [(case, torch.float32) for case in family]
    for number, op in enumerate({case.op: None for case in family}):
        left = [FLOATS[1:][(number + k) % 3] for k in range(3)]
        for case in (case for case in family if case.op == op):
            found = [dtype for dtype in left if dtype in case.dtypes][:1]
            pairs += [(case, dtype) for dtype in found]
            left = [dtype for dtype in left if dtype not in found]
    return pairs


COMPILED: dict[tuple[str, torch.dtype], list[Case]] = {}
for each_family, those in BY_FAMILY.items():
    for one_case, each_dtype in compiled_in([case for case in those if case.fuses]):
        COMPILED.setdefault((each_family, each_dtype), []).append(one_case)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("family", "dtype"), COMPILED, ids=str)
def test_compiled_gives_the_bits_of_eager(family: str, dtype: torch.dtype, device: str) -> None:
    """One graph of a family's cases, compiled by plain Inductor: same bits, forward and backward, and no call left."""
    cases = COMPILED[family, dtype]
    inputs = [hard(case.shape, dtype, device) for case in cases]
    prepared = [with_leaves(case, x) for case, x in zip(cases, inputs, strict=True)]

    @torch.compile(fullgraph=True)
    def forward(arguments: list[list[Any]]) -> list[Any]:
        return [case.op(*args, **case.kwargs) for case, args in zip(cases, arguments, strict=True)]

    def run() -> list[list[Tensor]]:
        outputs = [tensors(found) for found in forward([args for args, _ in prepared])]
        grads = iter(gradients([o for each in outputs for o in each], [leaf for _, each in prepared for leaf in each]))
        return [
            [*(out.detach() for out in each), *(next(grads) for _ in leaves)]
            for each, (_, leaves) in zip(outputs, prepared, strict=True)
        ]

    torch._dynamo.reset()
    with DTYPE_RULES.acting():  # of half the time: Inductor fills them anew for each of 70,000 operations
        got, code = run_and_get_code(run)
    assert not [line for text in code for line in text.splitlines() if "torch.ops.fxquant" in line]
    expected = [values_and_gradients(case, x) for case, x in zip(cases, inputs, strict=True)]
    for case, one, other in zip(cases, got, expected, strict=True):
        sums = sum(name not in ("input", "grad") for name in case.grads)  # over many elements, in another order
        exact = len(one) - sums
        try:
            assert_all_same(one[:exact], other[:exact])
            torch.testing.assert_close(one[exact:], other[exact:], rtol=1e-5, atol=1e-5, equal_nan=True)
        except AssertionError as error:
            raise AssertionError(f"{case}, {dtype}: {error}") from error


BATCHED = {
    f"{family} {start}": cases[start : start + 6]  # in larger graphs a case takes longer
    for family, cases in ((name, list(filter(is_batched, every))) for name, every in BY_FAMILY.items())
    for start in range(0, len(cases), 6)
}


@pytest.mark.parametrize("name", BATCHED)
def test_a_dynamic_batch_is_never_specialized(name: str) -> None:
    """mark_dynamic raises if anything fixes the size; the backend takes ops apart as Inductor does."""
    cases = BATCHED[name]
    torch._dynamo.reset()
    seen = torch._dynamo.testing.CompileCounterWithBackend("aot_eager_decomp_partition")

    @torch.compile(backend=seen, fullgraph=True)
    def compiled(arguments: list[tuple[Any, ...]]) -> list[Any]:
        return [case.op(*args, **case.kwargs) for case, args in zip(cases, arguments, strict=True)]

    for rows in (6, 9, 4):
        arguments = [case.args(random((rows, *case.shape[1:]))) for case in cases]
        for args in arguments:
            for arg in args:
                if isinstance(arg, Tensor) and arg.shape == args[0].shape:
                    torch._dynamo.mark_dynamic(arg, 0)
        for case, args, got in zip(cases, arguments, compiled(arguments), strict=True):
            assert_all_same(tensors(got), tensors(case.op(*args, **case.kwargs)))
    assert seen.frame_count == 1
