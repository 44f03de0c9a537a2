import pytest

from distill.reference import Reference, each_reference, parse


@pytest.mark.parametrize(
    ("text", "owner", "path", "tap", "keys"),
    [
        ("student", "student", "", "", ""),
        ("student:input", "student", "", ":input", ""),
        ("student.layer2", "student", "layer2", "", ""),
        ("teacher.layer2.0.conv1:input", "teacher", "layer2.0.conv1", ":input", ""),
        ("teacher.layer2.-1.relu@-1:input", "teacher", "layer2.-1.relu", "@-1:input", ""),
        ("teacher.relu@0", "teacher", "relu", "@0", ""),
        ("student.encoder:input.mask.0", "student", "encoder", ":input", "mask.0"),
        ("student.encoder@1.out", "student", "encoder", "@1", "out"),
        ("big_one-2.head", "big_one-2", "head", "", ""),
        ("inputs", "inputs", "", "", ""),
        ("inputs.image", "inputs", "image", "", ""),
        ("targets", "targets", "", "", ""),
        ("index", "index", "", "", ""),
        ("extras.views", "extras", "views", "", ""),
        ("pair.plus", "pair", "plus", "", ""),
    ],
)
def test_a_reference_is_owner_path_tap_and_keys(text, owner, path, tap, keys):
    assert parse(text) == Reference(text, owner, path, tap, keys)
    assert str(parse(text)) == text


def test_every_reference_of_a_modules_inputs_comes_with_its_place():
    one, two, three = parse("student"), parse("student.a"), parse("student.b")
    assert list(each_reference({"x": one, "y": (two, three)})) == [
        (("x",), one),
        (("y", 0), two),
        (("y", 1), three),
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is no value name"),
        ("student.", "is no value name"),
        (".layer2", "is no value name"),
        ("student..layer2", "is no value name"),
        ("student layer2", "is no value name"),
        ("student[0]", "is no value name"),
        ("2student", "is no value name"),
        ("student.layer2:inputs", "is no value name"),
        ("student:input.", "is no value name"),
        ("student.relu@", "is no value name"),
        ("student.relu@last", "is no value name"),
        ("student.relu:input@1", "is no value name"),
        ("student\n", "is no value name"),
        ("targets:input", "targets has no input"),
        ("extras.views:input", "extras has no input"),
        ("inputs@1", "inputs has no input and no calls"),
        ("targets.first", "targets has no parts"),
        ("index.0", "index has no parts"),
        ("extras", "'extras' needs a key, e.g. extras.views"),
    ],
)
def test_what_follows_no_grammar_is_refused(text, said):
    with pytest.raises(ValueError, match=said):
        parse(text)
