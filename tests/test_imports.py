"""Who may import whom, as docs/architecture.md says."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORE = ROOT / "core" / "src" / "distill"
WITHOUT_TORCH = [
    "distill",
    "distill.cli",
    "distill.config.load",
    "distill.errors",
    "distill.hookspecs",
    "distill.observer",
    "distill.plugins",
    "distill.reference",
    "distill.registry",
    "distill.signature",
]
ROOMS = ["builtin", "training", "model", "store", "data", "config"]
MAY_IMPORT = {
    "config": {"config"},
    "data": {"data"},
    "store": {"store"},
    "model": {"model", "store", "data"},
    "training": {"training", "model", "store", "data", "config"},
    "builtin": {"builtin"},
}
FORBIDDEN_NAMES = {"utils", "util", "common", "helpers", "helper", "misc"}
# `distill --help` spares torch, who does not shard FSDP, and `distill check` what writes events.
LAZY = {"__init__", "cli", "cli_data", "cli_plugins", "cli_store", "parallel", "tensorboard"}


def _module(file: Path) -> str:
    parts = file.relative_to(CORE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_module(file): file for file in sorted(CORE.rglob("*.py"))}
PLUGIN_FILES = sorted(ROOT.glob("plugins/*/src/**/*.py"))


def _imports(file: Path, *, top_level: bool = False) -> set[str]:
    """Return every module a file imports, ``from a import b`` as ``a.b`` where that is a module."""
    tree = ast.parse(file.read_text("utf-8"))
    nodes = list(tree.body) if top_level else list(ast.walk(tree))
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in MODULES else node.module)
    return found


def _room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS else ""


def test_no_two_files_of_core_import_each_other() -> None:
    graph = {
        name: {m for m in _imports(file, top_level=True) if m in MODULES and m != "distill"}
        for name, file in MODULES.items()
        if name != "distill"
    }
    assert list(TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("module", [m for m in MODULES if _room(m)])
def test_rooms_import_only_what_lies_below_them(module: str) -> None:
    room = _room(module)
    imported = {_room(m) for m in _imports(MODULES[module]) if m.startswith("distill.")} - {""}
    assert imported <= MAY_IMPORT[room]


@pytest.mark.parametrize("file", [*PLUGIN_FILES, *(CORE / "builtin").glob("*.py")], ids=str)
def test_plugins_import_the_contract_only(file: Path) -> None:
    own = file.parent.name if "plugins" in file.parts else "distill.builtin"
    own = next((p for p in file.parts if p.startswith("distill_")), own)
    foreign = {
        m
        for m in _imports(file)
        if m.split(".")[0].startswith("distill") and m != "distill" and not m.startswith(own)
    }
    # The function of that name is of the contract too.
    assert not foreign - {"distill.parameters", "distill.plugins"}


def test_core_imports_neither_torchvision_nor_a_plugin() -> None:
    plugins = {file.parts[file.parts.index("src") + 1] for file in PLUGIN_FILES}
    files = [*CORE.rglob("*.py"), *(ROOT / "core" / "tests").rglob("*.py")]
    roots = {m.split(".")[0] for file in files for m in _imports(file)}
    assert not roots & {"torchvision", *plugins}


def test_the_model_room_knows_no_optimizer_no_files_and_no_ranks() -> None:
    for module, file in MODULES.items():
        if _room(module) == "model":
            assert not _imports(file) & {"distill.distributed", "torch.optim", "pathlib", "os"}


def test_imports_hide_inside_functions_only_to_spare_torch() -> None:
    for module, file in MODULES.items():
        tree = ast.parse(file.read_text("utf-8"))
        functions = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.Lambda))]
        hidden = [
            node
            for function in functions
            for node in ast.walk(function)
            if isinstance(node, (ast.Import, ast.ImportFrom))
        ]
        assert not hidden or file.stem in LAZY, module


def test_nothing_is_called_utils() -> None:
    names = {path.stem for path in ROOT.glob("**/src/**/*") if ".nox" not in path.parts}
    assert not names & FORBIDDEN_NAMES


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_what_only_describes_imports_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
