"""Which parameters an entry of the file means: by module, name pattern or class."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

from torch import nn

from distill.errors import DistillError, did_you_mean
from distill.model.capture import find_module, split_path

NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)
WORDS = ("bias", "norm")


def select_parameters(entry: str, trained: Mapping[str, nn.Module]) -> list[nn.Parameter]:
    """Return the parameters that one entry means.

    Args:
        entry: a module (``student.layer1``, ``regressor``), a parameter or a pattern of parameters'
            names (``student.*.bias``), a class (``BatchNorm2d``), or one of the words ``bias``
            (every parameter whose name ends so) and ``norm`` (those of normalization layers).
        trained: what the stage trains, by name.

    Raises:
        DistillError: if it means nothing here.
    """
    for owner, module in () if _is_pattern(entry) else trained.items():
        if entry == owner or entry.startswith(f"{owner}."):
            path = entry.removeprefix(owner).removeprefix(".")
            named = _by_name(entry, trained) or list(find_module(module, path).parameters())
            if not named:
                raise DistillError(f"'{entry}' has no parameters")
            return named
    chosen = _by_name(entry, trained) or _by_class(entry, trained)
    if not chosen:
        raise DistillError(_unknown(entry, trained))
    return chosen


def select_statistics(entry: str, trained: Mapping[str, nn.Module]) -> list[nn.Module]:
    """Return the modules with running statistics among those that one entry means.

    Raises:
        DistillError: if there are none.
    """
    chosen = _find_statistics(entry, trained)
    if not chosen:
        raise DistillError(f"'{entry}' has no running statistics")
    return chosen


def has_statistics(entry: str, trained: Mapping[str, nn.Module]) -> bool:
    """Whether an entry means modules with running statistics."""
    return bool(_find_statistics(entry, trained))


def _find_statistics(entry: str, trained: Mapping[str, nn.Module]) -> list[nn.Module]:
    try:
        parameters = {id(parameter) for parameter in select_parameters(entry, trained)}
    except DistillError:  # layers without parameters have statistics too
        parameters = set()
    chosen = [
        module
        for module in _with_statistics(trained)
        if parameters & {id(parameter) for parameter in module.parameters(recurse=False)}
        or class_name(module) == entry
    ]
    for owner, root in trained.items():
        path, rest = split_path(root, entry.removeprefix(owner).removeprefix("."))
        if (entry == owner or entry.startswith(f"{owner}.")) and not rest:
            chosen += _with_statistics({owner: root.get_submodule(path)})
    return chosen


def _with_statistics(trained: Mapping[str, nn.Module]) -> list[nn.Module]:
    return [m for root in trained.values() for m in root.modules() if _has_statistics(m)]


def _has_statistics(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats


def _by_name(entry: str, trained: Mapping[str, nn.Module]) -> list[nn.Parameter]:
    pattern = "*bias" if entry == "bias" else entry  # in_proj_bias is one too
    return [
        parameter
        for owner, module in trained.items()
        for name, parameter in module.named_parameters(prefix=owner)
        if fnmatchcase(name, pattern)
    ]


def _by_class(entry: str, trained: Mapping[str, nn.Module]) -> list[nn.Parameter]:
    modules = [module for root in trained.values() for module in root.modules()]
    return [
        parameter
        for module in modules
        if class_name(module) == entry or (entry == "norm" and _is_norm(module))
        for parameter in module.parameters()
    ]


def class_name(module: nn.Module) -> str:
    """Return the name of a module's class, which FSDP puts a word before."""
    name = type(module).__name__
    is_sharded = any(base.__name__ == "FSDPModule" for base in type(module).__mro__)
    return name.removeprefix("FSDP") if is_sharded else name


def _is_norm(module: nn.Module) -> bool:
    """Whether it is a normalization layer: one of torch's, or a layer that is called so."""
    is_called_so = "norm" in class_name(module).lower() and not any(module.children())
    return isinstance(module, NORMS) or is_called_so


def _is_pattern(entry: str) -> bool:
    return any(sign in entry for sign in "*?[")


def _unknown(entry: str, trained: Mapping[str, nn.Module]) -> str:
    if _is_pattern(entry):
        names = [n for owner, m in trained.items() for n, _ in m.named_parameters(prefix=owner)]
        shown = ", ".join(names[:3])
        return f"no parameter's name fits '{entry}' (they are called: {shown}, ...)"
    classes = {class_name(m) for root in trained.values() for m in root.modules()}
    if entry in classes:
        return f"'{entry}' has no parameters"
    known = [*trained, *sorted(classes), *WORDS]
    hint = did_you_mean(entry, known) or f" (modules: {', '.join(trained)})"
    return f"'{entry}' is neither a module nor a class of one that trains{hint}"
