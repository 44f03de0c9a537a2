import inspect

import pytest
import torch
from torch import nn, optim
from torch.optim import lr_scheduler

from distill import builtin
from distill.signature import bind

LOSSES = builtin.distill_losses()
LAYERS = builtin.distill_auxiliary_modules()
OPTIMIZERS = builtin.distill_optimizers()
SCHEDULERS = builtin.distill_schedulers()
NEEDED = {
    "StepLR": {"step_size": 2},
    "MultiStepLR": {"milestones": [2, 4]},
    "ExponentialLR": {"gamma": 0.9},
    "CosineAnnealingLR": {"T_max": 5},
    "CosineAnnealingWarmRestarts": {"T_0": 2},
    "CyclicLR": {"base_lr": 0.1, "max_lr": 1.0},
    "OneCycleLR": {"max_lr": 1.0, "total_steps": 10},
    "WarmupPolynomialLR": {"total_iters": 10},
}
SHAPED = {
    "AdaptiveAvgPool1d": {"output_size": 1},
    "AdaptiveAvgPool2d": {"output_size": [1, 1]},
    "AdaptiveMaxPool2d": {"output_size": 1},
    "AvgPool2d": {"kernel_size": 2},
    "BatchNorm1d": {"num_features": 3},
    "BatchNorm2d": {"num_features": 3},
    "Conv1d": {"in_channels": 3, "out_channels": 4, "kernel_size": 1},
    "Conv2d": {"in_channels": 3, "out_channels": 4, "kernel_size": [3, 3], "padding": "same"},
    "ConvTranspose2d": {"in_channels": 3, "out_channels": 4, "kernel_size": 2},
    "GroupNorm": {"num_groups": 1, "num_channels": 3},
    "LayerNorm": {"normalized_shape": [3, 4]},
    "Linear": {"in_features": 3, "out_features": 4},
    "MaxPool2d": {"kernel_size": 2},
    "Upsample": {"scale_factor": 2.0},
}


def test_every_loss_of_torch_is_on_offer_but_those_that_give_no_scalar():
    all_of_torch = {
        name
        for name, cls in vars(nn).items()
        if inspect.isclass(cls) and issubclass(cls, nn.Module) and name.endswith("Loss")
    }
    assert all_of_torch - set(LOSSES) <= {"AdaptiveLogSoftmaxWithLoss"}
    assert {"CrossEntropyLoss", "MSELoss", "KLDivLoss", "CosineEmbeddingLoss"} <= set(LOSSES)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_built_from_defaults_or_says_what_it_misses(name):
    binding = bind(LOSSES[name], {})
    if binding.problems:
        assert all("is missing" in problem.message for problem in binding.problems)
    else:
        assert isinstance(LOSSES[name](**binding.arguments), nn.Module)


@pytest.mark.parametrize("name", LOSSES)
def test_a_typo_in_a_loss_s_parameter_is_found(name):
    problems = bind(LOSSES[name], {"reductoin": "mean"}).problems
    assert any("there is no parameter 'reductoin'" in problem.message for problem in problems)


def test_cross_entropy_is_wired_to_student_and_targets():
    loss = LOSSES["CrossEntropyLoss"](label_smoothing=0.1)
    logits, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    expected = nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
    assert torch.equal(loss(student=logits, targets=labels), expected)


def test_cross_entropy_of_texts_is_that_of_their_positions():
    loss = LOSSES["CrossEntropyLoss"]()
    logits, labels = torch.randn(2, 3, 5), torch.randint(5, (2, 3))
    expected = nn.functional.cross_entropy(logits.view(6, 5), labels.view(6))
    torch.testing.assert_close(loss(logits, labels), expected)
    soft = nn.functional.one_hot(labels, 5).float()
    torch.testing.assert_close(loss(logits, soft), expected)
    torch.testing.assert_close(loss(logits.movedim(2, 1), labels), expected)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_built_from_what_a_file_can_hold(name):
    binding = bind(LAYERS[name], SHAPED.get(name, {}))
    assert binding.problems == []
    assert isinstance(LAYERS[name](**binding.arguments), nn.Module)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_is_built_and_steps(name):
    parameter = nn.Parameter(torch.ones(2, 2))
    binding = bind(OPTIMIZERS[name], {"lr": 0.1}, provided=1)
    assert binding.problems == []
    optimizer = OPTIMIZERS[name]([parameter], **binding.arguments)
    gradient = torch.ones(2, 2)
    parameter.grad = gradient.to_sparse() if name == "SparseAdam" else gradient
    optimizer.step()
    assert (parameter < 1).all()


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.filterwarnings("ignore:Detected call of")
def test_a_scheduler_is_built_from_what_a_file_can_hold(name):
    optimizer = optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1, momentum=0.9)
    binding = bind(SCHEDULERS[name], NEEDED.get(name, {}), provided=1)
    assert binding.problems == []
    scheduler = SCHEDULERS[name](optimizer, **binding.arguments)
    assert isinstance(scheduler, lr_scheduler.LRScheduler)


def test_what_takes_code_or_a_closure_is_not_on_offer():
    assert not {"LambdaLR", "MultiplicativeLR", "SequentialLR", "ChainedScheduler"} & {*SCHEDULERS}
    assert not {"LBFGS", "Optimizer"} & {*OPTIMIZERS}


def test_the_hooks_return_what_they_are_said_to():
    assert set(builtin.distill_metrics()) == {
        "accuracy",
        "agreement",
        "calibration_error",
        "cross_entropy",
        "per_class_accuracy",
    }
    assert set(builtin.distill_observers()) == {"Console", "TensorBoard", "ResultFiles"}
