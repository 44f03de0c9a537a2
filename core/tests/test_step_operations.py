"""Torch's operations of a step: those of a loop written by hand, and hardly any more.

What NumPy copies is not seen, nor what makes the host wait; of that there are tests on a device.
"""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

import distill
from distill.testing import ToyConvNet, ToyData, toy_experiment, toy_registry
from distill.training.loop import Loop

SIZE, BATCH, WIDTH, CLASSES = 16, 8, 40, 3
STEPS = SIZE // BATCH
SHAPE = (1, 12, 12)
DATA = {"type": "ToyData", "params": {"size": SIZE, "shape": list(SHAPE)}}
MODEL = {"type": "ToyConvNet", "params": {"width": WIDTH}}
CROSS_ENTROPY = {"type": "CrossEntropyLoss"}
MATCH = {"type": "MSELoss", "inputs": {"input": "student", "target": "teacher"}}
HINT = {"type": "MSELoss", "inputs": {"input": "student.norm", "target": "teacher.norm"}}
LARGE = BATCH * CLASSES
"""Elements of a tensor that counts; of a loss, a label or a mean there are fewer."""
MOST_SMALL = 16
"""Small operations a step more than by hand: means of losses, and whether all is finite."""
KERNELS, IMAGES = WIDTH * 9, BATCH * 12 * 12
JUDGED = Counter({("aten._amp_foreach_non_finite_check_and_unscale_", KERNELS): STEPS})
"""Whether the gradient is finite, for which it is read once."""
STACKED = Counter({("aten.stack", IMAGES): STEPS})
GATHERED = Counter({("aten.index", SIZE // BATCH * IMAGES): STEPS})


class Operations(TorchDispatchMode):
    """Counts torch's operations, of the backward too, but those that only look.

    Attributes:
        counted: by name and elements of the largest tensor, on large ones.
        small: on others.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[tuple[str, int]] = Counter()
        self.small = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        out = function(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
        elements = max((tensor.numel() for tensor in tensors), default=0)
        if not _is_view(function) and elements >= LARGE:
            self.counted[str(function.overloadpacket), elements] += 1
        self.small += elements < LARGE
        return out


def _is_view(function: Any) -> bool:
    """Whether an operation gives a tensor on the memory of another, and writes nothing."""
    aliases = [argument.alias_info for argument in function._schema.arguments]
    return any(alias is not None and not alias.is_write for alias in aliases)


@pytest.fixture
def epochs(monkeypatch: pytest.MonkeyPatch) -> list[Operations]:
    """What each epoch of a run computes."""
    counts: list[Operations] = []
    epoch = Loop.epoch

    def counted(loop: Loop, *args: Any, **kwargs: Any) -> Any:
        with Operations() as operations:
            summary = epoch(loop, *args, **kwargs)
        counts.append(operations)
        return summary

    monkeypatch.setattr(Loop, "epoch", counted)
    return counts


def run(folder: Path, **stage: Any) -> None:
    given: dict[str, Any] = {
        "epochs": 2,
        "data": {"train": "train", "batch_size": BATCH},
        "teacher": {"model": "big"},
        "student": {"model": "small"},
        "criterion": {"ce": CROSS_ENTROPY, "match": MATCH},
        "metrics": [],
    }
    models = {"big": MODEL, "small": MODEL}
    experiment = toy_experiment(
        folder, {**given, **stage}, datasets={"train": DATA}, models=models, seed=0
    )
    distill.run(experiment, registry=toy_registry(), runs=folder, stores=folder)


def by_hand(
    bf16: bool = False, hint: bool = False, fast: bool = False, stored: Tensor | None = None
) -> Operations:
    """Return what an epoch of a loop of one's own computes."""
    teacher, student = ToyConvNet(WIDTH).eval().requires_grad_(False), ToyConvNet(WIDTH)
    seen: dict[nn.Module, Tensor] = {}
    for model in (teacher, student) if hint else ():
        model.norm.register_forward_hook(lambda module, _, output: seen.update({module: output}))
        model.relu.inplace = False  # which would overwrite what the hook has kept
    if fast:
        teacher.conv, teacher.norm = fuse_conv_bn_eval(teacher.conv, teacher.norm), nn.Identity()
        teacher.to(torch.bfloat16, memory_format=torch.channels_last)
    form = {"dtype": torch.bfloat16, "memory_format": torch.channels_last} if fast else {}
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
    batches = DataLoader(ToyData(SIZE, CLASSES, SHAPE), BATCH)

    def epoch() -> None:
        for inputs, labels in batches:
            with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
                with torch.no_grad():
                    expected = teacher(inputs.to(**form)) if stored is None else stored
                logits = student(inputs)
            logits = logits.float()
            loss = F.cross_entropy(logits, labels) + F.mse_loss(logits, expected.float())
            if hint:
                loss = loss + F.mse_loss(seen[student.norm], seen[teacher.norm])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            seen.clear()

    epoch()
    with Operations() as operations:
        epoch()
    return operations


def test_a_step_computes_what_one_by_hand_does(tmp_path, epochs):
    run(tmp_path)
    assert epochs[-1].counted == by_hand().counted + JUDGED


def test_a_step_has_few_operations_more_on_what_is_small(tmp_path, epochs):
    run(tmp_path)
    assert epochs[-1].small <= by_hand().small + MOST_SMALL * STEPS


def test_a_step_in_bf16_computes_what_one_by_hand_does(tmp_path, epochs):
    run(tmp_path, precision="bf16")
    assert epochs[-1].counted == by_hand(bf16=True).counted + JUDGED


def test_a_captured_layer_is_not_copied(tmp_path, epochs):
    run(tmp_path, criterion={"ce": CROSS_ENTROPY, "match": MATCH, "hint": HINT})
    assert epochs[-1].counted == by_hand(hint=True).counted + JUDGED


def test_a_fast_teacher_computes_what_one_made_fast_by_hand_does(tmp_path, epochs):
    run(tmp_path, teacher={"model": "big", "fast": True})
    assert epochs[-1].counted == by_hand(fast=True).counted + JUDGED


def test_a_stored_teacher_leaves_torch_nothing_but_numbers_to_make_float32(tmp_path, epochs):
    run(tmp_path, teacher={"model": "big", "store": True})
    assert epochs[-1].counted == by_hand(stored=torch.zeros(BATCH, CLASSES).half()).counted + JUDGED


def test_data_in_memory_are_gathered_once_a_batch(tmp_path, epochs):
    run(tmp_path, data={"train": "train", "batch_size": BATCH, "in_memory": True})
    assert epochs[-1].counted == by_hand().counted + JUDGED - STACKED + GATHERED
