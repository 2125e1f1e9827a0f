import itertools
import logging
import multiprocessing
import os
import signal
import threading
import time
from contextlib import closing

import numpy as np
import pytest

from vit_jax.data.input_pipeline import eval_batches, train_batches
from vit_jax.data.watch import Watch, where_readers_are
from vit_jax.errors import UserError


class Slow:
    """Nine examples; reading is held up as long as `gate` is not set."""

    def __init__(self, gate=None):
        self.gate = gate

    def __len__(self):
        return 9

    def __getitem__(self, index):
        if self.gate is not None:
            self.gate.wait()
        return {'image': np.zeros((2, 2, 1), np.uint8), 'label': index, 'name': 'x'}


class Label:
    def __call__(self, example, rng=None):
        return {'label': np.int32(example['label'])}


def pauses(*seconds):
    for pause in seconds:
        time.sleep(pause)
        yield pause


def test_items_come_through():
    with closing(Watch(iter(range(5)), 60.0)) as watch:
        assert list(watch) == list(range(5))


def test_a_hang_is_told_each_time_and_waited_for(caplog):
    """At 0.3, 0.6 and 0.9 s of the wait of 1 s, and not in between."""
    with closing(Watch(pauses(0.0, 1.0, 0.1), 0.3, lambda: 'somewhere')) as watch:
        next(watch)
        time.sleep(0.5)  # nobody waits
        assert list(watch) == [1.0, 0.1]
    lines = [record.getMessage() for record in caplog.records]
    assert 3 <= len(lines) <= 4  # the sleep may be longer on a busy machine
    assert all('still waiting; somewhere' in line for line in lines)
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 3


def test_closing_ends_the_thread_at_once_and_closes_the_iterator():
    before = threading.active_count()
    closed = []

    class Source:
        def __next__(self):
            return 1

        def close(self):
            closed.append(True)

    watch = Watch(Source(), 3600.0)
    assert threading.active_count() == before + 1
    start = time.monotonic()
    watch.close()
    assert time.monotonic() - start < 60.0  # of an hour
    assert closed == [True]
    assert threading.active_count() == before


def test_readers_are_named(caplog):
    """Threads that read: the line says which call they are in."""
    gate = threading.Event()
    threading.Timer(0.7, gate.set).start()
    kwargs = {'batch_size': 3, 'seed': 0, 'timeout_seconds': 0.4}
    with closing(train_batches(Slow(gate), Label(), **kwargs)) as batches:
        next(batches)
    record = caplog.records[0]
    assert 'readers: grain-prefetch_0 in' in record.getMessage()
    assert '__getitem__ > threading.py' in record.getMessage()
    assert '\n' not in record.getMessage()
    assert where_readers_are() == 'readers: none is at work'


@pytest.fixture
def workers():
    """Iterates with two processes, and gives their ids."""
    kwargs = {'batch_size': 3, 'num_workers': 2, 'timeout_seconds': 0.5}
    batches = train_batches(Slow(), Label(), seed=0, **kwargs)
    with closing(batches):
        next(batches)
        next(batches)
        children = multiprocessing.active_children()
        yield batches, [child.pid for child in children if 'grain' in child.name]


def test_a_killed_worker_is_one_clear_error(workers):
    batches, pids = workers
    assert len(pids) == 2
    os.kill(pids[0], signal.SIGKILL)
    message = r'was killed \(signal 9\).* out of memory; use fewer dataset.num_workers'
    with pytest.raises(UserError, match=message) as error:
        list(itertools.islice(batches, 50))
    assert '\n' not in str(error.value)


def test_stopped_workers_are_told_and_waited_for(workers, caplog):
    batches, pids = workers
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        timer = threading.Timer(1.2, lambda: [os.kill(p, signal.SIGCONT) for p in pids])
        timer.start()
        assert len(list(itertools.islice(batches, 20))) == 20
    finally:
        timer.join()
    line = caplog.records[0].getMessage()
    assert 'the processes that read are alive' in line
    assert str(pids[0]) in line


class Dies:
    def __call__(self, example):
        os._exit(3)


def test_a_worker_that_ends_by_itself():
    batches = eval_batches(Slow(), Dies(), batch_size=3, num_workers=1)
    with closing(batches), pytest.raises(UserError, match='ended with exit code 3'):
        next(batches)
