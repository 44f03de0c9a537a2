"""What each term pulls the student with; this file is also what several processes run."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

import distill
from distill import Batch, Observer
from distill.builtin.torch_components import CrossEntropyLoss
from distill.model.criterion import Criterion
from distill.model.distiller import Distiller
from distill.model.wiring import Address, Call
from distill.testing import ToyMLP, run_processes, toy_experiment, toy_registry
from distill.training.term_gradients import TermProbe
from distill.weight_schedule import WeightSchedule

CPU = torch.device("cpu")
LINEAR = {
    "type": "Linear",
    "params": {"in_features": 8, "out_features": 12},
    "inputs": {"input": "student.body"},
}
KD = {"type": "MSELoss", "weight": 0.3, "inputs": {"input": "student", "target": "teacher"}}
HINT = {"type": "MSELoss", "inputs": {"input": "regressor", "target": "teacher.body"}}
DISTILLED = {
    "epochs": 2,
    "teacher": {"model": "wide"},
    "criterion": {"ce": {"type": "CrossEntropyLoss"}, "kd": KD},
}
WITH_HINT = {
    **DISTILLED,
    "auxiliary": {"regressor": LINEAR},
    "criterion": {**DISTILLED["criterion"], "hint": HINT},
}


class Recorder(Observer):
    """Keeps what log lines and stages tell."""

    def __init__(self):
        self.lines, self.notes = [], []
        RECORDERS.append(self)

    def stage_start(self, event):
        self.notes += event.notes

    def step_end(self, event):
        self.lines.append(event)


RECORDERS: list[Recorder] = []


class Dropping(ToyMLP):
    """Draws while it trains."""

    def __init__(self):
        super().__init__(dropout=0.5)


REGISTRY = toy_registry(observers={"Recorder": Recorder}, models={"Dropping": Dropping})


def trained(folder, *stages, log_every=1, observers=("Recorder",), **keys):
    """Run stages; return what was told a log line, and the last student's weights."""
    experiment = toy_experiment(
        folder, *stages, log_every=log_every, observers=list(observers), **keys
    )
    RECORDERS.clear()
    distill.run(experiment, registry=REGISTRY, runs=folder)
    last = experiment.stages[-1].name
    told = RECORDERS[0] if RECORDERS else None
    return told, load_file(folder / "toy" / last / "last.safetensors")


def measured(folder, *stages, **keys):
    told, _ = trained(folder, {"term_gradients": True, **stages[0]}, *stages[1:], **keys)
    return [line.term_gradients for line in told.lines]


def call(name, module, **arguments):
    return Call(name, module, {key: Address(value, value) for key, value in arguments.items()})


def batch_of(size=6):
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(size, 4, generator=generator)
    return Batch(inputs, torch.randint(3, (size,), generator=generator), torch.arange(size))


def probed(student, calls, weights, *, captures=(), share=1.0, scale=1.0, probe=None, batch=None):
    """Return what a probe finds on one batch."""
    asked = {"student": captures} if captures else {}
    distiller = Distiller(student, {}, (), Criterion(calls, weights), asked)
    probe = probe or TermProbe(distiller, CPU, "kd")
    with probe.recording():
        distiller(batch or batch_of())
    distiller.release()
    return probe.measure(share, scale)


class Square(nn.Module):
    """Half the squared sum of what it is given."""

    def forward(self, value):
        return 0.5 * value.double().square().sum()


class OnItsOwn(nn.Module):
    """A loss on a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, value):
        return self.weight.square() + 0 * value.detach().sum()


class Branches(nn.Module):
    """Two features side by side."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, inputs):
        return self.left(inputs) + self.right(inputs)


def student_of(cls=ToyMLP):
    torch.manual_seed(0)
    return cls().double() if cls is not ToyMLP else cls()


def two_terms(**weights):
    calls = [
        call("ce", CrossEntropyLoss(), student="student", targets="targets"),
        call("size", Square(), value="student"),
    ]
    return calls, {"ce": 1.0, "size": 0.25, **weights}


def test_numbers_are_those_of_the_weighted_terms_gradients_at_the_logits():
    student, batch = student_of(), batch_of()
    found = probed(student, *two_terms(ce=1.5))
    logits = student(batch.inputs).detach().requires_grad_()
    ce = F.cross_entropy(logits, batch.targets)
    (pulls,) = torch.autograd.grad(1.5 * ce, logits)
    size = 0.25 * logits.detach()
    assert found.at == ("student",)
    assert found.values == pytest.approx({"ce": ce.item(), "size": 8 * size.pow(2).sum().item()})
    assert found.weights == {"ce": 1.5, "size": 0.25}
    norms = {"ce": pulls.norm().item(), "size": size.norm().item()}
    assert found.norms == pytest.approx(norms, rel=1e-5)
    total = sum(norms.values())
    assert found.shares == pytest.approx({n: v / total for n, v in norms.items()}, rel=1e-5)
    cosine = F.cosine_similarity(pulls.flatten(), size.flatten(), 0).item()
    assert found.cosines == pytest.approx({"ce.size": cosine}, rel=1e-4)


def test_with_a_term_on_features_all_are_measured_at_the_last_value_that_all_depend_on():
    calls, weights = two_terms()
    calls.append(call("feature", Square(), value="student.body"))
    student, batch = student_of(), batch_of()
    found = probed(student, calls, {**weights, "feature": 2.0}, captures=["body"])
    body = student.body(batch.inputs).detach().requires_grad_()
    ce = F.cross_entropy(student.head(body), batch.targets)
    assert found.at == ("student.body",)
    assert found.norms["feature"] == pytest.approx(2 * body.norm().item(), rel=1e-5)
    pull = torch.autograd.grad(ce, body)[0]
    assert found.norms["ce"] == pytest.approx(pull.norm().item(), rel=1e-5)
    cosine = F.cosine_similarity(pull.flatten(), body.detach().flatten(), 0).item()
    assert found.cosines["ce.feature"] == pytest.approx(cosine, rel=1e-4)


def test_terms_on_parallel_branches_are_measured_at_all_of_them():
    student = student_of(Branches)
    calls = [
        call("left", Square(), value="student.left"),
        call("right", Square(), value="student.right"),
    ]
    batch = batch_of()
    double = Batch(batch.inputs.double(), batch.targets, batch.index)
    found = probed(
        student, calls, {"left": 1.0, "right": 1.0}, captures=["left", "right"], batch=double
    )
    assert set(found.at) == {"student.left", "student.right"}
    norms = {
        side: getattr(student, side)(double.inputs).norm().item() for side in ("left", "right")
    }
    assert found.norms == pytest.approx(norms)
    assert found.cosines == {"left.right": 0.0}


def test_a_feature_that_the_model_overwrites_is_measured_where_the_others_pass(tmp_path):
    class Overwriting(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, inputs):
            hidden = self.body(inputs)
            hidden *= 2
            return self.head(hidden)

    registry = toy_registry(observers={"Recorder": Recorder}, models={"Overwriting": Overwriting})
    models = {"mlp": {"type": "Overwriting"}, "wide": {"type": "ToyMLP", "params": {"hidden": 12}}}
    stage = {**WITH_HINT, "term_gradients": True}
    experiment = toy_experiment(tmp_path, stage, log_every=1, observers=["Recorder"], models=models)
    RECORDERS.clear()
    distill.run(experiment, registry=registry, runs=tmp_path)
    found = RECORDERS[0].lines[0].term_gradients
    assert found.at == ("student.body",)
    assert all(norm > 0 for norm in found.norms.values())


def test_a_term_that_does_not_depend_on_the_student_has_no_norm():
    calls, weights = two_terms()
    calls.append(call("own", OnItsOwn(), value="student"))
    found = probed(student_of(), calls, {**weights, "own": 1e6})
    assert found.at == ("student",)
    assert found.norms.keys() == {"ce", "size"} == found.shares.keys()
    assert found.values["own"] == 1.0
    assert found.warnings == ()


def test_tiny_gradients_keep_their_norm_and_direction():
    found = probed(student_of(), *two_terms(size=1e-30))
    full = probed(student_of(), *two_terms(size=1.0))
    assert found.norms["size"] == pytest.approx(1e-30 * full.norms["size"], rel=1e-5)
    assert found.cosines == pytest.approx(full.cosines, rel=1e-5)


def test_a_gradient_of_zero_has_no_cosine():
    found = probed(student_of(), *two_terms(size=0.0))
    assert found.norms["size"] == 0.0
    assert found.cosines == {}


def test_numbers_that_are_not_finite_are_not_told():
    assert probed(student_of(), *two_terms(size=math.inf)) is None


def test_the_scale_of_losses_and_the_batch_s_share_of_a_step_are_not_in_the_numbers():
    plain = probed(student_of(), *two_terms())
    assert probed(student_of(), *two_terms(), scale=1024.0) == plain
    assert probed(student_of(), *two_terms(), share=0.25) == plain


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_reduced_precision_gives_nearly_the_numbers_of_full(tmp_path, precision):
    full = measured(tmp_path / "full", WITH_HINT)[0]
    reduced = measured(tmp_path / "less", {**WITH_HINT, "precision": precision})[0]
    assert reduced.at == full.at == ("student.body",)
    assert reduced.norms == pytest.approx(full.norms, rel=0.02)
    assert reduced.cosines == pytest.approx(full.cosines, abs=0.02)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"precision": "fp16"},
        {"precision": "bf16", "clip": {"norm": 0.1}},
        {"data": {"train": "train", "batch_size": 4, "accumulate": 2}},
    ],
)
def test_training_is_the_same_to_the_bit(tmp_path, more):
    models = {"mlp": {"type": "Dropping"}, "wide": {"type": "ToyMLP", "params": {"hidden": 12}}}
    stage = {**WITH_HINT, **more}
    _, off = trained(tmp_path / "off", stage, models=models)
    told, on = trained(tmp_path / "on", {**stage, "term_gradients": True}, models=models)
    assert all(line.term_gradients is not None for line in told.lines)
    assert len(told.lines) == 6
    assert all(torch.equal(on[name], off[name]) for name in off)


def test_unasked_nothing_is_measured(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError

    monkeypatch.setattr(torch.autograd, "grad", refuse)
    monkeypatch.setattr(TermProbe, "recording", refuse)
    told, _ = trained(tmp_path, WITH_HINT)
    assert [line.term_gradients for line in told.lines] == [None] * 6


def test_it_is_measured_with_log_lines_only(tmp_path, monkeypatch):
    asked = []
    measure = TermProbe.measure
    monkeypatch.setattr(TermProbe, "measure", lambda *given: asked.append(1) or measure(*given))
    told, _ = trained(tmp_path, {**DISTILLED, "term_gradients": True}, log_every=2)
    assert len(told.lines) == len(asked) == 2


def test_an_epoch_too_short_for_a_log_line_is_told(tmp_path):
    told, _ = trained(tmp_path, {**DISTILLED, "term_gradients": True}, log_every=50)
    text = "term_gradients measures nothing: an epoch has 3 steps, and log_every is 50; lower it"
    assert text in told.notes
    assert told.lines == []


def test_a_term_that_carries_nearly_nothing_or_all_is_told_once_a_stage(tmp_path):
    kd = {**KD, "weight": 1e-6}
    first = {**DISTILLED, "criterion": {**DISTILLED["criterion"], "kd": kd}}
    found = measured(tmp_path, first, {"epochs": 1})
    assert [len(one.warnings) for one in found] == [2, 0, 0, 0, 0, 0, 2, 0, 0]
    most, least = found[0].warnings
    assert most.startswith("stage 'stage0': the term 'ce' carries 100 % of the gradient at student")
    assert most.endswith("so the other terms train next to nothing; lower its weight, 1")
    assert "the term 'kd' carries " in least
    assert least.endswith("so it trains next to nothing; raise its weight, 1e-06")
    assert found[6].warnings[0].startswith("stage 'stage1'")


@pytest.mark.parametrize(("share", "is_told"), [(0.0009, True), (0.0011, False)])
def test_least_is_a_thousandth_of_the_sum(share, is_told):
    norms = probed(student_of(), *two_terms(size=1.0)).norms
    weight = norms["ce"] / norms["size"] * share / (1 - share)
    # Between 99 % and 99.9 % the other term is told of alone.
    told = probed(student_of(), *two_terms(size=weight)).warnings
    assert any("'size'" in text for text in told) is is_told
    assert any("'ce'" in text for text in told)


def test_a_single_term_with_weight_is_not_told_of():
    assert probed(student_of(), *two_terms(size=0.0)).warnings == ()


def test_a_term_whose_weight_is_still_0_is_not_told_of():
    weights = {"ce": 1.0, "size": WeightSchedule(after=1), "more": 1.0}
    calls = [*two_terms()[0], call("more", Square(), value="student")]
    found = probed(student_of(), calls, weights)
    assert found.weights["size"] == found.norms["size"] == 0.0
    assert not any("'size'" in text for text in found.warnings)


def test_stages_inherit_it_and_the_command_line_sets_it(tmp_path):
    toy_experiment(tmp_path, {"term_gradients": True}, {}, {"term_gradients": False})
    file = tmp_path / "toy.yaml"
    assert [s.term_gradients for s in distill.load(file).stages] == [True, True, False]
    overridden = distill.load(file, ["stages.stage2.term_gradients=true"])
    assert [s.term_gradients for s in overridden.stages] == [True] * 3
    toy_experiment(tmp_path, {})
    assert not distill.load(file).stages[0].term_gradients
    with pytest.raises(distill.ConfigError, match="term_gradients: expected true or false"):
        distill.load(file, ["stages.stage0.term_gradients=yes please"])


def test_files_and_tensorboard_carry_the_numbers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    stage = {**DISTILLED, "term_gradients": True}
    told, _ = trained(tmp_path, stage, observers=["Recorder", "ResultFiles", "TensorBoard"])
    lines = [json.loads(line) for line in (tmp_path / "toy/metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["event"] == "step"]
    found = told.lines[0].term_gradients
    assert steps[0]["term_gradients"] == json.loads(json.dumps(asdict(found)))
    events = EventAccumulator(str(tmp_path / "toy/tensorboard/seed-0/stage0"))
    events.Reload()
    for group, values in (
        ("gradient norm", found.norms),
        ("gradient share", found.shares),
        ("gradient cosine", found.cosines),
        ("term value", found.values),
        ("term weight", found.weights),
    ):
        assert values
        for name, value in values.items():
            first = events.Scalars(f"{group}/{name}")[0]
            assert (first.step, first.value) == (1, pytest.approx(value, rel=1e-6))


def test_without_it_files_are_as_ever(tmp_path):
    trained(tmp_path, DISTILLED, observers=["Recorder", "ResultFiles"])
    assert "term_gradients" not in (tmp_path / "toy/metrics.jsonl").read_text()


def test_the_terminal_shows_warnings(tmp_path, monkeypatch, capsys):
    kd = {**KD, "weight": 1e-6}
    criterion = {**DISTILLED["criterion"], "kd": kd}
    stage = {**DISTILLED, "criterion": criterion, "term_gradients": True}
    trained(tmp_path, stage, observers=["Recorder", "Console"])
    out = capsys.readouterr().out
    assert out.count("  warning: stage 'stage0': the term 'kd' carries ") == 1


# What two processes find, with batches of which one of them has nothing at times.
CONV = {
    "type": "Conv2d",
    "params": {"in_channels": 4, "out_channels": 6, "kernel_size": 1},
    "inputs": {"input": "student.conv"},
}
SPREAD = {
    **DISTILLED,
    "epochs": 1,
    "data": {"train": "train", "batch_size": 3},
    "student": {"model": "thin"},
    "auxiliary": {"regressor": CONV},
    "criterion": {
        **DISTILLED["criterion"],
        "hint": {"type": "MSELoss", "inputs": {"input": "regressor", "target": "teacher.conv"}},
        "rows": {"type": "Rows", "inputs": {"value": "student"}},
    },
}
KINDS = ("ddp", "fsdp")


class Rows(nn.Module):
    """Relates the samples of all processes."""

    def forward(self, value):
        rows = distill.gather(value)
        return (rows @ rows.T).square().mean()


def spread_run(folder, **more):
    keys = {
        "datasets": {"train": {"type": "ToyData", "params": {"size": 7, "shape": [1, 4, 4]}}},
        "models": {
            "thin": {"type": "ToyConvNet"},
            "wide": {"type": "ToyConvNet", "params": {"width": 6}},
        },
        "log_every": 1,
        "observers": ["ResultFiles"],
    }
    experiment = toy_experiment(folder, {**SPREAD, **more}, **keys)
    distill.run(experiment, registry=toy_registry(losses={"Rows": Rows}), runs=folder)


def spread_lines(folder):
    lines = map(json.loads, (folder / "toy/metrics.jsonl").read_text().splitlines())
    return [line["term_gradients"] for line in lines if line["event"] == "step"]


def test_two_processes_find_what_one_finds_and_train_the_same(tmp_path):
    spread_run(tmp_path / "one", term_gradients=True)
    run_processes(__file__, str(tmp_path))
    expected = spread_lines(tmp_path / "one")
    assert len(expected) == 3
    assert expected[0]["at"] == ["student.conv"]
    for kind in KINDS:
        for ours, theirs in zip(spread_lines(tmp_path / kind), expected, strict=True):
            assert ours["at"] == theirs["at"]
            for key in ("values", "norms", "cosines", "weights"):
                assert ours[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-5), (kind, key)
        on, off = (
            load_file(tmp_path / f / "toy/stage0/last.safetensors") for f in (kind, f"{kind}-off")
        )
        assert all(torch.equal(on[name], off[name]) for name in off)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for parallel in KINDS:
        spread_run(Path(sys.argv[1]) / parallel, term_gradients=True, parallel=parallel)
        spread_run(Path(sys.argv[1]) / f"{parallel}-off", parallel=parallel)
