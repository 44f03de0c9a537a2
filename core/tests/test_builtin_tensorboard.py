from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from distill.builtin.tensorboard import TensorBoard
from distill.observer import EpochEnd, EvaluationEnd, Position, RunEnd, RunStart, StepEnd


def read(folder):
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def test_losses_metrics_and_text_are_events_of_their_seed_and_stage(tmp_path):
    board = TensorBoard()
    board.run_start(RunStart("toy", tmp_path, [1], ["kd"], {}, {"experiment.yaml": "name: toy"}))
    step = Position(1, 0, 0, 5)
    board.step_end(StepEnd(step, "kd", 2, 10, {"ce": 0.5}, 0.1, 100.0, 1.0, {"ce": 0.2}))
    board.evaluation_end(EvaluationEnd(step, "kd", {"accuracy": 0.25}, False))
    at = Position(1, 0, 1, 10)
    metrics = {"accuracy": 0.75}
    board.epoch_end(EpochEnd(at, "kd", 2, {"ce": 0.25}, metrics, 0.1, 1.0, 100.0, True))
    board.run_end(RunEnd([], "| table |", "on val"))
    board.close()
    events = read(tmp_path / "tensorboard/seed-1/kd")
    values = {
        tag: [(e.step, round(e.value, 4)) for e in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }
    assert values == {
        "step/ce": [(5, 0.5)],
        "weight/ce": [(5, 0.2)],
        "validation at step/accuracy": [(5, 0.25)],
        "speed/samples_per_second": [(5, 100.0)],
        "train/ce": [(1, 0.25)],
        "validation/accuracy": [(1, 0.75)],
        "train/lr": [(1, 0.1)],
    }
    texts = read(tmp_path / "tensorboard").Tags()["tensors"]
    assert texts == ["results/text_summary", "experiment.yaml/text_summary"]


def test_closing_before_the_start_does_nothing():
    TensorBoard().close()
