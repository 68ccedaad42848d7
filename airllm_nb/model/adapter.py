"""Puts a LoRA adapter on a skeleton, unmerged: hooks add ``scale · B(A x)`` to what the adapted modules give.

The base weights stay as they lie, whatever their format. A and B are few and stay on the device: they are weights
like norms, bound by the executor, and belong to modules of their own that are not in the model's tree.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ..checkpoint.lora.adapter import Adapter, Pair, read_adapter
from ..config import LoadOptions
from ..encoding.linear import EncodedLinear
from ..errors import CheckpointError, UnsupportedModelError
from ..progress import ProgressCallback, silent
from ..tensors.index import TensorInfo
from .skeleton import Weight, kept_in_float32

log = logging.getLogger(__name__)


class LoraDelta(nn.Module):
    """What an adapter adds to one linear layer: ``[..., in_features]`` → ``[..., out_features]``.

    Parameters
    ----------
    scale
        alpha / r, or alpha / √r.
    has_bias
        Whether B adds a bias.
    """

    a: torch.Tensor
    b: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, scale: float, has_bias: bool = False):
        super().__init__()
        self.scale = scale
        for name in ("a", "b", *(["bias"] if has_bias else [])):
            self.register_parameter(name, nn.Parameter(torch.empty(0, device="meta"), requires_grad=False))
        if not has_bias:
            self.register_parameter("bias", None)

    def put_on(self, module: nn.Module) -> None:
        module.register_forward_hook(self._add, with_kwargs=True)

    def _add(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> torch.Tensor:
        x = args[0] if args else next(iter(kwargs.values()))
        return self._added(functional.linear(x.to(self.a.dtype), self.a), output)

    def _added(self, low: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """``output + scale · B(low)``, with ``low`` of shape ``[..., rank]``."""
        if self.bias is not None or output.dtype != self.b.dtype or not output.is_contiguous():
            high = functional.linear(low, self.b, self.bias)
            return output.add_(high.to(output.dtype), alpha=self.scale)
        # One product that adds to what is there: no second tensor of the output's size.
        output.view(-1, output.shape[-1]).addmm_(low.reshape(-1, low.shape[-1]), self.b.t(), alpha=self.scale)
        return output


class EmbeddingDelta(LoraDelta):
    """The same for an embedding: a column of A for each id."""

    def put_on(self, module: nn.Module) -> None:
        # Before the hooks that bind only some rows, which number the ids anew.
        module.register_forward_pre_hook(self._keep, with_kwargs=True)
        module.register_forward_hook(self._add, with_kwargs=True)

    def _keep(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        (self._ids,) = (*args, *kwargs.values())

    def _add(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> torch.Tensor:
        ids, self._ids = self._ids, None
        low = self.a.index_select(1, ids.reshape(-1).to(self.a.device)).t().view(*ids.shape, -1)
        # Some tables scale their rows; what is added counts as part of the row.
        factor = getattr(module, "embed_scale", None)
        return self._added(low if factor is None else low * torch.as_tensor(factor).to(low), output)


def open_adapter(
    skeleton: Any, options: LoadOptions, *, progress: ProgressCallback = silent, weights: bool = True
) -> Adapter | None:
    """The adapter that ``options`` name, if any, once it is known to fit: say so before the model is downloaded.

    Parameters
    ----------
    skeleton
        A model on ``meta``, before anything on it is compressed or packed.
    weights
        As of :func:`~airllm_nb.checkpoint.lora.adapter.read_adapter`, whose errors come through here too.

    Raises
    ------
    CheckpointError
        If a module that it adapts is not in the model, or is of another shape.
    UnsupportedModelError
        If a module is no linear layer and no embedding.
    """
    if options.adapter is None:
        return None
    adapter = read_adapter(options.adapter, options, progress=progress, weights=weights)
    for pair, path, module in _targets(skeleton, adapter):
        _check(adapter, pair, path, module)
    _native_names(skeleton, adapter, _modules_of_weights(adapter))
    return adapter


def replace_weights(skeleton: Any, adapter: Adapter | None, tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """``tensors`` with the adapter's own weights (``modules_to_save``, biases) in the place of the base model's.

    Call it before large matrices are sliced. A module that the adapter has for itself is no longer tied.

    Raises
    ------
    UnsupportedModelError
        If the base model has one of them compressed, or a file of the adapter cannot be streamed.
    CheckpointError
        If one of them is of no module here, or of another shape.
    """
    found = dict(tensors)
    if adapter is None:
        return found
    modules = _native_names(skeleton, adapter, _modules_of_weights(adapter))
    for name, info in adapter.weights.items():
        module_name, _, attribute = name.rpartition(".")
        path = modules[module_name]
        module = skeleton.get_submodule(path)
        native, tensor = f"{path}.{attribute}", module._parameters.get(attribute)
        is_packed = attribute in vars(module) or (
            attribute != "bias" and (isinstance(module, EncodedLinear) or hasattr(module, "row_encoding"))
        )
        if is_packed:
            shape = getattr(module, "out_features", info.shape[0]), getattr(module, "in_features", info.shape[1])
        elif tensor is None:
            raise CheckpointError(f"the adapter {adapter.name} has a {attribute} for {path}, which has none in "
                                  f"{type(skeleton).__name__}; it belongs to another model{_of(adapter)}")  # fmt: skip
        else:
            shape = tuple(tensor.shape)
        if tuple(info.shape) != shape:
            raise CheckpointError(f"the adapter {adapter.name} has {native} of shape {list(info.shape)}, the model's "
                                  f"is {list(shape)}; save the base model as it was trained{_of(adapter)} (with its "
                                  "resized vocabulary) and load that")  # fmt: skip
        if is_packed and name in adapter.copies:
            log.info("the adapter %s holds a copy of %s, which is left out: the model's own is packed",
                     adapter.name, native)  # fmt: skip
            continue
        if is_packed:
            raise UnsupportedModelError(f"the adapter {adapter.name} replaces {native}, which is packed or compressed "
                                        "here; load the uncompressed model")  # fmt: skip
        _replace(skeleton, adapter, module, native, replace(info, name=native), found)
    return found


def _replace(
    skeleton: Any, adapter: Adapter, module: nn.Module, native: str, info: TensorInfo, found: dict[str, TensorInfo]
) -> None:
    """Put ``info`` under its name, and under all names of a tied weight that stays tied."""
    path, _, attribute = native.rpartition(".")
    tensor = module._parameters[attribute]
    tied = [
        f"{name}.{other}" if name else other
        for name, each in skeleton.named_modules()
        for other, parameter in each._parameters.items()
        if parameter is tensor and each is not module
    ]
    is_own = path.endswith(adapter.own) if adapter.own else False
    if not tied or not is_own:
        found.update({name: replace(info, name=name) for name in (native, *tied)})
        return
    if adapter.keeps_ties:
        raise UnsupportedModelError(f"the adapter {adapter.name} has a {native} that stays tied to {tied[0]} "
                                    "(ensure_weight_tying); merge it into its base model (peft: merge_and_unload) and "
                                    "load that folder")  # fmt: skip
    shared = next(found[name] for name in (*tied, native) if name in found)
    found.update({name: found.get(name, replace(shared, name=name)) for name in tied})
    found[native] = info
    assert tensor is not None
    module._parameters[attribute] = nn.Parameter(tensor.detach().clone(), requires_grad=False)


def attach(skeleton: Any, adapter: Adapter | None, dtype: torch.dtype) -> list[Weight]:
    """Put the adapter on the modules that it adapts; call it once the modules are what runs, packed and sliced.

    Returns
    -------
    list of Weight
        A, B and bias of each: small weights, to be resident in ``dtype`` wherever compute runs.
    """
    if adapter is None:
        return []
    exact, weights = kept_in_float32(skeleton, dtype), []
    for pair, path, module in _targets(skeleton, adapter):
        kind = EmbeddingDelta if pair.is_embedding else LoraDelta
        delta = kind(pair.scale, pair.bias is not None)
        wanted = torch.float32 if exact(path) else dtype
        for attribute, info in (("a", pair.a), ("b", pair.b), ("bias", pair.bias)):
            if info is None:
                continue
            empty = nn.Parameter(torch.empty(info.shape, dtype=wanted, device="meta"), requires_grad=False)
            delta._parameters[attribute] = empty
            weights.append(Weight(f"{path}.lora_{attribute}", info, wanted, [(delta, attribute)], empty))
        delta.put_on(module)
    log.info("adapter %s%s", adapter, _of(adapter))
    return weights


def _targets(skeleton: Any, adapter: Adapter) -> list[tuple[Pair, str, nn.Module]]:
    names = _native_names(skeleton, adapter, [pair.module for pair in adapter.pairs])
    return [(pair, names[pair.module], skeleton.get_submodule(names[pair.module])) for pair in adapter.pairs]


def _modules_of_weights(adapter: Adapter) -> list[str]:
    return [name.rpartition(".")[0] for name in adapter.weights]


def _check(adapter: Adapter, pair: Pair, path: str, module: nn.Module) -> None:
    if pair.is_embedding and isinstance(module, nn.Embedding):
        inputs, outputs = module.num_embeddings, module.embedding_dim
    elif not pair.is_embedding and not isinstance(module, nn.Embedding):
        # transformers' Conv1D has other names for the same.
        inputs = getattr(module, "in_features", getattr(module, "nx", None))
        outputs = getattr(module, "out_features", getattr(module, "nf", None))
    else:
        inputs = outputs = None
    if inputs is None or outputs is None:
        raise UnsupportedModelError(f"the adapter {adapter.name} adapts {path}, a {type(module).__name__} here; only "
                                    "linear layers and embeddings can be adapted unmerged")  # fmt: skip
    if (pair.a.shape[1], pair.b.shape[0]) != (inputs, outputs):
        raise CheckpointError(f"the adapter {adapter.name} adapts {path} as a layer of {pair.a.shape[1]} inputs and "
                              f"{pair.b.shape[0]} outputs, but it has {inputs} and {outputs}: the adapter belongs to "
                              f"another model{_of(adapter)}")  # fmt: skip


def _native_names(skeleton: Any, adapter: Adapter, names: Iterable[str]) -> dict[str, str]:
    """The modules that the adapter's names mean: by their own names, else by transformers' renamings of checkpoints."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    table = get_model_conversion_mapping(skeleton)
    renamings = [entry for entry in table if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in table if isinstance(entry, WeightConverter)]
    here = {name for name, _ in skeleton.named_modules()}
    wanted, prefix = {f"{name}.weight": True for name in here}, skeleton.base_model_prefix
    native: dict[str, str] = {}
    lacking: list[str] = []
    for name in dict.fromkeys(names):
        if name in here:
            native[name] = name
            continue
        target, merged = rename_source_key(f"{name}.weight", renamings, converters, prefix, wanted)
        if merged is not None:
            raise UnsupportedModelError(f"the adapter {adapter.name} adapts {name}, which is one part of a merged "
                                        f"weight ({target}) in {type(skeleton).__name__}; merge it into its base model "
                                        "(peft: merge_and_unload) and load that folder")  # fmt: skip
        if (module := target.removesuffix(".weight")) in here:
            native[name] = module
        else:
            lacking.append(name)
    if lacking:
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise CheckpointError(f"the adapter {adapter.name} adapts {lacking[0]}{more}, which {type(skeleton).__name__} "
                              f"does not have; it belongs to another model{_of(adapter)}")  # fmt: skip
    return native


def _of(adapter: Adapter) -> str:
    return f" (it was trained on {adapter.base})" if adapter.base else ""
