"""What a stage freezes, by module path or by class, and that frozen teachers stay as they are."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import nn

from distill.errors import DistillError, did_you_mean
from distill.model.capture import find_module


def frozen_parameters(entry: str, trained: Mapping[str, nn.Module]) -> list[nn.Parameter]:
    """Return the parameters one entry of ``freeze`` means.

    Args:
        entry: a module (``student.layer1``, ``regressor``) or a class (``BatchNorm2d``).
        trained: what the stage trains, by name.

    Raises:
        DistillError: if it means nothing here.
    """
    owner, _, path = entry.partition(".")
    if owner in trained:
        return list(find_module(trained[owner], path).parameters())
    modules = [module for root in trained.values() for module in root.modules()]
    classes = {type(module).__name__ for module in modules}
    if entry not in classes:
        known = [*trained, *sorted(classes)]
        hint = did_you_mean(entry, known) or f" (modules: {', '.join(trained)})"
        raise DistillError(f"'{entry}' is neither a module nor a class of one that trains{hint}")
    chosen = [module for module in modules if type(module).__name__ == entry]
    return [parameter for module in chosen for parameter in module.parameters()]


class Unchanged:
    """Watches over frozen teachers: their weights, and in eval mode their buffers too."""

    def __init__(self, teachers: Mapping[str, nn.Module], modes: Mapping[str, str]):
        self._teachers = teachers
        self._modes = modes
        self._before = {role: self._fingerprint(role) for role in teachers}

    def changed(self) -> list[str]:
        """Return the teachers that are not what they were."""
        return [role for role, before in self._before.items() if self._fingerprint(role) != before]

    def _fingerprint(self, role: str) -> str:
        teacher = self._teachers[role]
        tensors: list[torch.Tensor] = list(teacher.parameters())
        tensors += list(teacher.buffers()) if self._modes[role] == "eval" else []
        digest = hashlib.sha256()
        for tensor in tensors:
            flat = tensor.detach().cpu().contiguous().view(-1)
            digest.update(flat.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()
