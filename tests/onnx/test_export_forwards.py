"""export_onnx of forwards that are not a chain of layers: their arguments, what they write, what no data reached."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import nn

import fxquant
from fxquant.errors import NotQuantizedWarning
from fxquant.prepared.quantizer import quantizers
from tests.onnx.agreement import assert_codes_agree
from tests.onnx.models import calibrated


def test_dict_and_keyword_inputs(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 4)

        def forward(self, batch, *, shift):
            return {"out": self.fc(batch["x"]) + shift}

    model, args = Net(), ({"x": torch.randn(4, 8)},)
    fxquant.prepare(model, args, {"shift": torch.ones(4, 4)})
    step = torch.compile(model, backend="fxquant_eager")
    step(*args, shift=torch.ones(4, 4))
    report = fxquant.export_onnx(model, args, tmp_path / "d.onnx", kwargs={"shift": torch.ones(4, 4)})
    assert report.dynamic_batch
    verified = fxquant.verify_onnx(model, args, tmp_path / "d.onnx", kwargs={"shift": torch.ones(4, 4)}, rounds=0)
    assert_codes_agree(verified)
    assert verified.integer_share == 1.0


def test_variadic_inputs(tmp_path):
    """Of each kind, the keywords in another order when verified, and a batch of another size."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 4)

        def forward(self, first, *others, scale=None, **more):
            y = self.fc(first) + sum(self.fc(x) for x in others)
            return (y if scale is None else y * scale) + more["left"] - 2 * more["right"]

    def inputs(batch):
        return tuple(torch.randn(batch, 8) for _ in range(3)), {k: torch.randn(batch, 4) for k in ("left", "right")}

    (args, more), path = inputs(3), tmp_path / "v.onnx"
    model = fxquant.prepare(Net(), args, more)
    torch.compile(model, backend="fxquant_eager")(*args, **more)
    report = fxquant.export_onnx(model.eval(), args, path, kwargs=more)
    assert report.dynamic_batch and not report.notes
    assert [i.name for i in onnx.load(path).graph.input] == ["first", "others_0", "others_1", "left", "right"]
    args, more = inputs(5)
    verified = fxquant.verify_onnx(model, args, path, kwargs=dict(reversed(more.items())), rounds=0)
    assert_codes_agree(verified)


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(29, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.table(x.contiguous()))


def test_an_example_that_is_a_view(tmp_path):
    """The tensor that it is a part of is of another size, and is no input."""
    tokens, path = torch.arange(32 * 17).reshape(32, 17) % 29, tmp_path / "net.onnx"
    model = calibrated(Tokens(), tokens[:, :-1])
    fxquant.export_onnx(model, (tokens[:, :-1],), path)
    assert not fxquant.verify_onnx(model, (tokens[:, 1:],), path).differing_codes  # beside the float model's export
    program = fxquant.export_program(model, (tokens[:, :-1],))
    found, lowered = (each.module()(tokens[:3, 1:]) for each in (program, program.run_decompositions()))
    torch.testing.assert_close(lowered, found, rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["sum", "max"])
def test_tables_of_embedding_bags_are_quantized(tmp_path, mode):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.EmbeddingBag(10, 4, mode=mode, padding_idx=0)), torch.randint(0, 10, (3, 5))
    fxquant.prepare(model, (x,))
    step = torch.compile(model, backend="fxquant_eager")
    out = step(x)
    out.square().sum().backward()
    table = model[0].weight.detach()
    scale = table.abs().max() / 127
    expected = nn.functional.embedding_bag(x, (table / scale).round() * scale, mode=mode, padding_idx=0)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)
    assert not torch.equal(out, model(x)) and model[0].weight.grad.count_nonzero()
    report = fxquant.export_onnx(model.eval(), (x,), tmp_path / "b.onnx")
    assert report.weights == ("0.weight",) and not report.notes
    (found,) = onnxruntime.InferenceSession(tmp_path / "b.onnx").run(None, {"input": x.numpy()})
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-6)
    assert "0.weight" in str(fxquant.explain(model))


def test_a_cache_that_forward_writes_is_read_and_named(tmp_path):
    class Cached(nn.Module):
        def __init__(self):
            super().__init__()
            self.key, self.out = nn.Linear(8, 8), nn.Linear(8, 4)
            self.register_buffer("keys", torch.ones(4, 8))

        def forward(self, x):
            self.keys[1:3] = self.key(x)
            return self.out(self.keys)

    torch.manual_seed(0)
    model, x = calibrated(Cached(), torch.randn(2, 8)), torch.randn(2, 8)
    model.keys.fill_(0.5)
    report = fxquant.export_onnx(model, (x,), tmp_path / "c.onnx", dynamic_batch=False)
    assert "forward writes keys: each run of the file begins with its value of now" in report.notes
    assert_codes_agree(fxquant.verify_onnx(model, (x,), tmp_path / "c.onnx", rounds=0))
    assert torch.equal(model.keys, torch.full((4, 8), 0.5))
    (out,) = onnxruntime.InferenceSession(tmp_path / "c.onnx").run(None, {"x": x.numpy()})
    rows = torch.stack([model.keys[0], *model.key(x), model.keys[3]])
    np.testing.assert_allclose(out, model.out(rows).detach().numpy(), atol=0.05)


def test_a_computed_weight_that_the_batch_repeats(tmp_path):
    """Relative positions: their projection depends on parameters only, its copies on the size of the batch."""

    class Relative(nn.Module):
        def __init__(self):
            super().__init__()
            self.rel, self.proj, self.q = nn.Parameter(torch.randn(12, 8)), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            rel, q = self.proj(self.rel), self.q(x)
            expanded = rel.expand(x.shape[0], 12, 8).transpose(-1, -2)
            return q @ expanded + q @ rel.repeat(x.shape[0], 1, 1).transpose(-1, -2)

    x = torch.randn(3, 5, 8)
    model = calibrated(Relative(), x)
    report = fxquant.export_onnx(model, (x,), tmp_path / "r.onnx")
    assert report.dynamic_batch and not report.notes
    assert_codes_agree(fxquant.verify_onnx(model, (torch.randn(7, 5, 8),), tmp_path / "r.onnx", rounds=0))


def test_a_site_that_the_evaluation_graph_lacks_is_reported(tmp_path):
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.main, self.extra = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.main(x) + (self.extra(x.relu()) if self.training else 0.0)

    model, x = Auxiliary(), torch.randn(4, 8)
    fxquant.prepare(model, (x,))
    torch.compile(model, backend="fxquant_eager")(x)
    with pytest.warns(NotQuantizedWarning, match="have no place in the exported graph"):
        fxquant.export_onnx(model, (x,), tmp_path / "m.onnx")
    assert fxquant.verify_onnx(model, (x,), tmp_path / "m.onnx", rounds=0).integer_share == 1.0


def test_a_tensor_of_zeros_is_exported_and_told(tmp_path):
    """A ReLU that never lets anything through: any positive scale is exact."""
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    nn.init.constant_(model[0].bias, -100.0)
    model, x = calibrated(model, torch.randn(4, 8)), torch.randn(4, 8)
    with pytest.warns(
        NotQuantizedWarning, match=r"^1 sites saw only zeros, and whatever comes in stays 0 there: 2\.in"
    ):
        report = fxquant.export_onnx(model, (x,), tmp_path / "m.onnx")
    assert len(report.notes) == 1 and report.notes[0].startswith("1 sites saw only zeros")
    verified = fxquant.verify_onnx(model, (x,), tmp_path / "m.onnx", rounds=0)
    assert_codes_agree(verified)
    (out,) = onnxruntime.InferenceSession(tmp_path / "m.onnx").run(None, {"input": x.numpy()})
    assert np.array_equal(out, model[2].bias.detach().expand(4, 4).numpy())


def test_experts_that_saw_no_token_and_heads_of_training_only(tmp_path):
    """The expert has the range of the others, the head, which is not in the file, none; both are told."""

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.experts = nn.Linear(8, 2), nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
            self.auxiliary = nn.Linear(8, 2)

        def forward(self, x):
            chosen, y = self.gate(x).argmax(-1), torch.zeros_like(x)
            for index, expert in enumerate(self.experts):
                rows = torch.where(chosen == index)[0]
                y = y.index_copy(0, rows, expert(x[rows]))
            return (y, self.auxiliary(y)) if self.training else y

    model, x, path = Experts(), torch.randn(6, 8), tmp_path / "m.onnx"
    model.gate.bias.data[1] = -100.0  # nothing goes to the second
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        model = calibrated(model, x)
        ranges = {key: q.range.describe(q.state) for key, q in quantizers(model)}
        with pytest.warns(NotQuantizedWarning) as said:
            report = fxquant.export_onnx(model, (x,), path)
        near, far, _ = [str(one.message) for one in said if one.category is NotQuantizedWarning]
        assert near.startswith("1 sites saw no data, and take the range that others") and "experts.1.input" in near
        assert far.startswith("1 sites saw no data; what the evaluated graph has") and "auxiliary.input" in far
        assert_codes_agree(fxquant.verify_onnx(model, (x,), path, rounds=0))
    assert set(report.activations) == {"gate.input", "experts.0.input", "experts.1.input"} and len(report.notes) == 2
    graph = onnx.load(path).graph
    numbers = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    pairs = {n.output[0]: [numbers[name] for name in n.input[1:]] for n in graph.node if n.op_type == "QuantizeLinear"}
    assert pairs["experts.0.input"] == pairs["experts.1.input"]
    assert all(quantizer.enabled for _, quantizer in quantizers(model))
    assert {key: q.range.describe(q.state) for key, q in quantizers(model)} == ranges
