"""Cross entropy plus the L2 distance of the embeddings needs no loss of its own: torch has both."""

from __future__ import annotations

from torch import nn

METHOD = "cse_l2"


def test_torchs_losses_weighed_and_summed_equal_the_reference(reference):
    params = reference.params
    hard = nn.CrossEntropyLoss()(reference.tensor("student_logits"), reference.tensor("target"))
    distance = nn.MSELoss(reduction=params["reduction_l2"])(
        reference.tensor("student_feature"), reference.tensor("teacher_feature")
    )
    reference.check(params["w_ce"] * hard + params["w_l2"] * distance)
