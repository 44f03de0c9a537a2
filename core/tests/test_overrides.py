"""Overrides that reach into inherited keys."""

from __future__ import annotations

import pytest

from distill.config.overrides import override_experiment
from distill.config.yaml_document import parse
from distill.errors import ConfigError

TEXT = """
stages:
  - name: one
    optimizer: {type: SGD, params: {lr: 0.1, momentum: 0.9}}
    teachers: {a: {model: big}}
    data: {train: x}
  - name: two
  - name: three
"""


def test_an_inherited_key_is_written_out_before_it_is_changed() -> None:
    changed = override_experiment(parse(TEXT), ["stages.three.optimizer.params.lr=0.5"])
    one, two, three = changed.data["stages"]
    assert three["optimizer"] == {"type": "SGD", "params": {"lr": 0.5, "momentum": 0.9}}
    assert one["optimizer"]["params"]["lr"] == 0.1
    assert "optimizer" not in two
    assert changed.locate(("stages", 2, "optimizer", "type")).line == 4
    assert changed.locate(("stages", 2, "optimizer", "params", "lr")).file.startswith("-s ")


def test_a_key_of_the_stage_itself_is_changed_in_place() -> None:
    changed = override_experiment(parse(TEXT), ["stages[0].optimizer.params.lr=0.5"])
    assert changed.data["stages"][0]["optimizer"]["params"] == {"lr": 0.5, "momentum": 0.9}


def test_several_overrides_of_one_inherited_key_add_up() -> None:
    assignments = ["stages.two.optimizer.params.lr=0.5", "stages.two.optimizer.params.momentum=0"]
    changed = override_experiment(parse(TEXT), assignments)
    assert changed.data["stages"][1]["optimizer"]["params"] == {"lr": 0.5, "momentum": 0}


def test_teachers_are_found_under_either_key() -> None:
    changed = override_experiment(parse(TEXT), ["stages.two.teachers.a.mode=train"])
    assert changed.data["stages"][1]["teachers"] == {"a": {"model": "big", "mode": "train"}}


def test_data_is_left_to_inherit_key_by_key() -> None:
    changed = override_experiment(parse(TEXT), ["stages.two.data.batch_size=8"])
    assert changed.data["stages"][1]["data"] == {"batch_size": 8}


def test_a_stage_that_does_not_exist_is_still_an_error() -> None:
    with pytest.raises(ConfigError, match="did you mean three"):
        override_experiment(parse(TEXT), ["stages.tree.optimizer.params.lr=0.5"])


def test_a_later_override_builds_on_an_earlier_one_that_it_inherits() -> None:
    assignments = ["stages.one.optimizer.params.lr=0.5", "stages.two.optimizer.params.momentum=0"]
    changed = override_experiment(parse(TEXT), assignments)
    assert changed.data["stages"][1]["optimizer"]["params"] == {"lr": 0.5, "momentum": 0}


def test_seeds_take_the_place_of_a_seed_and_the_other_way_round() -> None:
    assert "seed" not in override_experiment(parse("seed: 1"), ["seeds=[1, 2]"]).data
    assert "seeds" not in override_experiment(parse("seeds: [1, 2]"), ["seed=3"]).data


TERMS = """
datasets: {x: {type: D}, y: {type: D}}
stages:
  - name: one
    teachers: {a: {model: big}, b: {model: small}}
    criterion: {ce: {type: C}, kd: {type: K}}
    auxiliary: {neck: {type: N}}
    scheduler: {type: S}
  - name: two
"""


def test_null_takes_an_inherited_term_out() -> None:
    changed = override_experiment(parse(TERMS), ["stages.two.criterion.kd=null"])
    one, two = changed.data["stages"]
    assert two["criterion"] == {"ce": {"type": "C"}}
    assert set(one["criterion"]) == {"ce", "kd"}
    assert not any(path[:4] == ("stages", 1, "criterion", "kd") for path in changed.locations)


@pytest.mark.parametrize(
    ("assignment", "section", "left"),
    [
        ("stages[0].criterion.ce=null", "criterion", {"kd"}),
        ("stages.one.auxiliary.neck=null", "auxiliary", set()),
        ("stages.one.teachers.b = null", "teachers", {"a"}),
    ],
)
def test_null_takes_an_entry_of_a_stage_out(assignment: str, section: str, left: set[str]) -> None:
    changed = override_experiment(parse(TERMS), [assignment])
    assert set(changed.data["stages"][0][section]) == left


def test_null_takes_a_data_set_out() -> None:
    assert set(override_experiment(parse(TERMS), ["datasets.y=null"]).data["datasets"]) == {"x"}


@pytest.mark.parametrize("text", ["stages.one.scheduler=null", "stages.one.criterion=null"])
def test_null_stays_a_value_elsewhere(text: str) -> None:
    changed = override_experiment(parse(TERMS), [text])
    assert changed.data["stages"][0][text.split(".")[2].partition("=")[0]] is None


def test_an_entry_that_is_not_there_cannot_be_taken_out() -> None:
    with pytest.raises(ConfigError) as caught:
        override_experiment(parse(TERMS), ["stages.two.criterion.kdd=null"])
    (fault,) = caught.value.faults
    assert fault.path == "stages.two.criterion.kdd"
    assert fault.message.endswith("there is no 'kdd' here; did you mean kd?")
