import pytest

import distill_datasets_vision as plugin


@pytest.mark.parametrize(
    "hook",
    [
        "distill_batch_transforms",
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
