"""Runs a grid of commands: on the workers of this machine, or as a Slurm job array. ./benchmark.sh calls it.

    python tools/benchmark.py quick --seeds 1 2 3 --commands "sac_continuous.py --env-id Pendulum-v1" "dime.py"
    python tools/benchmark.py quick ... --slurm --slurm-args "--time=02:00:00 --partition=cpu"

The cells of the grid are all commands with all seeds; {a,b,c} in a command stands for one command with each. Every
cell has the folder runs/benchmark/<suite>/<cell>: its log, its run folder, and status.json, together the ledger. A
cell that is done is never run again, one that was cut off or failed goes on from its checkpoint, if it has one and was
not refused (exit code 2), else it starts again. A lock on the folder, held by the training itself too, keeps two calls
from running one cell. The exit code is 0 when all cells are done, 1 after failures (with the end of their logs), 130
after Ctrl-C: the trainings then have written a checkpoint.
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
    """Cores that this process may use; numbers none where the system does not tell (macOS)."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return [None] * (os.cpu_count() or 1)


@dataclass
class Args:
    suite: tyro.conf.Positional[str]
    "name of the grid and of its folder"
    commands: tuple[str, ...]
    "scripts with their flags, without the seed; {a,b} makes one command for each"
    seeds: tuple[int, ...] = (1, 2, 3)
    "every command runs with each of these seeds"
    workers: int = field(default_factory=lambda: len(cores()))
    "trainings at the same time, each pinned to a core"
    folder: Path = ROOT / "runs" / "benchmark"
    "where the folders of the suites are"
    slurm: bool = False
    "submit the cells that are not done as a job array instead of running them"
    slurm_args: str = ""
    "options for sbatch, such as --time and --partition"
    only: int | None = None
    "run only the cell of this number (a task of the job array does)"


def expand(command):
    """All commands that {a,b} in one stands for, in order."""
    parts = re.split(r"\{([^{}]*)\}", command)
    options = [part.split(",") if i % 2 else [part] for i, part in enumerate(parts)]
    return ["".join(choice) for choice in itertools.product(*options)]


class Cell:
    """One training: its command, its folder and what the folder says about it."""

    def __init__(self, command, folder):
        self.command = command
        try:
            words = shlex.split(command)
        except ValueError as error:
            fail(f"cannot read the command {command}: {error}")
        name = "_".join(word.removeprefix("--") for word in words).replace(".py", "")
        name = re.sub(r"[^\w.-]+", "-", name)
        if len(name.encode()) > 255:  # more than file systems allow; the digest is of the whole
            name = f"{name[:120]}_{hashlib.sha256(name.encode()).hexdigest()[:8]}_{name[-70:]}"
        self.folder = folder / name
        self.script, self.flags = ROOT / words[0], words[1:]

    def status(self):
        """The last recorded state: {} before the first start, else with the keys state, code, seconds."""
        try:
            return json.loads((self.folder / "status.json").read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return {}

    def record(self, **status):
        """Replace status.json in one step."""
        temporary = self.folder / "status.tmp"
        temporary.write_text(json.dumps({"command": self.command} | status, indent=1) + "\n")
        os.replace(temporary, self.folder / "status.json")

    def checkpoint(self):
        """The newest checkpoint, or None."""
        found = sorted(
            self.folder.glob("runs/*/checkpoint.pt"), key=lambda path: path.stat().st_mtime
        )
        return found[-1] if found else None

    def log_tail(self, lines=15):
        """The end of the log."""
        log = self.folder / "log.txt"
        return (
            "\n".join(log.read_text(errors="replace").splitlines()[-lines:]) if log.exists() else ""
        )

    def run(self, stop, core=None):
        """Run or go on, unless done; `stop` is a list of signal numbers that is not empty when we are to end."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "lock", "w") as lock:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:  # another call, or a training that outlived its own
                    if stop:
                        return
                    time.sleep(0.5)
            status = self.status()
            if stop or status.get("state") == "done":
                return
            checkpoint, flags = self.checkpoint(), self.flags
            if checkpoint and status.get("code") != 2:  # 2: refused, the checkpoint perhaps
                flags = ["--resume", str(checkpoint)]
            else:
                subprocess.run(["rm", "-rf", self.folder / "runs"], check=True)
            command = [sys.executable, str(self.script), *flags]
            before, start = status.get("seconds", 0.0), time.time()
            self.record(state="running", code=None, seconds=before)
            with open(self.folder / "log.txt", "a") as log:
                print(f"$ {shlex.join(command)}", file=log, flush=True)
                process = subprocess.Popen(
                    command,
                    cwd=self.folder,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    env=os.environ | {"OMP_NUM_THREADS": "1"},
                    pass_fds=(lock.fileno(),),  # the lock lasts as long as the training
                    start_new_session=True,  # Ctrl-C reaches it through us, once
                    preexec_fn=(lambda: os.sched_setaffinity(0, {core}))
                    if core is not None
                    else None,
                )
                told = False
                while process.poll() is None:
                    if stop and not told:
                        process.terminate()  # it writes a checkpoint and leaves
                        told = True
                    time.sleep(0.1)
            seconds = before + time.time() - start
            if process.returncode == 0:
                self.record(state="done", code=0, seconds=seconds)
            elif stop:
                self.record(state="cut off", code=process.returncode, seconds=seconds)
            else:
                self.record(state="failed", code=process.returncode, seconds=seconds)


def run_all(cells, workers, stop):
    """Run the cells on `workers` threads, each with a core of its own, under a bar with the time that is left."""
    slots = cores()
    free = list(range(workers))
    waiting = [cell for cell in cells if cell.status().get("state") != "done"]
    bar = tqdm(total=len(cells), initial=len(cells) - len(waiting), unit="run", smoothing=0)

    def work(cell):
        slot = free.pop()
        bar.set_postfix_str(cell.folder.name, refresh=True)
        try:
            cell.run(stop, slots[slot % len(slots)])
        finally:
            free.append(slot)
        if cell.status().get("state") == "done":
            bar.update()

    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(work, cell) for cell in waiting]
        for future in futures:
            future.result()
    bar.close()


def submit(cells, args):
    """Submit the cells that are not done as one job array; every task runs one cell of this same grid."""
    numbers = [str(i) for i, cell in enumerate(cells) if cell.status().get("state") != "done"]
    if not numbers:
        print("all cells are done")
        return
    folder = args.folder / args.suite
    folder.mkdir(parents=True, exist_ok=True)
    again = [
        sys.executable,
        str(Path(__file__).resolve()),
        args.suite,
        "--folder",
        str(args.folder.resolve()),
    ]
    again += ["--seeds", *map(str, args.seeds), "--workers", "1", "--commands", *args.commands]
    script = folder / "job.sh"
    script.write_text(f"#!/bin/bash\nexec {shlex.join(again)} --only $SLURM_ARRAY_TASK_ID\n")
    # two minutes before the time limit the task gets SIGUSR1, writes a checkpoint and queues itself again
    options = [
        "--requeue",
        "--open-mode=append",
        "--signal=B:USR1@120",
        "--ntasks=1",
        "--cpus-per-task=1",
    ]
    options += [
        f"--job-name={args.suite}",
        f"--output={folder}/slurm-%A_%a.txt",
        *shlex.split(args.slurm_args),
    ]
    subprocess.run(["sbatch", f"--array={','.join(numbers)}", *options, str(script)], check=True)


def main(args: Args):
    args.folder = args.folder.resolve()  # the trainings run in other folders
    commands = [command for line in args.commands for command in expand(line)]
    cells = [
        Cell(f"{command} --seed {seed}", args.folder / args.suite)
        for command in commands
        for seed in args.seeds
    ]
    if len({cell.folder for cell in cells}) < len(cells):
        fail("a command stands twice in the grid")
    for cell in cells:
        if not cell.script.exists():
            fail(f"{cell.script} does not exist")
    if args.workers < 1:
        fail("--workers must be at least 1")
    if args.only is not None and not 0 <= args.only < len(cells):
        fail(f"--only must lie between 0 and {len(cells) - 1}")
    if args.slurm and not shutil.which("sbatch"):
        fail("--slurm needs sbatch, which is not here")
    if args.slurm:
        return submit(cells, args)
    stop = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, _: stop.append(number))
    if args.only is not None:
        cells = [cells[args.only]]
    run_all(cells, args.workers, stop)
    if stop and stop[0] == signal.SIGUSR1 and "SLURM_JOB_ID" in os.environ:
        return subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], check=True)
    states = {cell: cell.status().get("state", "not begun") for cell in cells}
    for cell, state in states.items():
        if state == "failed":
            print(
                f"\nfailed with exit code {cell.status()['code']}: {cell.command}\n{cell.log_tail()}",
                file=sys.stderr,
            )
    counts = ", ".join(
        f"{sum(s == state for s in states.values())} {state}"
        for state in sorted(set(states.values()))
    )
    print(f"{args.suite}: {counts}; folders in {args.folder / args.suite}", file=sys.stderr)
    if stop:
        sys.exit(128 + stop[0])
    sys.exit(int("failed" in states.values()))


if __name__ == "__main__":
    words = sys.argv[1:]
    if "--slurm-args" in words[:-1]:  # its value begins with a dash, as flags do
        i = words.index("--slurm-args")
        words[i : i + 2] = ["=".join(words[i : i + 2])]
    main(tyro.cli(Args, args=words))
