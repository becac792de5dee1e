"""What all tests share: one torch thread, and event files in the order they were written."""

import os

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # more are slower for networks of this size; also for child processes

import torch  # noqa: E402
from tensorboard.summary.writer import event_file_writer  # noqa: E402

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

# A run and its resumption in one process and one second differ only by a counter in the names
# of their event files.
# TensorBoard reads the files in the order of their names, and would read number 10 before number 9.
event_file_writer._global_uid = event_file_writer.AtomicCounter(1_000_000)
