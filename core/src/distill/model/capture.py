"""Record inputs and outputs of any submodule of any model, by path, without touching its code."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from distill.data.batch import map_tensors
from distill.errors import DistillError, did_you_mean

_PATH = re.compile(r"(?P<module>[^@:]*)(?:@(?P<call>-?\d+))?(?P<input>:input)?")


class CaptureError(DistillError):
    """What the submodule at ``path`` takes or gives cannot be recorded."""

    def __init__(self, path: str, message: str):
        self.path = path
        super().__init__(f"'{path}' {message}")


class Complete(BaseException):
    """Everything to be recorded is: what the model would do next is not needed.

    No ``Exception``, so that a model that catches those lets it pass.
    """


@dataclass
class _Tap:
    """One place to record at: a module, which of its calls, and which side of it."""

    path: str
    module: nn.Module
    call: int | None
    of_input: bool


class Capture:
    """Records what named submodules take and give during a forward.

    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True))
    >>> with Capture(model, ["0", "-1:input"]) as capture:
    ...     output = model(torch.ones(2, 4))
    ...     features = capture.pop()
    >>> features["0"].shape
    torch.Size([2, 3])

    In-place activations would falsify what is recorded, so modules with an ``inplace`` switch have
    it off until ``remove``. A value that is overwritten all the same (``x += y`` in a forward) is
    noticed: ``pop`` raises, unless ``clone`` asks for copies.

    Args:
        model: any module.
        paths: submodule paths (``layer1.0``, or ``layer1.-1`` for the last of a row), for inputs
            with ``:input``; an input is the submodule's first argument. An empty path means the
            model itself. For a submodule that runs several times in a forward ``@n`` says which
            time is meant, from 0, or from the last as ``@-1``: ``layer1.0.relu@1:input``.
        clone: paths to copy, or ``True`` for all; costs their memory once more.

    Attributes:
        enabled: set to ``False`` to let forwards pass unrecorded.

    Raises:
        DistillError: if a path does not exist; the message gives the nearest.
    """

    def __init__(
        self, model: nn.Module, paths: Iterable[str], *, clone: bool | Iterable[str] = False
    ):
        self.paths = tuple(dict.fromkeys(paths))
        self.cloned = set(self.paths if clone is True else clone or ())
        self.enabled = True
        self._stops = False
        self._values: dict[str, Any] = {}
        self._versions: dict[str, list[int]] = {}
        self._runs: dict[str, int] = {}
        self._latest: dict[str, deque[tuple[Any, list[int]]]] = {}
        self._ends: dict[str, int] = {}
        self._taps = [_tap(model, path) for path in self.paths]
        self._from_last = [tap for tap in self._taps if tap.call is not None and tap.call < 0]
        self._inplace = _switch_off_inplace(model) if self.paths else []
        self._handles = [self._hook(tap) for tap in self._taps]
        self._handles += [self._hook_end(tap, model) for tap in self._from_last]

    def pop(self) -> dict[str, Any]:
        """Return path -> value of the last forward, and forget them.

        Raises:
            CaptureError: if a submodule did not run, ran several times without it being said which
                time is meant, or its value has been overwritten since.
        """
        try:
            self.check_complete()
            overwritten = self.overwritten()
            if overwritten:
                raise CaptureError(
                    overwritten[0],
                    "was overwritten in place after it was captured; capture it with clone=True",
                )
            return self._values
        finally:
            self.clear()

    def check_complete(self) -> None:
        """Raise ``CaptureError`` if something is not there after a forward, or there twice."""
        for tap in self._taps:
            runs = self._runs.get(tap.path, 0)
            if runs == 0:
                raise CaptureError(tap.path, "did not run in the model's forward")
            if tap.call is None and runs > 1:
                place = tap.path.partition(":")[0]
                raise CaptureError(
                    tap.path,
                    f"ran {runs} times since it was last popped; say which time is meant: "
                    f"'{place}@0' is the first and '{place}@-1' the last of a forward",
                )
            if tap.path not in self._values:
                times = "once" if runs == 1 else f"{runs} times"
                raise CaptureError(tap.path, f"is not there: it ran {times}, the first being @0")

    def stop_early(self) -> bool:
        """From the next forward on raise ``Complete`` as soon as everything is recorded.

        Which call was the last is known when the module around it ends. To be called after a whole
        forward.

        Returns:
            Whether that can be: not so if only the whole model's end tells which call was the last.
        """
        self.check_complete()
        self._stops = all(self._ends.get(tap.path) == 1 for tap in self._from_last)
        return self._stops

    def overwritten(self) -> list[str]:
        """Return the paths whose recorded value has been changed in place since."""
        return [
            p for p, versions in self._versions.items() if _versions(self._values[p]) != versions
        ]

    def clear(self) -> None:
        """Forget what was recorded."""
        self._values, self._versions, self._runs, self._latest = {}, {}, {}, {}
        self._ends = {}

    def remove(self) -> None:
        """Take the hooks off the model and give back its in-place activations."""
        for handle in self._handles:
            handle.remove()
        for module in self._inplace:
            module.inplace = True
        self._handles, self._inplace = [], []
        self.clear()

    def __enter__(self) -> Capture:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.remove()

    def _hook(self, tap: _Tap) -> RemovableHandle:
        if tap.of_input:

            def before(_module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
                given = [*args, *named.values()]
                if self.enabled and not given:
                    message = "is not there: the module is called without arguments"
                    raise CaptureError(tap.path, message)
                self._record(tap, given[0] if given else None)

            return tap.module.register_forward_pre_hook(before, with_kwargs=True)

        def after(_module: nn.Module, _args: Any, output: Any) -> None:
            self._record(tap, output)

        return tap.module.register_forward_hook(after)

    def _hook_end(self, tap: _Tap, model: nn.Module) -> RemovableHandle:
        """Notice that the module around a tapped one ends, unless that is the model itself."""
        around = next((m for m in model.modules() if tap.module in m.children()), model)

        def after(module: nn.Module, _args: Any, _output: Any) -> None:
            if self.enabled and module is not model:
                self._ends[tap.path] = self._ends.get(tap.path, 0) + 1
                self._stop_if_complete()

        return around.register_forward_hook(after)

    def _record(self, tap: _Tap, value: Any) -> None:
        if not self.enabled:
            return
        runs = self._runs[tap.path] = self._runs.get(tap.path, 0) + 1
        if tap.call is not None and 0 <= tap.call != runs - 1:
            return
        if tap.path in self._ends:  # it has another place too, so that end was not the last
            self._ends[tap.path] += 1
        # Tensors of inference mode do not count how often they are overwritten.
        if tap.path in self.cloned or torch.is_inference_mode_enabled():
            value = map_tensors(torch.Tensor.clone, value)
        seen = (value, _versions(value))
        if tap.call is not None and tap.call < -1:
            latest = self._latest.setdefault(tap.path, deque(maxlen=-tap.call))
            latest.append(seen)
            if runs < -tap.call:
                return
            seen = latest[0]
        self._values[tap.path], self._versions[tap.path] = seen
        self._stop_if_complete()

    def _stop_if_complete(self) -> None:
        is_recorded = self._stops and len(self._values) == len(self._taps)
        if is_recorded and all(tap.path in self._ends for tap in self._from_last):
            raise Complete


def _tap(model: nn.Module, path: str) -> _Tap:
    match = _PATH.fullmatch(path)
    if match is None:
        raise DistillError(f"'{path}' is no path; write e.g. layer1.0, layer1.0.relu@1:input")
    call = None if match["call"] is None else int(match["call"])
    return _Tap(path, find_module(model, match["module"]), call, match["input"] is not None)


def find_module(model: nn.Module, path: str) -> nn.Module:
    """Return the submodule at ``path``.

    Raises:
        DistillError: if there is none; the message gives the nearest.
    """
    found, rest = split_path(model, path)
    if rest:
        raise DistillError(unknown_module(model, path))
    return model.get_submodule(found)


def split_path(model: nn.Module, path: str) -> tuple[str, str]:
    """Part a reference's path into the submodule it begins with and the output key behind it.

    In the submodule's path, negative numbers are replaced by names.
    """
    module, segments = model, path.split(".") if path else []
    names: list[str] = []
    for number, segment in enumerate(segments):
        name = _child_name(module, segment)
        if name is None:
            return ".".join(names), ".".join(segments[number:])
        module = module.get_submodule(name)
        names.append(name)
    return ".".join(names), ""


def _child_name(module: nn.Module, segment: str) -> str | None:
    """Return the name of the child a segment means, counted from the last if it is negative."""
    names = [name for name, _ in module.named_children()]
    if segment in names:
        return segment
    is_negative = segment.startswith("-") and segment[1:].isdigit()
    return names[int(segment)] if is_negative and 0 < -int(segment) <= len(names) else None


def unknown_module(model: nn.Module, path: str) -> str:
    """Say that ``path`` is no module of ``model``, and which ones come near."""
    paths = [name for name, _ in model.named_modules() if name]
    parent, _ = split_path(model, path)
    children = [f"{parent}.{n}".strip(".") for n, _ in find_module(model, parent).named_children()]
    hint = did_you_mean(path, paths) or (
        f" ({f'{parent} has' if parent else 'it has'}: {', '.join(children) or 'no submodules'})"
    )
    return f"{type(model).__name__} has no module '{path}'{hint}"


def _switch_off_inplace(model: nn.Module) -> list[Any]:
    switched = [m for m in model.modules() if getattr(m, "inplace", False) is True]
    for module in switched:
        module.inplace = False  # type: ignore[assignment]
    return switched


def _versions(value: Any) -> list[int]:
    if isinstance(value, torch.Tensor):
        return [] if value.is_inference() else [value._version]  # those are not counted
    if isinstance(value, dict):
        return [version for item in value.values() for version in _versions(item)]
    if isinstance(value, (list, tuple)):
        return [version for item in value for version in _versions(item)]
    return []
