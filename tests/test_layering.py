"""Imports point down (docs/STRUCTURE.md), heavy libraries stay in their rooms, and files and functions stay small."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parents[1] / "airllm_nb"

BASE = {"config", "flags", "disk", "errors", "progress", "trace", "timeline", "routed"}
AT_REST = BASE | {"tensors", "encoding", "store", "checkpoint"}
MOVING = BASE | {"tensors", "encoding", "stream"}
ROOMS = AT_REST | MOVING | {"plan", "model", "decode"}
# room or top-level module, from the ground up: what it may import of ours, besides itself
ALLOWED = {
    "errors": set(),
    "disk": {"errors"},
    "config": {"errors", "disk"},
    "flags": {"config", "errors", "disk"},
    "progress": {"config", "errors"},
    "routed": set(),
    "trace": {"routed", "config", "errors"},
    "timeline": {"trace", "config", "errors"},
    "tensors": BASE,
    "encoding": BASE | {"tensors"},
    "store": BASE | {"tensors", "encoding"},
    "checkpoint": BASE | {"tensors", "encoding", "store"},
    "stream": BASE | {"tensors", "encoding", "store"},
    "plan": BASE | {"stream"},
    "model": AT_REST | MOVING | {"plan"},
    "decode": AT_REST | MOVING | {"plan"},
    "intake": ROOMS,
    "engine": ROOMS | {"intake"},
    "bench": ROOMS | {"intake", "engine"},
    "notebook": BASE | {"engine", "bench"},
    "cli": BASE | {"engine", "bench"},
    "__main__": {"cli"},
    "__init__": BASE | {"engine", "notebook", "checkpoint"},  # lazily; what it costs is measured in test_import.py
}
# library: the modules that may import it; nothing else may, at import time or inside a function
KEPT_IN = {
    "IPython": "notebook/",
    "ipywidgets": "notebook/",
    "matplotlib": "notebook/",
    "bitsandbytes": "encoding/nf4.py",
    "triton": "encoding/kernels/triton_",
    "accelerate": "nowhere",
}
FILE_LINES, FUNCTION_LINES = 300, 60
# Files are opened, read, looked at and listed through disk.py, which turns what the system refuses into one line.
# module: what it may do beside the door, and why
OPENS = {
    "disk": {"open", "stat", "iterdir"},  # the door
    "checkpoint.gguf.cursor": {"memmap"},  # as the gguf package calls it, of a file that was read here before
    "tensors.libc": {"mmap"},  # of a descriptor
    "tensors.pages": {"mmap"},  # memory in the place of what a file has lost
    "stream.trial_child": {"open", "loads", "mmap"},  # a script that imports nothing of ours
    "decode.template_child": {"load", "read_text"},  # another, which reads a pipe and /proc
    "stream.trial": {"read_text"},  # /proc
    "model.device": {"read_text"},  # /proc and /sys
    "bench.measure": {"read_text"},  # /proc
    "cli.doctor": {"read_text"},  # /proc and /sys
    "cli.__init__": {"open"},  # /dev/null
    "store.locks": {"open", "scandir", "stat"},  # folders that are locked, and progress that may be a guess
    "store.jobs": {"mmap"},  # memory
    "engine.kept": {"scandir"},  # a folder of the Hub's cache
    "store.atomic": {"open"},  # a folder that is synced, and a file that is made anew
    "checkpoint.hub.sample": {"open"},  # a member of an archive
    "tensors.files": {"mmap"},  # memory
    "stream.host": {"mmap"},  # memory
    "stream.mapped": {"mmap"},  # a file that was opened through the door
    "checkpoint.gguf.header": {"mmap", "memmap"},  # likewise
}
_READS = {"open", "read_text", "read_bytes", "stat", "lstat", "iterdir", "scandir", "listdir", "mmap", "memmap", "load"}


class Import(NamedTuple):
    """``target`` is dotted, absolute and as deep as the statement says: ``from .a import b`` gives ``package.a.b``."""

    target: str
    line: int
    typing_only: bool


class Module(NamedTuple):
    name: str  # "airllm_nb.stream.ring", "airllm_nb.__init__"
    path: Path
    tree: ast.Module

    @property
    def room(self) -> str:
        return self.name.split(".")[1]

    def at(self, line: int) -> str:
        return f"{self.path.relative_to(self.path.parents[len(self.name.split('.')) - 1]).as_posix()}:{line}"


def read(package: Path) -> list[Module]:
    return [
        Module(
            ".".join(path.relative_to(package.parent).with_suffix("").parts), path, ast.parse(path.read_text("utf-8"))
        )
        for path in sorted(package.rglob("*.py"))
    ]


def imports(module: Module) -> Iterator[Import]:
    """Every import of the module, wherever it stands, ``importlib.import_module("literal")`` included."""

    def walk(node: ast.AST, typing_only: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            for target in _targets(module, child):
                yield Import(target, child.lineno, typing_only)
            guarded = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            yield from walk(child, typing_only or guarded)

    return walk(module.tree, False)


def _targets(module: Module, node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        above = module.name.split(".")[: -node.level] if node.level else []
        base = ".".join([*above, *([node.module] if node.module else [])])
        return [f"{base}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Call) and ast.unparse(node.func) in {
        "import_module",
        "importlib.import_module",
        "__import__",
    }:
        return [a.value for a in node.args[:1] if isinstance(a, ast.Constant) and isinstance(a.value, str)]
    return []


def resolve(modules: list[Module], target: str, homes: dict[str, str]) -> str | None:
    """The module of ours that ``target`` is or lies in. A public name counts as the module that it comes from."""
    package = modules[0].name.split(".")[0]
    if target.split(".")[0] != package:
        return None
    names = {module.name for module in modules}
    parts = target.split(".")
    if len(parts) == 2 and parts[1] in homes:
        return f"{package}.{homes[parts[1]]}"
    while len(parts) > 1:
        for name in (".".join(parts), ".".join([*parts, "__init__"])):
            if name in names:
                return name
        parts.pop()
    return f"{package}.__init__"


def upward(modules: list[Module], homes: dict[str, str]) -> list[str]:
    """Imports that point up or sideways."""
    wrong = []
    for module in modules:
        if module.room not in ALLOWED:
            wrong.append(f"{module.at(1)} is in a room that there is not: {module.room}")
            continue
        for entry in imports(module):
            found = resolve(modules, entry.target, homes)
            room = found.split(".")[1] if found else module.room
            # from .. import __version__ is anyone's: the package itself is always loaded already
            if room not in ALLOWED[module.room] | {module.room, "__init__"}:
                wrong.append(f"{module.at(entry.line)} {module.room} imports {entry.target}")
    return wrong


def strayed(modules: list[Module]) -> list[str]:
    """Libraries imported outside the room that they are kept in."""
    return [
        f"{module.at(entry.line)} imports {entry.target}, which belongs to {KEPT_IN[library]}"
        for module in modules
        for entry in imports(module)
        if (library := entry.target.split(".")[0]) in KEPT_IN
        and not module.at(0).split("/", 1)[-1].startswith(KEPT_IN[library])
    ]


def cycles(modules: list[Module], homes: dict[str, str]) -> list[str]:
    """Modules that reach themselves; imports for the type checker do not run, and the package itself is lazy."""
    edges = {
        module.name: {
            found
            for entry in imports(module)
            if not entry.typing_only and (found := resolve(modules, entry.target, homes)) not in (None, module.name)
        }
        for module in modules
        if module.room != "__init__"
    }
    found = []
    for start in edges:
        reached, frontier = set(), [start]
        while frontier:
            for target in edges.get(frontier.pop(), ()):
                if target not in reached:
                    reached.add(target)
                    frontier.append(target)
        if start in reached:
            found.append(start)
    return found


def prints(modules: list[Module]) -> list[str]:
    return [
        module.at(node.lineno)
        for module in modules
        if module.room not in ("cli", "__main__")
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]


def bypasses(modules: list[Module]) -> list[str]:
    """Files that are read past the door; a bare name other than ``open`` is a function of the door itself."""
    return [
        f"{module.at(node.lineno)} {ast.unparse(node.func)}"
        for module in modules
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Call)
        and (name := _reads(node))
        and name not in OPENS.get(module.name.removeprefix("airllm_nb."), ())
    ]


def _reads(call: ast.Call) -> str:
    of, _, name = ast.unparse(call.func).rpartition(".")
    words = [argument.value for argument in call.args if isinstance(argument, ast.Constant)]
    if (
        name not in _READS
        or (not of and name != "open")
        or (name == "open" and any(str(word)[:1] in "wax" for word in words))
        or (name == "load" and of != "json")
        or (name == "stat" and call.args and of != "os")
    ):
        return ""
    return name


def oversize(modules: list[Module]) -> list[str]:
    long = []
    for module in modules:
        lines = module.path.read_text("utf-8").count("\n")
        if lines > FILE_LINES:
            long.append(f"{module.at(lines)} file of {lines} lines")
        for node in ast.walk(module.tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                size = (node.end_lineno or node.lineno) - node.lineno + 1
                if size > FUNCTION_LINES:
                    long.append(f"{module.at(node.lineno)} {node.name} of {size} lines")
    return long


# ---- the house as it stands ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def modules() -> list[Module]:
    return read(PACKAGE)


@pytest.fixture(scope="module")
def homes() -> dict[str, str]:
    import airllm_nb

    return airllm_nb._HOMES


def test_imports_point_down(modules: list[Module], homes: dict[str, str]) -> None:
    assert upward(modules, homes) == []


def test_no_import_cycle(modules: list[Module], homes: dict[str, str]) -> None:
    assert cycles(modules, homes) == []


def test_libraries_stay_in_their_rooms(modules: list[Module]) -> None:
    assert strayed(modules) == []


def test_only_the_command_line_prints(modules: list[Module]) -> None:
    assert prints(modules) == []


def test_files_are_read_through_one_door(modules: list[Module]) -> None:
    assert bypasses(modules) == []


def test_files_and_functions_are_small(modules: list[Module]) -> None:
    assert oversize(modules) == []


# ---- the checks themselves -------------------------------------------------------------------------------------------

HOMES = {"AutoModel": "engine"}


def house(folder: Path, **sources: str) -> list[Module]:
    """A package of these modules, ``stream__ring`` for stream/ring.py, beside empty ones for them to import."""
    files = {"__init__": "", "stream__ring": "", "model__plan": "", "decode__kv": "", "config": "", "engine": ""}
    for name, source in (files | sources).items():
        path = folder / "airllm_nb" / (name.replace("__", "/") if name != "__init__" else name)
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / "__init__.py").touch()
        path.with_suffix(".py").write_text(source, "utf-8")
    return read(folder / "airllm_nb")


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("stream__ring", "from ..model.plan import x"),
        ("stream__ring", "from ..model import plan"),
        ("stream__ring", "from .. import model"),
        ("stream__ring", "import airllm_nb.engine"),
        ("stream__ring", "def f():\n    from airllm_nb import engine"),
        ("stream__ring", "from airllm_nb import AutoModel"),
        ("stream__ring", "import importlib\nimportlib.import_module('airllm_nb.engine')"),
        ("stream__ring", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..engine import x"),
        ("model__plan", "from ..decode.kv import x"),
        ("decode__kv", "from ..model.plan import x"),
        ("config", "from .stream import ring"),
        ("notebook__magics", "from ..model.plan import x"),
        ("cli", "from .notebook import magics"),
        ("helpers__misc", ""),
    ],
)
def test_an_import_that_points_up_is_found(tmp_path: Path, module: str, source: str) -> None:
    extra = {"notebook__magics": ""}
    found = upward(house(tmp_path, **extra | {module: source}), HOMES)
    assert found
    assert all(module.partition("__")[0] in line for line in found)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("model__plan", "from ..stream.ring import x\nfrom ..config import y\nfrom . import other\nimport json"),
        ("cli", "from . import __version__\nfrom .engine import x\nfrom airllm_nb import AutoModel"),
        ("stream__ring", "import airllm_nb_extras\nfrom engine import x"),
    ],
)
def test_an_import_that_points_down_is_allowed(tmp_path: Path, module: str, source: str) -> None:
    assert upward(house(tmp_path, model__other="", **{module: source}), HOMES) == []


def test_a_cycle_is_found(tmp_path: Path) -> None:
    ring = "from .unit import x"
    assert cycles(house(tmp_path / "a", stream__ring=ring, stream__unit="from . import ring"), HOMES) == [
        "airllm_nb.stream.ring",
        "airllm_nb.stream.unit",
    ]
    typing_only = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .ring import x"
    assert cycles(house(tmp_path / "b", stream__ring=ring, stream__unit=typing_only), HOMES) == []


def test_a_strayed_library_is_found(tmp_path: Path) -> None:
    lazy = "def f():\n    import matplotlib.pyplot as plt"
    found = strayed(house(tmp_path, engine=lazy, notebook__figures=lazy, model__plan="from bitsandbytes import nn"))
    assert [line.split()[0] for line in found] == ["airllm_nb/engine.py:2", "airllm_nb/model/plan.py:1"]


def test_a_print_and_a_giant_are_found(tmp_path: Path) -> None:
    giant = "def f():\n" + "    x = 1\n" * FUNCTION_LINES
    modules = house(tmp_path, engine="print(1)", cli="print(1)", config=giant, model__plan="\n" * (FILE_LINES + 1))
    assert prints(modules) == ["airllm_nb/engine.py:1"]
    assert oversize(modules) == ["airllm_nb/config.py:1 f of 61 lines", "airllm_nb/model/plan.py:301 file of 301 lines"]


@pytest.mark.parametrize(
    "line",
    ["open(path)", "open(path, 'rb')", "path.open()", "path.open('rb')", "path.read_text('utf-8')", "path.read_bytes()",
     "path.stat()", "os.stat(path)", "os.open(path, 0)", "path.iterdir()", "os.listdir(path)", "os.scandir(path)",
     "json.load(file)", "mmap.mmap(3, 0)", "np.memmap(path)", "io.open(path, 'rb')"],
)  # fmt: skip
def test_a_way_past_the_door_is_found(tmp_path: Path, line: str) -> None:
    assert [found.split()[0] for found in bypasses(house(tmp_path, engine=line))] == ["airllm_nb/engine.py:1"]


def test_what_writes_or_goes_through_the_door_is_none(tmp_path: Path) -> None:
    source = "path.open('wb')\nopen(path, 'ab')\ndisk.open_file(path)\nstatus(path)\ntorch.load(path)\nread_json(path)"
    assert bypasses(house(tmp_path, engine=source)) == []
