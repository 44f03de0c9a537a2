"""What a stage takes from the one before it, and which names must exist."""

import pytest
import yaml

from distill import load
from distill.config.experiment import EMA, Clip, Evaluate, WeightSchedule
from distill.config.load import draft
from distill.config.yaml_document import parse
from distill.run_directory import resolved_text

HEAD = """\
name: chain
datasets: {train: {type: D}, val: {type: D}, other: {type: D}}
models: {big: {type: M}, mid: {type: M}, small: {type: M}}
"""
FIRST = """\
stages:
  - name: one
    epochs: 3
    data: {train: train, validate: val, batch_size: 8, workers: 2}
    teacher: {model: big, mode: train}
    student: {model: small}
    auxiliary:
      regressor: {type: Linear, inputs: {input: student.body}}
    freeze: [student.head]
    criterion: {hint: {type: MSELoss, weight: 2, inputs: {input: regressor, target: teacher}}}
    optimizer: {type: SGD, params: {lr: 0.1}}
    scheduler: {type: StepLR, params: {step_size: 1}}
    precision: bf16
    metrics: [other_metric]
    keep: best
    sync_batchnorm: false
"""


def stages_of(*more):
    """The stages of a file whose second and later stages have these lines."""
    experiment, faults = draft(parse(text_of(*more), "f.yaml"))
    assert [str(fault) for fault in faults] == []
    return experiment.stages


def text_of(*more):
    names = ("two", "three", "four")
    stages = (
        f"  - name: {name}\n" + "".join(f"    {line}\n" for line in lines.splitlines())
        for name, lines in zip(names, more, strict=False)
    )
    return HEAD + FIRST + "".join(stages)


def faults_of(text):
    return [str(fault) for fault in draft(parse(text, "f.yaml"))[1]]


INHERITED = [
    "epochs",
    "data",
    "teachers",
    "student",
    "auxiliary",
    "freeze",
    "criterion",
    "optimizer",
    "schedulers",
    "precision",
    "metrics",
    "keep",
    "sync_batchnorm",
]


@pytest.mark.parametrize("key", INHERITED)
def test_a_stage_takes_what_it_leaves_out_from_the_stage_before_the_last_writer_included(key):
    one, two, three = stages_of("", "")
    assert getattr(one, key) == getattr(two, key) == getattr(three, key)


@pytest.mark.parametrize(
    ("line", "key", "value"),
    [
        ("clip: {norm: 2}", "clip", Clip(norm=2)),
        ("channels_last: true", "channels_last", True),
        ("compile: [student]", "compile", ("student",)),
        ("ema: {decay: 0.5}", "ema", EMA(0.5, False)),
        ("parallel: fsdp", "parallel", "fsdp"),
        ("evaluate: {every: 5, unit: steps}", "evaluate", Evaluate(5, "steps")),
        ("evaluate: {every: 5}", "evaluate", Evaluate(5, "epochs")),
        ("best_by: other_metric", "best_by", "other_metric"),
    ],
)
def test_how_a_stage_trains_goes_on_into_later_ones(line, key, value):
    one, two, three, four = stages_of(line, "", "clip: null\nema: null\ncompile: null")
    assert getattr(one, key) != value
    assert getattr(two, key) == getattr(three, key) == value
    assert (four.clip, four.ema, four.compile) == (Clip(), None, ())


def test_what_no_stage_says_has_its_default():
    text = HEAD + FIRST.split("    auxiliary")[0].replace(
        "    teacher: {model: big, mode: train}\n", ""
    )
    text += "    criterion: {ce: {type: CrossEntropyLoss}}\n    optimizer: {type: SGD}\n"
    experiment, faults = draft(
        parse(text.replace(", validate: val", "").replace(", workers: 2", ""))
    )
    (stage,) = experiment.stages
    assert faults == []
    assert (stage.teachers, stage.auxiliary, stage.freeze, stage.schedulers) == ({}, {}, (), ())
    assert (stage.precision, stage.keep, stage.sync_batchnorm) == ("fp32", "last", True)
    assert (stage.clip, stage.ema, stage.evaluate) == (Clip(), None, Evaluate(1, "epochs"))
    assert (stage.channels_last, stage.compile, stage.parallel) == (False, (), "ddp")
    assert (stage.best_by, stage.decisive) == (None, "accuracy")
    assert [(m.component.type, m.name) for m in stage.metrics] == [("accuracy", "accuracy")]
    assert (stage.optimizer.groups, stage.optimizer.no_decay) == ((), ())
    data = stage.data
    assert (data.validate, data.workers, data.drop_last) == ((), 0, False)
    assert (data.accumulate, data.prefetch, data.pin_memory) == (1, 2, None)
    assert (data.sampler, data.batch_sampler, data.batch_transforms) == (None, None, ())
    assert (data.worker_timeout, data.on_bad_sample) == (600, "raise")
    assert (stage.criterion["ce"].weight, stage.criterion["ce"].inputs) == (1.0, {})
    assert experiment.seeds == (0,)
    assert (experiment.device, experiment.log_every, experiment.test) == ("auto", 50, None)
    assert [o.type for o in experiment.observers] == ["Console", "TensorBoard", "ResultFiles"]


@pytest.mark.parametrize(
    ("line", "key", "cleared"),
    [
        ("auxiliary: {}\ncriterion: {ce: {type: CE}}", "auxiliary", {}),
        ("auxiliary: null\ncriterion: {ce: {type: CE}}", "auxiliary", {}),
        ("teacher: null\ncriterion: {ce: {type: CE}}", "teachers", {}),
        ("teachers: null\ncriterion: {ce: {type: CE}}", "teachers", {}),
        ("teachers: {}\ncriterion: {ce: {type: CE}}", "teachers", {}),
        ("scheduler: null", "schedulers", ()),
        ("scheduler: []", "schedulers", ()),
        ("freeze: null", "freeze", ()),
        ("freeze: []", "freeze", ()),
    ],
)
def test_null_and_empty_clear_what_would_be_inherited_for_later_stages_too(line, key, cleared):
    one, two, three = stages_of(line, "")
    assert getattr(one, key) not in (cleared, None)
    assert getattr(two, key) == cleared
    assert getattr(three, key) == cleared


def test_data_is_inherited_key_by_key():
    _, two, three = stages_of("data: {batch_size: 4}", "data: {train: other, workers: 0}")
    assert (two.data.train, two.data.validate, two.data.batch_size, two.data.workers) == (
        "train",
        ("val",),
        4,
        2,
    )
    assert (three.data.train, three.data.validate, three.data.batch_size) == ("other", ("val",), 4)
    assert three.data.workers == 0


def test_data_may_be_validated_on_several_sets_and_parts_of_data_cleared():
    _, two, three, four = stages_of(
        "data: {validate: [val, other], sampler: S, batch_transforms: [MixUp], accumulate: 3}",
        "data: {sampler: null, batch_sampler: {type: B, params: {n: 2}}, batch_transforms: []}",
        "keep: last\ndata: {validate: null}",
    )
    assert (two.data.validate, two.data.accumulate) == (("val", "other"), 3)
    assert (two.data.sampler.type, two.data.batch_sampler) == ("S", None)
    assert [transform.type for transform in two.data.batch_transforms] == ["MixUp"]
    assert two.data.sampler.path == ("stages", 1, "data", "sampler")
    assert two.data.batch_transforms[0].path == ("stages", 1, "data", "batch_transforms", 0)
    assert (three.data.sampler, three.data.batch_transforms) == (None, ())
    assert (three.data.batch_sampler.type, three.data.batch_sampler.params) == ("B", {"n": 2})
    assert (three.data.validate, four.data.validate) == (("val", "other"), ())


def test_a_scheduler_may_be_one_or_a_row():
    row = "scheduler: [{type: A, unit: steps, until: 5}, {type: B, watch: other_metric}]"
    one, two = stages_of(row)
    (only,) = one.schedulers
    assert (only.component.type, only.unit, only.until, only.watch) == (
        "StepLR",
        "epochs",
        None,
        None,
    )
    assert only.component.path == ("stages", 0, "scheduler")
    first, last = two.schedulers
    assert (first.component.type, first.unit, first.until) == ("A", "steps", 5)
    assert (last.component.type, last.until, last.watch) == ("B", None, "other_metric")
    assert last.component.path == ("stages", 1, "scheduler", 1)


def test_an_optimizer_may_have_groups_and_exceptions_from_decay():
    groups = "groups: [{match: [student.body]}, {match: ['*.bias', norm], params: {lr: 0}}]"
    _, two = stages_of(f"optimizer: {{type: Adam, {groups}, no_decay: [bias]}}")
    first, second = two.optimizer.groups
    assert (first.match, first.params) == (("student.body",), {})
    assert (second.match, second.params) == (("*.bias", "norm"), {"lr": 0})
    assert second.path == ("stages", 1, "optimizer", "groups", 1)
    assert two.optimizer.no_decay == ("bias",)


def test_a_weight_is_a_number_or_a_schedule():
    criterion = "criterion: {a: {type: CE, weight: 2}, b: {type: CE, weight: {over: 20}}}"
    _, two = stages_of(criterion)
    assert two.criterion["a"].weight == 2.0
    assert isinstance(two.criterion["a"].weight, float)
    assert two.criterion["b"].weight == WeightSchedule(0.0, 1.0, over=20)


def test_a_metric_is_called_by_its_name_or_its_type_and_parameters():
    metrics = "[m, {type: m, params: {k: 5, l: x}}, {type: m, params: {k: 5}, name: top}]"
    _, two = stages_of(f"metrics: {metrics}\nbest_by: top")
    assert [metric.name for metric in two.metrics] == ["m", "m(k=5, l=x)", "top"]
    assert two.decisive == "top"
    assert two.metric("other.top/part") == two.metric("ema.top") == two.metrics[2]
    assert two.metric("m(k=5, l=x)") == two.metrics[1]


def test_other_mappings_are_replaced_whole():
    _, two = stages_of("optimizer: {type: Adam}\ncriterion: {ce: {type: CE}}")
    optimizer = two.optimizer.component
    assert (optimizer.type, optimizer.params) == ("Adam", {})
    assert list(two.criterion) == ["ce"]


def test_one_teacher_and_several_are_one_slot():
    several = "teachers: {teacher: {model: mid}, other: {model: big}}"
    one, two, three = stages_of(several, "teacher: {model: mid, min_accuracy: 0.5}")
    assert {r: t.model for r, t in one.teachers.items()} == {"teacher": "big"}
    assert {r: t.model for r, t in two.teachers.items()} == {"teacher": "mid", "other": "big"}
    assert {r: t.min_accuracy for r, t in three.teachers.items()} == {"teacher": 0.5}
    assert three.teachers["teacher"].mode == "eval"


def test_a_teacher_s_fault_is_where_it_was_written_last():
    several = "teachers: {teacher: {model: huge}}"
    (fault,) = faults_of(text_of(several))
    assert "stages.two.teachers.teacher.model: there is no model 'huge'" in fault


def test_origins_and_places_tell_which_stage_wrote_a_key():
    _, two, three = stages_of("criterion: {ce: {type: CE}}\ndata: {batch_size: 4}", "epochs: 1")
    assert (three.origins["criterion"], three.origins["auxiliary"]) == ("two", "one")
    assert three.places["criterion"] == ("stages", 1, "criterion")
    assert three.places["optimizer"] == ("stages", 0, "optimizer")
    assert three.places["epochs"] == ("stages", 2, "epochs")
    assert two.places["data.batch_size"] == ("stages", 1, "data", "batch_size")
    assert two.places["data.train"] == ("stages", 0, "data", "train")
    assert three.criterion["ce"].component.path == ("stages", 1, "criterion", "ce")


def test_auxiliary_modules_come_in_an_order_in_which_their_inputs_exist():
    modules = """\
auxiliary:
  last: {type: L, inputs: {input: middle.part}}
  middle: {type: L, inputs: {input: first, other: student}}
  first: {type: L, inputs: {input: teacher.body}}
criterion: {ce: {type: CE}}
"""
    _, two = stages_of(modules)
    assert list(two.auxiliary) == ["first", "middle", "last"]


def test_modules_in_a_circle_are_a_fault_that_names_the_circle():
    modules = """\
auxiliary:
  a: {type: L, inputs: {input: b}}
  b: {type: L, inputs: {input: a}}
criterion: {ce: {type: CE}}
"""
    (fault,) = faults_of(text_of(modules))
    assert "stages.two.auxiliary: these modules feed each other in a circle: " in fault
    assert fault.endswith(("a -> b -> a", "b -> a -> b"))


def test_a_module_that_feeds_itself_is_a_circle():
    (fault,) = faults_of(
        text_of("auxiliary: {a: {type: L, inputs: {input: a}}}\ncriterion: {ce: {type: CE}}")
    )
    assert fault.endswith("in a circle: a -> a")


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("teacher: {model: small}", "'small' is this stage's student too; define a second model"),
        ("student: {model: big}", "'big' is this stage's student too; define a second model"),
        (
            "teachers: {student: {model: big}}\ncriterion: {ce: {type: CE}}",
            "a teacher cannot be called 'student'",
        ),
        (
            "teachers: {extras: {model: big}}\ncriterion: {ce: {type: CE}}",
            "a teacher cannot be called 'extras'",
        ),
        (
            "auxiliary: {targets: {type: L}}\ncriterion: {ce: {type: CE}}",
            "'targets' already names another value of this stage",
        ),
        (
            "auxiliary: {teacher: {type: L}}\ncriterion: {ce: {type: CE}}",
            "'teacher' already names another value of this stage",
        ),
        ("teacher: null\nteachers: {}", "give either 'teacher' or 'teachers', not both"),
        ("data: {validate: null}", "'best' needs data.validate to measure by"),
        (
            "teacher: {model: big, min_accuracy: 0.5}\nkeep: last\ndata: {validate: null}",
            "min_accuracy: needs data.validate to measure on",
        ),
        ("teacher: null", "stage 'two' has no 'teacher' (there are: student, inputs, targets,"),
        ("auxiliary: {}", "stage 'two' has no 'regressor' (there are: student, inputs, targets,"),
        ("name: one", "two stages are called 'one'"),
        ("student: {model: smal}", "there is no model 'smal' in this file; did you mean small?"),
        ("student: {model: x}", "there is no model 'x' in this file (defined: big, mid, small)"),
        ("data: {train: trian}", "there is no data set 'trian' in this file; did you mean train?"),
        ("data: {validate: [val, vla]}", "there is no data set 'vla' in this file; did you mean"),
        ("data: {sampler: S, batch_sampler: B}", "give either 'sampler' or 'batch_sampler', not"),
        ("keep: ema", "'ema' needs the key 'ema' with its decay"),
        ("best_by: accuracy", "stage 'two' measures no 'accuracy' (measured: other_metric)"),
        ("best_by: ema.other_metric", "measures no 'ema.other_metric'; did you mean other_metric"),
        ("best_by: other.other_metric", "measures no 'other.other_metric'"),
        (
            "keep: last\nbest_by: other_metric\ndata: {validate: null}",
            "best_by: needs data.validate to measure on",
        ),
        ("scheduler: {type: P, watch: acc}", "scheduler.watch: stage 'two' measures no 'acc'"),
        ("scheduler: {type: A, until: 3}", "scheduler.until: the last scheduler, or the only one"),
        ("scheduler: [{type: A}, {type: B, until: 3}]", "scheduler[1].until: the last scheduler"),
        ("scheduler: [{type: A, until: 3}, {type: B}, {type: C}]", "give all but the last 'until'"),
        (
            "scheduler: [{type: A, until: 3}, {type: B, until: 2}, {type: C}]",
            "scheduler[1].until: 2 epochs are over when the one before it ends",
        ),
        (
            "metrics: [m, m]\nbest_by: m",
            "metrics[1]: two metrics are called 'm'; give one a 'name'",
        ),
        (
            "teacher: {model: big, fast: {fold: true}}",
            "fast.fold: unknown key 'fold' (known: fold_",
        ),
        ("compile: [tacher]", "has no model in the role 'tacher'; did you mean teacher?"),
    ],
)
def test_what_does_not_go_together_is_one_fault(lines, said):
    text = text_of(lines)
    if lines == "name: one":
        text = text_of("").replace("name: two", "name: one")
    if lines == "teacher: null\nteachers: {}":
        text = text_of(lines + "\ncriterion: {ce: {type: CE}}")
    (fault,) = faults_of(text)
    assert said in fault


@pytest.mark.parametrize(
    ("lines", "seeds"), [("", (0,)), ("seed: 7\n", (7,)), ("seeds: [3, 1]\n", (3, 1))]
)
def test_seed_and_seeds(lines, seeds):
    experiment, faults = draft(parse(HEAD + lines + FIRST, "f.yaml"))
    assert faults == []
    assert experiment.seeds == seeds


def test_seed_beside_seeds_is_a_fault():
    (fault,) = faults_of("seed: 1\n" + HEAD + "seeds: [1]\n" + FIRST)
    assert fault == "f.yaml:5:1: seeds: give either 'seed' or 'seeds', not both"


def test_parts_written_as_names_alone_are_parts_without_parameters():
    text = HEAD.replace("{type: D}", "{type: D, transforms: [Flip]}", 1) + FIRST
    experiment, _ = draft(parse(text + "observers: [Console]\ntest: {dataset: val}\n", "f.yaml"))
    (flip,) = experiment.datasets["train"].transforms
    assert (flip.type, flip.params) == ("Flip", {})
    assert experiment.observers[0].type == "Console"
    assert [metric.component.type for metric in experiment.test.metrics] == ["accuracy"]


def test_the_resolved_text_is_a_valid_file_that_resolves_to_the_same(tmp_path):
    ramp = "weight: {over: 5, shape: cosine}"
    second = f"""\
data: {{batch_size: 4, validate: [val, other], accumulate: 2, sampler: S, batch_transforms: [M]}}
teacher: null
criterion: {{ce: {{type: CE, {ramp}}}}}
optimizer: {{type: SGD, groups: [{{match: [student], params: {{lr: 1}}}}], no_decay: [bias]}}
scheduler: [{{type: A, until: 2, unit: steps}}, {{type: B}}]
clip: {{norm: 1.5}}
ema: {{decay: 0.9, warmup: true}}
best_by: ema.other.other_metric
evaluate: {{every: 3, unit: steps}}
compile: [student]
"""
    text = text_of(second, "epochs: 1")
    experiment, faults = draft(parse("x-note: [1]\nseed: 3\n" + text, "f.yaml"))
    assert faults == []
    file = tmp_path / "resolved.yaml"
    file.write_text(resolved_text(experiment), "utf-8")
    again = load(file)
    assert again.resolved == experiment.resolved
    assert resolved_text(again) == file.read_text("utf-8")
    # What a stage inherited is now its own; all else is the same.
    for before, after in zip(experiment.stages, again.stages, strict=True):
        assert (after.data.train, after.data.batch_size) == (
            before.data.train,
            before.data.batch_size,
        )
        assert (after.data.validate, after.data.accumulate) == (
            before.data.validate,
            before.data.accumulate,
        )
        assert [entry.until for entry in after.schedulers] == [
            entry.until for entry in before.schedulers
        ]
        assert (after.clip, after.ema, after.best_by, after.evaluate, after.compile) == (
            before.clip,
            before.ema,
            before.best_by,
            before.evaluate,
            before.compile,
        )
        assert list(after.teachers) == list(before.teachers)
        assert list(after.criterion) == list(before.criterion)
        assert (after.epochs, after.keep, after.precision) == (
            before.epochs,
            before.keep,
            before.precision,
        )
    assert again.seeds == (3,)


VALUES = ["1e-3", "0o17", "0x1f", "5", "yes", "null", "~", ".5", "1_000", "é", "a: b", "2020-01-01"]
VALUES += ["", " x ", "two\nlines", "#c", "!t", "*a", "1" * 200, ".inf", "<<", "12:30", "- a", "\t"]


@pytest.mark.parametrize("value", [*VALUES, 1e-3, 1e300, 3, True, None, [1, [2]], float("inf")])
def test_every_value_of_a_file_is_the_same_in_the_resolved_text(value):
    line = f"{HEAD}{FIRST}"
    document = parse(line, "f.yaml")
    document.data["models"]["big"]["params"] = {"value": value, "key": {str(value) or "k": 1}}
    experiment, faults = draft(document)
    assert faults == []
    again = parse(resolved_text(experiment), "again.yaml")
    params = again.data["models"]["big"]["params"]
    assert params == {"value": value, "key": {str(value) or "k": 1}}
    assert type(params["value"]) is type(value)


def test_the_resolved_text_repeats_shared_parts_instead_of_aliases():
    experiment, _ = draft(parse(text_of("", ""), "f.yaml"))
    text = resolved_text(experiment)
    assert "&id" not in text
    assert len(yaml.safe_load(text)["stages"]) == 3
