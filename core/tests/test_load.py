import pytest

from distill import ConfigError, load
from distill.config.load import draft
from distill.config.yaml_document import parse


def write(folder, text):
    file = folder / "exp.yaml"
    file.write_text(text, "utf-8")
    return file


def test_a_file_becomes_an_experiment_with_its_overrides(tmp_path, experiment_text):
    experiment = load(write(tmp_path, experiment_text), ["stages.distil.epochs=7"])
    assert [stage.epochs for stage in experiment.stages] == [2, 7]
    assert experiment.document.text == experiment_text


def test_seed_and_seeds_together_are_refused_wherever_they_come_from(tmp_path, experiment_text):
    with pytest.raises(ConfigError, match="give either 'seed' or 'seeds', not both"):
        load(write(tmp_path, experiment_text + "seeds: [1]\n"))


def test_every_fault_of_the_frame_is_in_one_error(tmp_path, experiment_text):
    text = experiment_text.replace("epochs: 2", "epochs: two").replace("weight: 0.5", "wight: 1")
    text = text.replace("{model: thin}", "{model: thinn}")
    with pytest.raises(ConfigError) as caught:
        load(write(tmp_path, text))
    said = [fault.message.split(";")[0] for fault in caught.value.faults]
    assert said == [
        "expected a whole number, got the text 'two'",
        "there is no model 'thinn' in this file",
        "unknown key 'wight'",
    ]
    assert caught.value.exit_code == 2


def test_a_missing_file_names_the_nearest(tmp_path, experiment_text):
    write(tmp_path, experiment_text)
    with pytest.raises(ConfigError, match=r"there is no such file; did you mean exp\.yaml\?"):
        load(tmp_path / "exp.yml")


def test_a_draft_leaves_the_document_as_it_was(experiment_text):
    document = parse(experiment_text.replace("epochs: 2", "epochs: two"), "exp.yaml")
    experiment, faults = draft(document)
    assert len(faults) == 1
    assert document.data["stages"][0]["epochs"] == "two"
    assert experiment.document is document


@pytest.mark.parametrize("text", ["stages: []\n", "name: 3\nmodels: []\n", "[1]\n", "a: &a [*a]\n"])
def test_a_file_that_is_no_experiment_is_refused_without_a_draft(tmp_path, text):
    with pytest.raises(ConfigError) as caught:
        load(write(tmp_path, text))
    assert caught.value.faults


@pytest.mark.parametrize("wrong", ["train: 5", "train: {tpye: X}", "train: {type: X, parms: {}}"])
def test_what_depends_on_a_faulty_part_is_not_faulted_too(experiment_text, wrong):
    line = experiment_text.splitlines()[5]
    _, faults = draft(parse(experiment_text.replace(line, f"  {wrong}"), "exp.yaml"))
    assert len(faults) == 1


def test_an_experiment_without_faults_has_no_gaps(tmp_path, experiment_text):
    assert load(write(tmp_path, experiment_text)).gaps.paths == frozenset()
