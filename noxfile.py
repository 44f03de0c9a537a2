"""Sessions: demo, tests, lint, build, bench. `nox -l` lists them."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import nox

PLUGINS = {
    "distill-kd": "plugins/distill-kd",
    "distill-fitnet": "plugins/distill-fitnet",
    "distill-relational": "plugins/distill-relational",
    "distill-crd": "plugins/distill-crd",
    "distill-datasets-vision": "plugins/datasets-vision",
}
PROJECTS = ["core", *PLUGINS.values()]

nox.needs_version = ">=2024.10.9"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["tests"]


@nox.session
def demo(session: nox.Session) -> None:
    """Distil a student on the bundled digits and print what it gained."""
    _install(session)
    runs = Path(session.create_tmp()) / "runs"
    shutil.rmtree(runs, ignore_errors=True)  # the demo starts from scratch every time
    example = "plugins/distill-kd/examples/digits-kd.yaml"
    session.run("distill", "run", example, "--runs", str(runs))


@nox.session
def tests(session: nox.Session) -> None:
    """Run all tests; arguments behind -- go to pytest."""
    _install(session, "pytest", "pytest-xdist", "pip")
    # One thread a worker: the tests are many and small.
    session.run("pytest", "-n", "2", *session.posargs, env={"OMP_NUM_THREADS": "1"})


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and types."""
    _install(session, "ruff", "mypy", "pytest", "nox")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy", *(f"{project}/src" for project in PROJECTS), "benchmarks", "noxfile.py")


@nox.session
def build(session: nox.Session) -> None:
    """Build every wheel, and try each plugin's beside core's alone in an empty environment."""
    session.install("build[uv]")
    wheels = Path(session.create_tmp()).resolve() / "wheels"
    shutil.rmtree(wheels, ignore_errors=True)
    for project in PROJECTS:
        session.run(
            "python", "-m", "build", "--wheel", "--installer", "uv", "-o", str(wheels), project
        )
    core = next(wheels.glob("distill_core-*.whl"))
    for name in PLUGINS:
        plugin = next(wheels.glob(f"{name.replace('-', '_')}-*.whl"))
        _try_alone(session, name, [str(core), str(plugin)])


@nox.session
def bench(session: nox.Session) -> None:
    """Measure everything and write docs/performance.md; behind -- the names of some tables."""
    _install(session, "torchdistill>=1.1.5,<2", "matplotlib")  # to compare with, and to draw
    session.run("python", "benchmarks/tables.py", *session.posargs)


def _install(session: nox.Session, *tools: str) -> None:
    session.install(*(part for project in PROJECTS for part in ("-e", project)), *tools)


def _try_alone(session: nox.Session, name: str, wheels: list[str]) -> None:
    """Install wheels into an environment of their own and find the plugin by its entry point."""
    environment = Path(session.create_tmp()).resolve() / f"only-{name}"
    shutil.rmtree(environment, ignore_errors=True)
    session.run("uv", "venv", "-q", "--python", sys.executable, str(environment), external=True)
    folder = "Scripts" if os.name == "nt" else "bin"
    python = str(environment / folder / "python")
    session.run("uv", "pip", "install", "-q", "--python", python, *wheels, external=True)
    listed = session.run(python, "-m", "distill", "plugins", "--json", external=True, silent=True)
    records = {record["distribution"]: record for record in json.loads(str(listed))}
    if set(records) != {"distill-core", name} or any(r["error"] for r in records.values()):
        session.error(f"beside core, {name} is found as {records}")
    offered = {kind: len(names) for kind, names in records[name]["components"].items()}
    session.log(f"{name} is found beside core alone, with {offered}")
