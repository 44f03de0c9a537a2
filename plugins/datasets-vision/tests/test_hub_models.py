import io
import sys
import zipfile

import pytest
import torch

import distill
from distill.signature import bind
from distill_datasets_vision import distill_models
from distill_datasets_vision.hub_models import torch_hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "someone/some-models"
HUBCONF = """
dependencies = ["torch"]
import torch
from some_networks import width

def small(num_classes=2, pretrained=False):
    model = torch.nn.Sequential(torch.nn.Linear(width, num_classes))
    model.pretrained = pretrained
    return model

def broken():
    raise RuntimeError("size mismatch")

def unreachable():
    raise ConnectionError("no route to host")
"""


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty folder of torch.hub; nothing can be downloaded."""

    def refuse(*_args, **_kwargs):
        raise AssertionError("tried to reach GitHub")

    monkeypatch.setattr(torch.hub, "urlopen", refuse)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.delitem(sys.modules, "some_networks", raising=False)
    return tmp_path


@pytest.fixture
def cached(hub):
    """``REPO`` at ``COMMIT``, where torch.hub puts what it has fetched."""
    folder = hub / f"someone_some-models_{COMMIT}"
    folder.mkdir()
    (folder / "hubconf.py").write_text(HUBCONF, "utf-8")
    (folder / "some_networks.py").write_text("width = 4\n", "utf-8")
    return folder


@pytest.fixture
def served(hub, monkeypatch):
    """The same as an archive that GitHub serves; returns the addresses asked for."""
    asked = []
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as content:
        content.mkdir("someone-some-models-0123456")
        content.writestr("someone-some-models-0123456/hubconf.py", HUBCONF)
        content.writestr("someone-some-models-0123456/some_networks.py", "width = 4\n")

    def download(url, target, **_kwargs):
        asked.append(url)
        with open(target, "wb") as file:
            file.write(archive.getvalue())

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    return asked


def test_it_is_offered_under_its_name_with_checked_parameters():
    assert distill.plugins().find("models", "torch_hub").factory is torch_hub
    assert distill_models()["torch_hub"] is torch_hub
    params = {"repo": REPO, "revision": COMMIT, "model": "small", "options": {"num_classes": 3}}
    assert not bind(torch_hub, params).problems
    assert [p.message for p in bind(torch_hub, {"repo": REPO, "model": "small"}).problems] == [
        "the parameter 'revision' is missing"
    ]


def test_it_says_whose_code_it_runs():
    params = {"repo": REPO, "revision": COMMIT, "model": "small"}
    assert torch_hub.remote_code(params) == f"github.com/{REPO} at {COMMIT}"
    assert torch_hub.remote_code({"repo": 3}) == "github.com/3 at ?"


def test_a_model_comes_from_the_folder_of_its_commit_without_network(cached):
    assert torch_hub(REPO, COMMIT, "small", {"num_classes": 3})[0].weight.shape == (3, 4)
    assert torch_hub(REPO, COMMIT, "small")[0].weight.shape == (2, 4)


def test_the_commit_is_fetched_once_from_github(served, hub):
    for _ in range(2):
        assert torch_hub(REPO, COMMIT, "small")[0].weight.shape == (2, 4)
    assert served == [f"https://github.com/{REPO}/zipball/{COMMIT}"]
    assert (hub / f"someone_some-models_{COMMIT}" / "hubconf.py").is_file()


@pytest.mark.parametrize(
    "revision", ["main", "v1.0", COMMIT[:7], COMMIT.upper(), COMMIT + "0", f"{COMMIT}\n", ""]
)
def test_what_can_move_is_refused(hub, revision):
    with pytest.raises(ValueError, match="is no commit: give all 40 digits"):
        torch_hub(REPO, revision, "small")


@pytest.mark.parametrize(
    "repo", ["models", "someone/models:main", "https://github.com/a/b", "a/b/c", "../a", "", "a/.."]
)
def test_what_is_no_repository_is_refused(hub, repo):
    with pytest.raises(ValueError, match="is no repository: give its owner and name"):
        torch_hub(repo, COMMIT, "small")


@pytest.mark.parametrize("key", ["source", "force_reload", "trust_repo", "repo_or_dir"])
def test_options_are_arguments_of_the_function_alone(cached, key):
    with pytest.raises(ValueError, match=f"'{key}' cannot be an option"):
        torch_hub(REPO, COMMIT, "small", {key: True})


def test_an_unknown_model_is_answered_with_the_known_ones(cached):
    place = f"github.com/{REPO} at {COMMIT}"
    with pytest.raises(ValueError, match=f"{place} has no model 'smal'; did you mean small"):
        torch_hub(REPO, COMMIT, "smal")
    with pytest.raises(ValueError, match=r"no model 'zzz' \(known: broken, small, unreachable\)"):
        torch_hub(REPO, COMMIT, "zzz")


def test_an_error_of_the_repository_is_its_own(cached):
    with pytest.raises(RuntimeError, match="size mismatch"):
        torch_hub(REPO, COMMIT, "broken")
    with pytest.raises(TypeError, match="unexpected keyword argument 'depth'"):
        torch_hub(REPO, COMMIT, "small", {"depth": 3})


def test_what_cannot_be_reached_is_named(cached):
    with pytest.raises(OSError, match=f"{REPO} at {COMMIT} cannot be loaded: no route to host"):
        torch_hub(REPO, COMMIT, "unreachable")


def test_on_meta_no_pretrained_weights_are_asked_for(cached):
    options = {"pretrained": True}
    assert torch_hub(REPO, COMMIT, "small", options).pretrained is True
    with torch.device("meta"):
        model = torch_hub(REPO, COMMIT, "small", options)
    assert model.pretrained is False
    assert model[0].weight.is_meta
    assert options == {"pretrained": True}
