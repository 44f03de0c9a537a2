"""What the auxiliary modules of one layer per feature share: shapes found or given, and refused."""

from __future__ import annotations

import copy

import pytest
import torch

from distill_fitnet.activation_boundaries import ABConnector
from distill_fitnet.factor_transfer import Paraphraser, Translator
from distill_fitnet.feature_overhaul import OFDConnector
from distill_fitnet.fitnet import ConvRegressor
from distill_fitnet.fitted_layers import check_built, settled
from distill_fitnet.masked_generation import MGDGenerator
from distill_fitnet.prime_aware import PADVariance
from distill_fitnet.simple_recipe import SRDProjector
from distill_fitnet.softmax_regression import SRRLConnector
from distill_fitnet.variational_information import VIDRegressor
from distill_fitnet.vit_features import ViTKDGenerator

MODULES = [ABConnector, OFDConnector, VIDRegressor, PADVariance, SRDProjector]
ONE_LAYER = [ConvRegressor, Paraphraser, SRRLConnector, Translator, ViTKDGenerator]
MAPS_ONLY = [ABConnector, MGDGenerator, Paraphraser, Translator, VIDRegressor]

each_module = pytest.mark.parametrize("make", MODULES)


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def student(dtype=torch.float32):
    """Return two layers' features; of 1x1 maps, so that every module sees 3 and 5 channels."""
    return [draw(4, 3, 1, 1, seed=1, dtype=dtype), draw(4, 5, 1, 1, seed=2, dtype=dtype)]


def teacher():
    return [draw(4, 6, 1, 1, seed=3), draw(4, 7, 1, 1, seed=4)]


def seeded(build):
    torch.manual_seed(7)
    return build()


def set_up(make):
    module = make()
    module.setup(student(), teacher())
    return module


def assert_same_state(module, other):
    assert list(module.state_dict()) == list(other.state_dict())
    for name, value in module.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name], rtol=0, atol=0)


@each_module
def test_setup_builds_what_given_channels_build(make):
    found, given = seeded(lambda: set_up(make)), seeded(lambda: make([3, 5], [6, 7]))
    assert len(given.state_dict()) > 0
    assert_same_state(found, given)
    assert repr(found) == repr(given)


@each_module
def test_setup_takes_out_channels_from_the_constructor_where_there_is_no_like(make):
    module = make(out_channels=[6, 7])
    module.setup(student())
    assert [output.shape[1] for output in module(student())] == [6, 7]


@each_module
def test_setup_keeps_layers_that_fit(make):
    module = make([3, 5], [6, 7])
    before = copy.deepcopy(module)
    module.setup(student(), teacher())
    module.setup(student(), teacher())
    assert_same_state(module, before)


@each_module
def test_a_list_gives_a_list_and_a_tensor_a_tensor(make):
    module, single = make([3, 5], [6, 7]), make(3, 6)
    outputs = module(student())
    assert isinstance(outputs, list)
    single.load_state_dict(
        {name: value for name, value in module.state_dict().items() if name.startswith("layers.0.")}
    )
    output = single(student()[0])
    assert isinstance(output, torch.Tensor)
    torch.testing.assert_close(output, outputs[0])


@each_module
def test_a_restored_state_gives_the_same_output(make):
    module = set_up(make)
    restored = set_up(make)
    restored.load_state_dict(module.state_dict())
    for output, expected in zip(restored(student()), module(student()), strict=True):
        torch.testing.assert_close(output, expected)


@each_module
def test_gradients_reach_the_student_and_every_parameter(make):
    features = [feature.requires_grad_() for feature in student()]
    module = set_up(make)
    # Squared with weights, since the plain sum of a batch norm's output does not move.
    sum((draw(*out.shape, seed=9) * out.square()).sum() for out in module(features)).backward()
    for tensor in [*features, *module.parameters()]:
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()


@each_module
def test_layers_take_float64_only_from_float64_features(make):
    wide, narrow = make(), make()
    wide.setup(student(torch.float64), teacher())
    narrow.setup(student(torch.bfloat16), teacher())
    assert {parameter.dtype for parameter in wide.parameters()} == {torch.float64}
    assert {parameter.dtype for parameter in narrow.parameters()} == {torch.float32}


@each_module
def test_half_precision_features_are_close_to_full(make):
    module = make([3, 5], [6, 7])
    full, half = module(student()), module(student(torch.bfloat16))
    for exact, rounded in zip(full, half, strict=True):
        torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0.05)


@each_module
def test_forward_before_setup_says_what_to_do(make):
    with pytest.raises(RuntimeError, match=f"{make.__name__} has no layers yet: call setup"):
        make()(student())


@pytest.mark.parametrize("make", [ABConnector, VIDRegressor, SRDProjector])
def test_setup_without_like_and_out_channels_is_refused(make):
    with pytest.raises(ValueError, match=f"{make.__name__}: give out_channels, or wire"):
        make().setup(student())


@each_module
@pytest.mark.parametrize(
    ("channels", "message"),
    [
        (([3, 4], [6, 7]), r"in_channels is \[3, 4\], but .* \(4, 5, 1, 1\) have \[3, 5\]"),
        (([3, 5], [6, 8]), r"out_channels is \[6, 8\], but .* \(4, 7, 1, 1\) have \[6, 7\]"),
        ((3, 6), r"in_channels is \[3\], but .* have \[3, 5\]"),
    ],
)
def test_features_that_do_not_fit_the_channels_are_refused(make, channels, message):
    with pytest.raises(ValueError, match=f"{make.__name__}: {message}"):
        make(*channels).setup(student(), teacher())


@each_module
def test_lists_of_different_length_are_refused(make):
    with pytest.raises(ValueError, match=r"in_channels \[3, 5\] and out_channels \[6\]"):
        make([3, 5], [6])
    with pytest.raises(ValueError, match=r"in_channels \[3, 5\] and out_channels \[6\]"):
        make().setup(student(), teacher()[:1])


@each_module
def test_another_number_of_features_than_built_for_is_refused(make):
    with pytest.raises(ValueError, match=f"{make.__name__}: built for 2 features, got 1"):
        make([3, 5], [6, 7])(student()[0])


@each_module
@pytest.mark.parametrize("channels", [0, -1, [3, 0], []])
def test_channels_below_one_are_refused(make, channels):
    with pytest.raises(ValueError, match=f"{make.__name__}: in_channels must be .* got"):
        make(channels)


@pytest.mark.parametrize("make", MAPS_ONLY)
def test_features_that_are_no_maps_are_refused(make):
    with pytest.raises(ValueError, match=rf"{make.__name__}: features must be maps .* \(4, 3\)"):
        make().setup(draw(4, 3))


@pytest.mark.parametrize("make", ONE_LAYER)
def test_a_list_is_refused_where_there_is_one_layer(make):
    with pytest.raises(ValueError, match=f"{make.__name__}: features must be of one layer, got a"):
        make().setup(student())


def test_what_was_known_of_a_shape_must_be_what_is_found():
    owner, features = torch.nn.Identity(), [draw(4, 3, 2, 2)]
    assert settled(owner, "size", None, [2, 2], features) == [2, 2]
    assert settled(owner, "size", [2, 2], [2, 2], features) == [2, 2]
    message = r"Identity: size is \[\], but features of shape \(4, 3, 2, 2\) have \[2, 2\]"
    with pytest.raises(ValueError, match=message):
        settled(owner, "size", [], [2, 2], features)


def test_parts_must_be_built_and_be_as_many_as_features():
    owner = torch.nn.Identity()
    check_built(owner, [1, 2], 2)
    with pytest.raises(RuntimeError, match="Identity has no scales yet: call setup"):
        check_built(owner, [], 1, "scales")
    with pytest.raises(ValueError, match="Identity: built for 2 features, got 3"):
        check_built(owner, [1, 2], 3)
