"""The module paths of a model with what goes in and out, to choose references from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from distill.config.experiment import Experiment
from distill.config.yaml_document import override, parse
from distill.data.batch import map_tensors
from distill.data.loader import sample_batch
from distill.errors import DistillError, UsageError, did_you_mean
from distill.model.wiring import describe
from distill.registry import Registry
from distill.signature import bind
from distill.training.build import Builder, remote_code_refusal


@dataclass(frozen=True)
class Row:
    """One call of a submodule: what it gives and takes, and its parameters with those inside it.

    The path is as in a reference; behind it stands ``@n`` where the submodule runs several times.
    """

    path: str
    kind: str
    output: str
    input: str
    parameters: int


@dataclass(frozen=True)
class Inspected:
    """A model by name, what it was called with, and its submodules in order."""

    name: str
    inputs: str
    output: str
    rows: Sequence[Row]


def inspect_model(name: str, model: nn.Module, inputs: Any) -> Inspected:
    """Run the model once and note every submodule's shapes, for each of its calls.

    Raises:
        UsageError: if the model cannot take these inputs.
    """
    seen: dict[str, list[tuple[str, str]]] = {}
    modules = [(path, module) for path, module in model.named_modules() if path]
    handles = [module.register_forward_hook(_recorder(seen, path)) for path, module in modules]
    try:
        with torch.no_grad():
            output = model.eval()(inputs)
    except Exception as error:  # a model is foreign code
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(f"{name} cannot take inputs {describe(inputs)}: {text}") from error
    finally:
        for handle in handles:
            handle.remove()
    rows = [
        Row(path + call, type(module).__name__, *shapes, _size(module))
        for path, module in modules
        for call, shapes in _calls(seen.get(path, [("did not run", "")]))
    ]
    return Inspected(name, describe(inputs), describe(output), rows)


def named_model(
    registry: Registry,
    name: str,
    params: Sequence[str],
    shape: Sequence[int] | None,
    *,
    allow_remote_code: bool = False,
) -> Inspected:
    """Inspect a model that a plugin brings.

    Raises:
        UsageError: if there is no such model, a parameter does not fit, no shape is given, or the
            model runs code from elsewhere without being allowed to.
    """
    if shape is None:
        raise UsageError("give the shape of one input, e.g. --input 3,224,224")
    factory = registry.find("models", name).factory
    given = override(parse("{}"), params).data
    binding = bind(factory, given)
    if binding.problems:
        raise UsageError("; ".join(problem.message for problem in binding.problems))
    refusal = None if allow_remote_code else remote_code_refusal(name, factory, given)
    if refusal is not None:
        raise UsageError(refusal)
    try:
        return _inspect(name, lambda: factory(**binding.arguments), torch.zeros(2, *shape))
    except DistillError:
        raise
    except Exception as error:
        raise UsageError(f"{name} cannot be built: {error}") from error


def models_of_file(
    experiment: Experiment,
    registry: Registry,
    only: str | None,
    shape: Sequence[int] | None,
    *,
    allow_remote_code: bool = False,
) -> list[Inspected]:
    """Inspect the models of a file, with inputs of its own training data or of a given shape."""
    if only is not None and only not in experiment.models:
        hint = did_you_mean(only, experiment.models)
        raise UsageError(f"there is no model '{only}' in {experiment.document.file}{hint}")
    # What weights a model has does not matter, and they may not be there yet.
    bare = {name: replace(model, checkpoint=None) for name, model in experiment.models.items()}
    experiment = replace(experiment, models=bare)
    builder = Builder(experiment, registry, allow_remote_code=allow_remote_code)
    if shape is None:
        source = builder.source(experiment.stages[0].data.train)
        inputs = sample_batch(source, 2, experiment.seeds[0]).to("cpu").inputs
    else:
        inputs = torch.zeros(2, *shape)
    chosen = [name for name in experiment.models if only in (None, name)]
    seed = experiment.seeds[0]
    return [_inspect(name, partial(builder.model, name, seed), inputs) for name in chosen]


def _inspect(name: str, build: Callable[[], nn.Module], inputs: Any) -> Inspected:
    """Inspect without memory or weights if the model can be run so, else with both."""
    try:
        with torch.device("meta"):
            return inspect_model(name, build(), map_tensors(lambda t: t.to("meta"), inputs))
    except Exception:
        return inspect_model(name, build(), inputs)


def table(inspected: Inspected) -> str:
    """Return the submodules as lines of text, the longest columns aligned."""
    header = Row("path", "class", "output", "input", 0)
    rows = [header, *inspected.rows]
    widths = [max(len(getattr(row, column)) for row in rows) for column in _COLUMNS]
    lines = [f"{inspected.name}: {inspected.inputs} -> {inspected.output}"]
    for row in rows:
        cells = [getattr(row, c).ljust(w) for c, w in zip(_COLUMNS, widths, strict=True)]
        count = "parameters" if row is header else f"{row.parameters:,}"
        lines.append(f"  {'  '.join(cells)}  {count:>11}")
    return "\n".join(lines)


_COLUMNS = ("path", "kind", "output", "input")


def _recorder(seen: dict[str, list[tuple[str, str]]], path: str) -> Callable[..., None]:
    def record(_module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        shapes = (describe(output), describe(args[0]) if args else "")
        seen.setdefault(path, []).append(shapes)

    return record


def _calls(shapes: list[tuple[str, str]]) -> list[tuple[str, tuple[str, str]]]:
    """Return each call's suffix and shapes; a single call needs no suffix."""
    if len(shapes) == 1:
        return [("", shapes[0])]
    return [(f"@{number}", one) for number, one in enumerate(shapes)]


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
