import importlib.util
import runpy
import sys

import pytest
import torch

import distill
from distill.signature import bind
from distill_datasets_vision import distill_models, timm_models

timm_factory = distill_models()["timm"]

# test_resnet and test_vit are timm's own smallest ones.
SMALL = "test_resnet"


@pytest.fixture
def timm():
    return pytest.importorskip("timm", reason="timm is not installed: pip install timm")


@pytest.fixture
def asked(timm, monkeypatch):
    """What timm is asked to create, which it then does without weights."""
    calls = []
    create = timm.create_model

    def record(model_name, **arguments):
        calls.append({"model_name": model_name, **arguments})
        return create(model_name, **{**arguments, "pretrained": False})

    monkeypatch.setattr(timm, "create_model", record)
    return calls


def test_it_is_offered_without_importing_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)  # importing it now fails
    again = runpy.run_path(timm_models.__file__)
    assert callable(again["timm"])


def test_without_timm_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ModuleNotFoundError, match="timm is not installed: pip install timm"):
        timm_factory(model="resnet18")


def test_it_is_offered_under_its_name_with_checked_parameters():
    assert distill.plugins().find("models", "timm").factory is timm_factory
    assert not bind(timm_factory, {"model": "resnet18", "options": {"img_size": 32}}).problems
    assert [p.message for p in bind(timm_factory, {}).problems] == [
        "the parameter 'model' is missing"
    ]
    assert [p.key for p in bind(timm_factory, {"model": "m", "pretraind": True}).problems] == [
        "pretraind"
    ]


def test_parameters_reach_the_model(timm):
    model = timm_factory(SMALL, num_classes=7, in_chans=1, drop_rate=0.25)
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 7)
    assert model.drop_rate == 0.25
    model = timm_factory("test_vit", num_classes=5, options={"img_size": 32, "patch_size": 4})
    assert model.eval()(torch.randn(1, 3, 32, 32)).shape == (1, 5)
    assert model.pos_embed.shape[1] == 64 + 1


def test_an_unknown_model_is_answered_with_near_ones(timm):
    with pytest.raises(ValueError, match=r"has no model 'resnett18'; did you mean .*resnet18"):
        timm_factory("resnett18")


def test_a_model_of_a_hub_is_no_name(timm):
    with pytest.raises(ValueError, match="has no model 'hf-hub:someone/model'"):
        timm_factory("hf-hub:someone/model")


@pytest.mark.parametrize("pretrained", [True, False])
def test_an_unknown_tag_is_answered_with_the_known_ones(timm, pretrained):
    with pytest.raises(ValueError, match="resnet18 has no weights 'v1': a1_in1k, "):
        timm_factory("resnet18.v1", pretrained=pretrained)


@pytest.mark.parametrize("key", ["checkpoint_path", "pretrained_cfg", "num_classes", "model_name"])
def test_options_are_arguments_of_the_model_alone(timm, key):
    with pytest.raises(ValueError, match=f"'{key}' is no option of a timm model"):
        timm_factory(SMALL, options={key: "x"})


def test_an_option_the_model_does_not_take_is_refused(timm):
    with pytest.raises(TypeError, match="unexpected keyword argument 'patch_size'"):
        timm_factory(SMALL, options={"patch_size": 4})


def test_options_are_left_as_they_were(timm):
    options = {"global_pool": "max"}
    timm_factory(SMALL, options=options)
    assert options == {"global_pool": "max"}


def test_weights_are_asked_for_where_the_file_does_and_never_on_meta(timm, asked):
    timm_factory(f"{SMALL}.r160_in1k", pretrained=True)
    timm_factory(SMALL)
    with torch.device("meta"):
        model = timm_factory(SMALL, pretrained=True)
    assert [call["pretrained"] for call in asked] == [True, False, False]
    assert all(tensor.is_meta for tensor in model.state_dict().values())


@pytest.mark.parametrize("name", [SMALL, "test_vit", "test_convnext.r160_in1k"])
def test_a_model_on_meta_has_the_modules_of_the_real_one(timm, name):
    real = timm_factory(name, num_classes=3)
    with torch.device("meta"):
        meta = timm_factory(name, num_classes=3, pretrained=True)
    assert [n for n, _ in meta.named_modules()] == [n for n, _ in real.named_modules()]
    assert {k: v.shape for k, v in meta.state_dict().items()} == {
        k: v.shape for k, v in real.state_dict().items()
    }
