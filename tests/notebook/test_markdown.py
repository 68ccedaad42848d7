"""A model's answer is text: whatever it says, no parser of Markdown makes a tag, a link or a request of it."""

from __future__ import annotations

import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import lab
import nbformat
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from nbconvert import HTMLExporter
from nbconvert.filters import markdown2html

from airllm_nb.notebook.markdown import safe_markdown

EVIL = "<img src=x onerror=alert(1)>"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain *text* and `code`", "plain *text* and `code`"),
        ("List<int> x; 3 < 4", "List<|int> x; 3 < 4"),
        ("<script>alert(1)</script>", "<|script>alert(1)<|/script>"),
        ("it is $5 or $6, not $x$", "it is \\$5 or \\$6, not $x$"),
        ("`$1` and `` $2 ` ``", "`$1` and `` \\$2 ` ``"),
        ("![a](http://b/c) [d](javascript:e)", "![a]|(http://b/c) [d]|(javascript:e)"),
        ("```html\n<b>$5</b>\n```\n<i>", "```html\n<b>$5</b>\n```\n<|i>"),
        ("a\n```\n<b>", "a\n\n```\n<b>\n```"),
        ("- `a\n- <b>`", "- `a\n- <|b>`"),
        ("```\nx\n`````\n<b>\n```\n", "```\nx\n```\n<|b>\n\n```\n\n```\n"),
        ("~~~\n```\n~~~~~\n<b>\n~~~", "````\n```\n````\n<|b>\n\n```\n\n```"),
        ("````md\n```py\n<b>\n```\n````", "````md\n```py\n<b>\n```\n````"),
        ("```<b> x\n<i>\n```", "```\n<i>\n```"),
        ("```mermaid\nclick\n```", "```\nclick\n```"),
        ("```{image} http://b/c\n```", "```\n\n```"),
        ("1. a\n   ```py\n   x < y[0](z)\n   ```\n2. b", "1. a\n   ~~~py\n   x < y[0]|(z)\n   ~~~\n2. b"),
        ("> ```\n> <b>\n> ```\n> c", "> ~~~\n> <|b>\n> ~~~\n> c"),
        ("- a\n  ```\n<b>\n```\n", "- a\n  ~~~\n<|b>\n\n```\n\n```\n"),
        ("- ```\n  ~~~\n  ```\n\n```\n~~~\n<b>\n```", "- ~~~\n  ~|~~\n  ~~~\n\n```\n~|~~\n<|b>\n```"),
        ("    <b>", "    <|b>"),
        ("a ``` b", "a `|`` b"),
        (":::{image} x", ":|::{image} x"),
        (r"$\href{javascript:a}{b}$", r"$\|href{javascript:a}{b}$"),
        (r"$\frac{1}{2}$ and $$x$$ \begin{a}x\end{a}", r"$\frac{1}{2}$ and $$x$$ \begin{a}x\end{a}"),
        (r"&#36;&bsol;href &lt;", r"&|#36;&|bsol;href &lt;"),
        ("$$x$$\n\n```\n<b>$$</b>\n```", "$$x$$\n\n```\n<|b>$$<|/b>\n```"),
        ("\\begin{a}\n\n```\n<b>\n```", "\\begin{a}\n\n```\n<b>\n```"),
        ("a\0b\r\nc\u2028d", "ab\nc\nd"),
        ("", ""),
    ],
)
def test_what_is_read_stays(text: str, shown: str) -> None:
    assert safe_markdown(text) == shown.replace("|", "\u200b")


# ---- what parsers make of it -----------------------------------------------------------------------------------------

# What Markdown may become; nothing of it runs, and nothing loads.
ALLOWED = {
    "a": {"href", "class", "id", "aria-hidden"}, "div": {"class"}, "span": {"class"}, "code": {"class"},
    "ol": {"start"}, "li": {"class", "id"}, "h1": {"id"}, "h2": {"id"}, "h3": {"id"}, "h4": {"id"}, "h5": {"id"},
    "h6": {"id"}, "th": {"style"}, "td": {"style"}, "input": {"class", "type", "disabled", "checked"},
}  # fmt: skip
BARE = set("p em strong pre ul blockquote hr br del s table thead tbody tr dl dt dd mark ins sup sub".split())  # noqa: SIM905


class Checked(HTMLParser):
    """What is not allowed in a page; and its text."""

    def __init__(self, page: str):
        super().__init__()
        self.found: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        good = {"href": "https?://|#|mailto:", "style": "text-align:"}
        bad = [
            name
            for name, value in attrs
            if name not in ALLOWED.get(tag, ()) or not re.match(good.get(name, ""), value or "")
        ]
        if tag not in {*ALLOWED, *BARE} or bad:
            self.found.append(f"<{tag} {attrs}>")

    def handle_comment(self, data: str) -> None:
        self.found.append(data)

    handle_decl = handle_pi = unknown_decl = handle_comment

    def handle_data(self, data: str) -> None:
        self.text += data


def _commonmark(text: str) -> str:
    return str(MarkdownIt("js-default", {"html": True, "linkify": False}).render(text))


PARSERS = {"nbconvert": markdown2html, "markdown-it": _commonmark}
HOSTILE = [
    EVIL,
    f"```\nx\n`````\n{EVIL}\n```",
    f"~~~\nx\n~~~~~\n{EVIL}\n~~~",
    f"```\n{EVIL}",
    f"``` a`b\n```\n{EVIL}\n```\n{EVIL}",
    f"```{EVIL}\n{EVIL}\n```{EVIL}\n```",
    f"- ```\n  {EVIL}\n- {EVIL}\n```\n{EVIL}\n```",
    f"1. a\n\n    ```\n{EVIL}\n    ```\n\n```\n{EVIL}\n```",
    f"> ```\n{EVIL}\n> ```\n```\n~~~\n{EVIL}\n```",
    f">- ~~~\n> {EVIL}\n~~~\n{EVIL}",
    f"    ```\n{EVIL}\n    ```",
    f"  ```\n ```\n{EVIL}\n   ```",
    f"`a\n{EVIL}`\n``b\n\n{EVIL}``",
    f"\\`{EVIL}` \\``{EVIL}``",
    f"$$\n\n```\n{EVIL}\n```\n\n$$",
    f"    $$\n$$ a\n\n```\n$$\n{EVIL}\n```\n\n$$",
    f"a \\\\[ b\n\n```\n\\\\]\n{EVIL}\n```",
    f"\\\\\\[\n\n```\n{EVIL}\n```\n\n\\\\]",
    f"\\begin{{a}}\n\n```\n{EVIL}\n```\n\n\\end{{a}}",
    f"<!--\n\n```\n-->{EVIL}\n```\n\n-->",
    f"<pre>\n```\n</pre>{EVIL}\n```",
    f"```\u2028```\u2028{EVIL}\n```",
    f"```\r{EVIL}\r```\r{EVIL}",
    f"```\x0b```\x0c{EVIL}\n```",
    "<\0img src=x onerror=alert(1)>\n<\ufeffscript>alert(1)</script>",
    "[a](javascript:alert(1)) [b][c]\n\n[c]: javascript:alert(1)\n[d]\n\n[d\n]: data:text/html,x",
    "![a](http://127.0.0.1/x.png) ![b][c]\n\n[c]: http://127.0.0.1/y.png\n\n![d]\n\n[d]:\nhttp://127.0.0.1/z",
    "<javascript:alert(1)> <http://127.0.0.1/> <a@b.c>",
    "[^1]\n\n[^1]: <img src=x>\n\n    ```\n    <img src=x>\n    ```",
    f"a | b\n--|--\n`|` | {EVIL}\n```\n| {EVIL}\n```",
    f"term\n: ```\n  {EVIL}\n\n```\n{EVIL}\n```",
    f"# {EVIL}\n\n{EVIL}\n===",
    f"```mermaid\ngraph TD; A[{EVIL}]\n```",
    f"```math\n{EVIL}\n```\n```{{raw}} html\n{EVIL}\n```\n:::{{raw}} html\n{EVIL}\n:::",
    f"- [ ] {EVIL}\n- [x] a",
    "&lt;img src=x onerror=alert(1)&gt; &#60;img src=x&#62; &lt;script>",
    "<svg/onload=alert(1)> <iframe srcdoc='&lt;script>'> <math><mi//xlink:href='data:x'> </p><?x ?><![CDATA[<b>]]>",
    "*<*img src=x onerror=alert(1)*>* <*b* onclick=x> <_i_>",
]  # fmt: skip


@pytest.mark.parametrize("parser", PARSERS)
@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_hostile_answers_are_text(number: int, parser: str) -> None:
    page = Checked(PARSERS[parser](safe_markdown(HOSTILE[number])))
    assert page.found == []
    assert "alert(1)" not in HOSTILE[number] or "alert(1)" in page.text, "it can be read"


def test_the_check_finds_what_is_not_guarded() -> None:
    assert [Checked(PARSERS["nbconvert"](text)).found for text in HOSTILE].count([]) < len(HOSTILE) / 2


PIECES = [
    "`", "```", "````", "~~~", "~~~~~", "\n", "\n\n", "  ", "    ", "\t", "- ", "1. ", "> ", "x", EVIL, "<!--", "-->",
    "$", "$$", "\\", "\\\\[", "\\\\]", "\\begin{a}", "\\end{a}", "[a]", "(javascript:x)", "![b](http://c)", "[a]: x",
    "|", "---", ": ", ":::", "</pre>", "<script>", "&lt;", "\u2028", "\r", "{raw} html", "py", "#", "*", "[^1]: ",
]  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=30).map("".join))
def test_whatever_is_said_is_text(text: str) -> None:
    shown = safe_markdown(text)
    for parser in PARSERS.values():
        assert Checked(parser(shown)).found == [], shown


@settings(max_examples=100, deadline=None)
@given(st.text(st.sampled_from("ab<>&`~$\\[]()!|: -*_#\n"), max_size=60))
def test_code_in_the_first_column_keeps_its_characters(code: str) -> None:
    fence = "`" * (1 + max([2, *map(len, re.findall("`+", code))]))
    page = Checked(_commonmark(safe_markdown(f"so:\n\n{fence}py\n{code}\n{fence}\nand <b>")))
    assert f"\n{code}\n\n" in f"\n{page.text[3:]}" and page.found == []


def test_a_notebook_as_a_page_holds_text_alone() -> None:
    """As nbconvert writes it, template and all: nothing is in it that a harmless answer does not bring."""

    def tags(answers: list[str]) -> list[str]:
        cell = nbformat.v4.new_code_cell("1")
        cell.outputs = [
            nbformat.v4.new_output("display_data", data={"text/markdown": safe_markdown(text)}) for text in answers
        ]
        page = HTMLExporter().from_notebook_node(nbformat.v4.new_notebook(cells=[cell]))[0]
        return sorted(
            {found.split("=")[0] for found in Checked(page).found if "alert" in found or "127.0.0.1" in found}
        )

    assert tags(HOSTILE) == tags(["harmless"]) == []


def test_it_takes_time_in_proportion() -> None:
    """Sizes that a parser which goes back and forth would not come to the end of."""
    for piece in ("`", "``` ", "$$", "\\begin{a}", "> ", "- ", "[a](", "<", "```\n", "- ```\n", "&#", "\\\\["):
        assert safe_markdown(piece * 20_000)


# ---- what a page makes of it -----------------------------------------------------------------------------------------

FORMULAS = [
    r"$\href{javascript:alert(1)}{click}$ and $$\style{background:url(http://127.0.0.1/x)}{y}$$",
    r"&#36;&#92;href{javascript:alert(1)}{click}&#36; &dollar;&bsol;href{javascript:alert(1)}{click}&dollar;",
    r"\$\\href{javascript:alert(1)}{click}\$ $\def\a{\href}\a{javascript:alert(1)}{click}$",
    r"$\bbox[background:url(http://127.0.0.1/x)]{y}$ $\mmlToken{mi}[href=javascript:alert(1)]{click}$",
    r"$\require{html}\cssId{a}{x}$ $\unicode[http://127.0.0.1/x]{x41}$ $\includegraphics{http://127.0.0.1/x}$",
]
# Of an output: what could run or load, and the links that are no web address.
LIVE = """() => [...document.querySelectorAll('.jp-RenderedMarkdown *')].filter(el =>
    /^(script|img|iframe|svg|object|embed|video|audio|form|style|base|link|meta)$/i.test(el.localName)
        && !el.closest('mjx-container, .MathJax')
    || [...el.attributes].some(a => /^on/i.test(a.name) || /javascript:|data:|url[(]/i.test(a.value))
).map(el => el.outerHTML.slice(0, 200))"""


@pytest.mark.browser
def test_in_a_browser_nothing_runs_and_nothing_is_asked_for(tmp_path: Path) -> None:
    """JupyterLab, whose notebook trusts what its own kernel shows."""
    if reason := lab.missing():
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)
    show = (
        "from airllm_nb.notebook.markdown import safe_markdown\nimport json\n\ndef show(texts):\n    for text in texts:"
    )
    show += "\n        display({'text/plain': text, 'text/markdown': text}, raw=True)"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(show)])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "python3", "language": "python"}
    nbformat.write(notebook, tmp_path / "n.ipynb")
    texts = HOSTILE + FORMULAS
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    kernel = {"python3": lab.Kernel((), {"AIRLLM_NB_CACHE": str(tmp_path / "cache")})}
    with lab.serve(tmp_path, kernel) as server, lab.browse() as page:
        dialogs: list[str] = []
        asked: list[str] = []
        opened = lab.Lab(page, server)
        page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
        opened.open("n.ipynb")
        opened.run("1")
        opened.start(0)
        opened.wait_end(0)
        page.on("request", lambda request: asked.append(request.url))
        index = opened.run("show(map(safe_markdown, json.load(open('texts.json'))))")
        opened.cell(index).locator(".jp-RenderedMarkdown").nth(len(texts) - 1).wait_for()
        page.wait_for_timeout(2000)
        foreign = [url for url in asked if re.search(r"/x$|/[xyz](\.png)?$|127\.0\.0\.1/", url)]
        assert (dialogs, foreign, page.evaluate(LIVE)) == ([], [], [])
        assert opened.cell(index).inner_text().count("alert(1)") > len(HOSTILE) / 2, "it can be read"
        # What is watched for is seen where nothing is guarded.
        opened.run(f"show([{EVIL!r}])")
        opened.until("() => document.querySelector('.jp-RenderedMarkdown img') !== null")
        page.wait_for_timeout(500)
        assert dialogs and page.evaluate(LIVE)
