"""What stands in a module for a weight that is elsewhere, and fetches it for whoever computes with it all the same.

Weights are there while their module's forward runs. Some code reads them at other times, and arguments beside text use
modules that nothing else does; on ``meta`` such a computation would give garbage, here it gives what it should, slowly.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import OptionError
from ..stream.mapped import MappedFiles
from ..tensors.files import Unchanged
from ..tensors.index import TensorInfo

log = logging.getLogger(__name__)

NO_COPY = ("a streamed model cannot be copied or pickled: its weights are in its checkpoint; open it again with "
           "AutoModel.from_pretrained, or pass the same object on")  # fmt: skip
NO_TRAINING = ("weights that stream cannot be trained through; load the model with budgets that hold all of it "
               "(model.plan says what streams), without compression, or compute under torch.no_grad()")  # fmt: skip
# Answered without the weight.
_OF_META = {
    "size", "dim", "stride", "numel", "nelement", "element_size", "is_floating_point", "is_complex", "requires_grad_",
    "__repr__", "__hash__", "__len__", "type", "is_contiguous",
}  # fmt: skip
_FETCHED = ("T", "mT", "H", "mH", "real", "imag")
# It is itself whatever is done to it without computing.
_ITSELF = ("data", "detach")
_ADDRESSES = {"data_ptr", "untyped_storage", "storage", "_typed_storage", "__cuda_array_interface__"}
_SETTABLE = ("requires_grad", "grad")


class AbsentWeight(nn.Parameter):
    """A parameter on ``meta`` that is read from its file in every operation that takes it.

    Parameters
    ----------
    meta
        Its shape and dtype, as compute wants it.
    info, stored_dtype
        Where it lies, and what as.
    device, dtype
        Of compute.
    """

    _info: TensorInfo
    _stored_dtype: torch.dtype
    _home: torch.device
    _wanted: torch.dtype
    _seen: bool
    _kept: torch.Tensor | None
    _is_alias: bool

    def __new__(
        cls, meta: torch.Tensor, info: TensorInfo, stored_dtype: torch.dtype, device: torch.device, dtype: torch.dtype
    ) -> AbsentWeight:
        made = torch.Tensor._make_subclass(cls, meta.detach(), False)
        made._info, made._stored_dtype, made._home, made._wanted, made._seen = info, stored_dtype, device, dtype, False
        made._kept, made._is_alias = None, False
        return made

    def alias(self) -> AbsentWeight:
        """Another that stands for the same, as ``detach`` gives it: asked for an address, it keeps a copy."""
        with torch._C.DisableTorchFunctionSubclass():
            made = AbsentWeight(self, self._info, self._stored_dtype, self._home, self._wanted)
        made._is_alias = True
        return made

    def __init__(self, *_: Any):
        """All is done in ``__new__``."""

    def fetch(self) -> torch.Tensor:
        """The weight itself, a copy on the device."""
        if self._kept is not None:
            return self._kept
        if not self._seen:
            log.info("%s is used outside of its module and read each time", self._info.name)
            self._seen = True
        files, sources = MappedFiles(), Unchanged(extent.path for extent in self._info.extents)
        try:
            read = files.tensor(self._info, self._stored_dtype).to(self._home, self._wanted, copy=True)
        finally:
            files.close()
        sources.check_pages()
        return read

    def is_same(self, other: torch.Tensor) -> bool:
        """Whether ``other`` has the same numbers: a state that is loaded may hold weights that were not changed."""
        return self.shape == other.shape and bool(torch.equal(self.fetch(), other.to(self._home, self._wanted)))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled, it is what it stands for."""
        return self.fetch().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> nn.Parameter:
        return nn.Parameter(self.fetch(), requires_grad=False)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if name in ("__get__", "__set__"):
                # A property; its own name is that of what it gets.
                wanted = getattr(func.__self__, "__name__", "")
                if name == "__set__" and wanted not in _SETTABLE:
                    raise edited(args[0])
                if wanted == "device":
                    return args[0]._home
                if wanted in _ITSELF:
                    return args[0].alias()
                if wanted not in _FETCHED:
                    return func(*args, **kwargs)
            elif name in _OF_META:
                return func(*args, **kwargs)
            elif name in _ITSELF:
                return args[0].alias()
            elif name in _ADDRESSES:
                if not args[0]._is_alias:
                    raise OptionError(f"{args[0]._info.name} has no address: it streams, and is read when it is used; "
                                      "take a .clone() of it")  # fmt: skip
                args[0]._kept = args[0].fetch()
            return _read(cls, func, name, args, kwargs)


class ReadCopy(torch.Tensor):
    """What was read of an absent weight: to compute with, as a change of it would be lost."""

    _info: TensorInfo

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if name == "__get__" or name in _OF_META or name in _ADDRESSES:
                return func(*args, **kwargs)
            return _read(cls, func, name, args, kwargs)


def edited(weight: Any) -> OptionError:
    """That a streamed weight was changed, in one line."""
    name = weight if isinstance(weight, str) else weight._info.name
    return OptionError(f"{name} streams, so a change of it would be lost; load the model with budgets that hold all of "
                       "it (model.plan says what streams), or change a .clone() of it")  # fmt: skip


def _read(cls: Any, func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """``func`` on the weights themselves; what shares their memory cannot be changed, nor can they."""
    changed = [kwargs.get("out")]
    if (name.endswith("_") and not name.endswith("__")) or name == "__setitem__" or name in _IN_PLACE:
        changed += [*args[:1], kwargs.get("tensor"), kwargs.get("input")]
    for each in tree_leaves(changed):
        if isinstance(each, cls):
            if func is torch.Tensor.copy_ and isinstance(each, AbsentWeight) and each.is_same(args[1]):
                return each
            raise edited(each)
    infos: dict[int, TensorInfo] = {}

    def real(value: Any) -> Any:
        if not isinstance(value, cls):
            return value
        tensor = value.fetch() if isinstance(value, AbsentWeight) else value.as_subclass(torch.Tensor)
        infos[tensor.untyped_storage().data_ptr()] = value._info
        return tensor

    def sealed(value: Any) -> Any:
        if type(value).__name__ == "ndarray" and type(value).__module__ == "numpy":
            value.setflags(write=False)
        if type(value) is torch.Tensor and value.layout == torch.strided:
            info = infos.get(value.untyped_storage().data_ptr())
            if info is not None:
                value = value.as_subclass(ReadCopy)
                value._info = info
        return value

    return tree_map(sealed, func(*tree_map(real, args), **tree_map(real, kwargs)))


_IN_PLACE = {f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor",
                                         "matmul", "lshift", "rshift")}  # fmt: skip
