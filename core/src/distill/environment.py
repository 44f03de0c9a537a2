"""What a run ran on: versions, plugins, git state, hardware, command."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from importlib import metadata
from typing import Any

import torch

from distill import distributed
from distill.registry import Registry

PACKAGES = ("distill-core", "torch", "torchvision", "numpy", "pluggy", "safetensors")


def describe_environment(registry: Registry, device: torch.device) -> dict[str, Any]:
    """Return everything about this process that results may depend on."""
    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": [os.path.basename(sys.argv[0]), *sys.argv[1:]],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: v for name in PACKAGES if (v := _version(name)) is not None},
        "plugins": [
            {"name": r.name, "distribution": r.distribution, "version": r.version, "error": r.error}
            for r in registry.records
        ],
        "git": _git(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(device),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "processes": distributed.world_size(),
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git() -> dict[str, Any] | None:
    """Return the commit of the working directory and whether files differ from it."""
    commit = _git_output("rev-parse", "HEAD")
    if commit is None:
        return None
    return {"commit": commit, "changed": bool(_git_output("status", "--porcelain"))}


def _git_output(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
