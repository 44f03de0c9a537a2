"""Plain data to Experiment: defaults, inheritance between stages, and names that must exist."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from typing import Any

from distill import reference
from distill.config.experiment import (
    Auxiliary,
    Component,
    Data,
    Dataset,
    Experiment,
    Gaps,
    Model,
    Stage,
    Student,
    Teacher,
    Term,
    Test,
    Wired,
)
from distill.config.inheritance import (
    DATA_REQUIRED,
    DEFAULT_METRICS,
    STAGE_REQUIRED,
    StageDraft,
    inherit,
)
from distill.config.yaml_document import Document, Path, path_text
from distill.errors import Fault, did_you_mean

DEFAULT_OBSERVERS = ["Console", "TensorBoard", "ResultFiles"]
EXPERIMENT_DEFAULTS: dict[str, Any] = {
    "device": "auto",
    "log_every": 50,
    "test": None,
    "observers": DEFAULT_OBSERVERS,
}


@dataclass
class _Resolver:
    document: Document
    data: Mapping[str, Any]
    gaps: Gaps
    faults: list[Fault] = field(default_factory=list)
    missing: set[str] = field(default_factory=set)

    def fault(self, path: Path, message: str) -> None:
        text = path_text(path, self.document.data)
        self.faults.append(Fault(message, text, self.document.locate(path)))

    def known(self, path: Path, what: str, name: str, section: str) -> None:
        """Fault a name that a section of the file does not define."""
        names = list(self.data[section])
        if name and name not in names and not self.gaps.explain((section,), name):
            self.unknown(path, what, name, names)

    def unknown(self, path: Path, what: str, name: str, names: Iterable[str]) -> None:
        hint = did_you_mean(name, names) or f" (defined: {', '.join(names) or 'none'})"
        self.fault(path, f"there is no {what} '{name}' in this file{hint}")

    def reference(self, path: Path, text: str) -> reference.Reference | None:
        try:
            return reference.parse(text)
        except ValueError as error:
            self.fault(path, str(error))
            self.gaps = Gaps(self.gaps.paths | {path})
            return None


def resolve(
    document: Document, given: Mapping[str, Any], gaps: Gaps
) -> tuple[Experiment, list[Fault]]:
    """Build the experiment from data that fits the schema.

    Args:
        document: the file.
        given: its data, as far as it has the schema's form.
        gaps: what of it was left out, the consequences of which are no faults of their own.

    Returns:
        The experiment, which can be run if there are no faults, and the faults.
    """
    resolver = _Resolver(document, given, gaps)
    data = {**EXPERIMENT_DEFAULTS, **given}
    drafts = inherit(given["stages"])
    for draft in drafts:
        _fill_in(resolver, draft)
    _check_stages(resolver)
    stages = tuple(_stage(resolver, draft) for draft in drafts)
    test = _test(resolver, data["test"])
    seeds = _seeds(resolver)
    experiment = Experiment(
        name=data["name"],
        seeds=seeds,
        device=data["device"],
        log_every=data["log_every"],
        datasets={k: _dataset(v, ("datasets", k)) for k, v in data["datasets"].items()},
        models={k: _model(v, ("models", k)) for k, v in data["models"].items()},
        stages=stages,
        test=test,
        observers=_components(data["observers"], ("observers",)),
        resolved={
            **{k: v for k, v in data.items() if not k.startswith("x-") and k != "seed"},
            "seeds": list(seeds),
            "stages": [_resolved_stage(draft) for draft in drafts],
        },
        document=document,
        gaps=resolver.gaps,
    )
    return experiment, resolver.faults


def _resolved_stage(draft: StageDraft) -> dict[str, Any]:
    """Return a stage with all filled in but modules it carries on: written, they were new."""
    carried = {
        key
        for key in ("auxiliary", "criterion")
        if draft.origins.get(key, draft.name) != draft.name
    }
    return {"name": draft.name, **{k: v for k, v in draft.values.items() if k not in carried}}


def _fill_in(resolver: _Resolver, draft: StageDraft) -> None:
    """Fault what a stage must have and has not, once a file, and let something stand in for it."""
    values = draft.values
    missing = [key for key in STAGE_REQUIRED if key not in values]
    for key in missing:
        values[key] = STAGE_REQUIRED[key]
        draft.places.setdefault(key, draft.path)
    lacking = [key for key in DATA_REQUIRED if key not in values["data"]]
    values["data"] = {**DATA_REQUIRED, **values["data"]}
    missing += [] if "data" in missing else [f"data.{key}" for key in lacking]
    for key in missing:
        if key not in resolver.missing and not _is_gap(resolver, draft, key):
            resolver.fault(draft.path, f"'{key}' is missing, and no stage before this one gives it")
        resolver.missing.add(key)


def _is_gap(resolver: _Resolver, draft: StageDraft, key: str) -> bool:
    """Whether the stage, or one it inherits from, would have ``key`` but for a fault."""
    *around, last = key.split(".")
    earlier = range(int(draft.path[1]) + 1)
    return any(resolver.gaps.explain(("stages", n, *around), last) for n in earlier)


def _check_stages(resolver: _Resolver) -> None:
    names = [stage["name"] for stage in resolver.data["stages"]]
    for number, stage in enumerate(resolver.data["stages"]):
        path: Path = ("stages", number)
        if stage["name"] in names[:number]:
            resolver.fault((*path, "name"), f"two stages are called '{stage['name']}'")
        if "teacher" in stage and "teachers" in stage:
            resolver.fault((*path, "teachers"), "give either 'teacher' or 'teachers', not both")


def _stage(resolver: _Resolver, draft: StageDraft) -> Stage:
    values, places = draft.values, draft.places
    teachers = _teachers(resolver, draft)
    student = Student(values["student"]["model"], places["student"])
    resolver.known((*places["student"], "model"), "model", student.model, "models")
    _check_roles(resolver, draft, teachers, student)
    stage = Stage(
        name=draft.name,
        path=draft.path,
        epochs=values["epochs"],
        data=_data(resolver, draft),
        teachers=teachers,
        student=student,
        auxiliary=_auxiliary(resolver, draft),
        freeze=tuple(values["freeze"]),
        criterion=_criterion(resolver, draft),
        optimizer=_component(values["optimizer"], places["optimizer"]),
        scheduler=_component(values["scheduler"], places["scheduler"])
        if values["scheduler"]
        else None,
        precision=values["precision"],
        metrics=_components(values["metrics"], places.get("metrics", ())),
        keep=values["keep"],
        sync_batchnorm=values["sync_batchnorm"],
        origins=draft.origins,
        places=places,
    )
    unmeasured = stage.data.validate is None and not _is_gap(resolver, draft, "data.validate")
    if stage.keep == "best" and unmeasured:
        resolver.fault(places["keep"], "'best' needs data.validate to measure by")
    _check_owners(resolver, draft, stage)
    return stage


def _teachers(resolver: _Resolver, draft: StageDraft) -> dict[str, Teacher]:
    teachers = {}
    base = draft.places.get("teachers", ())
    for role, given in draft.values["teachers"].items():
        path = draft.places.get(f"teachers.{role}", (*base, role))
        teachers[role] = Teacher(
            given["model"], given.get("mode", "eval"), given.get("min_accuracy"), path
        )
        resolver.known((*path, "model"), "model", given["model"], "models")
        unmeasured = draft.values["data"].get("validate") is None
        unmeasured = unmeasured and not _is_gap(resolver, draft, "data.validate")
        if teachers[role].min_accuracy is not None and unmeasured:
            resolver.fault((*path, "min_accuracy"), "needs data.validate to measure on")
    return teachers


def _check_roles(
    resolver: _Resolver, draft: StageDraft, teachers: Mapping[str, Teacher], student: Student
) -> None:
    for role, teacher in teachers.items():
        if role in reference.RESERVED:
            resolver.fault(teacher.path, f"a teacher cannot be called '{role}'")
        if teacher.model == student.model and student.model:
            resolver.fault(
                (*teacher.path, "model"),
                f"'{student.model}' is this stage's student too; define a second model",
            )
    for name in draft.values["auxiliary"]:
        if name in reference.RESERVED or name in teachers:
            path = (*draft.places["auxiliary"], name)
            resolver.fault(path, f"'{name}' already names another value of this stage")


def _data(resolver: _Resolver, draft: StageDraft) -> Data:
    values = draft.values["data"]
    for key in ("train", "validate"):
        if values[key] is not None:
            place = draft.places.get(f"data.{key}", draft.path)
            resolver.known(place, "data set", values[key], "datasets")
    return Data(**values, path=draft.places["data"])


def _auxiliary(resolver: _Resolver, draft: StageDraft) -> dict[str, Auxiliary]:
    """Build the auxiliary modules in an order in which each one's inputs exist."""
    base = draft.places.get("auxiliary", ())
    modules = {
        name: Auxiliary(_component(given, (*base, name)), _inputs(resolver, given, (*base, name)))
        for name, given in draft.values["auxiliary"].items()
    }
    needs = {
        name: {r.owner for r in module.inputs.values() if r.owner in modules}
        for name, module in modules.items()
    }
    try:
        return {name: modules[name] for name in TopologicalSorter(needs).static_order()}
    except CycleError as error:
        circle = " -> ".join(reversed(error.args[1]))
        resolver.fault(base, f"these modules feed each other in a circle: {circle}")
        return modules


def _criterion(resolver: _Resolver, draft: StageDraft) -> dict[str, Term]:
    base = draft.places["criterion"]
    return {
        name: Term(
            _component(given, (*base, name)),
            _inputs(resolver, given, (*base, name)),
            float(given.get("weight", 1.0)),
        )
        for name, given in draft.values["criterion"].items()
    }


def _inputs(
    resolver: _Resolver, given: Mapping[str, Any], path: Path
) -> dict[str, reference.Reference]:
    parsed = {
        key: resolver.reference((*path, "inputs", key), text)
        for key, text in given.get("inputs", {}).items()
    }
    return {key: value for key, value in parsed.items() if value is not None}


def _check_owners(resolver: _Resolver, draft: StageDraft, stage: Stage) -> None:
    """Fault references to models and modules that this stage does not have."""
    owners = list(dict.fromkeys([*reference.RESERVED, *stage.teachers, *stage.auxiliary]))
    parts: list[Wired] = [*stage.auxiliary.values(), *stage.criterion.values()]
    for part in parts:
        for key, ref in part.inputs.items():
            if ref.owner not in owners and not _is_lost(resolver, draft, ref.owner):
                hint = did_you_mean(ref.owner, owners) or f" (there are: {', '.join(owners)})"
                where = f"stage '{draft.name}' has no '{ref.owner}'"
                resolver.fault((*part.component.path, "inputs", key), where + hint)


def _is_lost(resolver: _Resolver, draft: StageDraft, owner: str) -> bool:
    """Whether a fault hides what the stage calls ``owner``."""
    sections = ("teacher", "teachers", "auxiliary")
    places = [*sections, f"teachers.{owner}", f"auxiliary.{owner}"]
    return any(_is_gap(resolver, draft, place) for place in places)


def _test(resolver: _Resolver, given: Mapping[str, Any] | None) -> Test | None:
    if given is None:
        return None
    path: Path = ("test",)
    resolver.known((*path, "dataset"), "data set", given["dataset"], "datasets")
    if "baseline" in given:
        _check_baseline(resolver, given["baseline"])
    metrics = _components(given.get("metrics", DEFAULT_METRICS), (*path, "metrics"))
    return Test(given["dataset"], metrics, given.get("baseline"), path)


def _check_baseline(resolver: _Resolver, name: str) -> None:
    stages = [stage["name"] for stage in resolver.data["stages"]]
    unnamed = [n for n in range(len(stages)) if resolver.gaps.explain(("stages", n), "name")]
    if name not in stages and not unnamed:
        resolver.unknown(("test", "baseline"), "stage", name, stages)


def _seeds(resolver: _Resolver) -> tuple[int, ...]:
    data = resolver.data
    if "seed" in data and "seeds" in data:
        resolver.fault(("seeds",), "give either 'seed' or 'seeds', not both")
    return tuple(data.get("seeds", [data.get("seed", 0)]))


def _dataset(given: Mapping[str, Any], path: Path) -> Dataset:
    transforms = _components(given.get("transforms", []), (*path, "transforms"))
    return Dataset(_component(given, path), transforms)


def _model(given: Mapping[str, Any], path: Path) -> Model:
    return Model(_component(given, path), given.get("checkpoint"), given.get("seed", 0))


def _components(given: Iterable[Any], path: Path) -> tuple[Component, ...]:
    return tuple(_component(item, (*path, number)) for number, item in enumerate(given))


def _component(given: Mapping[str, Any] | str, path: Path) -> Component:
    if isinstance(given, str):
        return Component(given, {}, path)
    return Component(given["type"], given.get("params", {}), path)
