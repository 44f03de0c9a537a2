"""What a plugin's offer must pass, by a package that does and by one for each fault."""

import importlib
import sys
from unittest import SkipTest

import pytest

from distill.testing import OfferConformance

SOURCE = """
from distill import hookimpl
from {name}.losses import MineLoss

__all__ = ["MineLoss", "distill_losses"]

@hookimpl
def distill_losses():
    return {{"MineLoss": MineLoss}}
"""
LOSSES = """
from distill.parameters import Parametrized

class MineLoss(Parametrized):
    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = factor

    def setup(self, student):
        pass

    def forward(self, student):
        return self.factor * student.mean()
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Return a function that writes the package, changed, and gives its conformance suite."""
    monkeypatch.syspath_prepend(tmp_path)
    names = []

    def written(place, old, new):
        name = f"offering_{tmp_path.name}"
        names.append(name)
        sources = {"__init__": SOURCE.format(name=name), "losses": LOSSES}
        assert old in sources[place]
        sources[place] = sources[place].replace(old, new)
        folder = tmp_path / name
        folder.mkdir()
        for file, text in sources.items():
            folder.joinpath(f"{file}.py").write_text(text)

        class Suite(OfferConformance):
            package = importlib.import_module(name)
            entry_point = name

        return Suite()

    yield written
    for name in names:
        for key in [key for key in sys.modules if key.partition(".")[0] == name]:
            del sys.modules[key]


def failing(suite):
    found = []
    for name in (name for name in dir(suite) if name.startswith("test_")):
        try:
            getattr(suite, name)()
        except SkipTest:
            assert name == "test_the_entry_point_names_the_package"
        except AssertionError:
            found.append(name.removeprefix("test_"))
    return found


def test_a_package_that_offers_what_it_has_passes(write):
    assert failing(write("losses", "", "")) == []


def test_a_plugin_of_one_module_passes(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    hook = SOURCE[SOURCE.index("@hookimpl") :].replace("{{", "{").replace("}}", "}")
    source = f"from distill import hookimpl\n{LOSSES}\n{hook}"
    tmp_path.joinpath("offering_alone.py").write_text(source)

    class Suite(OfferConformance):
        package = importlib.import_module("offering_alone")
        entry_point = "alone"

    del sys.modules["offering_alone"]
    assert failing(Suite()) == []


@pytest.mark.parametrize(
    ("place", "old", "new", "fault"),
    [
        (
            "losses",
            "class MineLoss",
            "class OtherLoss(Parametrized):\n    pass\n\nclass MineLoss",
            "every_public_module_of_the_package_is_offered_under_its_name",
        ),
        (
            "losses",
            "factor: float = 1.0",
            "factor=1.0",
            "every_constructor_parameter_has_a_default_and_a_type_to_check_against",
        ),
        (
            "losses",
            "from distill.parameters import Parametrized",
            "from torch.nn import Module as Parametrized",
            "printing_shows_every_constructor_parameter",
        ),
        (
            "losses",
            "forward(self, student)",
            "forward(self, *student)",
            "inputs_are_named_one_by_one",
        ),
        (
            "losses",
            "setup(self, student)",
            "setup(self, features)",
            "setup_takes_what_forward_takes",
        ),
        ("__init__", "@hookimpl\n", "", "offers_are_marked_as_hooks"),
        (
            "__init__",
            '__all__ = ["MineLoss", ',
            "__all__ = [",
            "everything_offered_can_be_imported_from_the_package",
        ),
    ],
)
def test_a_fault_of_an_offer_is_found(write, place, old, new, fault):
    assert fault in failing(write(place, old, new))


def test_a_preset_that_is_not_offered_is_found(write, tmp_path):
    suite = write("losses", "", "")
    presets = tmp_path / suite.package.__name__ / "presets"
    presets.mkdir()
    presets.joinpath("mine.yaml").write_text("# What it is.\n")
    assert failing(suite) == [
        "the_presets_that_lie_in_the_package_are_offered_and_begin_with_what_they_are"
    ]
