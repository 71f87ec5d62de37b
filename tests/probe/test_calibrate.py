"""calibrate: ranges from data, nothing else touched."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxquant
from fxquant.errors import InvalidArgument, NotQuantizedWarning
from fxquant.prepared.quantizer import quantizers


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))


@pytest.fixture
def model() -> nn.Module:
    return fxquant.prepare(_net(), (torch.randn(4, 6),))


def _ranges(model: nn.Module) -> dict[str, tuple[float, float]]:
    return {key: (q.min_val.item(), q.max_val.item()) for key, q in quantizers(model) if q.stateful}


def test_max_spans_what_the_float_model_computes(model):
    batches = [torch.randn(5, 6) * k for k in (1.0, 3.0, 2.0)]
    assert fxquant.calibrate(model, batches) is model
    everything = torch.cat(batches)
    hidden = model[:3].eval()(everything)
    ranges = _ranges(model)
    assert ranges["0.input"] == (everything.min().item(), everything.max().item())
    assert ranges["4.input"] == pytest.approx((hidden.min().item(), hidden.max().item()), rel=1e-6)


def test_moving_average_follows_the_batches(model):
    batches = [torch.full((4, 6), v).index_fill(0, torch.tensor([0]), -v) for v in (1.0, 3.0)]
    fxquant.calibrate(model, batches, method="moving_average")
    low, high = _ranges(model)["0.input"]
    assert (low, high) == pytest.approx((-1.02, 1.02))  # 1 + 0.01 · (3 − 1)


def test_a_second_calibration_forgets_the_first(model):
    fxquant.calibrate(model, [torch.randn(4, 6) * 100])
    fxquant.calibrate(model, [torch.ones(4, 6)])
    assert _ranges(model)["0.input"] == (1.0, 1.0)


def test_modes_statistics_and_weights_stay(model):
    model.train()
    model[1].eval()
    kept = {k: v.clone() for k, v in model.state_dict().items() if isinstance(v, torch.Tensor) and "quant" not in k}
    fxquant.calibrate(model, [torch.randn(4, 6)])
    assert [m.training for m in model] == [True, False, True, True, True]
    assert all(torch.equal(model.state_dict()[k], v) for k, v in kept.items())


@pytest.mark.parametrize("batch", [(torch.ones(4, 6),), [torch.ones(4, 6)], {"input": torch.ones(4, 6)}], ids=repr)
def test_kinds_of_batches(model, batch):
    fxquant.calibrate(model, [batch])
    assert _ranges(model)["0.input"] == (1.0, 1.0)


def _fails_in_the_second_batch():
    yield torch.randn(4, 6)
    raise KeyError("worker died")


@pytest.mark.parametrize(
    ("data", "error", "match"),
    [
        ([], InvalidArgument, "at least one batch: got none"),
        ([3], InvalidArgument, "each batch of data must be a tensor, .* got int"),
        (_fails_in_the_second_batch(), KeyError, "worker died"),
    ],
    ids=["empty", "wrong type", "loader fails"],
)
def test_after_an_error_the_old_ranges_are_back(model, data, error, match):
    fxquant.calibrate(model, [torch.ones(4, 6)])
    before, modes = _ranges(model), [q.mode(training=False) for _, q in quantizers(model)]
    with pytest.raises(error, match=match):
        fxquant.calibrate(model, data)
    assert _ranges(model) == before
    assert [q.mode(training=False) for _, q in quantizers(model)] == modes
    assert all(q.calibrating is None for _, q in quantizers(model))


def test_unknown_method_and_unprepared_model(model):
    with pytest.raises(InvalidArgument, match=r"method must be one of 'max', 'minmax', .*: got 'median'"):
        fxquant.calibrate(model, [torch.ones(4, 6)], method="median")
    with pytest.raises(InvalidArgument, match="calibrate must be given a prepared model: got Sequential"):
        fxquant.calibrate(_net(), [torch.ones(4, 6)])


def test_sites_that_saw_nothing_are_named():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x, both=True):
            return self.second(self.first(x)) if both else self.first(x)

    model = fxquant.prepare(Branch(), (torch.randn(2, 4),))
    with pytest.warns(NotQuantizedWarning, match=r"1 sites saw no data in calibration: second\.input"):
        fxquant.calibrate(model, [{"x": torch.randn(2, 4), "both": False}])
    both, alone = torch.randn(2, 4), torch.randn(2, 4)
    fxquant.calibrate(model, [both])
    before = _ranges(model)
    with pytest.warns(NotQuantizedWarning, match=r"1 of them keep the ranges that they had"):
        fxquant.calibrate(model, [{"x": alone, "both": False}])
    extremes = (alone.min().item(), alone.max().item())
    assert _ranges(model) == {"first.input": extremes, "second.input": before["second.input"]}
    assert all(q.resolved for _, q in quantizers(model) if q.stateful)


def test_labels_beside_the_inputs_are_named():
    model, x = fxquant.prepare(nn.Sequential(nn.Linear(4, 4)), (torch.randn(2, 4),)), torch.randn(8, 4)
    for method in ("max", "mse"):
        with pytest.raises(InvalidArgument) as caught:
            fxquant.calibrate(model, [(x, x)], method=method, progress=False)
        assert str(caught.value) == (
            "each batch of data must be what the model is called with: got 2 values, and Sequential.forward takes "
            "(input): too many positional arguments. Leave labels out: `((x,) for x, y in loader)`."
        )
    with pytest.raises(InvalidArgument, match=r"got the names input, labels, and Sequential\.forward takes \(input\)"):
        fxquant.calibrate(model, [{"input": x, "labels": x}], progress=False)
    fxquant.calibrate(model, [{"input": x}], progress=False)


@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_named(odd):
    model, x = fxquant.prepare(nn.Sequential(nn.Linear(4, 4)), (torch.randn(2, 4),)), torch.randn(8, 4)
    x[3, 2] = odd
    with pytest.warns(NotQuantizedWarning, match=r"0\.input\. Batch 0 of data holds values that are not finite"):
        fxquant.calibrate(model, [x], progress=False)


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
def test_a_batch_that_is_not_finite_among_others_is_told(odd, recwarn):
    """Its tensors keep the ranges of the others; −inf is what masks hold."""
    model, good = fxquant.prepare(nn.Sequential(nn.Linear(4, 4)), (torch.randn(2, 4),)), torch.randn(8, 4)
    bad = good.clone()
    bad[3, 2] = odd
    fxquant.calibrate(model, [good, 2 * bad], progress=False)
    told = [str(each.message) for each in recwarn if "batches of data" in str(each.message)]
    assert len(told) == (odd != -float("inf"))
    assert all(text.startswith("1 of 2 batches of data hold NaN or +inf, the first of them batch 1: ") for text in told)
    (held,) = [q for key, q in quantizers(model) if key == "0.input"]
    assert held.max_val.item() == good.max().item() and held.min_val.item() == good.min().item()
