"""Ranges under torch.distributed: equal on all ranks, those of the global batch, by one all_reduce a graph.

Two processes run `main` below with gloo, each on its half of every batch, and write down what they see.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fxquant
from tests.nets import Mlp, counted, eager_runs, prepared, ranges, step

ROOT = Path(__file__).resolve().parents[2]
CASES = ("delayed", "moving_average", "off", "group", "checkpoint", "non_finite", "inductor", "plain")


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
    name = "moving_average" if case == "moving_average" else "delayed"
    model = net if case == "plain" else prepared(net, batch(0)[:4], ranges=name)
    if case in ("off", "group"):
        fxquant.sync_ranges(model, torch.distributed.group.WORLD, enabled=case == "group")
    # Without broadcast_buffers: DDP would copy the ranges of rank 0 to the others.
    wrapped = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    seen: list[int] = []
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


def main(rank: int, rendezvous: str, out: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    Path(f"{out}.{rank}").write_text(json.dumps({case: run(case, rank) for case in CASES}), encoding="utf-8")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    code = "import sys; from tests.prepared.test_distributed_ranges import main; main(int(sys.argv[1]), *sys.argv[2:])"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), str(folder / "meet"), str(folder / "out")],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [rank.communicate(timeout=540)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(said)
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


@pytest.mark.parametrize("case", ["delayed", "moving_average", "group", "checkpoint", "inductor"])
def test_ranges_are_equal_and_those_of_the_global_batch(both: list[dict[str, Any]], case: str) -> None:
    first, second = (rank[case] for rank in both)
    assert first["ranges"] == second["ranges"]
    key = "one.first.input" if case == "checkpoint" else "first.input"
    assert [tuple(step[key]) for step in first["ranges"]] == global_input_range()
    assert len(first["ranges"][0]) == (4 if case == "checkpoint" else 2)


@pytest.mark.parametrize("case", ["delayed", "moving_average", "group", "checkpoint", "non_finite", "inductor"])
def test_every_graph_reduces_once(both: list[dict[str, Any]], case: str) -> None:
    for rank in both:
        graphs = 1 if case == "moving_average" else 2  # with delay, the first step has a graph of its own
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


def test_without_other_processes_nothing_is_reduced() -> None:
    from fxquant.passes.captured.insert_fake_quantize import process_group

    assert process_group(None) == process_group("") == process_group("0") == ""


def test_an_unprepared_model_has_no_ranges_to_share() -> None:
    with pytest.raises(fxquant.errors.InvalidArgument, match="sync_ranges must be given a prepared model"):
        fxquant.sync_ranges(nn.Linear(2, 2))
