"""``options={"reuse_weights": True}``: which weights of which models, which stay as they are, and why."""

from __future__ import annotations

import gc
import re

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fxquant
from fxquant.backend.reuse import stores
from tests.backend.oracle import weight as quantized_weight
from tests.backend.reusing import EAGER, IMAGE, REUSE, Run, X, accumulate, kept_values, mlp, report, runs, same, sgd
from tests.nets import Blocks, ConvNet, Mlp, TiedLanguageModel, prepared

pytestmark = pytest.mark.usefixtures("cold", "none_kept")


class FrozenFirst(nn.Module):
    """A frozen layer under a trained one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.first.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


def test_frozen_weights_are_quantized_once() -> None:
    assert same(lambda: prepared(FrozenFirst(), X), accumulate(X, steps=3)) == 1 + 3


def test_a_tied_weight_and_its_sum_of_gradients() -> None:
    tokens = torch.tensor([[1, 2, 3, 4], [3, 3, 0, 9]])
    job = accumulate(tokens, tokens.flip(0), optimizer=torch.optim.Adam)
    assert same(lambda: prepared(TiedLanguageModel(), tokens), job) == 2


class WeightLoss(nn.Module):
    """Reads its weight besides: in a product that is quantized and in a penalty."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + self.first.weight.square().sum() + self.first.weight.abs().mean()


def test_a_weight_that_is_read_besides() -> None:
    assert same(lambda: prepared(WeightLoss(), X), accumulate(X)) == 2


@pytest.mark.parametrize("recipe", ["w4a8", "int4_weight_only"])
def test_recipes(recipe: str) -> None:
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(5))

    def job(run: Run) -> None:
        run.optimizer = sgd(run.model.parameters())
        for _ in range(2):
            run.train(x)
            run.evaluate(x)
            run.step()

    assert same(lambda: prepared(Mlp(32), x, recipe=recipe), job) == 2


def test_a_batch_of_any_size() -> None:
    def job(run: Run) -> None:
        for rows in (4, 3, 2, 4):
            run.train(X[:rows])

    assert same(mlp, job, dynamic=True) == 1


def test_graph_breaks_give_each_graph_its_weights() -> None:
    assert same(lambda: prepared(Blocks(2, torch._dynamo.graph_break), X), accumulate(X, -X)) == 4


def test_instances_that_share_a_graph_keep_their_own() -> None:
    """Blocks compiled one by one: one graph for all of them."""

    def job(run: Run) -> None:
        options = REUSE if run.reuse else None
        for block in run.model.blocks:
            block.compile(backend=EAGER, options=options)
        run.compiled = run.model
        accumulate(X, -X)(run)

    assert same(lambda: prepared(Blocks(3), X), job) == 6


def test_a_model_compiled_twice_is_kept_once() -> None:
    run = Run(mlp(), True)
    again = torch.compile(run.model, backend=EAGER, options=REUSE, fullgraph=True)
    run.evaluate(X)
    run.model.eval()
    with torch.no_grad():
        assert torch.equal(again(X), run.found[-1])
    assert len(stores()) == 1 and runs() == 1


def test_what_is_kept_is_the_quantized_weight_and_goes_with_the_model() -> None:
    run = Run(mlp(), True)
    run.train(X)
    weights = [run.model.first.weight, run.model.second.weight]
    kept = kept_values()
    assert len(kept) == 2 and not any(value.requires_grad for value in kept)
    for weight in weights:
        assert any(torch.equal(value, quantized_weight(weight.detach())) for value in kept)
    torch.optim.SGD(weights, 0.1).step()
    assert not kept_values(), "an optimizer's step frees them"
    run.train(X)
    assert kept_values()
    (store,) = stores()
    compiled, run = run.compiled, None  # type: ignore[assignment]
    del weights, compiled
    torch._dynamo.reset()
    gc.collect()
    assert not store.held


def test_autocast() -> None:
    def job(run: Run) -> None:
        run.optimizer = sgd(run.model.parameters())
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                run.train(X)
                run.train(-X)
                run.evaluate(X)
            run.step()
            run.evaluate(X)

    same(mlp, job)


def test_inference_mode() -> None:
    def job(run: Run) -> None:
        run.model.eval()
        for x in (X, -X):
            with torch.inference_mode():
                run.forward(x)
            with torch.no_grad():
                run.forward(x)
            run.train(x)

    assert same(mlp, job) == 1, "what inference mode computed serves training"


def test_weights_made_in_inference_mode_are_quantized_in_each_call() -> None:
    with torch.inference_mode():
        run = Run(mlp(), True)
        run.evaluate(X)
        run.evaluate(X)
    assert runs() == 2 and torch.equal(*run.found)


class Checkpointed(nn.Module):
    """A region with sites and ranges of its own; with ``inner``, a region in it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.head = inner, nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.inner, x, use_reentrant=False))


def test_checkpointed_regions_get_their_weights_as_operands() -> None:
    assert same(lambda: prepared(Checkpointed(Mlp()), X), accumulate(X, -X)) == 2
    assert report().reused == 3 and not report().declines


class ImageRegion(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = ConvNet()

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.net, x, use_reentrant=False)


def test_a_checkpointed_region_with_quantized_biases_reads_known_scales() -> None:
    def job(run: Run) -> None:
        accumulate(IMAGE, -IMAGE)(run)
        run.found += [value.clone() for value in run.model.buffers()]

    assert same(lambda: prepared(ImageRegion(), IMAGE), job) == 2
    assert report().reused == 3


# ---------------------------------------------------------------- what is left alone, and why


def test_a_region_in_a_region_quantizes_in_every_call() -> None:
    model = prepared(Checkpointed(Checkpointed(Mlp())), X)
    assert same(lambda: model, accumulate(X, -X)) == 2, "of the two heads"
    assert report().reused == 2
    declined = [d.reason for d in report().declines if d.pass_name == "SplitWeights"]
    assert declined == ["it is computed in a body of tag_activation_checkpoint: it is quantized in every call"] * 2
    assert declined[0] in str(fxquant.explain(model))


class Noisy(nn.Module):
    """Drops some of a weight's connections."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.other = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(nn.functional.linear(x, nn.functional.dropout(self.weight, 0.5)), self.other)


class Counting(nn.Module):
    """Changes a weight as it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        out = nn.functional.linear(x, self.weight)
        self.weight.mul_(0.5)
        return out


class Overlapping(nn.Module):
    """Two parameters with the memory of one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


REASONS: list[tuple[type[nn.Module], str, int]] = [
    (Noisy, r"depends on dropout.*, which is random", 1),
    (Counting, r"depends on .*weight.*, which the graph itself changes", 0),
    (Overlapping, r"shares its memory with another input", 0),
]


@pytest.mark.parametrize(("net", "reason", "reused"), REASONS)
def test_declines(net: type[nn.Module], reason: str, reused: int) -> None:
    """Stateless sites, so that the nets' weights are their own business."""
    torch.manual_seed(0)
    found = []
    for options in (None, REUSE):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = net()
        if net is Overlapping:
            model.second.weight.data = model.first.weight.data
        compiled = torch.compile(model, backend=EAGER, options=options)
        torch.manual_seed(1)
        x = X.clone().requires_grad_()
        found.append([compiled(x), compiled(-x)])
    assert all(map(torch.equal, *found))
    assert report().reused == reused
    assert any(re.search(reason, str(decline)) for decline in report().declines), report().declines


def test_a_distributed_process_reuses_nothing() -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        assert same(mlp, lambda run: run.train(X)) == 0
    finally:
        torch.distributed.destroy_process_group()
    assert report().reused == 0
    (decline,) = (d for d in report().declines if d.pass_name == "reuse_weights")
    assert decline.reason.startswith("torch.distributed is initialized: weights that are gathered anew")
