"""From a name to everything that a plan or a run needs: source, config, skeleton, units, sizes.

Nothing of the weights is read here, except where a store must be written first.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checkpoint.codec import Codec, Scratch, compressible, get_codec
from .checkpoint.encoded import TORCH_DTYPES
from .checkpoint.index import CheckpointIndex, Extent, TensorInfo, read_index
from .checkpoint.mapping import map_checkpoint
from .checkpoint.source import Source, read_config, resolve
from .config import LoadOptions
from .decode.kv import DEFAULT_LENGTH, activation_bytes, cache_bytes, context_length
from .model.architecture import check_supported, native_config
from .model.device import choose_device, choose_dtype, ram_budget, vram_budget
from .model.plan import Machine, Needs, ResidencyPlan, UnitSize, make_plan
from .model.skeleton import ModelUnit, Weight, build, collect_weights, cut_units
from .stream.probe import best_seconds, disk_bandwidth, link_bandwidth
from .trace import Progress, ProgressCallback, silent

if TYPE_CHECKING:
    import torch

# Where a weight that is not here would be.
NOWHERE = Path("(not downloaded)")
_PROBE_SIDE = 2048


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
    codec = get_codec(options.compression)
    device = choose_device(options)
    codec.require(device)
    source = resolve(
        model, options, progress=progress, weights=weights,
        check_config=lambda config: check_supported(config, options.trust_remote_code),
    )  # fmt: skip
    config = native_config(read_config(source), options.trust_remote_code)
    dtype = choose_dtype(options, config, device)
    progress(Progress("build", 0, 1, "models", source.name))
    skeleton, scratch = build(config, dtype, device), Scratch()
    folder, tensors = _tensors(source, skeleton, codec, dtype, options, device, progress, weights)
    compress(skeleton, codec, dtype, scratch)
    found = collect_weights(skeleton, tensors if tensors is not None else sizes_only(skeleton), dtype)
    units, small = cut_units(skeleton, found)
    progress(Progress("build", 1, 1, "models", source.name))
    return Prepared(source, options, config, device, dtype, codec, scratch, skeleton, units, small, folder)


def _tensors(
    source: Source, skeleton: Any, codec: Codec, dtype: torch.dtype, options: LoadOptions, device: torch.device,
    progress: ProgressCallback, weights: bool,
) -> tuple[Path, dict[str, TensorInfo] | None]:  # fmt: skip
    """The folder of config and tokenizer, and where each parameter's bytes are (``None``: not here)."""
    from .convert import find_store, plain_folder, write_compressed

    folder = find_store(source, codec, dtype, options)
    if folder is not None:
        return folder, dict(read_index(folder))
    if not weights and (codec.name != "none" or source.format != "safetensors" or not source.files):
        return source.folder, None
    folder = plain_folder(source, dtype, options, progress)
    index = read_source(source, folder)
    if codec.name == "none":
        return folder, map_checkpoint(index, skeleton)
    store = write_compressed(source, folder, index, skeleton, codec, dtype, options, device, progress)
    return store, dict(read_index(store))


def read_source(source: Source, folder: Path) -> CheckpointIndex:
    """The index of a checkpoint in safetensors."""
    return read_index(folder if source.format != "safetensors" else source.folder)


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
        scratch=casts + dequantised,
    )


def measure(prepared: Prepared) -> Machine:
    """Probe this machine with this checkpoint's files and this codec; takes some tens of milliseconds."""
    import torch

    device, is_cpu = prepared.device, prepared.device.type == "cpu"
    files = [unit.stream.pieces[0].extent.path for unit in prepared.units if unit.stream.pieces]
    largest = max((file for file in set(files) if file != NOWHERE), key=lambda file: file.stat().st_size, default=None)
    disk = disk_bandwidth(largest) if largest else 1e9
    has_device = not is_cpu or prepared.options.vram_budget is not None
    link = link_bandwidth(device) if has_device else 1e12
    linear = torch.nn.Linear(_PROBE_SIDE, _PROBE_SIDE, bias=False, dtype=prepared.dtype, device=device)
    weight = linear.weight.detach()
    parts = prepared.codec.encode(weight)
    module = prepared.codec.module(linear, prepared.dtype, prepared.scratch)
    for name, part in parts.items():
        module._parameters[name] = torch.nn.Parameter(part, requires_grad=False)
    row = torch.zeros(1, _PROBE_SIDE, dtype=prepared.dtype, device=device)
    with torch.inference_mode():
        seconds = best_seconds(lambda: module(row), device)
    nbytes = sum(part.numel() * part.element_size() for part in parts.values())
    return Machine(has_device, disk, link, nbytes / seconds)


def plan(prepared: Prepared, machine: Machine, length: int, batch: int) -> ResidencyPlan:
    """Where the units go on this machine for ``batch`` sequences of ``length`` tokens."""
    sizes = [UnitSize(unit.name, unit.nbytes, unit.kind) for unit in prepared.units]
    options = prepared.options
    return make_plan(
        sizes, needs(prepared, length, batch), machine, vram_budget(options, prepared.device), ram_budget(options)
    )
