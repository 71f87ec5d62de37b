"""Distillation: the loss against float64, the float twin without a second copy, features out of one graph."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import fxquant
from fxquant import distill
from fxquant.errors import InvalidArgument, PlanMismatch
from fxquant.prepared.quantizer import quantizers
from tests.nets import ConvNet, Mlp, eager_runs

EAGER = "fxquant_eager"
X = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def cold() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


W2A8 = fxquant.Recipe(name="w2a8", weight=fxquant.QuantSpec(bits=2, narrow=True, axis=0, range=fxquant.CurrentTensor()))


def student(recipe: Any = W2A8) -> tuple[nn.Module, Any]:
    """A net whose answers are sure, so that rounding moves them, and whose ranges stay from call to call."""
    torch.manual_seed(0)
    model = fxquant.prepare(Mlp(), (X,), recipe=recipe)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    fxquant.calibrate(model, [X], progress=False)
    fxquant.freeze_ranges(model)
    return model, torch.compile(model, backend=EAGER)


def twin(model: nn.Module) -> nn.Module:
    """The float model, a copy."""
    return fxquant.strip(copy.deepcopy(model))


def divergence(mine: Tensor, its: Tensor, temperature: float, dim: int = -1) -> Tensor:
    """``T² · Σ p (ln p − ln q)``, the mean over rows, in float64."""
    p, q = (torch.softmax(each.detach().double() / temperature, dim) for each in (its, mine))
    return temperature**2 * (p * (p.log() - q.log())).sum(dim).mean()


@pytest.mark.parametrize("own", [True, False])
def test_the_formula(own: bool) -> None:
    model, compiled = student()
    found = distill.loss(compiled, None if own else twin(model), kl=0.5, temperature=2.0, features=["first"],
                         feature_weight=3.0)(X)  # fmt: skip
    plain, hidden = twin(model), {}
    plain.first.register_forward_hook(lambda *given: hidden.update(its=given[2]))
    aim = plain(X)
    model.first.register_forward_hook(lambda *given: hidden.update(mine=given[2]))
    torch._dynamo.reset()
    assert torch.equal(compiled(X), found.output)
    expected = 0.5 * divergence(found.output, aim, 2.0)
    apart = 3.0 * (hidden["mine"].double() - hidden["its"].double()).square().mean()
    assert found.parts["kl"].item() == pytest.approx(expected.item(), rel=1e-4)
    assert found.parts["first"].item() == pytest.approx(apart.item(), rel=1e-5)
    assert found.loss.item() == pytest.approx((expected + apart).item(), rel=1e-4)


def test_the_gradient_is_of_the_student_alone() -> None:
    """As if the teacher's answers had been given."""
    model, compiled = student()
    distill.loss(compiled)(X).loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    aim = twin(model)(X).detach()
    model.zero_grad()
    p = torch.softmax(aim, -1)
    (-(p * torch.log_softmax(compiled(X), -1)).sum(-1).mean()).backward()  # but for what the teacher alone decides
    assert all(torch.allclose(found[name], p.grad, rtol=1e-4, atol=1e-7) for name, p in model.named_parameters())


def _of_a_weights_form() -> set[int]:
    """The addresses of the tensors that are alive with the shape of the student's weights."""
    gc.collect()
    alive = [each for each in gc.get_objects() if type(each) in (Tensor, nn.Parameter)]
    return {each.data_ptr() for each in alive if each.shape == (8, 8)}


def test_the_twin_is_one_more_graph_and_no_second_copy_of_the_weights() -> None:
    model, compiled = student()
    before = _of_a_weights_form()  # other tests' too
    loss = distill.loss(compiled, features=("first", "second"))
    counters.clear()
    addresses, graphs = [], []
    for _ in range(3):
        loss(X).loss.backward()
        model.zero_grad()
        addresses.append(_of_a_weights_form())
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [2, 2, 2] and not counters["graph_break"] and eager_runs(model) == 0
    own = {model.first.weight.data_ptr(), model.second.weight.data_ptr()}
    assert all(own <= found <= before for found in addresses), "no other tensor of a weight's form has come alive"
    assert all(q.enabled for _, q in quantizers(model)) and model.training


def test_only_one_graph_is_the_students_own() -> None:
    """Called without the loss, the model without features runs the graph that it has."""
    _, compiled = student()
    distill.loss(compiled)(X)
    counters.clear()
    compiled(X)
    assert not counters["stats"]["unique_graphs"]


def test_the_twin_evaluates_and_leaves_batch_norm_alone() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 6, 6)
    model = fxquant.prepare(ConvNet(), (x,))
    alone = copy.deepcopy(model)
    step, other = (torch.compile(each, backend=EAGER) for each in (model, alone))
    out, loss, _ = distill.loss(step)(x)
    assert torch.equal(out, other(x))
    assert loss.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), alone.buffers(), strict=True))


def test_compiled_equals_eager() -> None:
    found = []
    for backend in (EAGER, "fxquant"):
        model, _ = student()
        result = distill.loss(torch.compile(model, backend=backend), features=["first"])(X)
        result.loss.backward()
        found.append((result.loss.detach(), *(p.grad for p in model.parameters())))
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-6) for a, b in zip(*found, strict=True))


def test_it_brings_the_student_nearer_to_its_teacher() -> None:
    torch.manual_seed(0)
    model, compiled = student()
    teacher = twin(model)
    loss = distill.loss(compiled, teacher)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    seen = []
    for _ in range(40):
        optimizer.zero_grad()
        found = loss(X).loss
        found.backward()
        optimizer.step()
        seen.append(found.item())
    assert sum(seen[-5:]) / 5 < 0.5 * seen[0], seen


@pytest.mark.parametrize("wrap", [dict, lambda logits: type("Output", (), {"logits": logits})()])
def test_where_the_logits_are(wrap: Any) -> None:
    class Answering(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Mlp()

        def forward(self, x: Tensor) -> Any:
            return {"logits": self.net(x)} if wrap is dict else (self.net(x), x)

    torch.manual_seed(0)
    model = fxquant.prepare(Answering(), (X,))
    compiled = torch.compile(model, backend=EAGER)
    if wrap is not dict:
        with pytest.raises(InvalidArgument, match="model must return a tensor, or something with logits: got tuple"):
            distill.loss(compiled)(X)
    picked = None if wrap is dict else (lambda output: output[0])
    assert distill.loss(compiled, logits=picked)(X).loss.item() > 0


def test_classes_in_another_dimension() -> None:
    model, compiled = student()
    found = distill.loss(compiled, dim=0, temperature=3.0)(X)
    assert found.loss.item() == pytest.approx(divergence(found.output, twin(model)(X), 3.0, dim=0).item(), rel=1e-3)


def test_a_model_compiled_in_place_and_one_prepared_alike_as_its_teacher() -> None:
    model, _ = student()
    teacher = copy.deepcopy(model)
    model.compile(backend=EAGER)
    first = distill.loss(model, teacher)(X)
    assert first.loss.item() == pytest.approx(distill.loss(model)(X).loss.item(), rel=1e-5)


def test_features_of_another_teacher() -> None:
    _, compiled = student()
    torch.manual_seed(5)
    teacher = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    found = distill.loss(compiled, teacher, kl=0.0, features={"first": "0"})
    assert set(found(X).parts) == {"first"} and teacher.training
    found.close()
    assert not teacher[0]._forward_hooks and not compiled._orig_mod.first._forward_hooks


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"features": ["frist"]}, r"features must be paths of modules of the student: got 'frist'\. Modules: first"),
        ({"features": [""]}, "features must be paths of modules of the student: got ''"),
        ({"features": {"first": "none"}, "teacher": nn.Linear(8, 8)}, "of modules of the teacher: got 'none'"),
        ({"kl": 0.0}, "loss must compare something: got kl=0 and no features"),
        ({"temperature": 0.0}, r"temperature must be a finite number above 0: got 0\.0"),
        ({"teacher": torch.relu}, "teacher must be a module, or None for the float twin: got "),
    ],
)
def test_what_cannot_be_compared(keywords: dict[str, Any], message: str) -> None:
    _, compiled = student()
    with pytest.raises(InvalidArgument, match=message):
        distill.loss(compiled, **keywords)


def test_a_student_that_would_be_float() -> None:
    model, _ = student()
    with pytest.raises(InvalidArgument, match="student must be compiled: got Mlp, which runs in float as it is"):
        distill.loss(model)
    with pytest.raises(InvalidArgument, match=r"distill\.loss must be given a prepared model: got Mlp"):
        distill.loss(torch.compile(Mlp()))


def test_a_teacher_with_another_plan() -> None:
    _, compiled = student()
    other, _ = student("int8")
    with pytest.raises(PlanMismatch, match=r"2 sites differ \(first\.weight: s8 .* in the model, s2 .* in the student"):
        distill.loss(compiled, other)


def test_answers_of_another_form() -> None:
    _, compiled = student()
    with pytest.raises(
        InvalidArgument, match=r"teacher must answer in the student's form: got \(16, 3\) and \(16, 8\)"
    ):
        distill.loss(compiled, nn.Linear(8, 3))(X)
    wide = nn.Sequential(nn.Linear(8, 9), nn.Linear(9, 8))
    with pytest.raises(InvalidArgument, match=r"features must have one form .* got \(16, 8\) and \(16, 9\) of 'first'"):
        torch._dynamo.reset()
        distill.loss(compiled, wide, features={"first": "0"})(X)


def test_hooks_that_come_too_late() -> None:
    _, compiled = student()
    compiled(X)
    with pytest.raises(InvalidArgument, match=r"got nothing of 'first' of the student.*make the loss first"):
        distill.loss(compiled, twin(compiled._orig_mod), features=["first"])(X)
