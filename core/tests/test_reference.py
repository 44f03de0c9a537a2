import pytest

from distill.reference import Reference, parse


@pytest.mark.parametrize(
    ("text", "owner", "path", "of_input"),
    [
        ("student", "student", "", False),
        ("student:input", "student", "", True),
        ("student.layer2", "student", "layer2", False),
        ("teacher.layer2.0.conv1:input", "teacher", "layer2.0.conv1", True),
        ("big_one-2.head", "big_one-2", "head", False),
        ("inputs", "inputs", "", False),
        ("inputs.image", "inputs", "image", False),
        ("targets", "targets", "", False),
        ("index", "index", "", False),
        ("extras.views", "extras", "views", False),
        ("pair.plus", "pair", "plus", False),
    ],
)
def test_a_reference_is_owner_path_and_input(text, owner, path, of_input):
    assert parse(text) == Reference(text, owner, path, of_input)
    assert str(parse(text)) == text


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
        ("student:input.layer2", "is no value name"),
        ("student\n", "is no value name"),
        ("targets:input", "targets has no input"),
        ("extras.views:input", "extras has no input"),
        ("targets.first", "targets has no parts"),
        ("index.0", "index has no parts"),
        ("extras", "'extras' needs a key, e.g. extras.views"),
    ],
)
def test_what_follows_no_grammar_is_refused(text, said):
    with pytest.raises(ValueError, match=said):
        parse(text)
