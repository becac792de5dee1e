"""Writes docs/diffs/: for each pair of scripts a unified diff in Markdown and a side-by-side page in HTML.

    python tools/diffs.py            write the pages
    python tools/diffs.py --check    exit with code 1 if a page is not what the scripts say

Changed lines come from `git diff --no-index` (as do the budgets of tests/test_pairs.py), changed words from difflib.
An equation named in a `# DIFF:` comment links to the page of its algorithm.
"""

import difflib
import html
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
DIFFUSION = "the Gaussian policy becomes a diffusion policy"
WASSERSTEIN = "another step of the actor: the Wasserstein flow, and a bound on how far it goes"
EDGES = (
    ("sac_continuous.py", "diffsac_continuous.py", DIFFUSION),
    ("wpo_continuous.py", "diffwpo_continuous.py", DIFFUSION),
    ("ppo_continuous.py", "diffppo_continuous.py", DIFFUSION),
    ("sac_continuous.py", "wpo_continuous.py", WASSERSTEIN),
    ("diffsac_continuous.py", "diffwpo_continuous.py", WASSERSTEIN),
)
CONTEXT = 3
STYLE = """
:root { color-scheme: light dark; --bg: #fff; --fg: #1f2328; --dim: #6e7781; --line: #d0d7de; --del: #ffebe9;
  --delw: #ffb3ad; --ins: #e6ffec; --insw: #8ce99a; --head: #f6f8fa; --link: #0969da; }
@media (prefers-color-scheme: dark) { :root { --bg: #0d1117; --fg: #e6edf3; --dim: #8b949e; --line: #30363d;
  --del: #3c1618; --delw: #8c2f2b; --ins: #12301c; --insw: #1f6f3a; --head: #161b22; --link: #58a6ff; } }
body { margin: 0; background: var(--bg); color: var(--fg); font: 14px/1.5 system-ui, sans-serif; }
header { padding: 1em 1.5em .5em; }
h1 { font-size: 1.25em; margin: 0 0 .3em; } p { margin: .2em 0; } a { color: var(--link); }
table { border-collapse: collapse; width: 100%; table-layout: fixed;
  font: 12px/1.45 ui-monospace, Menlo, Consolas, monospace; }
col.no { width: 3.4em; } th { position: sticky; top: 0; background: var(--head); text-align: left; padding: .4em .6em;
  border-bottom: 1px solid var(--line); }
td { vertical-align: top; padding: 0 .5em; white-space: pre-wrap; overflow-wrap: anywhere; }
td.no { color: var(--dim); text-align: right; user-select: none; border-right: 1px solid var(--line); }
td.del { background: var(--del); } td.ins { background: var(--ins); } td.none { background: var(--head); }
del { background: var(--delw); text-decoration: none; } ins { background: var(--insw); text-decoration: none; }
"""


@dataclass
class Args:
    to: Path = ROOT / "docs" / "diffs"
    "folder for the pages"
    check: bool = False
    "compare instead of writing"


def changes(old, new):
    """Blocks ((first, end) of the old lines, (first, end) of the new ones) that `git diff` finds changed, from 0 on."""
    command = [
        "git",
        "diff",
        "--no-index",
        "--no-color",
        "-U0",
        "--diff-algorithm=myers",
        str(old),
        str(new),
    ]
    out = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    blocks = []
    for match in re.finditer(r"^@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@", out, re.MULTILINE):
        a, n, b, m = (int(group) if group else 1 for group in match.groups())
        a, b = (
            a - (n > 0),
            b - (m > 0),
        )  # git counts from 1; an empty range names the line before it
        blocks.append(((a, a + n), (b, b + m)))
    return blocks


def align(old, new):
    """Pair the lines of a changed block: (old index or None, new index or None), similar lines beside each other."""
    n, m = len(old), len(new)
    likeness = [
        [difflib.SequenceMatcher(None, a, b, autojunk=False).ratio() for b in new] for a in old
    ]
    best = [[0.0] * (m + 1) for _ in range(n + 1)]
    for i in range(n - 1, -1, -1):
        for j in range(m - 1, -1, -1):
            pair = best[i + 1][j + 1] + likeness[i][j] if likeness[i][j] > 0.5 else 0.0
            best[i][j] = max(best[i + 1][j], best[i][j + 1], pair)
    rows, i, j = [], 0, 0
    while i < n or j < m:
        if (
            i < n
            and j < m
            and likeness[i][j] > 0.5
            and best[i][j] == best[i + 1][j + 1] + likeness[i][j]
        ):
            rows.append((i, j))
            i, j = i + 1, j + 1
        elif i < n and (j == m or best[i][j] == best[i + 1][j]):
            rows.append((i, None))
            i += 1
        else:
            rows.append((None, j))
            j += 1
    return rows


def words(old, new):
    """Both lines as HTML, the words that differ marked."""
    tokens = [re.findall(r"\w+|\s+|[^\w\s]", line) for line in (old, new)]
    parts = ["", ""]
    for tag, a, b, c, d in difflib.SequenceMatcher(None, *tokens, autojunk=False).get_opcodes():
        for side, text in enumerate(("".join(tokens[0][a:b]), "".join(tokens[1][c:d]))):
            mark = ("del", "ins")[side]
            text = html.escape(text, quote=False)
            parts[side] += f"<{mark}>{text}</{mark}>" if tag != "equal" and text else text
    return parts


def page_of(script):
    """Name of the documentation page of a script."""
    return script.removesuffix(".py").removesuffix("_continuous") + ".md"


def link_equations(line, script):
    """Turn the equation numbers in a `# DIFF:` comment into links to the algorithm's page."""
    head, mark, tail = line.partition("# DIFF:")
    address = f"../{page_of(script)}#key-equations-and-where-they-are"
    return head + mark + re.sub(r"\((W?\d)\)", rf'<a href="{address}">(\1)</a>', tail)


def side_by_side(first, second):
    """Rows (old line number, its HTML, kind, new line number, its HTML, kind) of two whole files."""
    old, new = ((ROOT / name).read_text().splitlines() for name in (first, second))
    rows, i, j = [], 0, 0
    for (a, b), (c, d) in [
        *changes(ROOT / first, ROOT / second),
        ((len(old), len(old)), (len(new), len(new))),
    ]:
        for x, y in zip(range(i, a), range(j, c), strict=True):
            text = html.escape(old[x], quote=False)
            rows.append((x + 1, text, "", y + 1, text, ""))
        for x, y in align(old[a:b], new[c:d]):
            left, right = (
                html.escape(lines[k], quote=False) if k is not None else ""
                for lines, k in ((old[a:b], x), (new[c:d], y))
            )
            if x is not None and y is not None:
                left, right = words(old[a + x], new[c + y])
            numbers = (None if x is None else a + x + 1), (None if y is None else c + y + 1)
            rows.append(
                (
                    numbers[0],
                    left,
                    "none" if x is None else "del",
                    numbers[1],
                    right,
                    "none" if y is None else "ins",
                )
            )
        i, j = b, d
    return rows


def html_page(first, second, what):
    """The side-by-side page."""
    rows = side_by_side(first, second)
    removed, added = (sum(row[k] == kind for row in rows) for k, kind in ((2, "del"), (5, "ins")))
    body, hunks, inside = [], [], False
    for left_no, left, left_kind, right_no, right, right_kind in rows:
        changed = bool(left_kind or right_kind)
        anchor = ""
        if changed and not inside:
            hunks.append(right_no or left_no)
            anchor = f' id="c{len(hunks)}"'
        inside = changed
        right = link_equations(right, second)
        body.append(
            f'<tr{anchor}><td class="no">{left_no or ""}</td><td class="{left_kind}">{left}</td>'
            f'<td class="no">{right_no or ""}</td><td class="{right_kind}">{right}</td></tr>'
        )
    links = " ".join(f'<a href="#c{i}">{line}</a>' for i, line in enumerate(hunks, start=1))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{first} → {second}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body>\n'
        f"<header><h1>{first} → {second}</h1><p>{what[0].upper() + what[1:]}: −{removed} / +{added} lines. "
        f'Equations: <a href="../{page_of(second)}">{page_of(second)}</a>.</p><p>Changes at line {links}</p></header>\n'
        f'<table><colgroup><col class="no"><col><col class="no"><col></colgroup>\n'
        f'<thead><tr><th colspan="2">{first}</th><th colspan="2">{second}</th></tr></thead>\n<tbody>\n'
        + "\n".join(body)
        + "\n</tbody></table></body></html>\n"
    )


def markdown_page(first, second, what):
    """The unified diff with a few lines of context, the changed words marked."""
    rows = side_by_side(first, second)
    removed, added = (sum(row[k] == kind for row in rows) for k, kind in ((2, "del"), (5, "ins")))
    changed = [i for i, row in enumerate(rows) if row[2] or row[5]]
    shown = sorted(
        {j for i in changed for j in range(max(i - CONTEXT, 0), min(i + CONTEXT + 1, len(rows)))}
    )
    stem = f"{first.removesuffix('.py')}-{second.removesuffix('.py')}"
    lines = [
        f"# {first} → {second}",
        "",
        f"{what[0].upper() + what[1:]}: −{removed} / +{added} lines. "
        f"[Side by side]({stem}.html), [equations](../{page_of(second)}).",
        "",
    ]
    for start in [i for i in shown if i - 1 not in shown]:
        end = next(i for i in range(start, len(rows) + 1) if i not in shown)
        hunk, pending = [], []
        for _, left, left_kind, _, right, right_kind in rows[start:end]:
            if not (left_kind or right_kind):
                hunk += [f"+ {text}" for text in pending] + [f"  {left}"]
                pending = []
                continue
            if left_kind == "del":
                hunk.append(f"- {left}")
            if right_kind == "ins":
                pending.append(link_equations(right, second))
        hunk += [f"+ {text}" for text in pending]
        first_line = next(row[3] for row in rows[start:] if row[3])
        lines += [f"At line {first_line}:", "", "<pre>", *hunk, "</pre>", ""]
    return "\n".join(lines)


def pages():
    """{file name: text} of all pages."""
    made = {}
    for first, second, what in EDGES:
        stem = f"{first.removesuffix('.py')}-{second.removesuffix('.py')}"
        made[f"{stem}.html"] = html_page(first, second, what)
        made[f"{stem}.md"] = markdown_page(first, second, what)
    return made


def main(args: Args):
    stale = []
    for name, text in pages().items():
        path = args.to / name
        if args.check:
            stale += [name] if not path.exists() or path.read_text() != text else []
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    if stale:
        sys.exit(
            f"error: run tools/diffs.py: {', '.join(stale)} do not show the scripts as they are"
        )


if __name__ == "__main__":
    main(tyro.cli(Args))
