"""The demo's training loop: the loss, the rates, what is called when, and what a step does to a parameter."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.shell.demo import train as module
from fxquant.shell.demo.data import Digits
from fxquant.shell.demo.nets import NETS
from fxquant.shell.demo.train import SMOOTHING, Schedule, accuracy, divergence, score, train
from tests.shell.demo.made import few_digits

LABELS = torch.arange(150) % 10
FEW = few_digits(LABELS, torch.tensor([3, 1, 4, 1, 5]))


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


# --- the loss ------------------------------------------------------------------------------------------


def test_divergence_is_kl_to_the_smoothed_labels() -> None:
    logits, labels = torch.randn(7, 10, dtype=torch.float64), torch.arange(7)
    target = torch.full((7, 10), SMOOTHING / 10, dtype=torch.float64)
    target[torch.arange(7), labels] += 1 - SMOOTHING
    expected = torch.nn.functional.kl_div(logits.log_softmax(1), target, reduction="batchmean")
    torch.testing.assert_close(divergence(logits, labels), expected)
    assert float(divergence(target.log(), labels)) == pytest.approx(0, abs=1e-12)


def test_divergence_of_two_classes_by_hand() -> None:
    """Labels (0.975, 0.025), a prediction of one half each: ln 2 less an entropy of 0.11691."""
    found = divergence(torch.zeros(3, 2, dtype=torch.float64), torch.tensor([0, 1, 1]))
    assert float(found) == pytest.approx(0.693147 - 0.116907, abs=2e-6)


def test_the_gradient_is_cross_entropys() -> None:
    logits, labels = torch.randn(4, 10, requires_grad=True), torch.tensor([3, 0, 9, 3])
    (found,) = torch.autograd.grad(divergence(logits, labels), logits)
    target = F.one_hot(labels, 10) * (1 - SMOOTHING) + SMOOTHING / 10
    torch.testing.assert_close(found, (logits.softmax(1) - target).detach() / 4)


# --- the schedule --------------------------------------------------------------------------------------


def test_rate_rises_to_the_peak_then_falls_to_nothing() -> None:
    schedule = Schedule(epochs=1, learning_rate=1.0, warmup=0.1)
    rates = [schedule.rate(step, 100) for step in range(100)]
    assert rates[9] == rates[10] == 1 and rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[-1] < 1e-3


@dataclass(frozen=True)
class Rates:
    """A schedule and its shares of the peak, worked out by hand."""

    name: str
    warmup: float
    total: int
    expected: list[float]

    def __str__(self) -> str:
        return self.name


COS_30, COS_45 = math.sqrt(0.75), math.sqrt(0.5)
RATES = [
    Rates("half of it rising", 0.5, 4, [0.5, 1, 1, 0.5]),
    Rates("a quarter", 0.25, 8, [0.5, 1, 1, (1 + COS_30) / 2, 0.75, 0.5, 0.25, (1 - COS_30) / 2]),
    Rates("a first step at the peak", 0.0, 5, [1, 1, (1 + COS_45) / 2, 0.5, (1 - COS_45) / 2]),
    Rates("one step", 0.1, 1, [1]),
    Rates("all of it rising", 1.0, 4, [0.25, 0.5, 0.75, 1]),
]  # fmt: skip


@pytest.mark.parametrize("case", RATES, ids=str)
def test_rates_by_hand(case: Rates) -> None:
    schedule = Schedule(epochs=1, learning_rate=7.0, warmup=case.warmup)
    assert [schedule.rate(step, case.total) for step in range(case.total)] == pytest.approx(case.expected)


@pytest.mark.parametrize(("limit", "length"), [(None, 2), (1, 1), (2, 2), (99, 2)])
def test_an_epoch_has_as_many_steps_as_full_batches_or_fewer(limit: int | None, length: int) -> None:
    schedule = Schedule(epochs=3, learning_rate=1e-3, steps_per_epoch=limit)
    losses: list[float] = []
    model = linear()
    curve = train(model, model, FEW, schedule, seed=0, advance=losses.append)
    assert schedule.epoch_length(FEW) == length and schedule.steps(FEW) == len(losses) == 3 * length
    assert len(curve) == 3


class Watched(torch.optim.AdamW):
    """Keeps the rate of each step and the decay."""

    rates: list[float]
    decay: float

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        Watched.rates.append(self.param_groups[0]["lr"])
        Watched.decay = self.param_groups[0]["weight_decay"]
        super().step(closure)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Watched]]:
    Watched.rates = []
    monkeypatch.setattr(torch.optim, "AdamW", Watched)
    yield Watched


def test_steps_are_taken_at_the_schedules_rates(watched: type[Watched]) -> None:
    schedule = Schedule(epochs=2, learning_rate=0.1, warmup=0.5, weight_decay=0.25)
    model = linear()
    train(model, model, FEW, schedule, seed=0)
    assert watched.rates == pytest.approx([0.05, 0.1, 0.1, 0.05]) and watched.decay == 0.25


def test_the_first_step_by_hand() -> None:
    """AdamW's first step goes by the sign of each gradient, whatever its size, after the decay."""
    model, seen = linear(), []
    before = [p.detach().clone() for p in model.parameters()]

    def forward(images: Tensor) -> Tensor:
        seen.append(images)
        return model(images)

    schedule = Schedule(epochs=1, learning_rate=0.01, warmup=0, weight_decay=0.5, steps_per_epoch=1)
    ours = few_digits(torch.full((64,), 4), torch.tensor([4]))
    (loss,) = train(model, forward, ours, schedule, seed=0)
    x, weight, bias = seen[0].flatten(1), *before
    probability = (x @ weight.t() + bias).softmax(1)
    target = torch.full((10,), SMOOTHING / 10)
    target[4] += 1 - SMOOTHING
    assert loss == pytest.approx(float((target * (target / probability).log()).sum(1).mean()), rel=1e-4)
    error = (probability - target) / 64
    for old, new, gradient in zip(before, model.parameters(), (error.t() @ x, error.sum(0)), strict=True):
        expected = old * (1 - 0.01 * 0.5) - 0.01 * gradient.sign()
        clear = gradient.abs() > 1e-4  # beside which Adam's epsilon is nothing
        assert clear.any()
        torch.testing.assert_close(new.detach()[clear], expected[clear], rtol=1e-4, atol=1e-5)


# --- the loop ------------------------------------------------------------------------------------------


def test_the_curve_is_the_mean_loss_of_each_epoch() -> None:
    model, losses = linear(), []
    curve = train(model, model, FEW, Schedule(epochs=3, learning_rate=1e-2), seed=0, advance=losses.append)
    assert curve == [sum(losses[i : i + 2]) / 2 for i in (0, 2, 4)] and curve[-1] < curve[0]


def test_losses_are_those_of_the_form_that_is_trained(digits: Digits) -> None:
    """The compiled form is called once a step, in training mode, with gradients."""
    model, calls = NETS["cnn"]().eval(), []

    def forward(images: Tensor) -> Tensor:
        calls.append((model.training, torch.is_grad_enabled(), tuple(images.shape)))
        return model(images)

    train(model, forward, digits, Schedule(epochs=1, learning_rate=1e-3, steps_per_epoch=2), seed=0)
    assert calls == [(True, True, (64, 1, 8, 8))] * 2


def test_gradients_are_of_one_step_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, total = linear(), []
    bias = list(model.parameters())[1]
    monkeypatch.setattr(module, "divergence", lambda logits, labels: logits.mean() * 10)  # each bias has a slope of 1
    schedule = Schedule(epochs=2, learning_rate=1e-3)
    train(model, model, FEW, schedule, seed=0, advance=lambda _: total.append(float(bias.grad[0])))
    assert total == pytest.approx([1.0] * 4)


@pytest.mark.parametrize(
    ("frozen", "expected"),
    [(0, "ssssss"), (1, "ssssFss"), (2, "ssFssss"), (3, "Fssssss")],
    ids=["never", "the last epoch", "the last two", "from the start"],
)
def test_freeze_comes_once_before_the_last_epochs(frozen: int, expected: str) -> None:
    model, order = linear(), []
    schedule = Schedule(epochs=3, learning_rate=1e-3, frozen_epochs=frozen)
    train(
        model, model, FEW, schedule, seed=0,
        advance=lambda loss: order.append("s"), freeze=lambda: order.append("F"),
    )  # fmt: skip
    assert "".join(order) == expected


def test_what_is_random_in_a_net_follows_the_seed() -> None:
    curves = []
    for before, seed in ((1, 5), (2, 5), (2, 6)):
        model = nn.Sequential(nn.Dropout(0.5), linear())
        torch.manual_seed(before)
        curves.append(train(model, model, FEW, Schedule(epochs=1, learning_rate=1e-3), seed=seed))
    assert curves[0] == curves[1] != curves[2]


# --- accuracy ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_accuracy_puts_the_mode_back(digits: Digits, training: bool) -> None:
    model = NETS["cnn"]().train(training)
    modes = []
    accuracy(model, lambda x: (modes.append(model.training), model(x))[1], digits)
    assert modes == [False] and model.training is training


def test_accuracy_puts_the_mode_back_after_an_error() -> None:
    model = nn.Identity().train()

    def broken(images: Tensor) -> Tensor:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        accuracy(model, broken, FEW)
    assert model.training and torch.is_grad_enabled()


def test_accuracy_reads_all_held_out_digits_at_once_without_gradients() -> None:
    seen: list[tuple[int, bool]] = []

    def ones(images: Tensor) -> Tensor:
        seen.append((len(images), torch.is_grad_enabled()))
        return F.one_hot(torch.ones(len(images), dtype=torch.int64), 10).float()

    assert accuracy(nn.Identity(), ones, FEW) == 0.4 and seen == [(5, False)]


def test_score_counts_right_answers(digits: Digits) -> None:
    logits = torch.nn.functional.one_hot(digits.test_y, 10).float()
    assert score(logits, digits) == 1.0
    logits[:45] = logits[:45].roll(1, dims=1)
    assert score(logits, digits) == pytest.approx(0.9)
