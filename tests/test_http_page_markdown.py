"""The page's Markdown against markdown-it's, and what a hostile model may make of it: nothing."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from browser import browser_page, needs_chromium
from http_server import serving
from markdown_it import MarkdownIt

pytestmark = needs_chromium

TEXTS = [
    "One paragraph.",
    "Two\nlines, and\n\nanother one.",
    "# One\n\n## Two ##\n\n### Three\ntext",
    "*em* **strong** _em_ __strong__ ~~gone~~ `code` ``co`de``",
    "**bold with *em* inside** and *em with **bold** inside*",
    "snake_case_name and 2 * 3 * 4 and __init__ and a*b*c",
    "not closed: **bold, *em, `code, [link](",
    "\\*no em\\* and \\`no code\\` and C:\\dir",
    "[a link](https://example.org/x) and [another](https://example.org/a_(b) \"title\")",
    "a < b && c > d, <b>no bold</b>",
    "- one\n- two\n- three",
    "* one\n  - deeper\n  - and more\n* two",
    "1. one\n2. two\n3. three",
    "7. seven\n8. eight",
    "1. one\n   - deeper\n2. two",
    "- [x] done `code`\n- **bold** start",
    "```python\ndef f(x):\n    return x < 1\n```",
    "~~~\n``` inside ~~~\n~~~",
    "```\nnever closed\n\n# no heading",
    "before\n```\ncode\n```\nafter",
    "> quoted\n> text\n\nafter",
    "> - a list\n> - in a quote",
    "> > twice",
    "| a | b |\n|---|:-:|\n| 1 | *2* |\n| 3 |",
    "text\n\n---\n\n***\n\nmore",
    "- one\n\n  a paragraph of it\n\n- two",
    "- code:\n\n  ```\n  x = 1\n  ```\n- more",
    "Ünïcödé **fett** und _kursiv_, 数字**粗体**字",
    "",
    "   \n\n  ",
]  # fmt: skip

HOSTILE = [
    "<script>window.broken=1</script>",
    "<img src=x onerror='window.broken=1'>",
    "[click](javascript:window.broken=1)",
    "[click](JaVaScRiPt:window.broken=1)",
    "[click](data:text/html,<script>window.broken=1</script>)",
    "![picture](https://example.org/spy.png)",
    '[x](https://e.org/"onmouseover="window.broken=1)',
    '```"><script>window.broken=1</script>\nx\n```',
    "| <iframe src=//e.org> |\n|---|\n| <svg onload=window.broken=1> |",
    "https://e.org/<script>",
]

LONG = ["*" * 50_000, "[" * 50_000, "`" * 9 + "` " * 20_000, "**a " * 20_000, "> " * 20_000, "- " * 20_000,
        "_a" * 30_000, "[a](" * 20_000, "|" * 50_000, "~~~" + "`" * 50_000, "#" * 50_000, "h" * 50_000,
        "- a\n" * 10_000, " * " * 30_000, "https://" * 9_000]  # fmt: skip


class _Shape(HTMLParser):
    """Elements and text of HTML; of what does not count here, nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag, attrs):
        known = dict(attrs)
        kept = [f"{name}={known[name]}" for name in ("href", "start") if known.get(name)]
        self.found.append(" ".join([f"<{tag}", *kept]))

    def handle_endtag(self, tag):
        if tag not in ("br", "hr"):
            self.found.append(f"</{tag}>")

    def handle_data(self, data):
        if data.strip():
            self.found.append(re.sub(r"\s+", " ", data).strip())


def shape(html: str) -> list[str]:
    parser = _Shape()
    parser.feed(html)
    parser.close()
    return parser.found


def expected(text: str) -> list[str]:
    """By markdown-it, with lines that stay lines, and headings from the third level on."""
    rules = MarkdownIt("commonmark", {"html": False, "breaks": True}).enable(["table", "strikethrough"])
    html = rules.render(text)
    html = re.sub(r"(</?h)(\d)", lambda found: f"{found[1]}{min(int(found[2]) + 2, 6)}", html)
    return shape(html.replace("<s>", "<del>").replace("</s>", "</del>"))


RENDER = """async texts => {
  const { render } = await import("/page/markdown.js");
  return texts.map(text => {
    const box = document.createElement("div");
    box.append(render(text));
    return box.innerHTML;
  });
}"""


@pytest.fixture(scope="module")
def server():
    with serving("demo") as server:
        yield server


async def test_it_is_what_markdown_it_makes(server):
    async with browser_page(server.url) as page:
        made = await page.evaluate(RENDER, TEXTS)
    wrong = {text: (shape(html), expected(text)) for text, html in zip(TEXTS, made, strict=True)}
    assert {text: pair for text, pair in wrong.items() if pair[0] != pair[1]} == {}


async def test_hostile_text_stays_text(server):
    async with browser_page(server.url) as page:
        made = await page.evaluate(RENDER, HOSTILE)
        assert await page.evaluate("window.broken ?? 0") == 0
        found = await page.evaluate(
            """async texts => {
              const { render } = await import("/page/markdown.js");
              const box = document.createElement("div");
              for (const text of texts) box.append(render(text));
              document.body.append(box);
              const all = [...box.querySelectorAll("*")];
              return [[...new Set(all.map(each => each.localName))],
                      [...new Set(all.flatMap(each => each.getAttributeNames()))],
                      all.map(each => each.href).filter(Boolean)];
            }""",
            HOSTILE,
        )
    elements, attributes, links = found
    assert set(elements) <= {"p", "a", "span", "pre", "code", "table", "thead", "tbody", "tr", "th", "td"}
    assert set(attributes) <= {"href", "rel", "target", "tabindex", "data-language"}
    assert all(link.startswith("https://e") for link in links)
    assert "spy.png" in made[5]


async def test_long_nonsense_is_shown_too(server):
    """The page would stand still if any of it took more than linear time, and this test with it."""
    async with browser_page(server.url) as page:
        made = await page.evaluate(RENDER, LONG)
    assert all(made)


def test_the_source_makes_no_html():
    folder = Path(__file__).parent.parent / "mer/api/http/page"
    makers = re.compile(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(")
    for file in folder.glob("*.js"):
        assert not makers.search(file.read_text())
    inline = re.compile(r"<style|style=|\son\w+=|<script(?! type=\"module\" src)")
    assert not inline.search((folder / "index.html").read_text())
