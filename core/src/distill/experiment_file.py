"""An experiment file together with the plugins that its components are in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from distill.config.experiment import Experiment
from distill.config.load import draft
from distill.config.overrides import override_experiment
from distill.config.yaml_document import read
from distill.errors import ConfigError
from distill.plugins import plugins
from distill.registry import Registry
from distill.training.check import check


def open_experiment(
    file: Path, overrides: Sequence[str], plugin_files: Sequence[Path]
) -> tuple[Experiment, Registry]:
    """Load plugins and file.

    Raises:
        ConfigError: with the frame's faults together with those of the components.
    """
    experiment, faults = draft(override_experiment(read(file), overrides))
    registry = plugins(plugin_files)
    if faults:
        faults += check(experiment, registry) if experiment is not None else []
        raise ConfigError(faults)
    assert experiment is not None
    return experiment, registry
