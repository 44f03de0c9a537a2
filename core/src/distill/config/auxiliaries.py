"""A stage's auxiliary modules: new ones, modules of models, peers, and those of stages before."""

from __future__ import annotations

from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter
from typing import Any

from distill.config.experiment import Auxiliary, Component
from distill.config.inheritance import StageDraft
from distill.config.resolver import Resolver, component, inputs
from distill.config.yaml_document import Path
from distill.errors import did_you_mean
from distill.reference import each_reference

KINDS = ("type", "module", "model", "reuse")

FROZEN_WITH_MODEL = "a model's module is frozen with its model, by 'freeze'"
FROZEN_PEER = "a model that stays as it is teaches; write it under 'teacher' or 'teachers'"

Auxiliaries = Mapping[str, Auxiliary]


def auxiliaries(
    resolver: Resolver, draft: StageDraft, before: Mapping[str, Auxiliaries]
) -> Auxiliaries:
    """Read the modules in an order in which each one's inputs exist.

    Args:
        resolver: of the file.
        draft: the stage.
        before: stage -> modules that it wrote, of the stages before.
    """
    if not is_written(draft):
        return before[draft.origins["auxiliary"]]
    known = {name: module for written in before.values() for name, module in written.items()}
    modules: dict[str, Auxiliary] = {}
    for name, given in draft.values["auxiliary"].items():
        place = (*draft.places.get("auxiliary", ()), name)
        _check_kind(resolver, given, place)
        if "reuse" in given:
            modules[name] = _carried_on(resolver, given, place, known)
        else:
            _check_new(resolver, name, place, known)
            modules[name] = _written(resolver, given, place, (draft.name, name))
    _check_frozen_alike(resolver, modules)
    return _in_order(resolver, draft, modules)


def is_written(draft: StageDraft) -> bool:
    """Whether the stage writes the section itself; without one before it, it is an empty one."""
    place = draft.places.get("auxiliary")
    return place is None or place[: len(draft.path)] == draft.path


def _check_kind(resolver: Resolver, given: Mapping[str, Any], place: Path) -> None:
    kinds = [kind for kind in KINDS if kind in given]
    if len(kinds) > 1 or not (kinds or any(resolver.gaps.explain(place, kind) for kind in KINDS)):
        message = (
            "give one of 'type', for a new module, 'module', for one of a model's, 'model', for a "
            "model that trains beside the student, and 'reuse', for one of a stage before"
        )
        resolver.fault(place, message)
    if "params" in given and kinds and "type" not in given:
        resolver.fault((*place, "params"), f"'{kinds[0]}' takes no params; they belong to 'type'")
    if "frozen" in given and "module" in given:
        resolver.fault((*place, "frozen"), FROZEN_WITH_MODEL)
    if "frozen" in given and "model" in given:
        resolver.fault((*place, "frozen"), FROZEN_PEER)


def _check_new(resolver: Resolver, name: str, place: Path, known: Auxiliaries) -> None:
    if name in known:
        stage = known[name].origin[0]
        message = (
            f"stage '{stage}' has an auxiliary module '{name}' already; write {{reuse: {name}}} to "
            "go on with it, or call the new one otherwise"
        )
        resolver.fault(place, message)


def _check_frozen_alike(resolver: Resolver, modules: Mapping[str, Auxiliary]) -> None:
    """Fault a module that is carried on twice, which shares its weights, frozen and not frozen."""
    first: dict[tuple[str, str], str] = {}
    for name, module in modules.items():
        other = first.setdefault(module.origin, name)
        if module.frozen != modules[other].frozen:
            message = f"'{other}' is the same module, and one of the two is frozen"
            resolver.fault((*module.component.path, "reuse"), message)


def _written(
    resolver: Resolver, given: Mapping[str, Any], place: Path, origin: tuple[str, str]
) -> Auxiliary:
    made = component(given, place) if "type" in given else Component("", {}, place)
    module = None
    if "module" in given:
        module = resolver.reference((*place, "module"), given["module"])
    fed = inputs(resolver, given, place)
    if "model" in given:
        resolver.known((*place, "model"), "model", given["model"], "models")
    frozen = given.get("frozen", False)
    return Auxiliary(made, fed, module, origin, frozen, given.get("model"))


def _carried_on(
    resolver: Resolver, given: Mapping[str, Any], place: Path, known: Auxiliaries
) -> Auxiliary:
    name = given["reuse"]
    if name not in known:
        hint = did_you_mean(name, known) or f" (there are: {', '.join(known) or 'none'})"
        message = f"no stage before this one has an auxiliary module '{name}'{hint}"
        resolver.fault((*place, "reuse"), message)
        return Auxiliary(Component("", {}, place), {}, None, ("", name), False)
    first = known[name]
    if first.module is not None and "frozen" in given:
        resolver.fault((*place, "frozen"), FROZEN_WITH_MODEL)
    if first.model is not None and "frozen" in given:
        resolver.fault((*place, "frozen"), FROZEN_PEER)
    made = Component(first.component.type, first.component.params, place)
    fed = inputs(resolver, given, place) if "inputs" in given else first.inputs
    frozen = given.get("frozen", False)
    return Auxiliary(made, fed, first.module, first.origin, frozen, first.model)


def _in_order(
    resolver: Resolver, draft: StageDraft, modules: Mapping[str, Auxiliary]
) -> Auxiliaries:
    needs = {
        name: {ref.owner for _, ref in each_reference(module.inputs) if ref.owner in modules}
        for name, module in modules.items()
    }
    try:
        return {name: modules[name] for name in TopologicalSorter(needs).static_order()}
    except CycleError as error:
        circle = " -> ".join(reversed(error.args[1]))
        message = f"these modules feed each other in a circle: {circle}"
        resolver.fault(draft.places.get("auxiliary", ()), message)
        return modules
