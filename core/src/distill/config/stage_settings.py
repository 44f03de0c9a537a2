"""How a stage trains: its data, optimizer, schedulers, evaluation, and what of it must agree."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

from distill import reference
from distill.config.experiment import (
    EMA,
    Component,
    Data,
    Freeze,
    Group,
    Metric,
    Optimizer,
    Scheduler,
    Stage,
)
from distill.config.inheritance import StageDraft
from distill.config.resolver import (
    Resolver,
    component,
    components,
    is_gap,
    optional_component,
)
from distill.config.yaml_document import Path
from distill.errors import did_you_mean


def data(resolver: Resolver, draft: StageDraft) -> Data:
    """Read what the stage trains and validates on; its data sets must exist."""
    values = draft.values["data"]
    validate = values["validate"] or ()
    validate = (validate,) if isinstance(validate, str) else tuple(validate)
    for key, names in (("train", (values["train"],)), ("validate", validate)):
        place = draft.places.get(f"data.{key}", draft.path)
        for name in names:
            resolver.known(place, "data set", name, "datasets")
    base = draft.places["data"]
    parts: dict[str, Any] = {
        key: optional_component(values[key], draft.places.get(f"data.{key}", (*base, key)))
        for key in ("sampler", "batch_sampler")
    }
    mixing = draft.places.get("data.batch_transforms", (*base, "batch_transforms"))
    parts["batch_transforms"] = components(values["batch_transforms"], mixing)
    return Data(**{**values, **parts, "validate": validate}, path=base)


NEEDED = "needed"
"""The word for the default: as much of a model is run as references ask for."""


def around(given: Mapping[str, Any], path: Path) -> dict[str, Component | None]:
    """Read what is made of a model in its role, and what is put around it."""
    redesign = optional_component(given.get("redesign"), (*path, "redesign"))
    if redesign is not None and redesign.type == NEEDED:
        redesign = None
    special = optional_component(given.get("special"), (*path, "special"))
    return {"redesign": redesign, "special": special}


def freeze(draft: StageDraft) -> tuple[Freeze, ...]:
    """Read what stays as it is."""
    entries: list[Freeze] = []
    for number, given in enumerate(draft.values["freeze"]):
        place = (*draft.places["freeze"], number)
        if isinstance(given, str):
            entries.append(Freeze(given, False, place))
            continue
        statistics = given.get("statistics", False)
        places = [(*place, "match", n) for n in range(len(given["match"]))]
        entries += [
            Freeze(match, statistics, at) for match, at in zip(given["match"], places, strict=True)
        ]
    return tuple(entries)


def optimizer(draft: StageDraft) -> Optimizer:
    """Read the optimizer and its groups of parameters."""
    given, path = draft.values["optimizer"], draft.places["optimizer"]
    groups = tuple(
        Group(tuple(group["match"]), group.get("params", {}), (*path, "groups", number))
        for number, group in enumerate(given.get("groups", []))
    )
    return Optimizer(component(given, path), groups, tuple(given.get("no_decay", [])))


def schedulers(resolver: Resolver, draft: StageDraft) -> tuple[Scheduler, ...]:
    """Read the row of schedulers: several follow one another, or all of them act at once."""
    given, path = draft.values["scheduler"], draft.places.get("scheduler", ())
    if not given:
        return ()
    if isinstance(given, Mapping):
        given, places = [given], [path]
    else:
        places = [(*path, number) for number in range(len(given))]
    row = tuple(
        Scheduler(
            component(one, place), one.get("unit", "epochs"), one.get("until"), one.get("watch")
        )
        for one, place in zip(given, places, strict=True)
    )
    until = [entry.until is not None for entry in row]
    if until[-1]:
        message = "the last scheduler, or the only one, goes on to the end: it takes no 'until'"
        resolver.fault((*row[-1].component.path, "until"), message)
    elif len(set(until[:-1])) > 1:
        message = "give all but the last 'until', where the next one takes over, or none: then all "
        resolver.fault(path, message + "act at once")
    for before, after in pairwise(row[:-1]):
        alike = before.unit == after.unit and before.until is not None and after.until is not None
        if alike and after.until <= before.until:  # type: ignore[operator]
            message = f"{after.until} {after.unit} are over when the one before it ends"
            resolver.fault((*after.component.path, "until"), message)
    return row


def ema(draft: StageDraft) -> EMA | None:
    """Read the moving average."""
    given = draft.values["ema"]
    return EMA(given["decay"], given.get("warmup", False)) if given else None


def metrics(resolver: Resolver, given: Iterable[Any], path: Path) -> tuple[Metric, ...]:
    """Read a list of metrics; two of one name are a fault."""
    read: list[Metric] = []
    for number, one in enumerate(given):
        part = component(one, (*path, number))
        named = one.get("name") if isinstance(one, Mapping) else None
        metric = Metric(part, named or _metric_name(part.type, part.params))
        if any(metric.name == other.name for other in read):
            resolver.fault(part.path, f"two metrics are called '{metric.name}'; give one a 'name'")
        read.append(metric)
    return tuple(read)


def _metric_name(kind: str, params: Mapping[str, Any]) -> str:
    # A slash parts a metric's name from that of its part.
    given = ", ".join(f"{key}={value}" for key, value in params.items()).replace("/", "|")
    return f"{kind}({given})" if given else kind


def check_settings(resolver: Resolver, draft: StageDraft, stage: Stage) -> None:
    """Fault settings that do not go together."""
    _check_samplers(resolver, draft, stage)
    _check_measuring(resolver, draft, stage)
    _check_compiled(resolver, stage)
    _check_views(resolver, draft, stage)
    _check_stores(resolver, stage)


def _check_samplers(resolver: Resolver, draft: StageDraft, stage: Stage) -> None:
    if stage.data.sampler and stage.data.batch_sampler:
        place = draft.places.get("data.batch_sampler", draft.path)
        resolver.fault(place, "give either 'sampler' or 'batch_sampler', not both")
    if stage.data.batch_sampler and stage.data.drop_last:
        place = draft.places.get("data.drop_last", draft.path)
        resolver.fault(place, "a batch sampler itself says which batches there are")


def _check_stores(resolver: Resolver, stage: Stage) -> None:
    mixing = stage.data.batch_transforms if stage.data.views is None else ()
    for teacher in stage.teachers.values():
        if teacher.store is not None and mixing:
            message = (
                f"{mixing[0].type} draws in every epoch, so that the teacher never sees an image "
                "twice and nothing stored of it could be used again; write data: {views: 4} to "
                "draw 4 views of each sample once and for all, or take out batch_transforms"
            )
            resolver.fault((*teacher.path, "store"), message)
        if teacher.store is not None and teacher.redesign is not None:
            message = (
                f"is for the model as it is: {teacher.redesign.type} may add what the store does "
                "not know of. Redesign the model under 'models', or leave 'redesign' out: it then "
                "runs as far as it is needed"
            )
            resolver.fault((*teacher.path, "store"), message)
        if teacher.store is not None and stage.parallel == "fsdp":
            message = (
                "under parallel: fsdp all processes have to run a teacher together, which with a "
                "store each does only where rows are missing; use parallel: ddp"
            )
            resolver.fault((*teacher.path, "store"), message)


def _check_views(resolver: Resolver, draft: StageDraft, stage: Stage) -> None:
    data = stage.data
    if data.views_at_once > 1 and (data.views or 0) % data.views_at_once:
        place = draft.places.get("data.views_at_once", draft.path)
        resolver.fault(place, f"'views' must be a multiple of it, and is {data.views}")
    if data.views_at_once > 1 and data.views is None:
        place = draft.places.get("data.views_at_once", draft.path)
        resolver.fault(place, "needs data.views: how many there are of each sample")
    for key in ("sampler", "batch_sampler"):
        component = getattr(data, key)
        place = draft.places.get(f"data.{key}", draft.path)
        if component and data.views and (data.batch_transforms or data.views_at_once > 1):
            other = "batch_transforms" if data.batch_transforms else "views_at_once"
            message = (
                f"together with data.views and data.{other} the order is distill's own, in which "
                "each view of a sample comes once"
            )
            resolver.fault(place, message)


def _check_measuring(resolver: Resolver, draft: StageDraft, stage: Stage) -> None:
    if stage.keep == "ema" and stage.ema is None:
        resolver.fault(draft.places["keep"], "'ema' needs the key 'ema' with its decay")
    if is_gap(resolver, draft, "data.validate"):
        return
    if stage.ema is not None and "ema" in stage.data.validate[1:]:
        place = draft.places.get("data.validate", stage.path)
        resolver.fault(place, "measurements on a data set 'ema' would be called as the average's")
    if stage.keep == "best" and not (stage.data.validate and stage.metrics):
        what = "metrics" if stage.data.validate else "data.validate"
        resolver.fault(draft.places["keep"], f"'best' needs {what} to measure by")
    if not is_gap(resolver, draft, "metrics"):
        _check_measured(resolver, stage, stage.best_by, draft.places.get("best_by", stage.path))
        for entry in stage.schedulers:
            place = (*entry.component.path, "watch")
            _check_measured(resolver, stage, entry.watch, place)


def _check_measured(resolver: Resolver, stage: Stage, name: str | None, place: Path) -> None:
    """Fault the name of a metric that the stage does not measure."""
    names = measured_names(stage)
    if name is None or name.partition("/")[0] in names:
        return
    if not stage.data.validate:
        resolver.fault(place, "needs data.validate to measure on")
        return
    hint = did_you_mean(name, names) or f" (measured: {', '.join(names)})"
    resolver.fault(place, f"stage '{stage.name}' measures no '{name}'{hint}")


def measured_names(stage: Stage) -> list[str]:
    """Return the names of what a stage measures: of further data sets and the average, prefixed."""
    names = [
        f"{prefix}{metric.name}"
        for prefix in ("", *(f"{dataset}." for dataset in stage.data.validate[1:]))
        for metric in stage.metrics
    ]
    averaged = [f"ema.{name}" for name in names] if stage.ema else []
    return [*names, *averaged] if stage.data.validate else []


def _check_compiled(resolver: Resolver, stage: Stage) -> None:
    roles = [reference.STUDENT, *stage.teachers]
    for role in stage.compile:
        if role not in roles:
            place = stage.places.get("compile", stage.path)
            hint = did_you_mean(role, roles) or f" (there are: {', '.join(roles)})"
            resolver.fault(place, f"stage '{stage.name}' has no model in the role '{role}'{hint}")
