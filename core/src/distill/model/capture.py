"""Record inputs and outputs of any submodule of any model, by path, without touching its code."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from distill.data.batch import map_tensors
from distill.errors import DistillError, did_you_mean

INPUT = ":input"


class CaptureError(DistillError):
    """What the submodule at ``path`` takes or gives cannot be recorded."""

    def __init__(self, path: str, message: str):
        self.path = path
        super().__init__(f"'{path}' {message}")


class Capture:
    """Records what named submodules take and give during a forward.

    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True))
    >>> with Capture(model, ["0", "1:input"]) as capture:
    ...     output = model(torch.ones(2, 4))
    ...     features = capture.pop()
    >>> features["0"].shape
    torch.Size([2, 3])

    In-place activations would falsify what is recorded, so modules with an ``inplace`` switch have
    it off until ``remove``. A value that is overwritten all the same (``x += y`` in a forward) is
    noticed: ``pop`` raises, unless ``clone`` asks for copies.

    Args:
        model: any module.
        paths: submodule paths (``layer1.0``), for inputs with ``:input``; an input is the
            submodule's first argument. An empty path means the model itself.
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
        self._values: dict[str, Any] = {}
        self._versions: dict[str, list[int]] = {}
        modules = {path: find_module(model, path.removesuffix(INPUT)) for path in self.paths}
        self._inplace = _switch_off_inplace(model) if self.paths else []
        self._handles = [self._hook(path, module) for path, module in modules.items()]

    def pop(self) -> dict[str, Any]:
        """Return path -> value of the last forward, and forget them.

        Raises:
            CaptureError: if a submodule did not run, or its value has been overwritten since.
        """
        overwritten = self.overwritten()
        try:
            self.check_complete()
            if overwritten:
                raise CaptureError(
                    overwritten[0],
                    "was overwritten in place after it was captured; capture it with clone=True",
                )
            return self._values
        finally:
            self.clear()

    def check_complete(self) -> None:
        """Raise ``CaptureError`` if a submodule has not run in the last forward."""
        for path in self.paths:
            if path not in self._values:
                raise CaptureError(path, "did not run in the model's forward")

    def overwritten(self) -> list[str]:
        """Return the paths whose recorded value has been changed in place since."""
        return [
            p for p, versions in self._versions.items() if _versions(self._values[p]) != versions
        ]

    def clear(self) -> None:
        """Forget what was recorded."""
        self._values, self._versions = {}, {}

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

    def _hook(self, path: str, module: nn.Module) -> RemovableHandle:
        if path.endswith(INPUT):

            def before(_module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
                given = [*args, *named.values()]
                if self.enabled and not given:
                    raise CaptureError(path, "is not there: the module is called without arguments")
                self._record(path, given[0] if given else None)

            return module.register_forward_pre_hook(before, with_kwargs=True)

        def after(_module: nn.Module, _args: Any, output: Any) -> None:
            self._record(path, output)

        return module.register_forward_hook(after)

    def _record(self, path: str, value: Any) -> None:
        if not self.enabled:
            return
        if path in self._values:
            self.clear()
            raise CaptureError(
                path,
                "ran again before it was popped; if it runs more than once in a forward, capture a "
                "module around it",
            )
        if path in self.cloned:
            value = map_tensors(torch.Tensor.clone, value)
        self._values[path] = value
        self._versions[path] = _versions(value)


def find_module(model: nn.Module, path: str) -> nn.Module:
    """Return the submodule at ``path``.

    Raises:
        DistillError: if there is none; the message gives the nearest.
    """
    module = model
    for segment in path.split(".") if path else ():
        children = dict(module.named_children())
        if segment not in children:
            raise DistillError(unknown_module(model, path))
        module = children[segment]
    return module


def split_path(model: nn.Module, path: str) -> tuple[str, str]:
    """Part a reference's path into the submodule it begins with and the output key behind it."""
    module, segments, known = model, path.split(".") if path else [], 0
    for segment in segments:
        children = dict(module.named_children())
        if segment not in children:
            break
        module, known = children[segment], known + 1
    return ".".join(segments[:known]), ".".join(segments[known:])


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
