import json
import subprocess
import sys
import zipfile

import pytest
from click.testing import CliRunner

from distill import plugins
from distill.cli import main
from distill.errors import PluginError

pytestmark = pytest.mark.usefixtures("only_core")

PLUGIN = """\
from pathlib import Path
from distill import hookimpl

@hookimpl
def distill_presets():
    return OFFER
"""
FILES = {
    "cats-kd": "# A cat teaches a kitten.\n# More of it.\nname: cats-kd\nnote: äöü\n",
    "dogs-kd": "#   A dog teaches a puppy.\nname: dogs-kd\n",
    "bare": "name: bare\n",
}


def offering(folder, offer, name="mine.py"):
    file = folder / name
    file.write_text(PLUGIN.replace("OFFER", offer))
    return file


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A local plugin that offers ``FILES`` and one that is gone; we stand in an empty folder."""
    (tmp_path / "shipped").mkdir()
    for name, text in FILES.items():
        (tmp_path / "shipped" / f"{name}.yaml").write_text(text, "utf-8")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    names = [*FILES, "gone"]
    return offering(
        tmp_path, f"{{n: Path(__file__).with_name('shipped') / f'{{n}}.yaml' for n in {names}}}"
    )


@pytest.fixture
def distill(mine):
    def invoke(command, *arguments):
        return CliRunner().invoke(main, [command, "-p", str(mine), *map(str, arguments)])

    return invoke


def test_ls_shows_name_first_comment_and_package_sorted(distill, mine):
    result = distill("ls")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["bare", "cats-kd", "dogs-kd", "gone"]
    assert lines[0].split() == ["bare", str(mine)]
    assert "  A cat teaches a kitten.  " in lines[1]
    assert "  A dog teaches a puppy.  " in lines[2]
    assert f"preset 'gone' of {mine} cannot be read: " in lines[3]
    assert all(line.endswith(str(mine)) for line in lines)
    assert len({line.rindex(str(mine)) for line in lines}) == 1


@pytest.mark.parametrize(
    ("text", "found"),
    [("cat", ["cats-kd"]), ("PUPPY", ["dogs-kd"]), ("s-kd", ["cats-kd", "dogs-kd"])],
)
def test_ls_finds_a_text_in_name_and_description(distill, text, found):
    lines = distill("ls", text).stdout.splitlines()
    assert [line.split()[0] for line in lines] == found


def test_ls_finds_a_package(distill):
    assert len(distill("ls", "MINE.py").stdout.splitlines()) == 4


def test_ls_says_that_nothing_fits(distill):
    result = distill("ls", "birds")
    assert (result.exit_code, result.stdout) == (2, "")
    said = "error: no preset has 'birds' in its name, description or package\n"
    assert result.stderr == said


def test_ls_without_presets_says_where_to_get_some():
    result = CliRunner().invoke(main, ["ls"])
    assert result.exit_code == 0
    assert "no installed plugin brings presets" in result.stdout


def test_cat_prints_a_preset_as_it_is(distill):
    result = distill("cat", "cats-kd")
    assert (result.exit_code, result.stdout) == (0, FILES["cats-kd"])


@pytest.mark.parametrize("command", ["cat", "cp"])
def test_an_unknown_name_is_answered_with_the_nearest(distill, tmp_path, command):
    result = distill(command, "cat-kd")
    assert (result.exit_code, result.stdout) == (3, "")
    assert result.stderr == "error: there is no preset 'cat-kd'; did you mean cats-kd?\n"
    assert list((tmp_path / "here").iterdir()) == []


def test_a_preset_whose_file_is_gone_is_an_error_of_its_package(distill, mine):
    result = distill("cat", "gone")
    assert result.exit_code == 3
    assert result.stderr.startswith(f"error: preset 'gone' of {mine} cannot be read: ")


@pytest.mark.parametrize(
    ("target", "written"),
    [([], "cats-kd.yaml"), (["own.yaml"], "own.yaml"), (["folder"], "folder/cats-kd.yaml")],
)
def test_cp_writes_to_here_to_a_file_or_into_a_folder(distill, tmp_path, target, written):
    (tmp_path / "here" / "folder").mkdir()
    result = distill("cp", "cats-kd", *target)
    assert (result.exit_code, result.stdout) == (0, f"wrote {written}\n")
    assert (tmp_path / "here" / written).read_text("utf-8") == FILES["cats-kd"]


@pytest.mark.parametrize("target", [[], ["cats-kd.yaml"], ["."]])
def test_cp_overwrites_only_by_force(distill, tmp_path, target):
    file = tmp_path / "here" / "cats-kd.yaml"
    file.write_text("my work")
    result = distill("cp", "cats-kd", *target)
    assert result.exit_code == 6
    assert result.stderr == "error: cats-kd.yaml exists; --force overwrites it\n"
    assert file.read_text() == "my work"
    assert distill("cp", "cats-kd", *target, "--force").exit_code == 0
    assert file.read_text("utf-8") == FILES["cats-kd"]


def test_cp_to_where_nothing_can_be_written_says_so(distill):
    result = distill("cp", "cats-kd", "gone/own.yaml")
    assert result.exit_code == 6
    assert result.stderr == "error: gone/own.yaml cannot be written: No such file or directory\n"


def test_one_name_from_two_plugins_is_listed_twice_and_refused(distill, mine, tmp_path):
    second = offering(tmp_path, "{'bare': Path(__file__).with_name('other.yaml')}", "second.py")
    (tmp_path / "other.yaml").write_text("# Another one.\n")
    listed = distill("ls", "-p", second).stdout.splitlines()
    assert sum(line.startswith("bare ") for line in listed) == 2
    result = distill("cat", "-p", second, "bare")
    assert result.exit_code == 3
    assert f"preset 'bare' is offered by {mine} and {second}" in result.stderr
    assert "offered twice: preset bare, by " in distill("plugins", "-p", second).stdout


def test_plugins_lists_presets_as_what_a_plugin_brings(distill):
    assert "  presets: bare, cats-kd, dogs-kd, gone\n" in distill("plugins").stdout
    (*_, record) = json.loads(distill("plugins", "--json").stdout)
    assert record["components"] == {"presets": [*FILES, "gone"]}


@pytest.mark.parametrize(
    ("offer", "said"),
    [
        ("{'a': 'a.yaml'}", "offers 'a': 'a.yaml'; a name must be text and a file a path"),
        ("{'a': lambda: 'name: a'}", "a name must be text and a file a path"),
        ("{1: Path(__file__)}", "a name must be text and a file a path"),
        ("['a.yaml']", "returned a list; it must return a dict of name -> file"),
    ],
)
def test_what_is_no_path_is_refused(tmp_path, offer, said):
    with pytest.raises(PluginError, match=said):
        plugins([offering(tmp_path, offer)])


def test_a_path_is_no_factory(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(PLUGIN.replace("presets", "losses").replace("OFFER", "{'a': Path(__file__)}"))
    with pytest.raises(PluginError, match="a name must be text and a factory a class or function"):
        plugins([file])


def test_a_file_inside_an_archive_is_a_preset_too(tmp_path):
    with zipfile.ZipFile(tmp_path / "pack.zip", "w") as archive:
        archive.writestr("zipped-preset.yaml", FILES["cats-kd"])
    offer = "{'cats': __import__('zipfile').Path(ARCHIVE, 'zipped-preset.yaml')}"
    file = offering(tmp_path, offer.replace("ARCHIVE", repr(str(tmp_path / "pack.zip"))))
    result = CliRunner().invoke(main, ["cat", "-p", str(file), "cats"])
    assert (result.exit_code, result.stdout) == (0, FILES["cats-kd"])


@pytest.mark.parametrize("command", ["ls", "cat", "cp"])
def test_help_says_what_comes_next_and_imports_no_torch(command):
    code = (
        f"from distill.cli import main\ntry: main([{command!r}, '--help'])\n"
        "except SystemExit: pass\nimport sys; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *said, imported = done.stdout.splitlines()
    assert imported == "False"
    assert "preset" in " ".join(said)
