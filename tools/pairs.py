"""The pairs of scripts that are read side by side: one list for the tests, README and the site.

python tools/pairs.py      print README's table
"""

import subprocess
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Pair(NamedTuple):
    """Two scripts; lines removed and added, at most; changed lines of `main`, at most."""

    first: str
    second: str
    removed: int
    added: int
    main: int
    what: str


DIFFUSION = "the Gaussian policy becomes a diffusion policy"
FLOW = "another step of the actor: the Wasserstein flow, and a bound on how far it goes"
CRITICS = "categorical critics with batch renormalisation, without target networks"
PAIRS = [
    Pair("sac_continuous.py", "diffsac_continuous.py", 30, 166, 40, DIFFUSION),
    Pair("ppo_continuous.py", "diffppo_continuous.py", 45, 140, 15, DIFFUSION),
    Pair("wpo_continuous.py", "diffwpo_continuous.py", 50, 160, 40, DIFFUSION),
    Pair("crossq_continuous.py", "dime.py", 35, 130, 15, DIFFUSION),
    Pair("sac_continuous.py", "crossq_continuous.py", 70, 174, 60, CRITICS),
    Pair("sac_continuous.py", "wpo_continuous.py", 40, 90, 15, FLOW),
    Pair("diffsac_continuous.py", "diffwpo_continuous.py", 40, 90, 20, FLOW),
]


def changed(pair):
    """Lines that `git diff --no-index` removes and adds."""
    files = [str(ROOT / file) for file in pair[:2]]
    words = ["git", "diff", "--no-index", "--numstat", *files]
    added, removed = subprocess.run(words, capture_output=True, text=True).stdout.split()[:2]
    return int(removed), int(added)


def short(file):
    """Name of a script's algorithm: sac of sac_continuous.py."""
    return file.removesuffix(".py").removesuffix("_continuous")


def title(pair):
    return " → ".join(map(short, pair[:2]))


def readme_table():
    """The pairs as a Markdown table, with links and the lines that differ."""
    rows = ["| from | to | lines removed / added | |", "|---|---|---|---|"]
    for pair in PAIRS:
        links = " | ".join(f"[`{file}`]({file})" for file in pair[:2])
        rows.append("| {} | −{} / +{} | {} |".format(links, *changed(pair), pair.what))
    return "\n".join(rows)


if __name__ == "__main__":
    print(readme_table())
