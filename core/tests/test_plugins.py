import json
import sys
from importlib import metadata

import pytest
from click.testing import CliRunner

from distill import plugins
from distill.cli import main
from distill.errors import PluginError

GOOD = """\
from distill import hookimpl

class GoodLoss:
    pass

@hookimpl
def distill_losses():
    return {"GoodLoss": GoodLoss}
"""
BROKEN = {
    "raises_import_error": (
        "raise ImportError('no gpu\\nhere')",
        "ImportError: no gpu here",
    ),
    "has_a_syntax_error": ("def f(:\n", "SyntaxError: invalid syntax (has_a_syntax_error.py, line"),
    "exits": ("raise SystemExit(3)", "SystemExit: 3"),
    "fails_in_its_hook": (
        "from distill import hookimpl\n@hookimpl\ndef distill_losses():\n    return 1 / 0\n",
        "ZeroDivisionError: division by zero",
    ),
    "returns_a_list": (
        "from distill import hookimpl\n@hookimpl\ndef distill_losses():\n    return ['KDLoss']\n",
        "distill_losses returned a list; it must return a dict of name -> factory",
    ),
    "returns_nothing": (
        "from distill import hookimpl\n@hookimpl\ndef distill_losses():\n    pass\n",
        "distill_losses returned nothing; it must return a dict of name -> factory",
    ),
    "offers_no_factory": (
        "from distill import hookimpl\n@hookimpl\ndef distill_losses():\n    return {'A': 'b'}\n",
        "distill_losses offers 'A': 'b'; a name must be text and a factory a class or function",
    ),
    "misspells_a_hook": (
        "from distill import hookimpl\n@hookimpl\ndef distill_loses():\n    return {}\n",
        "implements the unknown hook distill_loses; did you mean distill_losses",
    ),
    "takes_an_argument": (
        "from distill import hookimpl\n@hookimpl\ndef distill_losses(config):\n    return {}\n",
        "Argument(s) {'config'} are declared in the hookimpl but can not be found",
    ),
}


@pytest.fixture
def install(tmp_path, monkeypatch, only_core):
    """Put a package with an entry point on the path, beside core's."""
    monkeypatch.syspath_prepend(str(tmp_path))
    found = list(metadata.entry_points(group="distill"))

    def put(module, source, version="1.0", name=None):
        (tmp_path / f"{module}.py").write_text(source)
        distribution = (name or module).replace("_", "-")
        folder = tmp_path / f"{module}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Name: {distribution}\nVersion: {version}\n")
        (folder / "entry_points.txt").write_text(f"[distill]\n{module} = {module}\n")
        (installed,) = metadata.PathDistribution(folder).entry_points
        found.append(installed)
        monkeypatch.delitem(sys.modules, module, raising=False)

    find = metadata.entry_points
    monkeypatch.setattr(
        metadata, "entry_points", lambda **w: found if w == {"group": "distill"} else find(**w)
    )
    return put


def local(folder, source, name="mine.py"):
    file = folder / name
    file.write_text(source)
    return file


def test_an_installed_plugin_brings_its_components_with_distribution_and_version(install):
    install("good_one", GOOD, version="2.1")
    registry = plugins()
    assert registry.find("losses", "GoodLoss").provider == "good-one 2.1"
    record = next(record for record in registry.records if record.name == "good_one")
    assert (record.distribution, record.version, record.error) == ("good-one", "2.1", None)
    assert record.components == {"losses": ["GoodLoss"]}


@pytest.mark.parametrize("module", BROKEN)
def test_a_broken_plugin_is_a_record_with_its_cause_and_stops_nobody_else(install, module):
    source, cause = BROKEN[module]
    install(module, source)
    install("good_one", GOOD)
    registry = plugins()
    errors = {record.name: record.error for record in registry.records}
    assert errors["good_one"] is None
    assert errors["core"] is None
    assert cause in errors[module]
    assert "\n" not in errors[module]
    assert registry.find("losses", "GoodLoss")
    provider = f"plugin {module.replace('_', '-')} 1.0 is broken and might bring it: "
    with pytest.raises(PluginError, match=provider):
        registry.find("losses", "KDLos")


def test_a_missing_module_breaks_its_plugin_only(install, tmp_path):
    install("good_one", GOOD)
    install("gone", "")
    (tmp_path / "gone.py").unlink()
    errors = {record.name: record.error for record in plugins().records}
    assert errors["gone"] == "ModuleNotFoundError: No module named 'gone'"


def test_an_interruption_is_not_swallowed(install):
    install("interrupted", "raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        plugins()


def test_two_plugins_with_one_name_are_refused_to_who_asks(install):
    install("first_one", GOOD)
    install("second_one", GOOD, version="3.0")
    registry = plugins()
    with pytest.raises(PluginError, match=r"offered by first-one 1\.0 and second-one 3\.0"):
        registry.find("losses", "GoodLoss")
    assert registry.find("losses", "MSELoss")


def test_plugins_lists_what_each_brings_and_what_is_broken(install):
    install("good_one", GOOD)
    install("other_one", GOOD)
    install("exits", BROKEN["exits"][0])
    result = CliRunner().invoke(main, ["plugins"])
    assert result.exit_code == 0
    assert "good-one 1.0 (good_one)\n  losses: GoodLoss\n" in result.output
    assert "exits 1.0 (exits) BROKEN\n  SystemExit: 3\n" in result.output
    assert "offered twice: loss GoodLoss, by good-one 1.0 and other-one 1.0" in result.output
    core = next(line for line in result.output.splitlines() if line.startswith("  losses: "))
    assert core.endswith(" more")


def test_plugins_as_json_has_everything(install):
    install("exits", BROKEN["exits"][0])
    result = CliRunner().invoke(main, ["plugins", "--json"])
    records = {record["name"]: record for record in json.loads(result.output)}
    assert records["exits"]["error"] == "SystemExit: 3"
    assert records["core"]["error"] is None
    assert {"CrossEntropyLoss", "MSELoss"} <= set(records["core"]["components"]["losses"])


def test_a_local_file_is_a_plugin(tmp_path, only_core):
    file = local(tmp_path, GOOD)
    registry = plugins([file])
    assert registry.find("losses", "GoodLoss").provider == str(file)
    assert registry.records[-1].components == {"losses": ["GoodLoss"]}


def test_classes_of_a_local_file_can_be_pickled_to_loader_workers(tmp_path, only_core):
    factory = plugins([local(tmp_path, GOOD)]).find("losses", "GoodLoss").factory
    assert getattr(sys.modules[factory.__module__], "GoodLoss") is factory  # noqa: B009


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import os\nraise ValueError('bad')\n", r"ValueError: bad \(line 2\)"),
        ("x = 1\ndef f(:\n", r"SyntaxError: invalid syntax \(mine.py, line 2\)"),
        ("import sys\n\nsys.exit(4)\n", r"SystemExit: 4 \(line 3\)"),
        ("import gone_for_good\n", r"No module named 'gone_for_good' \(line 1\)"),
        ("x = 1\n", "implements no hook; mark functions with @distill.hookimpl"),
        (BROKEN["fails_in_its_hook"][0], r"ZeroDivisionError: division by zero \(line 4\)"),
        (BROKEN["returns_a_list"][0], "distill_losses returned a list; it must return a dict"),
        (BROKEN["returns_nothing"][0], "distill_losses returned nothing; it must return a dict"),
        (BROKEN["misspells_a_hook"][0], "unknown hook distill_loses; did you mean distill_losses"),
    ],
)
def test_a_local_file_that_is_broken_is_an_error_with_file_and_line(
    tmp_path, only_core, source, said
):
    file = local(tmp_path, source)
    with pytest.raises(PluginError, match=rf"^-p {file}: .*{said}"):
        plugins([file])
    result = CliRunner().invoke(main, ["plugins", "-p", str(file)])
    assert result.exit_code == 3
    assert result.stderr.startswith(f"error: -p {file}: ")


def test_a_local_file_must_be_there_and_be_python(tmp_path, only_core):
    with pytest.raises(PluginError, match="there is no such file"):
        plugins([tmp_path / "gone.py"])
    with pytest.raises(PluginError, match=r"is not a Python file \(\*\.py\)"):
        plugins([local(tmp_path, GOOD, "mine.txt")])


def test_a_local_file_that_failed_leaves_no_half_module(tmp_path, only_core):
    with pytest.raises(PluginError):
        plugins([local(tmp_path, "raise ValueError", "half.py")])
    assert not [name for name in sys.modules if name.endswith("half")]


def test_plugins_is_a_function_of_the_package_however_it_is_imported():
    import distill
    import distill.plugins

    assert callable(distill.plugins)
