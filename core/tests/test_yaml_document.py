import copy
import itertools
import json
import math
import os
import random
import re

import pytest

from distill.config.yaml_document import Document, override, parse, path_text, read
from distill.errors import ConfigError, Location, as_yaml

EXPERIMENT = """\
name: cifar10-fitnet
seed: 7
common: &common {type: SGD, params: {lr: 0.05, momentum: 0.9}}
datasets:
  train:
    type: ImageFolder
    params: {root: !join [data, /, train]}
    transforms: [{type: RandomHorizontalFlip}, {type: ToTensor, params: {scale: null}}]
stages:
  - name: hint
    epochs: 5
    optimizer: *common
    criterion:
      "hint": {type: MSELoss, inputs: {input: regressor, target: 'teacher.layer2'}}
  - name: kd            # a comment
    epochs: 15
    optimizer:
      <<: *common
      type: Adam
    note: |
      two
      lines
"""


def only_fault(action, *arguments):
    """The one fault of a ConfigError that ``action`` must raise."""
    with pytest.raises(ConfigError) as caught:
        action(*arguments)
    assert len(caught.value.faults) == 1, str(caught.value)
    return caught.value.faults[0]


def faults_of(text):
    with pytest.raises(ConfigError) as caught:
        parse(text, "f.yaml")
    return [str(fault) for fault in caught.value.faults]


def paths_of(value, path=()):
    yield path
    if isinstance(value, dict | list):
        for key, child in value.items() if isinstance(value, dict) else enumerate(value):
            yield from paths_of(child, (*path, key))


def parsed_or_refused(action, *arguments):
    """What ``action`` returns, or None after a ConfigError; any other error is let through."""
    try:
        document = action(*arguments)
    except ConfigError as error:
        if not str(error):
            raise AssertionError("an error without a message") from error
        return None
    assert set(document.locations) == set(paths_of(document.data))
    json.dumps(document.data).encode()
    return document


# scalars


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[(t, True) for t in ("true", "True", "TRUE")],
        *[(t, False) for t in ("false", "False", "FALSE")],
        *[(t, None) for t in ("null", "Null", "NULL", "~", "")],
        *[(t, t) for t in ("no", "yes", "on", "off", "No", "y", "nULL")],
        *[("0", 0), ("-17", -17), ("+3", 3), ("010", 10), ("0x1F", 31), ("0o17", 15)],
        *[
            ("9" * 100, int("9" * 100)),
            ("1e-3", 1e-3),
            ("1.", 1.0),
            (".5", 0.5),
            ("-1.5E+2", -150.0),
        ],
        *[(".inf", math.inf), ("-.INF", -math.inf), ("+.Inf", math.inf)],
        *[
            (t, t)
            for t in ("1_000", "0b11", "1:30", "190:20:30", "2020-01-01", "1e", "=", "<<", ".")
        ],
        *[("'1'", "1"), ('"true"', "true"), ("'~'", "~"), ("''", "")],
        *[("!!str 12", "12"), ("!!float 3", 3.0), ("!!int '5'", 5)],
        *[("!join [run_, 1, /, 'a b']", "run_1/a b"), ("!join []", "")],
    ],
)
def test_scalar_follows_the_core_schema(text, value):
    result = parse(f"a: {text}").data["a"]
    assert result == value
    assert type(result) is type(value)


def test_nan_is_a_number():
    assert math.isnan(parse("a: .nan").data["a"])


def test_block_text_is_text():
    assert parse("a: |\n  1\n").data == {"a": "1\n"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("9" * 101, "more than 100 digits"),
        ("9" * 5000, "more than 100 digits"),
        ("0x" + "f" * 101, "more than 100 digits"),
        ("1e400", "too large"),
        ("!!int x", "does not fit the tag !!int"),
        ('"\\0"', "character"),
        ('"\\ud800"', "character"),
    ],
)
def test_scalar_that_no_program_can_use_is_a_fault_in_its_place(text, message):
    fault = only_fault(parse, f"x: 1\na: {text}", "f.yaml")
    assert message in fault.message
    assert (fault.path, fault.location) == ("a", Location("f.yaml", 2, 4))


# tags


@pytest.mark.parametrize(
    "value",
    [
        "!!python/object/apply:os.system [touch /tmp/pwned]",
        "!!python/name:os.system",
        "!<tag:yaml.org,2002:python/name:os.system>",
        "!import_call {key: 1}",
        "!!binary aGk=",
        "!!set {a}",
        "!!timestamp 2020-01-01",
        "! 12",
        "!joined [a]",
        "!!map [a]",
    ],
)
def test_a_tag_that_is_not_known_is_a_fault_in_its_place(value):
    fault = only_fault(parse, f"x: 1\na:\n  b: {value}", "f.yaml")
    assert "files are data and no tag builds objects" in fault.message
    assert (fault.path, fault.location) == ("a.b", Location("f.yaml", 3, 6))


def test_a_tag_renamed_by_a_directive_is_still_refused():
    text = "%TAG !e! tag:yaml.org,2002:python/\n---\na: !e!name:os.system x"
    assert "!!python/name:os.system" in only_fault(parse, text).message


@pytest.mark.parametrize("value", ["!join {a: 1}", "!join a", "!join [[a]]"])
def test_join_takes_single_values_only(value):
    assert "!join takes a list" in only_fault(parse, f"a: {value}").message


def test_a_tag_inside_a_join_is_refused():
    assert "!join takes a list" in " ".join(faults_of("a: !join [!foo b]"))


def test_join_takes_aliases_and_can_be_one():
    text = "root: &root data\na: &a !join [*root, /train]\nb: !join [*a, /x]"
    assert parse(text).data == {"root": "data", "a": "data/train", "b": "data/train/x"}


# positions


def test_every_value_and_nothing_else_has_a_location():
    document = parse(EXPERIMENT, "f.yaml")
    assert set(document.locations) == set(paths_of(document.data))


def test_an_entry_is_located_at_its_key_and_an_item_at_itself():
    document = parse("a:\n  b: 1\n  c: [x, {d: 2}]\n", "f.yaml")
    lines = {path: (at.line, at.column) for path, at in document.locations.items()}
    assert lines == {
        (): (1, 1),
        ("a",): (1, 1),
        ("a", "b"): (2, 3),
        ("a", "c"): (3, 3),
        ("a", "c", 0): (3, 7),
        ("a", "c", 1): (3, 10),
        ("a", "c", 1, "d"): (3, 11),
    }
    assert {at.file for at in document.locations.values()} == {"f.yaml"}


def test_an_alias_is_located_at_its_use_and_its_inside_at_the_anchor():
    document = parse("a: &a {x: 1}\nb: *a\nc:\n- *a\n", "f.yaml")
    assert document.locations["b",] == Location("f.yaml", 2, 1)
    assert document.locations["c", 0] == Location("f.yaml", 4, 3)
    assert document.locations["b", "x"] == Location("f.yaml", 1, 8)
    assert document.locations["c", 0, "x"] == Location("f.yaml", 1, 8)


def test_a_merged_entry_is_located_where_it_was_written():
    document = parse("a: &a {x: 1, y: 2}\nb:\n  <<: *a\n  y: 3\n", "f.yaml")
    assert document.locations["b", "x"] == Location("f.yaml", 1, 8)
    assert document.locations["b", "y"] == Location("f.yaml", 4, 3)


def test_locate_goes_to_the_nearest_place_around_what_is_missing():
    document = parse("a:\n  b: [1]\n", "f.yaml")
    assert document.locate(("a", "b", 0)) == Location("f.yaml", 2, 7)
    assert document.locate(("a", "b", 7, "x")) == Location("f.yaml", 2, 3)
    assert document.locate(("z",)) == Location("f.yaml", 1, 1)
    assert Document("f.yaml", {}, {}).locate(("z",)) == Location("f.yaml")


def test_windows_line_ends_and_a_byte_order_mark_do_not_move_positions():
    document = parse("\ufeffa: 1\r\nb:\r\n  c: 2\r\n", "f.yaml")
    assert document.data == {"a": 1, "b": {"c": 2}}
    assert document.locations["b", "c"] == Location("f.yaml", 3, 3)


# anchors, aliases, merge keys


def test_uses_of_an_alias_share_nothing():
    data = parse("a: &a {x: [1]}\nb: *a\nc: [*a, *a]\nd: {<<: *a}").data
    assert data["b"] == data["c"][0] == data["d"] == {"x": [1]}
    lists = [data["a"]["x"], data["b"]["x"], data["d"]["x"], *[c["x"] for c in data["c"]]]
    assert len({id(x) for x in lists}) == 5


def test_explicit_keys_win_over_merged_ones_wherever_the_merge_stands():
    data = parse("a: &a {x: 1, y: 1}\nb: {<<: *a, y: 2}\nc: {y: 2, <<: *a}").data
    assert data["b"] == data["c"] == {"x": 1, "y": 2}


def test_the_first_of_several_merged_mappings_wins():
    data = parse("a: &a {x: 1}\nb: &b {<<: *a, x: 2, y: 2}\nc: {<<: [*a, *b], z: 3}").data
    assert data["c"] == {"x": 1, "y": 2, "z": 3}


def test_a_quoted_merge_key_is_an_ordinary_key():
    assert parse("a: {'<<': 1}").data == {"a": {"<<": 1}}


@pytest.mark.parametrize("value", ["1", "[1]", "[{x: 1}, null]", "!foo [{x: 1}]"])
def test_only_mappings_can_be_merged(value):
    assert "<< takes" in only_fault(parse, f"<<: {value}").message


@pytest.mark.parametrize("text", ["a: &a [1, *a]", "a: &a {b: {c: *a}}", "&a {b: 1, <<: *a}"])
def test_a_cycle_is_a_fault(text):
    assert "cycle" in only_fault(parse, text).message


def test_an_unknown_alias_is_a_fault_with_near_names():
    fault = only_fault(parse, "a: &base 1\nb: *bsae", "f.yaml")
    assert str(fault).startswith("f.yaml:2:4: ")
    assert "did you mean base" in fault.message


def test_an_anchor_given_twice_is_a_fault():
    assert "&x is already in use" in only_fault(parse, "a: &x 1\nb: &x 2").message


# keys and the whole file


def test_all_duplicate_keys_are_told_at_once_with_both_lines():
    text = "a: 1\nl:\n- name: kd\n  x: 1\n  x: 2\nm: {<<: {}, <<: {}}\na: 3\n"
    assert faults_of(text) == [
        "f.yaml:5:3: l.kd.x: the key 'x' is given twice, in lines 4 and 5",
        "f.yaml:6:13: m.<<: the key '<<' is given twice, in lines 6 and 6",
        "f.yaml:7:1: a: the key 'a' is given twice, in lines 1 and 7",
    ]


def test_a_duplicate_inside_an_anchor_is_told_once():
    assert len(faults_of("a: &a {x: 1, x: 2}\nb: *a\nc: {<<: *a}")) == 1


@pytest.mark.parametrize("key", ["1", "1.5", "true", "null", "~", "? [a]\n", "? {a: 1}\n"])
def test_keys_must_be_text(key):
    fault = only_fault(parse, f"a: 1\n{key}: x", "f.yaml")
    assert "keys are text" in fault.message
    assert fault.location.line == 2


def test_keys_that_yaml_1_1_took_for_booleans_are_text():
    assert parse("on: 1\nno: 2\n'1': 3").data == {"on": 1, "no": 2, "1": 3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("# nothing\n", "empty"),
        ("---\n", "empty"),
        ("- 1\n", "mapping"),
        ("lr:0.1", "mapping"),
        ("a: 1\n---\nb: 2\n", "f.yaml:2:1: a second document"),
    ],
)
def test_a_file_is_one_mapping(text, message):
    assert message in str(only_fault(parse, text, "f.yaml"))


# limits


def nested(depth):
    """A mapping whose innermost value is ``depth`` steps below the top."""
    return "a: " + "[" * (depth - 1) + "1" + "]" * (depth - 1)


def test_nesting_up_to_the_limit_is_read_and_beyond_is_a_fault():
    assert max(map(len, parse(nested(50)).locations)) == 50
    assert "50 levels" in only_fault(parse, nested(51)).message


@pytest.mark.parametrize("opening", ["[", "{a: ", "- ", "? ", "[\n"])
def test_brackets_without_end_are_a_fault_and_no_recursion_error(opening):
    assert "50 levels" in only_fault(parse, "a:\n  " + opening * 20_000).message


def test_depth_gained_through_aliases_counts():
    lines = ["a0: &a0 [1]", *(f"a{i}: &a{i} [*a{i - 1}]" for i in range(1, 80))]
    assert "50 levels" in only_fault(parse, "\n".join(lines)).message


def test_depth_behind_an_alias_is_that_of_its_deepest_part():
    deep = "[" * 30 + "]" * 30
    text = f"a: &a [{deep}, 1]\nb: {'[' * 30} *a {']' * 30}"
    assert "50 levels" in only_fault(parse, text).message


def test_an_alias_bomb_is_a_fault():
    lines = ["a0: &a0 x"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 40)]
    assert "100000 values" in only_fault(parse, "\n".join(lines)).message


def test_a_merge_bomb_is_a_fault():
    keys = ", ".join(f"k{i}: 1" for i in range(1000))
    uses = "\n".join(["- {<<: *a}"] * 1000)
    assert "100000 values" in only_fault(parse, f"a: &a {{{keys}}}\nb:\n{uses}").message


def test_a_bomb_of_joined_texts_is_a_fault():
    text = f"s: &s {'x' * 100_000}\n" + "\n".join(f"j{i}: !join [*s, *s]" for i in range(1000))
    assert "!join" in only_fault(parse, text).message


def test_each_item_and_entry_is_one_value(monkeypatch):
    monkeypatch.setattr("distill.config.yaml_nodes.MAX_VALUES", 5)
    assert parse("a: &a {b: 1, c: 2}\nd: 3")
    assert "5 values" in only_fault(parse, "a: &a {b: 1, c: 2}\nd: 3\ne: 4").message
    assert "5 values" in only_fault(parse, "a: &a {b: 1, c: 2}\nd: *a").message


def test_a_file_over_a_mebibyte_is_a_fault(tmp_path):
    file = tmp_path / "big.yaml"
    file.write_text("a: 1\n#" + "é" * (1 << 19))
    assert "larger" in only_fault(read, file).message
    assert "larger" in only_fault(parse, file.read_text()).message


# syntax


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a:\n\tb: 1\n", "2:1: a tab cannot stand here"),
        ("a: 1\n\tb: 2\n", "2:1: a tab cannot stand here"),
        ("a: [1, 2\nb: 3\n", "2:2: ',' or ']' is missing; the bracket opened in line 1"),
        ("a: {x: 1\n", "2:1: ',' or '}' is missing; the bracket opened in line 1"),
        ("a: 1\nb: 'x\nc: 1\n", "2:4: the quote that opens here is never closed"),
        ("a: b\x07\n", r"1:5: the character U\+0007"),
        ("a:\r\n- \ud800", r"2:3: the character U\+D800"),
        ("a: @b\n", "1:4: a text cannot start with '@'; put it in quotes"),
        ("a: b: c\n", "1:5: a ':' cannot stand here"),
        (
            "a b\nc: d\n",
            "2:2: a ':' cannot stand here; check the indentation, whether the line before",
        ),
        ("a: 1\nfoo\nb: 2\n", "2:1: not a 'key: value'"),
        ("a:\n    b: 1\n  c: 2\n", "3:3: does not fit what is above"),
        ('a: "\\d"\n', "1:6: unknown escape"),
        ('a: "\\UFFFFFFFF"\n', "1:7: a number in an escape"),
        ("%YAML 1." + "9" * 5000 + "\n---\na: 1", "1:9: a number in an escape or directive"),
        ("a: &", "1:5: not valid YAML.*end of the file"),
        ("a: *" + "x" * 1000, "1:4: no anchor &x{200,300}\\.\\.\\."),
    ],
)
def test_a_syntax_error_is_one_fault_that_says_where_and_what(text, expected):
    assert re.match(rf"f\.yaml:{expected}", str(only_fault(parse, text, "f.yaml")))


def mutated(text, rng):
    pieces = "[]{}:,-?&*!|>'\"%@`#\t\n \r\\\0é\ud800~<.0eU\u2028\x85"
    snippets = (
        "<<: *common",
        "&common ",
        "*common",
        "!join ",
        "!!int ",
        '"\\U',
        "---\n",
        "9" * 150,
    )
    for _ in range(rng.randint(1, 3)):
        i, j = sorted((rng.randrange(len(text) + 1), rng.randrange(len(text) + 1)))
        new = rng.choice((rng.choice(pieces), rng.choice(snippets), ""))
        kind = rng.randrange(4)
        if kind == 0:
            text = text[:i] + new + text[i + 1 :]
        elif kind == 1:
            text = text[:i] + new + text[i:]
        elif kind == 2:
            text = text[:i] + text[min(j, i + 30) :]
        else:
            text = text[:i] + text[i:j][:60] + text[i:]
    return text


def test_whatever_happens_to_a_file_gives_a_document_or_a_config_error():
    rng = random.Random(0)
    runs = int(os.environ.get("DISTILL_FUZZ", "400"))
    outcomes = [parsed_or_refused(parse, mutated(EXPERIMENT, rng)) for _ in range(runs)]
    assert runs * 0.1 < outcomes.count(None) < runs * 0.9


# files


def test_a_file_is_read_under_the_name_the_user_gave(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kd.yaml").write_text("name: é\n", encoding="utf-8")
    document = read("./kd.yaml")
    assert (document.file, document.data) == ("./kd.yaml", {"name": "é"})
    assert document.locate(("name",)) == Location("./kd.yaml", 1, 1)
    assert read(tmp_path / "kd.yaml").file == str(tmp_path / "kd.yaml")


def test_a_missing_file_is_a_fault_with_similar_names(tmp_path):
    (tmp_path / "cifar-kd.yaml").touch()
    (tmp_path / "cifar-kd.txt").touch()
    fault = only_fault(read, tmp_path / "cifar_kd.yaml")
    assert fault.message == "there is no such file; did you mean cifar-kd.yaml?"
    assert fault.location == Location(str(tmp_path / "cifar_kd.yaml"))


def test_a_missing_folder_is_named(tmp_path):
    assert "folder" in only_fault(read, tmp_path / "no" / "kd.yaml").message


def test_a_folder_is_no_experiment_file(tmp_path):
    assert "is a folder" in only_fault(read, tmp_path).message


def test_a_name_that_no_file_can_have_is_a_fault(tmp_path):
    assert "cannot be read" in only_fault(read, "a\0b.yaml").message
    assert "cannot be read" in only_fault(read, tmp_path / ("x" * 300)).message


def test_a_file_that_is_not_utf8_is_a_fault_in_its_place(tmp_path):
    file = tmp_path / "latin.yaml"
    file.write_bytes(b"a: 1\nb: \xe9t\xe9\n")
    fault = only_fault(read, file)
    assert "UTF-8" in fault.message
    assert fault.location == Location(str(file), 2, 4)


# path text


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ((), ""),
        (("name",), "name"),
        (("stages", 1, "optimizer", "params", "lr"), "stages.kd.optimizer.params.lr"),
        (("datasets", "train", "transforms", 1, "params"), "datasets.train.transforms[1].params"),
        (("stages", 9, "epochs"), "stages[9].epochs"),
        (("nowhere", 0, "x"), "nowhere[0].x"),
    ],
)
def test_path_text_names_items_by_their_name_or_index(path, text):
    assert path_text(path, parse(EXPERIMENT).data) == text


def test_path_text_takes_only_text_for_a_name():
    assert path_text((0, 1, 2), [[{"name": 1}, {"name": ""}]]) == "[0][1][2]"


# override


@pytest.mark.parametrize(
    ("assignment", "path", "value"),
    [
        ("seed=8", ("seed",), 8),
        ("stages.kd.optimizer.params.lr=1e-3", ("stages", 1, "optimizer", "params", "lr"), 1e-3),
        ("stages.0.epochs=0x10", ("stages", 0, "epochs"), 16),
        ("stages[1].epochs=1", ("stages", 1, "epochs"), 1),
        ("stages.hint={name: a, epochs: [1]}", ("stages", 0), {"name": "a", "epochs": [1]}),
        ("datasets.train.transforms=[1,2]", ("datasets", "train", "transforms"), [1, 2]),
        ("stages.kd.optimizer=null", ("stages", 1, "optimizer"), None),
        ("name=", ("name",), None),
        ("name=a=b", ("name",), "a=b"),
        ("name=no", ("name",), "no"),
        ("name=!join [a, 1]", ("name",), "a1"),
        ("stages.kd.grad_clip=2", ("stages", 1, "grad_clip"), 2),
        ("test.metrics.top.k=5", ("test",), {"metrics": {"top": {"k": 5}}}),
    ],
)
def test_override_sets_one_place_and_says_where_it_came_from(assignment, path, value):
    before = parse(EXPERIMENT, "f.yaml")
    after = override(before, [assignment])
    *around, last = path
    expected = copy.deepcopy(before.data)
    target = expected
    for key in around:
        target = target[key]
    target[last] = value
    assert after.data == expected
    assert after.file == "f.yaml"
    assert set(after.locations) == set(paths_of(after.data))
    for place, at in after.locations.items():
        inside = place[: len(path)] == path
        assert at == (Location(f"-s {assignment}") if inside else before.locations[place])


def test_override_leaves_the_document_alone_even_where_it_shares_objects():
    shared = {"lr": 1}
    document = Document("f", {"a": shared, "b": [shared]}, {})
    after = override(document, ["a.lr=2"])
    assert after.data == {"a": {"lr": 2}, "b": [{"lr": 1}]}
    assert document.data == {"a": {"lr": 1}, "b": [{"lr": 1}]}


def test_later_assignments_see_what_earlier_ones_did():
    data = override(parse("a: 1"), ["b=[{name: x}]", "b.x.k=1", "b.x.k=2"]).data
    assert data == {"a": 1, "b": [{"name": "x", "k": 2}]}


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("seed", "'=' is missing"),
        ("=1", "a name is missing"),
        ("stages..epochs=1", "a name is missing"),
        ("stages.kdd.epochs=1", "there is no item 'kdd'; did you mean kd?"),
        ("stages.2.epochs=1", "there is no item '2'; there are 2, from 0"),
        ("stages.2={}", "there is no item '2'; there are 2, from 0"),
        ("stages.²=1", "there is no item '²'"),
        ("stages." + "9" * 5000 + "=1", "there is no item"),
        ("seed.x=1", "seed is '7', which has nothing inside"),
        ("datasets.train.transforms.1.params.scale.x.y=1", "scale is null, which has nothing"),
        ("seed=[1", "',' or ']' is missing"),
        ("seed=!foo 1", "no tag builds objects"),
        ("seed={a: 1, a: 2}", "given twice"),
        ("seed=" + "[" * 20_000, "50 levels"),
        (nested(50).replace("a: ", "a.b.c="), "50 levels"),
        ("a." * 60 + "b=1", "50 levels"),
        ("a." * 60 + "b=", "50 levels"),
    ],
)
def test_an_assignment_that_cannot_be_is_a_fault_named_after_it(assignment, message):
    fault = only_fault(override, parse(EXPERIMENT), [assignment])
    assert message in fault.message
    assert fault.location == Location(f"-s {assignment}")
    assert fault.path == ("" if assignment == "seed" else assignment.split("=")[0])


def test_an_ambiguous_name_asks_for_the_index():
    document = parse("l: [{name: a}, {name: a}]")
    assert "several items" in only_fault(override, document, ["l.a.x=1"]).message
    assert override(document, ["l.1.x=1"]).data["l"][1] == {"name": "a", "x": 1}


def test_all_faulty_assignments_are_told_at_once():
    with pytest.raises(ConfigError) as caught:
        override(parse("a: 1"), ["b", "a.x=1", "c=[", "d=2"])
    assert len(caught.value.faults) == 3


def test_whatever_is_assigned_gives_a_document_or_a_config_error():
    rng = random.Random(1)
    document = parse(EXPERIMENT)
    for keys, value in itertools.product(
        ("stages.kd.optimizer.params", "name", "stages.0", "x.y"), ("{lr: 0.1, b: [1, 2]}", "1e-3")
    ):
        for _ in range(20):
            parsed_or_refused(override, document, [mutated(f"{keys}={value}", rng)])
    assert document == parse(EXPERIMENT)


@pytest.mark.parametrize(
    ("value", "text"),
    [(False, "false"), (None, "null"), (1.5, "1.5"), ("fp32", "fp32"), ("1", '"1"'), ([2], "[2]")],
)
def test_values_are_told_as_a_file_has_them(value, text):
    assert as_yaml(value) == text
