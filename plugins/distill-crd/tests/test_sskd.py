"""SSKD's second stage: reference numbers, a formula by hand, its terms alone, what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from distill.testing import LossConformance
from distill_crd.self_supervision import SelfSupervisionLoss
from distill_crd.sskd import SSKDLoss, SSKDSimilarityLoss, SSKDTransformedLoss
from distill_crd.view_rows import SplitViews

METHOD = "sskd"


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def batch(images=5, classes=7, student_width=6, teacher_width=9):
    """Arguments of the loss; the teacher is often wrong."""
    return {
        "student": randn(4 * images, classes, seed=1),
        "teacher": 3 * randn(4 * images, classes, seed=2),
        "student_embeddings": randn(4 * images, student_width, seed=3),
        "teacher_embeddings": randn(4 * images, teacher_width, seed=4),
        "targets": torch.arange(images) % classes,
    }


def test_equals_the_reference_numbers(reference):
    if reference.variant == "stage1":
        reference.check(SelfSupervisionLoss()(reference.tensor("ss")))
        return
    names = ("student_logits", "teacher_logits", "student_ss", "teacher_ss", "target")
    reference.check(SSKDLoss(**reference.params)(*(reference.tensor(name) for name in names)))


def softmax(row, temperature):
    powers = [math.exp(value / temperature) for value in row]
    return [power / sum(powers) for power in powers]


def divergence(teacher, student, temperature):
    pairs = zip(softmax(teacher, temperature), softmax(student, temperature), strict=True)
    return temperature**2 * sum(p * math.log(p / q) for p, q in pairs)


def cosines(embeddings):
    rows = [[v / math.sqrt(sum(w * w for w in row)) for v in row] for row in embeddings.tolist()]
    originals = rows[::4]
    return [
        [sum(a * b for a, b in zip(row, original, strict=True)) for original in originals]
        for number, row in enumerate(rows)
        if number % 4
    ]


def kept_mean(teacher, student, answers, temperature, ratio):
    ranks = []
    for row, answer in zip(teacher, answers, strict=True):
        ranks.append(sum(value > row[answer] for value in row))
    wrong = sum(rank > 0 for rank in ranks)
    count = len(ranks) - wrong + int(wrong * ratio)
    kept = sorted(range(len(ranks)), key=lambda row: (ranks[row], row))[:count]
    return sum(divergence(teacher[i], student[i], temperature) for i in kept) / count


def terms_by_hand(given, kl_temp, ss_temp, tf_temp, ss_ratio, tf_ratio):
    student, teacher = given["student"].tolist(), given["teacher"].tolist()
    labels, images = given["targets"].tolist(), len(given["targets"])
    hard = [-math.log(softmax(student[4 * i], 1)[labels[i]]) for i in range(images)]
    soft = [divergence(teacher[4 * i], student[4 * i], kl_temp) for i in range(images)]
    copies = [i for i in range(4 * images) if i % 4]
    own = [i // 4 for i in copies]
    of_teacher, of_student = (cosines(given[f"{s}_embeddings"]) for s in ("teacher", "student"))
    return (
        sum(hard) / images,
        sum(soft) / images,
        kept_mean(of_teacher, of_student, own, ss_temp, ss_ratio),
        kept_mean(
            [teacher[i] for i in copies],
            [student[i] for i in copies],
            [labels[i] for i in own],
            tf_temp,
            tf_ratio,
        ),
    )


@pytest.mark.parametrize("term", range(4))
@pytest.mark.parametrize(
    "settings", [(4.0, 0.5, 4.0, 0.75, 1.0), (2.0, 0.3, 1.5, 0.4, 0.6), (1.0, 1.0, 3.0, 0.1, 0.1)]
)
def test_each_term_equals_the_formula_written_out(term, settings):
    given = batch()
    loss = SSKDLoss(*settings, loss_weights=[float(number == term) for number in range(4)])
    expected = terms_by_hand(given, *settings)[term]
    assert loss(**given).item() == pytest.approx(expected, rel=1e-12)


def test_the_terms_are_added_up_by_their_weights():
    given, weights = batch(), (0.1, 0.9, 10.0, 2.7)
    terms = terms_by_hand(given, 4.0, 0.5, 4.0, 0.75, 1.0)
    expected = sum(weight * term for weight, term in zip(weights, terms, strict=True))
    assert SSKDLoss(loss_weights=weights)(**given).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("tf_ratio", [1.0, 0.5])
def test_terms_of_their_own_give_the_same_loss_and_gradients(tf_ratio):
    whole, parted = batch(), batch()
    for given in (whole, parted):
        given["student"].requires_grad_()
        given["student_embeddings"].requires_grad_()
    loss = SSKDLoss(tf_ratio=tf_ratio)(**whole)
    loss.backward()
    student, teacher, targets = (parted[name] for name in ("student", "teacher", "targets"))
    embeddings = parted["student_embeddings"], parted["teacher_embeddings"]
    own, answers = (SplitViews()(rows)["originals"] for rows in (student, teacher))
    kl = F.kl_div((own / 4).log_softmax(1), (answers / 4).softmax(1), reduction="batchmean")
    total = (
        F.cross_entropy(own, targets)
        + 0.9 * 16 * kl
        + 10.0 * SSKDSimilarityLoss()(*embeddings)
        + 2.7 * SSKDTransformedLoss(ratio=tf_ratio)(student, teacher, targets)
    )
    total.backward()
    torch.testing.assert_close(loss, total)
    for name in ("student", "student_embeddings"):
        torch.testing.assert_close(whole[name].grad, parted[name].grad)


class TestSSKDLoss(LossConformance):
    teacher = "teacher"

    def make(self):
        return SSKDLoss(tf_ratio=0.5)

    def tensors(self, batch):
        return {
            "student": torch.randn(4 * batch, 5),
            "teacher": torch.randn(4 * batch, 5),
            "student_embeddings": torch.randn(4 * batch, 6),
            "teacher_embeddings": torch.randn(4 * batch, 6),
            "targets": torch.arange(batch) % 5,
        }


class TestSSKDLossOfEmbeddings(TestSSKDLoss):
    student = "student_embeddings"
    teacher = "teacher_embeddings"


class TestSSKDSimilarityLoss(LossConformance):
    student = "student_embeddings"
    teacher = "teacher_embeddings"

    def make(self):
        return SSKDSimilarityLoss()

    def tensors(self, batch):
        return {name: torch.randn(4 * batch, 6) for name in (self.student, self.teacher)}


class TestSSKDTransformedLoss(LossConformance):
    teacher = "teacher"

    def make(self):
        return SSKDTransformedLoss()

    def tensors(self, batch):
        return {name: torch.randn(4 * batch, 5) for name in ("student", "teacher")}


def test_divergences_are_0_where_student_equals_teacher():
    given = batch(student_width=6, teacher_width=6)
    given["student"] = given["teacher"].clone().requires_grad_()
    given["student_embeddings"] = given["teacher_embeddings"].clone().requires_grad_()
    loss = SSKDLoss(loss_weights=[0.0, 0.9, 10.0, 2.7])(**given)
    loss.backward()
    assert loss.abs() < 1e-12
    assert all(given[n].grad.abs().max() < 1e-12 for n in ("student", "student_embeddings"))


@pytest.mark.parametrize("loss", [SSKDLoss(tf_ratio=0.5), SSKDLoss(ss_ratio=1.0)])
def test_nothing_is_read_back_from_the_device(loss):
    """Tensors without data would raise where a number or a shape depends on it."""
    given = {name: tensor.to("meta") for name, tensor in batch().items()}
    given["student"].requires_grad_()
    given["student_embeddings"].requires_grad_()
    loss(**given).backward()
    SelfSupervisionLoss()(given["student_embeddings"]).backward()
    assert given["student"].grad.shape == (20, 7)
    assert given["student_embeddings"].grad.shape == (20, 6)


def test_where_no_row_is_kept_the_term_is_0():
    labels = torch.tensor([0, 1])
    wrong = 10 * F.one_hot(1 - labels, 3).double().repeat_interleave(4, 0)
    student = randn(8, 3).requires_grad_()
    loss = SSKDTransformedLoss(ratio=0.1)(student, wrong, labels)
    loss.backward()
    assert loss == 0
    assert not student.grad.any()
    assert SSKDTransformedLoss(ratio=0.2)(student, wrong, labels) > 0


def test_a_class_that_the_teacher_excludes_counts_nothing():
    given = batch()
    given["teacher"][:, 6] = -torch.inf
    given["student"].requires_grad_()
    loss = SSKDLoss()(**given)
    loss.backward()
    assert loss.isfinite()
    assert given["student"].grad.isfinite().all()


def test_a_batch_of_one_image_keeps_the_other_terms_and_says_so():
    given = batch(images=1)
    with pytest.warns(UserWarning, match="SSKDSimilarityLoss: a batch of one image"):
        loss = SSKDLoss()(**given)
    terms = terms_by_hand(given, 4.0, 0.5, 4.0, 0.75, 1.0)
    assert terms[2] == 0
    assert loss.item() == pytest.approx(terms[0] + 0.9 * terms[1] + 2.7 * terms[3], rel=1e-12)


def test_all_processes_are_this_one_where_it_is_alone():
    given = batch()
    for tf_ratio in (1.0, 0.5):
        one, other = (SSKDLoss(tf_ratio=tf_ratio, gather=g)(**given) for g in ("none", "all"))
        assert torch.equal(one, other)


def test_bfloat16_is_within_one_percent():
    given = batch(images=16)
    full = SSKDLoss(ss_ratio=1.0)(**given)
    rounded = {n: t.bfloat16() if t.is_floating_point() else t for n, t in given.items()}
    loss = SSKDLoss(ss_ratio=1.0)(**rounded)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(full.item(), rel=0.01)


def test_labels_are_needed_only_where_they_count():
    given = batch()
    given.pop("targets")
    with pytest.raises(ValueError, match=r"SSKDLoss needs a class label of each.*gives none"):
        SSKDLoss()(**given)
    with pytest.raises(ValueError, match="SSKDTransformedLoss needs a class label"):
        SSKDTransformedLoss(ratio=0.5)(given["student"], given["teacher"])
    assert SSKDTransformedLoss()(given["student"], given["teacher"]) > 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"targets": torch.arange(20) % 7}, r"4 rows for each of 20 labels.*\(20, 7\).*Rotations"),
        ({"targets": torch.rand(5, 7)}, r"must be class indices \(B\), got \(5, 7\).*float32"),
        ({"student": torch.zeros(20, 6)}, r"logits \(4B, K\) of one shape, got \(20, 6\) and"),
        ({"teacher": torch.zeros(20, 7, 2)}, r"of one shape, got \(20, 7\) and \(20, 7, 2\)"),
        ({"student_embeddings": torch.zeros(16, 6)}, r"of one batch, got student \(16, 6\)"),
        ({"teacher_embeddings": torch.zeros(20)}, r"teacher_embeddings must be vectors"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_shapes(changed, message):
    with pytest.raises(ValueError, match=message):
        SSKDLoss()(**{**batch(), **changed})


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"kl_temp": 0.0}, "SSKDLoss: kl_temp must be a finite number > 0, got 0.0"),
        ({"ss_temp": math.nan}, "ss_temp must be"),
        ({"tf_temp": -1.0}, "tf_temp must be"),
        ({"ss_ratio": 1.1}, "ss_ratio must be a number from 0 to 1, got 1.1"),
        ({"tf_ratio": -0.1}, "tf_ratio must be"),
        ({"loss_weights": [1.0, 0.9, 10.0]}, "loss_weights must be four finite numbers >= 0.*ce"),
        ({"loss_weights": [1.0, 0.9, 10.0, -1.0]}, "loss_weights must be"),
        ({"gather": "both"}, "gather must be one of 'none', 'all'"),
    ],
)
def test_a_parameter_out_of_range_is_named(params, message):
    with pytest.raises(ValueError, match=message):
        SSKDLoss(**params)


@pytest.mark.parametrize("kind", [SSKDSimilarityLoss, SSKDTransformedLoss])
def test_parameters_of_the_terms_are_checked_too(kind):
    with pytest.raises(ValueError, match=f"{kind.__name__}: temperature must be"):
        kind(temperature=0.0)
    with pytest.raises(ValueError, match=f"{kind.__name__}: ratio must be"):
        kind(ratio=2.0)
    with pytest.raises(ValueError, match=f"{kind.__name__}: gather must be"):
        kind(gather="each")
