import pytest

from distill.config.schema import frame_faults
from distill.config.yaml_document import parse

WRONG = [
    ("name: toy", "name: to y", "'to y' does not fit here; a run's name is up to 64 letters"),
    ("name: toy", "name: ../toy", "'../toy' does not fit here; a run's name is up to"),
    ("name: toy", "name: 5", "name: expected text, got the number 5"),
    ("seed: 3", "seed: 3.0", "seed: expected a whole number, got the number 3.0"),
    ("seed: 3", "seed: true", "seed: expected a whole number, got true"),
    ("seed: 3", "seed: 9223372036854775808", "seed: must be at most 9223372036854775807, got"),
    ("seed: 3", "seeds: []", "seeds: the list is empty"),
    ("seed: 3", "seeds: [1, 1]", "seeds: the list names something twice"),
    ("seed: 3", "seeds: 3", "seeds: expected a list, got the number 3"),
    ("log_every: 5", "log_every: 0", "log_every: must be at least 1, got the number 0"),
    ("wide: {type", "wi.de: {type", "models.wi.de: 'wi.de' is no name; use letters, digits, _"),
    ("type: ToyMLP", "type: ''", "models.wide.type: the text is empty"),
    (
        "params: {hidden: 16}",
        "params: [16]",
        "params: expected a mapping, got the list [16]",
    ),
    ("transforms: [{type: Scale, params: {factor: 0.5}}]", "transforms: [3]", "a mapping or text"),
    ("{model: wide, mode: eval}", "wide", "got the text 'wide'; write {model: wide}"),
    (
        "mode: eval",
        "store: int8",
        "expected true or false or null or a mapping of encoding, top, temperature, got the text",
    ),
    ("mode: eval", "min_accuracy: 95", "min_accuracy: must be at most 1, got the number 95"),
    ("freeze: [student.head]", "freeze: student.head", "expected a list or null, got the text"),
    ("ce: {type: CrossEntropyLoss}", "{}", "stages.teach.criterion: is empty"),
    (
        "metrics: [accuracy]",
        "keep: bets",
        "one of last, best, ema, got the text 'bets'; did you mean",
    ),
    ("batch_size: 8", "batch_size: null", "batch_size: expected a whole number, got nothing"),
    ("batch_size: 8", "drop_last: 1", "drop_last: expected true or false, got the number 1"),
    (
        "inputs: {input: student.body}",
        "inputs: {input: 1}",
        "inputs.input: expected text or a list, got",
    ),
    ("validate: val", "validate: [val, val]", "data.validate: the list names something twice"),
    ("validate: val", "validate: [val, 3]", "data.validate[1]: expected text, got the number 3"),
    ("validate: val", "validate: va.l", "data.validate: 'va.l' does not fit here"),
    ("batch_size: 8", "batch_size: 8, accumulate: 0", "accumulate: must be at least 1, got"),
    ("batch_size: 8", "batch_size: 8, prefetch: 0", "prefetch: must be at least 1, got"),
    ("batch_size: 8", "batch_size: 8, sampler: [S]", "sampler: expected a mapping or text or null"),
    ("batch_size: 8", "batch_size: 8, worker_timeout: 0", "worker_timeout: must be above 0"),
    (
        "batch_size: 8",
        "batch_size: 8, on_bad_sample: skp",
        "one of raise, skip, got the text 'skp'",
    ),
    ("weight: 0.5", "weight: {ovr: 3}", "weight.ovr: unknown key 'ovr'; did you mean over?"),
    ("weight: 0.5", "weight: {shape: cosin}", "weight.shape: expected one of linear, cosine, got"),
    ("params: {lr: 0.1}}", "groups: [{params: {lr: 1}}]}", "groups[0]: the key 'match' is missing"),
    ("params: {lr: 0.1}}", "groups: [{match: []}]}", "groups[0].match: the list is empty"),
    ("params: {lr: 0.1}}", "no_decay: bias}", "no_decay: expected a list, got the text 'bias'"),
    ("{type: StepLR", "{unit: epoch, type: StepLR", "one of epochs, steps, got the text 'epoch'"),
    ("{type: StepLR", "{until: 0, type: StepLR", "scheduler.until: must be at least 1, got"),
    ("precision: fp32", "clip: {norm: 0}", "clip.norm: must be above 0, got the number 0"),
    ("precision: fp32", "ema: {warmup: true}", "stages.teach.ema: the key 'decay' is missing"),
    ("precision: fp32", "ema: {decay: 2}", "ema.decay: must be at most 1, got the number 2"),
    ("precision: fp32", "parallel: fdsp", "one of ddp, fsdp, got the text 'fdsp'; did you mean"),
    ("precision: fp32", "evaluate: {evry: 2}", "evaluate.evry: unknown key 'evry'; did you mean"),
    ("precision: fp32", "compile: student", "compile: expected a list or null, got the text"),
    ("metrics: [accuracy]", "metrics: [{name: a}]", "metrics.a: the key 'type' is missing"),
]


def frame(text):
    return [str(fault) for _, fault in frame_faults(parse(text, "exp.yaml"))]


@pytest.mark.parametrize(("right", "wrong", "said"), WRONG)
def test_a_value_of_the_wrong_form_is_one_fault_in_words(experiment_text, right, wrong, said):
    assert right in experiment_text
    (fault,) = frame(experiment_text.replace(right, wrong, 1))
    assert said in fault


@pytest.mark.parametrize("key", ["name", "datasets", "models", "stages"])
def test_what_an_experiment_must_have_is_missed(experiment_text, key):
    document = parse(experiment_text, "exp.yaml")
    del document.data[key]
    ((path, fault),) = frame_faults(document)
    assert path == ()
    assert fault.message == f"the key '{key}' is missing"


def test_a_misspelt_required_key_is_not_missed_as_well(experiment_text):
    (fault,) = frame(experiment_text.replace("models:", "model:"))
    assert fault.endswith("model: unknown key 'model'; did you mean models?")


def test_an_unknown_key_like_no_other_gets_the_list_of_known_ones(experiment_text):
    (fault,) = frame(experiment_text.replace("[accuracy]\n", "[accuracy]\n    zzz: 1\n", 1))
    assert "stages.teach.zzz: unknown key 'zzz' (known: name, epochs, data, teacher," in fault


def test_keys_that_begin_with_x_hold_what_the_author_wants(experiment_text):
    anchors = "x-common: &sgd {type: SGD, params: {lr: 0.1}}\nx-2: [1]\n"
    text = anchors + experiment_text.replace("{type: SGD, params: {lr: 0.1}}", "*sgd")
    assert frame(text) == []


def test_clearing_values_fit_the_frame(experiment_text):
    cleared = "    auxiliary: null\n    freeze: []\n    teachers: {}\n"
    text = experiment_text.replace("    precision: fp32\n", cleared + "    teacher: null\n")
    text = text.replace("scheduler: {type: StepLR, params: {step_size: 1}}", "scheduler: null")
    assert frame(text) == []


def test_an_adapter_is_auto_or_none(experiment_text):
    right = "inputs: {input: student.body}"
    term = experiment_text.replace("type: Distance", "type: Distance, adapter: atuo", 1)
    assert term != experiment_text, right
    (fault,) = frame(term)
    assert "adapter: expected auto, got the text 'atuo'; did you mean auto?" in fault
