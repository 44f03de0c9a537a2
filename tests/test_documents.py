"""What the documents list is what the code has."""

from __future__ import annotations

import re
from pathlib import Path
from signal import SIGTERM

from distill.cli import EXIT_CODES
from distill.cli_errors import BUG, RESUMABLE
from distill.config import inheritance, resolve, schema
from distill.errors import DistillError
from distill.weight_schedule import WeightSchedule

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "experiment-file.md").read_text("utf-8")


def _section(title: str) -> dict[str, str]:
    """Return key -> default of the first table under a heading."""
    text = PAGE.split(f"# {title}\n", 1)[1].split("\n## ", 1)[0].split("\n### ", 1)[0]
    rows = re.findall(r"^\| (`[^|]+`) \| ([^|]*) \|", text, re.MULTILINE)
    return {
        key.strip("`"): default.strip().strip("`")
        for keys, default in rows
        for key in keys.split(", ")
    }


def _keys(described: dict[str, object]) -> set[str]:
    return set(described["properties"])  # type: ignore[call-overload]


def test_every_key_of_the_experiment_is_documented() -> None:
    assert set(_section("The whole")) == {*_keys(schema.EXPERIMENT), "x-…"}
    assert set(_section("Data sets")) == _keys(schema.DATASET)
    assert set(_section("Models")) == _keys(schema.MODEL)
    assert set(_section("Test")) == _keys(schema.TEST)


def test_every_key_of_a_stage_is_documented() -> None:
    data = {f"data.{key}" for key in _keys(schema.DATA)}
    assert set(_section("Stages")) == (_keys(schema.STAGE) - {"data"}) | data


def test_every_key_of_roles_auxiliary_modules_and_terms_is_documented() -> None:
    assert set(_section("Roles")) == _keys(schema.TEACHER)
    assert set(_section("Auxiliary modules")) == _keys(schema.AUXILIARY)
    assert set(_section("Terms")) == _keys(schema.TERM)


def test_every_key_of_a_schedule_is_documented() -> None:
    weight = _section("Weights that change")
    assert set(weight) == _keys(schema.WEIGHT)
    for key, field in WeightSchedule.__dataclass_fields__.items():
        assert _as_yaml(field.default) == weight[key], key
    assert set(_section("Schedulers")) == _keys(schema.SCHEDULER)


def test_documented_defaults_are_those_in_force() -> None:
    in_force = {
        **inheritance.STAGE_DEFAULTS,
        **{f"data.{key}": value for key, value in inheritance.DATA_DEFAULTS.items()},
    }
    written = _section("Stages")
    for key, value in in_force.items():
        if key != "teachers":
            assert _as_yaml(value) == written[key], key
    whole = _section("The whole")
    for key, value in resolve.EXPERIMENT_DEFAULTS.items():
        assert _as_yaml(value) == whole[key], key
    required = {
        *inheritance.STAGE_REQUIRED,
        *(f"data.{k}" for k in inheritance.DATA_REQUIRED),
        "name",
    }
    assert {key for key, default in written.items() if default == "required"} == required - {"data"}


def test_documented_exit_codes_are_those_of_help_and_of_every_error() -> None:
    table = re.findall(r"^\| (\d+) \|", PAGE.split("exit codes:\n", 1)[1], re.MULTILINE)
    listed = re.findall(r"(\d+) ", EXIT_CODES)
    assert table == listed
    kinds, found = [DistillError], {BUG, RESUMABLE, 128 + SIGTERM, 0}
    while kinds:
        kind = kinds.pop()
        found.add(kind.exit_code)
        kinds += kind.__subclasses__()
    assert sorted(found) == [int(code) for code in listed]


def test_the_architecture_page_names_every_file_of_core() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    files = (ROOT / "core/src/distill").rglob("*.py")
    named = [f.name for f in files if f.parent.name != "builtin" and f.name != "__init__.py"]
    assert [name for name in named if name not in page] == []


def _as_yaml(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_as_yaml(item)}" for key, item in value.items()) + "}"
    return f"[{', '.join(value)}]" if isinstance(value, list) else str(value)
