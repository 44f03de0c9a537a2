"""Modules that find their shapes in what they are fed, and what lives on through the stages."""

from contextlib import ExitStack

import pytest
import torch
from torch import nn

from distill import ConfigError, Observer, check, labels, run
from distill.testing import ToyMLP, toy_experiment, toy_registry
from distill.training.build import Builder
from distill.training.checkpoint import load_state, load_weights
from distill.training.parts import Parts
from distill.training.prepared import prepare
from distill.training.seed_run import SeedRun
from distill.training.stage import assemble
from distill.training.trainer import train_stage

CPU = torch.device("cpu")
STILL = {"type": "SGD", "params": {"lr": 0.0}}


class Paraphraser(nn.Module):
    """Shrinks features to half; built when it has seen them."""

    def __init__(self, bias=True):
        super().__init__()
        self.bias = bias
        self.setups = []

    def setup(self, features):
        self.setups.append((tuple(features.shape), torch.is_grad_enabled()))
        width = features.shape[1]
        self.layer = nn.Linear(width, width // 2, self.bias)
        self.norm = nn.BatchNorm1d(width // 2)

    def forward(self, features):
        return self.norm(self.layer(features))


class Between(nn.Module):
    """Brings one feature to the width of another, as a loss with a layer of its own."""

    def setup(self, student, teacher):
        self.layer = nn.Linear(student.shape[1], teacher.shape[1])

    def forward(self, student, teacher):
        return (self.layer(student) - teacher).square().mean()


class Remembering(nn.Module):
    """Registers a buffer when it is set up."""

    def setup(self, input):
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, input):
        self.seen += 1
        return input


class Bank(nn.Module):
    """Knows every sample of the data by its index."""

    def setup(self, student, dataset):
        self.register_buffer("rows", torch.zeros(len(dataset), student.shape[1]))
        self.labels = labels(dataset)

    def forward(self, student):
        return (student - self.rows[: len(student)]).square().mean()


class Stubborn(nn.Module):
    def setup(self, features):
        raise ValueError("features must have a prime number of channels")

    def forward(self, features):
        return features


class Killed(Exception):
    """Stands in for a kill."""


class Bomb(Observer):
    """Ends the run when an epoch of a stage is over."""

    def __init__(self, stage, epoch):
        self.at = (stage, epoch)

    def epoch_end(self, event):
        if (event.stage, event.position.epoch) == self.at:
            raise Killed


def registry(bomb=None):
    auxiliary = {c.__name__: c for c in (Paraphraser, Stubborn, Remembering)}
    return toy_registry(
        auxiliary_modules=auxiliary,
        losses={"Between": Between, "Bank": Bank},
        observers={"Bomb": lambda: bomb or Observer()},
    )


def fed(type_, reference, **more):
    return {"type": type_, "inputs": {"features": reference}, **more}


def term(**inputs):
    return {"type": "MSELoss", "inputs": inputs}


TEACHER = {"teacher": {"model": "wide"}}
HINT = {
    **TEACHER,
    "auxiliary": {
        "small": fed("Paraphraser", "teacher.body"),
        "mine": {
            "type": "Linear",
            "params": {"in_features": 8, "out_features": 6},
            "inputs": {"input": "student.body"},
        },
    },
    "criterion": {"hint": term(input="mine", target="small")},
}
BETWEEN = {
    "type": "Between",
    "inputs": {"student": "student.body", "teacher": "teacher.body"},
}


def seed_run(folder, *stages, seed=0, **keys):
    experiment = toy_experiment(folder, *stages, **keys)
    builder = Builder(experiment, registry())
    models = {name: builder.model(name, seed) for name in experiment.models}
    sources = {name: builder.source(name) for name in experiment.datasets}
    return SeedRun(builder, seed, CPU, folder / "run", lambda *_: None, models, sources)


def trained(folder, *stages, **keys):
    done = seed_run(folder, *stages, **keys)
    for number in range(len(stages)):
        train_stage(done, number)
    return done


def auxiliary(done, stage, name):
    return done.parts.modules["auxiliary_modules", stage, name]


def states(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_shapes_come_from_two_samples_once_and_without_gradients(tmp_path):
    done = trained(
        tmp_path,
        HINT,
        {"epochs": 1},
        {
            "auxiliary": {"again": {"reuse": "small"}},
            "criterion": {"ce": {"type": "CrossEntropyLoss"}},
        },
    )
    assert auxiliary(done, "stage0", "small").setups == [((2, 12), False)]
    assert [key for key in done.parts.modules if key[0] == "auxiliary_modules"] == [
        ("auxiliary_modules", "stage0", "small"),
        ("auxiliary_modules", "stage0", "mine"),
    ]


def test_layers_are_there_before_the_optimizer_which_trains_them(tmp_path):
    ready = seed_run(tmp_path / "before", {**HINT, "optimizer": STILL})
    train_stage(ready, 0)
    before = states(auxiliary(ready, "stage0", "small"))
    after = states(auxiliary(trained(tmp_path / "after", HINT), "stage0", "small"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {"layer.weight", "norm.weight", "norm.bias"} <= moved


def test_a_loss_may_find_its_shapes_too(tmp_path):
    done = trained(tmp_path, {**TEACHER, "criterion": {"hint": BETWEEN}})
    (loss,) = done.parts.modules.values()
    assert loss.layer.weight.shape == (12, 8)


def first_weights(folder, name="small", seed=0, **more):
    made = {"student": name}
    stage = {
        **TEACHER,
        "optimizer": STILL,
        "auxiliary": {**more, name: fed("Paraphraser", "teacher.body")},
        "criterion": {"hint": BETWEEN, "ce": {"type": "CrossEntropyLoss", "inputs": made}},
    }
    run_of = seed_run(folder / f"{name}{seed}{len(more)}", stage, seed=seed)
    torch.rand(3 + seed + len(more))
    train_stage(run_of, 0)
    return auxiliary(run_of, "stage0", name).layer.weight


def test_initial_weights_depend_on_the_seed_and_the_modules_name_alone(tmp_path):
    first = first_weights(tmp_path)
    beside_others = first_weights(tmp_path, other=fed("Paraphraser", "student.body"))
    assert torch.equal(first, beside_others)
    assert not torch.equal(first, first_weights(tmp_path, seed=1))
    assert not torch.equal(first, first_weights(tmp_path, name="other"))


def test_setting_up_leaves_no_trace(tmp_path):
    """Neither in models nor in the statistics of what is set up."""
    ready = seed_run(tmp_path, HINT)
    stage = ready.builder.experiment.stages[0]
    before = {name: states(model) for name, model in ready.models.items()}
    rehearsed(ready, stage)
    assert all(same(states(ready.models[name]), before[name]) for name in before)
    norm = auxiliary(ready, "stage0", "small").norm
    assert norm.num_batches_tracked == 0
    assert torch.equal(norm.running_mean, torch.zeros(6))


def rehearsed(ready, stage):
    with ExitStack() as stack:
        return prepare(ready, stage, stack)


def test_a_buffer_registered_while_shapes_are_found_stays(tmp_path):
    remember = {"type": "Remembering", "inputs": {"input": "student.body"}}
    mean = {"type": "MSELoss", "inputs": {"input": "bank", "target": "student.body"}}
    criterion = {"ce": {"type": "CrossEntropyLoss"}, "bank": mean}
    done = trained(tmp_path, {"auxiliary": {"bank": remember}, "criterion": criterion})
    assert auxiliary(done, "stage0", "bank").seen == 6


@pytest.mark.parametrize(
    ("stage", "path", "message"),
    [
        (
            {
                **TEACHER,
                "auxiliary": {"odd": fed("Stubborn", "student.body")},
                "criterion": {"hint": term(input="odd", target="student.body")},
            },
            "stages.stage0.auxiliary.odd",
            "Stubborn failed on features=student.body (2, 8): features must have a prime number",
        ),
        (
            {
                "criterion": {
                    "odd": {**BETWEEN, "inputs": {"student": "student.body", "teacher": "targets"}}
                }
            },
            "stages.stage0.criterion.odd",
            "Between failed on student=student.body (2, 8), teacher=targets (2,): IndexError",
        ),
    ],
    ids=["auxiliary module", "loss"],
)
def test_a_module_that_cannot_be_set_up_is_told_at_its_line(tmp_path, stage, path, message):
    experiment = toy_experiment(tmp_path, stage)
    with pytest.raises(ConfigError) as caught:
        check(experiment, registry(), data=True)
    (fault,) = caught.value.faults
    assert fault.path == path
    assert message in fault.message
    lines = (tmp_path / "toy.yaml").read_text("utf-8").splitlines()
    assert lines[fault.location.line - 1].strip() == "odd:"


LEARN = {
    "epochs": 2,
    **TEACHER,
    "auxiliary": {"small": fed("Paraphraser", "teacher.body")},
    "criterion": {
        "hint": {"type": "Between", "inputs": {"student": "small", "teacher": "teacher.body"}}
    },
}
PLAIN = {"auxiliary": None, "criterion": {"ce": {"type": "CrossEntropyLoss"}}}


def carrying_on(**more):
    return {
        "auxiliary": {
            "teachers": {"reuse": "small", **more},
            "mine": fed("Paraphraser", "student.body", params={"bias": False}),
        },
        "criterion": {
            "ce": {"type": "CrossEntropyLoss"},
            "hint": {"type": "Between", "inputs": {"student": "mine", "teacher": "teachers"}},
        },
    }


def test_a_module_carried_on_frozen_stays_to_the_last_bit_and_else_goes_on(tmp_path):
    for frozen in (True, False):
        ready = seed_run(tmp_path / str(frozen), LEARN, PLAIN, carrying_on(frozen=frozen))
        train_stage(ready, 0)
        small = auxiliary(ready, "stage0", "small")
        learned = states(small)
        train_stage(ready, 1)
        assert same(states(small), learned)
        train_stage(ready, 2)
        assert auxiliary(ready, "stage0", "small") is small
        assert same(states(small), learned) is frozen
        assert len(small.setups) == 1
        assert all(p.requires_grad for p in small.parameters())


def test_what_a_later_stage_will_build_stays_in_the_checkpoint_until_then():
    parts = Parts()
    saved = {"weight": torch.ones(1, 2), "bias": torch.zeros(1)}
    parts.resume_from({"auxiliary_modules|one|small": saved, "losses|one|hint": {}})
    assert parts.state_dict() == {"auxiliary_modules|one|small": saved, "losses|one|hint": {}}
    parts.restore()
    assert parts.state_dict().keys() == {"auxiliary_modules|one|small", "losses|one|hint"}
    module = nn.Linear(2, 1)
    parts.add(("auxiliary_modules", "one", "small"), module)
    parts.restore()
    assert torch.equal(module.weight, saved["weight"])
    assert parts.saved.keys() == {("losses", "one", "hint")}
    module.weight.data.fill_(7)
    assert parts.state_dict()["auxiliary_modules|one|small"]["weight"].max() == 7


def test_a_saved_state_waits_for_a_module_to_find_its_shapes():
    parts, key = Parts(), ("auxiliary_modules", "one", "small")
    learned = Paraphraser()
    learned.setup(torch.zeros(2, 4))
    parts.resume_from({"|".join(key): learned.state_dict()})
    again = Paraphraser()
    parts.add(key, again)
    parts.restore()
    assert parts.is_unset(again)
    assert parts.saved.keys() == {key}
    again.setup(torch.zeros(2, 4))
    parts.unset.remove(key)
    parts.restore()
    assert torch.equal(again.layer.weight, learned.layer.weight)
    assert not parts.saved


def test_a_learned_state_is_not_lost_while_its_module_has_no_layers():
    parts, key = Parts(), ("auxiliary_modules", "one", "small")
    learned = Paraphraser()
    learned.setup(torch.zeros(2, 4))
    parts.resume_from({"|".join(key): learned.state_dict()})
    parts.add(key, Paraphraser())
    assert parts.state_dict()["|".join(key)].keys() == learned.state_dict().keys()


def test_what_never_had_layers_is_not_in_the_checkpoint():
    parts = Parts()
    parts.add(("auxiliary_modules", "one", "small"), Paraphraser())
    assert parts.state_dict() == {}


def test_copies_share_nothing():
    parts, module = Parts(), nn.Linear(2, 1)
    parts.add(("losses", "one", "x"), module)
    copied = parts.copied()
    copied.modules["losses", "one", "x"].weight.data.fill_(9)
    assert not torch.equal(module.weight, copied.modules["losses", "one", "x"].weight)
    assert parts.key(module) == ("losses", "one", "x")


STAGES = (
    LEARN,
    {**PLAIN, "epochs": 2},
    {**carrying_on(frozen=True), "epochs": 3},
    {
        "auxiliary": {"later": {"reuse": "teachers"}, "mine": {"reuse": "mine"}},
        "epochs": 2,
        "criterion": {
            "ce": {"type": "CrossEntropyLoss"},
            "hint": {"type": "Between", "inputs": {"student": "mine", "teacher": "later"}},
        },
    },
)


def files_of(folder, *bombs):
    """Run, be killed by each of the bombs in turn, and finish; return what is left behind."""
    experiment = toy_experiment(folder, *STAGES, observers=["Bomb"])
    for bomb in bombs:
        with pytest.raises(Killed):
            run(experiment, registry=registry(bomb), runs=folder)
    result = run(experiment, registry=registry(), runs=folder)
    files = {f.parent.name: f.read_bytes() for f in folder.rglob("last.safetensors")}
    return files, load_state(result.directory / "checkpoint.pt")["parts"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return files_of(tmp_path_factory.mktemp("uninterrupted"))


@pytest.mark.parametrize(
    "kills",
    [
        [("stage0", 2)],
        [("stage1", 2)],  # which has no use for the module
        [("stage2", 2)],
        [("stage3", 2)],
        [("stage1", 1), ("stage2", 1), ("stage2", 3), ("stage3", 1)],
    ],
    ids=lambda kills: " then ".join(f"{stage} {epoch}" for stage, epoch in kills),
)
def test_a_run_killed_in_any_stage_goes_on_with_what_modules_had_learned(
    tmp_path, uninterrupted, kills
):
    files, parts = files_of(tmp_path, *(Bomb(*kill) for kill in kills))
    assert files == uninterrupted[0]
    assert parts.keys() == uninterrupted[1].keys()
    assert all(same(parts[key], uninterrupted[1][key]) for key in parts)


def test_every_module_is_in_the_checkpoint_once(uninterrupted):
    assert uninterrupted[1].keys() == {
        "auxiliary_modules|stage0|small",
        "auxiliary_modules|stage2|mine",
        "losses|stage0|hint",
        "losses|stage1|ce",
        "losses|stage2|ce",
        "losses|stage2|hint",
        "losses|stage3|ce",
        "losses|stage3|hint",
    }


def test_a_stage_put_together_twice_has_the_very_modules(tmp_path):
    """As it is where each process holds a part of its parameters."""
    ready = seed_run(tmp_path, HINT)
    stage = ready.builder.experiment.stages[0]
    first = rehearsed(ready, stage).assembly
    again = assemble(ready.builder, stage, ready.models, ready.parts, 0, CPU)
    again.distiller.release()
    assert again.auxiliary == first.auxiliary
    assert again.terms == first.terms
    assert not ready.parts.unset


def test_the_student_written_is_loaded_into_its_plain_class(tmp_path):
    trained(tmp_path, HINT)
    load_weights(ToyMLP(), tmp_path / "run" / "stage0" / "last.safetensors")


BANK = {"criterion": {"bank": {"type": "Bank"}}}


def test_a_setup_that_asks_for_the_data_set_is_given_it(tmp_path):
    ready = seed_run(tmp_path, BANK)
    with ExitStack() as stack:
        bank = prepare(ready, ready.builder.experiment.stages[0], stack).assembly.terms["bank"]
    assert bank.rows.shape == (20, 3)
    assert bank.labels[:4] == [0, 1, 2, 0]


def test_what_knows_the_samples_of_one_data_set_is_not_used_with_another(tmp_path):
    other = {"data": {"train": "val"}}
    with pytest.raises(
        ConfigError,
        match=r"stages.stage0.criterion.bank: Bank knows the samples of "
        "data set 'train' by their index, and this stage trains on 'val'",
    ):
        run(toy_experiment(tmp_path, BANK, other), registry=registry(), runs=tmp_path)
    run(toy_experiment(tmp_path, BANK, {**other, **BANK}), registry=registry(), runs=tmp_path)
