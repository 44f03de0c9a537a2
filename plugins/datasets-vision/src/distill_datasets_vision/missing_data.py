"""Data sets of torchvision that say what is missing, and download only where asked to."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

from distill_datasets_vision.data_layouts import LAYOUTS, Layout

DOCUMENTATION = "https://pytorch.org/vision/stable/generated/torchvision.datasets"
NOT_DOWNLOADABLE_ANY_MORE = frozenset({"StanfordCars"})


def telling_what_is_missing(dataset: type[Any]) -> Callable[..., Any]:
    """Return a factory with the parameters of a data set class, whose objects it makes.

    The class's own ``**kwargs`` are replaced by what its base class takes, and ``download`` is
    ``False`` unless given.

    Raises (the factory):
        FileNotFoundError: if the files are not there; one line that says what was looked for where.
        OSError: if they were to be downloaded and could not be.
        ModuleNotFoundError: if the class needs a package that is not installed.
    """
    return _Factory(dataset)


class _Factory:
    """See ``telling_what_is_missing``. The signature is put together when it is first looked at."""

    def __init__(self, dataset: type[Any]) -> None:
        functools.update_wrapper(self, dataset, updated=())
        self._dataset = dataset

    @cached_property
    def __signature__(self) -> inspect.Signature:
        return closed_signature(self._dataset)

    def __call__(self, *args: Any, **params: Any) -> Any:
        name, signature = self._dataset.__name__, self.__signature__
        bound = signature.bind(*args, **params)
        if "download" in signature.parameters:
            bound.arguments.setdefault("download", False)
        try:
            return self._dataset(**bound.arguments)
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"{name} needs the package {error.name}: pip install {error.name}"
            ) from error
        except PermissionError:
            raise
        except (OSError, RuntimeError) as error:
            if isinstance(error.__context__, ImportError):  # torchvision's words for that
                raise
            bound.apply_defaults()
            raise _explained(name, bound.arguments, error) from error


def closed_signature(dataset: type[Any]) -> inspect.Signature:
    """Return the signature of a data set class, hints evaluated, without ``**kwargs``."""
    parameters: dict[str, inspect.Parameter] = {}
    for cls in dataset.__mro__:
        if "__init__" not in vars(cls):
            continue
        own = list(_signature(vars(cls)["__init__"]).parameters.values())[1:]
        for parameter in own:
            if parameter.kind is not parameter.VAR_KEYWORD:
                parameters.setdefault(parameter.name, parameter)
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in own):
            break
    if "download" in parameters:
        parameters["download"] = parameters["download"].replace(default=False)
    return inspect.Signature(list(parameters.values()))


def _signature(function: Callable[..., Any]) -> inspect.Signature:
    try:
        return inspect.signature(function, eval_str=True)
    except NameError:  # hints imported for type checkers only
        return inspect.signature(function)


def _explained(name: str, params: Mapping[str, Any], error: Exception) -> OSError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    if params.get("download"):
        return OSError(f"{name} could not be downloaded to {_absolute(params['root'])}: {reason}")
    return FileNotFoundError(
        f"{name} finds no data: {_looked_for(name, params, reason)}; {_remedy(name, params)}"
    )


def _looked_for(name: str, params: Mapping[str, Any], reason: str) -> str:
    layout = LAYOUTS.get(name)
    root = _absolute(params["root"])
    if layout is None:
        return f"looked below {root}: {reason}"
    path = _path(layout, params)
    text = f"looked for {path} ({layout.content.format_map(params)})"
    if not os.path.isdir(root):
        return f"{text}, but there is no folder {root}"
    if reason.startswith("Dataset not found"):
        return f"{text}, which is there but incomplete or damaged" if _has_content(path) else text
    return text if path in reason else f"{text}: {reason}"


def _path(layout: Layout, params: Mapping[str, Any]) -> str:
    base = _absolute(params[layout.below])
    return os.path.join(base, layout.path.format_map(params)) if layout.path else base


def _has_content(path: str) -> bool:
    """Say whether a file or a folder with something in it is at ``path``."""
    return os.path.isfile(path) or (os.path.isdir(path) and bool(os.listdir(path)))


def _remedy(name: str, params: Mapping[str, Any]) -> str:
    if "download" in params and name not in NOT_DOWNLOADABLE_ANY_MORE:
        return "put it there, or set params.download: true"
    return f"put it there (see {DOCUMENTATION}.{name}.html)"


def _absolute(path: str | os.PathLike[str]) -> str:
    return os.path.abspath(os.path.expanduser(path))
