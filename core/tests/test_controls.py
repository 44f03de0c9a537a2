"""Controls in a teacher's place: what they give, and what a run makes of them."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import distill
from distill import ConfigError, Observer, check, load
from distill.cli import main
from distill.config.controlled import stages_that_differ, with_control
from distill.errors import UsageError
from distill.model import controls
from distill.model.controls import (
    ControlError,
    ShuffledClasses,
    SmoothedLabels,
    controlled,
    derangement,
)
from distill.observer import StageResult
from distill.summary import control_table
from distill.testing import ToyData, ToyMLP, toy_experiment, toy_registry
from distill.training.build import Builder

TEACH = {"name": "teach", "epochs": 1, "student": {"model": "wide"}}
ALONE = {"name": "alone", "student": {"model": "mlp"}}
MATCH = {"type": "MSELoss", "inputs": {"input": "student", "target": "teacher"}}
DISTIL = {
    "name": "distil",
    "teacher": {"model": "wide"},
    "student": {"model": "thin"},
    "criterion": {"match": MATCH},
}
HINT = {
    "name": "hint",
    "teacher": {"model": "wide"},
    "student": {"model": "thin"},
    "criterion": {
        "hint": {"type": "MSELoss", "inputs": {"input": "student.body", "target": "teacher.body"}},
        "ce": {"type": "CrossEntropyLoss"},
    },
}
MODELS = {
    "mlp": {"type": "ToyMLP", "params": {"hidden": 12}},
    "thin": {"type": "ToyMLP", "params": {"hidden": 12}},
    "wide": {"type": "ToyMLP", "params": {"hidden": 12}, "seed": 1},
}
TEST = {"dataset": "val", "baseline": "alone"}


class Killed(Exception):
    """Stands in for a kill."""


class Heard(Observer):
    """Notes which stages train, and in which folder; ends the run at one epoch of one of them."""

    def __init__(self):
        self.trained, self.taken, self.ended, self.kill = [], [], [], None

    def run_start(self, event):
        self.folder, self.taken = event.directory.name, [*self.taken, list(event.taken)]

    def stage_start(self, event):
        self.trained.append((self.folder, event.name))

    def epoch_end(self, event):
        if (self.folder, event.stage, event.position.epoch) == self.kill:
            raise Killed

    def controls_end(self, event):
        self.ended.append(event)


def fixed(weights: str | None = None, always: bool = False) -> nn.Module:
    """A model that may come with weights that are trained."""
    if weights is not None or always:
        torch.manual_seed(0)
    return ToyMLP(12)


def registry(heard=None):
    return toy_registry(models={"fixed": fixed}, observers={"Heard": lambda: heard or Heard()})


def described(folder, *stages, **keys):
    settings = {"models": MODELS, "observers": ["Heard"], "test": TEST, "seed": 3, **keys}
    return toy_experiment(folder, *stages, **settings)


def run(experiment, heard=None, **more):
    """Run an experiment in the folder of its file."""
    runs = Path(experiment.document.file).parent / "runs"
    return distill.run(experiment, registry=registry(heard), runs=runs, **more)


def controlled_by(control, stage=DISTIL, **teacher):
    return {**stage, "teacher": {"model": "wide", "control": control, **teacher}}


def student_of(result, stage="distil"):
    return result.student(stage).state_dict()


def are_equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def probability_of(labels, logits, dim=1):
    return logits.softmax(dim).gather(dim, labels.unsqueeze(dim)).mean()


@pytest.mark.parametrize(
    ("shape", "dim"), [((6, 5), 1), ((3, 4, 5), 2), ((2, 5, 3, 3), 1)], ids=["B", "BT", "BHW"]
)
def test_smoothed_labels_are_as_probable_as_for_the_teacher_and_all_else_is_alike(shape, dim):
    torch.manual_seed(0)
    logits = 3 * torch.randn(shape)
    labels = torch.randint(5, [size for n, size in enumerate(shape) if n != dim])
    given = SmoothedLabels()(logits, labels)
    assert given.shape == logits.shape
    torch.testing.assert_close(given.exp().sum(dim), torch.ones(labels.shape))
    torch.testing.assert_close(
        probability_of(labels, given, dim), probability_of(labels, logits, dim)
    )
    assert len(given.round(decimals=4).unique()) == 2  # the label's, and that of all others


def test_soft_labels_are_smoothed_to_the_teachers_probability_too():
    torch.manual_seed(0)
    logits, soft = torch.randn(6, 5), (3 * torch.randn(6, 5)).softmax(1)
    given = SmoothedLabels()(logits, soft).softmax(1)
    torch.testing.assert_close(
        (given * soft).sum(1).mean(), (logits.softmax(1) * soft).sum(1).mean()
    )
    torch.testing.assert_close(given.argmax(1), soft.argmax(1))


def test_ignored_labels_do_not_count_and_say_nothing():
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 5), torch.tensor([0, -100, 2, 255, 1, 4])
    known = [0, 2, 4, 5]
    given = SmoothedLabels()(logits, labels)
    torch.testing.assert_close(given[known], SmoothedLabels()(logits[known], labels[known]))
    torch.testing.assert_close(given[[1, 3]].exp(), torch.full((2, 5), 0.2))
    assert SmoothedLabels()(logits, torch.full((6,), -100)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_extreme_teachers_give_finite_labels_of_their_dtype(dtype):
    labels = torch.tensor([0, 1])
    for logits in (torch.eye(2, 3), -torch.eye(2, 3)):  # sure of the label, and of another
        given = SmoothedLabels()((1e4 * logits).to(dtype), labels)
        assert given.dtype == dtype
        assert given.isfinite().all()


def test_all_views_of_a_sample_have_its_label():
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 5), torch.tensor([3, 0])
    given = SmoothedLabels()(logits, labels)
    torch.testing.assert_close(given, SmoothedLabels()(logits, labels.repeat_interleave(3)))


def test_the_doubt_is_that_of_the_samples_of_all_processes(monkeypatch):
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 5), torch.randint(5, (6,))
    rows = []
    monkeypatch.setattr(controls, "gather", lambda own: rows.append(own) or own)
    whole = SmoothedLabels()(logits, labels)
    for part in (slice(0, 4), slice(4, 6)):
        SmoothedLabels()(logits[part], labels[part])
    monkeypatch.setattr(controls, "gather", lambda own: torch.cat(rows[1:]))
    torch.testing.assert_close(SmoothedLabels()(logits[:4], labels[:4]), whole[:4])


@pytest.mark.parametrize("targets", [None, torch.zeros(6, 4), torch.zeros(6, 2, dtype=torch.int64)])
def test_smoothing_asks_for_labels(targets):
    with pytest.raises(ControlError, match=r"labels: integers \(6,\).*shuffled_classes"):
        SmoothedLabels()(torch.randn(6, 5), targets)


def test_a_derangement_leaves_nothing_in_its_place_and_depends_on_the_seed():
    for size in range(2, 30):
        order = derangement(size, 7)
        assert sorted(order.tolist()) == list(range(size))
        assert not (order == torch.arange(size)).any()
        assert torch.equal(order, derangement(size, 7))
    assert not torch.equal(derangement(29, 7), derangement(29, 8))


@pytest.mark.parametrize(
    ("shape", "dim"), [((6, 5), 1), ((3, 4, 5), 2), ((2, 5, 3, 3), 1)], ids=["B", "BT", "BHW"]
)
def test_shuffled_classes_are_one_permutation_of_the_classes(shape, dim):
    logits = torch.randn(shape)
    shuffle = ShuffledClasses(3)
    expected = logits.movedim(dim, -1)[..., derangement(5, 3)].movedim(-1, dim)
    assert torch.equal(shuffle(logits, None), expected)
    assert shuffle(torch.randn(2, 4), None).shape == (2, 4)  # another number of classes


def test_the_part_of_an_output_called_logits_is_replaced():
    output = {"logits": torch.randn(2, 4), "hidden": torch.randn(2, 7)}
    given = controlled(ShuffledClasses(0), output, None)
    assert torch.equal(given["logits"], output["logits"][:, derangement(4, 0)])
    assert given["hidden"] is output["hidden"]
    for other in ((torch.randn(2, 4),), {"boxes": torch.randn(2, 4)}, torch.randn(2, 1)):
        with pytest.raises(ControlError, match="acts on logits"):
            controlled(ShuffledClasses(0), other, None)


def test_a_random_teacher_is_drawn_for_the_seed_and_is_no_other_model(tmp_path):
    builder = Builder(described(tmp_path, TEACH, ALONE), registry())
    drawn = builder.model("wide@random_teacher", 3).state_dict()
    assert are_equal(drawn, builder.model("wide@random_teacher", 3).state_dict())
    for other in (builder.model("wide@random_teacher", 4), builder.model("wide", 3)):
        assert not torch.equal(drawn["body.0.weight"], other.state_dict()["body.0.weight"])


def test_a_random_teacher_needs_no_checkpoint_and_leaves_the_model_to_others(tmp_path):
    lost = {**MODELS, "wide": {**MODELS["wide"], "checkpoint": "lost.safetensors"}}
    random = controlled_by("random_teacher")
    untaught = run(described(tmp_path / "a", {**random, "epochs": 2}, models=lost, test=None))
    stages = [TEACH, {**random, "epochs": 2}, {**DISTIL, "name": "true"}]
    taught = run(described(tmp_path / "b", *stages, test=None))
    first = {**TEACH, "epochs": 1}
    plain = run(described(tmp_path / "c", first, {**DISTIL, "epochs": 2}, test=None))
    assert are_equal(student_of(untaught), student_of(taught))
    assert not are_equal(student_of(plain), student_of(taught))
    assert plain.stages[-1].teachers == taught.stages[-1].teachers  # the trained one, again


def test_a_random_teacher_drops_trained_weights_and_refuses_those_it_cannot(tmp_path):
    models = {
        **MODELS,
        "wide": {"type": "fixed", "params": {"weights": "DEFAULT"}},
        "given": {"type": "fixed", "params": {"always": True}},
    }
    builder = Builder(described(tmp_path, ALONE, models=models), registry())
    drawn = [builder.model("wide@random_teacher", seed).body[0].weight for seed in (3, 4)]
    assert not torch.equal(*drawn)
    with pytest.raises(ConfigError, match=r"models.given: fixed comes with weights that no seed"):
        builder.model("given@random_teacher", 3)


def test_a_student_of_shuffled_classes_learns_them_as_they_are_shuffled(tmp_path):
    sgd = {"type": "SGD", "params": {"lr": 0.02, "momentum": 0.9}}
    distil = {**controlled_by("shuffled_classes"), "epochs": 20, "optimizer": sgd}
    result = run(described(tmp_path, {**TEACH, "epochs": 4}, distil, test=None))
    data = ToyData(12, seed=1).inputs
    teacher, student = result.student("teach")(data), result.student("distil")(data)
    away = (student - teacher[:, derangement(3, 3)]).square().mean()
    assert away < 0.1 * (student - teacher).square().mean()


def test_a_control_is_not_asked_for_its_accuracy(tmp_path):
    stages = [ALONE, controlled_by("random_teacher", min_accuracy=1.0)]
    run(described(tmp_path / "control", *stages))
    with pytest.raises(ConfigError, match="reaches an accuracy of only"):
        run(described(tmp_path / "plain", ALONE, controlled_by(None, min_accuracy=1.0)))


def test_a_control_that_was_changed_is_another_file(tmp_path):
    run(described(tmp_path, ALONE, controlled_by("random_teacher")))
    changed = "teacher.control: random_teacher -> shuffled_classes"
    with pytest.raises(ConfigError, match=changed):
        run(described(tmp_path, ALONE, controlled_by("shuffled_classes")))


def test_an_unknown_control_is_a_fault_with_the_nearest(tmp_path):
    with pytest.raises(ConfigError, match=r"toy.yaml:\d+:\d+: .*did you mean random_teacher\?"):
        described(tmp_path, ALONE, controlled_by("random_teachr"))


def test_a_control_of_outputs_where_only_features_are_read_is_a_fault(tmp_path):
    idle = described(tmp_path, ALONE, controlled_by("label_smoothing", HINT))
    with pytest.raises(ConfigError, match=r"nothing in stage 'hint' reads.*random_teacher"):
        check(idle, registry())
    check(described(tmp_path, ALONE, controlled_by("random_teacher", HINT)), registry())


def test_labels_that_do_not_suit_the_control_are_told_at_its_place_before_training(tmp_path):
    data = {"train": "train", "batch_size": 8, "batch_transforms": ["Column"]}
    experiment = described(tmp_path, ALONE, {**controlled_by("label_smoothing"), "data": data})
    column = toy_registry(
        batch_transforms={"Column": lambda: lambda inputs, targets: (inputs, targets[:, None])},
        observers={"Heard": Heard},
    )
    with pytest.raises(ConfigError, match=r"teacher.control: label_smoothing needs labels"):
        distill.run(experiment, registry=column, runs=tmp_path)
    assert not list(tmp_path.rglob("checkpoint.pt"))


def test_a_run_with_controls_gives_what_files_with_controls_give(tmp_path):
    heard = Heard()
    stages = [TEACH, ALONE, DISTIL]
    asked = ["shuffled_classes", "random_teacher"]
    result = run(described(tmp_path / "run", *stages), heard, controls=asked)
    assert list(result.controls) == ["random_teacher", "shuffled_classes"]
    assert heard.taken == [[], ["teach", "alone"], ["teach", "alone"]]
    assert heard.trained == [
        *(("toy", name) for name in ("teach", "alone", "distil")),
        ("control.random_teacher", "distil"),
        ("control.shuffled_classes", "distil"),
    ]
    for control, made in result.controls.items():
        folder = tmp_path / "run/runs/toy" / f"control.{control}"
        assert made.directory == folder
        given = run(described(tmp_path / control, TEACH, ALONE, controlled_by(control)))
        for stage in ("teach", "alone", "distil"):
            files = [run.directory / stage / "last.safetensors" for run in (made, given)]
            assert files[0].read_bytes() == files[1].read_bytes()
        assert [r.test for r in made.stages] == [r.test for r in given.stages]
        written = load(folder / "resolved.yaml").stages
        assert [list(s.teachers.values()) and s.teachers["teacher"].control for s in written] == [
            [],
            [],
            control,
        ]
    assert [event.table for event in heard.ended] == [result.comparison]


def test_a_killed_run_with_controls_goes_on_and_ends_the_same(tmp_path):
    stages, heard = [TEACH, ALONE, {**DISTIL, "epochs": 3}], Heard()
    whole = run(described(tmp_path / "whole", *stages), controls=["shuffled_classes"])
    experiment = described(tmp_path / "killed", *stages)
    heard.kill = ("control.shuffled_classes", "distil", 2)
    with pytest.raises(Killed):
        run(experiment, heard, controls=["shuffled_classes"])
    heard.kill, heard.trained = None, []
    again = run(experiment, heard, controls=["shuffled_classes"])
    assert heard.trained == [("control.shuffled_classes", "distil")]
    assert again.comparison == whole.comparison
    one, other = (r.controls["shuffled_classes"].student().state_dict() for r in (whole, again))
    assert are_equal(one, other)


def test_stages_that_train_more_than_their_student_are_trained_again(tmp_path):
    """A loss with a buffer, which only the checkpoint at the end of all stages has."""
    weighted = {"type": "CrossEntropyLoss", "params": {"label_smoothing": 0.1}}
    regressor = {
        "type": "Linear",
        "params": {"in_features": 12, "out_features": 3},
        "inputs": {"input": "student.body"},
    }
    terms = {
        "ce": weighted,
        "more": {"type": "CrossEntropyLoss", "inputs": {"student": "regressor"}},
    }
    first = {**ALONE, "auxiliary": {"regressor": regressor}, "criterion": terms}
    heard = Heard()
    stages = [first, {**TEACH, "auxiliary": {}, "criterion": {"ce": weighted}}, DISTIL]
    result = run(described(tmp_path, *stages), heard, controls=["random_teacher"])
    assert heard.taken == [[], ["teach"]]
    one, other = (student_of(r, "alone") for r in (result, result.controls["random_teacher"]))
    assert are_equal(one, other)


def test_a_control_of_outputs_leaves_stages_alone_that_read_features(tmp_path):
    experiment = described(tmp_path, TEACH, ALONE, HINT, {**DISTIL, "student": {"model": "mlp"}})
    heard = Heard()
    run(experiment, heard, controls=["all"])
    trained = [place for place in heard.trained if place[0] != "toy"]
    assert trained == [
        ("control.label_smoothing", "distil"),
        ("control.random_teacher", "hint"),
        ("control.random_teacher", "distil"),
        ("control.shuffled_classes", "distil"),
    ]
    rows = [row.split("|")[1:3] for row in heard.ended[0].table.splitlines()[2:]]
    assert [tuple(cell.strip() for cell in row) for row in rows] == [
        ("hint", "as in the file"),
        ("hint", "random_teacher"),
        ("distil", "as in the file"),
        ("distil", "label_smoothing"),
        ("distil", "random_teacher"),
        ("distil", "shuffled_classes"),
    ]


def test_what_goes_on_with_a_controlled_outcome_differs_too(tmp_path):
    stages = [
        TEACH,
        DISTIL,
        {"name": "longer", "teacher": None, "criterion": {"ce": {"type": "CrossEntropyLoss"}}},
        {**ALONE, "criterion": {"ce": {"type": "CrossEntropyLoss"}}},
        {"name": "next", "teacher": {"model": "thin"}, "student": {"model": "mlp"}},
    ]
    experiment = described(tmp_path, *stages)
    other = with_control(experiment, "random_teacher", {("distil", "teacher")})
    assert stages_that_differ(experiment, other) == ["distil", "longer", "next"]


@pytest.mark.parametrize(
    ("stages", "controls", "error", "message"),
    [
        ([ALONE], ["all"], ConfigError, r"toy.yaml:\d+:1: stages: --control needs a teacher"),
        ([ALONE, HINT], ["label_smoothing"], ConfigError, "no stage reads; for features there is"),
        ([ALONE, DISTIL], ["suffled_classes"], UsageError, "did you mean shuffled_classes"),
    ],
    ids=["no teacher", "features", "unknown"],
)
def test_what_cannot_be_controlled_is_told_before_anything_runs(
    tmp_path, stages, controls, error, message
):
    with pytest.raises(error, match=message):
        run(described(tmp_path, *stages), controls=controls)
    assert not (tmp_path / "runs").exists()


def result(seed, stage, accuracy):
    return StageResult(seed, stage, "mlp", 67, epochs=2, seconds=1.0, test={"accuracy": accuracy})


def test_the_table_pairs_method_and_control_by_seed(tmp_path):
    experiment = described(tmp_path, TEACH, ALONE, {**DISTIL, "student": {"model": "thin"}})
    other = with_control(experiment, "random_teacher", {("distil", "teacher")})
    base = [result(1, "alone", 0.70), result(2, "alone", 0.80)]
    own = [result(1, "distil", 0.80), result(2, "distil", 0.86)]
    with_random = [result(1, "distil", 0.74), result(2, "distil", 0.80)]
    table = control_table(experiment, base + own, {"random_teacher": (other, base + with_random)})
    header, _, *rows = ([c.strip() for c in row.split("|")[1:-1]] for row in table.splitlines())
    assert header == ["stage", "teachers", "accuracy", "gain over alone", "method ahead by"]
    # stdev of two numbers is their distance over the root of two; gains are 0.10, 0.06; 0.04, 0.
    assert rows == [
        ["distil", "as in the file", "83.00 ± 4.24 %", "+8.00 ± 2.83 %", ""],
        ["distil", "random_teacher", "77.00 ± 4.24 %", "+2.00 ± 2.83 %", "+6.00 ± 0.00 %"],
    ]


def test_without_a_baseline_the_table_has_no_gain(tmp_path):
    experiment = described(tmp_path, TEACH, DISTIL, test={"dataset": "val"})
    other = with_control(experiment, "random_teacher", {("distil", "teacher")})
    table = control_table(
        experiment,
        [result(1, "distil", 0.8)],
        {"random_teacher": (other, [result(1, "distil", 0.7)])},
    )
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines()]
    assert rows[0] == ["stage", "teachers", "accuracy", "method ahead by"]
    assert rows[3] == ["distil", "random_teacher", "70.00 %", "+10.00 %"]


@pytest.mark.usefixtures("only_core")
def test_the_command_prints_the_comparison_and_the_report_keeps_it(
    tmp_path, experiment_text, toys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    text = experiment_text.replace("- type: Console", "- type: Console\n  - type: ResultFiles")
    (tmp_path / "exp.yaml").write_text(text)
    given = ["run", "-p", str(toys), "exp.yaml", "--control", "shuffled_classes"]
    done = CliRunner().invoke(main, given)
    assert done.exit_code == 0, done.output
    assert "stage teach: the same as without the control, not trained again" in done.output
    assert "note: teacher is a control: its outputs are given to other classes" in done.output
    report = (tmp_path / "runs/toy/report.md").read_text()
    for text in (done.output.split("control.shuffled_classes: ")[1], report):
        assert "| distil | shuffled_classes |" in text
        assert "Where a control gains as much as the method" in text
    assert "control.shuffled_classes/distil/last.safetensors" not in report
    results = tmp_path / "runs/toy/control.shuffled_classes/results.json"
    assert [entry["stage"] for entry in json.loads(results.read_text())] == ["teach", "distil"]
