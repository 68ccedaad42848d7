"""The one place where a name that came with a model, a store, an index or a listing becomes a path.

Such a name is data of whoever made it. It may lead to a file below the folder that it came with, and nowhere else.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path, PurePosixPath, PureWindowsPath

from ..errors import CheckpointError


def is_inside(name: str) -> bool:
    """Whether ``name`` is a relative path, with ``/`` between its parts, that leads down on every system."""
    if "\0" in name or "\\" in name or PureWindowsPath(name).drive:
        return False
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def inside(folder: Path, name: str) -> Path:
    """The file ``name`` below ``folder``.

    The file itself may be a link: the Hub's cache is made of them, and people link weight files into folders of their
    own. It is read through the link, and never deleted or copied through it. A link on the way to it must not lead out.

    Raises
    ------
    CheckpointError
        If the name leads out of the folder, by itself or by a linked sub-folder.
    TypeError
        If it is no text.
    """
    if not isinstance(name, str):
        raise TypeError(f"a file's name is text, not {type(name).__name__}")
    if is_inside(name):
        path = folder / name
        with suppress(OSError, RuntimeError, ValueError):  # links in a circle, or a name that no system takes
            above, root = path.parent.resolve(), folder.resolve()
            if above == root or root in above.parents:
                return path
    raise CheckpointError(f"{folder} names {name[:80]!r}, which points outside of that folder: it is damaged, or meant "
                          "to do harm; download the model again, from somebody you trust")  # fmt: skip
