import pytest
import torch
from torch import nn

from distill import ConfigError, DataError, Views
from distill.builtin.accuracy import accuracy
from distill.data.loader import sample_batch, training_batches
from distill.data.plan import Plan
from distill.experiment_check import check
from distill.testing import ToyConvNet, ToyData, ToyMLP, toy_experiment, toy_registry
from distill.training.build import Builder
from distill.training.parts import Parts as StageParts
from distill.training.rehearsal import rehearse, rehearse_measuring
from distill.training.stage import assemble, roles_in_force

CPU = torch.device("cpu")
IMAGES = {
    "train": {"type": "ToyData", "params": {"size": 10, "shape": [1, 4, 5]}},
    "val": {"type": "ToyData", "params": {"size": 6, "shape": [1, 4, 5]}},
}


class Overwriting(ToyMLP):
    """Changes in place what ``body`` gives."""

    def forward(self, inputs):
        features = self.body(inputs)
        features += 1
        return self.head(features)


class Odd(ToyMLP):
    """Has a layer that never runs and one that runs twice."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Linear(8, 8)
        self.twice = nn.Linear(8, 8)

    def forward(self, inputs):
        return self.head(self.twice(self.twice(self.body(inputs))))


class Parts(ToyMLP):
    """Gives a mapping."""

    def forward(self, inputs):
        return {"logits": super().forward(inputs)}


class Speechless(ToyMLP):
    def forward(self, inputs):
        raise AssertionError


class MemoryBank(nn.Module):
    """A loss that remembers what it has seen."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, student):
        self.seen += len(student)
        return student.square().mean()


class Pair(nn.Module):
    """A loss that gives two numbers by name."""

    def forward(self, student):
        return {"a": student.mean(), "b": student.mean()}


REGISTRY = toy_registry(
    models={cls.__name__: cls for cls in (Overwriting, Odd, Parts, Speechless)},
    losses={"MemoryBank": MemoryBank, "Pair": Pair},
)


IMITATE = {"type": "MSELoss", "inputs": {"input": "student", "target": "teacher"}}
TAUGHT = {"teacher": {"model": "wide"}, "criterion": {"imitate": IMITATE}}


def assembled(folder, stage, **keys):
    experiment = toy_experiment(folder, stage, **keys)
    builder = Builder(experiment, REGISTRY)
    models = {name: builder.model(name, 0) for name in experiment.models}
    assembly = assemble(builder, experiment.stages[0], models, StageParts(), 0, CPU)
    assert not assembly.faults
    return builder, assembly


def rehearse_on(builder, assembly):
    """Rehearse a stage on its own data."""
    source, data = builder.source("train"), assembly.stage.data
    plan = Plan(len(source), data.batch_size, data.drop_last)
    return rehearse(builder, assembly, source, plan, sample_batch(source, 2, 0), 0)


def rehearsed(folder, stage, **keys):
    builder, assembly = assembled(folder, stage, **keys)
    with roles_in_force(assembly):
        return rehearse_on(builder, assembly)


def fault_of(folder, stage, **keys):
    """The one fault of a stage."""
    with pytest.raises(ConfigError) as caught:
        rehearsed(folder, stage, **keys)
    (fault,) = caught.value.faults
    return fault


def line_of(folder, piece):
    lines = (folder / "toy.yaml").read_text("utf-8").splitlines()
    return next(number for number, line in enumerate(lines, 1) if piece in line)


def with_models(**models):
    return {"models": {name: {"type": kind} for name, kind in models.items()}}


def test_a_sound_stage_has_nothing_to_tell(tmp_path):
    rehearsal = rehearsed(tmp_path, {"teacher": {"model": "wide"}})
    assert rehearsal.copied == ()
    assert rehearsal.unused is False


def test_a_class_count_that_is_not_the_datas_names_model_and_data_set(tmp_path):
    models = {"mlp": {"type": "ToyMLP", "params": {"classes": 5}}}
    with pytest.raises(DataError) as caught:
        rehearsed(tmp_path, {}, models=models)
    assert "model 'mlp' has 5 outputs, but data set 'train' has 3 classes" in str(caught.value)
    assert f"toy.yaml:{line_of(tmp_path, 'classes: 5') - 1}" in str(caught.value)


def test_a_teachers_class_count_is_checked_too(tmp_path):
    models = {"mlp": {"type": "ToyMLP"}, "wide": {"type": "ToyMLP", "params": {"classes": 4}}}
    with pytest.raises(DataError, match="model 'wide' has 4 outputs"):
        rehearsed(tmp_path, TAUGHT, models=models)


def test_classes_do_not_matter_where_nothing_is_scored_by_them(tmp_path):
    models = {"mlp": {"type": "ToyMLP", "params": {"classes": 5}}}
    rehearsed(tmp_path, {"metrics": []}, models=models)


def test_shapes_that_do_not_fit_name_both_references_and_shapes_and_the_line(tmp_path):
    hint = {"type": "MSELoss", "inputs": {"input": "student.body", "target": "teacher.body"}}
    fault = fault_of(tmp_path, {"teacher": {"model": "wide"}, "criterion": {"hint": hint}})
    assert "input=student.body (2, 8), target=teacher.body (2, 12)" in fault.message
    assert fault.path == "stages.stage0.criterion.hint"
    assert fault.location.line == line_of(tmp_path, "hint:")


def test_shapes_that_torch_would_stretch_with_a_warning_are_refused_too(tmp_path):
    hint = {"type": "MSELoss", "inputs": {"input": "student", "target": "narrow"}}
    stage = {
        "auxiliary": {
            "narrow": {
                "type": "Linear",
                "params": {"in_features": 8, "out_features": 1},
                "inputs": {"input": "student.body"},
            }
        },
        "criterion": {"hint": hint},
    }
    fault = fault_of(tmp_path, stage)
    assert "input=student (2, 3), target=narrow (2, 1)" in fault.message


def test_an_auxiliary_module_that_fails_is_told_at_its_line(tmp_path):
    regressor = {
        "type": "Linear",
        "params": {"in_features": 99, "out_features": 3},
        "inputs": {"input": "student.body"},
    }
    stage = {
        "auxiliary": {"regressor": regressor},
        "criterion": {
            "hint": {"type": "MSELoss", "inputs": {"input": "regressor", "target": "student"}}
        },
    }
    fault = fault_of(tmp_path, stage)
    assert fault.path == "stages.stage0.auxiliary.regressor"
    assert "Linear failed on input=student.body (2, 8)" in fault.message


def test_a_term_that_reaches_nothing_that_trains_is_an_error(tmp_path):
    term = {"type": "MSELoss", "inputs": {"input": "teacher", "target": "teacher"}}
    stage = {
        "teacher": {"model": "wide"},
        "criterion": {"ce": {"type": "CrossEntropyLoss"}, "useless": term},
    }
    fault = fault_of(tmp_path, stage)
    assert fault.path == "stages.stage0.criterion.useless"
    assert "in stage 'stage0' this term reaches no parameter that trains" in fault.message
    assert fault.location.line == line_of(tmp_path, "useless:")


def test_a_term_that_reaches_only_what_is_frozen_is_an_error(tmp_path):
    term = {"type": "MSELoss", "inputs": {"input": "student.body", "target": "teacher.body"}}
    stage = {
        "teacher": {"model": "twin"},
        "criterion": {"ce": {"type": "CrossEntropyLoss"}, "hint": term},
        "freeze": ["student.body"],
    }
    fault = fault_of(tmp_path, stage, **with_models(mlp="ToyMLP", twin="ToyMLP"))
    assert fault.path == "stages.stage0.criterion.hint"


@pytest.mark.parametrize(
    ("term", "given"),
    [
        ({"type": "CrossEntropyLoss", "params": {"reduction": "none"}}, "(2,)"),
        ({"type": "Pair"}, "{a: (), b: ()}"),
    ],
    ids=["one number a sample", "several"],
)
def test_a_loss_that_is_no_single_number_is_an_error(tmp_path, term, given):
    stage = {"criterion": {"ce": {"type": "CrossEntropyLoss"}, "odd": {**term, "weight": 0.5}}}
    fault = fault_of(tmp_path, stage)
    assert fault.path == "stages.stage0.criterion.odd"
    assert fault.message == f"a loss must be a single number, this one gives {given}"


def test_a_model_that_fails_on_the_data_is_told_with_the_shape(tmp_path):
    fault = fault_of(tmp_path, {}, datasets=IMAGES)
    assert fault.path == "stages.stage0.student"
    assert "ToyMLP fails on data set 'train' (inputs (2, 1, 4, 5)): " in fault.message
    assert "shapes cannot be multiplied" in fault.message


def test_a_teacher_that_fails_is_told_at_the_teacher(tmp_path):
    models = {"mlp": {"type": "ToyMLP"}, "wide": {"type": "ToyMLP", "params": {"features": 7}}}
    fault = fault_of(tmp_path, TAUGHT, models=models)
    assert fault.path == "stages.stage0.teacher"


def test_a_failure_without_a_word_is_told_by_its_kind(tmp_path):
    fault = fault_of(tmp_path, {}, **with_models(mlp="Speechless"))
    assert fault.message.endswith("AssertionError")


@pytest.mark.parametrize(
    ("layer", "reason"), [("unused", "did not run"), ("twice", "ran 2 times since")]
)
def test_a_layer_that_cannot_be_captured_is_told_where_it_is_asked_for(tmp_path, layer, reason):
    hint = {"type": "MSELoss", "inputs": {"input": f"student.{layer}", "target": "student.body"}}
    fault = fault_of(tmp_path, {"criterion": {"hint": hint}}, **with_models(mlp="Odd"))
    assert fault.path == "stages.stage0.criterion.hint.inputs.input"
    assert fault.message.startswith(f"'student.{layer}': '{layer}' {reason}")
    assert fault.location.line == line_of(tmp_path, f"input: student.{layer}")


def test_a_part_an_output_does_not_have_is_told_at_the_term_that_asks_for_it(tmp_path):
    hint = {"type": "CrossEntropyLoss", "inputs": {"student": "student.lgits"}}
    fault = fault_of(tmp_path, {"criterion": {"hint": hint}}, **with_models(mlp="Parts"))
    assert fault.path == "stages.stage0.criterion.hint"
    assert "'student' has no part 'lgits'; did you mean logits?" in fault.message


def test_a_value_the_model_overwrites_is_copied_and_then_right(tmp_path):
    hint = {"type": "MSELoss", "inputs": {"input": "student.body", "target": "teacher.body"}}
    stage = {"teacher": {"model": "twin"}, "criterion": {"hint": hint}}
    builder, assembly = assembled(tmp_path, stage, **with_models(mlp="Overwriting", twin="ToyMLP"))
    source = builder.source("train")
    with roles_in_force(assembly):
        rehearsal = rehearse_on(builder, assembly)
        (batch,) = training_batches(source, Plan(20, 20), seed=0, epoch=0)
        values = assembly.distiller.values(batch)
        body = assembly.roles["student"].body(batch.inputs)
        assert torch.equal(values["student.body"], body)
    assert rehearsal.copied == ("student.body",)


def test_it_leaves_no_trace(tmp_path):
    models = {"net": {"type": "ToyConvNet"}, "big": {"type": "ToyConvNet", "params": {"width": 6}}}
    stage = {
        "student": {"model": "net"},
        "teacher": {"model": "big", "mode": "train"},
        "criterion": {"ce": {"type": "CrossEntropyLoss"}, "bank": {"type": "MemoryBank"}},
    }
    builder, assembly = assembled(tmp_path, stage, models=models, datasets=IMAGES)
    with roles_in_force(assembly):
        assembly.distiller.train()
        modes = [module.training for module in assembly.distiller.modules()]
        before = {name: v.clone() for name, v in assembly.distiller.state_dict().items()}
        rehearse_on(builder, assembly)
        assert [module.training for module in assembly.distiller.modules()] == modes
        for name, value in assembly.distiller.state_dict().items():
            assert torch.equal(value, before[name]), name
        assert all(p.grad is None for p in assembly.distiller.parameters())


def test_a_trainable_parameter_without_a_gradient_is_noticed(tmp_path):
    assert rehearsed(tmp_path, {}, **with_models(mlp="Odd")).unused is True
    frozen = {"freeze": ["student.unused"]}
    assert rehearsed(tmp_path, frozen, **with_models(mlp="Odd")).unused is False


def test_too_few_samples_for_one_batch_are_told(tmp_path):
    data = {"train": "train", "validate": "val", "batch_size": 64, "drop_last": True}
    fault = fault_of(tmp_path, {"data": data})
    assert fault.path == "stages.stage0.data"
    assert "data set 'train' has 20 samples, less than one batch of 64" in fault.message


def test_a_data_set_of_one_sample_can_be_rehearsed_though_batchnorm_could_not_train(tmp_path):
    one = {"train": {"type": "ToyData", "params": {"size": 1, "shape": [1, 1, 1]}}}
    data = {"train": "train", "batch_size": 1}
    rehearsed(tmp_path, {"data": data}, datasets=one, **with_models(mlp=ToyConvNet.__name__))


def test_a_batch_sampler_that_gives_no_batch_is_told(tmp_path):
    builder, assembly = assembled(tmp_path, {})
    source = builder.source("train")
    plan = Plan(20, 8, batch_sampler=[])
    with pytest.raises(ConfigError, match="the batch sampler gives no batch") as caught:
        rehearse(builder, assembly, source, plan, sample_batch(source, 2, 0), 0)
    assert caught.value.faults[0].path == "stages.stage0.data"


def test_so_few_samples_are_drawn_that_there_is_no_batch(tmp_path):
    builder, assembly = assembled(tmp_path, {})
    source = builder.source("train")
    plan = Plan(20, 8, drop_last=True, sampler=[1, 2, 3])
    with pytest.raises(ConfigError, match="'train' has 3 samples, less than one batch of 8"):
        rehearse(builder, assembly, source, plan, sample_batch(source, 2, 0), 0)


def measured(folder, stage, roles, name="val", **keys):
    builder, assembly = assembled(folder, stage, **keys)
    source = builder.source(name)
    batch = sample_batch(source, 2, 0)
    with roles_in_force(assembly):
        metrics = {"accuracy": accuracy()}
        rehearse_measuring(builder, assembly, source, batch, roles, metrics, ("stages", 0))
        assert assembly.roles["student"].training


class Doubled(ToyData):
    """Each input twice, as a wrapper for training gives them."""

    def __getitem__(self, index):
        points, label = super().__getitem__(index)
        return Views((points, points)), label


def test_a_metric_that_fails_on_the_data_is_told_before_anything_trains(tmp_path):
    registry = toy_registry(datasets={"Doubled": Doubled})
    datasets = {"train": {"type": "ToyData"}, "val": {"type": "Doubled"}}
    experiment = toy_experiment(tmp_path, {}, datasets=datasets)
    with pytest.raises(ConfigError) as caught:
        check(experiment, registry, data=True)
    (fault,) = caught.value.faults
    assert fault.path == "stages.stage0.data.validate"
    assert fault.location.line
    assert fault.message.startswith("'accuracy' cannot be measured on data set 'val': ")
    assert "labels of shape (4,)" in fault.message


def test_a_loss_with_labels_on_several_views_is_told_what_it_takes(tmp_path):
    registry = toy_registry(datasets={"Doubled": Doubled})
    datasets = {"train": {"type": "Doubled"}, "val": {"type": "ToyData"}}
    experiment = toy_experiment(tmp_path, {}, datasets=datasets)
    with pytest.raises(ConfigError) as caught:
        check(experiment, registry, data=True)
    (fault,) = caught.value.faults
    assert "Expected input batch_size (4) to match target batch_size (2)" in fault.message
    assert fault.message.endswith(
        "; each sample has 2 views here, one behind the other, and a loss with labels takes the "
        "rows of one of them (SplitViews of distill-crd picks them)"
    )


def test_data_to_measure_on_are_run_through_the_models(tmp_path):
    datasets = {**IMAGES, "train": {"type": "ToyData", "params": {"size": 10}}}
    measured(tmp_path, {"teacher": {"model": "wide"}}, ["student", "teacher"])
    with pytest.raises(ConfigError, match="ToyMLP fails on data set 'val'") as caught:
        measured(tmp_path, {}, ["student"], datasets=datasets)
    assert caught.value.faults[0].path == "stages.stage0.student"
    with pytest.raises(ConfigError) as caught:
        measured(tmp_path, {"teacher": {"model": "wide"}}, ["teacher"], datasets=datasets)
    assert caught.value.faults[0].path == "stages.stage0.teacher"


def test_data_to_measure_on_have_the_models_classes(tmp_path):
    few = {"type": "ToyData", "params": {"size": 6, "classes": 2}}
    datasets = {"train": {"type": "ToyData", "params": {"size": 10}}, "val": few}
    with pytest.raises(DataError, match="has 3 outputs, but data set 'val' has 2 classes"):
        measured(tmp_path, {}, ["student"], datasets=datasets)
