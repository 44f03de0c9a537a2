"""CTKDLoss: its formula, the reversed temperature, the counted steps, layouts and extremes."""

from __future__ import annotations

import doctest
import math

import pytest
import torch

import distill
import distill_kd.ctkd
from distill.testing import LossConformance, toy_experiment, toy_registry
from distill_kd import logits as logits_module
from distill_kd.ctkd import CTKDLoss

each_form = pytest.mark.parametrize("form", ["global", "instance"])


def logits(*shape, seed=0, scale=2.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=dtype)


def softmax(row, temperature=1.0):
    powers = [math.exp(value / temperature) for value in row]
    return [power / sum(powers) for power in powers]


def kl(student, teacher, temperature):
    p, q = softmax(teacher, temperature), softmax(student, temperature)
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def standardized_by_hand(row):
    mean = sum(row) / len(row)
    deviation = math.sqrt(sum((x - mean) ** 2 for x in row) / (len(row) - 1))
    return [(x - mean) / (deviation + 1e-7) for x in row]


def sigmoid(value):
    return 1 / (1 + math.exp(-value))


def made(form="global", classes=5, ramp_steps=10, **params):
    """Return a loss in float64 whose temperatures differ from sample to sample, if it has such."""
    torch.manual_seed(0)
    loss = CTKDLoss(ramp_steps, form, hidden=7, **params)
    loss.setup(torch.zeros(1, classes), torch.zeros(1, classes))
    if loss.layers is not None:
        torch.nn.init.normal_(loss.layers[2].weight)
    return loss.double()


def temperatures(loss, student, teacher):
    with torch.no_grad():
        found = loss.temperature(loss.rows(student, teacher))
    return found.expand(student[..., 0].numel(), 1)[:, 0].tolist()


@each_form
@pytest.mark.parametrize("standardize", [False, True])
def test_equals_the_formula_written_out(standardize, form):
    student, teacher = logits(4, 5, seed=1), logits(4, 5, seed=2)
    loss = made(form, t_start=0.7, t_range=9.0, initial=-0.4, standardize=standardize)
    found = temperatures(loss, student, teacher)
    expected = 0.0
    for s, t, temperature in zip(student.tolist(), teacher.tolist(), found, strict=True):
        if standardize:
            s, t = standardized_by_hand(s), standardized_by_hand(t)
        expected += temperature**2 * kl(s, t, temperature) / 4
    assert loss(student, teacher).item() == pytest.approx(expected, rel=1e-10)
    assert len(set(found)) == (1 if form == "global" else 4)
    if form == "global":
        assert found[0] == pytest.approx(0.7 + 9 * sigmoid(-0.4))


def test_the_instance_form_is_two_layers_on_both_outputs():
    student, teacher = logits(3, 4, seed=1), logits(3, 4, seed=2)
    loss = made("instance", classes=4)
    first, last = loss.layers[0], loss.layers[2]
    inside = (torch.cat([teacher, student], 1) @ first.weight.T + first.bias).relu()
    theta = (inside @ last.weight.T + last.bias)[:, 0]
    expected = (1 + 20 * theta.sigmoid()).tolist()
    assert temperatures(loss, student, teacher) == pytest.approx(expected)


def test_both_forms_start_with_the_authors_temperature_for_all():
    student, teacher = logits(3, 4, seed=1), logits(3, 4, seed=2)
    expected = [1 + 20 * sigmoid(1.0)] * 3
    for form in ("global", "instance"):
        loss = CTKDLoss(10, form).double()
        loss.setup(student, teacher)
        assert temperatures(loss.double(), student, teacher) == pytest.approx(expected)


@each_form
def test_the_student_s_gradient_equals_finite_differences(form):
    student, teacher = logits(4, 5, seed=3).requires_grad_(), logits(4, 5, seed=4)
    loss = made(form)
    fixed = torch.tensor(temperatures(loss, student, teacher), dtype=torch.float64)[:, None]
    (gradient,) = torch.autograd.grad(loss(student, teacher), student)

    def at_these_temperatures(s):
        p, q = (teacher / fixed).log_softmax(1), (s / fixed).log_softmax(1)
        return (fixed[:, 0].square() * (p.exp() * (p - q)).sum(1)).mean()

    assert torch.autograd.gradcheck(at_these_temperatures, student)
    # Its temperature depends on the student's logits, which does not teach the student.
    wanted = torch.autograd.grad(at_these_temperatures(student), student)
    torch.testing.assert_close(gradient, *wanted)


@each_form
@pytest.mark.parametrize("steps", [1, 3, 10, 25])
def test_the_temperature_s_gradient_is_reversed_as_much_as_the_steps_say(steps, form):
    student, teacher = logits(4, 5, seed=1), logits(4, 5, seed=2)
    loss = made(form)
    for _ in range(steps):
        value = loss(student, teacher)
    strength = (1 - math.cos(math.pi * min(steps / 10, 1))) / 2
    parameters = list(loss.parameters())
    for parameter, gradient in zip(parameters, torch.autograd.grad(value, parameters), strict=True):
        place = tuple(0 for _ in parameter.shape)
        slope = finite_difference(loss, student, teacher, parameter, place)
        assert gradient[place].item() == pytest.approx(-strength * slope, rel=1e-5, abs=1e-9)


def finite_difference(loss, student, teacher, parameter, place, step=1e-5):
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            parameter[place] += sign * step
            values.append(loss.eval()(student, teacher).item())
            parameter[place] -= sign * step
    loss.train()
    return (values[0] - values[1]) / (2 * step)


def test_a_step_of_the_optimizer_makes_it_harder():
    student, teacher = logits(8, 5, seed=1), logits(8, 5, seed=2)
    loss = made(ramp_steps=1)
    before = loss(student, teacher)
    (gradient,) = torch.autograd.grad(before, loss.theta)
    with torch.no_grad():
        loss.theta -= 0.1 * gradient
    assert loss(student, teacher) > before


def test_only_training_counts_steps():
    student, teacher = logits(2, 3, seed=1), logits(2, 3, seed=2)
    loss = CTKDLoss(4)
    assert loss.strength() == 0
    loss(student, teacher)
    loss.eval()(student, teacher)
    assert loss.steps == 1
    assert loss.strength().item() == pytest.approx((1 - math.cos(math.pi / 4)) / 2)
    other = CTKDLoss(4)
    other.load_state_dict(loss.state_dict())
    assert other.steps == 1


def test_a_run_counts_its_steps_and_no_rehearsal(tmp_path):
    built = []

    class Kept(CTKDLoss):
        def __init__(self, ramp_steps: int, form: distill_kd.ctkd.Form = "global"):
            super().__init__(ramp_steps, form, hidden=4)
            built.append(self)

    stage = {
        "epochs": 2,
        "data": {"train": "train", "batch_size": 8},
        "teacher": {"model": "wide"},
        "criterion": {"kept": {"type": "Kept", "params": {"ramp_steps": 6, "form": "instance"}}},
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
    }
    experiment = toy_experiment(tmp_path, stage)
    distill.run(experiment, registry=toy_registry(losses={"Kept": Kept}), runs=tmp_path)
    last = built[-1]
    assert last.steps == 6  # 20 samples make 3 batches
    assert last.strength() == 1
    assert last.layers[2].weight.abs().sum() > 0  # which start as zeros


@each_form
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_identical_logits_give_zero_and_no_gradient(dtype, form):
    student = logits(5, 5, dtype=dtype).requires_grad_()
    loss = made(form)(student, student.detach().clone())
    loss.backward()
    assert abs(loss.item()) < 1e-4
    assert student.grad.abs().max() < 1e-5


@each_form
def test_parts_give_the_same_loss_and_gradients_as_the_whole(form, monkeypatch):
    student, teacher = logits(7, 5, seed=1), logits(7, 5, seed=2)
    results = []
    for at_once in (2**25, 10):
        monkeypatch.setattr(logits_module, "AT_ONCE", at_once)
        loss = made(form, ramp_steps=3)
        given = student.clone().requires_grad_()
        value = loss(given, teacher)
        gradients = torch.autograd.grad(value, [given, *loss.parameters()])
        results.append([value, *gradients])
    for whole, parts in zip(*results, strict=True):
        torch.testing.assert_close(parts, whole)


@each_form
@pytest.mark.parametrize("hole", [1e4, math.nan])
def test_samples_that_do_not_count_are_as_if_they_were_not_there(hole, form):
    student, teacher = logits(5, 5, seed=1), logits(5, 5, seed=2)
    student[1] = hole
    kept = [0, 2, 3]
    targets, mask = torch.tensor([0, -100, 2, 3, 1]), torch.tensor([1, 1, 1, 1, 0])
    loss = made(form, ramp_steps=1)
    found = loss(student, teacher, targets, mask)
    expected = loss(student[kept], teacher[kept])
    torch.testing.assert_close(found, expected)
    parameters = list(loss.parameters())
    gradients = (torch.autograd.grad(value, parameters) for value in (found, expected))
    for gradient, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, wanted)


@each_form
@pytest.mark.parametrize(("dims", "shape"), [((0, 3, 1, 2), (2, 2, 3, 5)), ((0, 1, 2), (2, 6, 5))])
def test_of_dense_logits_and_texts_each_position_counts(dims, shape, form):
    student, teacher = logits(*shape, seed=1), logits(*shape, seed=2)
    loss = made(form)
    found = loss(student.permute(dims), teacher.permute(dims))
    rows = (side.reshape(12, 5) for side in (student, teacher))
    torch.testing.assert_close(found, loss(*rows))


@each_form
@pytest.mark.parametrize("low", [-1e4, -math.inf])
def test_a_one_hot_teacher_and_huge_logits_give_finite_numbers(low, form):
    if form == "instance" and math.isinf(low):
        pytest.skip("its layers need finite logits")
    student = torch.tensor([[1e4, 0.0, -1e4], [-1e4, 1e4, 0.0]], requires_grad=True)
    teacher = torch.tensor([[low, 0.0, low], [0.0, low, low]])
    loss = made(form, classes=3)
    value = loss(student, teacher)
    value.backward()
    assert value.isfinite()
    assert student.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in loss.parameters())


def test_nan_logits_are_not_hidden():
    student = logits(2, 3)
    student[0, 0] = math.nan
    assert CTKDLoss(10)(student, logits(2, 3, seed=1)).isnan()


@each_form
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_computed_in_float32(dtype, form):
    student = logits(8, 5, seed=1).to(dtype).requires_grad_()
    teacher = logits(8, 5, seed=2).to(dtype)
    loss = made(form).float()
    value = loss(student, teacher)
    value.backward()
    exact = loss.double()(student.detach().double(), teacher.double())
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(exact.item(), rel=1e-3)
    assert student.grad.dtype == dtype


class TestCTKDLoss(LossConformance):
    teacher = "teacher"

    def make(self):
        return CTKDLoss(10)

    def tensors(self, batch):
        return {"student": torch.randn(batch, 5), "teacher": torch.randn(batch, 5)}


class TestCTKDLossOfInstances(TestCTKDLoss):
    def make(self):
        # Its temperature follows the student without teaching it: it must not move here.
        loss = CTKDLoss(10, "instance")
        loss.setup(torch.zeros(1, 5), torch.zeros(1, 5))
        return loss


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"ramp_steps": 0}, "ramp_steps must be a whole number >= 1, got 0"),
        ({"form": "local"}, "form must be one of 'global', 'instance', got 'local'"),
        ({"t_start": 0.0}, r"t_start must be a finite number > 0, got 0\.0"),
        ({"t_range": math.inf}, "t_range must be a finite number > 0, got inf"),
        ({"initial": math.nan}, "initial must be a finite number, got nan"),
        ({"hidden": 0}, "hidden must be a whole number >= 1, got 0"),
    ],
)
def test_a_parameter_out_of_range_is_named_with_what_is_allowed(params, message):
    with pytest.raises(ValueError, match=f"CTKDLoss: {message}"):
        CTKDLoss(**{"ramp_steps": 10, **params})


def test_the_instance_form_says_that_its_layers_are_missing():
    with pytest.raises(RuntimeError, match=r"no layers yet.*call setup\(student, teacher\) first"):
        CTKDLoss(10, "instance")(torch.zeros(2, 3), torch.zeros(2, 3))


def test_printing_shows_every_parameter():
    assert repr(CTKDLoss(10)) == (
        "CTKDLoss(ramp_steps=10, form='global', t_start=1.0, t_range=20.0, initial=1.0, "
        "hidden=128, standardize=False, ignore_index=-100, class_dim=None)"
    )


def test_docstring_examples_hold():
    results = doctest.testmod(distill_kd.ctkd)
    assert results.attempted > 0
    assert results.failed == 0
