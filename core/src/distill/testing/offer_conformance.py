"""What every package of losses and auxiliary modules should pass."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import typing
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar
from unittest import SkipTest

from torch import nn

from distill import hookspecs


class OfferConformance:
    """What a package of losses and auxiliary modules should pass; inherit it and name the package.

    Losses have names that end in Loss, and printing a module shows what it was built with, as
    ``distill.parameters.Parametrized`` has it.

    >>> class TestOffer(OfferConformance):
    ...     package = distill_mine
    ...     entry_point = "mine"

    Attributes:
        package: the plugin, a package or a module.
        entry_point: the name under which it is found once it is installed.
        inner: names of its public modules that it does not offer: what others derive from.
        given: for modules that have constructor parameters without a default, values for these.
    """

    package: ClassVar[ModuleType]
    entry_point: ClassVar[str]
    inner: ClassVar[frozenset[str]] = frozenset()
    given: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    def test_every_public_module_of_the_package_is_offered_under_its_name(self) -> None:
        defined = dict(self._defined())
        assert self.inner <= defined.keys(), self.inner - defined.keys()
        outer = {name: kind for name, kind in defined.items() if name not in self.inner}
        assert outer == self._modules()

    def test_losses_are_told_from_auxiliary_modules_by_their_names(self) -> None:
        for name in self._modules():
            assert name.endswith("Loss") == (name in self._offered("losses")), name

    def test_every_constructor_parameter_has_a_default_and_a_type_to_check_against(self) -> None:
        for name, kind in (self._modules() | self._offered("dataset_wrappers")).items():
            hints = typing.get_type_hints(kind.__init__)
            for parameter in _parameters(kind):
                if parameter.name != "dataset":
                    has_default = parameter.default is not parameter.empty
                    is_given = parameter.name in self.given.get(name, {})
                    assert has_default != is_given, (name, parameter.name)
                    assert parameter.name in hints, (name, parameter.name)

    def test_printing_shows_every_constructor_parameter(self) -> None:
        for name, kind in self._modules().items():
            shown = repr(kind(**self.given.get(name, {})))
            for parameter in _parameters(kind):
                assert f"{parameter.name}=" in shown, (name, parameter.name)

    def test_inputs_are_named_one_by_one(self) -> None:
        for name, kind in self._modules().items():
            parameters = inspect.signature(kind.forward).parameters.values()
            kinds = {parameter.kind for parameter in parameters}
            assert kinds == {inspect.Parameter.POSITIONAL_OR_KEYWORD}, name

    def test_setup_takes_what_forward_takes(self) -> None:
        for name, kind in self._modules().items():
            if hasattr(kind, "setup"):
                setup, forward = (
                    [(p.name, p.default) for p in _parameters(method) if p.name != "dataset"]
                    for method in (kind.setup, kind.forward)
                )
                assert setup == forward, name

    def test_the_presets_that_lie_in_the_package_are_offered_and_begin_with_what_they_are(
        self,
    ) -> None:
        presets = self._offered("presets")
        folder = Path(str(self.package.__file__)).with_name("presets")
        assert {file.stem: file for file in folder.glob("*.yaml")} == presets
        for name, file in presets.items():
            assert file.read_text("utf-8").startswith("# "), name

    def test_offers_are_marked_as_hooks(self) -> None:
        prefix = f"{hookspecs.PROJECT}_"
        hooks = [
            hook
            for name, hook in vars(self.package).items()
            if name.startswith(prefix) and inspect.isfunction(hook)
        ]
        assert hooks
        for hook in hooks:
            assert hasattr(hook, f"{prefix}impl"), hook.__name__

    def test_everything_offered_can_be_imported_from_the_package(self) -> None:
        public = getattr(self.package, "__all__", vars(self.package))
        for name in (*public, *self._modules(), *self._offered("dataset_wrappers")):
            assert name in public, name
            assert hasattr(self.package, name), name

    def test_the_entry_point_names_the_package(self) -> None:
        points = entry_points(group=hookspecs.PROJECT)
        found = {point.value for point in points if point.name == self.entry_point}
        if not found:
            raise SkipTest(f"no package with an entry point {self.entry_point} is installed")
        assert found == {self.package.__name__}

    def _offered(self, kind: str) -> dict[str, Any]:
        hook = getattr(self.package, f"{hookspecs.PROJECT}_{kind}", None)
        return dict(hook()) if hook is not None else {}

    def _modules(self) -> dict[str, Any]:
        return self._offered("losses") | self._offered("auxiliary_modules")

    def _defined(self) -> Iterator[tuple[str, Any]]:
        """Yield the public modules that the files of the package define."""
        name = self.package.__name__
        files = pkgutil.iter_modules(getattr(self.package, "__path__", []), f"{name}.")
        for module in (self.package, *(importlib.import_module(file.name) for file in files)):
            for name, kind in vars(module).items():
                own = isinstance(kind, type) and kind.__module__ == module.__name__
                if own and issubclass(kind, nn.Module) and not name.startswith("_"):
                    yield name, kind


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """Return those with a name of their own; torch's modules without a constructor have none."""
    parameters = inspect.signature(function).parameters.values()
    return [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
