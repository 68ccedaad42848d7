"""Runs a step once so that it can be replayed: on a GPU, as a CUDA graph."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Recorded(NamedTuple):
    """A step that was recorded.

    Attributes
    ----------
    output
        What it returned: tensors that each replay fills anew.
    replay
        Does it again.
    nbytes
        Device memory that it keeps.
    """

    output: Any
    replay: Callable[[], None]
    nbytes: int


Record = Callable[[Callable[[], Any]], Recorded]


class HostWaitError(RuntimeError):
    """An operation waits for the device, or brings something from the host: it cannot be replayed."""


aten = torch.ops.aten
# Their results, or the sizes of those, are numbers of the host.
_WAITS = {
    aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.is_nonzero, aten._unique2,
    aten.unique_consecutive, aten.unique_dim, aten.bincount,
}  # fmt: skip
_INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
_MODE = "thread_local"  # other threads go on meanwhile
_COPIES = {aten._to_copy, aten.copy_, aten.copy}


class NoHostWaits(TorchDispatchMode):
    """Within it, an operation that would break a recording raises before it does: a broken one costs more to end."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        if packet in _WAITS or (packet is aten.repeat_interleave and func is aten.repeat_interleave.Tensor):
            raise HostWaitError(str(func))
        if packet in _INDEXED and any(_is_mask(each) for each in args[1]):
            raise HostWaitError(f"{func} by a mask")
        output = func(*args, **(kwargs or {}))
        if (
            packet in _COPIES
            and len({each.device.type for each in tree_leaves((args, output)) if _is_tensor(each)}) > 1
        ):
            raise HostWaitError(f"{func} between devices")
        return output


class NumbersOnDevice(TorchFunctionMode):
    """Within it, ``torch.tensor(number, device=…)`` fills memory there, and copies nothing from the host."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.tensor and len(args) == 1 and isinstance(args[0], (bool, int, float)):
            return torch.full((), args[0], **kwargs)
        return func(*args, **kwargs)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _is_mask(index: Any) -> bool:
    return _is_tensor(index) and index.dtype in (torch.bool, torch.uint8)


def recorder(device: torch.device) -> Record | None:
    """What records on ``device``; ``None`` where nothing does."""
    return _on_cuda if device.type == "cuda" else None


def _on_cuda(run: Callable[[], Any]) -> Recorded:
    """On the current device."""
    _forget_workspaces()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before, graph = torch.cuda.memory_reserved(), torch.cuda.CUDAGraph()
    try:
        # A stream of this device: by default all records of a process have one, of the first device.
        with torch.cuda.graph(graph, stream=torch.cuda.Stream(), capture_error_mode=_MODE):
            output = run()
    except BaseException:
        # One that broke leaves the random numbers of the device as those of a recording; one that ends well clears it.
        with contextlib.suppress(Exception):
            stream = torch.cuda.Stream()
            with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream, capture_error_mode=_MODE):
                torch.zeros(1, device="cuda")
        raise
    finally:
        _forget_workspaces()
    return Recorded(output, graph.replay, torch.cuda.memory_reserved() - before)


def _forget_workspaces() -> None:
    """One that was taken while something is recorded is the record's alone."""
    if forget := getattr(torch._C, "_cuda_clearCublasWorkspaces", None):
        forget()
