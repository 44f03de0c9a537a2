"""A stage's auxiliary modules as the file describes them: new, a model's, or carried on."""

import pytest

from distill.config.load import draft
from distill.config.yaml_document import parse

HEAD = """\
name: chain
datasets: {train: {type: D}}
models: {big: {type: M}, small: {type: M}}
stages:
  - name: one
    epochs: 1
    data: {train: train, batch_size: 8}
    teacher: {model: big}
    student: {model: small}
    criterion: {ce: {type: CrossEntropyLoss}}
    optimizer: {type: SGD, params: {lr: 0.1}}
"""
LEARNED = """\
auxiliary:
  small: {type: Linear, params: {out_features: 3}, inputs: {input: teacher.body}}
  head: {module: teacher.head, inputs: {input: small}}
"""


def text_of(*stages):
    names = ("one", "two", "three", "four")
    head, *rest = (
        (HEAD if name == "one" else f"  - name: {name}\n")
        + "".join(f"    {line}\n" for line in lines.splitlines())
        for name, lines in zip(names, stages, strict=False)
    )
    return head + "".join(rest)


def stages_of(*stages):
    experiment, faults = draft(parse(text_of(*stages), "f.yaml"))
    assert [str(fault) for fault in faults] == []
    return experiment.stages


def faults_of(*stages):
    _, faults = draft(parse(text_of(*stages), "f.yaml"))
    return [(fault.path, fault.message) for fault in faults]


def texts(module):
    return {key: str(wires) for key, wires in module.inputs.items()}


ONE_OF = (
    "give one of 'type', for a new module, 'module', for one of a model's, 'model', for a model "
    "that trains beside the student, and 'reuse', for one of a stage before"
)


def test_a_new_module_has_its_stage_and_name_for_origin():
    (stage,) = stages_of(LEARNED)
    small, head = stage.auxiliary["small"], stage.auxiliary["head"]
    assert (small.origin, small.module, small.frozen) == (("one", "small"), None, False)
    assert (small.component.type, small.component.params) == ("Linear", {"out_features": 3})
    assert texts(small) == {"input": "teacher.body"}
    assert (str(head.module), head.component.type, texts(head)) == (
        "teacher.head",
        "",
        {"input": "small"},
    )


@pytest.mark.parametrize(
    "given",
    [
        "{inputs: {input: student}}",
        "{frozen: true}",
        "{type: Linear, module: teacher.head}",
        "{type: Linear, reuse: small}",
        "{module: teacher.head, reuse: small}",
        "{type: Linear, module: teacher.head, reuse: small}",
    ],
)
def test_a_module_is_one_of_new_a_models_and_carried_on(given):
    faults = faults_of(LEARNED, f"auxiliary:\n  odd: {given}")
    assert ("stages.two.auxiliary.odd", ONE_OF) in faults


def test_a_misspelt_kind_is_told_once():
    (fault,) = faults_of(LEARNED, "auxiliary:\n  odd: {reues: small}")
    assert fault[0] == "stages.two.auxiliary.odd.reues"
    assert "did you mean reuse" in fault[1]


@pytest.mark.parametrize(
    ("reuse", "hint"),
    [
        ("smal", "; did you mean small?"),
        ("paraphraser", " (there are: small, head)"),
    ],
)
def test_an_unknown_module_to_carry_on_is_answered_with_the_nearest(reuse, hint):
    assert faults_of(LEARNED, f"auxiliary:\n  odd: {{reuse: {reuse}}}") == [
        (
            "stages.two.auxiliary.odd.reuse",
            f"no stage before this one has an auxiliary module '{reuse}'{hint}",
        )
    ]


def test_the_first_stage_has_nothing_to_carry_on():
    assert faults_of("auxiliary:\n  odd: {reuse: small}") == [
        (
            "stages.one.auxiliary.odd.reuse",
            "no stage before this one has an auxiliary module 'small' (there are: none)",
        )
    ]


def test_a_module_of_the_same_stage_is_none_to_carry_on():
    new = "{type: Linear, inputs: {input: student}}"
    ((path, text),) = faults_of(f"auxiliary:\n  new: {new}\n  odd: {{reuse: new}}")
    assert path == "stages.one.auxiliary.odd.reuse"
    assert "no stage before this one has" in text


def test_a_module_of_a_later_stage_is_none_to_carry_on():
    assert len(faults_of("auxiliary:\n  odd: {reuse: small}", LEARNED)) == 1


@pytest.mark.parametrize("between", [[], ["auxiliary: null"], [""]])
def test_a_name_of_a_stage_before_is_no_name_for_a_new_module(between):
    new = "auxiliary:\n  small: {type: Linear, inputs: {input: student}}"
    (fault,) = faults_of(LEARNED, *between, new)
    name = ("two", "three")[len(between)]
    assert fault == (
        f"stages.{name}.auxiliary.small",
        "stage 'one' has an auxiliary module 'small' already; write {reuse: small} to go on with "
        "it, or call the new one otherwise",
    )


def test_what_is_carried_on_takes_no_params_of_its_own():
    (fault,) = faults_of(LEARNED, "auxiliary:\n  again: {reuse: small, params: {bias: false}}")
    assert fault == (
        "stages.two.auxiliary.again.params",
        "'reuse' takes no params; they belong to 'type'",
    )
    (fault,) = faults_of("auxiliary:\n  x: {module: teacher.a, params: {}, inputs: {a: student}}")
    assert fault[0] == "stages.one.auxiliary.x.params"
    assert fault[1].startswith("'module' takes no params")


@pytest.mark.parametrize("frozen", ["true", "false"])
def test_a_models_module_is_frozen_with_its_model(frozen):
    given = f"{{module: teacher.head, frozen: {frozen}, inputs: {{input: student}}}}"
    assert faults_of(f"auxiliary:\n  x: {given}") == [
        ("stages.one.auxiliary.x.frozen", "a model's module is frozen with its model, by 'freeze'")
    ]


def test_a_models_module_that_is_carried_on_is_frozen_with_its_model_too():
    head = "{reuse: head, frozen: true, inputs: {input: student.body}}"
    (fault,) = faults_of(LEARNED, f"auxiliary:\n  head: {head}")
    assert fault[0] == "stages.two.auxiliary.head.frozen"


def test_a_carried_on_module_has_its_type_params_and_inputs_unless_it_gets_new_ones():
    again = "auxiliary:\n  same: {reuse: small}\n  other: {reuse: small, inputs: {input: student}}"
    one, two = stages_of(LEARNED, again)
    small = one.auxiliary["small"]
    for name, inputs in (("same", "teacher.body"), ("other", "student")):
        module = two.auxiliary[name]
        assert module.origin == ("one", "small")
        assert module.component.type == "Linear"
        assert module.component.params == small.component.params
        assert module.component.path == ("stages", 1, "auxiliary", name)
        assert texts(module) == {"input": inputs}


def test_a_models_module_may_be_carried_on():
    _, two = stages_of(LEARNED, "auxiliary:\n  again: {reuse: head, inputs: {input: student.body}}")
    assert str(two.auxiliary["again"].module) == "teacher.head"


def test_a_module_may_be_carried_on_under_its_own_name_and_again_after_that():
    *_, two, three, four = stages_of(
        LEARNED,
        "auxiliary:\n  small: {reuse: small, frozen: true}",
        "auxiliary:\n  again: {reuse: small}",
        "auxiliary:\n  last: {reuse: again, frozen: true}",
    )
    assert two.auxiliary["small"].origin == ("one", "small")
    assert three.auxiliary["again"].origin == four.auxiliary["last"].origin == ("one", "small")
    frozen = [two.auxiliary["small"], three.auxiliary["again"], four.auxiliary["last"]]
    assert [module.frozen for module in frozen] == [True, False, True]


def test_inputs_given_on_the_way_are_carried_on_too():
    *_, three = stages_of(
        LEARNED,
        "auxiliary:\n  again: {reuse: small, inputs: {input: student}}",
        "auxiliary:\n  last: {reuse: again}",
    )
    assert texts(three.auxiliary["last"]) == {"input": "student"}


def test_inputs_that_the_stage_does_not_have_are_told_where_it_is_carried_on():
    gone = "teacher: null\nauxiliary:\n  again: {reuse: small}"
    ((path, text),) = faults_of(LEARNED, gone)
    assert path.startswith("stages.two.auxiliary.again")
    assert text.startswith("stage 'two' has no 'teacher'")


def test_a_section_left_out_is_inherited_with_its_very_modules():
    one, two, three = stages_of(LEARNED, "epochs: 2", "epochs: 3")
    assert one.auxiliary == two.auxiliary == three.auxiliary
    assert two.auxiliary["small"] is one.auxiliary["small"]


def test_a_section_of_null_has_no_modules_and_those_before_can_still_be_carried_on():
    _, two, three, four = stages_of(
        LEARNED, "auxiliary: null", "", "auxiliary:\n  again: {reuse: small}"
    )
    assert two.auxiliary == three.auxiliary == {}
    assert four.auxiliary["again"].origin == ("one", "small")


def test_a_written_section_has_its_own_modules_only():
    _, two = stages_of(LEARNED, "auxiliary:\n  new: {type: Linear, inputs: {input: student}}")
    assert list(two.auxiliary) == ["new"]


def test_modules_stand_in_an_order_in_which_each_ones_inputs_exist():
    lines = (
        "last: {type: A, inputs: {a: [student.x, middle.out], b: first}}",
        "middle: {type: B, inputs: {a: first}}",
        "first: {module: student.head, inputs: {a: student}}",
    )
    (stage,) = stages_of("auxiliary:\n" + "".join(f"  {line}\n" for line in lines))
    assert list(stage.auxiliary) == ["first", "middle", "last"]


def test_carried_on_modules_stand_in_order_too():
    _, two = stages_of(
        LEARNED,
        "auxiliary:\n  b: {reuse: small, inputs: {input: a}}\n"
        "  a: {reuse: head, inputs: {input: student}}",
    )
    assert list(two.auxiliary) == ["a", "b"]


@pytest.mark.parametrize(
    ("lines", "circle"),
    [
        (["a: {type: A, inputs: {x: a}}"], ["a -> a"]),
        (
            ["a: {type: A, inputs: {x: b}}", "b: {type: A, inputs: {x: [student, a.key]}}"],
            ["a -> b -> a", "b -> a -> b"],
        ),
    ],
)
def test_modules_that_feed_each_other_in_a_circle_are_told(lines, circle):
    ((path, text),) = faults_of("auxiliary:\n" + "".join(f"  {line}\n" for line in lines))
    assert path == "stages.one.auxiliary"
    assert text.removeprefix("these modules feed each other in a circle: ") in circle


def test_a_circle_may_come_of_modules_carried_on():
    lines = ("x: {reuse: small, inputs: {input: y}}", "y: {reuse: head, inputs: {input: x}}")
    wired = "auxiliary:\n" + "".join(f"  {line}\n" for line in lines)
    ((path, text),) = faults_of(LEARNED, wired)
    assert path == "stages.two.auxiliary"
    assert "in a circle" in text


@pytest.mark.parametrize("name", ["student", "targets", "teacher"])
def test_a_module_cannot_be_called_as_another_value(name):
    new = f"auxiliary:\n  {name}: {{type: Linear, inputs: {{input: student}}}}"
    assert (
        f"stages.one.auxiliary.{name}",
        f"'{name}' already names another value of this stage",
    ) in faults_of(new)
