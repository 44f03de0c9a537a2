"""The hooks a plugin may implement: each takes nothing and returns ``name -> factory``.

The name in the experiment file is the name of the Python object. Returning a mapping has no side
effect, so a plugin's offer can be tested by comparing a dict. Parameters from the file are checked
against the factory's signature and type hints before anything is built.

A factory that fetches code from elsewhere and runs it has an attribute ``remote_code``: a function
of the parameters in the file that returns what is run as text, e.g. ``github.com/a/b at 0123abc``.
It is called only where the user allows that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import pluggy

PROJECT = "distill"
"""Name of the pluggy project and of the entry-point group plugins register in."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)

Factory = Callable[..., Any]
Components = Mapping[str, Factory]


@runtime_checkable
class PresetFile(Protocol):
    """A file of a package: a ``pathlib.Path``, or what ``importlib.resources.files`` leads to."""

    def read_text(self, encoding: str | None = None) -> str:
        """Return its text."""


Presets = Mapping[str, PresetFile]


@hookspec
def distill_losses() -> Components:  # type: ignore[empty-body]
    """Terms of a criterion: ``(**params) -> nn.Module``; ``forward(<named tensors>) -> scalar``.

    The parameter names of ``forward`` are wired to references; ``student``, ``teacher`` and
    ``targets`` are wired by themselves. Buffers are in the checkpoint, and after each epoch every
    process gets the main one's. A loss that keeps much in buffers of its own has a method
    ``unchanged``: a context in which a call of it changes none of them. Core then neither copies
    nor exchanges them, so they have to change alike on every process, see ``distill.gather``.
    """


@hookspec
def distill_auxiliary_modules() -> Components:  # type: ignore[empty-body]
    """Modules fed from a model's features and trained with the student.

    ``(**params) -> nn.Module``; ``forward(<named tensors>) -> tensor, or a list or mapping of
    tensors``. One that finds its shapes in what it is fed has a method ``setup`` with the
    parameters of ``forward``: it is called once, seeded, with the values of two samples, and builds
    the layers. Losses may have one too. If ``setup`` has a parameter ``dataset``, it is the
    stage's training data, behind its wrappers and before its transforms.
    """


@hookspec
def distill_special_modules() -> Components:  # type: ignore[empty-body]
    """What is put around a model to call it in another way: ``(model, **params) -> nn.Module``.

    ``forward(batch) -> the model's output``. It has no parameters besides the model's. Methods
    ``stage_start()``, ``epoch_start(epoch)``, ``epoch_end(epoch)`` and ``stage_end()``, as far as
    it has them, are called then; epochs count from 0. Another one is built for every evaluation,
    where it is in eval mode.
    """


@hookspec
def distill_model_redesigners() -> Components:  # type: ignore[empty-body]
    """Other forms of a model: ``(model, **params) -> nn.Module`` sharing the parameters it keeps.

    Under ``models`` it may change the model itself, for good; in a stage it must leave it as it
    is, for evaluation and later stages. If its second parameter is called ``auxiliary``, it is
    given the stage's auxiliary modules by name.
    """


@hookspec
def distill_datasets() -> Components:  # type: ignore[empty-body]
    """Data sets: ``(**params) -> Dataset`` whose items are ``(input, target)`` or ``Sample``."""


@hookspec
def distill_dataset_wrappers() -> Components:  # type: ignore[empty-body]
    """What is put around a data set: ``(dataset, **params) -> Dataset``, items as above."""


@hookspec
def distill_transforms() -> Components:  # type: ignore[empty-body]
    """Transforms: ``(**params) -> callable(input) -> input``.

    As a joint transform it is called with input and target and returns both.
    """


@hookspec
def distill_batch_transforms() -> Components:  # type: ignore[empty-body]
    """Transforms of a whole batch: ``(**params) -> callable(inputs, targets) -> the same``.

    What becomes of a sample may depend on it and on the sample before it (the last one is before
    the first), and on what is drawn from torch: so a batch gives the same on however many
    processes it is shared out. MixUp and CutMix of torchvision are made that way.
    """


@hookspec
def distill_batched_transforms() -> Components:  # type: ignore[empty-body]
    """Forms of this plugin's transforms for a whole batch: ``(**params) -> callable or None``.

    Under the name of a transform and with its parameters: ``callable(inputs, draws) -> inputs``,
    which does to a batch of tensors (B, ...) what the transform does to each input, by draws of
    each one's own, float32 (B, ``draws``) on the CPU, uniform in [0, 1). Its attributes: ``draws``,
    how many it needs; ``pointwise``, whether each value comes from one alone, in the same bits
    wherever it is applied; ``takes(value)``, whether it can be done to a batch of such inputs.
    ``None`` says that there is no such form with these parameters.
    """


@hookspec
def distill_samplers() -> Components:  # type: ignore[empty-body]
    """Samplers: ``(dataset, **params) -> Iterable[int]`` with a length.

    torch is seeded for each epoch before one is iterated, alike on all processes, which then share
    its batches out. An index that comes again in an epoch is transformed anew.
    """


@hookspec
def distill_batch_samplers() -> Components:  # type: ignore[empty-body]
    """Batch samplers: ``(dataset, batch_size, **params) -> Iterable[list[int]]`` with a length.

    They give global batches; otherwise as samplers.
    """


@hookspec
def distill_collates() -> Components:  # type: ignore[empty-body]
    """Collate functions: ``(**params) -> callable(list[Sample]) -> Batch``."""


@hookspec
def distill_models() -> Components:  # type: ignore[empty-body]
    """Models: ``(**params) -> nn.Module``.

    The factory is also called under ``torch.device("meta")``, to learn a model's module paths
    without its memory: do not read or download weights there.
    """


@hookspec
def distill_metrics() -> Components:  # type: ignore[empty-body]
    """Metrics of an evaluation: ``(**params) -> Metric`` (update, state, merge, compute, reset).

    ``higher_is_better`` says what is best, ``True`` unless given. A third parameter of ``update``,
    called ``teachers``, is given the teachers' outputs by role.
    """


@hookspec
def distill_optimizers() -> Components:  # type: ignore[empty-body]
    """Optimizers: ``(params, **params) -> torch.optim.Optimizer``.

    One whose class has ``takes_apart``, the name of its parameter that lists terms, finds their
    gradient in ``gradients_apart`` (parameter -> gradient) before each ``step``, and the others' in
    ``parameter.grad``.
    """


@hookspec
def distill_schedulers() -> Components:  # type: ignore[empty-body]
    """Schedulers, stepped each epoch or step: ``(optimizer, **params) -> scheduler``."""


@hookspec
def distill_observers() -> Components:  # type: ignore[empty-body]
    """Observers of a run: ``(**params) -> Observer``, told of run, stage, epoch and step."""


@hookspec
def distill_packers() -> Components:  # type: ignore[empty-body]
    """What ``distill data pack --format NAME`` writes with: ``(size, quality, workers) -> packer``.

    ``packer(dataset, folder, source, progress, on_bad) -> text`` writes every ``Sample`` of a data
    set to a folder and returns what a file writes to read it. ``source``, what the data set is made
    from, is plain data for ``meta.json``, and tells whether the same is packed in an unfinished
    folder; ``progress(done)`` is called after each sample with all that are done, those found there
    too, and ``on_bad(bad)`` once after the last, if any cannot be packed, with why by index: they
    are left out, and what it raises leaves the folder unfinished.
    """


@hookspec
def distill_presets() -> Presets:  # type: ignore[empty-body]
    """Ready experiment files, no factories: each name's ``path of a YAML file`` in the package.

    Its first line is a comment that says in one line what the experiment is.
    """
