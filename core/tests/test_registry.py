import pytest

from distill import registry as registry_module
from distill.errors import PluginError
from distill.registry import Entry, PluginRecord, Registry, known_components


class Loss:
    def __init__(self, scale: float = 1.0):
        self.scale = scale


def test_a_component_is_created_by_name_with_its_parameters():
    registry = Registry([Entry("losses", "Loss", Loss, "mine 1.0")])
    assert registry.create("losses", "Loss", scale=2.0).scale == 2.0
    assert registry.find("losses", "Loss").provider == "mine 1.0"
    assert registry.names("losses") == ["Loss"]
    assert registry.names("models") == []


def test_core_and_a_local_file_are_in_one_registry(registry, toys):
    assert {"CrossEntropyLoss", "MSELoss", "Distance"} <= set(registry.names("losses"))
    assert registry.find("losses", "Distance").provider == str(toys)
    assert registry.find("losses", "MSELoss").provider.startswith("distill-core ")


def test_an_unknown_name_is_answered_with_the_nearest():
    registry = Registry([Entry("losses", "KLLoss", Loss, "a"), Entry("losses", "Other", Loss, "a")])
    with pytest.raises(PluginError, match=r"^there is no loss 'KLoss'; did you mean KLLoss\?$"):
        registry.find("losses", "KLoss")
    with pytest.raises(PluginError, match=r"there is no loss 'klloss'; did you mean KLLoss\?"):
        registry.find("losses", "klloss")


OWN_FILE = "if a file of yours offers it, give that with -p"


@pytest.mark.parametrize("name", ["MyLoss", "LogitMSELoss", "MyKDLoss"])
def test_what_no_typo_makes_of_a_known_name_may_be_in_a_file_that_was_not_given(name):
    registry = Registry([Entry("losses", name, Loss, "a") for name in ("KDLoss", "MSELoss")])
    with pytest.raises(PluginError) as caught:
        registry.find("losses", name)
    assert str(caught.value).startswith(f"there is no loss '{name}'; ")
    assert str(caught.value).endswith(f"; {OWN_FILE}")


@pytest.mark.parametrize("name", ["KDLos", "KDLosss", "KDLoos", "kdloss", "kdlos", "DKLoss", "DKL"])
def test_what_a_typo_makes_of_a_known_name_is_in_no_other_file(name):
    registry = Registry([Entry("losses", known, Loss, "a") for known in ("KDLoss", "KLD")])
    with pytest.raises(PluginError, match=r"; did you mean \w+( or \w+)?\?$"):
        registry.find("losses", name)


def test_who_has_given_a_file_or_can_find_a_name_elsewhere_is_not_told_to_give_a_file():
    mine = PluginRecord("my.py", "my.py", "")
    broken = PluginRecord("far", "distill-far", "1.0", error="ImportError: no gpu")
    other_kind = [Entry("models", "Own", Loss, "a")]
    for registry in (Registry([], [mine]), Registry([], [broken]), Registry(other_kind)):
        with pytest.raises(PluginError) as caught:
            registry.find("losses", "Own")
        assert "-p" not in str(caught.value)


def test_a_file_that_a_run_was_made_with_is_named_instead_of_a_name_like_the_unknown():
    registry = Registry([Entry("losses", "KDLoss", Loss, "a")])
    registry.forgotten = ["my.py"]
    said = r"^there is no loss 'MyKDLoss'; the run was made with -p my\.py: give it again$"
    with pytest.raises(PluginError, match=said):
        registry.find("losses", "MyKDLoss")
    with pytest.raises(PluginError, match=r"'KDLos'; did you mean KDLoss\?; the run was made with"):
        registry.find("losses", "KDLos")
    registry.forgotten = ["my.py", "a b.py"]
    with pytest.raises(PluginError, match=r"made with -p my\.py -p 'a b\.py': give them again$"):
        registry.find("losses", "MyKDLoss")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("auxiliary_modules", "there is no loss 'Part'; 'Part' is the name of an auxiliary module"),
        ("models", "there is no loss 'Part'; 'Part' is the name of a model"),
    ],
)
def test_a_name_of_another_kind_is_recognised(kind, said):
    with pytest.raises(PluginError, match=said):
        Registry([Entry(kind, "Part", Loss, "a")]).find("losses", "Part")


def test_a_name_of_a_published_package_is_answered_with_it(monkeypatch):
    monkeypatch.setattr(
        registry_module, "known_components", lambda: {"losses": {"FarLoss": "distill-far"}}
    )
    said = "it comes with the package distill-far: pip install distill-far"
    with pytest.raises(PluginError, match=said):
        Registry([]).find("losses", "FarLoss")
    installed = Registry([], [PluginRecord("far", "distill-far", "1.0")])
    with pytest.raises(PluginError) as caught:
        installed.find("losses", "FarLoss")
    assert "pip install" not in str(caught.value)


def test_a_broken_plugin_is_named_to_who_asks_for_what_is_missing():
    broken = PluginRecord("far", "distill-far", "1.0", error="ImportError: no gpu")
    registry = Registry([Entry("losses", "Loss", Loss, "a")], [broken])
    said = "plugin distill-far 1.0 is broken and might bring it: ImportError: no gpu"
    with pytest.raises(PluginError, match=said):
        registry.find("losses", "FarLoss")
    assert registry.find("losses", "Loss").factory is Loss


def test_what_two_plugins_offer_is_refused_only_to_who_asks_for_it():
    entries = [Entry("losses", "Loss", Loss, provider) for provider in ("one 1.0", "two 2.0")]
    registry = Registry([*entries, Entry("losses", "Other", Loss, "one 1.0")])
    said = r"loss 'Loss' is offered by one 1\.0 and two 2\.0; uninstall one of them"
    with pytest.raises(PluginError, match=said):
        registry.create("losses", "Loss")
    assert registry.find("losses", "Other").factory is Loss
    assert [[e.provider for e in twice] for twice in registry.duplicates()] == [
        ["one 1.0", "two 2.0"]
    ]


def test_one_name_may_stand_for_two_kinds():
    registry = Registry([Entry("losses", "Part", Loss, "a"), Entry("models", "Part", int, "b")])
    assert registry.find("models", "Part").factory is int
    assert registry.duplicates() == []


def test_an_unknown_kind_is_answered_with_the_nearest():
    with pytest.raises(PluginError, match=r"there is no kind of component 'loss'.*losses"):
        Registry([]).find("loss", "KDLoss")


def test_known_components_are_kinds_and_names_with_their_package():
    for kind, packages in known_components().items():
        assert kind in registry_module.SINGULAR
        assert all(name and package for name, package in packages.items())
