"""What a module's forward does with its children, read from its source: which it calls, in what order, whose weights
it takes without calling them, and which only images or sound need.

Weights are bound by hooks on ``forward``, so all of it matters: a schedule in the order of use is never left, and
weights that are taken must be bound with whoever takes them. A guess that is wrong costs time and no more, see
:mod:`~airllm_nb.model.absent`.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

from torch import nn

from ..encoding.linear import EncodedWeight

# What may be asked of a weight that is not here.
_OF_META = frozenset({"dtype", "device", "shape", "size", "dim", "ndim", "is_floating_point"})
# Functions that look at a module and run nothing.
_LOOKS = frozenset({"hasattr", "isinstance", "issubclass", "callable", "type", "id", "len"})
# Arguments that text alone does not come with.
_NOT_TEXT = re.compile(
    "pixel|image|video|audio|vision|speech|input_features|^mm_|^encoder_hidden_states$|^cross_attention_states$"
)
# Transformers' and torch's own classes hold no layers.
_FOREIGN = ("torch.", "transformers.modeling_utils", "transformers.generation", "transformers.modeling_layers")
# What is analysed once for all modules alike; larger trees are met once.
_LARGEST_KEPT = 64


@dataclass
class Calls:
    """What a forward does; paths are dotted, from its module down.

    Attributes
    ----------
    order
        Its own children by their first use.
    taken
        Modules below whose matrices are read outside of their own forward.
    bypassed
        Modules below that run by another method than forward, which no hook sees.
    optional
        Its own children that only arguments beside text use.
    """

    order: list[str] = field(default_factory=list)
    taken: set[str] = field(default_factory=set)
    bypassed: set[str] = field(default_factory=set)
    optional: set[str] = field(default_factory=set)


_known: dict[Any, Calls] = {}


def calls_of(module: nn.Module) -> Calls:
    """What ``module``'s forward does with what lies below it."""
    below = tuple((name, type(each)) for name, each in module.named_modules())
    if len(below) > _LARGEST_KEPT:
        return _read(module)
    if below not in _known:
        _known[below] = _read(module)
    return _known[below]


def mark_taken(model: nn.Module) -> None:
    """Give every module whose matrices are read outside of its own forward an attribute ``reads_weight``."""
    for module in model.modules():
        for path in calls_of(module).taken:
            module.get_submodule(path).reads_weight = True  # type: ignore[assignment]


def in_order_of_use(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """``module.named_children()``, those that its forward names in the order in which it does."""
    children, order = dict(module.named_children()), calls_of(module).order
    used = iter([name for name in order if name in children])
    for name in children:
        name = next(used) if name in order else name
        yield name, children[name]


def is_gatherable(module: nn.Embedding) -> bool:
    """Whether its forward takes ids and nothing else; learned positions take masks and offsets instead."""
    native = type(module).forward is nn.Embedding.forward
    return native or [*inspect.signature(module.forward).parameters] in (["input"], ["input_ids"])


def _read(module: nn.Module) -> Calls:
    reader = _Reader(module)
    reader.read(_Scope(module, "", None), "forward")
    always = set(reader.always)
    return Calls(
        list(dict.fromkeys(reader.order)), reader.taken, reader.bypassed,
        {name for name in reader.order if name not in always},
    )  # fmt: skip


@dataclass
class _Scope:
    """A method that is read: ``self`` in it, its path from the root, the class that defines it, its local names."""

    module: nn.Module
    path: str
    owner: type | None
    optional: bool = False
    names: dict[str, tuple[nn.Module, str]] = field(default_factory=dict)


class _Reader:
    """Follows the source of methods from one module down."""

    def __init__(self, root: nn.Module):
        self._root = root
        self._seen: set[tuple[int, FunctionType, bool]] = set()
        self.order: list[str] = []
        self.always: list[str] = []
        self.taken: set[str] = set()
        self.bypassed: set[str] = set()

    def read(self, scope: _Scope, method: str) -> bool:
        """Follow a method; whether there is one."""
        found = _find(type(scope.module), method, scope.owner)
        if found is None:
            return False
        key = (id(scope.module), found[1], scope.optional)
        if key not in self._seen:
            self._seen.add(key)
            inner = _Scope(scope.module, scope.path, found[0], scope.optional)
            for statement in _parse(found[1]):
                self._visit(statement, inner)
        return True

    def _visit(self, node: ast.AST, scope: _Scope) -> None:
        """In the order of evaluation: what a call is made with comes before the call."""
        if isinstance(node, (ast.If, ast.IfExp)):
            self._visit(node.test, scope)
            given, absent = _says_given(node.test), _compares(node.test, ast.Is)
            self._visit_all(node.body, scope, given)
            self._visit_all(node.orelse, scope, absent)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _LOOKS:
            return
        elif isinstance(node, ast.Call):
            for argument in [*node.args, *(keyword.value for keyword in node.keywords)]:
                if not self._chain(argument, scope, handed=True):
                    self._visit(argument, scope)
            if _is_super(node.func):
                self.read(_Scope(scope.module, scope.path, scope.owner, scope.optional), node.func.attr)  # type: ignore[attr-defined]
            elif not self._chain(node.func, scope, called=True):
                self._visit(node.func, scope)
        elif isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            self._assign(node.targets[0].id, node.value, scope)
        elif not self._chain(node, scope):
            for child in ast.iter_child_nodes(node):
                self._visit(child, scope)

    def _visit_all(self, nodes: Any, scope: _Scope, optional: bool) -> None:
        before, scope.optional = scope.optional, scope.optional or optional
        for node in nodes if isinstance(nodes, list) else [nodes]:
            self._visit(node, scope)
        scope.optional = before

    def _assign(self, name: str, value: ast.AST, scope: _Scope) -> None:
        at, path, rest = _descend(scope, _dotted(value))
        scope.names.pop(name, None)
        if at is None or rest:
            self._visit(value, scope)
        elif at is not scope.module:
            scope.names[name] = (at, path)

    def _chain(self, node: ast.AST, scope: _Scope, *, called: bool = False, handed: bool = False) -> bool:
        """Take in ``self.a.b.c`` or ``alias.c``; ``False`` if it is something else."""
        at, path, rest = _descend(scope, _dotted(node))
        if at is None:
            return False
        weight = _weight(at, rest[0]) if rest else None
        is_weight = weight is not None
        if is_weight and len(rest) > 1 and rest[1] in _OF_META:
            return True
        runs = called and len(rest) == 1 and not is_weight
        if path and (is_weight or runs or not rest):
            child = path.partition(".")[0]
            self.order.append(child)
            if not scope.optional:
                self.always.append(child)
        if is_weight:
            if path and weight is not None and weight.dim() > 1:
                self.taken.add(path)
        elif handed and not rest and path and _has_matrix(at):
            self.taken.add(path)
        elif runs:
            self._run(at, path, rest[0], scope.optional)
        return True

    def _run(self, at: nn.Module, path: str, method: str, optional: bool) -> None:
        """Another method than forward."""
        taken = len(self.taken)
        if (
            self.read(_Scope(at, path, None, optional), method)
            and path
            and (
                # One that uses nothing below, a property as it were, is no matter.
                len(self.taken) > taken or self._used_by(at, method)
            )
        ):
            self.bypassed.add(path)

    @staticmethod
    def _used_by(at: nn.Module, method: str) -> list[str]:
        inner = _Reader(at)
        inner.read(_Scope(at, "", None), method)
        return inner.order


def _descend(scope: _Scope, names: list[str]) -> tuple[nn.Module | None, str, list[str]]:
    """The module that dotted names lead to, its path from the root, and the names that are left."""
    if not names:
        return None, "", []
    at, path = (scope.module, scope.path) if names[0] == "self" else scope.names.get(names[0], (None, ""))
    rest = names[1:]
    while at is not None and rest and at._modules.get(rest[0]) is not None:
        at, path, rest = at._modules[rest[0]], f"{path}.{rest[0]}" if path else rest[0], rest[1:]
    return at, path, rest


def _dotted(node: ast.AST) -> list[str]:
    """``["self", "a", "b"]`` of ``self.a.b``; nothing of anything else."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return [node.id, *reversed(names)] if isinstance(node, ast.Name) else []


def _weight(at: nn.Module, name: str) -> Any:
    """A weight of a module by its attribute, one that lies packed included."""
    found = at._parameters.get(name)
    found = at.__dict__.get(name) if found is None else found
    return found if isinstance(found, (nn.Parameter, EncodedWeight)) else None


def _has_matrix(at: nn.Module) -> bool:
    return any(found.dim() > 1 for name in (*at._parameters, *at.__dict__) if (found := _weight(at, name)) is not None)


def _says_given(test: ast.AST) -> bool:
    """``pixel_values is not None`` or ``isinstance(pixel_values, …)``, also among several conditions."""
    if isinstance(test, ast.BoolOp):
        return (any if isinstance(test.op, ast.And) else all)(map(_says_given, test.values))
    if isinstance(test, ast.Call) and isinstance(test.func, ast.Name) and test.func.id == "isinstance":
        return _is_not_text(test.args[0])
    return _compares(test, ast.IsNot)


def _compares(test: ast.AST, operator: type) -> bool:
    return isinstance(test, ast.Compare) and isinstance(test.ops[0], operator) and _is_not_text(test.left)


def _is_not_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and bool(_NOT_TEXT.search(node.id))


def _is_super(node: ast.AST) -> bool:
    call = node.value if isinstance(node, ast.Attribute) else None
    return isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "super"


def _find(kind: type, method: str, after: type | None) -> tuple[type, FunctionType] | None:
    """Who defines a method, and the method; ``after`` a class, as ``super()`` there finds it."""
    order = list(kind.__mro__)
    for owner in order[order.index(after) + 1 if after else 0 :]:
        if method in owner.__dict__ and not owner.__module__.startswith(_FOREIGN):
            function = _written(owner.__dict__[method], method)
            return (owner, function) if function else None
    return None


def _written(function: Any, name: str) -> FunctionType | None:
    """The function of that name below its decorators; some leave no other trace of it than their closure."""
    function = inspect.unwrap(function)
    if not isinstance(function, FunctionType) or function.__name__ == name:
        return function if isinstance(function, FunctionType) else None
    held = [cell.cell_contents for cell in function.__closure__ or ()]
    return next((found for each in held if callable(each) and (found := _written(each, name))), None)


@functools.cache
def _parse(function: FunctionType) -> tuple[ast.stmt, ...]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):  # no source is installed
        return ()
    return tuple(getattr(tree.body[0], "body", ()))
