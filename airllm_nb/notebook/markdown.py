"""A model's answer as Markdown that a notebook can show: it can neither run nor load anything.

Notebooks trust what their own kernel displays, and Markdown may contain HTML: whoever steers the model's words would
otherwise run scripts in the user's page. An invisible character keeps a tag, a link or an image from being one; what is
read stays the same. The result's ``.text`` is untouched.
"""

from __future__ import annotations

import re

_APART = "\u200b"
# Whole fences in the first column: every parser of Markdown agrees about those.
_FENCE = re.compile(r"^(`{3,}|~{3,})[^\n`~]*\n(?:.*\n)*?\1[ \t]*$", re.MULTILINE)
_OTHER_FENCE = re.compile(r"^(?=[ \t>*+\d-])[ \t>*+\d.)-]*(`{3}|~{3})", re.MULTILINE)
_TAG = re.compile(r"<(?=[A-Za-z/!?])")
_LINK = re.compile(r"\](?=[(\[:])")
_PRICE = re.compile(r"\$(?=\d)")


def safe_markdown(text: str) -> str:
    """``text`` with tags, links and images taken apart and prices kept from being formulas; fenced code as it is."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if _OTHER_FENCE.search(text):
        return _apart(text)
    parts, end = [], 0
    for fence in _FENCE.finditer(text):
        parts += [_apart(text[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, _apart(text[end:])])


def _apart(text: str) -> str:
    text = _TAG.sub(f"<{_APART}", text)
    return _PRICE.sub(r"\\$", _LINK.sub(f"]{_APART}", text))
