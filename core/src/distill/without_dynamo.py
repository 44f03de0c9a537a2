"""``torch._dynamo`` left out until something is compiled: to import it takes as long as torch.

torch and torchvision ask it to keep out of single functions, some while they are imported, some on
the first call. While it is not there nothing is compiled, so there is nothing to keep out of.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from types import ModuleType
from typing import Any

DYNAMO = "torch._dynamo"
UTILS = "torch._dynamo.utils"


@contextmanager
def without_dynamo() -> Iterator[None]:
    """Let ``torch._dynamo`` wait until more is asked of it than to keep out of functions.

    It keeps out of those too as soon as it is there. For a process that is about to end: others
    may ask whether it is in ``sys.modules``.
    """
    if DYNAMO in sys.modules:
        yield
        return
    substitute = _Substitute()
    try:
        yield
    finally:
        substitute.step_aside()


class _Substitute(MetaPathFinder):
    """In place of ``torch._dynamo`` and what torchvision imports from it, until it steps aside."""

    def __init__(self) -> None:
        self._modules = {
            DYNAMO: _StandIn(DYNAMO, disable, self),
            UTILS: _StandIn(UTILS, is_compile_supported, self),
        }
        sys.modules.update(self._modules)
        sys.meta_path.insert(0, self)

    def step_aside(self) -> None:
        """Make place for the real ones."""
        for name, module in self._modules.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(self, fullname: str, path: object, target: object = None) -> ModuleSpec | None:
        """Find a part of ``torch._dynamo`` by importing the whole."""
        if not fullname.startswith(f"{DYNAMO}."):
            return None
        self.step_aside()
        return spec_from_loader(fullname, _AlreadyLoaded(importlib.import_module(fullname)))


class _StandIn(ModuleType):
    """A module that has one function and fetches the real one for all else."""

    def __init__(self, name: str, function: Callable[..., Any], substitute: _Substitute) -> None:
        super().__init__(name)
        self.__path__ = []  # it is a package, whose parts the substitute finds
        setattr(self, function.__name__, function)
        self.step_aside = substitute.step_aside

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked of every module there is, by inspect and warnings
            raise AttributeError(name)
        return getattr(_real(self.__name__), name)


class _AlreadyLoaded(Loader):
    """Loads what has been loaded, so that nothing is there twice."""

    def __init__(self, module: ModuleType) -> None:
        self._module, self._spec = module, module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec


def disable(
    fn: Callable[..., Any] | None = None, recursive: bool = True, **options: Any
) -> Callable[..., Any]:
    """Return what does as ``torch._dynamo.disable(fn)`` as soon as that is there."""
    if fn is None:
        return functools.partial(disable, recursive=recursive, **options)

    @functools.wraps(fn)
    def call(*args: Any, **params: Any) -> Any:
        if isinstance(sys.modules.get(DYNAMO), (_StandIn, type(None))):
            return fn(*args, **params)
        return _real(DYNAMO).disable(fn, recursive, **options)(*args, **params)

    return call


def is_compile_supported(device_type: Any) -> Any:
    """Return what ``torch._dynamo.utils.is_compile_supported`` does."""
    return _real(UTILS).is_compile_supported(device_type)


def _real(name: str) -> ModuleType:
    there = sys.modules.get(name)
    if isinstance(there, _StandIn):
        there.step_aside()
    return importlib.import_module(name)
