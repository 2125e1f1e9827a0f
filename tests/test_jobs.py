"""Commands side by side, and the signals that end them."""

import os
import signal
import subprocess
import sys
import time

import pytest

# As training does: the first signal is a request to save, the second acts at once.
CHILD = """
import pathlib, signal, sys, time

def first(number, frame):
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    time.sleep(0.5)
    pathlib.Path(sys.argv[1], 'saved').touch()
    sys.exit()

for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, first)
pathlib.Path(sys.argv[1], 'ready').touch()
time.sleep(60)
"""
PARENT = """
import pathlib, signal, sys
from vit_jax.jobs import Job, available_cpus, run_jobs, shares

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in background jobs
folder, child = sys.argv[1:]
job = Job([sys.executable, '-c', child, folder], pathlib.Path(folder, 'log'))
try:
    list(run_jobs([job, job], shares(1, available_cpus())))
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.fixture
def parent(tmp_path):
    """A process, with a group of its own as under a shell, whose job is running."""
    process = subprocess.Popen(
        [sys.executable, '-c', PARENT, str(tmp_path), CHILD], start_new_session=True
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / 'ready').exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    yield process
    process.kill()
    process.wait()


def test_a_job_hears_of_ctrl_c_once(parent, tmp_path):
    """A terminal tells all processes of the group; the next job does not start."""
    (tmp_path / 'ready').unlink()
    os.killpg(parent.pid, signal.SIGINT)
    assert parent.wait(30) == 130
    assert (tmp_path / 'saved').exists()
    assert not (tmp_path / 'ready').exists()


def test_the_second_ctrl_c_kills(parent, tmp_path):
    os.killpg(parent.pid, signal.SIGINT)
    time.sleep(0.2)
    os.killpg(parent.pid, signal.SIGINT)
    assert parent.wait(30) == 130
    time.sleep(0.6)
    assert not (tmp_path / 'saved').exists()
