from __future__ import annotations

import gc
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._inductor.utils import run_and_get_code

from fxquant import ops
from fxquant.backend.inductor import lowerings
from fxquant.ops import affine_qparams, update_min_max
from fxquant.ops.fake_quantize import PER_TENSOR
from fxquant.ops.qparams import NOTHING_SEEN, ONLY_ZEROS
from fxquant.ops.saved import CLIP_MASK, PACK_PLANES, UNPACK_PLANES
from fxquant.passes.base import PassResult
from fxquant.passes.post_grad.lower_fake_quantize import LowerFakeQuantize
from fxquant.support.patches import DTYPE_RULES
from tests.ops.oracle import assert_same_bits, hard_values


@dataclass(frozen=True)
class Batch:
    name: str
    values: tuple[float, ...]
    low: float
    high: float

    def __str__(self) -> str:
        return self.name


BATCHES = (
    Batch("ordinary", (-1.0, 0.3, 2.7), -0.5, 1.5),
    Batch("first", (-1.0, 0.3, 2.7), math.nan, math.nan),
    Batch("positive", (0.1, 0.3), 0.2, 0.4),
    Batch("zeros", (0.0, -0.0), 0.0, 0.0),
    Batch("first zeros", (0.0, -0.0), NOTHING_SEEN, -NOTHING_SEEN),
    Batch("after zeros", (0.1, 0.3), ONLY_ZEROS, -ONLY_ZEROS),
    Batch("nan", (math.nan, 1.0), -1.0, 1.0),
    Batch("infinite", (math.inf, 1.0), -1.0, 1.0),
    Batch("huge", (-3.4e38, 3.4e38), -3.4e38, 3.4e38),
    Batch("subnormal", (-1e-40, 1e-45), -1e-40, 1e-45),
)


def observe(x: Tensor, low: Tensor, high: Tensor, symmetric: bool) -> tuple[Tensor, Tensor]:
    """One step of a site: the range is updated, in place too, and gives scale and zero point."""
    new_low, new_high = update_min_max(x, low, high, 0.01)
    low.copy_(new_low)
    high.copy_(new_high)
    return affine_qparams(new_low, new_high, 0, 255, symmetric)


@pytest.fixture(scope="module")
def compiled() -> object:
    return torch.compile(observe, backend="fxquant", options={"recipe": None}, dynamic=False)


@pytest.mark.parametrize("symmetric", [False, True], ids=["affine", "symmetric"])
@pytest.mark.parametrize("batch", BATCHES, ids=str)
def test_a_site_has_the_bits_of_eager(compiled: object, batch: Batch, symmetric: bool) -> None:
    x = torch.tensor(batch.values).repeat(12)[:24]
    found = []
    for run in (observe, compiled):
        state = torch.tensor([batch.low]), torch.tensor([batch.high])
        found.append((*run(x, *state, symmetric), *state))  # type: ignore[operator]
    for ours, eager in zip(*found, strict=True):
        assert_same_bits(ours, eager)


@pytest.mark.parametrize("last", [0.5, math.nan, -math.inf], ids=str)
def test_a_range_taken_in_two_threads_has_the_bits_of_eager(last: float) -> None:
    x = torch.randn(1 << 15, generator=torch.Generator().manual_seed(0))
    x[-1] = last
    threads = torch.get_num_threads()
    torch._dynamo.reset()
    run = torch.compile(observe, backend="fxquant", options={"recipe": None}, dynamic=False)
    found = []
    try:
        torch.set_num_threads(2)
        with torch._inductor.config.patch(force_disable_caches=True):
            for step in (observe, run):
                state = torch.tensor([-1.0]), torch.tensor([1.0])
                results, code = run_and_get_code(lambda step=step, state=state: step(x, *state, False))
                found.append((*results, *state))
    finally:
        torch.set_num_threads(threads)
    assert "#pragma omp parallel" in code[0]
    for ours, eager in zip(found[1], found[0], strict=True):
        assert_same_bits(ours, eager)


def test_nothing_but_results_is_stored() -> None:
    """Two extremes, scale and zero point; as one node for each operation it was 26 buffers."""
    torch._dynamo.reset()
    run = torch.compile(observe, backend="fxquant", options={"recipe": None})
    state = torch.tensor([-1.0]), torch.tensor([1.0])
    _, (code,) = run_and_get_code(lambda: run(torch.randn(64), *state, False))
    assert code.count("= empty_strided_cpu(") == 4


def and_the_old_range(x: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, ...]:
    new_low, new_high = update_min_max(x, low, high, 0.01)
    reach = high - low
    low.copy_(new_low)
    high.copy_(new_high)
    return reach, new_low, new_high


def crossed(x: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, ...]:
    new_low, new_high = update_min_max(x, low, high, 0.01)
    low.copy_(new_high)
    high.copy_(new_low)
    return new_low, new_high


def one_of_two(x: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, ...]:
    new_low, new_high = update_min_max(x, low, high, 0.01)
    high.copy_(new_high)
    return low + new_low, new_high


def test_a_range_that_is_given_back_is_no_part_of_the_state() -> None:
    def update(x: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, ...]:
        new_low, new_high = update_min_max(x, low, high, 0.01)
        low.copy_(new_low)
        high.copy_(new_high)
        return new_low, new_high.view(1, 1)

    x = torch.randn(64, generator=torch.Generator().manual_seed(0))
    torch._dynamo.reset()
    state = torch.tensor([-1.0]), torch.tensor([1.0])
    found = torch.compile(update, backend="fxquant", options={"recipe": None})(x, *state)
    kept = [t.clone() for t in found]
    for tensor in state:
        tensor.zero_()
    for ours, known in zip(found, kept, strict=True):
        assert_same_bits(ours, known)


@pytest.mark.parametrize("step", [and_the_old_range, crossed, one_of_two], ids=lambda step: step.__name__)
def test_a_range_that_is_read_otherwise_is_not_overwritten_early(step: Callable[..., tuple[Tensor, ...]]) -> None:
    x = torch.randn(64, generator=torch.Generator().manual_seed(0))
    torch._dynamo.reset()
    found = []
    for run in (step, torch.compile(step, backend="fxquant", options={"recipe": None})):
        state = torch.tensor([-1.0]), torch.tensor([1.0])
        found.append((*run(x, *state), *state))
    for ours, eager in zip(found[1], found[0], strict=True):
        assert_same_bits(ours, eager)


OPEN_OR_NOT = pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
QUANTIZED = torch.tensor([0.3]), torch.tensor([3], dtype=torch.int32)
CHANNELS = torch.tensor([0.3, 0.01, 5.0]), torch.tensor([3, 0, 15], dtype=torch.int32)


def every_form(x: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
    """A call of each operator that Inductor lowers whole, in both roundings."""
    s, z = QUANTIZED
    of_tensor = [ops.fake_quantize_per_tensor_affine(x, s, z, 0, 15, rounding=r) for r in ("divide", "reciprocal")]
    of_rows = [
        ops.fake_quantize_per_channel_affine(rows, *CHANNELS, 0, 0, 15, rounding=r) for r in ("divide", "reciprocal")
    ]
    codes = ops.quantize_per_tensor(x, s, z, 0, 15, torch.uint8, rounding="divide")
    row_codes = ops.quantize_per_channel(rows, *CHANNELS, 0, 0, 15, torch.uint8, rounding="divide")
    back = ops.dequantize_per_tensor(codes, s, z), ops.dequantize_per_channel(row_codes, *CHANNELS, 0)
    mask = CLIP_MASK(x, s, z, 0, 15, rounding="divide")
    planes = PACK_PLANES(mask, 1, 0)
    return *of_tensor, *of_rows, codes, row_codes, *back, mask, planes, UNPACK_PLANES(planes, 1, 0)


@OPEN_OR_NOT
def test_fake_quants_lowered_whole_have_the_bits_of_eager(dynamic: bool) -> None:
    values = hard_values(0.3, 0, 15)
    x = values[: len(values) // 24 * 24]
    inputs = [(each, each.reshape(3, -1)) for each in (x, x.bfloat16(), x.double())]

    def of_each_dtype(inputs: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, ...]]:
        return [every_form(x, rows) for x, rows in inputs]

    torch._dynamo.reset()
    compiled = torch.compile(of_each_dtype, backend="fxquant", options={"recipe": None}, dynamic=dynamic)
    for found, expected in zip(compiled(inputs), of_each_dtype(inputs), strict=True):
        for ours, eager in zip(found, expected, strict=True):
            assert ours.dtype == eager.dtype
            assert_same_bits(ours, eager)


def test_a_fake_quant_of_a_view_is_lowered_whole() -> None:
    """Arithmetic is traced on dense tensors, whatever the strides of those that it is then applied to."""
    x = torch.randn(8, 6)

    def moved(x: Tensor) -> Tensor:
        return ops.fake_quantize_per_channel_affine(x.t()[2:5, ::2] * 1.5, *CHANNELS, 0, 0, 15, rounding="divide").t()

    torch._dynamo.reset()
    compiled = torch.compile(moved, backend="fxquant", options={"recipe": None}, dynamic=False)
    assert_same_bits(compiled(x), moved(x))


@OPEN_OR_NOT
def test_the_compiler_behind_meets_no_arithmetic(monkeypatch: pytest.MonkeyPatch, dynamic: bool) -> None:
    seen: list[set[object]] = []
    rewrite = LowerFakeQuantize.rewrite

    def watched(self: LowerFakeQuantize, gm: fx.GraphModule, result: PassResult) -> int:
        done = rewrite(self, gm, result)
        if self.where == "post-grad":
            seen.append({node.target for node in gm.graph.nodes})
        return done

    monkeypatch.setattr(LowerFakeQuantize, "rewrite", watched)
    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        compiled = torch.compile(
            lambda x: ops.fake_quantize_per_tensor_affine(x, *QUANTIZED, 0, 15, rounding="divide"),
            backend="fxquant",
            options={"recipe": None},
            dynamic=dynamic,
        )
        x = torch.randn(40, 3)
        assert_same_bits(compiled(x), ops.fake_quantize_per_tensor_affine(x, *QUANTIZED, 0, 15, rounding="divide"))
    assert [PER_TENSOR in targets for targets in seen] == [True]
    assert [torch.ops.aten.round.default in targets for targets in seen] == [False]


@dataclass(frozen=True)
class Layout:
    """A mask's memory: what is compared is a view of a contiguous tensor."""

    name: str
    size: tuple[int, ...]
    view: Callable[[Tensor], Tensor]

    def __str__(self) -> str:
        return self.name


LAYOUTS = (
    Layout("rows", (16, 24), lambda x: x),
    Layout("columns", (3, 48), lambda x: x),
    Layout("vector", (80,), lambda x: x),
    Layout("slice", (4, 16, 96), lambda x: x[..., 32:64]),
    Layout("heads", (4, 16, 48), lambda x: x.view(-1, 16, 3, 16).transpose(1, 2)),
    Layout("channels last", (2, 16, 4, 8), lambda x: x.contiguous(memory_format=torch.channels_last)),
    Layout("size 1", (1, 8, 1, 20), lambda x: x),
)


def test_bodies_of_open_sizes_are_forgotten_with_their_graph() -> None:
    """A symbol means something in one graph only, and holds all that is known of that graph's sizes."""

    def quantized(x: Tensor) -> Tensor:  # torch's reciprocal is taken of ones in the shape of the scale
        return ops.fake_quantize_per_channel_affine(x, *CHANNELS, 0, 0, 15)

    torch._dynamo.reset()
    compiled = torch.compile(quantized, backend="fxquant", options={"recipe": None}, dynamic=True)
    most = 0
    traced = lowerings._traced

    def watched(*args: Any) -> fx.Graph:
        nonlocal most
        body = traced(*args)
        most = max(most, len(lowerings._OPEN))
        return body

    with torch._inductor.config.patch(force_disable_caches=True), pytest.MonkeyPatch.context() as patch:
        patch.setattr(lowerings, "_traced", watched)
        for columns in (7, 12):
            x = torch.randn(3, columns, generator=torch.Generator().manual_seed(columns))
            assert_same_bits(compiled(x), quantized(x))
    gc.collect()
    assert most > 0 and len(lowerings._OPEN) == 0


def test_one_body_serves_all_sizes() -> None:
    """Of a fake-quant, sizes tell what broadcasts, and nothing else."""
    lowerings._traced_for_all.cache_clear()
    lowerings._traced_once.cache_clear()

    def quantized(x: Tensor) -> Tensor:
        return ops.fake_quantize_per_channel_affine(x, *CHANNELS, 0, 0, 15, rounding="divide")

    for columns, dynamic in ((7, False), (12, False), (9, True)):
        torch._dynamo.reset()
        compiled = torch.compile(quantized, backend="fxquant", options={"recipe": None}, dynamic=dynamic)
        x = torch.randn(3, columns, generator=torch.Generator().manual_seed(columns))
        with torch._inductor.config.patch(force_disable_caches=True):
            assert_same_bits(compiled(x), quantized(x))
    assert lowerings._traced_once.cache_info().misses == 1


def test_arithmetic_whose_graph_holds_sizes_is_traced_for_each() -> None:
    for channels in (2, 3, 5):
        scale, zero_point = torch.linspace(0.05, 0.2, channels), torch.arange(channels, dtype=torch.int32)

        def quantized(x: Tensor, scale: Tensor = scale, zero_point: Tensor = zero_point) -> Tensor:
            return ops.fake_quantize_per_channel_affine(x, scale, zero_point, 0, 0, 15)

        torch._dynamo.reset()
        compiled = torch.compile(quantized, backend="fxquant", options={"recipe": None}, dynamic=False)
        x = torch.randn(channels, 4, generator=torch.Generator().manual_seed(channels))
        assert_same_bits(compiled(x), quantized(x))


def test_a_loop_reads_its_input_once() -> None:
    """A fake-quant compares and selects its code: two readers, of what a loop computes once."""
    from torch._inductor.loop_body import LoopBody

    counts = []
    init = LoopBody.__init__

    def watched(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        counts.append(sum(node.target == "sigmoid" for node in self.root_block.graph.nodes))

    def quantized(x: Tensor) -> Tensor:
        return ops.fake_quantize_per_tensor_affine(x.sigmoid(), 0.1, 0, 0, 15, rounding="divide")

    torch._dynamo.reset()
    compiled = torch.compile(quantized, backend="fxquant", options={"recipe": None})
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    with torch._inductor.config.patch(force_disable_caches=True), pytest.MonkeyPatch.context() as patch:
        patch.setattr(LoopBody, "__init__", watched)
        assert_same_bits(compiled(x), quantized(x))
    assert set(counts) == {1}


@pytest.mark.parametrize(
    ("layout", "is_open"),
    [
        pytest.param(layout, is_open, id=f"{layout}-{'open batch' if is_open else 'static'}")
        for layout in LAYOUTS
        for is_open in (False, True)
        if not is_open or (len(layout.size) > 1 and layout.size[0] > 1)
    ],
)
def test_masks_are_packed_in_a_loop_over_planes(layout: Layout, is_open: bool) -> None:
    """Their arithmetic is generated once, not once a plane."""

    def step(a: Tensor, b: Tensor) -> Tensor:
        x = layout.view(a @ b)
        return ops.fake_quantize_per_tensor_affine(x, *QUANTIZED, 0, 15, rounding="divide").square()

    generator = torch.Generator().manual_seed(0)
    a = torch.randn(*layout.size[:-1], 8, generator=generator)
    b = torch.randn(8, layout.size[-1], generator=generator)
    torch._dynamo.reset()
    compiled = torch.compile(step, backend="fxquant", options={"recipe": None}, dynamic=None if is_open else False)
    found = []
    for run in (step, compiled):
        x = a.clone().requires_grad_()
        if is_open:
            torch._dynamo.mark_dynamic(x, 0)
        with torch._inductor.config.patch(force_disable_caches=True):
            (out, grad), code = run_and_get_code(
                lambda run=run, x=x: (y := run(x, b), *torch.autograd.grad(y.sum(), x))
            )
        found.append((out, grad))
    for eager, ours in zip(*found, strict=True):
        assert_same_bits(ours, eager)
    assert "uint8" in code[0], "a mask is kept"
    assert 2 <= len(re.findall(r"round\(\)|nearbyint", code[0])) < 8, "of codes and of masks, also after vectors"


def test_sums_that_are_told_to_be_unrolled_have_the_same_bits() -> None:
    def step(a: Tensor, b: Tensor) -> Tensor:
        return ops.fake_quantize_per_tensor_affine(a @ b, *QUANTIZED, 0, 15, rounding="divide").square()

    x, b = torch.randn(16, 8, requires_grad=True), torch.randn(8, 24)
    torch._dynamo.reset()
    options = {"recipe": None, "inductor": {"unroll_reductions_threshold": 16}}
    compiled = torch.compile(step, backend="fxquant", options=options, dynamic=False)
    ours, eager = (torch.autograd.grad(run(x, b).sum(), x)[0] for run in (compiled, step))
    assert_same_bits(ours, eager)


def test_dtype_rules_are_set_up_once_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import utils
    from torch._inductor.dtype_propagation import DtypePropagationOpsHandler

    name, rule = next(iter(utils.op_dtype_propagation_rules.items()))
    rules = {**utils.op_dtype_propagation_rules, "new_op_of_a_test": rule}
    with DTYPE_RULES.acting():
        known = vars(DtypePropagationOpsHandler())[name]
        assert vars(DtypePropagationOpsHandler())[name] is known
        monkeypatch.setattr(utils, "op_dtype_propagation_rules", rules)
        assert vars(DtypePropagationOpsHandler()).pop("new_op_of_a_test")
    assert vars(DtypePropagationOpsHandler())[name] is not known, "others fill it for each operation"
