"""What stands in a module for a weight that is elsewhere, and fetches it for whoever computes with it all the same.

Weights are there while their module's forward runs. Some code reads them at other times, and arguments beside text use
modules that nothing else does; on ``meta`` such a computation would give garbage, here it gives what it should, slowly.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from ..checkpoint.index import TensorInfo
from ..stream.mapped import MappedFiles

log = logging.getLogger(__name__)

# Answered without the weight.
_OF_META = {
    "size", "dim", "stride", "numel", "nelement", "element_size", "is_floating_point", "is_complex", "requires_grad_",
    "__repr__", "__hash__", "__len__", "type", "is_contiguous",
}  # fmt: skip
_FETCHED = ("data", "T", "mT", "H", "mH", "real", "imag")


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

    def __new__(
        cls, meta: torch.Tensor, info: TensorInfo, stored_dtype: torch.dtype, device: torch.device, dtype: torch.dtype
    ) -> AbsentWeight:
        made = torch.Tensor._make_subclass(cls, meta.detach(), False)
        made._info, made._stored_dtype, made._home, made._wanted, made._seen = info, stored_dtype, device, dtype, False
        return made

    def __init__(self, *_: Any):
        """All is done in ``__new__``."""

    def fetch(self) -> torch.Tensor:
        """The weight itself, a copy on the device."""
        if not self._seen:
            log.info("%s is used outside of its module and read each time", self._info.name)
            self._seen = True
        files = MappedFiles()
        try:
            return files.tensor(self._info, self._stored_dtype).to(self._home, self._wanted, copy=True)
        finally:
            files.close()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if name == "__get__":
                # The getter of a property; its own name is that of the property.
                wanted = getattr(func.__self__, "__name__", "")
                if wanted == "device":
                    return args[0]._home
                if wanted not in _FETCHED:
                    return func(*args, **kwargs)
            elif name in _OF_META:
                return func(*args, **kwargs)
            return func(*tree_map(_fetched, args), **tree_map(_fetched, kwargs))


def _fetched(value: Any) -> Any:
    return value.fetch() if isinstance(value, AbsentWeight) else value
