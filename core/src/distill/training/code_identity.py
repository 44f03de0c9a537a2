"""What code a class or a function comes from, as hashes and versions."""

from __future__ import annotations

import hashlib
import inspect
import re
import sys
import uuid
from collections.abc import Iterable
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from distill.data.source import Source

VERSIONED = ("torch", "torchvision", "numpy", "PIL")
"""Packages whose code is known by their version."""
OWN = "distill"
INSTALLED = {"site-packages", "dist-packages"}
"""Folders whose packages are known by their version to those that import them."""
READ_AT_ONCE = 2**22
IMPORT = re.compile(r"^[ \t]*(?:from[ \t]+(\w[\w.]*)[ \t]+import|import[ \t]+([^\n#;]+))", re.M)
"""A module of which something is imported, or modules with commas between them."""


def made_by(source: Source) -> list[Any]:
    """Return the classes and functions that a sample of a data set goes through."""
    made: list[Any] = [*source.transforms, *source.joint_transforms, source.collate]
    made += [form for form in source.batched if form is not None]
    dataset: Any = source.dataset
    for _ in range(100):  # wrappers, as torch's, call what is inside ``dataset``
        made.append(dataset)
        dataset = getattr(dataset, "dataset", None)
        if dataset is None:
            break
    return [thing if inspect.isfunction(thing) else type(thing) for thing in made]


def code_of(things: Iterable[Any]) -> dict[str, str]:
    """Return a version or a hash for all code that classes and functions come from.

    Of a package it is that of all of its files, of distill itself that of the file alone. What
    these import counts too, and so on, until it is an installed package, of which the version does.
    """
    bases = [base for thing in things for base in _bases(thing)]
    names = {name for base in bases if (name := getattr(base, "__module__", None))}
    found: dict[str, str] = {}
    for name in sorted(names):
        top = name.partition(".")[0]
        if _is_known(top):
            found |= _version(top)
        else:
            key = name if top == OWN else top
            found[key] = _hash_of(key) if key in sys.modules else uuid.uuid4().hex
            _add_imported(key, found)
    return found


def hash_of_files(modules: Iterable[str]) -> str:
    """Return one hash over the files of some modules."""
    return hashlib.sha256("".join(map(_hash_of, modules)).encode()).hexdigest()


def hash_of_file(file: Path) -> str:
    """Return the hash of what a file holds."""
    found = hashlib.sha256()
    with file.open("rb") as opened:
        while part := opened.read(READ_AT_ONCE):
            found.update(part)
    return found.hexdigest()


def _bases(thing: Any) -> Iterable[Any]:
    return inspect.getmro(thing) if inspect.isclass(thing) else (thing,)


def _is_known(top: str) -> bool:
    return top in VERSIONED or top in sys.stdlib_module_names


def _version(top: str) -> dict[str, str]:
    if top in VERSIONED:
        return {top: str(getattr(sys.modules[top], "__version__", ""))}
    return {}


def _add_imported(name: str, found: dict[str, str]) -> None:
    """Add what the files of a module or package import, and what that does."""
    files = _files(name)
    if name.partition(".")[0] == OWN or any(INSTALLED & {*file.parts} for file in files):
        return
    for top in sorted({top for file in files for top in _imported(file)}):
        if top in found or top == OWN or _is_known(top):
            continue
        imported = _files(top)
        if any(INSTALLED & {*file.parts} for file in imported):
            found[top] = _installed(top)
        elif imported:
            found[top] = _hash_of(top)
            _add_imported(top, found)


def _imported(file: Path) -> set[str]:
    """Return the names of topmost modules that a file imports, wherever in it.

    They are searched for in the text, as a syntax tree takes seconds for a large package.
    """
    found = IMPORT.findall(file.read_bytes().decode("utf-8", "replace"))
    names = [name for one, many in found for name in (one, *many.split(","))]
    return {words[0].partition(".")[0] for name in names if (words := name.split())} - {""}


def _installed(top: str) -> str:
    try:
        return version(top)
    except PackageNotFoundError:  # the distribution has another name
        return ""


def _hash_of(name: str) -> str:
    """Return a hash over the files that a module, or all of a package, comes from.

    Code that is in no file is never the same as before.
    """
    files = _files(name)
    if not files:
        return uuid.uuid4().hex
    found = hashlib.sha256()
    for path in files:
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()


def _files(name: str) -> list[Path]:
    """Return a package's files; of a module by itself also those that it may have imported."""
    file, folders = _place(name)
    is_own = name.partition(".")[0] == OWN
    if folders and not is_own:
        return sorted(path for folder in folders for path in Path(folder).rglob("*.py"))
    if file is None or is_own:
        return [] if file is None else [file]
    loaded = (getattr(other, "__file__", None) for other in [*sys.modules.values()])
    beside = {Path(path) for path in loaded if path and Path(path).parent == file.parent}
    return sorted({file, *beside})


def _place(name: str) -> tuple[Path | None, list[str]]:
    """Return the file of a module, loaded or not, and the folders of a package."""
    module = sys.modules.get(name)
    if module is not None:
        file = getattr(module, "__file__", None)
        return (Path(file) if file else None), [*getattr(module, "__path__", ())]
    spec = _spec(name)
    if spec is None:
        return None, []
    file = Path(spec.origin) if spec.has_location and spec.origin else None
    return file, [*(spec.submodule_search_locations or ())]


def _spec(name: str) -> ModuleSpec | None:
    try:
        return find_spec(name)
    except (ImportError, ValueError):
        return None
