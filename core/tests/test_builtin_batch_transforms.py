import pytest
import torch
from torch.nn import functional

from distill import builtin
from distill.builtin.batch_transforms import SmoothLabels
from distill.signature import bind


def test_it_is_on_offer_and_built_from_a_file():
    assert builtin.distill_batch_transforms() == {"SmoothLabels": SmoothLabels}
    assert bind(SmoothLabels, {"num_classes": 3, "smoothing": 0}).problems == []


def test_labels_become_probabilities_and_inputs_stay():
    inputs, labels = torch.rand(2, 5), torch.tensor([2, 0])
    same, probabilities = SmoothLabels(4, 0.2)(inputs, labels)
    assert same is inputs
    assert probabilities.dtype == torch.float32
    expected = [[0.05, 0.05, 0.85, 0.05], [0.85, 0.05, 0.05, 0.05]]
    torch.testing.assert_close(probabilities, torch.tensor(expected))


def test_probabilities_are_smoothed_in_their_type():
    soft = torch.tensor([[0.5, 0.5, 0.0, 0.0]], dtype=torch.float64)
    _, smoothed = SmoothLabels(4, 0.4)(None, soft)
    expected = torch.tensor([[0.4, 0.4, 0.1, 0.1]], dtype=torch.float64)
    torch.testing.assert_close(smoothed, expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_cross_entropy_is_that_with_label_smoothing(smoothing):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 5, generator=generator)
    labels = torch.randint(5, (6,), generator=generator)
    _, smoothed = SmoothLabels(5, smoothing)(None, labels)
    torch.testing.assert_close(
        functional.cross_entropy(logits, smoothed),
        functional.cross_entropy(logits, labels, label_smoothing=smoothing),
    )


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (torch.tensor([0, 3]), "SmoothLabels of 3 classes got label 3"),
        (torch.tensor([0, -1]), "SmoothLabels of 3 classes got label -1"),
        (torch.zeros(2, 4), r"probabilities \(B, 3\), got torch.float32 \(2, 4\)"),
        (torch.zeros(2), r"got torch.float32 \(2,\)"),
        (torch.zeros(2, 3).long(), r"got torch.int64 \(2, 3\)"),
        ([0, 1], "needs targets as a tensor, got list"),
        (None, "needs targets as a tensor, got NoneType"),
    ],
)
def test_other_targets_are_an_error_in_words(targets, said):
    with pytest.raises(ValueError, match=said):
        SmoothLabels(3)(None, targets)


def test_parameters_out_of_range_are_an_error_in_words():
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        SmoothLabels(0)
    with pytest.raises(ValueError, match=r"smoothing must be from 0 to 1, got 1\.5"):
        SmoothLabels(3, 1.5)
