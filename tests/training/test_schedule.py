"""A training in stages: what each stage runs, what it compiles, and that a run taken up is the run that was whole."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import fxquant
from fxquant import Stage
from fxquant.errors import InvalidArgument, NotQuantizedWarning, PlanMismatch
from fxquant.prepared.bound_forward import bound_forwards
from fxquant.prepared.quantizer import quantizers
from fxquant.prepared.root import plan_of
from tests.nets import ConvNet, Mlp, eager_runs, ranges, unset
from tests.onnx.agreement import assert_codes_agree

EAGER = "fxquant_eager"
BATCHES = [torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(i)) * (1 + i / 4) for i in range(12)]
# Where each begins: float, observed, weights of 8 bits, of 6 and activations, as planned, held.
STAGES = (
    Stage(at=0, weights="float", activations="float"),
    Stage(at=2, activations="observe"),
    Stage(at=4, weights=8),
    Stage(at=6, weights=6, activations="quantize"),
    Stage(at=8, weights="quantize", damping=0.01),
    Stage(at=10, freeze_ranges=True, freeze_batch_norm=True, batch_norm_data=BATCHES[:2]),
)
STEPS = len(BATCHES)


@pytest.fixture(autouse=True)
def cold() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def convnet(**keywords: Any) -> nn.Module:
    torch.manual_seed(0)
    return fxquant.prepare(ConvNet(), (BATCHES[0],), **{"recipe": "w4a8", **keywords})


def mlp(recipe: Any = "w4a8") -> nn.Module:
    torch.manual_seed(0)
    return fxquant.prepare(Mlp(), (torch.ones(2, 8),), recipe=recipe)


class Run:
    """A training of the network by the stages, step by step."""

    def __init__(self, model: nn.Module, stages: Any = STAGES, backend: str = EAGER) -> None:
        self.model, self.schedule = model, fxquant.Schedule(model, stages)
        self.compiled = torch.compile(model, backend=backend)
        self.optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)

    def step(self) -> float:
        self.optimizer.zero_grad()
        loss = self.compiled(BATCHES[self.schedule.steps]).square().mean() + self.schedule.damping()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        return loss.item()

    def saved(self) -> io.BytesIO:
        """Its checkpoint, as a file."""
        file = io.BytesIO()
        state = {"model": self.model, "optimizer": self.optimizer, "schedule": self.schedule}
        torch.save({name: value.state_dict() for name, value in state.items()}, file)
        file.seek(0)
        return file


def formats(model: nn.Module) -> dict[str, tuple[str, str]]:
    return {key: (q.doing, str(q.spec)) for key, q in quantizers(model)}


# What each stage runs


def test_stages_of_float_train_the_float_model() -> None:
    """Bit for bit, BatchNorm included; ranges are observed meanwhile as training would have them."""
    plain = convnet()
    fxquant.strip(plain)
    optimizer = torch.optim.SGD(plain.parameters(), 0.05, momentum=0.9)
    run = Run(convnet())
    for number in range(4):
        optimizer.zero_grad()
        loss = torch.compile(plain, backend="aot_eager")(BATCHES[number]).square().mean()
        loss.backward()
        optimizer.step()
        assert run.step() == loss.item()
        assert (unset(run.model) == list(ranges(run.model))) == (number < 2)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), run.model.parameters(), strict=True))
    (low, high), (x, y) = ranges(run.model)["conv1.input"], BATCHES[2:4]
    assert low == pytest.approx((x.min() + 0.01 * (y.min() - x.min())).item(), rel=1e-6)
    assert high == pytest.approx((x.max() + 0.01 * (y.max() - x.max())).item(), rel=1e-6)


def test_evaluation_is_that_of_the_stage() -> None:
    run = Run(convnet())
    for _ in range(2):
        run.step()
    run.model.eval()
    seen = {key: q.state for key, q in quantizers(run.model) if q.stateful}
    float_twin = fxquant.strip(copy.deepcopy(run.model))
    with torch.no_grad():
        assert torch.equal(run.compiled(BATCHES[0]), float_twin(BATCHES[0]))
    assert unset(run.model) == list(seen), "evaluation observes nothing"


@pytest.mark.parametrize("bits", [8, 6])
def test_a_number_of_bits_is_the_recipe_of_that_many(bits: int) -> None:
    weight = fxquant.QuantSpec(bits=bits, narrow=True, axis=0, range=fxquant.CurrentTensor())
    other, staged = mlp(fxquant.Recipe(name="other", weight=weight)), mlp()
    fxquant.Schedule(staged, [Stage(at=0, weights=bits), Stage(at=1, weights="quantize")])
    x = torch.randn(4, 8)
    outs = [torch.compile(model, backend=EAGER)(x) for model in (other, staged)]
    assert torch.equal(*outs)
    assert not torch.equal(outs[0], torch.compile(mlp(), backend=EAGER)(x))


def test_sites_may_go_one_after_the_other_and_more_bits_are_never_fewer_than_planned() -> None:
    model = convnet(rules=[fxquant.first_layer(fxquant.QuantSpec(bits=8, narrow=True, axis=0,
                    range=fxquant.CurrentTensor()), operand="weight")])  # fmt: skip
    schedule = fxquant.Schedule(
        model,
        [
            Stage(at=0, weights=6, activations="float"),
            Stage(at=1, activations="quantize", sites="conv*"),
            Stage(at=2, activations=10, sites="head.*"),
            Stage(at=3, weights="quantize", activations="quantize"),
        ],
    )
    widths = {key: spec.split()[0] for key, (_, spec) in formats(model).items() if key.endswith("weight")}
    assert widths == {"conv1.weight": "s8", "conv2.weight": "s6", "head.weight": "s6"}
    schedule.step()
    assert {key for key, (doing, _) in formats(model).items() if doing == "float"} == {
        "head.input",
        "add0_lhs",
        "avg_pool0_input",
    }
    schedule.step()
    assert formats(model)["head.input"] == ("quantize", "u10")
    schedule.step()
    plan = plan_of(model)
    assert plan is not None
    assert formats(model) == {site.key: ("quantize", str(site.local.spec)) for site in plan.sites}


# What is compiled


@pytest.mark.parametrize("backend", [EAGER, "fxquant"])
def test_a_stage_costs_one_compile_and_none_is_between(backend: str, uncompiled: None) -> None:
    x = torch.randn(4, 8)
    model = fxquant.prepare(nn.Sequential(nn.Linear(8, 8)), (x,), recipe="w4a8")
    schedule = fxquant.Schedule(model, (*STAGES[:5], Stage(at=10, freeze_ranges=True)))
    compiled = torch.compile(model, backend=backend)
    counters.clear()
    graphs = []
    for _ in range(STEPS):
        (compiled(x).square().mean() + schedule.damping()).backward()
        schedule.step()
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [number // 2 + 1 for number in range(STEPS)]
    assert not counters["graph_break"] and eager_runs(model) == 0


def test_many_stages_are_all_compiled() -> None:
    """More than Dynamo keeps of one frame by default, after which it would run the rest in float."""
    model = fxquant.prepare(nn.Sequential(nn.Linear(8, 8)), (torch.randn(2, 8),), recipe="w4a8")
    stages = [Stage(at=n, weights=16 - n) for n in range(9)] + [Stage(at=9, weights="quantize")]
    with torch._dynamo.config.patch(recompile_limit=8):
        schedule = fxquant.Schedule(model, stages)
        compiled, outs = torch.compile(model, backend=EAGER), []
        for _ in stages:
            outs.append(compiled(torch.ones(2, 8)).detach())
            schedule.step()
    assert eager_runs(model) == 0 and all(not torch.equal(a, b) for a, b in itertools.pairwise(outs))


def test_compiled_equals_eager_where_sites_observe() -> None:
    x, found = torch.randn(4, 8), {}
    for backend in (EAGER, "fxquant"):
        torch.manual_seed(0)
        model = fxquant.prepare(Mlp(), (x,))
        fxquant.Schedule(model, [Stage(at=0, weights="float", activations="observe"),
                                 Stage(at=1, weights="quantize", activations="quantize")])  # fmt: skip
        out = torch.compile(model, backend=backend)(x)
        found[backend] = out, ranges(model), model(x)
    (eager, low, plain), (compiled, high, _) = found.values()
    assert torch.equal(eager, plain) and torch.allclose(compiled, eager, rtol=1e-6, atol=1e-6)
    assert low.keys() == high.keys() and all(low[key] == pytest.approx(high[key], rel=1e-6) for key in low)


# Checkpoints


@pytest.fixture(scope="module")
def whole() -> tuple[list[float], list[io.BytesIO]]:
    """The losses of a run, and its checkpoints before each step and at the end."""
    torch._dynamo.reset()
    run = Run(convnet())
    files, losses = [run.saved()], []
    for _ in range(STEPS):
        losses.append(run.step())
        files.append(run.saved())
    return losses, files


@pytest.mark.parametrize(("after", "order"), [(3, "model first"), (10, "schedule first")])
def test_a_run_taken_up_is_the_run_that_was_whole(after: int, order: str, whole: Any) -> None:
    losses, files = whole
    files[after].seek(0)
    state = torch.load(files[after], weights_only=True)
    run = Run(convnet())
    for name in ("schedule", "model") if order == "schedule first" else ("model", "schedule"):
        {"model": run.model, "schedule": run.schedule}[name].load_state_dict(state[name])
    run.optimizer.load_state_dict(state["optimizer"])
    assert run.schedule.steps == after
    assert [run.step() for _ in range(3 if after < 9 else STEPS - after)] == losses[after : after + 3]
    if run.schedule.steps == STEPS:
        files[STEPS].seek(0)
        end = torch.load(files[STEPS], weights_only=True)["model"]
        assert all(torch.equal(value, end[key]) for key, value in run.model.state_dict().items())


def test_a_checkpoint_of_any_stage_has_the_plan(whole: Any) -> None:
    """It loads into a model without a schedule, which then quantizes in the bits that sites had."""
    _, files = whole
    model = convnet()
    planned, keys = formats(model), {path: bound.key for path, bound in bound_forwards(model).items()}
    for number, bits in ((3, 4), (7, 6), (9, 4)):
        files[number].seek(0)
        model.load_state_dict(torch.load(files[number], weights_only=True)["model"])
        assert formats(model)["conv1.weight"] == ("quantize", f"s{bits} axis 0")
        assert (formats(model) == planned) == (bits == 4)
        assert ({path: bound.key for path, bound in bound_forwards(model).items()} == keys) == (bits == 4)


LEARNED = fxquant.Recipe(
    name="learned",
    activation=fxquant.QuantSpec(bits=4, signed=False, symmetric=False, range=fxquant.Learned(method="lsq")),
    weight=fxquant.QuantSpec(bits=4, narrow=True, axis=0, range=fxquant.Learned(method="lsq")),
)
NARROWING = (
    Stage(at=0, weights=8, activations=8),
    Stage(at=2, weights=6, activations=6),
    Stage(at=4, weights="quantize", activations="quantize"),
)


class Learning:
    """A small training of learned ranges that go on to fewer bits."""

    def __init__(self, state: Any = None, order: str = "") -> None:
        torch.manual_seed(0)
        self.model = fxquant.prepare(Mlp(), (torch.randn(2, 8),), recipe=LEARNED)
        if order == "before it is made":
            self.model.load_state_dict(state["model"])
        self.schedule = fxquant.Schedule(self.model, NARROWING)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.05)
        self.compiled = torch.compile(self.model, backend=EAGER)
        for name in ("schedule", "model") if order == "schedule first" else ("model", "schedule"):
            if state is not None and (order, name) != ("before it is made", "model"):
                getattr(self, name).load_state_dict(state[name])

    def step(self) -> float:
        self.optimizer.zero_grad()
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(self.schedule.steps))
        loss = (self.compiled(x) - x).square().mean()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        return loss.item()

    def saved(self) -> dict[str, Any]:
        return copy.deepcopy({"model": self.model.state_dict(), "schedule": self.schedule.state_dict()})


def test_a_learned_range_goes_on_in_fewer_bits_and_is_taken_up_in_any_order() -> None:
    run, states, reaches = Learning(), [], []
    losses = []
    for _ in range(6):
        states.append(run.saved())
        losses.append(run.step())
        found = dict(quantizers(run.model))["first.input"]
        reaches.append((found.spec.bits, (found.state["scale"].abs() * found.spec.quant_max).item()))
    assert [bits for bits, _ in reaches] == [8, 6, 6, 4, 4, 4]
    assert all(a == pytest.approx(b, rel=0.1) for (_, a), (_, b) in itertools.pairwise(reaches)), reaches
    for number, order in ((3, "schedule first"), (3, "before it is made")):
        torch._dynamo.reset()
        again = Learning(states[number], order)
        assert [again.step() for _ in range(2)] == losses[number : number + 2], (number, order)


def test_bits_that_a_site_cannot_have() -> None:
    model = convnet()
    state = model.state_dict()
    flags = state["quantizers_frozen"].clone()
    flags[[site.local.role for site in plan_of(model).sites].index("weight")] = 2 * 3  # type: ignore[union-attr]
    with pytest.raises(
        PlanMismatch, match=r"checkpoint must have sites of planned bits or more: got 3 bits for \w+\.w"
    ):
        model.load_state_dict({**state, "quantizers_frozen": flags})


def test_the_state_of_other_stages_is_refused() -> None:
    schedule = fxquant.Schedule(convnet(), STAGES)
    other = fxquant.Schedule(convnet(), STAGES[1:])
    with pytest.raises(PlanMismatch, match="schedule's state must be of the same stages: got 0: weights float, acti"):
        other.load_state_dict(schedule.state_dict())


def by_pickle(both: Any) -> Any:
    return pickle.loads(pickle.dumps(both))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, by_pickle])
def test_a_copy_is_in_the_stage_and_a_copied_schedule_drives_it(duplicate: Any) -> None:
    model = convnet()
    schedule = fxquant.Schedule(model, STAGES)
    for _ in range(8):
        schedule.step()
    damped = schedule.damping()
    schedule.seek(6)
    twin, driven = duplicate((model, schedule))
    assert driven.model is twin and formats(twin) == formats(model)
    out = torch.compile(twin, backend=EAGER)(BATCHES[0])
    assert torch.equal(out, torch.compile(model, backend=EAGER)(BATCHES[0]))
    for _ in range(2):
        driven.step()
    assert damped > 0 and torch.equal(driven.damping(), damped)
    assert formats(twin)["conv2.weight"][1].startswith("s4") and formats(model)["conv2.weight"][1].startswith("s6")
    alone = duplicate(model)
    fxquant.Schedule(alone, [Stage(at=3, freeze_ranges=True)])
    assert formats(alone)["conv2.weight"][1].startswith("s4"), "a new schedule begins from the plan"


# What else changes a model meanwhile


def test_override_changes_what_the_stages_lead_to() -> None:
    model = convnet()
    schedule = fxquant.Schedule(model, STAGES)
    fxquant.override(model, {"conv2.weight": fxquant.QuantSpec(bits=3, narrow=True, axis=0,
                     range=fxquant.CurrentTensor()), "head.*": None})  # fmt: skip
    assert {doing for doing, _ in formats(model).values()} == {"float"}
    for _ in range(6):
        schedule.step()
    assert formats(model)["conv2.weight"][1].startswith("s6") and "head.weight" not in formats(model)
    for _ in range(2):
        schedule.step()
    assert formats(model)["conv2.weight"][1].startswith("s3")


def test_a_model_that_was_stripped_is_driven_no_more() -> None:
    model = convnet()
    schedule = fxquant.Schedule(model, STAGES)
    fxquant.strip(model)
    with pytest.raises(InvalidArgument, match="Schedule must be given a prepared model: got ConvNet without a plan"):
        schedule.step()


@pytest.mark.parametrize("method", ["max", "percentile"])
def test_calibration_looks_at_sites_that_a_stage_leaves_float(method: Any) -> None:
    model = convnet()
    fxquant.Schedule(model, STAGES)
    fxquant.calibrate(model, BATCHES[:2], method=method, progress=False)
    assert not unset(model) and formats(model)["conv1.input"][0] == "float"


def test_what_is_exported_before_the_end_says_so(tmp_path: Any) -> None:
    model, x = mlp(), torch.randn(4, 8)
    first = Stage(at=0, activations="float", sites="second.*")
    schedule = fxquant.Schedule(model, [first, Stage(at=1, activations="quantize")])
    fxquant.calibrate(model, [x], progress=False)
    with pytest.warns(
        NotQuantizedWarning, match=r"1 sites are not yet as planned in this stage.*: second\.input float"
    ):
        fxquant.export_onnx(model.eval(), (x,), tmp_path / "early.onnx")
    schedule.step()
    fxquant.export_onnx(model, (x,), tmp_path / "model.onnx")
    assert_codes_agree(fxquant.verify_onnx(model, (x,), tmp_path / "model.onnx", rounds=1))


def test_explain_shows_the_stage() -> None:
    model = convnet()
    assert fxquant.explain(model).stage == "" and "now" not in str(fxquant.explain(model))
    schedule = fxquant.Schedule(model, STAGES)
    for _ in range(5):
        schedule.step()
    found = fxquant.explain(model)
    assert found.stage == found.to_dict()["stage"] == "step 5, stage 3 of 6: weights 8 bits"
    assert {row.key: row.now for row in found.rows if row.key.startswith("conv1")} == {
        "conv1.input": "observe",
        "conv1.weight": "s8 axis 0",
    }
    assert "\nstep 5, stage 3 of 6: weights 8 bits\n" in str(found) and "  now  " in str(found)
    assert ">  4          weights 8 bits" in str(schedule)


def test_graphs_of_the_plan_are_bound_again_at_the_end() -> None:
    """The digest of the sites, by which graphs know them, is the plan's own again."""
    model = convnet()
    before = {path: bound.key for path, bound in bound_forwards(model).items()}
    schedule = fxquant.Schedule(model, [Stage(at=0, weights=8), Stage(at=2, weights="quantize")])
    assert {path: bound.key for path, bound in bound_forwards(model).items()} != before
    schedule.step()
    schedule.step()
    assert {path: bound.key for path, bound in bound_forwards(model).items()} == before


def test_ranges_that_were_found_stay_through_stages() -> None:
    model = convnet()
    fxquant.calibrate(model, BATCHES[:2], progress=False)
    found = ranges(model)
    fxquant.Schedule(model, STAGES[1:2] + STAGES[3:]).seek(2)
    assert ranges(model) == found


def test_it_takes_what_wraps_a_model() -> None:
    model = convnet()
    assert fxquant.Schedule(torch.compile(model, backend=EAGER), STAGES).model is model


def test_the_tensors_of_the_model_stay_the_same_objects() -> None:
    model = convnet()
    before: list[Tensor] = [*model.parameters(), *model.buffers()]
    schedule = fxquant.Schedule(model, STAGES)
    for _ in range(STEPS):
        schedule.step()
    assert all(a is b for a, b in zip(before, [*model.parameters(), *model.buffers()], strict=True))
