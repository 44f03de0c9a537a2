"""Methods that need labels against reference numbers, with gradients."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from distill_kd import KDLoss
from distill_kd.dkd import DKDLoss
from distill_kd.nkd import NKDLoss
from distill_kd.tf_kd import VirtualTeacherLoss
from distill_kd.uskd import USKDHead, USKDLoss
from distill_kd.wsld import WSLDLoss

GOLDEN = Path(__file__).parent / "golden"
METHODS = ("dkd", "nkd", "tfkd", "uskd", "wsld")
STORED = {name: json.loads((GOLDEN / f"{name}.json").read_text()) for name in METHODS}
CASES = {case["id"]: case for stored in STORED.values() for case in stored["cases"]}


def virtual(params, student, targets):
    """The reference's alpha and multiplier weigh the virtual teacher."""
    alpha, beta = 1 - params["alpha"], params["alpha"] * params["multiplier"]
    sure = params["correct_prob"]
    return VirtualTeacherLoss(params["temperature"], alpha, beta, sure, "mean")(student, targets)


def self_training(params, *given):
    alpha, beta = 1 - params["alpha"], params["alpha"] * params["multiplier"]
    return KDLoss(params["temperature"], alpha, beta, "mean")(*given)


COMPUTED = {
    "dkd default": lambda p, s, t, y: DKDLoss(**p)(s, t, y),
    "nkd default": lambda p, s, t, y: NKDLoss(p["temp"], p["gamma"])(s, t, y),
    "tfkd reg_elementmean": lambda p, s, _, y: virtual(p, s, y),
    "tfkd self_elementmean": self_training,
    "tfkd self": lambda p, s, t, y: KDLoss(**p)(s, t, y),
    "uskd default": lambda p, s, weak, y: USKDLoss(**p)(s, weak, y),
    "uskd paper_rank": lambda p, s, weak, y: USKDLoss(**p, rank="paper")(s, weak, y),
    "wsld soft_term": lambda p, s, t, y: WSLDLoss(**p)(s, t, y),
    "wsld total": lambda p, s, t, y: F.cross_entropy(s, y) + WSLDLoss(**p)(s, t, y),
}
"""By method and variant: of its parameters, student, teacher (or weak logits) and targets."""


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_loss_and_gradients_equal_the_reference(case, dtype):
    with np.load(GOLDEN / case["file"], allow_pickle=False) as stored:
        start = case["id"] + "/"
        names = [key for key in stored.files if key.startswith(start)]
        arrays = {key.removeprefix(start): stored[key] for key in names}
    targets = torch.from_numpy(arrays["in.target"]) if "in.target" in arrays else None
    student = torch.tensor(arrays["in.student_logits"], dtype=dtype, requires_grad=True)
    learned, teacher = {"student_logits": student}, None
    if "in.teacher_logits" in arrays:
        teacher = torch.tensor(arrays["in.teacher_logits"], dtype=dtype)
    if case["modules"]:
        fc = {name: torch.tensor(arrays[f"mod.fc.{name}"]) for name in ("weight", "bias")}
        head = USKDHead(*fc["weight"].T.shape).to(dtype)
        head.linear.load_state_dict(fc)
        features = torch.tensor(arrays["in.mid_feature"], dtype=dtype, requires_grad=True)
        teacher = head(features)
        learned |= {f"fc.{name}": parameter for name, parameter in head.linear.named_parameters()}
        learned["mid_feature"] = features

    loss = COMPUTED[f"{case['method']} {case['variant']}"](
        case["params"], student, teacher, targets
    )
    loss.backward()

    tolerance = case["tolerance"][str(dtype).removeprefix("torch.")]
    assert loss.dtype == dtype
    assert abs(loss.item() - case["expected"]["loss"]) <= tolerance["loss"]
    assert set(case["expected"]["grads"]) == set(learned)
    for name, tensor in learned.items():
        expected = arrays[f"exp.grad.{name}"]
        assert np.abs(tensor.grad.numpy() - expected).max() <= tolerance["grad"], name


@pytest.mark.parametrize("method", METHODS)
def test_every_variant_of_the_reference_is_covered(method):
    stored = STORED[method]
    assert {case["variant"] for case in stored["cases"]} == set(stored["method"]["variants"])


@pytest.mark.parametrize(
    ("loss", "case"),
    [
        (DKDLoss(), "dkd-01"),
        (NKDLoss(), "nkd-01"),
        (USKDLoss(), "uskd-01"),
        (WSLDLoss(), "wsld-01"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_the_default_is_the_reference_s(loss, case):
    assert CASES[case]["default_parameters"]
    renamed = {"temp": "temperature"}
    assert all(
        getattr(loss, renamed.get(name, name)) == value
        for name, value in CASES[case]["params"].items()
    )


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (DKDLoss(4.0, 1.0, 8.0), 1.306163),
        (DKDLoss(1.0, 1.0, 0.5), 0.331521),
        (NKDLoss(1.0, 1.5), 1.768551),
        (WSLDLoss(2.0, 2.5), 10.250959),
        (USKDLoss(1.0, 0.1, 0.005), 2.524153),
        (USKDLoss(1.0, 0.1, 0.005, rank="paper"), 2.525811),
        (KDLoss(2.0, 0.0, standardize=True), 0.128696),
    ],
    ids=lambda value: type(value).__name__,
)
def test_equals_the_values_published_codes_give_on_closed_form_logits(loss, expected):
    """For USKD the second logits are the weak ones."""
    b, k = torch.meshgrid(torch.arange(4.0), torch.arange(5.0), indexing="ij")
    student, teacher = 2 * torch.sin(0.7 * b + 1.3 * k), 2 * torch.cos(0.5 * b + 0.9 * k)
    found = loss(student.double(), teacher.double(), torch.arange(4))
    assert found.item() == pytest.approx(expected, abs=2e-6)


def test_equals_the_value_of_the_virtual_teacher_on_closed_form_logits():
    b, k = torch.meshgrid(torch.arange(4.0), torch.arange(5.0), indexing="ij")
    student = 2 * torch.sin(0.7 * b + 1.3 * k).double()
    found = VirtualTeacherLoss(20.0, alpha=0.0)(student, torch.arange(4))
    assert found.item() == pytest.approx(0.817342, abs=2e-6)
