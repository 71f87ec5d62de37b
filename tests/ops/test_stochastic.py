"""Philox against its published answers and a plain integer reference; stochastic rounding and its ops."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxquant.errors import InvalidArgument
from fxquant.numerics.stochastic import philox, round_by_chance
from fxquant.numerics.stochastic import uniform as draw
from fxquant.ops.blocks import fake_quantize_mx
from fxquant.ops.floating import fake_quantize_float
from fxquant.ops.stochastic import as_seed, fake_quantize_stochastic, uniform
from tests.ops.oracle import assert_same_bits, hard_values

SCALE, POINT = torch.tensor([0.1]), torch.tensor([3], dtype=torch.int32)
NAN, INF = float("nan"), float("inf")
WORD = 2**32

# From the known-answer file of Random123, philox4x32-10.
KNOWN = {
    "zeros": ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    "ones": ([WORD - 1] * 4, [WORD - 1] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    "pi": (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
}


def reference(counter: list[int], key: list[int]) -> list[int]:
    """Philox-4x32-10 in Python's own integers."""
    for turn in range(10):
        k = [(key[i] + turn * step) % WORD for i, step in enumerate((0x9E3779B9, 0xBB67AE85))]
        product0, product1 = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [
            (product1 // WORD) ^ counter[1] ^ k[0],
            product1 % WORD,
            (product0 // WORD) ^ counter[3] ^ k[1],
            product0 % WORD,
        ]
    return counter


def words(values: list[int]) -> list[Tensor]:
    return [torch.tensor(value) for value in values]


@pytest.mark.parametrize("name", KNOWN)
def test_known_answers(name: str) -> None:
    counter, key, expected = KNOWN[name]
    assert [int(word) for word in philox(tuple(words(counter)), tuple(words(key)))] == expected  # type: ignore[arg-type]
    assert reference(counter, key) == expected


@settings(deadline=None, derandomize=True, max_examples=200)
@given(
    counter=st.lists(st.integers(0, WORD - 1), min_size=4, max_size=4),
    key=st.lists(st.integers(0, WORD - 1), min_size=2, max_size=2),
)
def test_philox_is_the_integer_reference(counter: list[int], key: list[int]) -> None:
    found = [int(word) for word in philox(tuple(words(counter)), tuple(words(key)))]  # type: ignore[arg-type]
    assert found == reference(counter, key)


@pytest.mark.parametrize("seed", [0, 1, -1, 2**62 + 3, -(2**63)])
@pytest.mark.parametrize("offset", [0, -1, 2**40])
def test_uniform_counts_elements(seed: int, offset: int) -> None:
    x = torch.empty(3, 4, 5)
    got = draw(torch.tensor([seed, offset]), x).flatten()
    for index in (0, 1, 17, 59):
        counter = [index, 0, offset % WORD, (offset >> 32) % WORD]
        word = reference(counter, [seed % WORD, (seed >> 32) % WORD])[0]
        assert got[index].item() == (word >> 8) / 2**24


def test_uniform_is_uniform() -> None:
    u = uniform(5, torch.empty(200_000)).double()
    assert u.dtype == torch.float64 and u.min() >= 0 and u.max() < 1
    count = len(u)
    assert abs(u.mean() - 0.5) < 5 * (1 / 12 / count) ** 0.5
    histogram = torch.histc(u, 100, 0, 1)
    chi_squared = ((histogram - count / 100) ** 2 / (count / 100)).sum()
    assert abs(chi_squared - 99) < 5 * (2 * 99) ** 0.5
    assert abs(torch.corrcoef(torch.stack([u[:-1], u[1:]]))[0, 1]) < 5 / count**0.5
    assert len(u.unique()) > count * 0.99


def test_other_seeds_and_offsets_give_other_numbers() -> None:
    x = torch.empty(1000)
    seeds = [[0, 0], [1, 0], [0, 1], [2**32, 0], [0, 2**32], [-1, -1]]
    drawn = torch.stack([uniform(torch.tensor(seed), x) for seed in seeds])
    assert_same_bits(uniform(0, x), drawn[0])
    correlation = torch.corrcoef(drawn.double()) - torch.eye(len(seeds))
    assert correlation.abs().max() < 5 / 1000**0.5


def test_round_by_chance() -> None:
    x = torch.tensor([1.25, -1.25, 3.0, -3.0, 0.0, INF, -INF, NAN])
    low = torch.tensor([1.0, -2.0, 3.0, -3.0, 0.0, INF, -INF, NAN])
    assert_same_bits(round_by_chance(x, torch.full((8,), 0.99)), low)
    high = torch.tensor([2.0, -1.0, 3.0, -3.0, 0.0, INF, -INF, NAN])
    assert_same_bits(round_by_chance(x, torch.zeros(8)), high)
    assert round_by_chance(x[:2], torch.full((2,), 0.25)).tolist() == [1.0, -1.0]


# The op


def equation(x: Tensor, scale: Tensor, point: Tensor, low: int, high: int, seed: int) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    steps = wide / scale.to(wide.dtype)
    below = torch.floor(steps)
    up = uniform(seed, x).to(wide.dtype) < steps - below
    code = torch.where(up, below + 1, below) + point
    return ((code.nan_to_num(nan=low).clamp(low, high) - point) * scale.to(wide.dtype)).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_the_equation(dtype: torch.dtype) -> None:
    x = hard_values(0.1, 0, 15, dtype)
    assert_same_bits(fake_quantize_stochastic(x, SCALE, POINT, 0, 15, 9), equation(x, SCALE, POINT, 0, 15, 9))
    rows = torch.stack([x, x, x], dim=1)
    scales, points = torch.tensor([0.1, 0.3, 2.0]), torch.tensor([0, 3, 15])
    got = fake_quantize_stochastic(rows, scales, points, 0, 15, 9, axis=1)
    assert_same_bits(got, equation(rows, scales, points, 0, 15, 9))


def test_numbers_are_one_element_tensors() -> None:
    x = torch.randn(100, generator=torch.Generator().manual_seed(0))
    tensors = torch.tensor([0.3]), torch.tensor([2], dtype=torch.int32)
    assert_same_bits(fake_quantize_stochastic(x, 0.3, 2, -8, 7, 5), fake_quantize_stochastic(x, *tensors, -8, 7, 5))


def test_specials() -> None:
    x = torch.tensor([NAN, INF, -INF, 1e30, -1e30, 0.0, -0.0])
    y = fake_quantize_stochastic(x, SCALE, POINT, 0, 15, 0)
    assert_same_bits(y, torch.tensor([-3, 12, -3, 12, -3, 0, 0]) * SCALE)


def test_exact_values_never_move() -> None:
    x = torch.arange(-8, 8).float() * 0.25
    for seed in range(50):
        y = fake_quantize_stochastic(x, torch.tensor([0.25]), torch.tensor([0]), -8, 7, seed)
        assert_same_bits(y, x)


def test_reproducible_and_different_by_seed() -> None:
    x = torch.randn(100)
    args = (SCALE, torch.tensor([0]), -128, 127)
    first = fake_quantize_stochastic(x, *args, 1)
    assert_same_bits(fake_quantize_stochastic(x, *args, 1), first)
    assert_same_bits(fake_quantize_stochastic(x, *args, torch.tensor([1, 0])), first)
    for other in (2, torch.tensor([1, 1])):
        assert not torch.equal(fake_quantize_stochastic(x, *args, other), first)


@pytest.mark.parametrize("value", [0.03, 0.549, -0.7112, 1e-4])
def test_unbiased(value: float) -> None:
    count = 100_000
    x = torch.full((count,), value, dtype=torch.float64)
    y = fake_quantize_stochastic(x, SCALE, torch.tensor([0]), -128, 127, 3)
    assert set(y.unique().tolist()) == {k * SCALE.double().item() for k in (value // 0.1, value // 0.1 + 1)}
    assert abs(y.mean() - value) < 5 * y.std() / count**0.5


@settings(deadline=None, derandomize=True, max_examples=30)
@given(
    shape=st.lists(st.integers(0, 5), max_size=4),
    order=st.randoms(use_true_random=False),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_layout_does_not_matter(shape: list[int], order: object, seed: int) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    dims = list(range(len(shape)))
    order.shuffle(dims)  # type: ignore[attr-defined]
    back = [dims.index(d) for d in range(len(dims))]
    other = x.permute(dims).contiguous().permute(back)
    for call in (
        lambda t: fake_quantize_stochastic(t, SCALE, POINT, 0, 15, seed),
        lambda t: fake_quantize_float(t, seed=seed),
        lambda t: fake_quantize_mx(t, {-1: 2}, "e2m1", seed=seed) if t.dim() else t,
        lambda t: uniform(seed, t),
    ):
        assert_same_bits(call(other), call(x))


@pytest.mark.parametrize("axis", [None, 1], ids=["tensor", "axis"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_gradient_passes_where_the_code_lies_in_the_range(dtype: torch.dtype, axis: int | None) -> None:
    base = torch.cat([torch.linspace(-1, 3, 300), torch.tensor([NAN, INF, -INF])])
    x = torch.stack([base, base], dim=1).to(dtype).requires_grad_()
    scale, point = (SCALE, POINT) if axis is None else (torch.tensor([0.1, 0.2]), torch.tensor([3, 0]))
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    y = fake_quantize_stochastic(x, scale, point, 0, 15, 4, axis=axis)
    (got,) = torch.autograd.grad(y, x, grad)
    # A range so wide that nothing clips shows the code itself.
    wide = fake_quantize_stochastic(x.detach().double(), scale, point, -(2**20), 2**20, 4, axis=axis)
    code = (wide / scale.double()).round() + point
    inside = (code >= 0) & (code <= 15) & x.detach().isfinite()
    assert torch.equal(got, torch.where(inside, grad, 0.0))
    assert 0 < inside.sum() < inside.numel()


def test_second_derivative() -> None:
    x = torch.tensor([0.33, 5.0], dtype=torch.float64).requires_grad_()
    y = fake_quantize_stochastic(x, SCALE, POINT, 0, 15, 4)
    (first,) = torch.autograd.grad((y**2).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert torch.equal(second, torch.tensor([2.0, 0.0], dtype=torch.float64))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_gives_the_bits_of_eager(backend: str) -> None:
    def step(x: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
        y = fake_quantize_stochastic(x, SCALE, POINT, 0, 15, seed)
        return y, fake_quantize_stochastic(x.t(), SCALE, POINT, 0, 15, seed + 1)

    x = torch.randn(8, 9, generator=torch.Generator().manual_seed(0))
    torch._dynamo.reset()
    compiled = torch.compile(step, backend=backend, fullgraph=True)
    for seed in (torch.tensor([0, 0]), torch.tensor([-5, 2**40])):
        found = []
        for function in (compiled, step):
            leaf = x.clone().requires_grad_()
            outputs = function(leaf, seed)
            found.append([*outputs, *torch.autograd.grad([o.sum() for o in outputs], leaf)])
        for got, expected in zip(*found, strict=True):
            assert_same_bits(got, expected)


def test_a_seed_tensor_does_not_recompile() -> None:
    torch._dynamo.reset()
    graphs = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        graphs.append(gm)
        return gm

    compiled = torch.compile(lambda x, seed: fake_quantize_float(x, seed=seed), backend=backend, fullgraph=True)
    x = torch.randn(50)
    drawn = [compiled(x, torch.tensor([7, step])) for step in range(4)]
    assert len(graphs) == 1
    assert not torch.equal(drawn[0], drawn[1])


def test_as_seed() -> None:
    x = torch.empty(1)
    assert as_seed(-3, x).tolist() == [-3, 0]
    seed = torch.tensor([1, 2])
    assert as_seed(seed, x) is seed


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: uniform(torch.zeros(2), x), InvalidArgument, r"`seed` must be an int64 tensor .*got Float of shape"),
        (lambda x: uniform(torch.tensor([1]), x), InvalidArgument, r"`seed` must be .*got Long of shape \(1,\)"),
        (lambda x: uniform(-(2**63) - 1, x), InvalidArgument, r"`seed` must fit in a signed 64-bit integer: got -9"),
        (lambda x: fake_quantize_stochastic(x, SCALE, POINT, 5, 4, 0), RuntimeError, "`quant_min` should be less"),
        (
            lambda x: fake_quantize_stochastic(x, SCALE, POINT, 0, 15, 0, axis=1),
            RuntimeError,
            "got 1 of each for 3 slices of axis 1",
        ),
        (lambda x: fake_quantize_stochastic(x.int(), SCALE, POINT, 0, 15, 0), RuntimeError, "`input` must be a float"),
        (
            lambda x: fake_quantize_stochastic(x, SCALE.double(), POINT, 0, 15, 0),
            RuntimeError,
            "Scale must be Float or BFloat16",
        ),
    ],
)
def test_errors(call: Callable[[Tensor], Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(torch.zeros(2, 3))
