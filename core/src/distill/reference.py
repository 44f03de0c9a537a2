"""The grammar of value names: ``student.layer2:input``, ``targets``, ``extras.views``.

A reference is ``owner``, then optionally ``.path``. The owner is ``student``, a teacher's name,
``inputs``, ``targets``, ``index``, ``extras`` or the name of an auxiliary module. For ``extras``
and auxiliary modules the path names a key. For a model it names a submodule and what follows the
submodule a key of its output, or a parameter of it (``teacher.fc.weight``); a negative number
counts from the last (``layer1.-1``). Behind a submodule may stand

- ``@n``, which of its calls in a forward is meant where there are several, the last being ``@-1``;
- ``:input``, for its first argument instead of its output;
- behind either of them a key: ``student.encoder:input.0``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

STUDENT = "student"
TEACHER = "teacher"
BATCH_VALUES = ("inputs", "targets", "index", "extras")
RESERVED = (STUDENT, *BATCH_VALUES)
DEFAULT_WIRED = (STUDENT, TEACHER, "targets")
"""Names of ``forward`` parameters that take the reference of the same name by themselves."""

_SEGMENTS = r"[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*"
_GRAMMAR = re.compile(
    rf"(?P<owner>[A-Za-z_][A-Za-z0-9_-]*)(?:\.(?P<path>{_SEGMENTS}))?"
    rf"(?P<tap>(?:@(?P<call>-?\d+))?(?P<input>:input)?)(?:\.(?P<keys>{_SEGMENTS}))?"
)


@dataclass(frozen=True)
class Reference:
    """One parsed value name.

    Attributes:
        text: the reference as written.
        owner: model, auxiliary module or batch value it belongs to.
        path: what stands behind the owner, without the leading dot; empty for the owner itself.
        tap: ``@n`` and ``:input`` as written, empty for the output of the only call.
        keys: what stands behind the tap, without the leading dot.
    """

    text: str
    owner: str
    path: str = ""
    tap: str = ""
    keys: str = ""

    def __str__(self) -> str:
        return self.text


Key = tuple[str | int, ...]
Wires = Reference | tuple[Reference, ...]
"""Where one argument comes from; several references make a list of values."""


def each_reference(
    inputs: Mapping[str, Wires],
) -> Iterator[tuple[tuple[str | int, ...], Reference]]:
    """Yield every reference of a module's inputs with its place among them."""
    for name, wires in inputs.items():
        if isinstance(wires, Reference):
            yield (name,), wires
        else:
            yield from (((name, number), one) for number, one in enumerate(wires))


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
    owner, path, tap = match["owner"], match["path"] or "", match["tap"]
    if tap and owner in BATCH_VALUES:
        raise ValueError(f"'{text}': {owner} has no input and no calls")
    if path and owner in ("targets", "index"):
        raise ValueError(f"'{text}': {owner} has no parts")
    if owner == "extras" and not path:
        raise ValueError("'extras' needs a key, e.g. extras.views")
    return Reference(text, owner, path, tap, match["keys"] or "")
