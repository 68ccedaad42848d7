"""``{name}`` in a prompt → the variable of the notebook, where there is one; every other brace stays as it is.

Prompts hold code and JSON, so nothing here is an error: an unknown name, an expression, a doubled brace are text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from ..errors import PromptError
from ..flags import check_text

# A name in doubled braces is matched to be passed over; {"key": {name}} ends in two braces and is not one.
_NAME = re.compile(r"\{\{\w+\}\}|\{([^\W\d]\w*)\}")


def expand(text: str, variables: Mapping[str, Any]) -> str:
    """Put values in the place of ``{name}``, once: braces inside a value are not looked at.

    Parameters
    ----------
    variables
        See :func:`visible`.

    Raises
    ------
    PromptError
        If a value cannot be written as text.
    """

    def value(match: re.Match[str]) -> str:
        if not match[1] or match[1] not in variables:
            return match[0]
        found = variables[match[1]]
        if isinstance(found, (bytes, bytearray)):
            check_text(found, f"the variable {match[1]}")
        try:
            text = str(found)
        except Exception as error:
            raise PromptError(f"the variable {match[1]} cannot be written as text ({type(error).__name__}: {error}); "
                              f"make it a string, or keep {match[0]} as it is with --raw") from None  # fmt: skip

        check_text(text, f"the variable {match[1]}")
        return text

    return _NAME.sub(value, text)


def visible(shell: Any) -> dict[str, Any]:
    """The notebook's own variables: not what IPython puts there, and no modules, functions or classes.

    ``{json}`` in a prompt is text even where ``json`` is imported.
    """
    hidden, missing = shell.user_ns_hidden, object()
    return {
        name: value
        for name, value in shell.user_ns.items()
        if value is not hidden.get(name, missing)
        and name.strip("_")
        and not isinstance(value, (ModuleType, type))
        and not callable(value)
    }
