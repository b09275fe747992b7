"""The page of `generate --html`: well formed, whole in itself, deaf to what texts would have it do, and readable in a browser."""

import base64
import hashlib
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, Browser, open_browser
from generations import generations, made, sequence, source, token
from hypothesis import given

pages = import_module("knnstore_cli.pages")

VOID = {"meta", "br", "link", "img", "input", "hr"}
EVIL = "\"><script>alert(1)</script><img src=x onerror='alert(2)'>&lt;b&#10;</title></style>-->\u202e\x00.txt"
ELEMENTS = """html head body meta title style script header main aside footer section article div p span a h1 h2 h3 i sub br ol li dl dt dd
blockquote mark button table thead tbody tr th td"""
FRAME_LIMIT = 24_000  # bytes of a page beside its content


class Reader(HTMLParser):
    """Elements of a page with their attributes, and what is wrong with its nesting."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.wrong: list[str] = []
        self.texts: dict[str, str] = {}  # of what has an id, the text; of other elements by name, the last one's
        self._open: list[tuple[str, str | None]] = []
        self.feed(html)
        self.close()
        self.wrong += [f"{name} is not closed" for name, _ in self._open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        if len(attributes) != len(attrs):
            self.wrong.append(f"{tag} says an attribute twice")
        self.elements.append((tag, attributes))
        if tag not in VOID:
            self._open.append((tag, attributes.get("id")))
            self.texts[attributes.get("id") or tag] = ""

    def handle_endtag(self, tag: str) -> None:
        if not self._open or self._open[-1][0] != tag:
            self.wrong.append(f"</{tag}> in {self._open[-1:]}")
        else:
            self._open.pop()

    def handle_data(self, data: str) -> None:
        for name, id_ in self._open:
            self.texts[id_ or name] += data

    def all(self, name: str, **wanted: str) -> list[dict[str, str | None]]:
        """The attributes of each element of a name that has these."""
        return [attributes for tag, attributes in self.elements if tag == name and wanted.items() <= attributes.items()]


def check(html: str, fields: dict[str, Any]) -> Reader:
    """What holds for every page."""
    found = Reader(html)
    assert found.wrong == []
    # Each token leads to details of its own.
    ids = [attributes["id"] for _, attributes in found.elements if "id" in attributes]
    assert len(set(ids)) == len(ids) == sum(len(one["tokens"]) for one in fields["sequences"])
    assert [attributes["href"] for attributes in found.all("a")] == [f"#{name}" for name in ids]
    # Nothing is loaded, nothing but the page's own script runs, and there is no other way to have one.
    assert {name for name, _ in found.elements} <= set(ELEMENTS.split())
    assert {name for _, attributes in found.elements for name in attributes} <= {
        *("lang", "charset", "name", "content", "http-equiv", "class", "style", "href", "id", "role", "aria-label", "aria-live"),
        *("aria-pressed", "type", "value", "colspan"),
    }
    assert len(found.all("script")) == len(found.all("style")) == 1
    assert not re.search(r"url\(|@import|https?:|//[a-z]", found.texts["style"] + found.texts["script"].replace("  // ", ""))
    for _, attributes in found.elements:
        assert re.fullmatch(r"(--(s|d\d):(1\.00|\.\d\d);?)*|(width:[\d.]+%)|(flex:[\d.]+)", attributes.get("style") or "")
    (policy,) = (attributes["content"] for attributes in found.all("meta", **{"http-equiv": "Content-Security-Policy"}))
    digest = base64.b64encode(hashlib.sha256(found.texts["script"].encode()).digest()).decode()
    assert policy is not None
    assert policy.startswith("default-src 'none';")
    assert f"script-src 'sha256-{digest}';" in policy
    html.encode("utf-8")
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]", html)
    return found


# --- the page as text


def test_page_has_the_text_and_the_sources() -> None:
    """Every token with its numbers, sources and passages; documents with their shares; the settings."""
    fields = made(texts=2)
    found = check(pages.generation_page(fields), fields)
    assert found.texts["title"] == "Marley was dead: toé begin"
    assert found.texts["header"] == "A text and its sources2 texts, 16 tokens; 29% of their probability is from the datastore"
    first = " ".join(found.texts["t1"].split())
    for words in (
        *("token 1 of 8", "␣dead", "100% of its probability is from the datastore"),
        *("pLM0.100", "pkNN0.300", "p0.150", "p = 0.25 · 0.300 + 0.75 · 0.100, with λ = 0.25"),
        *("carol.txt75%", "…before it in carol.txt, dead and after it…"),
        *("dickens · character 1,234 · distance 41.5 · the nearest of 3 places", "law.txt15%", "4 more documents: 10%"),
    ):
        assert words in first, words
    assert "No passage that is near goes on with this token." in found.texts["t4"]
    assert found.texts["s2-t8"].split()[:5] == ["token", "8", "of", "8", "<|endoftext|>"]
    footer = found.texts["footer"]
    assert "datastore made.knn, snapshot 3; model default-gpt2" in footer
    assert "k 64, nprobe 8, λ 0.25, temperature 12.5" in footer
    assert "decoded greedily" in footer
    marks = [given.get("style") for given in found.all("a")][:5]
    assert marks == ["--s:1.00;--d0:.75;--d1:.15", "--s:.50;--d0:.50", "--s:.30;--d1:.30", None, "--s:.20;--d2:.20"]


def test_a_page_is_small() -> None:
    """Beside its content, which is about two kilobytes a token."""
    fields = {**made(), "sequences": [sequence([token(" a", [])])]}
    assert len(pages.generation_page(fields).encode()) < FRAME_LIMIT
    passage = "word " * 16
    sources = [{**source(f"{i}.txt", 0.2, " a"), "left": passage, "right": passage} for i in range(4)]
    long = {**made(), "sequences": [sequence([token(" a", sources)] * 100)]}
    assert len(pages.generation_page(long).encode()) < FRAME_LIMIT + 100 * 2_600


def test_names_and_texts_are_not_markup() -> None:
    """Documents, prompts and tokens that would like to be a script are shown as they are, with signs for control characters."""
    fields = made(name=EVIL, prompt=EVIL)
    for one in fields["sequences"][0]["tokens"]:
        one["text"] = EVIL
        for item in one["sources"]:
            item.update(left=EVIL, token=EVIL, right=EVIL, source=f"/{EVIL}/x")
    fields["store"] = fields["model"] = EVIL
    found = check(pages.generation_page(fields), fields)
    assert found.texts["t1"].count("<script>alert(1)</script>") >= 5
    assert "\\u202e␀.txt" in found.texts["t1"]


@given(fields=generations())
def test_any_generation_has_a_page(fields: dict[str, Any]) -> None:
    """Whatever texts, names and shares are."""
    check(pages.generation_page(fields), fields)


# --- the page in a browser

browsers = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed, so the page cannot be looked at (apt install chromium)")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with open_browser(tmp_path_factory.mktemp("browser") / "profile") as opened:
        yield opened
    assert opened.complaints == []
    assert all(address.startswith(("file:", "about:")) for address in opened.requests)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(pages.generation_page(made(name=EVIL, prompt=f"{EVIL}\n{'long' * 40} was", texts=2)), encoding="utf-8")
    return path


def details(browser: Browser) -> str:
    """What the panel shows, "" where it is not seen."""
    return str(browser.run("(p => p.checkVisibility() ? p.innerText : '')(document.querySelector('aside'))"))


def opened(browser: Browser) -> list[int]:
    """The numbers of the tokens whose details are seen."""
    script = "[...document.querySelectorAll('.d')].flatMap((d, i) => d.checkVisibility() ? [i + 1] : [])"
    return list(browser.run(script))


@browsers
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_pointing_at_a_token_shows_its_sources(browser: Browser, page: Path, dark: bool, tmp_path: Path) -> None:
    """The panel has them as soon as the pointer is there; the picture is not blank, is another one, and is light or dark."""
    browser.view(width=1280, height=900, dark=dark)
    browser.open(page)
    before = browser.picture()
    assert "Point at a token" in details(browser)
    assert opened(browser) == []
    browser.point(*browser.middle("a.t", 1))
    assert opened(browser) == [2]
    assert "token 2 of 8" in details(browser)
    assert "<script>alert(1)</script>" in details(browser)
    after = browser.picture()
    (tmp_path / "page.png").write_bytes(after)  # for whoever would like to see it
    assert after != before
    red, green, blue = map(int, re.findall(r"\d+", browser.run("getComputedStyle(document.documentElement).backgroundColor")))
    assert max(red, green, blue) < 60 if dark else min(red, green, blue) > 200
    (tmp_path / "blank.html").write_text("<!doctype html><title>blank</title>", encoding="utf-8")
    browser.open(tmp_path / "blank.html")
    assert min(len(before), len(after)) > 5 * len(browser.picture())


@browsers
def test_a_fragment_opens_a_token(browser: Browser, page: Path) -> None:
    """And the token itself is what is scrolled to."""
    browser.view(width=1280, height=300)
    browser.open(page, "#s2-t3")
    assert opened(browser) == [11]
    top = browser.run("document.querySelectorAll('a.t')[10].getBoundingClientRect().top")
    assert 0 <= top <= 300


@browsers
def test_keys_go_through_the_text(browser: Browser, page: Path) -> None:
    """Tab reaches the text in one step; arrows, Home and End go on; Escape closes. The place stands in the address."""
    browser.view(width=1280, height=900)
    browser.open(page)
    seen = []
    for key in ("Tab", "ArrowRight", "ArrowRight", "ArrowLeft", "End", "Home"):
        browser.press(key)
        seen += opened(browser)
    assert seen == [1, 2, 3, 2, 16, 1]
    browser.press("Tab")  # the next stop is not the next token
    assert browser.run("document.activeElement.tagName") == "BUTTON"
    browser.open(page, "#t5")
    browser.press("Escape")
    assert opened(browser) == []
    assert browser.run("location.hash") == ""


@browsers
def test_a_click_keeps_a_token(browser: Browser, page: Path) -> None:
    """Another that is pointed at is shown for that long; the buttons of the panel go on from there and close it."""
    browser.view(width=1280, height=900)
    browser.open(page)
    browser.run("document.querySelectorAll('a.t')[3].click()")
    assert (opened(browser), browser.run("location.hash")) == ([4], "#t4")
    browser.point(*browser.middle("a.t", 0))
    assert opened(browser) == [1]
    browser.point(5, 5)
    assert opened(browser) == [4]
    for number, wanted in ((1, [5]), (0, [4]), (2, [])):
        browser.run(f"document.querySelectorAll('aside button')[{number}].click()")
        assert opened(browser) == wanted


@browsers
def test_a_document_shows_its_part_in_each_token(browser: Browser, page: Path) -> None:
    """While it is pointed at, marks are those of its shares; pressed, they stay."""
    browser.view(width=1280, height=900)
    browser.open(page)
    marks = "[...document.querySelectorAll('a.t')].slice(0, 4).map(a => getComputedStyle(a).getPropertyValue('--v').trim())"
    assert [float(mark or 0) for mark in browser.run(marks)] == [1.0, 0.5, 0.3, 0.0]
    browser.point(*browser.middle("td button", 1))  # law.txt
    assert [float(mark or 0) for mark in browser.run(marks)] == [0.15, 0.0, 0.3, 0.0]
    browser.point(5, 5)
    assert [float(mark or 0) for mark in browser.run(marks)] == [1.0, 0.5, 0.3, 0.0]
    browser.run("document.querySelectorAll('td button')[1].click()")
    assert [float(mark or 0) for mark in browser.run(marks)] == [0.15, 0.0, 0.3, 0.0]
    assert browser.run("document.querySelectorAll('td button')[1].ariaPressed") == "true"


@browsers
def test_a_phone_shows_a_sheet(browser: Browser, page: Path) -> None:
    """Nothing is wider than the screen; a tap opens the panel over the lower part, where the token is still seen; × closes it."""
    browser.view(width=360, height=740, touch=True)
    browser.open(page)
    assert browser.run("document.documentElement.scrollWidth") <= 360
    assert details(browser) == ""
    browser.run("document.querySelectorAll('a.t')[6].scrollIntoView({block: 'start'})")
    x, y = browser.middle("a.t", 6)
    browser.tap(x, y)
    assert opened(browser) == [7]
    assert "9 more documents" in details(browser)
    top = browser.run("document.querySelector('aside').getBoundingClientRect().top")
    assert 740 * 0.4 < top < 740
    assert browser.run("document.documentElement.scrollWidth") <= 360
    browser.tap(*browser.middle("aside button", 2))
    assert details(browser) == ""
    browser.view(width=1280, height=900)


@browsers
def test_without_scripts_links_open_the_details(browser: Browser, page: Path) -> None:
    """Each token is a link to its details."""
    browser.view(width=1280, height=900)
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(page, "#t2")
        assert browser.run("document.documentElement.className") == ""
        assert opened(browser) == [2]
        assert "Point at a token" not in details(browser)
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)


CONTRASTS = """
(() => {
  const numbers = (color) => (color.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
  const luminance = (rgb) => rgb.map((v) => v / 255).map((v) => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const over = ([r, g, b, a = 1], below) => [r, g, b].map((v, i) => a * v + (1 - a) * below[i]);
  const behind = (e) => e ? over(numbers(getComputedStyle(e).backgroundColor), behind(e.parentElement)) : [255, 255, 255];
  const found = [];
  for (const e of document.querySelectorAll("body *")) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if (!own || !e.checkVisibility() || e.matches(".sign, script")) continue;
    const [one, two] = [luminance(over(numbers(getComputedStyle(e).color), behind(e))), luminance(behind(e))].sort((a, b) => b - a);
    found.push([(one + .05) / (two + .05), `${e.tagName}.${e.className} ${e.textContent.slice(0, 20)}`]);
  }
  return found.sort((a, b) => a[0] - b[0]).slice(0, 3);
})()
"""


@browsers
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("of", ["", "0", "1", "2", "3", "4", "5"])
def test_all_text_has_contrast(browser: Browser, page: Path, dark: bool, of: str) -> None:
    """At least 4.5 to 1 (WCAG 2.2, AA), also where a token owes all to the datastore, or to one document in that one's colour."""
    browser.view(width=1280, height=900, dark=dark)
    browser.open(page, "#t1")
    browser.run("document.head.insertAdjacentHTML('beforeend', '<style>* { transition: none !important; }</style>')")
    all_of = "".join(f"--{name}:1;" for name in ("s", "d0", "d1", "d2", "d3", "d4", "d5"))
    browser.run(f"document.querySelectorAll('a.t').forEach((a) => a.style.cssText = '{all_of}')")
    if of:
        browser.run(f"document.querySelectorAll('section').forEach((s) => s.dataset.of = '{of}')")
    contrasts = browser.run(CONTRASTS)
    assert contrasts[0][0] >= 4.5, contrasts
