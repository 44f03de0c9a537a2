"""DISTLoss against reference numbers: stored cases with gradients."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from distill_kd import DISTLoss

GOLDEN = Path(__file__).parent / "golden"
STORED = json.loads((GOLDEN / "dist.json").read_text())
CASES = {case["id"]: case for case in STORED["cases"]}
EPS_FORMS = {"default": "clamped", "eps_added": "added"}
"""By variant of the reference."""


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_loss_and_gradient_equal_the_reference(case, dtype):
    with np.load(GOLDEN / case["file"], allow_pickle=False) as stored:
        arrays = {key.removeprefix(case["id"] + "/"): stored[key] for key in stored.files}
    student = torch.tensor(arrays["in.student_logits"], dtype=dtype, requires_grad=True)
    teacher = torch.tensor(arrays["in.teacher_logits"], dtype=dtype)
    params = dict(case["params"])
    params["temperature"] = params.pop("tau")

    loss = DISTLoss(**params, eps_form=EPS_FORMS[case["variant"]])(student, teacher)
    loss.backward()

    tolerance = case["tolerance"][str(dtype).removeprefix("torch.")]
    assert loss.dtype == dtype
    assert abs(loss.item() - case["expected"]["loss"]) <= tolerance["loss"]
    difference = np.abs(student.grad.numpy() - arrays["exp.grad.student_logits"]).max()
    assert difference <= tolerance["grad"]


def test_every_variant_of_the_reference_is_covered():
    variants = set(STORED["method"]["variants"])
    assert {case["variant"] for case in CASES.values()} == variants == set(EPS_FORMS)


def test_the_default_is_the_reference_s():
    case = CASES["dist-01"]
    params = dict(case["params"]) | {"temperature": case["params"]["tau"]}
    loss = DISTLoss()
    assert case["default_parameters"]
    assert loss.eps_form == EPS_FORMS[case["variant"]]
    assert all(getattr(loss, n) == params[n] for n in ("temperature", "beta", "gamma", "eps"))
