"""Build the documentation, with the code of every equation and the pairs side by side.

    pip install -r requirements-docs.txt
    python tools/pages.py                    the site is in build/site

It copies docs/ to build/docs, adds what is made from the scripts, so that it cannot drift from
them, and calls Zensical. KaTeX, which draws the equations, is taken from npm and shipped with the
site. A link that leads nowhere, or an equation whose code is not there, fails the build.
"""

import ast
import difflib
import itertools
import re
import shutil
import subprocess
import sys
from pathlib import Path

from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from tools.pairs import PAIRS, changed, short, title  # noqa: E402

BUILD = ROOT / "build"
KATEX = "katex@0.19.1"
# where an equation is looked up that a script takes over from another one
PARENTS = {"diffwpo": ["wpo", "diffsac"], "dime": ["crossq"], "diffppo": ["ppo"]}
PARENTS |= {"diffsac": ["sac"], "crossq": ["sac"], "wpo": ["sac"]}
HEAD = "| | equation | code |\n|---|---|---|\n"


def script_of(page):
    """The script of an algorithm's page, or None."""
    return next((f for pair in PAIRS for f in pair[:2] if short(f) == page.stem), None)


def code_of(text, name):
    """(first line, code) of a function, method or inner function, or None."""

    def find(node, names):
        for child in ast.walk(node):
            if child is not node and getattr(child, "name", None) == names[0]:
                return find(child, names[1:]) if names[1:] else child

    node = find(ast.parse(text), name.split("."))
    if node is None:
        return None
    first = min([node.lineno, *(line.lineno for line in node.decorator_list)])
    lines = text.splitlines()[first - 1 : node.end_lineno]
    indent = len(lines[0]) - len(lines[0].lstrip())
    return first, "\n".join(line[indent:] for line in lines)


def tables(text):
    """The tables of equations of a page."""
    return re.finditer(re.escape(HEAD) + r"(?:\|.*\n)+", text)


def cells_of(row):
    """Name, equation and place in the code of a table's row."""
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]]


def numbers(name):
    """The equations that a row is about: 6 and 7 of "(6) noise, (7) log-ratio; as in (2)"."""
    return re.findall(r"\((W?\d+)\)", re.split(r"[;:]| in ", name)[0])


def with_code(page, text):
    """A page's tables of equations, each row with the code that its last cell names beside it."""
    script = script_of(page)
    source = (ROOT / script).read_text() if script else ""

    def pair(row):
        name, equation, where = cells_of(row)
        functions, _, variables = where.partition(": ")
        codes = {word: code_of(source, word) for word in re.findall(r"`([\w.]+)`", functions)}
        missing = [word for word, code in codes.items() if not code]
        for word in re.findall(r"`(\w+)`", variables):
            missing += [] if re.search(rf"^ +{word} = ", source, re.M) else [word]
        if missing:
            sys.exit(f"error: {page.name}: nothing in {script} is named {', '.join(missing)}")
        if re.fullmatch(r"\$.*\$", equation):
            equation = f"${equation}$"
        anchors = "".join(f'<span id="eq-{n}"></span>' for n in numbers(name))
        left = f"{anchors}**{name}**\n\n{equation}\n\n{where}"
        right = []
        for word, (line, code) in codes.items():
            if word not in shown:
                shown.add(word)
                heading = f"{script}, line {line}"
                right.append(f'``` {{.python title="{heading}"}}\n{code}\n```')
        inner = f'<div markdown class="formula">\n\n{left}\n\n</div>\n'
        if right:
            code = "\n\n".join(right)
            inner += f'<div markdown class="code">\n\n{code}\n\n</div>\n'
        return f'<div markdown class="equation">\n{inner}</div>\n'

    shown = set()
    for table in list(tables(text)):
        rows = table[0].removeprefix(HEAD).splitlines()
        text = text.replace(table[0], "\n".join(map(pair, rows)))
    return text


def colour(text):
    """The lines of a Python file as HTML, with syntax classes."""
    return highlight(text, PythonLexer(stripnl=False), HtmlFormatter(nowrap=True)).splitlines()


def equation_link(label, script):
    """Link to an equation on the script's page, or on that of the file it is taken from."""
    pages = [script, *PARENTS.get(script, [])]
    for name in pages:
        found = tables((ROOT / "docs" / f"{name}.md").read_text())
        rows = [row for table in found for row in table[0].removeprefix(HEAD).splitlines()]
        if any(label in numbers(cells_of(row)[0]) for row in rows):
            return f'<a href="../../{name}/#eq-{label}">({label})</a>'
    sys.exit(f"error: no page of {', '.join(pages)} has an equation ({label})")


def side_by_side(pair):
    """Markdown page of two files: changed stretches in two columns, the others folded."""
    texts = [(ROOT / file).read_text() for file in pair[:2]]
    old, new = (text.splitlines() for text in texts)
    old_html, new_html = map(colour, texts)
    script = short(pair.second)

    def cell(lines, i, kind, script=script):
        if i is None:
            return '<span class="no"></span><code class="empty"></code>'
        line = lines[i]
        if "DIFF:" in line:
            before, marker, after = line.partition("DIFF:")
            for label in re.findall(r"\((W?\d+)\)", after):
                after = after.replace(f"({label})", equation_link(label, script))
            line = before + marker + after
        return f'<span class="no {kind}">{i + 1}</span><code class="{kind}">{line or " "}</code>'

    def rows(kind, a, b):
        a, b = list(a), list(b)
        if kind == "equal":
            return [
                cell(old_html, i, "equal") + cell(new_html, j, "equal")
                for i, j in zip(a, b, strict=True)
            ]
        size = max(len(a), len(b))
        a, b = (x + [None] * (size - len(x)) for x in (a, b))
        return [
            cell(old_html, i, "old", short(pair.first)) + cell(new_html, j, "new")
            for i, j in zip(a, b, strict=True)
        ]

    def block(rows):
        return "".join(f'<div class="row">{row}</div>' for row in rows)

    frame = next((i for i, line in enumerate(new) if line.startswith("# Frame:")), len(new)) - 1
    matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
    parts = []
    for kind, a1, a2, b1, b2 in matcher.get_opcodes():
        if kind != "equal":
            parts.append(block(rows(kind, range(a1, a2), range(b1, b2))))
            continue
        near = 3  # unchanged lines that stay open on each side of a change
        first, last = (0 if b1 == 0 else near), (0 if b2 == len(new) else near)
        if b2 - b1 <= 2 * near + 2:
            first, last = b2 - b1, 0
        cuts = sorted({b1, min(b1 + first, b2), max(b2 - last, b1 + first), b2, frame} - {-1})
        cuts = [cut for cut in cuts if b1 <= cut <= b2]
        for c1, c2 in itertools.pairwise(cuts):
            inner = block(rows("equal", range(a1 + c1 - b1, a1 + c2 - b1), range(c1, c2)))
            if c2 - c1 > 2 * near + 2:
                what = "frame: the same text in every script" if c1 == frame else "lines unchanged"
                inner = f"<details><summary>{c2 - c1} {what}</summary>{inner}</details>"
            parts.append(inner)
    counts = "−{} / +{} lines".format(*changed(pair))
    text = (
        f"{pair.what[0].upper()}{pair.what[1:]}: {counts}. Equations: [{script}](../{script}.md)."
    )
    body = '<div class="side-by-side highlight">\n' + "\n".join(parts) + "\n</div>"
    return f"---\nhide: [navigation, toc]\n---\n\n# {title(pair)}\n\n{text}\n\n{body}\n"


def flags_page():
    """All flags and their defaults, scripts side by side, from the lines of their `Args`."""
    scripts = [*dict.fromkeys(file for pair in PAIRS for file in pair[:2])]
    names, defaults, meaning = list(map(short, scripts)), {}, {}
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


def main():
    docs = BUILD / "docs"
    shutil.rmtree(docs, ignore_errors=True)
    shutil.copytree(ROOT / "docs", docs)
    for page in docs.glob("*.md"):
        page.write_text(with_code(page, page.read_text()))
    (docs / "flags.md").write_text(flags_page())
    (docs / "diffs").mkdir()
    for pair in PAIRS:
        name = "-".join(file.removesuffix(".py") for file in pair[:2])
        (docs / "diffs" / f"{name}.md").write_text(side_by_side(pair))
    npm = ["npm", "install", "--silent", "--no-save", "--prefix", str(BUILD), KATEX]
    katex = BUILD / "node_modules" / "katex" / "dist"
    if not katex.exists():
        subprocess.run(npm, check=True)
    (docs / "katex" / "fonts").mkdir(parents=True)
    for file in ("katex.min.css", "katex.min.js", "contrib/auto-render.min.js"):
        shutil.copy(katex / file, docs / "katex")
    for font in katex.glob("fonts/*.woff2"):
        shutil.copy(font, docs / "katex" / "fonts")
    shutil.copy(ROOT / "mkdocs.yml", BUILD)
    build = [Path(sys.executable).with_name("zensical"), "build", "--clean", "--strict"]
    sys.exit(subprocess.run(build, cwd=BUILD).returncode)


if __name__ == "__main__":
    main()
