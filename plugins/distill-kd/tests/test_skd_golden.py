"""SKDLoss against reference numbers: stored cases with gradients, and a closed-form table."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from distill_kd.skd import SKDLoss

GOLDEN = Path(__file__).parent / "golden"
STORED = [
    json.loads((GOLDEN / f"skd_{term}.json").read_text()) for term in ("direction", "instance")
]
CASES = {case["id"]: case for stored in STORED for case in stored["cases"]}
FORMS = {
    ("skd_direction", "paper"): {"masks": "none", "scale_by_classes": False},
    ("skd_direction", "code"): {},
    ("skd_instance", "paper"): {"masks": "none"},
    ("skd_instance", "code_author"): {},
    ("skd_instance", "code_torchdistill"): {"masks": "samples"},
}
"""By method and variant of the reference."""


def parameters_of(case):
    """Translate a variant of the reference into SKDLoss's own parameters."""
    params = {key: value for key, value in case["params"].items() if key != "mode"}
    of_direction = case["method"] == "skd_direction"
    beta = 0.0 if of_direction else 1.0
    if (case["method"], case["variant"]) == ("skd_instance", "paper"):  # without T^2
        beta = params["temperature"] ** -2
    weights = {"alpha": 0.0, "beta": beta, "gamma": float(of_direction)}
    return params | weights | FORMS[case["method"], case["variant"]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_loss_and_gradient_equal_the_reference(case, dtype):
    with np.load(GOLDEN / case["file"], allow_pickle=False) as stored:
        arrays = {key.removeprefix(case["id"] + "/"): stored[key] for key in stored.files}
    student = torch.tensor(arrays["in.student_logits"], dtype=dtype, requires_grad=True)
    teacher = torch.tensor(arrays["in.teacher_logits"], dtype=dtype)

    loss = SKDLoss(**parameters_of(case))(student, teacher)
    loss.backward()

    tolerance = case["tolerance"][str(dtype).removeprefix("torch.")]
    assert loss.dtype == dtype
    assert abs(loss.item() - case["expected"]["loss"]) <= tolerance["loss"]
    difference = np.abs(student.grad.numpy() - arrays["exp.grad.student_logits"]).max()
    assert difference <= tolerance["grad"]


def test_every_variant_of_the_reference_is_covered():
    variants = {
        (case["method"], name)
        for stored in STORED
        for case in stored["cases"]
        for name in stored["method"]["variants"]
    }
    assert {(case["method"], case["variant"]) for case in CASES.values()} == variants == set(FORMS)


@pytest.mark.parametrize(("scale_by_classes", "expected"), [(True, 0.308989), (False, 1.341004)])
def test_equals_the_values_published_codes_give_on_closed_form_logits(scale_by_classes, expected):
    b, k = torch.meshgrid(torch.arange(4.0), torch.arange(5.0), indexing="ij")
    student, teacher = 2 * torch.sin(0.7 * b + 1.3 * k), 2 * torch.cos(0.5 * b + 0.9 * k)
    params = {"alpha": 0.0, "beta": 0.0, "gamma": 1.0, "masks": "none"}
    loss = SKDLoss(**params, scale_by_classes=scale_by_classes)(student.double(), teacher.double())
    assert loss.item() == pytest.approx(expected, abs=2e-6)
