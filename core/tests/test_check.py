"""Every kind of mistake in a file is one fault: file, line, column, path, and the nearest name."""

import re

import pytest
import torch
from torch import nn, optim
from torch.optim import lr_scheduler

from distill.config.load import draft, load
from distill.config.overrides import override_experiment
from distill.config.yaml_document import parse
from distill.errors import ConfigError
from distill.registry import SINGULAR, Entry, Registry
from distill.testing import ToyMLP
from distill.training.check import check

TYPOS = [
    ("log_every", "log_evry", "log_evry: unknown key 'log_evry'; did you mean log_every?"),
    ("seed: 3", "sed: 3", "sed: unknown key 'sed'; did you mean seed or seeds?"),
    ("name: toy", "nmae: toy", "nmae: unknown key 'nmae'; did you mean name?"),
    ("datasets:", "dataset:", "dataset: unknown key 'dataset'; did you mean datasets?"),
    ("models:", "modls:", "modls: unknown key 'modls'; did you mean models?"),
    ("stages:", "stage:", "stage: unknown key 'stage'; did you mean stages?"),
    ("device: cpu", "device: gpu", "expected auto, cpu, cuda, cuda:<n> or mps"),
    ("seed: 3", "seed: -1", "seed: must be at least 0, got the number -1"),
    ("type: ToyData", "tpye: ToyData", "datasets.train.tpye: unknown key 'tpye'; did you mean"),
    ("type: ToyData", "type: ToyDat", "datasets.train.type: there is no data set 'ToyDat'; did"),
    ("size: 24", "sze: 24", "datasets.train.params.sze: data set ToyData: there is no parameter"),
    ("size: 24", "size: abc", "expected a whole number, got the text 'abc'"),
    ("type: Scale", "type: Scal", "datasets.train.transforms[0].type: there is no transform"),
    ("factor: 0.5", "facto: 0.5", "there is no parameter 'facto'; did you mean factor?"),
    ("type: ToyMLP", "tpye: ToyMLP", "models.wide.tpye: unknown key 'tpye'; did you mean type?"),
    ("type: ToyMLP", "type: ToyMPL", "there is no model 'ToyMPL'; did you mean ToyMLP?"),
    ("hidden: 16", "hiden: 16", "there is no parameter 'hiden'; did you mean hidden?"),
    ("hidden: 16", "hidden: 1.5", "expected a whole number, got the number 1.5"),
    ("epochs: 2", "epoch: 2", "stages.teach.epoch: unknown key 'epoch'; did you mean epochs?"),
    ("epochs: 2", "epochs: two", "stages.teach.epochs: expected a whole number, got the text"),
    ("validate: val", "validat: val", "stages.teach.data.validat: unknown key 'validat'; did"),
    ("validate: val", "validate: vall", "there is no data set 'vall' in this file; did you mean"),
    ("train: train,", "trian: train,", "stages.teach.data.trian: unknown key 'trian'; did you"),
    (
        "batch_size",
        "batchsize",
        "unknown key 'batchsize'; did you mean batch_size or batch_sampler?",
    ),
    ("student: {model: wide}", "studnet: {model: wide}", "'studnet'; did you mean student?"),
    ("model: wide}", "mdoel: wide}", "stages.teach.student.mdoel: unknown key 'mdoel'; did you"),
    ("model: wide}", "model: wid}", "there is no model 'wid' in this file; did you mean wide?"),
    ("type: CrossEntropyLoss", "type: CrossEntropyLos", "did you mean CrossEntropyLoss"),
    ("optimizer:", "optimiser:", "unknown key 'optimiser'; did you mean optimizer?"),
    ("type: SGD", "type: SDG", "there is no optimizer 'SDG'; did you mean SGD?"),
    ("lr: 0.1", "lrr: 0.1", "optimizer SGD: there is no parameter 'lrr'; did you mean lr?"),
    ("type: StepLR", "type: StepL", "there is no scheduler 'StepL'; did you mean StepLR"),
    ("step_size", "step_siz", "scheduler StepLR: there is no parameter 'step_siz'; did you mean"),
    ("precision: fp32", "precision: fp23", "expected one of fp32, bf16, fp16, got the text 'fp23'"),
    ("[accuracy]", "[acuracy]", "metrics[0]: there is no metric 'acuracy'; did you mean accuracy?"),
    ("teacher: {", "teachr: {", "unknown key 'teachr'; did you mean teacher or teachers?"),
    ("model: wide, mode", "modle: wide, mode", "teacher.modle: unknown key 'modle'; did you mean"),
    ("model: wide, mode", "model: wid, mode", "teacher.model: there is no model 'wid'"),
    ("mode: eval", "mode: evl", "one of eval, train, got the text 'evl'; did you mean eval?"),
    ("auxiliary:", "auxilary:", "unknown key 'auxilary'; did you mean auxiliary?"),
    ("type: Linear", "typ: Linear", "auxiliary.regressor.typ: unknown key 'typ'; did you mean"),
    ("type: Linear", "type: Liner", "there is no auxiliary module 'Liner'; did you mean Linear?"),
    ("in_features", "in_feature", "there is no parameter 'in_feature'; did you mean in_features"),
    ("input: student", "inpt: student", "Linear takes no input 'inpt'; did you mean input?"),
    ("student.body}", "studnt.body}", "stage 'distil' has no 'studnt'; did you mean student?"),
    ("student.body}", "student.bdy}", "ToyMLP has no module 'bdy'; did you mean body"),
    ("student.body}", "student.body:inpt}", "'student.body:inpt' is no value name; write e.g."),
    ("[student.head]", "[student.haed]", "freeze[0]: ToyMLP has no module 'haed'; did you mean"),
    ("[student.head]", "[stdent.head]", "nor a class of one that trains; did you mean student?"),
    ("[student.head]", "[Liner]", "nor a class of one that trains; did you mean Linear?"),
    (
        "type: MSELoss",
        "type: MSEloss",
        "there is no loss 'MSEloss'; did you mean MSELoss or ModelLoss?",
    ),
    ("target: teacher", "targt: teacher", "MSELoss takes no input 'targt'; did you mean target?"),
    ("input: regressor", "input: regresor", "has no 'regresor'; did you mean regressor?"),
    ("type: Distance", "tpe: Distance", "criterion.kd.tpe: unknown key 'tpe'; did you mean type?"),
    ("weight: 0.5", "wieght: 0.5", "unknown key 'wieght'; did you mean weight?"),
    ("weight: 0.5", "weight: half", "expected a number or a mapping, got the text 'half'"),
    ("baseline: teach", "baseline: tech", "test.baseline: there is no stage 'tech' in this file;"),
    ("dataset: val", "datset: val", "test.datset: unknown key 'datset'; did you mean dataset?"),
    ("dataset: val", "dataset: vla", "test.dataset: there is no data set 'vla' in this file; did"),
    ("type: Console", "type: Consol", "observers[0].type: there is no observer 'Consol'; did you"),
]


def faults_of(text, registry, *assignments):
    """What ``distill check`` would say, a line a fault."""
    experiment, faults = draft(override_experiment(parse(text, "exp.yaml"), assignments))
    if experiment is not None:
        faults += check(experiment, registry)
    return str(ConfigError(faults)).splitlines()


def test_a_file_without_faults_has_none(experiment_text, registry):
    assert faults_of(experiment_text, registry) == []


@pytest.mark.parametrize(("right", "wrong", "said"), TYPOS)
def test_a_typo_is_one_fault_at_its_place_with_the_nearest_name(
    experiment_text, registry, place, right, wrong, said
):
    text = experiment_text.replace(right, wrong, 1)
    (fault,) = faults_of(text, registry)
    assert said in fault
    line = place(text, wrong).split(":")[0]
    assert fault.startswith(f"exp.yaml:{line}:")


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("log_every", "log_evry"),
        ("hidden: 16", "hiden: 16"),
        ("type: SGD", "type: SDG"),
        ("weight: 0.5", "wieght: 0.5"),
        ("lr: 0.1", "lrr: 0.1"),
        ("baseline: teach", "baseline: tech"),
    ],
)
def test_a_fault_at_a_key_points_to_the_column_of_the_key(
    experiment_text, registry, place, right, wrong
):
    text = experiment_text.replace(right, wrong, 1)
    (fault,) = faults_of(text, registry)
    assert fault.startswith(f"exp.yaml:{place(text, wrong)}: ")


def test_all_faults_of_a_file_come_at_once_in_the_order_of_its_lines(experiment_text, registry):
    text = experiment_text
    wrong = [
        ("log_every", "log_evry"),
        ("size: 24", "sze: 24"),
        ("hidden: 16", "hiden: 16"),
        ("epochs: 2", "epoch: 2"),
        ("type: SGD", "type: SDG"),
        ("step_size", "step_siz"),
        ("teacher: {", "teachr: {"),
        ("in_features", "in_feature"),
        ("type: MSELoss", "type: MSELos"),
        ("baseline: teach", "baseline: tech"),
        ("type: Console", "type: Consol"),
    ]
    for right, mistake in wrong:
        text = text.replace(right, mistake, 1)
    faults = faults_of(text, registry)
    lines = [int(re.match(r"exp\.yaml:(\d+):", fault)[1]) for fault in faults]
    assert len(faults) == len(wrong), "\n".join(faults)
    assert lines == sorted(lines)


@pytest.mark.parametrize(
    "mistake",
    [("name: toy", "nam: toy"), ("name: teach", "name: 'te ach'"), ("  - name: distil", "  - {}")],
)
def test_a_fault_in_a_name_does_not_hide_the_others(experiment_text, registry, mistake):
    text = experiment_text.replace("lr: 0.1", "lrr: 0.1")
    if mistake[1] == "  - {}":
        text = text.replace("  - name: distil\n", "  -\n")
    else:
        text = text.replace(*mistake, 1)
    faults = faults_of(text, registry)
    assert len(faults) == 2, "\n".join(faults)
    assert sum("there is no parameter 'lrr'" in fault for fault in faults) == 1


@pytest.mark.parametrize(
    ("missing", "key"),
    [
        ("    epochs: 2\n", "epochs"),
        ("    student: {model: wide}\n", "student"),
        ("    optimizer: {type: SGD, params: {lr: 0.1}}\n", "optimizer"),
        ("    criterion:\n      ce: {type: CrossEntropyLoss}\n", "criterion"),
        (", batch_size: 8", "data.batch_size"),
        ("train: train, ", "data.train"),
        ("    data: {train: train, validate: val, batch_size: 8}\n", "data"),
    ],
)
def test_what_a_stage_lacks_is_told_once_and_the_rest_is_checked(
    experiment_text, registry, missing, key
):
    text = experiment_text.replace(missing, "").replace("in_features", "in_feature")
    lacking, other = faults_of(text, registry)
    assert "stages.teach: " in lacking
    assert f"'{key}' is missing, and no stage before this one gives it" in lacking
    assert "there is no parameter 'in_feature'" in other


def test_a_fault_in_a_model_does_not_hide_those_of_the_stages_that_use_it(
    experiment_text, registry
):
    text = experiment_text.replace("type: ToyMLP", "type: ToyMPL", 1)
    text = text.replace("type: MSELoss", "type: MSELos").replace("in_features", "in_feature")
    assert len(faults_of(text, registry)) == 3


@pytest.mark.parametrize(
    "mistake",
    [("{type: ToyMLP, params: {hidden: 16}}", "{typ: ToyMLP}"), ("hidden: 16", "hiden: 16")],
)
def test_a_teacher_that_cannot_be_built_hides_no_fault_in_references_to_others(
    experiment_text, registry, mistake
):
    text = experiment_text.replace(*mistake, 1)
    text = text.replace("student.body", "student.bdy").replace(
        "target: teacher.body", "target: teacher.x"
    )
    model, reference = faults_of(text, registry)
    assert "models.wide" in model
    assert "ToyMLP has no module 'bdy'" in reference


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        (("wide: {type", "wide: {tpye"), "models.wide"),
        (("teacher: teacher.body", "teacher: teacher.bdy"), "'bdy'"),
    ],
)
def test_an_adapter_of_what_is_not_found_is_no_fault_of_its_own(
    experiment_text, registry, mistake, said
):
    adapted = "{type: Distance, adapter: auto, inputs: {student: student.body, teacher: TEACHER}}"
    text = experiment_text.replace("{type: Distance, weight: 0.5}", adapted)
    text = text.replace("TEACHER", "teacher.body:input" if "wide" in said else "teacher.body")
    assert faults_of(text, registry) == []
    (fault,) = faults_of(text.replace(*mistake), registry)
    assert said in fault


def test_a_peer_that_cannot_be_built_has_no_inputs_that_are_faults(experiment_text, registry):
    text = experiment_text.replace("  thin:", "  pal: {type: ToyMLP, params: {hiden: 4}}\n  thin:")
    text = text.replace(
        "      regressor:", "      pal: {model: pal, inputs: {inputs: inputs}}\n      regressor:"
    )
    (fault,) = faults_of(text, registry)
    assert "models.pal" in fault


def test_an_inherited_fault_is_told_once(experiment_text, registry):
    text = experiment_text.replace("type: SGD", "type: SDG") + "\n"
    third = "  - name: again\n    epochs: 1\ntest:"
    assert len(faults_of(text.replace("test:", third), registry)) == 1


def test_a_fault_in_the_inputs_of_two_stages_is_told_once(experiment_text, registry):
    text = experiment_text.replace("student.body}", "studnt.body}")
    third = "  - name: again\n    epochs: 1\ntest:"
    assert len(faults_of(text.replace("test:", third), registry)) == 1


@pytest.mark.parametrize(
    ("right", "wrong", "said", "fault", "broken"),
    [
        ("target: teacher.body", "target: teacher.bdy", "no module 'bdy'", "MSELoss", "MSELos"),
        ("input: student.body", "input: student.bdy", "no module 'bdy'", "in_feat", "on_feat"),
        ("{input: student.body", "{inpt: student.body", "no input 'inpt'", "in_feat", "on_feat"),
        (
            "Distance",
            "Distance, inputs: {teachr: teacher}",
            "no input 'teachr'",
            "Distance",
            "Distance, params: {scal: 2}",
        ),
    ],
)
def test_inputs_of_what_cannot_be_built_are_checked_all_the_same(
    experiment_text, registry, right, wrong, said, fault, broken
):
    text = experiment_text.replace(right, wrong, 1)
    alone = faults_of(text, registry)
    both = faults_of(text.replace(fault, broken, 1), registry)
    assert len(alone) == 1
    assert said in alone[0]
    assert len(both) == 2, "\n".join(both)
    assert any(said in line for line in both)


class Assigned(nn.Module):
    """Has its forward from elsewhere."""

    def __init__(self, scale: float = 1.0):
        super().__init__()
        self.forward = lambda input, target: (input - target).sum()


class Static(nn.Module):
    """Takes no self."""

    def __init__(self, scale: float = 1.0):
        super().__init__()

    @staticmethod
    def forward(input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (input - target).sum()


def by_function(scale: float = 1.0) -> nn.Module:
    return nn.MSELoss()


@pytest.mark.parametrize("made_by", [Assigned, Static, by_function])
def test_of_what_cannot_be_built_inputs_are_no_fault_that_only_building_shows(
    experiment_text, registry, made_by
):
    entries = [entry for kind in SINGULAR for entry in registry.entries(kind)]
    known = Registry([*entries, Entry("losses", "Other", made_by, "test")], registry.records)
    text = experiment_text.replace("type: MSELoss", "type: Other", 1)
    assert faults_of(text, known) == []
    (fault,) = faults_of(
        text.replace("type: Other", "type: Other\n        params: {scal: 2}"), known
    )
    assert "there is no parameter 'scal'" in fault


MODULES = "{modules: [body, {auxiliary: ext}]}"
ROW = f"student: {{model: thin, redesign: {{type: sequential, params: {MODULES}}}}}"


def test_what_stands_in_a_row_that_cannot_be_built_is_not_told_to_be_missing(
    experiment_text, registry
):
    text = experiment_text.replace("student: {model: thin}", ROW)
    ext = "      ext: {type: Linear, params: {in_features: 4, out_feature: 4}}\n      regressor:"
    text = text.replace("      regressor:", ext).replace(
        "input: student.body", "input: student.ext"
    )
    redesign, parameter = faults_of(text, registry)
    assert "the stage has no auxiliary module 'ext'" in redesign
    assert "there is no parameter 'out_feature'" in parameter


def test_a_loss_that_needs_a_teacher_says_so_in_a_stage_without_one(experiment_text, registry):
    text = experiment_text.replace("ce: {type: CrossEntropyLoss}", "ce: {type: Distance}")
    (fault,) = faults_of(text, registry)
    assert fault.endswith("ce: Distance needs a teacher, and stage 'teach' has none")


def test_a_teacher_s_input_is_shown_by_a_name_that_the_stage_has(experiment_text, registry):
    text = re.sub(r"teacher: (\{model: wide[^\n]*)", r"teachers: {first: \1}", experiment_text)
    assert text != experiment_text
    text = text.replace("teacher.body", "first.body")
    text = text.replace("{type: MSELoss", "{type: Distance").replace("input: ", "student: ")
    text = text.replace(", target: first.body", "")
    faults = faults_of(text, registry)
    assert any(
        "Distance needs the input 'teacher'; wire it, e.g. inputs: {teacher: first" in f
        for f in faults
    ), faults


def test_an_input_without_wiring_is_a_fault_that_shows_how(experiment_text, registry):
    text = experiment_text.replace(", target: teacher.body", "")
    (fault,) = faults_of(text, registry)
    assert "MSELoss needs the input 'target'; wire it, e.g. inputs: {target: student}" in fault


def test_an_override_is_checked_as_the_file_is_and_is_its_own_place(experiment_text, registry):
    assert faults_of(experiment_text, registry, "stages.teach.optimizer.params.lr=0.2") == []
    assignments = (
        "stages.teach.epochs=soon",
        "stages.distil.criterion.kd.type=Distanc",
        "stages.teach.optimizer.params.lrr=1",
        "datasets.train.params.size=true",
        "stages.distil.auxiliary.regressor.inputs.input=student.bdy",
    )
    faults = faults_of(experiment_text, registry, *assignments)
    assert [fault.split(": ")[0] for fault in faults] == sorted(f"-s {a}" for a in assignments)
    said = "\n".join(faults)
    assert "stages.teach.epochs: expected a whole number, got the text 'soon'" in said
    assert "there is no loss 'Distanc'; did you mean Distance?" in said
    assert "data set ToyData: expected a whole number, got true" in said
    assert "has no module 'bdy'" in said


def test_an_override_may_repair_the_file(experiment_text, registry):
    text = experiment_text.replace("epochs: 2", "epochs: two")
    assert faults_of(text, registry, "stages.teach.epochs=2") == []


def test_parameters_of_an_open_ended_factory_are_told_when_it_refuses_them(
    experiment_text, registry, place
):
    right, wrong = "type: ToyMLP, params: {hidden", "type: open_ended, params: {hid"
    text = experiment_text.replace(right, wrong, 1)
    (fault,) = faults_of(text, registry)
    assert fault.startswith(f"exp.yaml:{place(text, 'hid:')}: models.wide.params.hid: open_ended: ")
    assert "unexpected keyword argument 'hid'" in fault


def test_what_a_component_refuses_is_a_fault_of_its_place(experiment_text, registry):
    (fault,) = faults_of(experiment_text.replace("lr: 0.1", "lr: -1"), registry)
    assert "stages.teach.optimizer: SGD cannot be built: Invalid learning rate: -1" in fault


@pytest.mark.parametrize("name", ["Muon", "Adam", "SparseAdam", "Adafactor", "SGD"])
def test_optimizers_that_ask_for_matrices_or_devices_have_no_false_fault(
    experiment_text, registry, name
):
    fused = ", fused: true" if name in ("Adam", "SGD") else ""
    wanted = f"{{type: {name}, params: {{lr: 0.1{fused}}}}}"
    text = experiment_text.replace("{type: SGD, params: {lr: 0.1}}", wanted)
    assert faults_of(text, registry) == []


def test_checking_builds_models_without_memory(experiment_text, registry, tmp_path):
    devices = []

    class Watched(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(nn.Linear(3, 3).weight.detach())
            devices.append(self.weight.device.type)

    offers = [Entry("models", "ToyMLP", Watched, "here")]
    kinds = ("datasets", "losses", "optimizers", "schedulers", "metrics", "observers", "transforms")
    offers += [registry.find(kind, name) for kind in kinds for name in registry.names(kind)]
    file = tmp_path / "exp.yaml"
    file.write_text(
        experiment_text.replace(", params: {hidden: 16}", "").replace(", params: {hidden: 4}", "")
    )
    check(load(file), Registry(offers))
    assert devices == ["meta", "meta"]


def test_every_optimizer_and_scheduler_of_torch_on_offer_is_told_apart_from_bases(registry):
    for kind, base in (("optimizers", optim.Optimizer), ("schedulers", lr_scheduler.LRScheduler)):
        factories = [registry.find(kind, name).factory for name in registry.names(kind)]
        assert len(factories) > 10
        assert base not in factories


def test_an_override_of_an_inherited_key_is_checked_at_its_own_place(experiment_text, registry):
    assignment = "stages.distil.optimizer.params.lrr=1"
    (fault,) = faults_of(experiment_text, registry, assignment)
    assert fault.startswith(f"-s {assignment}: stages.distil.optimizer.params.lrr: optimizer SGD:")


def counted(hidden: int = 8, num_classes: int = 3) -> ToyMLP:
    """A model that tells how many logits it gives."""
    return ToyMLP(hidden, classes=num_classes)


def faults_of_many(text, registry, wide):
    """Faults of a file that stores, and counts the hits among, three logits of models so made."""
    every = [entry for kind in SINGULAR for entry in registry.entries(kind)]
    parts = Registry([*every, Entry("models", "counted", counted, "here")])
    text = text.replace("ToyMLP, params: {hidden: 16}", f"counted, params: {wide}")
    text = text.replace("model: wide, mode", "model: wide, store: {encoding: top_k, top: 3}, mode")
    text = text.replace("[accuracy]", "[{type: accuracy, params: {top_k: 3}}]")
    return faults_of(text, parts)


@pytest.mark.parametrize(
    ("wide", "classes"), [("{}", 3), ("{num_classes: 4}", 4), ("{num_classes: 0}", 0)]
)
def test_a_store_keeps_fewer_logits_than_there_are(experiment_text, registry, wide, classes):
    found = faults_of_many(experiment_text, registry, wide)
    said = "store.top: top_k keeps fewer logits than there are: 'wide' has 3, and top is 3"
    assert [said in fault for fault in found] == [True] * (classes == 3)


@pytest.mark.parametrize("store", ["{encoding: topk, top: 2}", "{encoding: top_k, top: 0}"])
def test_of_a_store_that_cannot_be_read_nothing_that_follows_is_told(
    experiment_text, registry, store
):
    text = experiment_text.replace("model: wide, mode", f"model: wide, store: {store}, mode")
    assert len(faults_of_many(text, registry, "{num_classes: 4}")) == 1


def test_hits_are_not_counted_among_more_classes_than_there_are(experiment_text, registry):
    found = faults_of_many(experiment_text, registry, "{num_classes: 2}")
    said = "metrics[0]: counts the first 3 of 2 classes, which is all: write a smaller top_k"
    places = [fault.split(": ")[1] for fault in found if said in fault]
    assert places == ["stages.teach.metrics[0]", "test.metrics[0]"]


def test_how_many_logits_a_redesigned_model_gives_is_not_known(experiment_text, registry):
    wide = "{num_classes: 2}, redesign: {type: whole}"
    found = faults_of_many(experiment_text, registry, wide)
    assert not any("counts the first" in fault or "top_k keeps" in fault for fault in found)
