"""How much code a reader meets: the files of a library in which a function runs while it trains, and their lines.

    pip install stable-baselines3 sbx-rl && python tools/lines.py

Prints Markdown. 400 steps of Pendulum-v1 each, default flags but for a short start; third-party packages do not count.
"""

import contextlib
import importlib
import io
import os
import runpy
import sys
import tempfile
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def count(train, is_own):
    """Call `train` and return (files, lines) over the files for which `is_own` holds and in which a function ran."""
    seen = set()
    sys.setprofile(
        lambda frame, event, arg: seen.add(frame.f_code.co_filename) if event == "call" else None
    )
    try:
        train()
    finally:
        sys.setprofile(None)
    files = [file for file in seen if os.path.exists(file) and is_own(file)]
    return len(files), sum(len(Path(file).read_text().splitlines()) for file in files)


def train_script(name):
    """Train 400 steps with a script of this repository."""
    flags = ["--learning-starts", "100"] if name.startswith("sac") else ["--num-steps", "25"]
    words = [
        f"{ROOT / name}",
        "--env-id",
        "Pendulum-v1",
        "--total-timesteps",
        "400",
        "--no-progress",
        *flags,
    ]
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


def train_library(package, name):
    """Train 400 steps with stable-baselines3 or sbx."""
    flags = {"learning_starts": 100} if name == "SAC" else {"n_steps": 128}
    getattr(sys.modules[package], name)("MlpPolicy", "Pendulum-v1", **flags).learn(400)


def main():
    warnings.filterwarnings("ignore")
    print("| | files | lines |\n|---|---|---|")
    for name in ("sac_continuous.py", "ppo_continuous.py"):
        with contextlib.redirect_stdout(io.StringIO()):
            files, lines = count(
                lambda name=name: train_script(name), lambda file: Path(file).parent == ROOT
            )
        print(f"| {name} | {files} | {lines:,} |")
    for package in ("stable_baselines3", "sbx"):
        importlib.import_module(package)  # what only runs at the import does not count
        for name in ("SAC", "PPO"):
            files, lines = count(
                lambda package=package, name=name: train_library(package, name),
                lambda file: any(
                    f"site-packages/{own}/" in file for own in ("stable_baselines3", "sbx")
                ),
            )
            print(f"| {package}, {name} | {files} | {lines:,} |")


if __name__ == "__main__":
    main()
