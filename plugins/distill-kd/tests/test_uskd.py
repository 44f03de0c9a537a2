"""USKDLoss and its head: the method written out, one label and two, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch

from distill.testing import LossConformance
from distill_kd.uskd import USKDHead, USKDLoss

each_rank = pytest.mark.parametrize("rank", ["paper", "code"])


def logits(*shape, seed=0, scale=2.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=dtype)


def labels(size, classes, seed=9):
    return torch.randint(classes, (size,), generator=torch.Generator().manual_seed(seed))


def softmax(row):
    powers = [math.exp(value) for value in row]
    return [power / sum(powers) for power in powers]


def values_by_hand(row):
    """Return each label of class probabilities with its value: one or two."""
    order = sorted(range(len(row)), key=lambda k: -row[k])
    third = row[order[2]] if len(row) > 2 else 0.0
    return {k: row[k] for n, k in enumerate(order[:2]) if n == 0 or row[k] > third}


def soft_labels_by_hand(strong, targets):
    """Return P for each sample: label -> its soft label."""
    values = [values_by_hand(row) for row in targets]
    found = [dict.fromkeys(v, 0.0) for v in values]
    for place in (0, 1):
        these = [(b, list(v)[place]) for b, v in enumerate(values) if len(v) > place]
        squares = [strong[b][k] ** 2 for b, k in these]
        for (b, k), square in zip(these, squares, strict=True):
            found[b][k] = square + values[b][k] - sum(squares) / len(squares)
    return found


def zipf_by_hand(strong, weak, targets, rank):
    """Return n for each class but the labels of one sample."""
    seen = [math.log(s) for s in strong] if rank == "code" else strong
    scores = []
    for k in range(len(strong)):
        parts = ((weak[k], weak), (seen[k], seen))
        scores.append(sum(x / (1 - sum(of[y] for y in targets) + 1e-6) for x, of in parts))
    order = sorted(range(len(strong)), key=lambda k: -scores[k])
    law = {k: 1 / (position + 1) for position, k in enumerate(order) if k not in targets}
    return {k: value / sum(law.values()) for k, value in law.items()}


def parts_by_hand(student, weak, targets, rank):
    """Return the means of the label's part, the others' and the weak logits'."""
    strong, weak = ([softmax(row) for row in side.tolist()] for side in (student, weak))
    targets = targets.tolist()
    sums = [0.0, 0.0, 0.0]
    classes = len(strong[0])
    soft = soft_labels_by_hand(strong, targets)
    for z, s, w, y, p in zip(student.tolist(), strong, weak, targets, soft, strict=True):
        sums[0] -= sum(value * math.log(s[k]) for k, value in p.items())
        n = zipf_by_hand(s, w, p, rank)
        rest = math.log(sum(math.exp(z[k]) for k in n)) if n else 0.0
        sums[1] -= sum(value * (z[k] - rest) for k, value in n.items())
        sums[2] -= sum((0.9 * y[k] + 0.1 / classes) * math.log(w[k]) for k in range(classes))
    return [value / len(strong) for value in sums]


def one_hot(targets, classes):
    return torch.nn.functional.one_hot(targets, classes).double()


def mixed(shape, seed=3):
    """Return labels of two classes, of one class, and of all."""
    soft = logits(*shape, seed=seed).softmax(1)
    one, two = labels(shape[0], shape[1], seed=4), labels(shape[0], shape[1], seed=5)
    soft[::3] = 0.3 * one_hot(one, shape[1])[::3] + 0.7 * one_hot(two, shape[1])[::3]
    return soft


SHAPES = [(1, 2), (3, 7), (6, 4), (5, 3)]


@each_rank
@pytest.mark.parametrize("weights", [(0.3, 1.7, 0.2), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0)])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
def test_equals_the_method_written_out(shape, soft, weights, rank):
    student, weak = logits(*shape, seed=1), logits(*shape, seed=2)
    targets = mixed(shape) if soft else labels(*shape)
    known = targets if soft else one_hot(targets, shape[1])
    parts = parts_by_hand(student, weak, known, rank)

    loss = USKDLoss(*weights, rank=rank)(student, weak, targets)

    expected = sum(weight * part for weight, part in zip(weights, parts, strict=True))
    assert loss.item() == pytest.approx(expected, rel=1e-9)


@each_rank
@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
def test_gradients_are_those_with_the_soft_labels_for_constants(soft, rank):
    shape = (6, 5)
    student, weak = (logits(*shape, seed=n).requires_grad_() for n in (1, 2))
    targets = mixed(shape) if soft else labels(*shape)
    known = (targets if soft else one_hot(targets, 5)).tolist()
    strong = [softmax(row) for row in student.tolist()]
    of_labels, of_rest, others = (torch.zeros(shape, dtype=torch.float64) for _ in range(3))
    for b, p in enumerate(soft_labels_by_hand(strong, known)):
        for k, value in p.items():
            of_labels[b, k] = value
        for k, value in zipf_by_hand(strong[b], softmax(weak[b].tolist()), p, rank).items():
            of_rest[b, k], others[b, k] = value, 1.0
    rest = student.masked_fill(others == 0, -1e4).log_softmax(1)
    smoothed = 0.9 * torch.tensor(known).double() + 0.1 / 5
    each = 0.3 * of_labels * student.log_softmax(1) + 1.7 * of_rest * rest
    expected = -(each + 0.2 * smoothed * weak.log_softmax(1)).sum(1).mean()

    loss = USKDLoss(0.3, 1.7, 0.2, rank)(student, weak, targets)

    torch.testing.assert_close(
        torch.autograd.grad(loss, (student, weak)), torch.autograd.grad(expected, (student, weak))
    )


def test_the_weak_logits_learn_smoothed_labels_and_nothing_else_moves_them():
    student, weak, targets = logits(4, 5, seed=1), logits(4, 5, seed=2), labels(4, 5)
    weak.requires_grad_()
    loss = USKDLoss(2.0, 3.0, 0.5)(student.requires_grad_(), weak, targets)
    smoothed = torch.nn.functional.cross_entropy(weak, targets, label_smoothing=0.1)
    torch.testing.assert_close(
        torch.autograd.grad(loss, weak), torch.autograd.grad(0.5 * smoothed, weak)
    )


def test_a_batch_of_one_takes_the_label_s_value():
    student, weak, targets = logits(1, 5, seed=1), logits(1, 5, seed=2), labels(1, 5)
    loss = USKDLoss(1.0, 0.0, 0.0)(student, weak, targets)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(student, targets))


def test_ranks_follow_the_sum_of_both_shares_of_what_the_label_leaves():
    """Strong and weak disagree on classes 1 and 2; the weak are surer of the label."""
    strong = torch.tensor([[0.2, 0.4, 0.3, 0.1]]).log()
    weak = torch.tensor([[0.8, 0.04, 0.1, 0.06]]).log()
    # 0.04 / 0.2 + 0.4 / 0.8 = 0.7 for class 1, 0.5 + 0.375 for 2, 0.3 + 0.125 for 3, label 4.25
    rest = torch.tensor([4, 3, 1]).log() - math.log(8)
    zipf = torch.tensor([1 / 3, 1 / 2, 1 / 4]) / (1 / 2 + 1 / 3 + 1 / 4)
    loss = USKDLoss(0.0, 1.0, 0.0, "paper")(strong, weak, torch.tensor([0]))
    torch.testing.assert_close(loss, -(zipf * rest).sum())


def test_the_label_takes_a_rank_of_its_own():
    logits_of_all = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    found = [
        USKDLoss(0.0, 1.0, 0.0, "paper")(logits_of_all, logits_of_all, torch.tensor([label]))
        for label in (0, 3)
    ]
    for value, others, law in zip(
        found, ([1, 2, 3], [0, 1, 2]), ([2, 3, 4], [1, 2, 3]), strict=True
    ):
        zipf = 1 / torch.tensor(law)
        rest = logits_of_all[0, others].log_softmax(0)
        torch.testing.assert_close(value, -(zipf / zipf.sum() * rest).sum())


def test_smoothed_labels_of_one_class_have_one_label():
    student, weak, targets = logits(4, 5, seed=1), logits(4, 5, seed=2), labels(4, 5)
    smoothed = 0.9 * one_hot(targets, 5) + 0.1 / 5
    loss = USKDLoss(1.0, 1.0, 0.0)
    value = 0.9 + 0.1 / 5
    log_s = student.log_softmax(1).gather(1, targets[:, None])
    # The square about the mean is what it is; the label's value is 0.92 in place of 1.
    expected = loss(student, weak, targets) + (1 - value) * log_s.mean()
    torch.testing.assert_close(loss(student, weak, smoothed), expected)


def test_the_mean_depends_on_which_samples_are_in_the_batch():
    student, weak = logits(6, 5, seed=1), logits(6, 5, seed=2)
    targets = torch.cat([student[:3].argmax(1), student[3:].argmin(1)])

    def halves(loss):
        parts = [loss(student[at], weak[at], targets[at]) for at in (slice(3), slice(3, 6))]
        return sum(parts) / 2

    label, others = USKDLoss(1.0, 0.0, 0.0), USKDLoss(0.0, 1.0, 1.0)
    torch.testing.assert_close(halves(others), others(student, weak, targets))
    assert (halves(label) - label(student, weak, targets)).abs() > 1e-3


def test_weak_logits_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"student \(4, 5\) and weak \(4, 6\)"):
        USKDLoss()(torch.zeros(4, 5), torch.zeros(4, 6), torch.zeros(4, dtype=torch.int64))


class TestUSKDLoss(LossConformance):
    def make(self):
        return USKDLoss(0.5, 0.5, 0.5)

    def tensors(self, batch):
        return {
            "student": torch.randn(batch, 5),
            "weak": torch.randn(batch, 5),
            "targets": torch.randint(5, (batch,)),
        }

    # Not by finite differences, for soft labels are constants: see the test of gradients above.
    test_gradient_is_that_of_the_formula = None


class TestUSKDLossRankedAsInThePaper(TestUSKDLoss):
    def make(self):
        return USKDLoss(0.5, 0.5, 0.5, "paper")


@pytest.mark.parametrize(
    ("shape", "positions"), [((3, 6), ()), ((3, 6, 2, 4), (2, 3)), ((3, 5, 6), (1,))]
)
def test_the_head_is_a_linear_layer_behind_a_mean_over_positions(shape, positions):
    head, features = USKDHead(), logits(*shape, dtype=torch.float32).requires_grad_()
    head.setup(features, torch.zeros(3, 10))
    weak = head(features, torch.zeros(3, 10))
    mean = features.mean(positions) if positions else features
    torch.testing.assert_close(weak, mean @ head.linear.weight.T + head.linear.bias)
    weak.sum().backward()
    assert features.grad.ne(0).all()
    assert (head.in_features, head.num_classes) == (6, 10)


def test_the_head_is_built_of_its_parameters_or_of_what_it_meets():
    assert USKDHead(6, 10).linear.weight.shape == (10, 6)
    head = USKDHead(num_classes=10)
    assert head.linear is None
    head.setup(torch.zeros(2, 6))
    assert head.linear.weight.shape == (10, 6)
    assert head(torch.zeros(3, 6, dtype=torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize(
    ("work", "error", "message"),
    [
        (lambda: USKDHead(0), ValueError, "in_features must be a whole number >= 1, got 0"),
        (lambda: USKDHead(num_classes=0), ValueError, "num_classes must be a whole number >= 1"),
        (lambda: USKDHead()(torch.zeros(2, 3)), RuntimeError, "call setup with features"),
        (lambda: USKDHead().setup(torch.zeros(2, 3)), ValueError, "give num_classes, or wire"),
        (lambda: USKDHead(4, 5).setup(torch.zeros(2, 3)), ValueError, "is 4, .* have 3"),
        (lambda: USKDHead(4, 5)(torch.zeros(2, 3)), ValueError, r"is 4, .*\(2, 3\) have 3"),
        (lambda: USKDHead(3, 5)(torch.zeros(2)), ValueError, r"must be maps .* got \(2,\)"),
    ],
)
def test_the_head_says_what_it_lacks(work, error, message):
    with pytest.raises(error, match=f"USKDHead.*{message}"):
        work()


def test_both_classes_of_two_leave_nothing_to_the_others():
    student, weak = logits(3, 2, seed=1).requires_grad_(), logits(3, 2, seed=2)
    loss = USKDLoss(0.0, 1.0, 0.0)(
        student, weak, torch.full((3, 2), 0.5).double() + 0.1 * weak.sign()
    )
    loss.backward()
    assert loss.item() == 0
    assert student.grad.eq(0).all()


def test_gathering_takes_the_mean_over_the_samples_of_all_processes(monkeypatch):
    student, weak = logits(6, 5, seed=1), logits(6, 5, seed=2)
    targets = torch.cat([student[:3].argmax(1), student[3:].argmin(1)])
    targets[1] = -100
    whole = USKDLoss(gather="all")(student, weak, targets) * 5
    square = student.softmax(1).gather(1, targets.clamp_min(0)[:, None]).square()
    everyone = {torch.float64: square, torch.bool: targets[:, None] >= 0}
    monkeypatch.setattr("distill_kd.uskd.global_rows", lambda rows: everyone[rows.dtype])
    halves = [
        USKDLoss(gather="all")(student[at], weak[at], targets[at]) for at in (slice(3), slice(3, 6))
    ]
    torch.testing.assert_close(2 * halves[0] + 3 * halves[1], whole)


def test_weak_logits_learn_in_parts_too(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    student, weak = (torch.randn(8, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    targets = torch.randint(5, (8,), generator=generator)
    leaves = [student.requires_grad_(), weak.requires_grad_()]
    whole = torch.autograd.grad(USKDLoss(mu=0.5)(*leaves, targets), leaves)
    monkeypatch.setattr("distill_kd.logits.AT_ONCE", 10)
    parts = torch.autograd.grad(USKDLoss(mu=0.5)(*leaves, targets), leaves)
    assert whole[1].abs().sum() > 0
    torch.testing.assert_close(parts, whole)
