"""What the losses on features cost, against one step of training the student that they teach.

Each loss, at its published setting, gets random maps of the shapes that this very step makes, as
ResNet-34 and ResNet-18 do (for ViTKD: two small transformers), forwards and backwards; so do the
auxiliary modules that go with it, apart from it. Steps and losses take turns, so that whatever
slows the machine slows all. Printed are medians.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torchvision
from timing import Work, taking_turns
from torch import Tensor, nn
from torch.nn import functional as F

import distill_fitnet as fitnet
from distill import Capture

CLASSES = 1000
DENSE = (4, 64, 32, 32)
"""Maps of dense prediction."""
AIM = 0.05
"""What part of a step a loss may take."""

Values = dict[str, Any]
Wires = Mapping[str, str | list[str]]
"""Parameter -> name of a value, or names of several, as in an experiment's file."""


@dataclass(frozen=True)
class Part:
    """A module and what it is wired to; of a model's own where it is frozen.

    A data set is for modules whose ``setup`` asks for one.
    """

    module: nn.Module
    inputs: Wires
    frozen: bool = False
    dataset: object = None


@dataclass(frozen=True)
class Method:
    """A loss with the auxiliary modules that it needs, in the order they run in."""

    title: str
    loss: Part
    auxiliary: Mapping[str, Part] = field(default_factory=dict)


def layers(side: str, *numbers: int, before_relu: bool = False) -> list[str]:
    """Return names of the maps of these layers."""
    return [f"{side}.{'input' if before_relu else 'layer'}{number}" for number in numbers]


def sides(student: str | list[str], teacher: str | list[str]) -> dict[str, str | list[str]]:
    """Return the wires of most losses."""
    return {"student_features": student, "teacher_features": teacher}


def fitted(student: str | list[str], teacher: str | list[str]) -> dict[str, str | list[str]]:
    """Return the wires of most auxiliary modules."""
    return {"features": student, "like": teacher}


def methods() -> list[Method]:
    """Return what is published for ResNets on ImageNet, or where not for like maps elsewhere."""
    student, teacher = layers("student", 1, 2, 3, 4), layers("teacher", 1, 2, 3, 4)
    before = [layers(side, 1, 2, 3, 4, before_relu=True) for side in ("student", "teacher")]
    levels = [[*student, "student.avgpool"], [*teacher, "teacher.avgpool"]]
    last = fitted("student.layer4", "teacher.layer4")
    code = {"features": "teacher.layer4"}
    adapter = fitted("student.layer4", "paraphraser.factor")
    norms = {"bn_weight": layers("weight", 1, 2, 3, 4), "bn_bias": layers("bias", 1, 2, 3, 4)}
    return [
        Method(
            "HintLoss, layer2",
            Part(fitnet.HintLoss(), sides("regressor", "teacher.layer2")),
            {"regressor": Part(fitnet.ConvRegressor(), fitted("student.layer2", "teacher.layer2"))},
        ),
        Method("ATLoss, layers 1 to 4", Part(fitnet.ATLoss(), sides(student, teacher))),
        Method(
            "FTLoss, layer4",
            Part(
                fitnet.FTLoss(),
                {"student_factor": "translator", "teacher_factor": "paraphraser.factor"},
            ),
            {
                "paraphraser": Part(fitnet.Paraphraser(), code, frozen=True),
                "translator": Part(fitnet.Translator(), adapter),
            },
        ),
        Method(
            "ABLoss, layers 1 to 4",
            Part(fitnet.ABLoss(), sides("connector", before[1])),
            {"connector": Part(fitnet.ABConnector(), fitted(*before))},
        ),
        Method(
            "VIDLoss, layers 1 to 4",
            Part(fitnet.VIDLoss(), sides("regressor", teacher)),
            {"regressor": Part(fitnet.VIDRegressor(), fitted(student, teacher))},
        ),
        Method("HNDLoss, layer2", Part(fitnet.HNDLoss(), sides(student[1], teacher[1]))),
        Method("HNDLoss, layers 1 to 4", Part(fitnet.HNDLoss(), sides(student, teacher))),
        Method(
            "PADLoss, embedding",
            Part(
                fitnet.PADLoss(),
                {**sides("student.avgpool", "teacher.avgpool"), "log_variance": "variance"},
            ),
            {"variance": Part(fitnet.PADVariance(), {"features": "student.avgpool"})},
        ),
        Method(
            "HCLLoss, layers 1 to 4, embedding",
            Part(fitnet.HCLLoss(), sides("fusion", levels[1])),
            {"fusion": Part(fitnet.ReviewFusion(), fitted(*levels))},
        ),
        Method(
            "SRDLoss, layer4, logits",
            Part(
                fitnet.SRDLoss(),
                {
                    **sides("projector", "teacher.layer4"),
                    "student": "student.fc",
                    "teacher": "teacher.fc",
                },
            ),
            {"projector": Part(fitnet.SRDProjector(), last)},
        ),
        Method(
            "KTALoss, layer4",
            Part(fitnet.KTALoss(), sides("adapter", "paraphraser.factor")),
            {
                "paraphraser": Part(fitnet.Paraphraser(batch_norm=True), code),
                "adapter": Part(fitnet.KTAAdapter(), adapter),
            },
        ),
        Method(
            "AffinityLoss, layer4",
            Part(fitnet.AffinityLoss(), sides("adapter", "paraphraser.factor")),
            {
                "paraphraser": Part(fitnet.Paraphraser(batch_norm=True), code),
                "adapter": Part(fitnet.KTAAdapter(), adapter),
            },
        ),
        Method(
            "CodeNormLoss, layer4",
            Part(fitnet.CodeNormLoss(), {"code": "paraphraser.factor"}),
            {"paraphraser": Part(fitnet.Paraphraser(batch_norm=True), code)},
        ),
        Method(
            "MGDLoss, layer4",
            Part(fitnet.MGDLoss(), sides("generator", "teacher.layer4")),
            {"generator": Part(fitnet.MGDGenerator(), last)},
        ),
        Method(
            "SRRLLoss, layer4, logits",
            Part(
                fitnet.SRRLLoss(),
                {
                    **sides("connector.map", "teacher.layer4"),
                    "student_logits": "head",
                    "teacher_logits": "teacher.fc",
                },
            ),
            {
                "connector": Part(fitnet.SRRLConnector(), last),
                "head": Part(nn.Linear(512, CLASSES), {"input": "connector.pooled"}, frozen=True),
            },
        ),
        Method(
            "DISTPlusFeatureLoss, layer4",
            Part(fitnet.DISTPlusFeatureLoss(), sides("student.layer4", "teacher.layer4")),
        ),
        Method(
            "OFDLoss, layers 1 to 4",
            Part(fitnet.OFDLoss(1e-4), {**sides("connector", before[1]), **norms}),
            {"connector": Part(fitnet.OFDConnector(), fitted(*before))},
        ),
        Method(
            "CWDLoss, layer4", Part(fitnet.CWDLoss(), sides("student.layer4", "teacher.layer4"))
        ),
        Method("NSTLoss, layers 1 to 4", Part(fitnet.NSTLoss(), sides(student, teacher))),
        Method("KDSVDLoss, layers 1 to 4", Part(fitnet.KDSVDLoss(), sides(student, teacher))),
    ]


def vision_transformer_method() -> Method:
    """Return ViTKD at the blocks that are published."""
    low = [
        [f"{side}.encoder_layer_{number}" for number in (0, 1)] for side in ("student", "teacher")
    ]
    high = ["student.ln", "teacher.ln"]
    return Method(
        "ViTKDLoss, blocks 1, 2 and last",
        Part(
            fitnet.ViTKDLoss(),
            {
                "student_low": "mimic",
                "teacher_low": low[1],
                "student_high": "generator.tokens",
                "teacher_high": high[1],
                "mask": "generator.mask",
            },
        ),
        {
            "mimic": Part(fitnet.ViTKDMimic(), fitted(*low)),
            "generator": Part(fitnet.ViTKDGenerator(), fitted(*high)),
        },
    )


def affinity_methods() -> list[Method]:
    """Return both forms of the affinity, for maps of dense prediction."""
    wires = sides("student.dense", "teacher.dense")
    return [
        Method(f"`form: {form}`", Part(fitnet.AffinityLoss(form), wires))
        for form in ("channels", "positions")
    ]


def resnet_values(images: Tensor) -> Values:
    """Return random features of the shapes that ResNets give for these images."""
    shapes = captured_shapes(
        torchvision.models.resnet18(),
        [f"layer{n}" for n in (1, 2, 3, 4)] + ["avgpool", "fc"],
        images,
    )
    values: Values = {}
    for side in ("student", "teacher"):
        for name, shape in shapes.items():
            values[f"{side}.{name}"] = torch.randn(shape)
            if name.startswith("layer"):
                values[f"{side}.{name.replace('layer', 'input')}"] = values[f"{side}.{name}"]
                values[f"{side}.{name}"] = values[f"{side}.{name}"].relu()
        values[f"{side}.avgpool"] = values[f"{side}.avgpool"].flatten(1).relu()
    for number in (1, 2, 3, 4):
        channels = shapes[f"layer{number}"][1]
        values[f"weight.layer{number}"] = torch.rand(channels) + 0.5
        values[f"bias.layer{number}"] = torch.randn(channels)
    return values


def vision_transformer(width: int, size: int) -> nn.Module:
    """Return a transformer with the depth and the patches of DeiT."""
    return torchvision.models.VisionTransformer(
        size, 16, 12, width // 64, width, 4 * width, num_classes=CLASSES
    )


def vision_transformer_values(images: Tensor) -> Values:
    """Return random tokens of the shapes that DeiT-Tiny and DeiT-Small give for these images."""
    names = ["encoder.layers.encoder_layer_0", "encoder.layers.encoder_layer_1", "encoder.ln"]
    values: Values = {}
    for side, width in (("student", 192), ("teacher", 384)):
        model = vision_transformer(width, images.shape[-1])
        for name, shape in captured_shapes(model, names, images).items():
            values[f"{side}.{name.rpartition('.')[2]}"] = torch.randn(shape)
    return values


def captured_shapes(model: nn.Module, names: list[str], images: Tensor) -> dict[str, torch.Size]:
    """Return the shapes of what modules of a model give."""
    with Capture(model, names) as capture, torch.no_grad():
        model(images)
        return {name: value.shape for name, value in capture.pop().items()}


def training_step(student: nn.Module, images: Tensor) -> Work:
    """Return a function that trains on a batch."""
    student.to(images.device).train()
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-3, momentum=0.9)
    targets = torch.randint(CLASSES, (len(images),), device=images.device)

    def train() -> None:
        loss = F.cross_entropy(student(images), targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return train


def given(values: Values, wires: Wires) -> Values:
    """Return what each parameter is wired to."""
    return {
        name: [values[each] for each in wire] if isinstance(wire, list) else values[wire]
        for name, wire in wires.items()
    }


def named(name: str, output: Any) -> Values:
    """Return an output under its name, and its parts under theirs."""
    parts = (
        {f"{name}.{key}": value for key, value in output.items()}
        if isinstance(output, dict)
        else {}
    )
    return {name: output, **parts}


def differentiable(output: Any) -> list[Tensor]:
    """Return the tensors of an output that have a gradient."""
    if isinstance(output, Tensor):
        return [output] if output.requires_grad else []
    inside = output.values() if isinstance(output, dict) else output
    return [tensor for value in inside for tensor in differentiable(value)]


def as_leaves(output: Any) -> Any:
    """Return an output with its tensors cut off from what made them."""
    if isinstance(output, Tensor):
        return output.detach().requires_grad_(output.requires_grad)
    if isinstance(output, dict):
        return {name: as_leaves(value) for name, value in output.items()}
    return [as_leaves(value) for value in output]


def run_all(parts: Mapping[str, Part], values: Values) -> Values:
    """Return what auxiliary modules give."""
    found: Values = {}
    for name, part in parts.items():
        found |= named(name, part.module(**given({**values, **found}, part.inputs)))
    return found


def set_up(parts: Mapping[str, Part], values: Values, device: torch.device) -> None:
    """Build modules for the shapes of values, one after the other."""
    found = dict(values)
    for name, part in parts.items():
        arguments = given(found, part.inputs)
        if callable(setup := getattr(part.module, "setup", None)):
            setup(**arguments, **({} if part.dataset is None else {"dataset": part.dataset}))
        part.module.to(device).requires_grad_(not part.frozen)
        found |= named(name, part.module(**arguments))


def works(method: Method, values: Values, device: torch.device) -> tuple[Work, Work]:
    """Return functions that run a method's loss, and its auxiliary modules, there and back."""
    values = {
        name: value.to(device).requires_grad_(name.startswith("student."))
        for name, value in values.items()
    }
    set_up({**method.auxiliary, "loss": method.loss}, values, device)
    outputs = run_all(method.auxiliary, values)
    slopes = [torch.randn_like(tensor) for tensor in tensors_of(outputs)]
    inputs = given({**values, **{n: as_leaves(o) for n, o in outputs.items()}}, method.loss.inputs)

    def compare() -> None:
        method.loss.module(**inputs).backward()

    def adapt() -> None:
        torch.autograd.backward(tensors_of(run_all(method.auxiliary, values)), slopes)

    return compare, adapt if method.auxiliary else (lambda: None)


def tensors_of(outputs: Values) -> list[Tensor]:
    """Return the tensors of whole outputs, parts of them left out, that have a gradient."""
    return differentiable({name: out for name, out in outputs.items() if "." not in name})


def print_head() -> None:
    """Print the head of the table whose rows ``report`` prints."""
    print("| loss | time | of the step | auxiliary modules |")
    print("| ---- | ---: | ----------: | ----------------: |")


def report(
    step: Work,
    cases: list[Method],
    values: Values,
    turns: int,
    device: torch.device,
    steps: float = 1.0,
) -> float:
    """Measure methods against a step, and print a row for each.

    Args:
        step: one step of training.
        cases: the methods.
        values: what they are wired to.
        turns: how often each is measured.
        device: where they run.
        steps: how many such steps have as many images as the values are of.

    Returns:
        The seconds of as many steps.
    """
    pairs = [works(method, values, device) for method in cases]
    tasks = [step, *(work for pair in pairs for work in pair)]
    whole, *rest = taking_turns(tasks, turns, device)
    whole *= steps
    for method, loss, auxiliary in zip(cases, rest[::2], rest[1::2], strict=True):
        print(
            f"| {method.title} | {loss * 1e3:.1f} ms "
            f"| {100 * loss / whole:.1f} %{' (!)' if loss > AIM * whole else ''} "
            f"| {f'{auxiliary * 1e3:,.1f} ms' if method.auxiliary else ''} |",
            flush=True,
        )
    return whole


def affinity_times(turns: int, device: torch.device) -> str:
    """Measure both forms of the affinity, and return in words what they take."""
    values = {f"{side}.dense": torch.randn(DENSE).relu() for side in ("student", "teacher")}
    cases = affinity_methods()
    seconds = taking_turns([works(case, values, device)[0] for case in cases], turns, device)
    pairs = zip(seconds, cases, strict=True)
    shown = " and ".join(f"{time * 1e3:.1f} ms ({case.title})" for time, case in pairs)
    return f"AffinityLoss on {DENSE[0]} maps of {' x '.join(map(str, DENSE[1:]))}: {shown}."


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--turns", type=int, default=11, help="turns of each work")
    parser.add_argument("--batch", type=int, default=32, help="images in a step")
    parser.add_argument("--size", type=int, default=112, help="their height and width")
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.manual_seed(0)
    images = torch.randn(options.batch, 3, options.size, options.size)
    print_head()
    step = training_step(torchvision.models.resnet18(), images.to(device))
    resnet = report(step, methods(), resnet_values(images), options.turns, device)
    step = training_step(vision_transformer(192, options.size), images.to(device))
    values = vision_transformer_values(images)
    transformer = report(step, [vision_transformer_method()], values, options.turns, device)
    print(
        f"\nA step, of {options.batch} images of {options.size} x {options.size}: "
        f"{resnet * 1e3:,.0f} ms; for ViTKD: {transformer * 1e3:,.0f} ms."
    )
    print(affinity_times(options.turns, device))


if __name__ == "__main__":
    main()
