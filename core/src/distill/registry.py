"""Kind and name -> factory (or file, of a preset), and who provides it."""

from __future__ import annotations

import difflib
import json
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from distill.errors import PluginError, did_you_mean

SINGULAR = {
    "losses": "loss",
    "auxiliary_modules": "auxiliary module",
    "special_modules": "special module",
    "model_redesigners": "model redesigner",
    "datasets": "data set",
    "dataset_wrappers": "data set wrapper",
    "transforms": "transform",
    "batch_transforms": "batch transform",
    "batched_transforms": "batched transform",
    "samplers": "sampler",
    "batch_samplers": "batch sampler",
    "collates": "collate function",
    "models": "model",
    "metrics": "metric",
    "optimizers": "optimizer",
    "schedulers": "scheduler",
    "observers": "observer",
    "packers": "packer",
    "presets": "preset",
}
"""Every kind of thing on offer, and what one of it is called in messages."""

PRESETS = "presets"
"""The one kind whose offers are files."""

OWN_FILE = "if a file of yours offers it, give that with -p"


@dataclass(frozen=True)
class Entry:
    """A component on offer: its factory, or the file where it is a preset."""

    kind: str
    name: str
    factory: Any
    provider: str


@dataclass(frozen=True)
class PluginRecord:
    """A plugin that was found, working or not.

    Attributes:
        name: its entry-point name, or the path of a local file.
        distribution: the package it comes from.
        version: of that package.
        components: kind -> names on offer.
        error: why it cannot be used; ``None`` if it can.
    """

    name: str
    distribution: str
    version: str
    components: Mapping[str, Sequence[str]] = field(default_factory=dict)
    error: str | None = None

    @property
    def provider(self) -> str:
        return f"{self.distribution} {self.version}".strip()

    @property
    def is_file(self) -> bool:
        """Whether it is a local file, which has no package of another name and no version."""
        return self.name == self.distribution and not self.version


class Registry:
    """What all plugins offer. A duplicate or broken offer stops only who asks for it.

    Attributes:
        records: the plugins.
        forgotten: files that a run was made with, and that are not among them.
    """

    def __init__(self, entries: Iterable[Entry], records: Sequence[PluginRecord] = ()):
        self.records = tuple(records)
        self.forgotten: Sequence[str] = ()
        self._entries: dict[str, dict[str, list[Entry]]] = {kind: {} for kind in SINGULAR}
        for entry in entries:
            self._entries[entry.kind].setdefault(entry.name, []).append(entry)

    def names(self, kind: str) -> list[str]:
        """Return the names on offer of one kind, sorted."""
        return sorted(self._of(kind))

    def entries(self, kind: str) -> list[Entry]:
        """Return everything on offer of one kind by name, also what stands under one name twice."""
        offers = self._of(kind)
        return [entry for name in sorted(offers) for entry in offers[name]]

    def duplicates(self) -> list[list[Entry]]:
        """Return the offers that stand under one name and kind twice."""
        return [e for kind in self._entries.values() for e in kind.values() if len(e) > 1]

    def find(self, kind: str, name: str) -> Entry:
        """Return the one offer of ``name``.

        Raises:
            PluginError: if nobody offers it, or two do; the message names the nearest names, the
                package that would bring it, broken plugins that might, or how a file is given.
        """
        offers = self._of(kind).get(name, [])
        if not offers:
            raise PluginError(self._unknown(kind, name))
        if len(offers) > 1:
            providers = " and ".join(entry.provider for entry in offers)
            raise PluginError(
                f"{SINGULAR[kind]} '{name}' is offered by {providers}; uninstall one of them"
            )
        return offers[0]

    def create(self, kind: str, name: str, /, *args: Any, **params: Any) -> Any:
        """Build the component ``name``, e.g. ``create("losses", "KDLoss", temperature=4.0)``."""
        return self.find(kind, name).factory(*args, **params)

    def _of(self, kind: str) -> dict[str, list[Entry]]:
        if kind not in self._entries:
            raise PluginError(
                f"there is no kind of component '{kind}'{did_you_mean(kind, SINGULAR)}"
                f" (kinds: {', '.join(SINGULAR)})"
            )
        return self._entries[kind]

    def _unknown(self, kind: str, name: str) -> str:
        message, near = f"there is no {SINGULAR[kind]} '{name}'", did_you_mean(name, self._of(kind))
        elsewhere = "".join(f"; {hint}" for hint in self._elsewhere(kind, name))
        if elsewhere:
            return message + near + elsewhere
        is_typo = bool(near) and _is_typo(name, self._of(kind))
        if self.forgotten:
            files = shlex.join(word for file in self.forgotten for word in ("-p", file))
            them = "them" if self.forgotten[1:] else "it"
            message += near if is_typo else ""
            return f"{message}; the run was made with {files}: give {them} again"
        if is_typo or any(record.is_file for record in self.records):
            return message + near
        return f"{message}{near}; {OWN_FILE}"

    def _elsewhere(self, kind: str, name: str) -> Iterator[str]:
        """Tell where a name is that no plugin offers as this kind."""
        others = [
            SINGULAR[k] for k, offers in self._entries.items() if k != kind and name in offers
        ]
        if others:
            yield f"'{name}' is the name of {_article(others[0])} {others[0]}"
        package = known_components().get(kind, {}).get(name)
        installed = {record.distribution for record in self.records if record.error is None}
        if package and package not in installed:
            yield f"it comes with the package {package}: pip install {package}"
        for record in self.records:
            if record.error is not None:
                yield f"plugin {record.provider} is broken and might bring it: {record.error}"


def _is_typo(name: str, known: Iterable[str]) -> bool:
    """Whether a name is a known one but for a letter or two, or for their order or case."""
    given = name.lower()
    alike = [other.lower() for other in known if abs(len(other) - len(name)) <= 1]
    is_near = bool(difflib.get_close_matches(given, alike, n=1, cutoff=0.8))
    return is_near or sorted(given) in map(sorted, alike)


def _article(noun: str) -> str:
    return "an" if noun[0] in "aeiou" else "a"


def known_components() -> dict[str, dict[str, str]]:
    """Return kind -> name -> package of the components this project publishes outside core."""
    text = resources.files("distill").joinpath("known_components.json").read_text("utf-8")
    packages: dict[str, dict[str, list[str]]] = json.loads(text)
    known: dict[str, dict[str, str]] = {}
    for package, kinds in packages.items():
        for kind, names in kinds.items():
            known.setdefault(kind, {}).update(dict.fromkeys(names, package))
    return known
