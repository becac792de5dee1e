"""Runs a grid of commands: on the workers of this machine, or as a Slurm job array.

./benchmark.sh calls it:

    python tools/benchmark.py quick --seeds 1 2 --commands "sac_continuous.py --env-id Pendulum-v1"
    python tools/benchmark.py quick ... --slurm --slurm-args "--time=02:00:00 --partition=cpu"

The cells of the grid are all commands with all seeds; {a,b,c} in a command stands for one command
with each, and --flags are added to all. Every cell has the folder runs/benchmark/SUITE/CELL: its
log, its run folder, and status.json, together the ledger. A cell that is done is never run again.
One that was cut off or failed goes on from its checkpoint, or starts again if it has none. A lock
on the folder, held by the training itself too, keeps two calls from running one cell.

Exit code 0: all cells are done. 1: some are not; the ends of the logs of those that failed
are printed. 130 after Ctrl-C: the trainings then have written a checkpoint.
"""

import fcntl
import hashlib
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import tyro
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent


def fail(message):
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def cores():
    """Number of cores that this process may use, or of all where the system does not tell."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass
class Args:
    suite: tyro.conf.Positional[str]  # name of the grid and of its folder
    commands: tuple[str, ...]  # scripts with their flags, without the seed
    seeds: tuple[int, ...] = (1, 2, 3)  # every command runs with each of these
    flags: str = ""  # added to every command, such as --cuda-graph
    workers: int = field(default_factory=cores)  # trainings at a time, one thread each
    folder: Path = ROOT / "runs" / "benchmark"  # where the folders of the suites are
    slurm: bool = False  # submit what is not done as a job array
    slurm_args: str = ""  # options for sbatch, such as --time and --partition
    only: int | None = None  # run only the cell of this number (a task of the array does)


def expand(command):
    """All commands that {a,b} in one stands for, in order."""
    parts = re.split(r"\{([^{}]*)\}", command)
    options = [part.split(",") if i % 2 else [part] for i, part in enumerate(parts)]
    return ["".join(choice) for choice in itertools.product(*options)]


class Cell:
    """One training: its command, its folder and what the folder says about it."""

    def __init__(self, command, folder):
        try:
            script, *self.flags = shlex.split(command)
        except ValueError as error:
            fail(f"cannot read the command {command}: {error}")
        self.command, self.script = command, ROOT / script
        name = "_".join(word.removeprefix("--") for word in (script, *self.flags))
        name = re.sub(r"[^\w.-]+", "-", name.replace(".py", ""))
        if len(name.encode()) > 255:  # more than file systems allow
            digest = hashlib.sha256(name.encode()).hexdigest()[:8]
            name = f"{name[:120]}_{digest}_{name[-70:]}"
        self.folder = folder / name

    def status(self):
        """The last recorded state: {} before the first start, else state, code and seconds."""
        try:
            return json.loads((self.folder / "status.json").read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return {}

    def done(self):
        return self.status().get("state") == "done"

    def record(self, state, code, seconds):
        """Replace status.json in one step."""
        temporary = self.folder / "status.tmp"
        status = {"command": self.command, "state": state, "code": code, "seconds": seconds}
        temporary.write_text(json.dumps(status, indent=1) + "\n")
        os.replace(temporary, self.folder / "status.json")

    def lock(self, file, stop):
        """Wait for the lock of the folder: another call, or a training that outlived its own."""
        while not stop:
            try:
                return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.5)
            except OSError:
                words = "cannot be locked here: call this grid once at a time"
                return print(f"warning: {self.folder} {words}", file=sys.stderr)

    def run(self, stop):
        """Run or go on, unless done; once `stop`, a list of signals, is not empty, end."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "lock", "w") as lock, open(self.folder / "log.txt", "a") as log:
            self.lock(lock, stop)
            if stop or self.done():
                return
            status, flags = self.status(), self.flags
            by_age = {"key": lambda path: path.stat().st_mtime, "default": None}
            checkpoint = max(self.folder.glob("runs/*/checkpoint.pt"), **by_age)
            if checkpoint:
                flags = ["--resume", str(checkpoint)]
            else:
                shutil.rmtree(self.folder / "runs", ignore_errors=True)
            command = [sys.executable, str(self.script), *flags]
            print(f"$ {shlex.join(command)}", file=log, flush=True)
            before, start = status.get("seconds", 0.0), time.time()
            self.record("running", None, before)
            process = subprocess.Popen(
                command,
                cwd=self.folder,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                pass_fds=(lock.fileno(),),  # the lock lasts as long as the training
                start_new_session=True,  # Ctrl-C reaches it through us, once
            )
            while process.poll() is None and not stop:
                time.sleep(0.1)
            if stop:  # it writes a checkpoint and leaves; Slurm may have sent it SIGTERM already,
                process.send_signal(signal.SIGINT)  # and a second one would end it at once
            code = process.wait()
            state = "done" if code == 0 else "cut off" if stop else "failed"
            self.record(state, code, before + time.time() - start)


def run_all(cells, workers, stop):
    """Run the cells, `workers` at a time, under a bar with the time that is left."""
    waiting = [cell for cell in cells if not cell.done()]
    bar = tqdm(total=len(cells), initial=len(cells) - len(waiting), unit="run", smoothing=0)

    def work(cell):
        bar.set_postfix_str(cell.folder.name[:40], refresh=True)
        try:
            cell.run(stop)
        except OSError as error:  # such as a full disk; the other cells go on
            bar.write(f"error: {cell.folder}: {error}", file=sys.stderr)
        bar.update(cell.done())

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(work, waiting))
    bar.close()


def submit(cells, args):
    """Submit the cells that are not done as one job array; a task runs one cell of this grid."""
    numbers = [str(i) for i, cell in enumerate(cells) if not cell.done()]
    if not numbers:
        return print("all cells are done")
    folder = args.folder / args.suite
    folder.mkdir(parents=True, exist_ok=True)
    again = [sys.executable, str(Path(__file__).resolve()), args.suite]
    again += ["--folder", str(args.folder), "--seeds", *map(str, args.seeds)]
    again += ["--workers", "1", "--commands", *args.commands]
    script = folder / "job.sh"
    script.write_text(f"#!/bin/bash\nexec {shlex.join(again)} --only $SLURM_ARRAY_TASK_ID\n")
    # two minutes before the limit a task gets SIGUSR1, writes a checkpoint and queues itself again
    options = ["--requeue", "--open-mode=append", "--signal=B:USR1@120", "--ntasks=1"]
    options += ["--cpus-per-task=1", f"--job-name={args.suite}"]
    options += [f"--output={folder}/slurm-%A_%a.txt"]
    try:
        options += shlex.split(args.slurm_args)
    except ValueError as error:
        fail(f"cannot read --slurm-args: {error}")
    sbatch = ["sbatch", f"--array={','.join(numbers)}", *options, str(script)]
    if subprocess.run(sbatch).returncode:
        fail("sbatch has refused the job")


def main(args: Args):
    args.folder = args.folder.resolve()  # the trainings run in other folders
    args.commands = tuple(f"{command} {args.flags}".strip() for command in args.commands)
    commands = [command for line in args.commands for command in expand(line)]
    grid = [f"{command} --seed {seed}" for command in commands for seed in args.seeds]
    cells = [Cell(command, args.folder / args.suite) for command in grid]
    if len({cell.folder for cell in cells}) < len(cells):
        fail("a command stands twice in the grid")
    for cell in cells:
        if not cell.script.exists():
            fail(f"{cell.script} does not exist")
    if not cells:
        fail("--seeds and --commands must not be empty")
    if args.workers < 1:
        fail("--workers must be at least 1")
    if args.only is not None and not 0 <= args.only < len(cells):
        fail(f"--only must lie between 0 and {len(cells) - 1}")
    if args.slurm and not shutil.which("sbatch"):
        fail("--slurm needs sbatch, which is not here")
    if args.slurm:
        return submit(cells, args)
    stop = []
    nohup = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()
    for number in {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1} - nohup:
        signal.signal(number, lambda number, _: stop.append(number))
    cells = cells if args.only is None else [cells[args.only]]
    run_all(cells, args.workers, stop)
    if stop and stop[0] == signal.SIGUSR1 and "SLURM_ARRAY_JOB_ID" in os.environ:
        # not SLURM_JOB_ID: for one task of an array that is the number of the whole array
        task = "{SLURM_ARRAY_JOB_ID}_{SLURM_ARRAY_TASK_ID}".format(**os.environ)
        return subprocess.run(["scontrol", "requeue", task], check=True)
    counts = Counter(cell.status().get("state", "not begun") for cell in cells)
    for cell in cells:
        if cell.status().get("state") == "failed":
            log = (cell.folder / "log.txt").read_text(errors="replace").splitlines()[-15:]
            words = f"failed with exit code {cell.status()['code']}: {cell.command}"
            print("\n" + "\n".join([words, *log]), file=sys.stderr)
    words = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
    print(f"{args.suite}: {words}; folders in {args.folder / args.suite}", file=sys.stderr)
    sys.exit(128 + stop[0] if stop else int(counts["done"] < len(cells)))


if __name__ == "__main__":
    words = sys.argv[1:]
    for name in {"--flags", "--slurm-args"} & set(words[:-1]):  # their values begin with a dash
        i = words.index(name)
        words[i : i + 2] = ["=".join(words[i : i + 2])]
    main(tyro.cli(Args, args=words))
