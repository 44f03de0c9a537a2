"""Pairs of features, their types, and the weighted sum over layers."""

from __future__ import annotations

import pytest
import torch

from distill_fitnet.feature_pairs import (
    PairwiseLoss,
    feature_pairs,
    halving_weights,
    sum_over_layers,
)


class Distance(PairwiseLoss):
    def __init__(self, layer_weights=None):
        super().__init__()
        self.layer_weights = layer_weights

    def layer_loss(self, student, teacher):
        return (student - teacher).abs().sum()


def test_one_feature_or_lists_of_them_are_paired():
    student, teacher = torch.ones(2), torch.zeros(2)
    assert len(feature_pairs(student, teacher)) == 1
    pairs = feature_pairs([student, student * 2], (teacher, teacher))
    assert [pair[0].tolist() for pair in pairs] == [[1.0, 1.0], [2.0, 2.0]]


@pytest.mark.parametrize(
    ("student", "teacher", "wanted"),
    [
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float16, torch.float32, torch.float32),
        (torch.float32, torch.float64, torch.float64),
    ],
)
def test_a_pair_has_one_type_of_float32_or_wider(student, teacher, wanted):
    [pair] = feature_pairs(torch.ones(2, dtype=student), torch.ones(2, dtype=teacher))
    assert [feature.dtype for feature in pair] == [wanted, wanted]


def test_only_the_student_keeps_its_gradient():
    leaf = torch.ones(2, requires_grad=True)
    [(student, teacher)] = feature_pairs(leaf, leaf)
    assert student.requires_grad
    assert not teacher.requires_grad


def test_features_that_cannot_be_paired_are_refused():
    with pytest.raises(ValueError, match=r"2 features of the student .* with 1 of the teacher"):
        feature_pairs([torch.ones(2)] * 2, torch.ones(2))
    with pytest.raises(ValueError, match="features of one layer at least are needed, got none"):
        feature_pairs([], [])


@pytest.mark.parametrize(("weights", "expected"), [(None, 2 + 4), ([0.5, 3.0], 1 + 12)])
def test_layers_are_summed_with_their_weights(weights, expected):
    students = [torch.ones(2), torch.full((4,), -1.0)]
    teachers = [torch.zeros(2), torch.zeros(4)]
    assert Distance(weights)(students, teachers).item() == expected


def test_weights_must_be_as_many_as_layers():
    with pytest.raises(ValueError, match="Distance: layer_weights has 2 numbers for 1 layers"):
        Distance([1.0, 1.0])(torch.ones(2), torch.ones(2))


def test_losses_summed_without_weights_keep_their_gradients():
    leaf = torch.tensor([2.0, 3.0], requires_grad=True)
    sum_over_layers(None, [leaf[0], leaf[1] * 5]).backward()
    assert leaf.grad.tolist() == [1.0, 5.0]


def test_the_last_layer_weighs_one_and_each_before_it_half():
    assert halving_weights(1) == [1.0]
    assert halving_weights(3) == [0.25, 0.5, 1.0]
