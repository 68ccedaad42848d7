"""From a name to everything that a plan or a run needs: source, config, skeleton, units, sizes.

Nothing of the weights is read here, except where a store must be written first.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import stores
from .checkpoint.codec import Codec, Scratch, compressible, get_codec
from .checkpoint.encoded import TORCH_DTYPES
from .checkpoint.index import Extent, TensorInfo
from .checkpoint.source import Source, read_config, resolve
from .checkpoint.store import Store
from .config import LoadOptions
from .decode.kv import DEFAULT_LENGTH, activation_bytes, cache_bytes, context_length
from .errors import UnsupportedModelError
from .model.architecture import check_supported, native_config
from .model.device import choose_device, choose_dtype, ram_budget, vram_budget
from .model.plan import Machine, Needs, ResidencyPlan, UnitSize, make_plan
from .model.skeleton import ModelUnit, Weight, build, collect_weights, cut_units, is_tied
from .trace import Progress, ProgressCallback, silent

if TYPE_CHECKING:
    import torch

# Where a weight that is not here would be.
NOWHERE = Path("(not downloaded)")
# What CUDA's matrix libraries take for themselves.
_WORKSPACE = {"cpu": 0, "cuda": 64 << 20}


@dataclass
class Prepared:
    """A model that is found, understood and cut into units, but holds no memory yet."""

    source: Source
    options: LoadOptions
    config: Any
    device: torch.device
    dtype: torch.dtype
    codec: Codec
    scratch: Scratch
    skeleton: Any
    units: list[ModelUnit]
    small: list[Weight]
    folder: Path
    vram_budget: int
    ram_budget: int

    @property
    def context(self) -> int | None:
        """The longest sequence, in tokens."""
        known = [length for length in (self.options.max_seq_len, context_length(self.config)) if length]
        return min(known) if known else None

    @property
    def planned_length(self) -> int:
        """The sequence length that memory is kept for."""
        return self.options.max_seq_len or min(self.context or DEFAULT_LENGTH, DEFAULT_LENGTH)


def prepare(
    model: str | Path, options: LoadOptions, *, progress: ProgressCallback = silent, weights: bool = True
) -> Prepared:
    """Find a model, download or convert what is missing, and cut it into units.

    Parameters
    ----------
    weights
        ``False`` stops before weights are downloaded or converted: sizes then come from the config alone.
    """
    device = choose_device(options)
    store = stores.opened_store(model, options)
    codec = get_codec(store.meta.codec if store else options.compression)
    codec.require(device)
    source = _of_store(store) if store else _resolve(model, options, progress, weights=False)
    config = native_config(read_config(source), options.trust_remote_code)
    dtype = choose_dtype(options, config, stores.stored_dtype(source), device)
    progress(Progress("build", 0, 1, "models", source.name))
    skeleton, scratch = build(config, dtype, device), Scratch()
    if codec.name != "none" and not compressible(skeleton):
        raise UnsupportedModelError(f"nothing in {type(skeleton).__name__} can be compressed (only nn.Linear matrices "
                                    "are); load it without compression")  # fmt: skip
    found = stores.Weights(store.folder, store.index) if store else stores.find(source, skeleton, codec, dtype, options)
    if found is None and weights:
        source = _resolve(model, options, progress, weights=True)
        found = stores.write(source, skeleton, codec, dtype, options, progress)
    if found and options.delete_original and store is None:
        stores.replace_original(source, found.folder)
    compress(skeleton, codec, dtype, scratch)
    tensors = found.tensors if found else sizes_only(skeleton)
    units, small = cut_units(skeleton, collect_weights(skeleton, tensors, dtype))
    progress(Progress("build", 1, 1, "models", source.name))
    folder = found.folder if found else source.folder
    # Once: what is free later is less by what this model itself takes.
    budgets = vram_budget(options, device), ram_budget(options)
    return Prepared(source, options, config, device, dtype, codec, scratch, skeleton, units, small, folder, *budgets)


def _resolve(model: str | Path, options: LoadOptions, progress: ProgressCallback, weights: bool) -> Source:
    def check(config: dict[str, Any]) -> None:
        check_supported(config, options.trust_remote_code)

    return resolve(model, options, progress=progress, weights=weights, check_config=check)


def _of_store(store: Store) -> Source:
    return Source(store.folder.name, store.folder, "safetensors", store.files, store.nbytes, store.meta.source)


def compress(skeleton: Any, codec: Codec, dtype: torch.dtype, scratch: Scratch) -> None:
    """Put the codec's modules in the place of the linear ones."""
    if codec.name == "none":
        return
    for name in compressible(skeleton):
        skeleton.set_submodule(name, codec.module(skeleton.get_submodule(name), dtype, scratch))


def sizes_only(skeleton: Any) -> dict[str, TensorInfo]:
    """What a checkpoint of this skeleton would hold, with extents that lie nowhere."""
    names = {dtype: name for name, dtype in TORCH_DTYPES.items()}
    sizes, offset = {}, 0
    for name, tensor in skeleton.state_dict().items():
        nbytes = tensor.numel() * tensor.element_size()
        sizes[name] = TensorInfo(name, names[tensor.dtype], tuple(tensor.shape), (Extent(NOWHERE, offset, nbytes),))
        offset += nbytes
    return sizes


def needs(prepared: Prepared, length: int, batch: int) -> Needs:
    """Device memory beside streamed weights for ``batch`` sequences of ``length`` tokens."""
    itemsize = prepared.dtype.itemsize
    casts = max((unit.cast_bytes for unit in prepared.units), default=0)
    encoded = [module for module in prepared.skeleton.modules() if hasattr(module, "compute_dtype")]
    dequantised = max((m.in_features * m.out_features * itemsize for m in encoded), default=0)
    return Needs(
        small=sum(weight.elements * weight.dtype.itemsize for weight in prepared.small),
        kv_cache=cache_bytes(prepared.config, length, batch, itemsize),
        activations=activation_bytes(prepared.config, length, batch, itemsize),
        scratch=casts + dequantised + _WORKSPACE[prepared.device.type],
    )


def generation_config(prepared: Prepared) -> Any:
    """The checkpoint's own defaults for ``generate``."""
    from transformers import GenerationConfig

    if (prepared.folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(prepared.folder, local_files_only=True)
    return GenerationConfig.from_model_config(prepared.config)


def plan(prepared: Prepared, machine: Machine, length: int, batch: int) -> ResidencyPlan:
    """Where the units go on this machine for ``batch`` sequences of ``length`` tokens."""
    # A table that is also the head takes no bytes of its own.
    sizes = [
        UnitSize(unit.name, 0 if unit.kind == "embedding" and is_tied(unit) else unit.nbytes, unit.kind)
        for unit in prepared.units
    ]
    return make_plan(sizes, needs(prepared, length, batch), machine, prepared.vram_budget, prepared.ram_budget)
