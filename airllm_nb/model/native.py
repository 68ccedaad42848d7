"""The native class of a model whose weights are elsewhere: what it inherits works, or is refused in one line.

Weights lie in the checkpoint, in one dtype and for one device: what would move, cast, copy, rename or replace them
would break the model later, and silently.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch
from torch import nn

from ..encoding.linear import EncodedLinear, EncodedWeight
from ..errors import OptionError
from .absent import NO_COPY, AbsentWeight
from .slices import SlicedLinear


class FixedWeights:
    """Before a native class in the bases of what runs."""

    _holds_all: bool
    _weight_names: dict[tuple[int, str], str]

    # --- where and what as

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """The model itself, if that is where and what it is."""
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        self._stay(device, dtype)
        return self

    def cuda(self, device: Any = None) -> Any:
        self._stay(torch.device("cuda", device) if isinstance(device, int) else torch.device(device or "cuda"), None)
        return self

    def cpu(self) -> Any:
        self._stay(torch.device("cpu"), None)
        return self

    def half(self, *_: Any) -> Any:
        return self.to(torch.float16)

    def float(self, *_: Any) -> Any:
        return self.to(torch.float32)

    def double(self) -> Any:
        return self.to(torch.float64)

    def bfloat16(self) -> Any:
        return self.to(torch.bfloat16)

    def type(self, dst_type: Any) -> Any:
        return self.to(dst_type)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """What wrappers come by, PEFT's say, when they are moved."""
        stay(self, fn)
        return self

    def share_memory(self) -> NoReturn:
        refuse_to_move()

    def _stay(self: Any, device: torch.device | None, dtype: torch.dtype | None) -> None:
        here: torch.device = self.device
        if device is not None and (device.type != here.type or device.index not in (None, here.index)):
            refuse_to_move(f"device={str(device)!r}")
        if dtype is not None and dtype != self.dtype:
            refuse_to_move(f"dtype={str(dtype).removeprefix('torch.')!r}")

    # --- copies

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Also what ``copy.copy``, ``copy.deepcopy`` and ``torch.save`` call."""
        raise OptionError(NO_COPY)

    # --- other weights

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self._if_native("load_state_dict", "open the checkpoint that holds those weights")(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Weights that stream are read when they are used."""
        if "destination" in kwargs:  # a wrapper's: what it looks for is its own
            return super().state_dict(*args, **kwargs)  # type: ignore[misc]
        return self._if_plain("state_dict", "its weights are in the checkpoint's files")(*args, **kwargs)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        return self._if_native("save_pretrained", "copy the checkpoint's folder (model.folder)")(*args, **kwargs)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        return self._if_native("push_to_hub", "upload the checkpoint's folder (model.folder)")(*args, **kwargs)

    def set_input_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        return self._if_native("set_input_embeddings", "change the checkpoint")(*args, **kwargs)

    def set_output_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        return self._if_native("set_output_embeddings", "change the checkpoint")(*args, **kwargs)

    def resize_token_embeddings(self: Any, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:
        if new_num_tokens in (None, self.get_input_embeddings().num_embeddings) and not (args or kwargs):
            return self.get_input_embeddings()
        resize = self._if_native("resize_token_embeddings", "resize the checkpoint with transformers")
        return resize(new_num_tokens, *args, **kwargs)

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> Any:
        enable = self._if_native("gradient_checkpointing_enable", "weights that stream cannot be trained through")
        return enable(*args, **kwargs)

    def add_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise OptionError("add_adapter is not for a streamed model; for a new adapter use peft.get_peft_model(model, "
                          "config), for a trained one open the model with adapter=FOLDER")  # fmt: skip

    def load_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise OptionError("load_adapter is not for a streamed model; open the model with adapter=FOLDER, or use "
                          "peft.PeftModel.from_pretrained(model, FOLDER)")  # fmt: skip

    def _if_native(self, name: str, remedy: str) -> Callable[..., Any]:
        if not self._holds_all:
            raise OptionError(f"{name} is refused, as weights of this model stream; {remedy}, or load the model with "
                              "budgets that hold all of it")  # fmt: skip
        return self._if_plain(name, remedy)

    def _if_plain(self: Any, name: str, remedy: str) -> Callable[..., Any]:
        modules: list[nn.Module] = list(self.modules())
        if any(isinstance(each, SlicedLinear) or _packed(each) for each in modules):
            raise OptionError(f"{name} is refused, as weights of this model are packed or in slices; {remedy}")
        return getattr(super(), name)  # type: ignore[no-any-return]

    # --- how many

    def num_parameters(self: Any, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """As of the model in transformers: tied weights once, packed ones as what they are unpacked."""
        modules: list[nn.Module] = list(self.modules())
        # Slices of a matrix that is a table too: the table counts.
        tied = {id(part) for each in modules if isinstance(each, SlicedLinear) and each.is_tied for part in each.slices}
        counted: dict[Any, tuple[int, bool]] = {}
        for module in modules:
            is_left_out = exclude_embeddings and isinstance(module, nn.Embedding)
            for name, weight, size in _sizes(module):
                if name == "weight" and id(module) in tied:
                    continue
                counts = not is_left_out and (weight.requires_grad or not only_trainable)
                # Of tied weights one may be bound, and one elsewhere.
                counted.setdefault(self._weight_names.get((id(module), name), id(weight)), (size, counts))
        return sum(size for size, counts in counted.values() if counts)

    def get_memory_footprint(self: Any, return_buffers: bool = True) -> int:
        """Bytes of all weights as they are computed with, packed or plain, wherever they are."""
        found: dict[Any, int] = {}
        for module in self.modules():
            for name, each in module._parameters.items():
                if each is not None:
                    key = self._weight_names.get((id(module), name), id(each))
                    found.setdefault(key, each.nelement() * each.element_size())
        buffers = self.buffers() if return_buffers else ()
        return sum(found.values()) + sum(each.nelement() * each.element_size() for each in buffers)


def _packed(module: nn.Module) -> list[EncodedWeight]:
    return [value for value in vars(module).values() if isinstance(value, EncodedWeight)]


def _sizes(module: nn.Module) -> Iterator[tuple[str, torch.Tensor, int]]:
    """Name, what stands for it, and size, of each weight that a module of transformers would have here."""
    own = {name: each for name, each in module._parameters.items() if each is not None}
    if isinstance(module, EncodedLinear):
        yield "weight", own["weight"], module.in_features * module.out_features
        own = {name: each for name, each in own.items() if name == "bias"}
    elif isinstance(module, nn.Embedding) and hasattr(module, "row_encoding"):
        yield "weight", own.pop("weight"), module.num_embeddings * module.embedding_dim
    else:
        for view in _packed(module):
            parts = view.parts
            yield "weight", parts["weight"], view.numel()
            own = {name: each for name, each in own.items() if not any(each is part for part in parts.values())}
    for name, each in own.items():
        yield name, each, each.numel()


def refuse_to_move(option: str = "device=… or dtype=…") -> NoReturn:
    raise OptionError("a streamed model, or a part of it, cannot be moved, cast or emptied after it is loaded; load it "
                      f"with {option}")  # fmt: skip


def stay(model: Any, fn: Callable[[torch.Tensor], Any]) -> None:
    """Refuse what ``fn`` does to every tensor, unless it leaves tensors like the model's as they are."""
    probe = torch.empty(1, dtype=model.dtype, device=model.device)
    if fn(probe) is not probe or probe.is_shared() != probe.is_cuda:
        refuse_to_move()


def fix_parts(model: Any) -> None:
    """Parts whose weights are elsewhere refuse what the whole refuses."""

    def fixed(module: nn.Module) -> Callable[..., nn.Module]:
        def apply(fn: Any, recurse: bool = True) -> nn.Module:
            stay(model, fn)
            return module

        return apply

    for module in model.modules():
        if module is not model and any(isinstance(each, AbsentWeight) for each in module.parameters()):
            module.__dict__["_apply"] = fixed(module)
