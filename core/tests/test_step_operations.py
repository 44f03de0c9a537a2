"""What a step computes beside what a loop written by hand does: nothing that takes time."""

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
STACKED, GATHERED = "aten.stack", "aten.index"
JUDGED = Counter({"aten._amp_foreach_non_finite_check_and_unscale_": STEPS})
"""Whether the gradient is finite, for which it is read once."""


class Operations(TorchDispatchMode):
    """Counts torch's operations on large tensors, of the backward too, but those that only look."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        out = function(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
        if not _is_view(function) and any(tensor.numel() >= LARGE for tensor in tensors):
            self.counted[str(function.overloadpacket)] += 1
        return out


def _is_view(function: Any) -> bool:
    """Whether an operation gives a tensor on the memory of another, and writes nothing."""
    aliases = [argument.alias_info for argument in function._schema.arguments]
    return any(alias is not None and not alias.is_write for alias in aliases)


@pytest.fixture
def epochs(monkeypatch: pytest.MonkeyPatch) -> list[Counter[str]]:
    """What each epoch of a run computes."""
    counts: list[Counter[str]] = []
    epoch = Loop.epoch

    def counted(loop: Loop, *args: Any, **kwargs: Any) -> Any:
        with Operations() as operations:
            summary = epoch(loop, *args, **kwargs)
        counts.append(operations.counted)
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
) -> Counter[str]:
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
    return operations.counted


def test_a_step_computes_what_one_by_hand_does(tmp_path, epochs):
    run(tmp_path)
    assert epochs[-1] == by_hand() + JUDGED


def test_a_step_in_bf16_computes_what_one_by_hand_does(tmp_path, epochs):
    run(tmp_path, precision="bf16")
    assert epochs[-1] == by_hand(bf16=True) + JUDGED


def test_a_captured_layer_is_not_copied(tmp_path, epochs):
    run(tmp_path, criterion={"ce": CROSS_ENTROPY, "match": MATCH, "hint": HINT})
    assert epochs[-1] == by_hand(hint=True) + JUDGED


def test_a_fast_teacher_computes_what_one_made_fast_by_hand_does(tmp_path, epochs):
    run(tmp_path, teacher={"model": "big", "fast": True})
    assert epochs[-1] == by_hand(fast=True) + JUDGED


def test_of_a_stored_teacher_nothing_is_left_but_numbers_that_become_float32(tmp_path, epochs):
    run(tmp_path, teacher={"model": "big", "store": True})
    assert epochs[-1] == by_hand(stored=torch.zeros(BATCH, CLASSES).half()) + JUDGED


def test_data_in_memory_are_gathered_once_a_batch(tmp_path, epochs):
    run(tmp_path, data={"train": "train", "batch_size": BATCH, "in_memory": True})
    stacked, gathered = Counter({STACKED: STEPS}), Counter({GATHERED: STEPS})
    assert epochs[-1] == by_hand() + JUDGED - stacked + gathered
