"""What all tests share: one torch thread, and event files in the order they were written."""

import os
import sys

# more threads are slower for networks of this size; also for child processes
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402
from tensorboard.summary.writer import event_file_writer  # noqa: E402

import tests.scripted_env  # noqa: E402, F401  (registers its environments)
from tests.common import ROOT, SCRIPTS, run_flags, small_flags  # noqa: E402

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

# A run and its resumption in one process and one second differ only by a counter in the names
# of their event files.
# TensorBoard reads the files in the order of their names, and would read number 10 before number 9.
event_file_writer._global_uid = event_file_writer.AtomicCounter(1_000_000)


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    """Every test runs in a folder of its own, as a script without flags would."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(sys, "argv", ["script.py"])


@pytest.fixture(params=SCRIPTS, ids=lambda script: script.__name__)
def script(request):
    return request.param


@pytest.fixture
def small(script):
    return small_flags(script)


@pytest.fixture
def flags(script):
    return run_flags(script)
