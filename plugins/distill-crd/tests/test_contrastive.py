"""CRD: its loss, its banks, its constants and its negatives."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from distill_crd import CRDEmbedding, CRDLoss
from distill_crd.contrastive import SMALLEST_TEMPERATURE
from distill_crd.memory_bank import last_of_each
from distill_crd.noise_contrast import Negatives

METHOD = "crd"
DOUBLE = torch.float64


class Data:
    """Samples of which nothing but the labels is known."""

    def __init__(self, labels: list[int]):
        self.targets = labels

    def __len__(self) -> int:
        return len(self.targets)


class Given(CRDLoss):
    """With the negatives of a stored case, the first of which is the positive."""

    contrast: torch.Tensor

    def _negatives(self, index: torch.Tensor, key: torch.Tensor) -> Any:
        count = torch.full((len(index),), self.contrast.shape[1] - 1)
        listed = self.contrast[:, 1:]
        kept = torch.ones_like(listed).bool()
        return lambda bank: Negatives(bank, count, index=listed, kept=kept)


def vectors(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(shape, generator=generator, dtype=DOUBLE), dim=-1)


def made(labels: list[int], width: int = 6, **params: Any) -> CRDLoss:
    """Return a loss in float64 that is set up for samples with these labels."""
    loss = CRDLoss(**{"negatives": 7, "bank_dtype": DOUBLE, **params})
    torch.manual_seed(3)
    loss.setup(vectors(2, width), vectors(2, width), torch.arange(2), Data(labels))
    return loss


def embeddings(batch: int, width: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    student, teacher = vectors(batch, width, seed=1), vectors(batch, width, seed=2)
    return student.requires_grad_(), teacher.requires_grad_()


MANY = [n % 3 for n in range(40)]
INDEX = torch.tensor([3, 17, 8, 30])


def test_stored_cases_agree_with_banks_and_constants_after_the_step(reference: Any) -> None:
    params, dtype = reference.params, reference.dtype
    loss = Given(
        negatives=params["num_negatives"],
        temperature=params["temperature"],
        momentum=params["momentum"],
        eps=params["eps"],
        bank_dtype=dtype,
    )
    index, contrast = reference.tensor("idx"), reference.tensor("contrast_idx")
    banks = [reference.tensor(f"memory_v{number}") for number in (1, 2)]
    if reference.variant == "features":
        sides = []
        for side in ("student", "teacher"):
            feature, embedding = (
                reference.tensor(f"{side}_feature"),
                CRDEmbedding(banks[0].shape[1]),
            )
            embedding.setup(feature)
            reference.load(f"embed_{side[0]}", embedding.linear)
            sides.append(embedding(feature))
    else:
        sides = [reference.tensor(f"{side}_embedding") for side in ("student", "teacher")]
    loss.setup(*sides, index, Data([0, 1] * (params["num_samples"] // 2)))
    loss.contrast = contrast
    assert torch.equal(contrast[:, 0], index)
    z = torch.tensor([params["z_v1"], params["z_v2"]], dtype=dtype)
    state = {
        **loss.state_dict(),
        "student_bank": banks[0],
        "teacher_bank": banks[1],
        "constants": z,
    }
    loss.load_state_dict(state)
    reference.check(loss(*sides, index))
    outputs = reference.case["expected"]["outputs"]
    after = {"memory_v1_after": loss.student_bank, "memory_v2_after": loss.teacher_bank}
    after |= {"z_v1": loss.constants[0], "z_v2": loss.constants[1]}
    relative = reference.case["tolerance"][str(dtype).removeprefix("torch.")]["outputs_relative"]
    for name, array in outputs.items():
        wanted = torch.from_numpy(reference._array(array.partition("/")[2])).to(dtype)
        torch.testing.assert_close(
            after[name].reshape(wanted.shape),
            wanted,
            rtol=relative,
            atol=1e-6 if dtype == torch.float32 else 1e-12,
        )
    assert outputs.keys() == after.keys()


def by_loops(
    embedding: torch.Tensor,
    positive: torch.Tensor,
    negatives: list[torch.Tensor],
    size: int,
    z: Any = None,
    eps: float = 1e-7,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return one side's loss for rows of positives and negatives, and Z."""
    t, scores = 0.07, []
    for e, p, rows in zip(embedding, positive, negatives, strict=True):
        scores.append(torch.stack([torch.exp(e @ v / t) for v in (p, *rows)]))
    if z is None:
        z = torch.stack([row.mean() for row in scores]).mean().detach() * size
    total = 0
    for row in scores:
        prior = (len(row) - 1) / size
        x = row / z
        total = total - torch.log(x[0] / (x[0] + prior + eps))
        for other in x[1:]:
            total = total - torch.log(torch.tensor(prior) / (other + prior + eps))
    return total / len(scores), z


@pytest.mark.parametrize("rows_for_one", [0, 100], ids=["listed", "marked"])
@pytest.mark.parametrize(
    "params",
    [{}, {"positive": "relaxed"}, {"exclude": "sample"}, {"shared_negatives": True}],
    ids=str,
)
def test_the_loss_is_that_of_loops_over_what_was_drawn(
    monkeypatch: pytest.MonkeyPatch, rows_for_one: int, params: dict[str, Any]
) -> None:
    monkeypatch.setattr("distill_crd.contrastive.MOST_ROWS_FOR_ONE", rows_for_one)
    loss = made(MANY, **params)
    key = loss.seed + loss.steps
    negatives = loss._negatives(INDEX, key)(loss.teacher_bank)
    assert (negatives.marked is None) == (rows_for_one == 0 and "shared_negatives" not in params)
    places = negatives.index if negatives.marked is None else negatives.marked.T
    banks = [b.clone() for b in (loss.teacher_bank, loss.student_bank)]
    positive = [
        p.clone() for p in loss._positives(INDEX, key, (loss.student_bank, loss.teacher_bank))
    ]
    if negatives.kept is not None:
        places = [place[keeps] for place, keeps in zip(places, negatives.kept, strict=True)]
    rows = [[loss._negatives(INDEX, key)(bank).rows[place] for place in places] for bank in banks]
    ours, theirs = embeddings(4), embeddings(4)
    wanted = [by_loops(e, p, r, 40) for e, p, r in zip(theirs, positive, rows, strict=True)]
    found = loss(*ours, INDEX)
    torch.testing.assert_close(found, wanted[0][0] + wanted[1][0])
    torch.testing.assert_close(loss.constants, torch.stack([z for _, z in wanted]))
    found.backward()
    (wanted[0][0] + wanted[1][0]).backward()
    for left, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(left.grad, right.grad)


def test_listed_and_marked_negatives_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = []
    for rows in (0, 100):
        monkeypatch.setattr("distill_crd.contrastive.MOST_ROWS_FOR_ONE", rows)
        losses.append(made(MANY)(*embeddings(4), INDEX))
    torch.testing.assert_close(*losses, rtol=1e-12, atol=0)


def test_gradients_are_those_of_finite_differences() -> None:
    loss = made(MANY)
    with loss.unchanged():
        loss(*embeddings(4), INDEX)
    loss.eval()
    loss._has_constants, loss.constants = True, torch.full((2,), 50.0, dtype=DOUBLE)
    assert torch.autograd.gradcheck(lambda s, t: loss(s, t, INDEX), embeddings(4))


def test_rows_follow_by_momentum_and_the_other_rows_stay() -> None:
    loss = made(MANY, momentum=0.8)
    before = loss.student_bank.clone(), loss.teacher_bank.clone()
    given = embeddings(4)
    loss(*given, INDEX)
    for bank, old, rows in zip((loss.student_bank, loss.teacher_bank), before, given, strict=True):
        wanted = old.clone()
        for place, row in zip(INDEX.tolist(), rows.detach(), strict=True):
            moved = 0.8 * old[place] + 0.2 * row
            wanted[place] = moved / moved.square().sum().sqrt()
        torch.testing.assert_close(bank, wanted)


def test_of_a_sample_that_comes_twice_the_last_counts() -> None:
    loss, index = made(MANY, momentum=0.0), torch.tensor([5, 9, 5])
    student, teacher = embeddings(3)
    loss(student, teacher, index)
    torch.testing.assert_close(loss.student_bank[[9, 5]], student[1:].detach())


def test_what_a_step_does_with_banks_does_not_grow_with_them() -> None:
    index = torch.tensor([10**12, 3, 10**12, 3, 7])
    assert last_of_each(index).tolist() == [2, 3, 2, 3, 4]


@pytest.mark.parametrize("way", ["listed", "marked"])
def test_at_the_lowest_temperature_gradients_are_those_of_float64(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distill_crd.contrastive.MOST_ROWS_FOR_ONE", 0 if way == "listed" else 100)
    found = []
    for dtype in (torch.float32, DOUBLE):
        loss = made(MANY, temperature=SMALLEST_TEMPERATURE, bank_dtype=DOUBLE).to(dtype)
        for bank in (loss.student_bank, loss.teacher_bank):
            bank.copy_(F.normalize(bank, dim=1))
        student, teacher = embeddings(4)
        with torch.no_grad():  # as far from their own rows as can be
            student[0], teacher[1] = -loss.teacher_bank[3], -loss.student_bank[17]
        value = loss(student.to(dtype), teacher.to(dtype), INDEX)
        value.backward()
        found.append((value.double(), student.grad, teacher.grad))
    for single, double in zip(*found, strict=True):
        torch.testing.assert_close(single, double, rtol=1e-4, atol=1e-4)


def test_a_gradient_is_not_to_be_differentiated_again() -> None:
    student, teacher = embeddings(4)
    value = made(MANY)(student, teacher, INDEX)
    with pytest.raises(RuntimeError, match=r"cannot be differentiated again: .* create_graph=True"):
        torch.autograd.grad(value, student, create_graph=True)


@pytest.mark.parametrize("index", [torch.arange(1), torch.arange(5), torch.arange(4.0)])
def test_an_index_that_is_not_that_of_the_embeddings_is_refused(index: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"int64, of each of 4 embeddings.*it is torch.*\("):
        made(MANY)(*embeddings(4), index)


def test_a_loss_without_banks_says_what_to_do() -> None:
    with pytest.raises(RuntimeError, match="no banks yet: call setup"):
        CRDLoss()(*embeddings(4), INDEX)


def test_constants_are_set_by_the_first_step_and_stay() -> None:
    loss = made(MANY)
    assert loss.constants.tolist() == [-1.0, -1.0]
    loss(*embeddings(4), INDEX)
    first = loss.constants.clone()
    assert (first > 0).all()
    loss(*embeddings(4), INDEX + 1)
    assert torch.equal(loss.constants, first)


def test_in_eval_mode_and_while_held_nothing_changes() -> None:
    loss = made(MANY)
    before = copy.deepcopy(loss.state_dict())
    with loss.unchanged():
        held = loss(*embeddings(4), INDEX)
    loss.eval()
    assert torch.equal(loss(*embeddings(4), INDEX), held)
    assert all(torch.equal(before[name], value) for name, value in loss.state_dict().items())
    assert torch.equal(loss.train()(*embeddings(4), INDEX), held)
    assert not torch.equal(before["steps"], loss.steps)


def test_a_loss_that_goes_on_from_a_checkpoint_draws_the_next_negatives() -> None:
    loss = made(MANY)
    loss(*embeddings(4), INDEX)
    again = CRDLoss(negatives=7, bank_dtype=DOUBLE)
    again.setup(vectors(2, 6), vectors(2, 6), torch.arange(2), Data(MANY))
    again.load_state_dict(copy.deepcopy(loss.state_dict()))
    for step in range(3):
        assert torch.equal(*(one(*embeddings(4), INDEX + step) for one in (loss, again)))
    for name, value in loss.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert {
        "student_bank",
        "teacher_bank",
        "constants",
        "seed",
        "steps",
    } == loss.state_dict().keys()


def test_banks_have_a_row_for_each_sample_and_half_precision_halves_them() -> None:
    loss = made(MANY, bank_dtype=torch.bfloat16)
    assert loss.student_bank.shape == (40, 6)
    assert loss.student_bank.dtype == torch.bfloat16
    bound = (6 / 3) ** -0.5
    assert -bound <= loss.student_bank.min() < -0.8 * bound
    exact = made(MANY)
    exact.load_state_dict(loss.state_dict())
    rounded, wanted = loss(*embeddings(4), INDEX), exact(*embeddings(4), INDEX)
    torch.testing.assert_close(rounded, wanted, rtol=0.01, atol=0)


def test_a_queue_keeps_the_last_embeddings_and_contrasts_with_those_of_other_classes() -> None:
    loss = made(MANY, queue=6)
    student, teacher = embeddings(4)
    first = loss(student, teacher, INDEX)
    torch.testing.assert_close(loss.student_bank[:4], student.detach())
    assert loss.queued.tolist() == [*loss.classes.of[INDEX].tolist(), -1, -1]
    loss(*embeddings(4), INDEX + 1)
    assert loss.queued.tolist() == [
        *loss.classes.of[INDEX + 1][2:].tolist(),
        *loss.classes.of[INDEX][2:].tolist(),
        *loss.classes.of[INDEX + 1][:2].tolist(),
    ]
    assert first.isfinite()
    own, queue, labels = loss.classes.of[INDEX], loss.teacher_bank.clone(), loss.queued.clone()
    theirs = embeddings(4)
    rows = [queue[labels != label] for label in own]
    others = [loss.student_bank.clone()[labels != label] for label in own]
    z = loss.constants
    wanted = by_loops(theirs[0], theirs[1].detach(), rows, 40, z[0])[0]
    wanted = wanted + by_loops(theirs[1], theirs[0].detach(), others, 40, z[1])[0]
    torch.testing.assert_close(loss(*embeddings(4), INDEX), wanted)


def test_more_rows_than_a_queue_has_leave_the_last() -> None:
    loss = made(MANY, queue=3)
    student, teacher = embeddings(4)
    loss(student, teacher, INDEX)
    assert torch.equal(loss.student_bank.sort(0).values, student.detach()[1:].sort(0).values)


def test_identical_sides_a_batch_of_one_and_a_lonely_class_give_finite_losses() -> None:
    loss = made([0, 1, 1, 1], negatives=2, positive="relaxed")
    one = vectors(1, 6, seed=1).requires_grad_()
    value = loss(one, one, torch.tensor([0]))
    value.backward()
    assert value.isfinite()
    assert one.grad.isfinite().all()


def test_fewer_others_than_negatives_come_once_each() -> None:
    loss = made([0, 0, 0, 1, 1], negatives=50)
    negatives = loss._negatives(torch.tensor([0, 3]), loss.seed)(loss.teacher_bank)
    assert negatives.count.tolist() == [2, 3]


@pytest.mark.parametrize("way", ["listed", "marked"])
def test_bf16_embeddings_under_autocast_are_close(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distill_crd.contrastive.MOST_ROWS_FOR_ONE", 0 if way == "listed" else 100)
    exact = made(MANY)(*embeddings(4), INDEX)
    single = made(MANY, bank_dtype=torch.float32).float()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = single(*(e.bfloat16() for e in embeddings(4)), INDEX)
    assert rounded.dtype == single.constants.dtype == torch.float32
    torch.testing.assert_close(rounded.double(), exact, rtol=0.01, atol=0)


def test_embeddings_of_different_widths_are_refused() -> None:
    with pytest.raises(ValueError, match=r"same width, got \(2, 6\) and \(2, 5\); give both"):
        CRDLoss().setup(vectors(2, 6), vectors(2, 5), torch.arange(2), Data(MANY))


def test_a_row_that_its_embedding_takes_back_stays_finite() -> None:
    loss = made(MANY, momentum=0.5)
    rows = F.normalize(loss.student_bank[INDEX], dim=1)
    loss.student_bank[INDEX] = rows
    loss(-rows, rows, INDEX)
    assert loss.student_bank.isfinite().all()


def test_data_without_labels_is_refused_with_the_way_out() -> None:
    unlabelled = [(torch.zeros(1), None)] * 3
    with pytest.raises(ValueError, match=r"has no class labels.*exclude: sample does without them"):
        CRDLoss().setup(vectors(2, 6), vectors(2, 6), torch.arange(2), unlabelled)
    loss = CRDLoss(negatives=2, exclude="sample", bank_dtype=DOUBLE)
    loss.setup(vectors(2, 6), vectors(2, 6), torch.arange(2), unlabelled)
    assert loss(*embeddings(2), torch.tensor([0, 2])).isfinite()


def test_data_of_one_class_is_refused() -> None:
    with pytest.raises(ValueError, match="all 3 samples of the data are of one class"):
        made([1, 1, 1])


def test_banks_are_told_and_refused_before_they_are_allocated(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made([0, 1] * 100, bank_dtype=torch.float32)
    assert "two banks of 200 x 6 float32 take 9.6 kB on cpu, where" in capsys.readouterr().err
    monkeypatch.setattr("distill.memory.free_memory", lambda device: 1000)
    monkeypatch.setattr("distill_crd.contrastive.random_rows", None)
    with pytest.raises(ValueError, match=r"8\.6 kB are missing; bank_dtype: bfloat16 halves them"):
        made([0, 1] * 100, bank_dtype=torch.float32)


def test_what_does_not_fit_is_refused_before_any_label_is_read() -> None:
    class Unread:
        def __len__(self) -> int:
            return 10**12

    with pytest.raises(ValueError, match="two banks of 1,000,000,000,000 x 6 float32 take"):
        CRDLoss().setup(vectors(2, 6), vectors(2, 6), torch.arange(2), Unread())


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"negatives": 0}, "negatives must be a whole number > 0, got 0"),
        ({"temperature": 0.0}, r"temperature must be at least 0.0125 \(below.*, got 0.0"),
        ({"momentum": 1.0}, "momentum must be from 0 to below 1, got 1.0"),
        ({"positive": "same"}, "positive must be one of 'exact', 'relaxed', got 'same'"),
        ({"exclude": "none"}, "exclude must be one of 'class', 'sample', got 'none'"),
        ({"queue": 0}, "queue must be a whole number > 0, got 0"),
        (
            {"bank_dtype": torch.float8_e4m3fn},
            "bank_dtype must be float32, bfloat16 or float16, got",
        ),
        ({"bank_dtype": "bfloat16"}, "bank_dtype must be float32, bfloat16 or float16, got"),
        ({"bank_dtype": torch.int8}, "bank_dtype must be float32, bfloat16 or float16, got"),
        ({"eps": -1.0}, "eps must be >= 0"),
        ({"queue": 9, "shared_negatives": True}, "queue must be None with shared_negatives"),
        ({"queue": 9, "positive": "relaxed"}, "or positive, got 9"),
    ],
)
def test_wrong_parameters_are_refused(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CRDLoss(**params)


def test_an_embedding_has_length_one_and_finds_its_width() -> None:
    embedding = CRDEmbedding(5)
    embedding.setup(torch.randn(2, 3, 2, 2))
    assert isinstance(embedding.linear, nn.Linear)
    assert embedding.linear.in_features == 12
    rows = embedding(torch.randn(4, 3, 2, 2))
    assert rows.shape == (4, 5)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(4))
    with pytest.raises(ValueError, match="out_features must be a whole number > 0"):
        CRDEmbedding(0)


def test_with_a_ratio_negatives_are_of_the_pool_of_the_class() -> None:
    loss = made(MANY, negatives=50, ratio=0.5)
    index = torch.tensor([0, 3, 1])
    negatives = loss._negatives(index, torch.tensor(5))(loss.teacher_bank)
    assert negatives.index is not None
    assert negatives.kept is not None
    first, same_class, other = (
        set(row[kept].tolist()) for row, kept in zip(negatives.index, negatives.kept, strict=True)
    )
    assert first == same_class != other
    assert negatives.count.tolist() == [13, 13, 13]
    loss(*embeddings(3), index).backward()


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"ratio": 0.0}, "ratio must be above 0 and at most 1, got 0.0"),
        ({"ratio": 1.5}, "ratio must be above 0 and at most 1, got 1.5"),
        ({"ratio": 0.5, "queue": 9}, "ratio must be 1 with shared_negatives or queue, got 0.5"),
        (
            {"ratio": 0.5, "shared_negatives": True},
            "ratio must be 1 with shared_negatives or queue, got 0.5",
        ),
    ],
)
def test_a_ratio_that_cannot_be_is_refused(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CRDLoss(**params)
