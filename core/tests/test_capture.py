import gc
import weakref

import pytest
import torch
from torch import nn

from distill import Capture, DistillError
from distill.model.capture import Complete, find_module, split_path, unknown_module
from distill.testing import ToyMLP

INPUTS = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


class Overwriting(nn.Module):
    """Changes in place what its first layer gives."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 3)

    def forward(self, inputs):
        x = self.first(inputs)
        x += inputs
        return self.second(x)


class PairOverwriting(nn.Module):
    """The same for one of two tensors of a submodule's output."""

    class Both(nn.Module):
        def forward(self, inputs):
            return {"a": inputs + 1, "b": [inputs + 2]}

    def __init__(self):
        super().__init__()
        self.both = self.Both()

    def forward(self, inputs):
        pair = self.both(inputs)
        pair["b"][0].mul_(0)
        return pair["a"]


class RunsThrice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(self.layer(self.layer(x)))


class Counting(nn.Module):
    count = 0

    def forward(self, x):
        self.count += 1
        return x


class RunsTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.unused = nn.Linear(4, 4)

    def forward(self, inputs):
        return self.layer(self.layer(inputs))


class ByKeyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, inputs):
        return self.layer(input=inputs)


class Constant(nn.Module):
    """Calls a submodule without arguments."""

    class Zero(nn.Module):
        def forward(self):
            return torch.zeros(1)

    def __init__(self):
        super().__init__()
        self.zero = self.Zero()

    def forward(self, inputs):
        return inputs + self.zero()


def test_outputs_and_inputs_are_those_of_the_submodules():
    model = ToyMLP()
    with Capture(model, ["body.0", "head:input", "", ":input"]) as capture:
        output = model(INPUTS)
        values = capture.pop()
    hidden = model.body[0](INPUTS)
    assert torch.equal(values["body.0"], hidden)
    assert torch.equal(values["head:input"], hidden.relu())
    assert values[""] is output
    assert values[":input"] is INPUTS


def test_gradients_flow_through_what_is_captured():
    model = ToyMLP()
    with Capture(model, ["body.0"]) as capture:
        model(INPUTS)
        capture.pop()["body.0"].sum().backward()
    assert model.body[0].weight.grad.abs().sum() > 0


def test_pop_forgets():
    model = ToyMLP()
    capture = Capture(model, ["body"])
    model(INPUTS)
    capture.pop()
    with pytest.raises(DistillError, match="'body' did not run in the model's forward"):
        capture.pop()


def test_each_forward_gives_its_own_values():
    model = ToyMLP()
    with Capture(model, ["body"]) as capture:
        seen = []
        for factor in (1, 2):
            model(INPUTS * factor)
            seen.append(capture.pop()["body"])
    assert not torch.equal(*seen)


def test_an_in_place_activation_does_not_falsify_what_is_captured():
    model = ToyMLP()
    with Capture(model, ["body.0", "body.1:input"]) as capture:
        model(INPUTS)
        values = capture.pop()
    assert (values["body.0"] < 0).any()
    assert (values["body.1:input"] < 0).any()


def test_remove_takes_off_the_hooks_and_gives_back_in_place_activations():
    model = ToyMLP()
    capture = Capture(model, ["body.0", "body.0:input"])
    assert model.body[1].inplace is False
    capture.remove()
    assert model.body[1].inplace is True
    assert not model.body[0]._forward_hooks
    assert not model.body[0]._forward_pre_hooks
    capture.remove()
    assert model.body[1].inplace is True


def test_leaving_the_block_removes_even_after_an_error():
    model = ToyMLP()
    with pytest.raises(RuntimeError), Capture(model, ["body"]):
        model(torch.zeros(1, 99))
    assert not model.body._forward_hooks
    assert model.body[1].inplace is True


def test_without_paths_a_model_is_left_alone():
    model = ToyMLP()
    with Capture(model, []) as capture:
        model(INPUTS)
        assert model.body[1].inplace is True
        assert capture.pop() == {}


@pytest.mark.parametrize(
    ("model", "path"), [(Overwriting(), "first"), (PairOverwriting(), "both")], ids=["sum", "parts"]
)
def test_a_value_overwritten_after_its_capture_is_noticed(model, path):
    with Capture(model, [path]) as capture:
        model(INPUTS)
        assert capture.overwritten() == [path]
        with pytest.raises(DistillError, match=rf"'{path}' was overwritten in place.*clone=True"):
            capture.pop()


@pytest.mark.parametrize("clone", [True, ["first"]])
def test_a_copied_value_is_right_though_the_model_overwrites_it(clone):
    model = Overwriting()
    with Capture(model, ["first", "second"], clone=clone) as capture:
        model(INPUTS)
        values = capture.pop()
    assert torch.equal(values["first"], model.first(INPUTS))


def test_every_tensor_of_an_output_with_parts_is_copied():
    model = PairOverwriting()
    with Capture(model, ["both"], clone=True) as capture:
        model(INPUTS)
        values = capture.pop()
    assert torch.equal(values["both"]["b"][0], INPUTS + 2)


def test_a_module_that_runs_twice_is_an_error_and_leaves_nothing_behind():
    model = RunsTwice()
    with Capture(model, ["layer"]) as capture:
        model(INPUTS)
        with pytest.raises(DistillError, match=r"'layer' ran 2 times .* 'layer@-1' the last"):
            capture.pop()
        with pytest.raises(DistillError, match="did not run"):
            capture.pop()


def test_two_forwards_without_a_pop_between_are_noticed():
    model = ToyMLP()
    with Capture(model, ["body"]) as capture:
        model(INPUTS)
        model(INPUTS)
        with pytest.raises(DistillError, match="ran 2 times since it was last popped"):
            capture.pop()


@pytest.mark.parametrize(
    ("call", "number"), [("@0", 0), ("@1", 1), ("@2", 2), ("@-1", 2), ("@-3", 0)]
)
@pytest.mark.parametrize("stops", [False, True])
def test_a_module_that_runs_several_times_is_addressed_by_call(call, number, stops):
    model = RunsThrice()
    with Capture(model, [f"layer{call}", f"layer{call}:input"]) as capture:
        for _ in range(2):
            try:
                model(INPUTS)
            except Complete:
                assert stops
            if stops:
                capture.stop_early()
            values = capture.pop()
    x = INPUTS
    for _ in range(number):
        x = model.layer(x)
    assert torch.equal(values[f"layer{call}:input"], x)
    assert torch.equal(values[f"layer{call}"], model.layer(x))


@pytest.mark.parametrize("call", ["@3", "@-4"])
def test_a_call_that_there_is_not_is_told_with_how_many_there_are(call):
    model = RunsThrice()
    with Capture(model, [f"layer{call}"]) as capture:
        model(INPUTS)
        with pytest.raises(DistillError, match="is not there: it ran 3 times, the first being @0"):
            capture.pop()


def test_negative_numbers_count_from_the_last_of_a_row():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 3), nn.Tanh()))
    with Capture(model, ["-1.-2", "1.1"]) as capture:
        output = model(INPUTS)
        values = capture.pop()
    assert torch.equal(values["1.1"], output)
    assert torch.equal(values["-1.-2"].tanh(), output)
    with pytest.raises(DistillError, match="has no module '-3'"):
        Capture(model, ["-3"])


def test_stopping_early_leaves_out_what_comes_behind_the_last_value():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), Counting(), nn.Linear(4, 2))
    with Capture(model, ["0", "1:input", "1"]) as capture:
        model(INPUTS)
        capture.stop_early()
        whole = capture.pop()
        for _ in range(2):
            with pytest.raises(Complete):
                model(INPUTS)
            stopped = capture.pop()
    assert model[2].count == 1
    assert all(torch.equal(whole[path], stopped[path]) for path in whole)


def test_a_stop_passes_through_models_that_catch_exceptions():
    class Catching(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.rest = nn.Linear(4, 4), Counting()

        def forward(self, x):
            try:
                y = self.layer(x)
            except Exception:
                y = x
            return self.rest(y)

    model = Catching()
    with Capture(model, ["layer"]) as capture:
        model(INPUTS)
        capture.stop_early()
        capture.pop()
        with pytest.raises(Complete):
            model(INPUTS)
    assert model.rest.count == 1


def test_a_module_that_did_not_run_is_an_error():
    model = ToyMLP()
    model.extra = nn.Linear(4, 4)
    with Capture(model, ["body", "extra"]) as capture:
        model(INPUTS)
        with pytest.raises(DistillError, match="'extra' did not run"):
            capture.pop()


def test_a_wrong_path_is_answered_with_the_nearest_and_changes_nothing():
    model = ToyMLP()
    with pytest.raises(DistillError, match=r"ToyMLP has no module 'boddy'; did you mean body"):
        Capture(model, ["body.0", "boddy"])
    assert model.body[1].inplace is True
    assert not model.body[0]._forward_hooks


def test_a_path_unlike_any_other_is_answered_with_what_there_is():
    model = ToyMLP()
    assert unknown_module(model, "encoder").endswith("(it has: body, dropout, head)")
    assert unknown_module(model, "body.transformer_block").endswith("(body has: body.0, body.1)")
    assert unknown_module(nn.ReLU(), "x").endswith("(it has: no submodules)")


def test_switched_off_it_records_nothing_and_notices_nothing():
    model = RunsTwice()
    capture = Capture(model, ["layer", "layer:input"])
    capture.enabled = False
    model(INPUTS)
    capture.enabled = True
    with pytest.raises(DistillError, match="did not run"):
        capture.pop()


def test_an_input_passed_by_keyword_is_captured():
    model = ByKeyword()
    with Capture(model, ["layer:input"]) as capture:
        model(INPUTS)
        assert capture.pop()["layer:input"] is INPUTS


def test_a_module_called_without_arguments_is_an_error_only_while_it_records():
    model = Constant()
    with Capture(model, ["zero:input"]) as capture:
        with pytest.raises(
            DistillError, match="'zero:input' is not there: the module is called without"
        ):
            model(INPUTS)
        capture.enabled = False
        model(INPUTS)


def test_features_can_be_captured_in_inference_mode():
    model = ToyMLP()
    with Capture(model, ["body"]) as capture, torch.inference_mode():
        model(INPUTS)
        assert capture.pop()["body"].shape == (5, 8)


def test_memory_is_free_once_values_are_popped_and_dropped():
    model = ToyMLP()
    capture = Capture(model, ["body.0"])
    output = model(INPUTS)
    values = capture.pop()
    feature = weakref.ref(values["body.0"])
    del values, output
    gc.collect()
    assert feature() is None


def test_memory_is_free_once_it_is_cleared():
    model = ToyMLP()
    capture = Capture(model, ["body.0"])
    model(INPUTS)
    feature = weakref.ref(capture._values["body.0"])
    capture.clear()
    gc.collect()
    assert feature() is None


def test_find_module_follows_a_path_and_the_empty_one_is_the_model():
    model = ToyMLP()
    assert find_module(model, "body.1") is model.body[1]
    assert find_module(model, "") is model


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("body.0", ("body.0", "")),
        ("body.0.logits", ("body.0", "logits")),
        ("body.9", ("body", "9")),
        ("features", ("", "features")),
        ("", ("", "")),
    ],
)
def test_split_path_parts_submodule_and_key(path, parts):
    assert split_path(ToyMLP(), path) == parts


def test_the_last_call_of_the_model_itself_can_be_captured():
    model = ToyMLP()
    with Capture(model, ["@-1"]) as capture:
        output = model(INPUTS)
        assert not capture.stop_early()
        assert torch.equal(capture.pop()["@-1"], output)


def test_a_module_with_two_places_is_not_taken_to_be_done_at_the_first():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(nn.Sequential(shared, nn.Tanh()), nn.Sequential(shared), nn.Tanh())
    with Capture(model, ["0.0@-1"]) as capture:
        for _ in range(2):
            output = model(INPUTS)
            assert not capture.stop_early()
            assert torch.equal(capture.pop()["0.0@-1"].tanh(), output)
