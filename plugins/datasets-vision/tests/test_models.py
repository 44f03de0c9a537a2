import inspect
import threading
import typing

import pytest
import torch
import torchvision.models as tv
from torch import nn

from distill_datasets_vision import DigitsStudent, DigitsTeacher, distill_models
from distill_datasets_vision.models import torchvision_models

MODELS = distill_models()
TORCHVISION = sorted(torchvision_models())
# A parameter that only `**kwargs` of a builder shows, with a value to give it.
HIDDEN = {
    "backend": "qnnpack",
    "dilated": False,
    "dropout": 0.1,
    "image_size": 224,
    "input_size": (224, 224),
    "reduced_tail": False,
    "width_mult": 1.0,
}


@pytest.fixture
def no_download(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("tried to download weights")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)


def on_meta(name, **params):
    with torch.device("meta"):
        return MODELS[name](**params)


def layout(model):
    return {name: type(module).__name__ for name, module in model.named_modules()}


def shapes(model):
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def model_class(name):
    return inspect.signature(MODELS[name]).return_annotation


def one_model_of_each_class():
    return sorted({model_class(name): name for name in reversed(TORCHVISION)}.values())


def test_every_registered_model_is_offered_by_its_name():
    assert set(TORCHVISION) == set(tv.list_models()) < set(MODELS)
    assert MODELS["DigitsStudent"] is DigitsStudent
    assert MODELS["DigitsTeacher"] is DigitsTeacher


@pytest.mark.filterwarnings("ignore:The default weight initialization:FutureWarning")
def test_every_model_is_built_on_meta_as_with_its_weights_and_downloads_nothing(no_download):
    for name in TORCHVISION:
        hint = inspect.signature(MODELS[name]).parameters["weights"].annotation
        model = on_meta(name, weights="DEFAULT" if hint is not type(None) and hint else None)
        tensors = [*model.parameters(), *model.buffers()]
        assert tensors, name
        assert all(tensor.is_meta for tensor in tensors), name


@pytest.mark.filterwarnings("ignore:The default weight initialization:FutureWarning")
@pytest.mark.parametrize("name", one_model_of_each_class())
def test_every_parameter_of_a_signature_is_one_the_model_takes(name, no_download):
    own = inspect.signature(tv.get_model_builder(name)).parameters
    of_class = {}
    for cls in reversed(model_class(name).__mro__):
        of_class |= inspect.signature(cls.__init__).parameters
    params = {
        key: HIDDEN[key] if key in HIDDEN else of_class[key].default
        for key in inspect.signature(MODELS[name]).parameters
        if key not in own
    }
    assert inspect.Parameter.empty not in params.values()
    on_meta(name, **params)


@pytest.mark.parametrize("name", one_model_of_each_class())
def test_a_misspelt_parameter_is_refused_also_where_torchvision_swallows_it(name):
    with pytest.raises(
        TypeError, match=f"{name} has no parameter 'progres'; did you mean progress"
    ):
        on_meta(name, progres=False)


def test_a_misspelt_class_parameter_is_answered_with_the_nearest():
    with pytest.raises(TypeError, match="'num_clases'; did you mean num_classes"):
        on_meta("mobilenet_v3_small", num_clases=10)
    with pytest.raises(TypeError, match=r"'zzz' \(known: .*num_classes"):
        on_meta("resnet18", zzz=10)


def test_a_signature_has_the_parameters_of_the_model_class_with_their_hints():
    parameters = inspect.signature(MODELS["resnet18"], eval_str=True).parameters
    assert list(parameters) == [
        "weights",
        "progress",
        "num_classes",
        "zero_init_residual",
        "groups",
        "width_per_group",
        "replace_stride_with_dilation",
    ]
    assert parameters["num_classes"].annotation is int
    assert parameters["weights"].default is None
    names = typing.get_args(typing.get_args(parameters["weights"].annotation)[0])
    assert names == ("IMAGENET1K_V1", "DEFAULT")
    assert "input_size" in inspect.signature(MODELS["maxvit_t"]).parameters
    assert "width_mult" in inspect.signature(MODELS["mobilenet_v3_large"]).parameters


def test_every_signature_is_closed_and_every_parameter_optional():
    for name in TORCHVISION:
        for parameter in inspect.signature(MODELS[name]).parameters.values():
            assert parameter.kind is parameter.KEYWORD_ONLY, (name, parameter)
            assert parameter.default is not parameter.empty, (name, parameter)


def test_parameters_reach_the_model():
    assert MODELS["resnet18"](num_classes=10).fc.out_features == 10
    assert on_meta("mobilenet_v2", width_mult=0.5).last_channel == 1280
    assert on_meta("vit_b_32", image_size=64).image_size == 64
    assert on_meta("efficientnet_b0", dropout=0.7).classifier[0].p == 0.7
    with pytest.raises(RuntimeError, match="Quantized backend not supported"):
        on_meta("quantized_resnet18", quantize=True, backend="none")


@pytest.mark.parametrize("build", [lambda name, **p: MODELS[name](**p), on_meta])
def test_unknown_weights_are_refused_with_the_known_ones(build):
    with pytest.raises(
        ValueError, match="resnet50 has no weights 'V9': IMAGENET1K_V1, IMAGENET1K_V2"
    ):
        build("resnet50", weights="V9")
    with pytest.raises(ValueError, match="no weights_backbone 'COCO': IMAGENET1K_V1"):
        build("fcn_resnet50", weights_backbone="COCO")


def test_weights_are_found_by_name_and_loaded(monkeypatch):
    asked = []

    def fetch(url, **_kwargs):
        asked.append(url)
        return {name: torch.full_like(value, 3) for name, value in expected.items()}

    expected = tv.squeezenet1_1().state_dict()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fetch)
    for weights in ("IMAGENET1K_V1", "DEFAULT", tv.SqueezeNet1_1_Weights.IMAGENET1K_V1):
        model = MODELS["squeezenet1_1"](weights=weights)
        assert all((value == 3).all() for value in model.state_dict().values())
    assert asked == [tv.SqueezeNet1_1_Weights.IMAGENET1K_V1.url] * 3


def test_a_backbone_is_not_downloaded_unless_asked_for(no_download):
    MODELS["lraspp_mobilenet_v3_large"](num_classes=2)
    with pytest.raises(AssertionError, match="tried to download"):
        MODELS["lraspp_mobilenet_v3_large"](num_classes=2, weights_backbone="DEFAULT")


def test_on_meta_not_even_a_backbone_asked_for_is_downloaded(no_download):
    on_meta("fcn_resnet50", weights_backbone="DEFAULT")


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("resnet18", {"num_classes": 10}),
        ("regnet_x_400mf", {}),
        ("swin_t", {}),
        ("quantized_shufflenet_v2_x0_5", {}),
        ("lraspp_mobilenet_v3_large", {}),
    ],
)
def test_a_model_on_meta_has_the_modules_of_the_real_one(name, params):
    real, meta = MODELS[name](**params), on_meta(name, **params)
    assert layout(meta) == layout(real)
    assert shapes(meta) == shapes(real)


def test_pretrained_on_meta_has_the_modules_of_the_real_one(monkeypatch):
    # GoogLeNet drops its auxiliary heads once its weights are loaded.
    content = tv.googlenet(aux_logits=True, init_weights=False).state_dict()
    monkeypatch.setattr(
        "torchvision.models._api.load_state_dict_from_url", lambda *_args, **_kwargs: content
    )
    real = MODELS["googlenet"](weights="DEFAULT")
    assert layout(on_meta("googlenet", weights="DEFAULT")) == layout(real)
    assert layout(on_meta("googlenet", init_weights=False)) != layout(real)


def test_a_quantized_model_takes_quantized_weights_only(no_download):
    on_meta("quantized_mobilenet_v2", weights="IMAGENET1K_V2")
    with pytest.raises(ValueError, match="has no weights 'IMAGENET1K_QNNPACK_V1': IMAGENET1K_V1"):
        on_meta("quantized_mobilenet_v2", weights="IMAGENET1K_QNNPACK_V1")
    with pytest.raises(ValueError, match="has no weights 'IMAGENET1K_V2': IMAGENET1K_QNNPACK_V1"):
        on_meta("quantized_mobilenet_v2", weights="IMAGENET1K_V2", quantize=True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_quantized_model_on_meta_has_the_modules_of_the_real_one(no_download):
    name = "quantized_shufflenet_v2_x0_5"
    real = MODELS[name](quantize=True)
    assert layout(on_meta(name, quantize=True)) == layout(real) != layout(MODELS[name]())
    assert layout(on_meta(name, quantize=True, weights="DEFAULT")) == layout(real)


def test_after_a_build_on_meta_weights_are_loaded_again():
    on_meta("resnet18", weights="DEFAULT")
    layer = nn.Linear(1, 1)
    layer.load_state_dict({"weight": torch.ones(1, 1), "bias": torch.ones(1)})
    assert layer.weight.item() == layer.bias.item() == 1
    with pytest.raises(RuntimeError, match="Missing key"):
        layer.load_state_dict({})


def test_a_build_on_meta_leaves_other_threads_alone(monkeypatch):
    failures = []

    def load_in_vain():
        try:
            nn.Linear(1, 1).load_state_dict({})
        except RuntimeError as missing:
            failures.append(missing)

    class Watched(tv.ResNet):
        def __init__(self, *args, **kwargs):
            thread = threading.Thread(target=load_in_vain)
            thread.start()
            thread.join()
            super().__init__(*args, **kwargs)

    monkeypatch.setattr("torchvision.models.resnet.ResNet", Watched)
    on_meta("resnet18", weights="DEFAULT")
    assert len(failures) == 1


def test_a_vision_transformer_of_any_size_can_be_described():
    size = {"image_size": 8, "patch_size": 2, "num_layers": 2, "num_heads": 2}
    params = {**size, "hidden_dim": 8, "mlp_dim": 16, "num_classes": 10}
    model = distill_models()["VisionTransformer"](**params)
    assert model(torch.zeros(2, 3, 8, 8)).shape == (2, 10)
