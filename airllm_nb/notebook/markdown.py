"""A model's answer as Markdown that a notebook can show: it can neither run nor load anything.

Notebooks trust what their own kernel displays, and Markdown may contain HTML, images and formulas: whoever steers the
model's words would otherwise run scripts in the user's page. An invisible character keeps a tag, a link or a command of
TeX from being one; what is read stays the same. The result's ``.text`` is untouched.

Only code may hold what looks like a tag, and parsers of Markdown (JupyterLab's, nbconvert's, others) do not agree on
where code begins and ends. So what markdown-it finds in the first column is written anew as a fence that none of them
reads otherwise: of more backticks than stand in it, between empty lines, in a text that has no other run of backticks.
Code inside of lists and quotes is fenced by tildes, and taken apart like text in case a parser does not see it.
"""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from markdown_it import MarkdownIt
    from markdown_it.token import Token

_APART = "\u200b"
# Where some programs end a line and others do not; and what is never shown, and some drop from between two others.
_LINE_END = re.compile("\r\n|[\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029]")
_CONTROL = re.compile("[\0-\x08\x0e-\x1f\x7f-\x9f\ufeff]")
_TAG = re.compile(r"<(?=[A-Za-z/!?])")
_LINK = re.compile(r"\](?=[(\[:])")
# Fences, and what MyST takes for one.
_RUN = re.compile(r"([`~:])(?=\1\1)")
# Code on one line, or what would be a formula.
_PRICE = re.compile(r"(?<!`)(`+)(?!`)[^\n`]*\1(?!`)|(?<!\\)\$(?=\d)")
# What would become a dollar or a backslash only after formulas were looked for.
_REFERENCE = re.compile(r"&(?=#|(?:dollar|bsol|lcub|lbrace);)")
# What in a formula links, loads, styles, or says what other formulas on the page mean.
_TEX = re.compile(r"\\(?=(?:href|url|class|cssId|style|data|require|unicode|bbox|mmlToken|includegraphics|html\w*|"
                  r"texttip|Tooltip|mathtip|toggle|[gex]?def|let|(?:re)?new(?:command|environment)|"
                  r"DeclareMathOperator)(?![A-Za-z]))", re.IGNORECASE)  # fmt: skip
# What begins a formula that nbconvert looks for the end of over any distance, code included.
_FORMULA = re.compile(r"\$\$|\\\\[\[(]|\\begin\{")
_LANGUAGE = re.compile(r"(?!mermaid|math\b)[\w+#.-]{1,30}", re.ASCII | re.IGNORECASE)


def safe_markdown(text: str) -> str:
    """``text`` with tags, links, images and dangerous formulas taken apart, and prices kept from being formulas.

    Fenced code in the first column keeps its characters; a fence without an end gets one.
    """
    text = _CONTROL.sub("", _LINE_END.sub("\n", text))
    lines, shown, done = text.split("\n"), list[str](), 0
    fences = [token for token in _parser().parse(text) if token.type == "fence" and token.map]
    outer = [fence for fence in fences if not fence.level]
    ends = _ends(lines, outer, len(outer) < len(fences))
    for fence in fences:
        start, end = fence.map or (0, 0)
        shown += _apart(lines[done:start])
        if fence.level:
            shown += _inner_fence(lines[start:end], fence)
        else:
            shown += [""] * bool(shown and shown[-1].strip())
            shown += _fence(fence, ends)
        done = end
    return "\n".join(shown + _apart(lines[done:]))


def _ends(lines: list[str], outer: list[Token], has_inner: bool) -> re.Pattern[str] | None:
    """What code may not hold as it is: the end of something that another parser may see begin before it."""
    prose = list(lines)
    for fence in outer:
        start, end = fence.map or (0, 0)
        prose[start:end] = [""] * (end - start)
    is_formula = _FORMULA.search("\n".join(prose))
    ends = ["~~~"] * has_inner + [r"\$\$", r"\\end\{", r"\\\\[\])]"] * bool(is_formula)
    return re.compile("|".join(ends)) if ends else None


def _fence(fence: Token, ends: re.Pattern[str] | None) -> list[str]:
    """Code in the first column."""
    longest = max(map(len, re.findall("`+", fence.content)), default=0)
    ticks, code = "`" * max(longest + 1, 3), fence.content.removesuffix("\n").split("\n")
    return [ticks + _language(fence), *(_code_apart(code) if ends and ends.search(fence.content) else code), ticks]


def _inner_fence(lines: list[str], fence: Token) -> list[str]:
    """Code inside of lists or quotes, its first and last line among them."""
    mark = fence.markup[:3]
    before, _, _ = lines[0].partition(mark)
    is_closed = len(lines) > 1 and not lines[-1].strip(f" \t>{mark[0]}") and mark in lines[-1]
    code = lines[1 : len(lines) - is_closed]
    end = [lines[-1].partition(mark)[0] + "~~~"] if is_closed else []
    return [f"{before}~~~{_language(fence)}", *_code_apart(code), *end]


def _language(fence: Token) -> str:
    """What colours the code, and nothing that draws or runs it."""
    found = _LANGUAGE.fullmatch((fence.info.split() or [""])[0])
    return found[0] if found else ""


def _apart(lines: list[str]) -> list[str]:
    """Text, and code that has no fences."""
    text = "\n".join(_code_apart(lines))
    return _PRICE.sub(lambda found: found[0] if found[1] else r"\$", text).split("\n") if lines else []


def _code_apart(lines: list[str]) -> list[str]:
    text = _RUN.sub(rf"\1{_APART}", _LINK.sub(f"]{_APART}", _TAG.sub(f"<{_APART}", "\n".join(lines))))
    text = _TEX.sub(rf"\g<0>{_APART}", _REFERENCE.sub(f"&{_APART}", text))
    return text.split("\n") if lines else []


@functools.cache
def _parser() -> MarkdownIt:
    from markdown_it import MarkdownIt

    # Blocks alone, and none that another parser does not see: links by reference and HTML are taken apart.
    return MarkdownIt("commonmark", {"html": False}).disable(["inline", "reference", "html_block"])
