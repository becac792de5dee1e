"""The pairs of scripts that are read side by side: one list for the tests, README and the site.

    python tools/pairs.py      print README's table

As a hook of mkdocs it makes the side-by-side pages when the site is built.
"""

import difflib
import re
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
    Pair("sac_continuous.py", "diffsac_continuous.py", 30, 165, 40, DIFFUSION),
    Pair("ppo_continuous.py", "diffppo_continuous.py", 45, 140, 15, DIFFUSION),
    Pair("wpo_continuous.py", "diffwpo_continuous.py", 60, 195, 40, DIFFUSION),
    Pair("crossq_continuous.py", "dime.py", 35, 130, 15, DIFFUSION),
    Pair("sac_continuous.py", "crossq_continuous.py", 70, 185, 60, CRITICS),
    Pair("sac_continuous.py", "wpo_continuous.py", 40, 90, 15, FLOW),
    Pair("diffsac_continuous.py", "diffwpo_continuous.py", 40, 90, 20, FLOW),
]


def changed(pair):
    """Lines that `git diff --no-index` removes and adds."""
    files = [str(ROOT / file) for file in pair[:2]]
    words = ["git", "diff", "--no-index", "--numstat", *files]
    added, removed = subprocess.run(words, capture_output=True, text=True).stdout.split()[:2]
    return int(removed), int(added)


def title(pair):
    return " → ".join(file.removesuffix(".py").removesuffix("_continuous") for file in pair[:2])


def readme_table():
    """The pairs as a Markdown table, with links and the lines that differ."""
    rows = ["| from | to | lines removed / added | |", "|---|---|---|---|"]
    for pair in PAIRS:
        links = " | ".join(f"[`{file}`]({file})" for file in pair[:2])
        rows.append("| {} | −{} / +{} | {} |".format(links, *changed(pair), pair.what))
    return "\n".join(rows)


def page(pair):
    """Markdown with the changed stretches of two files side by side."""
    old, new = ((ROOT / file).read_text().splitlines() for file in pair[:2])
    rows = difflib.HtmlDiff().make_table(old, new, *pair[:2], context=True, numlines=4)
    own = pair.second.removesuffix(".py").removesuffix("_continuous")
    link = rf'(<a href="../../{own}/">\1</a>)'
    rows = re.sub(
        r"DIFF:.*?</td>", lambda line: re.sub(r"\((W?\d+)\)", link, line[0]), rows, flags=re.S
    )
    rows = re.sub(r'<td class="diff_next".*?</td>', "", rows, flags=re.S)  # links between hunks
    rows = re.sub(r'<th class="diff_next"><br /></th>', "", rows)
    counts = "−{} / +{} lines".format(*changed(pair))
    text = f"{pair.what[0].upper()}{pair.what[1:]}: {counts}. Equations: [{own}](../{own}.md)."
    return f"# {title(pair)}\n\n{text}\n\n<div class=side-by-side>\n{rows}\n</div>\n"


def flags_page():
    """All flags and their defaults, scripts side by side, from the lines of their `Args`."""
    scripts = [*dict.fromkeys(file for pair in PAIRS for file in pair[:2])]
    names = [file.removesuffix(".py").removesuffix("_continuous") for file in scripts]
    defaults, meaning = {}, {}
    for file, script in zip(scripts, names, strict=True):
        body = (ROOT / file).read_text().split("class Args:")[1].split("\n\n\n")[0]
        for flag, value, words in re.findall(r"^    (\w+): .*? = (.*?)  # (.*)$", body, re.M):
            value = {"True": "on", "False": "off"}.get(value, value.strip('"'))
            defaults.setdefault(flag, {})[script] = script if flag == "exp_name" else value
            meaning.setdefault(flag, words)
    rows = [f"| flag | {' | '.join(names)} | |", "|---" * (len(names) + 2) + "|"]
    for flag, values in defaults.items():
        cells = " | ".join(values.get(script, "") for script in names)
        rows.append(f"| `--{flag.replace('_', '-')}` | {cells} | {meaning[flag]} |")
    text = "Defaults of all scripts; empty where a script does not have the flag."
    return f"# All flags\n\n{text}\n\n" + "\n".join(rows) + "\n"


def on_files(files, config):
    from mkdocs.structure.files import File

    files.append(File.generated(config, "flags.md", content=flags_page()))
    for pair in PAIRS:
        name = f"diffs/{'-'.join(file.removesuffix('.py') for file in pair[:2])}.md"
        files.append(File.generated(config, name, content=page(pair)))
    return files


if __name__ == "__main__":
    print(readme_table())
