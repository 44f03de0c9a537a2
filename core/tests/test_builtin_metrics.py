import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from distill import Batch, DataError
from distill.builtin.agreement import agreement
from distill.builtin.calibration_error import calibration_error
from distill.builtin.cross_entropy import cross_entropy
from distill.builtin.per_class_accuracy import per_class_accuracy

NAMES = ["calibration_error", "cross_entropy", "per_class_accuracy"]
METRICS = {
    "calibration_error": calibration_error,
    "cross_entropy": cross_entropy,
    "per_class_accuracy": per_class_accuracy,
}


def batch(targets):
    return Batch(inputs=None, targets=targets, index=torch.arange(len(targets)))


def logits_and_labels(size=200, classes=7, shape=(), lowest=0):
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(size, classes, *shape, generator=generator)
    return logits, torch.randint(lowest, classes, (size, *shape), generator=generator)


def measured(metric, logits, labels, step=33):
    for start in range(0, len(labels), step):
        metric.update(logits[start : start + step], batch(labels[start : start + step]))
    return metric.compute()


def flat(logits, labels):
    """Rows of logits and labels as arrays, those without a label left out."""
    rows = logits.movedim(1, -1).reshape(-1, logits.shape[1]).double().numpy()
    known = labels.reshape(-1).numpy()
    return rows[known >= 0], known[known >= 0]


def probabilities(rows):
    exponents = np.exp(rows - rows.max(1, keepdims=True))
    return exponents / exponents.sum(1, keepdims=True)


def calibration_by_loop(logits, labels, bins, norm):
    rows, known = flat(logits, labels)
    found = probabilities(rows)
    gaps, shares = [], []
    for number in range(bins):
        low, high = number / bins, (number + 1) / bins
        inside = [i for i in range(len(rows)) if low < found[i].max() <= high]
        if inside:
            hits = np.mean([found[i].argmax() == known[i] for i in inside])
            gaps.append(abs(hits - np.mean([found[i].max() for i in inside])))
            shares.append(len(inside) / len(rows))
    return max(gaps) if norm == "max" else float(np.dot(gaps, shares))


SHAPES = [((), 0), ((), -2), ((3, 2), -2)]


@pytest.mark.parametrize("norm", ["l1", "max"])
@pytest.mark.parametrize("bins", [1, 10, 15])
@pytest.mark.parametrize(("shape", "lowest"), SHAPES)
def test_calibration_error_is_that_of_a_loop_over_bins(shape, lowest, bins, norm):
    logits, labels = logits_and_labels(shape=shape, lowest=lowest)
    expected = calibration_by_loop(logits, labels, bins, norm)
    assert expected > 0.01
    assert measured(calibration_error(bins, norm), logits, labels) == pytest.approx(
        expected, abs=1e-6
    )


def test_calibration_error_by_hand():
    # Confidences 0.9 and 0.8 in the upper of two bins, one of them right: |0.5 - 0.85|, twice.
    # Confidence 0.4 in the lower one, right: |1 - 0.4|, once.
    given = torch.tensor([[0.9, 0.05, 0.05], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]])
    labels = torch.tensor([0, 2, 2])
    metric = calibration_error(bins=2)
    assert measured(metric, given.log(), labels) == pytest.approx((2 * 0.35 + 0.6) / 3)
    metric = calibration_error(bins=2, norm="max")
    assert measured(metric, given.log(), labels) == pytest.approx(0.6)


def test_a_confidence_on_the_border_belongs_to_the_lower_bin():
    # Two classes alike give exactly 0.5. Were it in the upper bin, 1.0 would be there with it, and
    # the right one would make up for the wrong one.
    logits = torch.tensor([[0.0, 0.0], [0.0, 1000.0]])
    labels = torch.tensor([0, 0])
    assert measured(calibration_error(bins=2), logits, labels) == pytest.approx(0.75)


def test_sure_and_right_is_calibrated_and_sure_and_wrong_is_not():
    logits = 1000 * functional.one_hot(torch.arange(4)).float()
    assert measured(calibration_error(), logits, torch.arange(4)) == 0.0
    assert measured(calibration_error(), logits, torch.arange(4).flip(0)) == 1.0


def test_calibration_error_checks_its_parameters():
    with pytest.raises(ValueError, match="bins must be at least 1, got 0"):
        calibration_error(0)
    with pytest.raises(ValueError, match="norm must be l1 or max, got 'l2'"):
        calibration_error(norm="l2")


@pytest.mark.parametrize(("shape", "lowest"), SHAPES)
def test_cross_entropy_is_that_of_the_formula(shape, lowest):
    logits, labels = logits_and_labels(shape=shape, lowest=lowest)
    rows, known = flat(logits, labels)
    expected = -np.log(probabilities(rows)[np.arange(len(known)), known]).mean()
    assert measured(cross_entropy(), logits, labels) == pytest.approx(expected, rel=1e-6)


def test_logits_of_texts_have_their_classes_last():
    logits, labels = torch.randn(2, 3, 5), torch.randint(5, (2, 3))
    expected = measured(cross_entropy(), logits.view(6, 5), labels.view(6))
    assert measured(cross_entropy(), logits, labels) == pytest.approx(expected)
    assert measured(cross_entropy(), logits.movedim(2, 1), labels) == pytest.approx(expected)


def test_cross_entropy_of_indifference_is_the_logarithm_of_the_classes():
    assert measured(cross_entropy(), torch.zeros(3, 5), torch.tensor([0, 4, 2])) == pytest.approx(
        math.log(5)
    )


def test_cross_entropy_of_a_class_that_the_model_does_not_have_is_infinite():
    assert measured(cross_entropy(), torch.zeros(2, 5), torch.tensor([0, 5])) == math.inf
    unlabelled = torch.tensor([[0.0, 0.0], [torch.nan, torch.inf]])
    assert measured(cross_entropy(), unlabelled, torch.tensor([0, -1])) == pytest.approx(
        math.log(2)
    )


@pytest.mark.parametrize(("shape", "lowest"), SHAPES)
def test_per_class_accuracy_is_that_of_a_loop_over_classes(shape, lowest):
    logits, labels = logits_and_labels(shape=shape, lowest=lowest)
    rows, known = flat(logits, labels)
    expected = {}
    for label in range(7):
        of_class = [row.argmax() == label for row, k in zip(rows, known, strict=True) if k == label]
        expected[str(label)] = float(np.mean(of_class))
    expected["mean"] = float(np.mean(list(expected.values())))
    assert measured(per_class_accuracy(), logits, labels) == pytest.approx(expected, abs=1e-12)


def test_classes_without_samples_are_left_out():
    logits = functional.one_hot(torch.tensor([0, 0, 3, 1]), 5).float()
    found = measured(per_class_accuracy(), logits, torch.tensor([0, 3, 3, -1]))
    assert list(found.items()) == [("mean", 0.75), ("0", 1.0), ("3", 0.5)]


def test_classes_go_by_their_names_and_by_labels_where_those_are_not_enough():
    metric = per_class_accuracy()
    assert metric.classes is None
    metric.classes = ["crane", "cat", "crane", "mean"]
    metric.reset()
    logits, labels = functional.one_hot(torch.arange(5)).float(), torch.arange(5)
    assert measured(metric, logits, labels) == {
        "mean": 1.0,
        "crane (0)": 1.0,
        "cat": 1.0,
        "crane (2)": 1.0,
        "mean (3)": 1.0,
        "4": 1.0,
    }


def test_a_label_of_no_class_is_an_error_in_words():
    metric = per_class_accuracy()
    metric.update(torch.zeros(3, 5), batch(torch.tensor([5, 0, 99])))
    with pytest.raises(DataError, match="2 labels are beyond the 5 classes of the logits"):
        metric.compute()


@pytest.mark.parametrize("name", NAMES)
def test_merged_parts_are_the_whole_and_reset_forgets(name):
    logits, labels = logits_and_labels(lowest=-1)
    whole, parts, unused = METRICS[name](), METRICS[name](), METRICS[name]()
    expected = measured(whole, logits, labels)
    first, second = METRICS[name](), METRICS[name]()
    measured(first, logits[:90], labels[:90])
    measured(second, logits[90:], labels[90:])
    for part in (unused, first, second, unused):
        parts.merge(part.state())
    assert parts.compute() == pytest.approx(expected, abs=1e-12)
    parts.update(logits[:1], batch(labels[:1]))
    parts.reset()
    assert parts.state() == unused.state()
    assert measured(parts, logits, labels) == expected


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_measured_in_full(name):
    logits, labels = logits_and_labels()
    rounded = logits.bfloat16()
    expected = measured(METRICS[name](), rounded.float(), labels)
    assert measured(METRICS[name](), rounded, labels) == expected


@pytest.mark.parametrize("name", NAMES)
def test_without_labels_it_is_zero(name):
    metric = METRICS[name]()
    zero = {"mean": 0.0} if name == "per_class_accuracy" else 0.0
    assert metric.compute() == zero
    metric.update(torch.randn(2, 3), batch(torch.tensor([-1, -100])))
    assert metric.compute() == zero


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("output", "targets", "said"),
    [
        ({"out": 1}, torch.tensor([0]), "needs logits and labels as tensors"),
        (torch.zeros(2, 3), [0, 1], "needs logits and labels as tensors"),
        (torch.zeros(2, 3), torch.zeros(2), r"labels of shape \(2,\) .*, got torch.float32 \(2,\)"),
        (torch.zeros(2, 3, 4), torch.tensor([0, 1]), r"labels of shape \(2, 4\) for logits"),
        (torch.zeros(2), torch.tensor([0, 1]), r"needs logits \(B, K\), got shape \(2,\)"),
    ],
)
def test_what_it_cannot_measure_is_an_error_in_words(name, output, targets, said):
    given = Batch(inputs=None, targets=targets, index=torch.arange(2))
    with pytest.raises(DataError, match=f"^{name} {said}" if said[0] == "n" else said):
        METRICS[name]().update(output, given)


def test_lower_is_better_where_it_is_an_error():
    assert calibration_error().higher_is_better is False
    assert cross_entropy().higher_is_better is False
    assert getattr(per_class_accuracy(), "higher_is_better", True)
    assert getattr(agreement(), "higher_is_better", True)


def test_agreement_is_the_share_of_equal_predictions():
    generator = torch.Generator().manual_seed(3)
    for shape in ((), (4, 2)):
        own, other = (torch.randn(50, 3, *shape, generator=generator) for _ in range(2))
        whole, part, rest = agreement("big"), agreement("big"), agreement("big")
        nothing = batch(torch.full((50,), -1))
        whole.update(own, nothing, {"big": other, "small": own})
        part.update(own[:20], nothing, teachers={"big": other[:20]})
        rest.update(own[20:], nothing, teachers={"big": other[20:]})
        part.merge(rest.state())
        expected = (own.numpy().argmax(1) == other.numpy().argmax(1)).mean()
        assert 0.1 < expected < 0.6
        assert whole.compute() == part.compute() == pytest.approx(expected, abs=1e-12)
        part.reset()
        assert part.state() == (0, 0)
        assert part.compute() == 0.0


def test_agreement_tells_its_teacher():
    assert agreement().teacher == "teacher"
    assert agreement("big").teacher == "big"


@pytest.mark.parametrize(
    ("output", "teachers", "said"),
    [
        (torch.zeros(2, 3), {}, "output of the teacher 'teacher'; teachers: none"),
        (torch.zeros(2, 3), {"a": 1, "b": 2}, "teacher 'teacher'; teachers: a, b"),
        (torch.zeros(2, 3), {"teacher": {}}, "logits of the model and of 'teacher'"),
        ({}, {"teacher": torch.zeros(2, 3)}, "logits of the model and of 'teacher'"),
        (torch.zeros(2, 3), {"teacher": torch.zeros(2, 4)}, r"got \(2, 3\) and \(2, 4\) of 'te"),
        (torch.zeros(2), {"teacher": torch.zeros(2)}, r"needs logits \(B, K\) of one shape"),
    ],
)
def test_what_cannot_be_compared_is_an_error_in_words(output, teachers, said):
    with pytest.raises(DataError, match=said):
        agreement().update(output, batch(torch.zeros(2)), teachers)
