"""What the reading of a file shares: its data, the faults found so far, and plain components."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from distill import reference
from distill.config.experiment import Component, Gaps
from distill.config.inheritance import StageDraft
from distill.config.yaml_document import Document, Path, path_text
from distill.errors import Fault, did_you_mean


@dataclass
class Resolver:
    """The file being read, with the faults found so far.

    Attributes:
        gaps: what was left out of the data since it had a fault.
        missing: keys told to be missing already.
        lost: places of references told to lead nowhere, which later stages inherit.
    """

    document: Document
    data: Mapping[str, Any]
    gaps: Gaps
    faults: list[Fault] = field(default_factory=list)
    missing: set[str] = field(default_factory=set)
    lost: set[Path] = field(default_factory=set)

    def fault(self, path: Path, message: str) -> None:
        """Note a fault."""
        text = path_text(path, self.document.data)
        self.faults.append(Fault(message, text, self.document.locate(path)))

    def known(self, path: Path, what: str, name: str, section: str) -> None:
        """Fault a name that a section of the file does not define."""
        names = list(self.data[section])
        if name and name not in names and not self.gaps.explain((section,), name):
            self.unknown(path, what, name, names)

    def unknown(self, path: Path, what: str, name: str, names: Iterable[str]) -> None:
        """Fault a name that is none of ``names``."""
        hint = did_you_mean(name, names) or f" (defined: {', '.join(names) or 'none'})"
        self.fault(path, f"there is no {what} '{name}' in this file{hint}")

    def reference(self, path: Path, text: str) -> reference.Reference | None:
        """Parse a reference; one that cannot be parsed is a fault and becomes a gap."""
        try:
            return reference.parse(text)
        except ValueError as error:
            self.fault(path, str(error))
            self.gaps = Gaps(self.gaps.paths | {path})
            return None


def inputs(resolver: Resolver, given: Mapping[str, Any], path: Path) -> dict[str, reference.Wires]:
    """Read where a module's arguments come from."""
    read: dict[str, reference.Wires] = {}
    for key, wires in given.get("inputs", {}).items():
        place = (*path, "inputs", key)
        if isinstance(wires, str):
            one = resolver.reference(place, wires)
            if one is not None:
                read[key] = one
            continue
        several = [resolver.reference((*place, n), text) for n, text in enumerate(wires)]
        if all(several):
            read[key] = tuple(ref for ref in several if ref is not None)
        else:
            resolver.gaps = Gaps(resolver.gaps.paths | {place})
    return read


def is_gap(resolver: Resolver, draft: StageDraft, key: str) -> bool:
    """Whether the stage, or one it inherits from, would have ``key`` but for a fault."""
    *around, last = key.split(".")
    earlier = range(int(draft.path[1]) + 1)
    return any(resolver.gaps.explain(("stages", n, *around), last) for n in earlier)


def components(given: Iterable[Any], path: Path) -> tuple[Component, ...]:
    """Read a list of components."""
    return tuple(component(item, (*path, number)) for number, item in enumerate(given))


def component(given: Mapping[str, Any] | str, path: Path) -> Component:
    """Read a component, or its bare name."""
    if isinstance(given, str):
        return Component(given, {}, path)
    return Component(given["type"], given.get("params", {}), path)


def optional_component(given: Mapping[str, Any] | str | None, path: Path) -> Component | None:
    """Read a component that may be missing."""
    return None if given is None else component(given, path)
