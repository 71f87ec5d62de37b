"""The fused moving-average observer equals torch's, step by step; what differs on purpose is asserted to differ."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from fxquant.numerics.observe import SMALLEST_SCALE, choose_qparams
from fxquant.ops.fake_quantize import fake_quantize_per_tensor_affine
from fxquant.ops.observe import fused_moving_avg_obs_fake_quant, moving_avg_obs_fake_quant
from tests.ops.cases_learnable import OBSERVE_CASES, decomposing
from tests.ops.oracle import assert_same_bits

INF, NAN = float("inf"), float("nan")
CODES = {
    "u8": (0, 255),
    "s8": (-128, 127),
    "s8 narrow": (-127, 127),
    "u4": (0, 15),
    "s4": (-8, 7),
    "s2": (-2, 1),
    "three codes": (-1, 1),
    "above 0": (5, 9),
    "below 0": (-20, -3),
    "s16": (-32768, 32767),
    "u16": (0, 65535),
}
ON, OFF = torch.tensor([1]), torch.tensor([0])
State = tuple[Tensor, Tensor, Tensor, Tensor]


def fresh(count: int = 1) -> State:
    return (
        torch.full((count,), INF),
        torch.full((count,), -INF),
        torch.ones(count),
        torch.zeros(count, dtype=torch.int32),
    )


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def batches() -> dict[str, list[Tensor]]:
    """Steps of [3, 4, 5] inputs, each kind a range of its own."""
    plain = [random(3, 4, 5, seed=i) * (1 + i) for i in range(12)]
    found = {
        "plain": plain,
        "all positive": [x.abs() + 0.1 for x in plain],
        "all negative": [-x.abs() - 0.1 for x in plain],
        "zeros": [torch.zeros(3, 4, 5), -torch.zeros(3, 4, 5), *plain[:2]],
        "constant": [torch.full((3, 4, 5), 0.7), torch.full((3, 4, 5), -0.7)],
        "integers": [(x * 30).round() / 2 for x in plain],
    }
    for size in (1e-45, 1e-39, 1e-37, 1e-6, 1e-4, 1e-3, 1e30, 1e38):
        found[f"{size}"] = [(x * size).clamp(-3.4e38, 3.4e38) for x in plain[:4]]
        found[f"{size} positive"] = [(x.abs() * size).clamp(max=3.4e38) for x in plain[:2]]
        found[f"{size} negative"] = [(x.abs() * -size).clamp(min=-3.4e38) for x in plain[:2]]
    found["mixed sizes"] = [x * size for x, size in zip(plain, (1.0, 1e-6, 1e3, 1e-9, 0.0, 1e9), strict=False)]
    return found


def run(
    function: Callable[..., Tensor], steps: Iterable[Tensor], state: State, *args: Any, **kwargs: Any
) -> list[Tensor]:
    """Outputs, gradients and states after each step."""
    found = []
    for x in steps:
        leaf = x.clone().requires_grad_()
        y = function(leaf, ON, ON, *state, *args, **kwargs)
        (grad,) = torch.autograd.grad(y, leaf, random(*x.shape, seed=99))
        found += [y.detach(), grad, *(tensor.clone() for tensor in state)]
    return found


@pytest.mark.parametrize("symmetric", [False, True], ids=["affine", "symmetric"])
@pytest.mark.parametrize("per_row", [False, True], ids=["tensor", "rows"])
@pytest.mark.parametrize("codes", CODES)
def test_equals_torch(codes: str, per_row: bool, symmetric: bool) -> None:
    low, high = CODES[codes]
    for steps in batches().values():
        count = 3 if per_row else 1
        args = (0.1, low, high, 0, per_row, symmetric)
        got = run(fused_moving_avg_obs_fake_quant, steps, fresh(count), *args)
        expected = run(torch.fused_moving_avg_obs_fake_quant, steps, fresh(count), *args)
        for ours, theirs in zip(got, expected, strict=True):
            assert_same_bits(ours, theirs)


@pytest.mark.parametrize("constant", [0.01, 1 / 3, 0.0, 1.0])
def test_many_steps_equal_torch(constant: float) -> None:
    steps = [random(8, 4, seed=i) + i / 50 for i in range(100)]
    for per_row in (False, True):
        args = (constant, 0, 255, 0, per_row, False)
        got = run(fused_moving_avg_obs_fake_quant, steps, fresh(8 if per_row else 1), *args)
        expected = run(torch.fused_moving_avg_obs_fake_quant, steps, fresh(8 if per_row else 1), *args)
        for ours, theirs in zip(got, expected, strict=True):
            assert_same_bits(ours, theirs)


def hard_ranges(count: int) -> tuple[Tensor, Tensor]:
    """Ranges of all sizes, of ties in the zero point, around torch's smallest scale, and of special ends."""
    generator = torch.Generator().manual_seed(1)

    def uniform() -> Tensor:
        return torch.rand(count, generator=generator)

    wild = [random(count, seed=s) * 10 ** (uniform() * 80 - 43) for s in (1, 2)]
    near = wild[0] * (1 + random(count, seed=3) * 0.3)
    tiny = [6.1e-5 * 600 * uniform() for _ in range(2)]
    halves = [torch.randint(-300, 300, (count,), generator=generator) / 2 for _ in range(2)]
    ends = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-38, -1e-38, 1.0, -1.0, 1e30, 3.4e38, -3.4e38])
    first, second = (grid.flatten() for grid in torch.meshgrid(ends, ends, indexing="ij"))
    low = torch.cat([wild[0], wild[0], wild[0], -tiny[0], -tiny[0], 0 * tiny[0], halves[0], first])
    high = torch.cat([wild[1], near, wild[0], tiny[1], 0 * tiny[1], tiny[1], halves[1], second])
    finite = low.isfinite() & high.isfinite()
    low, high = low[finite], high[finite]
    return torch.minimum(low, high), torch.maximum(low, high)


@pytest.mark.parametrize("symmetric", [False, True], ids=["affine", "symmetric"])
@pytest.mark.parametrize("codes", CODES)
def test_qparams_equal_torch(codes: str, symmetric: bool) -> None:
    quant_min, quant_max = CODES[codes]
    low, high = hard_ranges(3000)
    scale, point = torch.ones_like(low), torch.zeros_like(low, dtype=torch.int32)
    torch.fused_moving_avg_obs_fake_quant(
        torch.zeros(len(low), 1), OFF, ON, low, high, scale, point, 0.1, quant_min, quant_max, 0, True, symmetric
    )
    got = choose_qparams(low, high, quant_min, quant_max, symmetric)
    assert_same_bits(got[0], scale)
    assert_same_bits(got[1], point)


def test_smallest_scale_is_6_1e_5_in_float32() -> None:
    assert torch.tensor(6.1e-5).item() == SMALLEST_SCALE


@pytest.mark.parametrize("observe", [0, 1])
@pytest.mark.parametrize("quantize", [0, 1])
@pytest.mark.parametrize("known", [False, True], ids=["unset", "set"])
def test_switches_equal_torch(known: bool, quantize: int, observe: int) -> None:
    x = random(4, 5) * 3
    for per_row in (False, True):
        results = []
        for function in (fused_moving_avg_obs_fake_quant, torch.fused_moving_avg_obs_fake_quant):
            state = fresh(4 if per_row else 1)
            if known:
                state[0].fill_(-1.0), state[1].fill_(1.5)
            leaf = x.clone().requires_grad_()
            switches = torch.tensor([observe]), torch.tensor([quantize])
            y = function(leaf, *switches, *state, 0.1, -8, 7, 0, per_row)
            (grad,) = torch.autograd.grad(y, leaf, random(4, 5, seed=1))
            results.append([y.detach(), grad, *state])
        for ours, theirs in zip(*results, strict=True):
            assert_same_bits(ours, theirs)


def test_switches_and_state_may_change_before_the_backward() -> None:
    state, on = fresh(), torch.tensor([1])
    leaf = random(5).requires_grad_()
    y = fused_moving_avg_obs_fake_quant(leaf, ON, on, *state, 0.1, 0, 15, 0)
    for tensor in (*state, on):
        tensor.zero_()
    y.sum().backward()
    assert torch.equal(leaf.grad, torch.ones(5))
    assert not any(tensor.requires_grad for tensor in state)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_any_axis(axis: int) -> None:
    """As torch on axis 0 of the tensor turned round."""
    x = random(3, 4, 5)
    state, torch_state = fresh(x.shape[axis]), fresh(x.shape[axis])
    got = fused_moving_avg_obs_fake_quant(x, ON, ON, *state, 0.1, 0, 255, axis, True)
    turned = x.movedim(axis, 0).contiguous()
    expected = torch.fused_moving_avg_obs_fake_quant(turned, ON, ON, *torch_state, 0.1, 0, 255, 0, True)
    for ours, theirs in zip((got, *state), (expected.movedim(0, axis), *torch_state), strict=True):
        assert_same_bits(ours, theirs)


def test_one_dimensional_rows_and_number_shaped_state() -> None:
    x = random(6)
    state = fresh(6)
    fused_moving_avg_obs_fake_quant(x, ON, ON, *state, 0.1, 0, 255, 0, True)
    assert torch.equal(state[0], x) and torch.equal(state[1], x)
    low, high, scale, point = fresh()
    for point_dtype in (torch.int32, torch.int64):
        numbers = low.reshape(()), high.reshape(()), scale.clone(), point.to(point_dtype)
        torchs = tuple(t.clone() for t in numbers)
        y = fused_moving_avg_obs_fake_quant(x, ON, ON, *numbers, 0.1, 0, 255, 0)
        assert_same_bits(y, torch.fused_moving_avg_obs_fake_quant(x, ON, ON, *torchs, 0.1, 0, 255, 0))
        for ours, theirs in zip(numbers, torchs, strict=True):
            assert_same_bits(ours, theirs)


def test_empty_input_changes_nothing() -> None:
    for per_row in (False, True):
        state = fresh(3 if per_row else 1)
        before = [t.clone() for t in state]
        y = fused_moving_avg_obs_fake_quant(torch.empty(3, 0), ON, ON, *state, 0.1, 0, 255, 0, per_row)
        assert y.shape == (3, 0)
        assert all(torch.equal(now, then) for now, then in zip(state, before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes(dtype: torch.dtype) -> None:
    x = random(4, 5).to(dtype)
    state, single = fresh(), fresh()
    y = fused_moving_avg_obs_fake_quant(x, ON, ON, *state, 0.1, 0, 255, 0)
    fused_moving_avg_obs_fake_quant(x.float(), ON, ON, *single, 0.1, 0, 255, 0)
    for ours, theirs in zip(state, single, strict=True):
        assert_same_bits(ours, theirs)
    assert_same_bits(y, torch.fake_quantize_per_tensor_affine(x, state[2], state[3], 0, 255))


@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize("known", [False, True], ids=["unset", "set"])
def test_non_finite_batch_keeps_the_range(known: bool, value: float) -> None:
    """torch keeps a NaN in the range for ever, and forgets the range after an infinity."""
    x = torch.stack([torch.tensor([value, 0.5, 2.0]), torch.tensor([0.25, 0.5, 2.0])])
    good = random(2, 3)
    state, torch_state = fresh(), fresh()
    if known:
        for function, of in (
            (fused_moving_avg_obs_fake_quant, state),
            (torch.fused_moving_avg_obs_fake_quant, torch_state),
        ):
            function(good, ON, ON, *of, 0.1, 0, 255, 0)
    before = [t.clone() for t in state]
    y = fused_moving_avg_obs_fake_quant(x, ON, ON, *state, 0.1, 0, 255, 0)
    assert torch.equal(state[0], before[0]) and torch.equal(state[1], before[1])
    assert state[2].item() == (before[2].item() if known else torch.tensor(0.1).item())
    assert_same_bits(y, fake_quantize_per_tensor_affine(x, state[2], state[3], 0, 255))
    torch.fused_moving_avg_obs_fake_quant(x, ON, ON, *torch_state, 0.1, 0, 255, 0)
    assert not (torch_state[0].isfinite() & torch_state[1].isfinite()).item()

    rows = fresh(2)
    fused_moving_avg_obs_fake_quant(x, ON, ON, *rows, 0.1, 0, 255, 0, True)
    assert rows[0].tolist() == [INF, 0.25] and rows[1].tolist() == [-INF, 2.0]


def test_nan_range_has_nan_scale_and_the_lowest_code() -> None:
    scale, point = choose_qparams(torch.tensor([NAN]), torch.tensor([1.0]), -8, 7, False)
    assert scale.isnan().all() and point.tolist() == [-8]


@pytest.mark.parametrize("per_row", [False, True], ids=["tensor", "rows"])
def test_delayed(per_row: bool) -> None:
    """The state goes on as without, each output uses the state of the step before."""
    state, plain = fresh(4 if per_row else 1), fresh(4 if per_row else 1)
    for i in range(6):
        x = (random(4, 5, seed=i) * (i + 1)).requires_grad_()
        entry = [t.clone() for t in plain]
        y = fused_moving_avg_obs_fake_quant(x, ON, ON, *state, 0.1, 0, 15, 0, per_row, delayed=True)
        fused_moving_avg_obs_fake_quant(x, ON, ON, *plain, 0.1, 0, 15, 0, per_row)
        for ours, theirs in zip(state, plain, strict=True):
            assert_same_bits(ours, theirs)
        _, _, scale, point = plain if i == 0 else entry
        leaf = x.detach().requires_grad_()
        if per_row:
            expected = torch.fake_quantize_per_channel_affine(leaf, scale, point, 0, 0, 15)
        else:
            expected = torch.fake_quantize_per_tensor_affine(leaf, scale, point, 0, 15)
        assert_same_bits(y, expected)
        grads = [torch.autograd.grad(out.sum(), of)[0] for out, of in ((y, x), (expected, leaf))]
        assert_same_bits(*grads)


def test_functional_form_leaves_the_state_alone() -> None:
    x, state, again = random(4, 5), fresh(), fresh()
    found = moving_avg_obs_fake_quant(x, ON, ON, *state, 0.1, 0, 255, 0)
    assert state[0].item() == INF and state[2].item() == 1.0
    y = fused_moving_avg_obs_fake_quant(x, ON, ON, *again, 0.1, 0, 255, 0)
    for ours, theirs in zip(found, (y, *again), strict=True):
        assert_same_bits(ours, theirs)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_equals_eager(backend: str) -> None:
    """No graph break, no recompilation for switches and state, the same bits and the same state written in place."""

    def step(x: Tensor, observer_on: Tensor, fake_quant_on: Tensor, rows: State, whole: State) -> tuple[Tensor, Tensor]:
        y = fused_moving_avg_obs_fake_quant(x, observer_on, fake_quant_on, *rows, 0.1, -8, 7, 1, True, True)
        return y, fused_moving_avg_obs_fake_quant(
            y * 1.5, observer_on, fake_quant_on, *whole, 0.1, 0, 255, 0, delayed=True
        )

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(step, backend=decomposing if backend == "inductor" else backend, fullgraph=True)
    states = [(fresh(4), fresh()) for _ in range(2)]
    for i, (observe, quantize) in enumerate([(1, 0), (1, 1), (1, 1), (0, 1), (0, 0), (1, 1)]):
        results = []
        for function, state in zip((compiled, step), states, strict=True):
            x = (random(3, 4, 5, seed=i) * 10.0 ** (i - 3)).requires_grad_()
            outputs = function(x, torch.tensor([observe]), torch.tensor([quantize]), *state)
            outputs[1].sum().backward()
            results.append([*(y.detach() for y in outputs), x.grad, *state[0], *state[1]])
        for got, expected in zip(*results, strict=True):
            assert_same_bits(got, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("case", OBSERVE_CASES, ids=str)
def test_opcheck(case: Any) -> None:
    x = random(*case.shape).to(case.dtypes[0]).requires_grad_("input" in case.grads)
    torch.library.opcheck(case.op, case.args(x), case.kwargs)


CALL = {
    "input": torch.zeros(2, 3),
    "observer_on": ON,
    "fake_quant_on": ON,
    "running_min": torch.tensor([INF]),
    "running_max": torch.tensor([-INF]),
    "scale": torch.ones(1),
    "zero_point": torch.zeros(1, dtype=torch.int32),
    "averaging_const": 0.1,
    "quant_min": 0,
    "quant_max": 255,
    "ch_axis": 0,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": torch.zeros(2, dtype=torch.int64)}, "`input` must be a floating-point tensor: got Long"),
        ({"quant_min": 5, "quant_max": 4}, "`quant_min` should be less than or equal to `quant_max`: got 5 and 4"),
        ({"quant_max": 0}, r"`quant_max` must be at least quant_min \+ 1, or no scale exists: got 0 and 0"),
        ({"quant_max": 1, "symmetric_quant": True}, r"at least quant_min \+ 2 with symmetric_quant.*got 0 and 1"),
        ({"quant_max": 2**31}, "must fit in int32: got 0 and 2147483648"),
        ({"scale": torch.ones(2)}, r"`scale` must be a 1-element tensor: got shape \(2,\)"),
        ({"scale": torch.ones(1).double()}, r"`scale` must be Float: got Double. Use scale.float\(\)"),
        ({"running_min": torch.zeros(1).half()}, "`running_min` must be Float: got Half"),
        ({"zero_point": torch.zeros(1)}, "`zero_point` must be Int or Long: got Float"),
        ({"observer_on": torch.zeros(2)}, "`observer_on` must be a 1-element tensor"),
        ({"fake_quant_on": torch.zeros(0)}, "`fake_quant_on` must be a 1-element tensor"),
        ({"per_row_fake_quant": True}, r"`running_min` must have one element for each of the 2 slices of .* got 1"),
        ({"per_row_fake_quant": True, "running_min": torch.tensor(1.0)}, r"`running_min` must be a 1-D tensor"),
        ({"per_row_fake_quant": True, "ch_axis": 2}, "`ch_axis` must be between 0 and the number .* got 2 of 2"),
        ({"per_row_fake_quant": True, "ch_axis": -1}, "`ch_axis` must be between 0 and"),
    ],
)  # fmt: skip
def test_errors(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        fused_moving_avg_obs_fake_quant(**{**CALL, **change})
