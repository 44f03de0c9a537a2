"""A model that returns losses of its own beside its logits."""

from typing import ClassVar

import pytest
import torch
from torch import nn

import distill
from distill.testing import ToyData, toy_experiment, toy_registry
from distill.training.build import Builder


class TwoLosses(nn.Module):
    """Logits, and two losses of its own: the size of its weights and of its logits."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, inputs):
        logits = self.fc(inputs)
        own = {"weights": self.fc.weight.square().mean(), "logits": logits.square().mean()}
        return {"logits": logits, "losses": own}


class Listener(distill.Observer):
    """Keeps the losses of the last epoch."""

    losses: ClassVar[dict[str, float]] = {}

    def epoch_end(self, event):
        Listener.losses = dict(event.losses)


REGISTRY = toy_registry(models={"TwoLosses": TwoLosses}, observers={"Listener": Listener})
MODELS = {"mlp": {"type": "TwoLosses"}}
CROSS_ENTROPY = {"type": "CrossEntropyLoss", "inputs": {"student": "student.logits"}}


@pytest.mark.parametrize(
    ("reference", "names"),
    [
        ("student.losses", ["weights", "logits"]),
        ("student.losses.weights", ["weights"]),
        ("student.losses.logits", ["logits"]),
    ],
)
def test_losses_of_a_model_are_terms_whole_or_by_key(tmp_path, reference, names):
    own = {"type": "ModelLoss", "inputs": {"student": reference}, "weight": 0.5}
    stage = {
        "criterion": {"ce": CROSS_ENTROPY, "own": own},
        "epochs": 1,
        "data": {"train": "train", "batch_size": 20},
    }
    experiment = toy_experiment(tmp_path, stage, models=MODELS, observers=["Listener"])
    distill.run(experiment, registry=REGISTRY, runs=tmp_path)
    model = Builder(experiment, REGISTRY).model("mlp", 0)
    data = ToyData(20)
    output = model(data.inputs)
    hard = nn.functional.cross_entropy(output["logits"], torch.tensor(data.labels))
    expected = hard + 0.5 * sum(output["losses"][name] for name in names)
    assert Listener.losses["total"] == pytest.approx(expected.item(), rel=1e-5)


def test_a_model_with_several_outputs_is_measured_by_its_logits(tmp_path):
    experiment = toy_experiment(tmp_path, {"criterion": {"ce": CROSS_ENTROPY}}, models=MODELS)
    result = distill.run(experiment, registry=REGISTRY, runs=tmp_path)
    assert result.stages[0].validation["accuracy"] > 0.5
