import pytest

import distill_datasets_vision as plugin


@pytest.mark.parametrize(
    "hook",
    [
        "distill_batch_transforms",
        "distill_batched_transforms",
        "distill_dataset_wrappers",
        "distill_datasets",
        "distill_models",
        "distill_transforms",
    ],
)
def test_hooks_are_marked_and_return_named_factories(hook):
    offered = getattr(plugin, hook)
    assert offered.distill_impl
    assert all(isinstance(name, str) and callable(make) for name, make in offered().items())


def test_presets_lie_in_the_package_and_begin_with_what_they_are():
    assert plugin.distill_presets.distill_impl
    offered = plugin.distill_presets()
    data = ("cifar10", "cifar100", "imagenet")
    assert set(offered) == {f"{name}-{role}" for name in data for role in ("teacher", "student")}
    assert all(file.read_text("utf-8").startswith("# ") for file in offered.values())
