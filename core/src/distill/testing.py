"""For tests of plugins: toy data and models, small experiments, and what a loss must pass.

Nothing here needs a network, a plugin package or more than a moment.
"""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
import socket
import typing
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar
from unittest import SkipTest

import torch
import yaml
from torch import nn
from torch.utils.data import Dataset

from distill import builtin, hookspecs, randomness
from distill.config.experiment import Experiment
from distill.config.load import load
from distill.forked import Forked
from distill.registry import SINGULAR, Entry, Registry

PROCESS_TIMEOUT = 120
"""Seconds after which ``run_processes`` gives up."""


class ToyData(Dataset[tuple[torch.Tensor, int]]):
    """Noisy points (or images) around one centre a class, the same for the same arguments.

    Items are a float32 tensor of ``shape`` and the label as int.
    """

    def __init__(
        self, size: int = 16, classes: int = 3, shape: tuple[int, ...] = (4,), seed: int = 0
    ):
        generator = torch.Generator().manual_seed(seed)
        centres = torch.randn(classes, *shape, generator=torch.Generator().manual_seed(0))
        labels = torch.arange(size) % classes
        self.labels = labels.tolist()
        self.inputs = centres[labels] + 0.5 * torch.randn(size, *shape, generator=generator)
        self.classes = [f"class {number}" for number in range(classes)]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.inputs[index], self.labels[index]


class ToyMLP(nn.Module):
    """Points (B, features) -> logits (B, classes); ``body`` ends with an in-place ReLU."""

    def __init__(self, hidden: int = 8, features: int = 4, classes: int = 3, dropout: float = 0.0):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(features, hidden), nn.ReLU(inplace=True))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(hidden, classes)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return logits."""
        logits: torch.Tensor = self.head(self.dropout(self.body(inputs)))
        return logits


class ToyConvNet(nn.Module):
    """Images (B, 1, H, W) -> logits (B, classes), with BatchNorm and an in-place ReLU."""

    def __init__(self, width: int = 4, classes: int = 3):
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(width, classes)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return logits."""
        features = self.relu(self.norm(self.conv(inputs)))
        logits: torch.Tensor = self.head(features.mean((2, 3)))
        return logits


def toy_registry(**more: Mapping[str, Callable[..., Any]]) -> Registry:
    """Return core's own components, the toys, and ``more``: kind -> name -> factory."""
    toys: Mapping[str, Mapping[str, Callable[..., Any]]] = {
        "datasets": {"ToyData": ToyData},
        "models": {"ToyMLP": ToyMLP, "ToyConvNet": ToyConvNet},
    }
    own: Mapping[str, Mapping[str, Callable[..., Any]]] = {
        kind: getattr(builtin, f"distill_{kind}", dict)() for kind in SINGULAR
    }
    return Registry(
        Entry(kind, name, factory, provider)
        for provider, offer in (("distill-core", own), ("toys", toys), ("test", more))
        for kind, factories in offer.items()
        for name, factory in factories.items()
    )


def toy_experiment(folder: Path, *stages: Mapping[str, Any], **keys: Any) -> Experiment:
    """Write an experiment on toys to ``folder/toy.yaml`` and load it.

    Args:
        folder: where the file goes.
        stages: their keys; the first takes what it leaves out from a plain training of ``mlp``.
        keys: of the experiment, in place of the usual ones.
    """
    first = {
        "epochs": 2,
        "data": {"train": "train", "validate": "val", "batch_size": 8},
        "student": {"model": "mlp"},
        "criterion": {"ce": {"type": "CrossEntropyLoss"}},
        "optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}},
    }
    described = [{"name": f"stage{number}", **stage} for number, stage in enumerate(stages)]
    experiment = {
        "name": "toy",
        "device": "cpu",
        "datasets": {
            "train": {"type": "ToyData", "params": {"size": 20}},
            "val": {"type": "ToyData", "params": {"size": 12, "seed": 1}},
        },
        "models": {
            "mlp": {"type": "ToyMLP"},
            "wide": {"type": "ToyMLP", "params": {"hidden": 12}},
        },
        "observers": [],
        **keys,
        "stages": [{**first, **described[0]}, *described[1:]],
    }
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "toy.yaml"
    # In one piece, since several processes may write it at once.
    written = file.with_suffix(f".{os.getpid()}")
    written.write_text(yaml.safe_dump(experiment, sort_keys=False), "utf-8")
    written.replace(file)
    return load(file)


def run_processes(script: str | os.PathLike[str], *arguments: str, processes: int = 2) -> None:
    """Run a Python script in several processes that find each other as under torchrun.

    In the script, ``distill.run`` or ``distill.distributed.join`` joins them.

    Raises:
        RuntimeError: with what it wrote, if one of them fails.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    group = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": str(processes)}
    started = [
        Forked(
            str(script),
            arguments,
            {**os.environ, **group, "RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"},
        )
        for rank in map(str, range(processes))
    ]
    try:
        ended = [process.wait(PROCESS_TIMEOUT) for process in started]
    finally:
        for process in started:
            process.kill()
    failed = [text for code, text in ended if code]
    if failed:
        raise RuntimeError("\n".join(failed))


class LossConformance:
    """What every distillation loss should pass; inherit it and say how to build the loss.

    >>> class TestKDLoss(LossConformance):
    ...     teacher = "teacher"
    ...
    ...     def make(self):
    ...         return KDLoss(temperature=4.0, alpha=0.0)
    ...
    ...     def tensors(self, batch):
    ...         return {"student": torch.randn(batch, 5), "teacher": torch.randn(batch, 5)}

    Attributes:
        student: the parameter of ``forward`` through which gradients reach the student.
        teacher: the one that takes what the teacher gives, ``None`` if there is none; it must have
            the student's shape in ``tensors``.
    """

    student = "student"
    teacher: str | None = None

    def make(self) -> nn.Module:
        """Build the loss."""
        raise NotImplementedError

    def tensors(self, batch: int) -> dict[str, torch.Tensor]:
        """Return arguments of ``forward`` for ``batch`` samples; tensors as float32."""
        raise NotImplementedError

    def test_loss_is_a_finite_scalar(self) -> None:
        loss = self.make()(**self._tensors())
        assert loss.dim() == 0
        assert torch.isfinite(loss)

    def test_loss_and_gradient_are_finite_where_student_equals_teacher(self) -> None:
        given = self._tensors()
        if self.teacher is not None:
            given[self.teacher] = given[self.student].detach().clone()
        self._assert_finite(given)

    def test_loss_and_gradient_are_finite_for_extreme_values(self) -> None:
        for factor in (0.0, 1e4):
            given = self._tensors()
            for name in filter(None, (self.student, self.teacher)):
                given[name] = given[name].detach() * factor
            self._assert_finite(given)

    def test_loss_and_gradient_are_finite_for_a_single_sample(self) -> None:
        self._assert_finite(self._tensors(1))

    def test_gradient_reaches_the_student_and_not_the_teacher(self) -> None:
        given = self._tensors()
        for name in filter(None, (self.student, self.teacher)):
            given[name].requires_grad_()
        self.make()(**given).backward()
        gradient = given[self.student].grad
        assert gradient is not None
        assert gradient.abs().sum() > 0
        if self.teacher is not None:
            reached = given[self.teacher].grad
            assert reached is None or not reached.any()

    def test_gradient_is_that_of_the_formula(self) -> None:
        loss = self.make().double()
        given = {
            name: tensor.double() if tensor.is_floating_point() else tensor
            for name, tensor in self._tensors().items()
        }

        def of_student(student: torch.Tensor) -> torch.Tensor:
            value: torch.Tensor = loss(**{**given, self.student: student})
            return value

        assert torch.autograd.gradcheck(of_student, given[self.student].requires_grad_())

    def test_reduced_precision_is_close_to_full(self) -> None:
        given = self._tensors()
        rounded = {
            name: tensor.bfloat16() if tensor.is_floating_point() else tensor
            for name, tensor in given.items()
        }
        loss = self.make()
        torch.testing.assert_close(loss(**rounded).float(), loss(**given), rtol=0.05, atol=0.05)

    def _tensors(self, batch: int = 4) -> dict[str, torch.Tensor]:
        with randomness.torch_forked():
            torch.manual_seed(0)
            return self.tensors(batch)

    def _assert_finite(self, given: dict[str, torch.Tensor]) -> None:
        given[self.student].requires_grad_()
        loss = self.make()(**given)
        loss.backward()
        assert torch.isfinite(loss)
        gradient = given[self.student].grad
        assert gradient is not None
        assert torch.isfinite(gradient).all()


class OfferConformance:
    """What a package of losses and auxiliary modules should pass; inherit it and name the package.

    Losses have names that end in Loss, and printing a module shows what it was built with, as
    ``distill.parameters.Parametrized`` has it.

    >>> class TestOffer(OfferConformance):
    ...     package = distill_mine
    ...     entry_point = "mine"

    Attributes:
        package: the plugin, a package or a module.
        entry_point: the name under which it is found once it is installed.
        inner: names of its public modules that it does not offer: what others derive from.
        given: for modules that have constructor parameters without a default, values for these.
    """

    package: ClassVar[ModuleType]
    entry_point: ClassVar[str]
    inner: ClassVar[frozenset[str]] = frozenset()
    given: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    def test_every_public_module_of_the_package_is_offered_under_its_name(self) -> None:
        defined = dict(self._defined())
        assert self.inner <= defined.keys(), self.inner - defined.keys()
        outer = {name: kind for name, kind in defined.items() if name not in self.inner}
        assert outer == self._modules()

    def test_losses_are_told_from_auxiliary_modules_by_their_names(self) -> None:
        for name in self._modules():
            assert name.endswith("Loss") == (name in self._offered("losses")), name

    def test_every_constructor_parameter_has_a_default_and_a_type_to_check_against(self) -> None:
        for name, kind in (self._modules() | self._offered("dataset_wrappers")).items():
            hints = typing.get_type_hints(kind.__init__)
            for parameter in _parameters(kind):
                if parameter.name != "dataset":
                    has_default = parameter.default is not parameter.empty
                    is_given = parameter.name in self.given.get(name, {})
                    assert has_default != is_given, (name, parameter.name)
                    assert parameter.name in hints, (name, parameter.name)

    def test_printing_shows_every_constructor_parameter(self) -> None:
        for name, kind in self._modules().items():
            shown = repr(kind(**self.given.get(name, {})))
            for parameter in _parameters(kind):
                assert f"{parameter.name}=" in shown, (name, parameter.name)

    def test_inputs_are_named_one_by_one(self) -> None:
        for name, kind in self._modules().items():
            parameters = inspect.signature(kind.forward).parameters.values()
            kinds = {parameter.kind for parameter in parameters}
            assert kinds == {inspect.Parameter.POSITIONAL_OR_KEYWORD}, name

    def test_setup_takes_what_forward_takes(self) -> None:
        for name, kind in self._modules().items():
            if hasattr(kind, "setup"):
                setup, forward = (
                    [(p.name, p.default) for p in _parameters(method) if p.name != "dataset"]
                    for method in (kind.setup, kind.forward)
                )
                assert setup == forward, name

    def test_the_presets_that_lie_in_the_package_are_offered_and_begin_with_what_they_are(
        self,
    ) -> None:
        presets = self._offered("presets")
        folder = Path(str(self.package.__file__)).with_name("presets")
        assert {file.stem: file for file in folder.glob("*.yaml")} == presets
        for name, file in presets.items():
            assert file.read_text("utf-8").startswith("# "), name

    def test_offers_are_marked_as_hooks(self) -> None:
        prefix = f"{hookspecs.PROJECT}_"
        hooks = [
            hook
            for name, hook in vars(self.package).items()
            if name.startswith(prefix) and inspect.isfunction(hook)
        ]
        assert hooks
        for hook in hooks:
            assert hasattr(hook, f"{prefix}impl"), hook.__name__

    def test_everything_offered_can_be_imported_from_the_package(self) -> None:
        public = getattr(self.package, "__all__", vars(self.package))
        for name in (*public, *self._modules(), *self._offered("dataset_wrappers")):
            assert name in public, name
            assert hasattr(self.package, name), name

    def test_the_entry_point_names_the_package(self) -> None:
        points = entry_points(group=hookspecs.PROJECT)
        found = {point.value for point in points if point.name == self.entry_point}
        if not found:
            raise SkipTest(f"no package with an entry point {self.entry_point} is installed")
        assert found == {self.package.__name__}

    def _offered(self, kind: str) -> dict[str, Any]:
        hook = getattr(self.package, f"{hookspecs.PROJECT}_{kind}", None)
        return dict(hook()) if hook is not None else {}

    def _modules(self) -> dict[str, Any]:
        return self._offered("losses") | self._offered("auxiliary_modules")

    def _defined(self) -> Iterator[tuple[str, Any]]:
        """Yield the public modules that the files of the package define."""
        name = self.package.__name__
        files = pkgutil.iter_modules(getattr(self.package, "__path__", []), f"{name}.")
        for module in (self.package, *(importlib.import_module(file.name) for file in files)):
            for name, kind in vars(module).items():
                own = isinstance(kind, type) and kind.__module__ == module.__name__
                if own and issubclass(kind, nn.Module) and not name.startswith("_"):
                    yield name, kind


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """Return those with a name of their own; torch's modules without a constructor have none."""
    parameters = inspect.signature(function).parameters.values()
    return [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
