"""Ranges under torch.distributed: equal on all ranks, those of the global batch, by one all_reduce a graph.

Two processes run `main` below with gloo, each on its half of every batch, and write down what they see.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fxquant
from tests import forked
from tests.nets import Mlp, counted, eager_runs, prepared, ranges, step
from tests.quick import compiles_are_quick

ROOT = Path(__file__).resolve().parents[2]
CASES = ("delayed", "moving_average", "observe", "off", "group", "checkpoint", "non_finite", "inductor", "plain")
WRAPPED = ("buckets", "sharded")
STEPS = 5


class Checkpointed(nn.Module):
    """Two bodies, whose extremes go through one reduction."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Mlp(), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.two, checkpoint(self.one, x, use_reentrant=False), use_reentrant=False)


def batch(number: int) -> Tensor:
    """Of all ranks; float64, so that no sum in another order moves a hidden extreme."""
    generator = torch.Generator().manual_seed(number)
    return torch.randn(8, 8, generator=generator, dtype=torch.float64) * (1 + 3 * number)


def run(case: str, rank: int) -> dict[str, Any]:
    """Three steps; the ranges behind each, and what the graphs hold."""
    torch.manual_seed(0)
    net = (Checkpointed() if case == "checkpoint" else Mlp()).double()
    name = "moving_average" if case in ("moving_average", "observe") else "delayed"
    model = net if case == "plain" else prepared(net, batch(0)[:4], ranges=name)
    if case in ("off", "group"):
        fxquant.sync_ranges(model, torch.distributed.group.WORLD, enabled=case == "group")
    # Without broadcast_buffers: DDP would copy the ranges of rank 0 to the others.
    wrapped = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    seen: list[int] = []
    if case == "observe":
        observed = fxquant.Stage(at=0, weights="float", activations="observe")
        fxquant.Schedule(wrapped, [observed, fxquant.Stage(at=9, weights="quantize", activations="quantize")])
    with counted() as graphs, torch._dynamo.config.patch(optimize_ddp=False):
        backend = "eager" if case == "plain" else counting(seen, "fxquant" if case == "inductor" else "fxquant_eager")
        compiled = torch.compile(wrapped, backend=backend)
        behind = []
        for number in range(3):
            x = batch(number)[4 * rank : 4 * rank + 4].clone()
            if case == "non_finite" and number == 2 and rank == 1:
                x[0, 0] = float("nan")
            step(compiled, x)
            behind.append(ranges(model))
    return {"ranges": behind, "all_reduces": seen, "eager": eager_runs(model), **graphs}


def counting(seen: list[int], name: str) -> Any:
    """The backend of a name, and how many reductions over ranks each graph holds, nested bodies included."""

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        from fxquant.backend import entry as backends
        from fxquant.graph.bodies import execution_order

        quantized = backends.quantize_graph

        def looked_at(*args: Any) -> Any:
            found = quantized(*args)
            reduce = torch.ops._c10d_functional.all_reduce.default
            seen.append(sum(node.target is reduce for node in execution_order(found)))
            return found

        backends.quantize_graph = looked_at
        try:
            return getattr(backends, name)(gm, inputs)
        finally:
            backends.quantize_graph = quantized

    return backend


class Residuals(nn.Module):
    """Blocks that own sums, as those that fully_shard is given."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Residual() for _ in range(2)])
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.down(torch.relu(self.up(x))))


def residuals(checkpointed: bool = False) -> nn.Module:
    torch._dynamo.reset()
    torch.manual_seed(0)
    made = Checkpointed() if checkpointed else Residuals()
    return prepared(made.double(), batch(0)[:4])


def losses(model: nn.Module, wrapped: nn.Module, rank: int | None, reduce: bool = True) -> dict[str, Any]:
    """Of five steps on a rank's half of each batch, or on whole batches; the mean over ranks."""
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.05)
    compiled, found = torch.compile(wrapped, backend="fxquant_eager"), []
    for number in range(STEPS):
        x = batch(number) if rank is None else batch(number)[4 * rank : 4 * rank + 4].clone()
        loss = compiled(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss = loss.detach()
        if reduce and rank is not None:
            torch.distributed.all_reduce(loss)
            loss = loss / 2
        found.append(loss.item())
    return {"losses": found, "ranges": ranges(model), "eager": eager_runs(model)}


def train_wrapped(case: str, rank: int, out: str) -> dict[str, Any]:
    """With extremes reduced before use, in DistributedDataParallel's buckets or under fully_shard."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard

    model: Any = residuals(case == "buckets")
    fxquant.sync_ranges(model, when="before")
    if case != "sharded":
        torch.distributed._DEFAULT_FIRST_BUCKET_BYTES = 64
        wrapped = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=1e-4, broadcast_buffers=False)  # type: ignore
        return losses(model, wrapped, rank)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    found = losses(model, model, rank)
    gathered = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        torch.save(gathered, f"{out}.gathered")
    return found


def main(rank: int, rendezvous: str, out: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    with compiles_are_quick():
        found = {case: run(case, rank) for case in CASES}
        found |= {case: train_wrapped(case, rank, out) for case in WRAPPED}
    Path(f"{out}.{rank}").write_text(json.dumps(found), encoding="utf-8")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def both(vectors_are_known: None, folder: Path) -> list[dict[str, Any]]:
    code = "import sys; from tests.prepared.test_distributed_ranges import main; main(int(sys.argv[1]), *sys.argv[2:])"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    paths = (str(folder / "meet"), str(folder / "out"))
    ranks = [forked.start(["-c", code, str(rank), *paths], environment) for rank in range(2)]
    done = [rank.wait(timeout=540) for rank in ranks]
    assert [each.returncode for each in done] == [0, 0], "\n".join(each.stderr for each in done)
    return [json.loads((folder / f"out.{rank}").read_text(encoding="utf-8")) for rank in range(2)]


def global_input_range() -> list[tuple[float, float]]:
    """Of the model's input behind each step, from whole batches."""
    found: list[tuple[float, float]] = []
    low = high = torch.tensor(float("nan"))
    for number in range(3):
        least, most = batch(number).min().float(), batch(number).max().float()
        if number == 0:
            low, high = least, most
        else:
            low, high = low + 0.01 * (least - low), high + 0.01 * (most - high)
        found.append((low.item(), high.item()))
    return found


@pytest.mark.parametrize("case", ["delayed", "moving_average", "observe", "group", "checkpoint", "inductor"])
def test_ranges_are_equal_and_those_of_the_global_batch(both: list[dict[str, Any]], case: str) -> None:
    first, second = (rank[case] for rank in both)
    assert first["ranges"] == second["ranges"]
    key = "one.first.input" if case == "checkpoint" else "first.input"
    assert [tuple(step[key]) for step in first["ranges"]] == global_input_range()
    assert len(first["ranges"][0]) == (4 if case == "checkpoint" else 2)


@pytest.mark.parametrize(
    "case", ["delayed", "moving_average", "observe", "group", "checkpoint", "non_finite", "inductor"]
)
def test_every_graph_reduces_once(both: list[dict[str, Any]], case: str) -> None:
    for rank in both:
        graphs = 1 if case in ("moving_average", "observe") else 2  # with delay, the first step has a graph of its own
        assert rank[case]["all_reduces"] == [1] * graphs
        assert (rank[case]["graphs"], rank[case]["eager"]) == (graphs, 0)
        assert rank[case]["breaks"] == rank["plain"]["breaks"], "those of DDP's own forward"


def test_switched_off_each_rank_keeps_its_own(both: list[dict[str, Any]]) -> None:
    first, second = (rank["off"] for rank in both)
    assert first["all_reduces"] == second["all_reduces"] == [0, 0]
    for rank, found in enumerate((first, second)):
        mine = batch(0)[4 * rank : 4 * rank + 4]
        assert tuple(found["ranges"][0]["first.input"]) == (mine.min().float().item(), mine.max().float().item())
    assert first["ranges"][0] != second["ranges"][0]


def test_a_non_finite_value_on_one_rank_leaves_the_range_on_all(both: list[dict[str, Any]]) -> None:
    first, second = (rank["non_finite"]["ranges"] for rank in both)
    assert first == second
    assert first[2]["first.input"] == first[1]["first.input"]


def test_hidden_ranges_are_those_of_one_process_with_the_whole_batch(both: list[dict[str, Any]]) -> None:
    """With delay, quantization does not depend on how the batch was split."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = prepared(Mlp().double(), batch(0)[:4], ranges="delayed")
    compiled = torch.compile(model, backend="fxquant_eager")
    for number in range(3):
        step(compiled, batch(number))
        got = both[0]["delayed"]["ranges"][number]
        if number:  # the first step takes the range of the tensor in hand, which is a rank's own
            for key, pair in ranges(model).items():
                assert tuple(got[key]) == pytest.approx(pair, rel=2e-2)


@pytest.mark.parametrize("case", WRAPPED)
def test_with_extremes_before_use_training_is_that_of_one_process(both: list[dict[str, Any]], case: str) -> None:
    model = residuals(case == "buckets")
    alone = losses(model, model, None)
    for rank in both:
        assert rank[case]["losses"] == pytest.approx(alone["losses"], rel=1e-6)
        assert rank[case]["ranges"] == both[0][case]["ranges"] and not rank[case]["eager"]
        for key, pair in alone["ranges"].items():
            assert tuple(rank[case]["ranges"][key]) == pytest.approx(pair, rel=1e-6)


def test_a_checkpoint_gathered_from_shards_is_deployed(both: list[dict[str, Any]], folder: Path) -> None:
    model = residuals().float()
    assert not any(model.load_state_dict(torch.load(folder / "out.gathered", weights_only=True)))
    assert {key: list(pair) for key, pair in ranges(model).items()} == both[0]["sharded"]["ranges"]
    x = batch(9).float()
    fxquant.export_onnx(model.eval(), (x,), folder / "m.onnx")
    found = fxquant.verify_onnx(model, (x,), folder / "m.onnx", rounds=1)
    assert found.input_differing_codes == 0 and len(found.codes) == len(ranges(model))


def test_when_is_one_of_two() -> None:
    with pytest.raises(fxquant.errors.InvalidArgument, match="when must be 'after' or 'before': got 'first'"):
        fxquant.sync_ranges(residuals(), when="first")  # type: ignore[arg-type]


def test_without_other_processes_nothing_is_reduced() -> None:
    from fxquant.passes.captured.insert_fake_quantize import process_group

    assert process_group(None) == process_group("") == process_group("0") == ""


def test_an_unprepared_model_has_no_ranges_to_share() -> None:
    with pytest.raises(fxquant.errors.InvalidArgument, match="sync_ranges must be given a prepared model"):
        fxquant.sync_ranges(nn.Linear(2, 2))
