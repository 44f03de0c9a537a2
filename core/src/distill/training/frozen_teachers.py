"""That frozen teachers stay as they are."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import nn

from distill.training import sharding


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
            flat = sharding.whole(tensor.detach()).cpu().contiguous().view(-1)
            digest.update(flat.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()
