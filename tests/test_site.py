"""The documentation's site: what is made from the scripts, links, and how a browser shows it."""

import dataclasses
import difflib
import functools
import html
import http.server
import importlib.util
import re
import shutil
import threading
import time
from html.parser import HTMLParser
from urllib.parse import urldefrag, urljoin, urlparse

import pytest

from tests.common import ROOT
from tools import pages
from tools.pairs import PAIRS, short, title

each_pair = pytest.mark.parametrize("pair", PAIRS, ids=title)
ALGORITHMS = [path for path in (ROOT / "docs").glob("*.md") if pages.script_of(path)]


def test_flags_have_their_defaults(script):
    header, _, *rows = [row for row in pages.flags_page().splitlines() if row.startswith("|")]
    column = header.split("|").index(f" {short(script.__name__)} ")
    shown = {row.split("|")[1].strip(): row.split("|")[column].strip() for row in rows}
    for field in dataclasses.fields(script.Args):
        value = shown.pop(f"`--{field.name.replace('_', '-')}`")
        if field.name != "exp_name":
            words = {True: "on", False: "off"}
            expected = words[field.default] if isinstance(field.default, bool) else field.default
            assert value.replace("_", "") == str(expected) or float(value) == expected
    assert set(shown.values()) <= {""}


@each_pair
def test_side_by_side_pages_show_all_lines(pair):
    """Every line of both files is there; what changed is not folded; equations are links."""
    page = pages.side_by_side(pair)
    open_ = re.sub(r"<details>.*?</details>", "", page, flags=re.S)
    plain, open_ = (html.unescape(re.sub("<[^>]*>", "", text)) for text in (page, open_))
    old, new = ((ROOT / file).read_text().splitlines() for file in pair[:2])
    for line in [*old, *new]:
        assert line in plain, line
    for line in difflib.ndiff(old, new):
        if line[0] in "+-":
            assert line[2:] in open_, line
    assert re.search(r'DIFF: <a href="../../\w+/#eq-W?\d+">\(W?\d+\)</a>', page)
    for line in re.findall(r'<code class="old">((?:(?!</code>).)*)</code>', page):
        assert f'"../../{short(pair.second)}/' not in line  # its numbers are of the first file
    assert len(re.findall("[0-9]+ frame: the same text", page)) == 1


@pytest.mark.parametrize("path", ALGORITHMS, ids=lambda path: path.stem)
def test_code_beside_an_equation_follows_the_script(path, monkeypatch, tmp_path):
    """A line that is changed in a function changes on the page."""
    text, script = path.read_text(), pages.script_of(path)
    page = pages.with_code(path, text)
    blocks = re.findall(r"``` \{\.python title=.*?\}\n(.*?)\n```", page, re.S)
    assert blocks and "| equation |" not in page
    source = (ROOT / script).read_text()
    for block in blocks:
        line = block.splitlines()[-1].strip()
        assert source.count(line) >= 1
        (tmp_path / script).write_text(source.replace(line, f"{line}  # changed"))
        monkeypatch.setattr(pages, "ROOT", tmp_path)
        assert pages.with_code(path, text).count("# changed") >= 1
        monkeypatch.setattr(pages, "ROOT", ROOT)


def test_an_equation_without_code_is_refused(capsys):
    for where in ("`nowhere`", "`critic_loss`, `nowhere`", "in `nowhere`", "the same: `nowhere`"):
        with pytest.raises(SystemExit, match="named nowhere"):
            pages.with_code(ROOT / "docs" / "sac.md", pages.HEAD + f"| (1) | $x$ | {where} |\n")
    with pytest.raises(SystemExit, match="no page of sac"):
        pages.equation_link("99", "sac")


def test_github_leaves_the_equations_alone():
    """Its Markdown eats backslashes before punctuation, and emphasises from }_ to the next _{."""
    count = 0
    for path in ALGORITHMS:
        for formula in re.findall(r"\$\$?([^$\n]+)\$", path.read_text()):
            assert not re.search(r"\\[^A-Za-z]|\*", formula), (path.name, formula)
            assert not re.search(r"[^\W_]?\W_.*[^\W_]_\W", formula), (path.name, formula)
            count += 1
    assert count > 60


class Links(HTMLParser):
    """Addresses and ids of a page; `others`: what it would load from elsewhere."""

    def __init__(self, text):
        super().__init__()
        self.targets, self.ids, self.loads = [], set(), []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.ids |= {attributes.get("id"), attributes.get("name")}
        if tag == "a" and attributes.get("href"):
            self.targets.append(attributes["href"])
        if tag in ("img", "script") and attributes.get("src"):
            self.loads.append(attributes["src"])
        if tag == "link" and attributes.get("rel") in ("stylesheet", "icon"):
            self.loads.append(attributes["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site."""
    if not importlib.util.find_spec("zensical") or not shutil.which("npm"):
        pytest.skip("needs zensical and npm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pages, "BUILD", tmp_path_factory.mktemp("build"))
        with pytest.raises(SystemExit) as exit_:
            pages.main()
        assert exit_.value.code == 0
        yield pages.BUILD / "site"


def test_no_dead_link_and_nothing_from_another_host(site):
    found = {path: Links(path.read_text()) for path in site.rglob("*.html") if path.stem != "404"}
    assert len(found) > 25
    for path, links in found.items():
        base = f"http://site/{path.relative_to(site)}"
        for target in links.targets + links.loads:
            address, fragment = urldefrag(urljoin(base, target))
            if urlparse(address).netloc != "site":
                assert target not in links.loads, f"{path} loads {target}"
                continue
            place = site / urlparse(address).path.lstrip("/")
            place = place / "index.html" if place.is_dir() else place
            assert place.exists(), f"{path} -> {target}"
            assert not fragment or fragment in found[place].ids, f"{path} -> {target}"


@pytest.fixture(scope="module")
def browser(site):
    """A headless Chromium; the address of the site; what the pages have asked for."""
    driver = shutil.which("chromedriver")
    if not driver or not importlib.util.find_spec("selenium"):
        pytest.skip("needs chromedriver and selenium")
    from selenium import webdriver

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *words):
            pass

    handler = functools.partial(Quiet, directory=site)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    options = webdriver.ChromeOptions()
    flags = "headless no-sandbox disable-gpu disable-quic no-first-run disable-sync"
    flags += " disable-background-networking disable-component-update"
    for flag in flags.split():
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chromium = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield chromium, f"http://127.0.0.1:{server.server_port}/"
    chromium.quit()
    server.shutdown()


@pytest.mark.parametrize("width", [1400, 390])
def test_pages_in_a_browser(browser, site, width):
    """No error, no request to another host, no sideways scroll; equations are drawn."""
    chromium, base = browser
    chromium.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 1000},
    )
    drawn = 0
    for path in sorted(site.rglob("index.html")):
        chromium.get(f"{base}{path.parent.relative_to(site)}/")
        for _ in range(20):  # until the page's own scripts are done
            folds = chromium.find_elements("css selector", "details:not([open]) > summary")
            for fold in folds:
                chromium.execute_script("arguments[0].click()", fold)
            time.sleep(0.05 if folds else 0)
        state = chromium.execute_script(
            """return {
                width: document.documentElement.scrollWidth,
                drawn: document.querySelectorAll(".katex").length,
                marked: document.querySelectorAll(".arithmatex").length,
                broken: document.querySelectorAll(".katex-error").length,
                folded: document.querySelectorAll("details:not([open])").length,
                loads: performance.getEntriesByType("resource").map(load => load.name)}"""
        )
        assert state["width"] <= width, path
        assert state["drawn"] == state["marked"] and state["broken"] == state["folded"] == 0, (
            path,
            state,
        )
        assert all(load.startswith(base) for load in state["loads"]), path
        severe = [log for log in chromium.get_log("browser") if log["level"] == "SEVERE"]
        assert not severe, (path, severe)
        drawn += state["drawn"]
    assert drawn > 50


def test_links_of_changed_lines_lead_to_their_equations(browser):
    chromium, base = browser
    for pair in PAIRS:
        name = "-".join(file.removesuffix(".py") for file in pair[:2])
        chromium.get(f"{base}diffs/{name}/")
        links = chromium.find_elements("css selector", ".side-by-side a")
        addresses = {link.get_attribute("href") for link in links}
        assert addresses
        for address in addresses:
            chromium.get(address)
            equation = chromium.find_element("id", urldefrag(address)[1])
            assert equation.find_element("xpath", "ancestor::*[@class='equation']").is_displayed()
