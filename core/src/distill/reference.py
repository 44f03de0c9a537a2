"""The grammar of value names: ``student.layer2:input``, ``targets``, ``extras.views``.

A reference is ``owner``, then optionally ``.path``, then optionally ``:input``. The owner is
``student``, a teacher's name, ``inputs``, ``targets``, ``index``, ``extras`` or the name of an
auxiliary module. For a model the path names a submodule, and what follows the submodule a key of
its output; for ``extras`` and auxiliary modules it names a key.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

STUDENT = "student"
TEACHER = "teacher"
BATCH_VALUES = ("inputs", "targets", "index", "extras")
RESERVED = (STUDENT, *BATCH_VALUES)
DEFAULT_WIRED = (STUDENT, TEACHER, "targets")
"""Names of ``forward`` parameters that take the reference of the same name by themselves."""

_GRAMMAR = re.compile(
    r"(?P<owner>[A-Za-z_][A-Za-z0-9_-]*)(?:\.(?P<path>[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*))?(?P<input>:input)?"
)


@dataclass(frozen=True)
class Reference:
    """One parsed value name.

    Attributes:
        text: the reference as written.
        owner: model, auxiliary module or batch value it belongs to.
        path: what stands behind the owner, without the leading dot; empty for the owner itself.
        of_input: whether the input of the submodule is meant instead of its output.
    """

    text: str
    owner: str
    path: str = ""
    of_input: bool = False

    def __str__(self) -> str:
        return self.text


def parse(text: str) -> Reference:
    """Parse a reference.

    Raises:
        ValueError: if ``text`` does not follow the grammar.
    """
    match = _GRAMMAR.fullmatch(text)
    if match is None:
        raise ValueError(
            f"'{text}' is no value name; write e.g. student, teacher.layer2, "
            "student.layer2:input, targets, extras.views"
        )
    owner, path, of_input = match["owner"], match["path"] or "", match["input"] is not None
    if of_input and owner in BATCH_VALUES:
        raise ValueError(f"'{text}': {owner} has no input")
    if path and owner in ("targets", "index"):
        raise ValueError(f"'{text}': {owner} has no parts")
    if owner == "extras" and not path:
        raise ValueError("'extras' needs a key, e.g. extras.views")
    return Reference(text, owner, path, of_input)
