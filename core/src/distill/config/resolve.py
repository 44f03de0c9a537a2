"""Plain data to Experiment: defaults, inheritance between stages, and names that must exist."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from distill import reference
from distill.config.auxiliaries import Auxiliaries, auxiliaries, is_written
from distill.config.experiment import (
    Clip,
    Dataset,
    Evaluate,
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
    STAGE_DEFAULTS,
    STAGE_REQUIRED,
    StageDraft,
    inherit,
)
from distill.config.resolver import (
    Resolver,
    component,
    components,
    inputs,
    is_gap,
    optional_component,
)
from distill.config.stage_settings import (
    around,
    check_settings,
    data,
    ema,
    freeze,
    metrics,
    optimizer,
    schedulers,
)
from distill.config.teaching import fast, store
from distill.config.yaml_document import Document, Path
from distill.errors import Fault, did_you_mean
from distill.reference import each_reference
from distill.weight_schedule import WeightSchedule

DEFAULT_OBSERVERS = ["Console", "TensorBoard", "ResultFiles"]
EXPERIMENT_DEFAULTS: dict[str, Any] = {
    "device": "auto",
    "log_every": 50,
    "test": None,
    "observers": DEFAULT_OBSERVERS,
}


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
    resolver = Resolver(document, given, gaps)
    filled = {**EXPERIMENT_DEFAULTS, **given}
    drafts = inherit(given["stages"])
    for draft in drafts:
        _fill_in(resolver, draft)
    _check_stages(resolver)
    stages = _stages(resolver, drafts)
    test = _test(resolver, filled["test"])
    seeds = _seeds(resolver)
    experiment = Experiment(
        name=filled["name"],
        seeds=seeds,
        device=filled["device"],
        log_every=filled["log_every"],
        datasets={k: _dataset(v, ("datasets", k)) for k, v in filled["datasets"].items()},
        models={k: _model(v, ("models", k)) for k, v in filled["models"].items()},
        stages=stages,
        test=test,
        observers=components(filled["observers"], ("observers",)),
        resolved={
            **{k: v for k, v in filled.items() if not k.startswith("x-") and k != "seed"},
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


def _fill_in(resolver: Resolver, draft: StageDraft) -> None:
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
        if key not in resolver.missing and not is_gap(resolver, draft, key):
            resolver.fault(draft.path, f"'{key}' is missing, and no stage before this one gives it")
        resolver.missing.add(key)


def _check_stages(resolver: Resolver) -> None:
    names = [stage["name"] for stage in resolver.data["stages"]]
    for number, stage in enumerate(resolver.data["stages"]):
        path: Path = ("stages", number)
        if stage["name"] in names[:number]:
            resolver.fault((*path, "name"), f"two stages are called '{stage['name']}'")
        if "teacher" in stage and "teachers" in stage:
            resolver.fault((*path, "teachers"), "give either 'teacher' or 'teachers', not both")


def _stages(resolver: Resolver, drafts: Iterable[StageDraft]) -> tuple[Stage, ...]:
    stages: list[Stage] = []
    written: dict[str, Auxiliaries] = {}
    for draft in drafts:
        modules = auxiliaries(resolver, draft, written)
        if is_written(draft):
            written[draft.name] = modules
        stages.append(_stage(resolver, draft, modules))
    return tuple(stages)


def _stage(resolver: Resolver, draft: StageDraft, modules: Auxiliaries) -> Stage:
    values, places = draft.values, draft.places
    teachers = _teachers(resolver, draft)
    place = places["student"]
    student = Student(values["student"]["model"], place, **around(values["student"], place))
    resolver.known((*places["student"], "model"), "model", student.model, "models")
    _check_roles(resolver, draft, teachers, student)
    stage = Stage(
        name=draft.name,
        path=draft.path,
        epochs=values["epochs"],
        data=data(resolver, draft),
        teachers=teachers,
        student=student,
        auxiliary=modules,
        freeze=freeze(draft),
        criterion=_criterion(resolver, draft),
        optimizer=optimizer(draft),
        schedulers=schedulers(resolver, draft),
        clip=Clip(**(values["clip"] or {})),
        precision=values["precision"],
        channels_last=values["channels_last"],
        compile=tuple(values["compile"]),
        ema=ema(draft),
        parallel=values["parallel"],
        sync_batchnorm=values["sync_batchnorm"],
        term_gradients=values["term_gradients"],
        evaluate=Evaluate(**{**STAGE_DEFAULTS["evaluate"], **values["evaluate"]}),
        metrics=metrics(resolver, values["metrics"], places.get("metrics", ())),
        best_by=values["best_by"],
        keep=values["keep"],
        origins=draft.origins,
        places=places,
    )
    check_settings(resolver, draft, stage)
    _check_peers(resolver, stage)
    _check_owners(resolver, draft, stage)
    return stage


def _teachers(resolver: Resolver, draft: StageDraft) -> dict[str, Teacher]:
    teachers = {}
    base = draft.places.get("teachers", ())
    for role, given in draft.values["teachers"].items():
        path = draft.places.get(f"teachers.{role}", (*base, role))
        teachers[role] = Teacher(
            given["model"],
            path,
            **around(given, path),
            mode=given.get("mode", "eval"),
            min_accuracy=given.get("min_accuracy"),
            control=given.get("control"),
            store=store(given.get("store")),
            fast=fast(given.get("fast")),
        )
        resolver.known((*path, "model"), "model", given["model"], "models")
        unmeasured = draft.values["data"].get("validate") is None
        unmeasured = unmeasured and not is_gap(resolver, draft, "data.validate")
        if teachers[role].min_accuracy is not None and unmeasured:
            resolver.fault((*path, "min_accuracy"), "needs data.validate to measure on")
        for key in ("store", "fast"):
            if getattr(teachers[role], key) is not None and teachers[role].mode == "train":
                message = (
                    "is for a teacher in mode: eval, whose outputs depend on the sample alone; "
                    f"take out mode: train, or {key}"
                )
                resolver.fault((*path, key), message)
        _check_without_effect(resolver, given, path)
    return teachers


def _check_without_effect(resolver: Resolver, given: Mapping[str, Any], path: Path) -> None:
    """Fault what a teacher's keys say and nothing follows from."""
    kept, fast_parts = given.get("store"), given.get("fast")
    is_known = not resolver.gaps.explain((*path, "store"), "encoding")
    if isinstance(kept, Mapping) and is_known and kept.get("encoding") != "top_k":
        for key in {"top", "temperature"} & kept.keys():
            resolver.fault((*path, "store", key), "is for encoding: top_k, which is not asked for")
    place = (*path, "fast")
    if fast_parts == {} and not any(gap[:-1] == place for gap in resolver.gaps.paths):
        message = "names nothing to do; write true, or parts such as {precision: bf16}"
        resolver.fault(place, message)


def _check_roles(
    resolver: Resolver, draft: StageDraft, teachers: Mapping[str, Teacher], student: Student
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


def _check_peers(resolver: Resolver, stage: Stage) -> None:
    """Fault a model that trains beside the student and has another role in the stage too."""
    roles = {role.model: f"the {name}" for name, role in stage.roles.items()}
    for name, model in stage.peers.items():
        place = stage.auxiliary[name].component.path
        if model in roles:
            message = (
                f"'{model}' is {roles[model]} of stage '{stage.name}' already; define a second "
                "model, or leave this one out of the stage's 'auxiliary'"
            )
            key = (*place, "model")
            is_written = key in resolver.document.locations
            resolver.fault(key if is_written else place, message)
        roles.setdefault(model, f"the module '{name}'")
        if name == "ema" or name in stage.data.validate[1:]:
            message = "its measurements would be called as others are; give it another name"
            resolver.fault(place, message)


def _criterion(resolver: Resolver, draft: StageDraft) -> dict[str, Term]:
    base = draft.places["criterion"]
    return {
        name: Term(
            component(given, (*base, name)),
            inputs(resolver, given, (*base, name)),
            _weight(given.get("weight", 1.0)),
            given.get("adapter") == "auto",
        )
        for name, given in draft.values["criterion"].items()
    }


def _weight(given: float | Mapping[str, Any]) -> float | WeightSchedule:
    return WeightSchedule(**given) if isinstance(given, Mapping) else float(given)


def _check_owners(resolver: Resolver, draft: StageDraft, stage: Stage) -> None:
    """Fault references to models and modules that this stage does not have."""
    owners = list(dict.fromkeys([*reference.RESERVED, *stage.teachers, *stage.auxiliary]))
    parts: list[Wired] = [*stage.auxiliary.values(), *stage.criterion.values()]
    for part in parts:
        for key, ref in each_reference(part.inputs):
            place = (*part.component.path, "inputs", *key)
            if ref.owner in owners or place in resolver.lost:
                continue
            if not _is_hidden(resolver, draft, ref.owner):
                hint = did_you_mean(ref.owner, owners) or f" (there are: {', '.join(owners)})"
                where = f"stage '{draft.name}' has no '{ref.owner}'"
                resolver.fault(place, where + hint)
                resolver.lost.add(place)


def _is_hidden(resolver: Resolver, draft: StageDraft, owner: str) -> bool:
    """Whether a fault hides what the stage calls ``owner``."""
    sections = ("teacher", "teachers", "auxiliary")
    places = [*sections, f"teachers.{owner}", f"auxiliary.{owner}"]
    return any(is_gap(resolver, draft, place) for place in places)


def _test(resolver: Resolver, given: Mapping[str, Any] | None) -> Test | None:
    if given is None:
        return None
    path: Path = ("test",)
    resolver.known((*path, "dataset"), "data set", given["dataset"], "datasets")
    if "baseline" in given:
        _check_baseline(resolver, given["baseline"])
    measured = metrics(resolver, given.get("metrics", DEFAULT_METRICS), (*path, "metrics"))
    return Test(given["dataset"], measured, given.get("baseline"), path)


def _check_baseline(resolver: Resolver, name: str) -> None:
    stages = [stage["name"] for stage in resolver.data["stages"]]
    unnamed = [n for n in range(len(stages)) if resolver.gaps.explain(("stages", n), "name")]
    if name not in stages and not unnamed:
        resolver.unknown(("test", "baseline"), "stage", name, stages)


def _seeds(resolver: Resolver) -> tuple[int, ...]:
    given = resolver.data
    if "seed" in given and "seeds" in given:
        resolver.fault(("seeds",), "give either 'seed' or 'seeds', not both")
    return tuple(given.get("seeds", [given.get("seed", 0)]))


def _dataset(given: Mapping[str, Any], path: Path) -> Dataset:
    return Dataset(
        component(given, path),
        components(given.get("wrappers", []), (*path, "wrappers")),
        components(given.get("joint_transforms", []), (*path, "joint_transforms")),
        components(given.get("transforms", []), (*path, "transforms")),
        optional_component(given.get("collate"), (*path, "collate")),
    )


def _model(given: Mapping[str, Any], path: Path) -> Model:
    redesign = optional_component(given.get("redesign"), (*path, "redesign"))
    return Model(component(given, path), given.get("checkpoint"), given.get("seed", 0), redesign)
