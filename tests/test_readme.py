"""Everything the README shows is run, in its order, in one empty folder."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

from distill import hookspecs
from distill.forked import Forked

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
FILE = re.compile(r"# (\S+\.(?:yaml|py|toml))\n")


def test_files_commands_and_python_of_the_readme_run_as_they_stand(tmp_path: Path) -> None:
    ran = 0
    for language, text in BLOCKS:
        file = FILE.match(text)
        if file is not None:
            (tmp_path / file[1]).write_text(text, "utf-8")
        elif language == "console":
            for line in text.splitlines():
                assert line.startswith("$ distill "), line
                _run(tmp_path, *shlex.split(line.removeprefix("$ ")), is_module=True)
                ran += 1
        elif language == "python":
            (tmp_path / "shown.py").write_text(text, "utf-8")
            _run(tmp_path, str(tmp_path / "shown.py"))
            ran += 1
    assert ran >= 8
    for name in ("digits-hint", "short", "two", "mine"):
        assert (tmp_path / "runs" / name / "report.md").is_file()


def test_the_two_commands_are_what_ci_and_the_sessions_run() -> None:
    commands = [text.strip() for language, text in BLOCKS if not language and "nox" in text]
    sessions = [command.rsplit(" ", 1)[1] for command in commands]
    assert sessions == ["demo", "tests"]
    noxfile = (ROOT / "noxfile.py").read_text("utf-8")
    assert all(f"def {session}(session" in noxfile for session in sessions)
    assert commands[1] in (ROOT / ".ci" / "run").read_text("utf-8")


def test_the_hook_reference_is_that_of_hookspecs() -> None:
    rows = dict(re.findall(r"^\| `(distill_\w+)` \| (.+) \|$", README, re.MULTILINE))
    specs = {n: f for n, f in vars(hookspecs).items() if n.startswith(hookspecs.PROJECT + "_")}
    assert set(rows) == set(specs)
    for name, description in rows.items():
        documented = " ".join((specs[name].__doc__ or "").split())
        for code in re.findall(r"`([^`]+)`", description):
            assert f"``{code}``" in documented, name


def test_every_link_of_the_readme_leads_to_a_file() -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []
    pages = [README, *((ROOT / target).read_text("utf-8") for target in targets)]
    assert all(
        page.strip() and not re.search(r"^[A-Z]+_TABLE$", page, re.MULTILINE) for page in pages
    )


def _run(folder: Path, target: str, *arguments: str, is_module: bool = False) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = Forked(target, arguments, environment, folder, is_module)
    code, told = process.wait(timeout=300)
    process.kill()
    assert code == 0, f"{target} {arguments}\n{told}"
