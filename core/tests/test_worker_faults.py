"""What becomes of a run whose data cannot be read: by a worker that fails, dies or hangs."""

import gc
import multiprocessing
import os
import re
import signal
import time
import traceback

import pytest
import torch

from distill import DataError
from distill.builtin.accuracy import accuracy
from distill.data.loader import Loading, evaluation_batches, training_batches
from distill.data.plan import Plan
from distill.data.source import Source
from distill.training.evaluation import Evaluating, evaluate

TIMEOUT = 2


class Given:
    """A sampler in a fixed order."""

    def __init__(self, indices):
        self.indices = list(indices)

    def __len__(self):
        return len(self.indices)

    def __iter__(self):
        return iter(self.indices)


class Photos:
    """Sample ``n`` is the number n; some of them have something done on reading."""

    def __init__(self, size=8, bad=(), does=None):
        self.size, self.bad, self.does = size, set(bad), does

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        if index in self.bad:
            self.does(index)
        return torch.tensor(float(index)), index


def refuse(index):
    raise OSError(f"file {index} is damaged")


def raise_in_torch(index):
    torch.zeros(2) + torch.zeros(3)


def die(index):
    os.kill(os.getpid(), signal.SIGKILL)


def leave(index):
    os._exit(3)


def hang(index):
    time.sleep(60)


def epoch_of(dataset, workers=0, skip=False, batch_size=2, **options):
    loading = Loading(workers, timeout=TIMEOUT, on_bad_sample="skip" if skip else "raise")
    plan = Plan(len(dataset), batch_size, sampler=Given(range(len(dataset))))
    source = Source("photos", dataset)
    return list(training_batches(source, plan, loading, **{"seed": 1, "epoch": 0, **options}))


def evaluated(dataset, workers=0, skip=True, batch_size=3, **options):
    loading = Loading(workers, timeout=TIMEOUT, on_bad_sample="skip" if skip else "raise")
    source = Source("photos", dataset)
    return list(evaluation_batches(source, batch_size, loading, seed=1, **options))


def said(read):
    """The one line that a fault is told in; the error goes at once, and the workers with it."""
    try:
        read()
    except DataError as error:
        text = "".join(traceback.format_exception_only(error))
    else:
        pytest.fail("no DataError")
    kind, _, text = text.rstrip("\n").partition(": ")
    assert kind.endswith("DataError")
    assert "\n" not in text
    return text


def indices(batches):
    return [index for batch in batches for index in batch.index.tolist()]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("read", [epoch_of, lambda *a: evaluated(*a, skip=False)])
def test_a_sample_that_raises_ends_the_run_with_its_data_set_index_and_reason(read, workers):
    text = said(lambda: read(Photos(bad=[5], does=refuse), workers))
    assert text == (
        "data set 'photos': sample 5 cannot be read: OSError: file 5 is damaged; "
        "data: {on_bad_sample: skip} passes over such samples"
    )


def test_a_torch_error_in_a_worker_is_the_samples_and_not_the_workers():
    text = said(lambda: epoch_of(Photos(bad=[5], does=raise_in_torch), 1))
    assert text.startswith("data set 'photos': sample 5 cannot be read: RuntimeError: The size")
    assert "worker" not in text


@pytest.mark.parametrize("read", [epoch_of, evaluated])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_worker_names_the_sample_it_was_reading(read, workers):
    text = said(lambda: read(Photos(bad=[5], does=die), workers))
    assert text.startswith("data set 'photos': a loader worker died reading sample 5 (")
    assert re.search(r" 5 \([^()]+\); the system", text)
    assert text.endswith("fewer data.workers need less")


def test_a_worker_that_leaves_names_the_sample_it_was_reading():
    text = said(lambda: epoch_of(Photos(bad=[3], does=leave), 1))
    assert text.startswith("data set 'photos': a loader worker")
    assert "reading sample 3" in text


def test_a_worker_that_hangs_ends_the_run_after_the_timeout_and_names_the_sample():
    started = time.monotonic()
    text = said(lambda: epoch_of(Photos(bad=[5], does=hang), 1, skip=True))
    assert text.startswith("data set 'photos': no loader worker ")
    assert text.endswith(f" for {TIMEOUT} s (data.worker_timeout) reading sample 5")
    assert TIMEOUT <= time.monotonic() - started < 10 * TIMEOUT


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_sample_gives_its_place_to_the_next_readable_one_and_is_told(workers):
    batches = epoch_of(Photos(8, bad=[1, 4, 5, 7], does=refuse), workers, skip=True)
    assert [batch.index.tolist() for batch in batches] == [[0, 2], [2, 3], [6, 6], [6, 0]]
    for batch in batches:
        assert batch.inputs.tolist() == batch.targets.tolist() == batch.index.tolist()
        assert batch.share == 1.0
    told = [[index for index, _ in batch.skipped] for batch in batches]
    assert told == [[1], [], [4, 5, 5], [7]]
    for batch in batches:
        for index, why in batch.skipped:
            reason = f"sample {index} cannot be read: OSError: file {index} is damaged"
            assert why == f"data set 'photos': {reason}"


def test_what_stands_in_is_drawn_anew_and_the_same_under_any_number_of_workers():
    """Or the sample would come twice in an epoch with the same augmentation."""

    def noisy(value):
        return value + torch.rand(())

    def read(workers, bad, index):
        source = Source("photos", Photos(4, bad, refuse), [noisy])
        plan, loading = Plan(4, 1, sampler=Given([index])), Loading(workers, on_bad_sample="skip")
        (batch,) = training_batches(source, plan, loading, seed=1, epoch=0)
        assert batch.index.tolist() == [3]
        return batch.inputs.item()

    after_one, after_two = read(0, [2], 2), read(0, [1, 2], 1)
    assert len({after_one, after_two, read(0, [], 3)}) == 3
    assert [read(2, [2], 2), read(2, [1, 2], 1)] == [after_one, after_two]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_processes_take_equal_steps_over_the_same_samples_whatever_is_bad(every_rank, world):
    dataset = Photos(8, bad=[1, 4, 5, 7], does=refuse)
    of_ranks = every_rank(world, lambda: epoch_of(dataset, skip=True, batch_size=4))
    assert {len(batches) for batches in of_ranks} == {2}
    whole = [[0, 2, 2, 3], [6, 6, 6, 0]]
    for number, expected in enumerate(whole):
        assert indices(batches[number] for batches in of_ranks) == expected


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("bad", "batch_size"), [([1, 4], 3), ([0, 1, 2], 2), ([6], 3), ([0], 1)])
def test_an_evaluation_leaves_bad_samples_out_and_counts_the_others_once(workers, bad, batch_size):
    """Whole batches may be bad, the first and the last too."""
    batches = evaluated(Photos(7, bad, refuse), workers, batch_size=batch_size)
    assert indices(batches) == [index for index in range(7) if index not in bad]
    read = [value for batch in batches if len(batch) for value in batch.inputs.tolist()]
    assert read == indices(batches)


@pytest.mark.parametrize("in_step", [False, True])
@pytest.mark.parametrize("world", [2, 3])
def test_processes_together_count_every_readable_sample_once(every_rank, world, in_step):
    dataset = Photos(8, [0, 5], refuse)
    of_ranks = every_rank(world, lambda: evaluated(dataset, batch_size=6, in_step=in_step))
    read = [i for batches in of_ranks for b in batches if b.share for i in b.index.tolist()]
    assert sorted(read) == [1, 2, 3, 4, 6, 7]
    if in_step:
        assert len({len(batches) for batches in of_ranks}) == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_where_nothing_can_be_read_training_ends_with_the_last_reason(workers):
    text = said(lambda: epoch_of(Photos(6, range(6), refuse), workers, skip=True))
    reason = r"data set 'photos': sample (\d) cannot be read: OSError: file \1 is damaged"
    assert re.fullmatch(rf"6 samples in a row cannot be read: {reason}", text)


@pytest.mark.parametrize("workers", [0, 2])
def test_where_nothing_can_be_read_an_evaluation_ends_with_an_error(workers):
    source = Source("photos", Photos(6, range(6), refuse))
    loading = Loading(workers, timeout=TIMEOUT, on_bad_sample="skip")
    how = Evaluating(batch_size=4, device=torch.device("cpu"), loading=loading)
    text = said(lambda: evaluate(torch.nn.Identity(), source, {"accuracy": accuracy()}, how))
    assert "'photos'" in text
    assert re.search("sample.* can(not)? be read", text)


@pytest.mark.parametrize("does", [refuse, die])
def test_no_worker_is_left_after_an_error(does):
    """Without waiting for Python to collect what refers to itself."""
    before = multiprocessing.active_children()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        said(lambda: epoch_of(Photos(bad=[5], does=does), 2))
        left = [child for child in multiprocessing.active_children() if child not in before]
    finally:
        if was_enabled:
            gc.enable()
    assert left == []
