"""README and pages: commands can be pasted into any shell, and the programs accept their flags."""

import ast
import re
import shlex
import tomllib

import pytest
import tyro

from tests.common import ROOT, SCRIPTS

PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("results/*.md")]
BLOCKS = [
    (path.name, block)
    for path in PAGES
    for block in re.findall(r"```bash\n(.*?)```", path.read_text(), re.S)
]
COMMANDS = [
    (name, line)
    for name, block in BLOCKS
    for line in block.replace("\\\n", " ").splitlines()
    if re.match(r"(\w+=\w+ )?python ", line)
]


def test_blocks_hold_no_comments_and_no_placeholders_that_a_shell_would_read():
    assert len(BLOCKS) > 20 and len(COMMANDS) > 20
    assert [(name, block) for name, block in BLOCKS if re.search("[#<>]", block)] == []


@pytest.mark.parametrize("name,line", COMMANDS)
def test_commands_are_accepted(name, line):
    words = shlex.split(line)
    words = words[words.index("python") + 1 :]
    if words[0] == "-m":
        return
    assert (ROOT / words[0]).exists() or words[0] == "SCRIPT", line
    scripts = {f"{script.__name__}.py": script for script in SCRIPTS}
    if words[0] in scripts and "--resume" not in words:
        tyro.cli(scripts[words[0]].Args, args=words[1:])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_commands_of_the_docstring_are_accepted(script):
    docstring = ast.get_docstring(ast.parse((ROOT / f"{script.__name__}.py").read_text()))
    lines = [line.split("#")[0] for line in docstring.splitlines() if "    python " in line]
    assert len(lines) >= 2
    for line in lines:
        _, file, *flags = shlex.split(line)
        assert file == f"{script.__name__}.py"
        if "--resume" not in flags:
            tyro.cli(script.Args, args=flags)


def test_all_scripts_are_installed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    modules = project["tool"]["setuptools"]["py-modules"]
    assert sorted(modules) == sorted(script.__name__ for script in SCRIPTS)


def test_pages_name_only_files_that_are_there():
    missing = set()
    for path in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text()):
            generated = "diffs/" in target or target == "flags.md"
            outside = path.parent.name == "docs" and target.startswith("..")  # not on the site
            if outside or not generated and not (path.parent / target).exists():
                missing.add((path.name, target))
        folders = "tests|tools|results|toys|docs"
        for target in re.findall(rf"`((?:{folders})/[\w./-]*)`", path.read_text()):
            there = (ROOT / target).exists() or (path.parent / target).exists()
            if not there and path.name != "CHANGELOG.md":  # which names what is gone
                missing.add((path.name, target))
    assert missing == set()


def test_the_actor_alone_works_in_other_code():
    """What docs/policy.md says to copy is enough for its example."""
    page = (ROOT / "docs" / "policy.md").read_text()
    names = re.search(r"Copy four definitions of .*?: (.*?)\. Then", page)[1]
    example = next(code for code in re.findall(r"```python\n(.*?)```", page, re.S) if "qf" in code)
    copied = ""
    for node in ast.parse(source := (ROOT / "diffsac_continuous.py").read_text()).body:
        name = getattr(node, "name", None) or ast.unparse(getattr(node, "targets", [node])[0])
        if f"`{name.strip('()')}`" in names:
            copied += ast.get_source_segment(source, node) + "\n"
    space = {}
    exec(example.replace("# the four definitions\n", copied), space)
    space["loss"].backward()
    assert space["actor"].fc_control.weight.grad.abs().sum() > 0
