"""Models of PyTorch Hub: code of a public repository, at one commit."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

_REPOSITORY = re.compile(r"[A-Za-z0-9_-]+/(?!\.{1,2}$)[A-Za-z0-9_.-]+")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def torch_hub(
    repo: str, revision: str, model: str, options: dict[str, Any] | None = None
) -> nn.Module:
    """Return what the function ``model`` in the ``hubconf.py`` of a GitHub repository returns.

    **This runs code of that repository.** It is fetched from GitHub into ``torch.hub.get_dir()``
    the first time, also on the meta device, and taken from there afterwards. What it prints and
    downloads is its own affair; only ``pretrained: true`` among the options becomes ``false`` on
    the meta device.

    The commit says what is run, not who wrote it: GitHub also hands out the commits of a
    repository's forks under its name. The repository is entered into ``torch.hub``'s list of those
    trusted. Two whose packages have the same name (``models``) cannot be used in one experiment.

    Args:
        repo: ``owner/name``.
        revision: the full hash of a commit, 40 digits. Branches and tags are refused: they move.
        model: name of the function.
        options: its arguments.

    Raises:
        ValueError: if the repository or revision is written wrongly, there is no such function, or
            an option has the name of a parameter of ``torch.hub.load``.
        OSError: if GitHub cannot be reached or does not have it.
    """
    if not _REPOSITORY.fullmatch(repo):
        raise ValueError(
            f"'{repo}' is no repository: give its owner and name, as in pytorch/vision"
        )
    if not _COMMIT.fullmatch(revision):
        raise ValueError(
            f"'{revision}' is no commit: give all 40 digits of its hash; a branch or tag can move"
        )
    arguments = dict(options or {})
    for key in arguments.keys() & inspect.signature(torch.hub.load).parameters.keys():
        raise ValueError(f"'{key}' cannot be an option: torch.hub.load takes it for itself")
    if "pretrained" in arguments and torch.get_default_device().type == "meta":
        arguments["pretrained"] = False
    return _load(repo, revision, model, arguments)


def _load(repo: str, revision: str, model: str, arguments: Mapping[str, Any]) -> nn.Module:
    source = f"{repo}:{revision}"
    # Validation accepts only commits that a branch or tag points to at the moment.
    how = {"trust_repo": True, "skip_validation": True, "verbose": False}
    try:
        built: nn.Module = torch.hub.load(source, model, **how, **arguments)
    except OSError as error:
        raise OSError(f"{_place(repo, revision)} cannot be loaded: {error}") from error
    except RuntimeError as error:
        known = torch.hub.list(source, **how)
        if model in known:
            raise
        near = difflib.get_close_matches(model, known)
        hint = f"; did you mean {' or '.join(near)}?" if near else f" (known: {', '.join(known)})"
        raise ValueError(f"{_place(repo, revision)} has no model '{model}'{hint}") from error
    return built


def _place(repo: Any, revision: Any) -> str:
    return f"github.com/{repo} at {revision}"


def _remote_code(params: Mapping[str, Any]) -> str:
    """Return whose code would run; parameters may be missing or wrong."""
    return _place(params.get("repo", "?"), params.get("revision", "?"))


torch_hub.remote_code = _remote_code  # type: ignore[attr-defined]
