"""KDLoss against reference numbers: stored cases with gradients, and a closed-form table."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from distill_kd import KDLoss

GOLDEN = Path(__file__).parent / "golden"
METHODS = [json.loads((GOLDEN / name).read_text()) for name in ("kd.json", "logit_std_kd.json")]
CASES = {case["id"]: case for method in METHODS for case in method["cases"]}


def parameters_of(case):
    """Translate a variant of the reference into KDLoss's own parameters."""
    params = {name: value for name, value in case["params"].items() if name != "eps"}
    params["standardize"] = case["method"] == "logit_std_kd"
    match case["variant"]:
        case "kl_t2":
            params["alpha"] = 0.0
        case "kl_plain":  # without T^2 and without beta
            params |= {"alpha": 0.0, "beta": params["temperature"] ** -2}
        case "soft_ce":  # its alpha weighs the teacher; the labels' part is the caller's
            params |= {"alpha": 0.0, "beta": params["alpha"], "soft_term": "cross_entropy"}
    return params


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_loss_and_gradient_equal_the_reference(case, dtype):
    with np.load(GOLDEN / case["file"], allow_pickle=False) as stored:
        arrays = {key.removeprefix(case["id"] + "/"): stored[key] for key in stored.files}
        expected = {"loss": arrays["exp.loss"], "grad": arrays["exp.grad.student_logits"]}
    assert case["expected"]["loss"] == expected["loss"]
    student = torch.tensor(arrays["in.student_logits"], dtype=dtype, requires_grad=True)
    teacher = torch.tensor(arrays["in.teacher_logits"], dtype=dtype)
    targets = torch.from_numpy(arrays["in.target"]) if "in.target" in arrays else None

    loss = KDLoss(**parameters_of(case))(student, teacher, targets)
    loss.backward()

    tolerance = case["tolerance"][str(dtype).removeprefix("torch.")]
    assert loss.dtype == dtype
    assert abs(loss.item() - expected["loss"]) <= tolerance["loss"]
    assert np.abs(student.grad.numpy() - expected["grad"]).max() <= tolerance["grad"]


def test_every_variant_of_the_reference_is_covered():
    variants = {name for method in METHODS for name in method["method"]["variants"]}
    assert {case["variant"] for case in CASES.values()} == variants


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"alpha": 1.0}, 2.514166),
        ({"alpha": 0.0, "temperature": 1.0}, 0.347479),
        ({"alpha": 0.0, "temperature": 4.0}, 0.343564),
        ({"alpha": 0.1, "beta": 0.9, "temperature": 4.0}, 0.1 * 2.514166 + 0.9 * 0.343564),
        ({"alpha": 1.0, "beta": 3.0, "temperature": 1.0}, 2.514166 + 3 * 0.347479),
    ],
)
def test_equals_the_values_published_codes_give_on_closed_form_logits(params, expected):
    b, k = torch.meshgrid(torch.arange(4.0), torch.arange(5.0), indexing="ij")
    student, teacher = 2 * torch.sin(0.7 * b + 1.3 * k), 2 * torch.cos(0.5 * b + 0.9 * k)
    loss = KDLoss(**params)(student.double(), teacher.double(), torch.arange(4))
    assert loss.item() == pytest.approx(expected, abs=2e-6)
