import pytest

from distill import load
from distill.observer import StageResult
from distill.summary import measured_on, summary_table


@pytest.fixture
def experiment(tmp_path, experiment_text):
    """Three stages, the last two of one architecture, over two seeds."""
    third = "  - name: alone\n    student: {model: thin}\n    teacher: {model: wide}\ntest:"
    text = experiment_text.replace("seed: 3", "seeds: [1, 2]").replace("test:", third)
    text = text.replace("baseline: teach", "baseline: alone")
    (tmp_path / "exp.yaml").write_text(text)
    return load(tmp_path / "exp.yaml")


def result(seed, stage, accuracy, **more):
    student, parameters = ("wide", 12345) if stage == "teach" else ("thin", 67)
    given = {"test": {"accuracy": accuracy}, **more}
    return StageResult(seed, stage, student, parameters, epochs=2, seconds=1.0, **given)


def cells(table):
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()]


def test_the_table_has_means_spreads_and_paired_gains(experiment):
    results = [
        result(1, "teach", 0.90),
        result(1, "distil", 0.80),
        result(1, "alone", 0.70),
        result(2, "teach", 0.94),
        result(2, "distil", 0.86),
        result(2, "alone", 0.80),
    ]
    header, rule, *rows = cells(summary_table(experiment, results))
    assert header == ["stage", "student", "parameters", "accuracy", "gain over alone"]
    assert [set(cell) for cell in rule] == [{"-"}, {"-"}, {"-", ":"}, {"-", ":"}, {"-", ":"}]
    # stdev of two numbers is their distance over the root of two; gains are 0.10 and 0.06.
    assert rows == [
        ["teach", "wide", "12,345", "92.00 ± 2.83 %", ""],
        ["distil", "thin", "67", "83.00 ± 4.24 %", "+8.00 ± 2.83 %"],
        ["alone", "thin", "67", "75.00 ± 7.07 %", ""],
    ]


def test_a_gain_pairs_seeds_and_leaves_out_those_without_a_partner(experiment):
    results = [result(1, "distil", 0.8), result(2, "distil", 0.9), result(2, "alone", 0.95)]
    rows = cells(summary_table(experiment, results))[2:]
    assert rows[0][-1] == "-5.00 %"


def test_one_seed_has_no_spread(experiment):
    rows = cells(summary_table(experiment, [result(1, "teach", 0.5)]))[2:]
    assert rows == [["teach", "wide", "12,345", "50.00 %", ""]]


def test_without_test_data_the_validation_counts(experiment):
    given = result(1, "distil", 0.0, test={}, validation={"accuracy": 0.25, "other": 0.5})
    header, _, row = cells(summary_table(experiment, [given]))
    assert header[3:5] == ["accuracy", "other"]
    assert row[3:5] == ["25.00 %", "50.00 %"]


def test_columns_are_aligned(experiment):
    results = [result(seed, stage, 0.5) for seed in (1, 2) for stage in ("teach", "distil")]
    assert len({len(line) for line in summary_table(experiment, results).splitlines()}) == 1


def test_results_without_metrics_give_a_table_without_them(experiment):
    header, _, row = cells(summary_table(experiment, [result(1, "teach", 0, test={})]))
    assert (header, row) == (["stage", "student", "parameters"], ["teach", "wide", "12,345"])


def test_what_was_measured_on_is_said_in_words(experiment, tmp_path, experiment_text):
    assert measured_on(experiment) == (
        "on the data set 'val', mean ± standard deviation over 2 seeds"
    )
    text = "\n".join(line for line in experiment_text.splitlines() if not line.startswith("test"))
    (tmp_path / "exp.yaml").write_text(text)
    single = load(tmp_path / "exp.yaml")
    assert measured_on(single) == "on each stage's validation data, one seed"
