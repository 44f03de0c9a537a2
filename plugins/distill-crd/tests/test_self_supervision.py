"""The head, and the loss that trains it: a formula by hand, what is refused."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch

from distill.testing import LossConformance
from distill_crd.self_supervision import SelfSupervisionLoss, SSKDHead


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cosine(a, b):
    norms = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / norms


@pytest.mark.parametrize("images", [1, 2, 5])
@pytest.mark.filterwarnings("ignore:SelfSupervisionLoss")
def test_equals_the_formula_written_out(images):
    embeddings = randn(4 * images, 7)
    rows = embeddings.tolist()
    losses = []
    for number, row in enumerate(rows):
        if number % 4:
            similar = [math.exp(cosine(row, rows[4 * image])) for image in range(images)]
            losses.append(-math.log(similar[number // 4] / sum(similar)))
    expected = sum(losses) / (3 * images)
    assert SelfSupervisionLoss()(embeddings).item() == pytest.approx(expected, abs=1e-12)


class TestSelfSupervisionLoss(LossConformance):
    student = "embeddings"

    def make(self):
        return SelfSupervisionLoss()

    def tensors(self, batch):
        return {"embeddings": torch.randn(4 * batch, 6)}


def test_an_embedding_of_zero_is_similar_to_nothing_and_gets_no_gradient():
    embeddings = randn(12, 5)
    embeddings[[0, 5]] = 0
    embeddings.requires_grad_()
    SelfSupervisionLoss()(embeddings).backward()
    assert embeddings.grad.isfinite().all()
    assert not embeddings.grad[[0, 5]].any()
    assert embeddings.grad[1].any()


def test_a_batch_of_one_image_has_no_loss_and_says_why():
    embeddings = randn(4, 5).requires_grad_()
    with pytest.warns(UserWarning, match=r"SelfSupervisionLoss: a batch of one image.*batch_size"):
        loss = SelfSupervisionLoss()(embeddings)
    loss.backward()
    assert loss == 0
    assert not embeddings.grad.any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SelfSupervisionLoss()(randn(8, 5))


def test_all_processes_are_this_one_where_it_is_alone():
    embeddings = randn(12, 5)
    assert torch.equal(SelfSupervisionLoss("all")(embeddings), SelfSupervisionLoss()(embeddings))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="gather must be one of 'none', 'all', got 'some'"):
        SelfSupervisionLoss("some")
    with pytest.raises(ValueError, match=r"embeddings must be vectors.*\(8, 5, 2, 2\).*SSKDHead"):
        SelfSupervisionLoss()(torch.zeros(8, 5, 2, 2))
    with pytest.raises(ValueError, match=r"embeddings must have rows in fours.*got \(6, 5\)"):
        SelfSupervisionLoss()(torch.zeros(6, 5))


def test_the_head_is_two_linear_layers_with_a_relu_between():
    head, features = SSKDHead(6).double(), randn(8, 6)
    weights = list(head.parameters())
    assert [tuple(w.shape) for w in weights] == [(6, 6), (6,), (6, 6), (6,)]
    hidden = (features @ weights[0].T + weights[1]).clamp(min=0)
    torch.testing.assert_close(head(features), hidden @ weights[2].T + weights[3])


def test_the_head_averages_maps_over_positions():
    head, maps = SSKDHead(6).double(), randn(8, 6, 3, 2)
    torch.testing.assert_close(head(maps), head(maps.mean((2, 3))))


def test_setup_finds_what_the_constructor_may_be_given():
    found = SSKDHead()
    torch.manual_seed(0)
    found.setup(randn(8, 6, 2, 2))
    torch.manual_seed(0)
    given = SSKDHead(6)
    assert found.width == 6
    assert list(found.state_dict()) == list(given.state_dict())
    assert found(randn(8, 6)).dtype == torch.float64
    for name, value in given.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name].float(), value)


def test_the_head_learns_to_tell_originals():
    torch.manual_seed(0)
    originals = torch.randn(16, 1, 12)
    features = (originals + 0.5 * torch.randn(16, 4, 12)).flatten(0, 1)
    head, loss = SSKDHead(12), SelfSupervisionLoss()
    optimizer = torch.optim.SGD(head.parameters(), lr=0.5)
    first = loss(head(features)).item()
    for _ in range(30):
        optimizer.zero_grad()
        loss(head(features)).backward()
        optimizer.step()
    assert loss(head(features)).item() < first - 0.1


def test_under_autocast_the_loss_is_within_one_percent():
    torch.manual_seed(0)
    head, features, loss = SSKDHead(32), torch.randn(64, 32), SelfSupervisionLoss()
    full = loss(copy.deepcopy(head)(features))
    with torch.autocast("cpu", torch.bfloat16):
        embeddings = head(features)
    reduced = loss(embeddings)
    assert embeddings.dtype == torch.bfloat16
    assert reduced.dtype == torch.float32
    assert reduced.item() == pytest.approx(full.item(), rel=0.01)


def test_what_does_not_fit_the_head_is_refused():
    with pytest.raises(ValueError, match=r"vectors \(N, 6\) or maps \(N, 6, H, W\), got \(8, 5\)"):
        SSKDHead(6)(torch.zeros(8, 5))
    with pytest.raises(ValueError, match=r"vectors \(N, D\) or maps.*got \(8, 5, 3\)"):
        SSKDHead().setup(torch.zeros(8, 5, 3))
    with pytest.raises(ValueError, match="width must be a whole number >= 1"):
        SSKDHead(0)
    with pytest.raises(RuntimeError, match="SSKDHead has no layers yet: call setup"):
        SSKDHead()(torch.zeros(8, 5))


def test_the_head_loads_its_weights():
    one, other = SSKDHead(4), SSKDHead(4)
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(torch.ones(4, 4)), other(torch.ones(4, 4)))
