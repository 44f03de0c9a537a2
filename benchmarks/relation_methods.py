"""Losses on relations with their auxiliary modules, as published for ImageNet or like that.

Each is a group's: those of a group see the same values, of so many images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torchvision
from contrast import NEGATIVES, Labels
from losses import CLASSES, Method, Part, Values, captured_shapes, layers, sides
from torch import Tensor

import distill_crd as crd
import distill_relational as relational

RELATED = 256
"""Images whose relations are learnt, in a batch of ImageNet's presets."""
CONTRASTED, VIEWS = 85, 4
"""Images in a batch of CRD and SSKD on each of three devices; views of each in SSKD."""
SAMPLES = 50_000
"""Rows of CRD's banks. ImageNet's are 25 times as many, and take a while to fill."""
POOLED = ("avgpool", "fc")


@dataclass(frozen=True)
class Group:
    """Methods, the values that they are wired to, and of how many images these are."""

    methods: list[Method]
    values: Values
    images: int


def relational_methods() -> list[Method]:
    """Return losses between the samples of a batch, in batches of ImageNet's presets."""
    pooled, maps = (sides(f"student.{name}", f"teacher.{name}") for name in ("avgpool", "layer4"))
    embeddings = {
        f"{side}_embedding": Part(relational.CCKDEmbedding(), {"features": f"{side}.avgpool"})
        for side in ("student", "teacher")
    }
    embedded = sides("student_embedding", "teacher_embedding")
    found = [
        Method(
            "RKDDistanceLoss, unit vectors", Part(relational.RKDDistanceLoss(True, True), pooled)
        ),
        Method("RKDAngleLoss, unit vectors", Part(relational.RKDAngleLoss(True, True), pooled)),
        Method("RKDLoss, unit vectors", Part(relational.RKDLoss(True, True), pooled)),
        Method("PKTLoss, embedding", Part(relational.PKTLoss(), pooled)),
        Method("SPKDLoss, layer4", Part(relational.SPKDLoss(), maps)),
        Method("CCKDLoss, form: paper", Part(relational.CCKDLoss(), embedded), embeddings),
        Method("CCKDLoss, form: code", Part(relational.CCKDLoss("code"), embedded), embeddings),
    ]
    return [_sized(method, f"batch of {RELATED}") for method in found]


def map_methods(batch: int) -> list[Method]:
    """Return losses on the maps of each sample for itself, whose cost grows with the batch."""
    flow = {
        f"{side}_{place}": layers(side, *numbers)
        for side in ("student", "teacher")
        for place, numbers in (("first", (1, 2, 3)), ("second", (2, 3, 4)))
    }
    wires = {"features": "student.layer4", "like": "teacher.layer4"}
    found = [
        Method("FSPLoss, layers 1 to 4", Part(relational.FSPLoss(), flow)),
        Method(
            "ICKDLoss, layer4",
            Part(relational.ICKDLoss(), sides("embedding", "teacher.layer4")),
            {"embedding": Part(relational.ICKDEmbedding(kernel_size=3), wires)},
        ),
    ]
    return [_sized(method, f"batch of {batch}") for method in found]


def contrast_method() -> Method:
    """Return CRD."""
    embeddings = {
        f"{side}_embedding": Part(crd.CRDEmbedding(), {"features": f"{side}.avgpool"})
        for side in ("student", "teacher")
    }
    wires = {**{name: name for name in embeddings}, "index": "index"}
    loss = Part(crd.CRDLoss(NEGATIVES), wires, dataset=Labels(SAMPLES))
    method = Method(f"CRDLoss, {NEGATIVES:,} negatives of {SAMPLES:,}", loss, embeddings)
    return _sized(method, f"batch of {CONTRASTED}")


def self_supervised_methods() -> list[Method]:
    """Return SSKD's losses."""
    heads = {
        side: Part(crd.SSKDHead(), {"features": f"{side}.avgpool"}, frozen=side == "teacher")
        for side in ("student", "teacher")
    }
    both = {"student_head": heads["student"], "teacher_head": heads["teacher"]}
    first = {"teacher_head": Part(crd.SSKDHead(), {"features": "teacher.avgpool"})}
    embeddings = {"student_embeddings": "student_head", "teacher_embeddings": "teacher_head"}
    logits = {"student": "student.fc", "teacher": "teacher.fc"}
    labelled = {**logits, "targets": "targets"}
    found = [
        Method(
            "SelfSupervisionLoss",
            Part(crd.SelfSupervisionLoss(), {"embeddings": "teacher_head"}),
            first,
        ),
        Method("SSKDLoss", Part(crd.SSKDLoss(), {**labelled, **embeddings}), both),
        Method("SSKDSimilarityLoss", Part(crd.SSKDSimilarityLoss(), embeddings), both),
        Method("SSKDTransformedLoss", Part(crd.SSKDTransformedLoss(), labelled)),
    ]
    return [_sized(method, f"batch of {CONTRASTED} x {VIEWS}") for method in found]


def _sized(method: Method, size: str) -> Method:
    return Method(f"{method.title}, {size}", method.loss, method.auxiliary)


def groups(images: Tensor) -> list[Group]:
    """Return all methods; those on maps of single samples get as many as there are images."""
    named = [*(f"layer{number}" for number in (1, 2, 3, 4)), *POOLED]
    shapes = captured_shapes(torchvision.models.resnet18(), named, images[:2])
    last = {name: shapes[name] for name in ("layer4", *POOLED)}
    pooled = {name: shapes[name] for name in POOLED}
    few, views = len(images), VIEWS * CONTRASTED
    return [
        Group(relational_methods(), random_values(last, RELATED), RELATED),
        Group(map_methods(few), random_values(shapes, few), few),
        Group([contrast_method()], random_values(pooled, CONTRASTED), CONTRASTED),
        Group(self_supervised_methods(), random_values(pooled, views, CONTRASTED), views),
    ]


def random_values(
    shapes: Mapping[str, torch.Size], rows: int, samples: int | None = None
) -> Values:
    """Return what models give for so many images, which are of so many samples."""
    values: Values = {}
    for side in ("student", "teacher"):
        for name, shape in shapes.items():
            made = torch.randn(rows, *shape[1:])
            values[f"{side}.{name}"] = made if name == "fc" else made.relu()
        values[f"{side}.avgpool"] = values[f"{side}.avgpool"].flatten(1)
    values["targets"] = torch.randint(CLASSES, (samples or rows,))
    values["index"] = torch.randint(SAMPLES, (samples or rows,))
    return values
