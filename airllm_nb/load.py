"""From a name to everything that a plan or a run needs: source, config, skeleton, units, sizes.

Nothing of the weights is read here, except where a store must be written first.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import stores
from .checkpoint.codec import Codec, Scratch, compressible, get_codec
from .checkpoint.encoded import TORCH_DTYPES
from .checkpoint.hub_headers import Headers
from .checkpoint.index import Extent, TensorInfo
from .checkpoint.source import Source, read_config, resolve
from .checkpoint.store import Store
from .config import LoadOptions
from .decode.kv import DEFAULT_LENGTH, activation_bytes, cache_bytes, context_length, returned_bytes
from .decode.prefill import Work, choose_chunk
from .errors import BudgetError, UnsupportedModelError
from .model.architecture import check_supported, native_config
from .model.attention import ALIBI, NTK
from .model.calls import mark_taken
from .model.device import choose_device, choose_dtype, has_memory, ram_budget, vram_budget
from .model.plan import Machine, Needs, ResidencyPlan, UnitSize, make_plan, window
from .model.skeleton import ModelUnit, Weight, build, collect_weights, cut_units, is_tied
from .model.slices import slice_limit, slice_linears
from .stream.ring import align
from .trace import Progress, ProgressCallback, silent

if TYPE_CHECKING:
    import torch

NONE = get_codec(None)
# Where a weight that is not here would be.
NOWHERE = Path("(not downloaded)")
# What CUDA's matrix libraries take for themselves.
_WORKSPACE = {"cpu": 0, "cuda": 64 << 20}


@dataclass
class Prepared:
    """A model that is found, understood and cut into units, but holds no memory yet.

    Attributes
    ----------
    sizes_from
        ``"files"`` that are here, ``"headers"`` on the Hub, or the ``"config"`` alone; ``why_config`` may say why.
    written_once
        Bytes beside the compressed store that are written before the model can run.
    """

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
    sizes_from: str = "files"
    why_config: str = ""
    written_once: int = 0

    @property
    def context(self) -> int | None:
        """The longest sequence, in tokens."""
        known = [length for length in (self.options.max_seq_len, context_length(self.config)) if length]
        return min(known) if known else None

    @property
    def planned(self) -> Work:
        """What memory is kept for before anything is asked."""
        length = self.options.max_seq_len or min(self.context or DEFAULT_LENGTH, DEFAULT_LENGTH)
        return Work(length, self.options.batch_size, length, masked=self.options.batch_size > 1)

    @functools.cached_property
    def fixed_needs(self) -> Needs:
        """Device memory that every run needs alike."""
        casts = max((unit.cast_bytes for unit in self.units), default=0)
        encoded = [module for module in self.skeleton.modules() if hasattr(module, "compute_dtype")]
        dequantised = max((m.in_features * m.out_features * self.dtype.itemsize for m in encoded), default=0)
        return Needs(
            small=sum(weight.elements * weight.dtype.itemsize for weight in self.small),
            scratch=casts + dequantised + _WORKSPACE[self.device.type],
        )

    @functools.cached_property
    def sizes(self) -> list[UnitSize]:
        """The units as the plan knows them; a table that is also the head takes no bytes of its own."""
        return [
            UnitSize(unit.name, 0 if unit.kind == "embedding" and is_tied(unit) else unit.nbytes, unit.kind)
            for unit in self.units
        ]


def prepare(
    model: str | Path, options: LoadOptions, *, progress: ProgressCallback = silent, weights: bool = True
) -> Prepared:
    """Find a model, download or convert what is missing, and cut it into units.

    Parameters
    ----------
    weights
        ``False`` stops before weights are downloaded or converted: sizes then come from the headers of the files, also
        of those that are on the Hub only, or from the config alone.
    """
    device = choose_device(options)
    store = stores.opened_store(model, options)
    codec = get_codec(store.meta.codec if store else options.compression)
    codec.require(device)
    source = _of_store(store) if store else _resolve(model, options, progress, weights=False)
    headers = Headers(source, options, progress)
    config = native_config(read_config(source), options.trust_remote_code)
    is_said = options.dtype or getattr(config, "dtype", None)
    dtype = choose_dtype(options, config, None if is_said else stores.stored_dtype(source, headers), device)
    progress(Progress("build", 0, 1, "models", source.name))
    skeleton, scratch = build(config, dtype, device), Scratch()
    mark_taken(skeleton)
    if codec.name != "none" and not compressible(skeleton):
        raise UnsupportedModelError(f"nothing in {type(skeleton).__name__} can be compressed (only nn.Linear matrices "
                                    "are); load it without compression")  # fmt: skip
    found = stores.Weights(store.folder, store.index) if store else stores.find(source, skeleton, codec, dtype, options)
    # Before a load downloads anything too: a layout that cannot be streamed is refused here.
    known = None if found or (weights and source.files) else stores.expected(source, skeleton, headers)
    if weights and known is not None:
        # What the checkpoint lacks is said before it is downloaded.
        collect_weights(skeleton, _planned(skeleton, NONE, source, known)[0], dtype)
    once = 0 if found else stores.to_write(source, skeleton, dtype, options)
    if found is None and weights:
        source = _resolve(model, options, progress, weights=True)
        found = stores.write(source, skeleton, codec, dtype, options, progress)
    if found and options.delete_original and store is None:
        stores.replace_original(source, found.folder)
    compress(skeleton, codec, dtype, scratch)
    # Once: what is free later is less by what this model itself takes.
    vram, ram = vram_budget(options, device), ram_budget(options)
    tensors, origin = (found.tensors, "files") if found else _planned(skeleton, codec, source, known)
    tensors = slice_linears(skeleton, tensors, slice_limit(vram, ram, has_memory(options, device)))
    units, small = cut_units(skeleton, collect_weights(skeleton, tensors, dtype))
    progress(Progress("build", 1, 1, "models", source.name))
    folder = found.folder if found else source.folder
    return Prepared(source, options, config, device, dtype, codec, scratch, skeleton, units, small, folder, vram, ram,
                    origin, headers.why_not, once)  # fmt: skip


def _planned(
    skeleton: Any, codec: Codec, source: Source, known: Mapping[str, TensorInfo] | None
) -> tuple[Mapping[str, TensorInfo], str]:
    """Tensors that are not written yet: those of the checkpoint that are ``known``, the rest as the skeleton has it."""
    if codec.name != "none" or known is None:
        return sizes_only(skeleton), "config"
    rest = {name: info for name, info in sizes_only(skeleton).items() if name in stores.normalised_names(source)}
    return {**known, **rest}, "files" if source.files else "headers"


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


def needs(prepared: Prepared, work: Work, tokens: int) -> Needs:
    """Device memory beside streamed weights, where ``tokens`` of the prompt go through the model at a time."""
    config, itemsize = prepared.skeleton.config, prepared.dtype.itemsize
    text, window = config.get_text_config(), work.length
    attention = getattr(config, "_attn_implementation", None)
    with contextlib.suppress(RuntimeError):  # one a layer: none for all
        window = getattr(text, "sliding_window", None) or getattr(text, "attention_chunk_size", None) or work.length
    if attention == NTK:  # past it, turned queries and keys are kept beside the plain ones
        window = min(window, config.airllm_attention["trained"])
    activations = activation_bytes(
        config, tokens, work.batch, itemsize, length=work.length,
        logits=tokens if work.logits is None else min(work.logits, tokens), loss=work.loss,
        masked=work.masked or tokens < work.prompt or work.length > window,
        eager=attention in ("eager", ALIBI),
    )  # fmt: skip
    activations += returned_bytes(
        config, work.length, work.batch, itemsize, states=work.states, attentions=work.attentions
    )
    cache = cache_bytes(config, work.length, work.batch, itemsize)
    return replace(prepared.fixed_needs, kv_cache=cache, activations=activations)


def tokens_at_once(prepared: Prepared, work: Work, room: int, arenas: Sequence[int] = (0,)) -> int | None:
    """How many tokens of the prompt go through the model at a time in ``room`` bytes; ``None`` if it is too small."""
    return choose_chunk(work.sizes, lambda tokens: needs(prepared, work, tokens).total, room, arenas)


def generation_config(prepared: Prepared) -> Any:
    """The checkpoint's own defaults for ``generate``."""
    from transformers import GenerationConfig

    if (prepared.folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(prepared.folder, local_files_only=True)
    return GenerationConfig.from_model_config(prepared.config)


def plan(prepared: Prepared, machine: Machine, work: Work, wished: Needs | None = None) -> tuple[ResidencyPlan, int]:
    """Where the units go on this machine, and how many tokens of a prompt go through them at a time.

    Parameters
    ----------
    work
        What there must be room for.
    wished
        What there should be room for too, where that costs no link its arena.

    Raises
    ------
    BudgetError
        If nothing fits; the message says the smallest budget that does.
    """
    budgets = prepared.vram_budget, prepared.ram_budget
    if not machine.has_device:
        return make_plan(prepared.sizes, needs(prepared, work, work.sizes[0]), machine, *budgets), work.sizes[0]
    arenas = _arenas(prepared.sizes)
    tokens = tokens_at_once(prepared, work, prepared.vram_budget, arenas) or work.sizes[-1]
    least = needs(prepared, work, tokens)
    both = least if wished is None else replace(
        least, kv_cache=max(least.kv_cache, wished.kv_cache), activations=max(least.activations, wished.activations)
    )  # fmt: skip
    try:
        fits = both.total + arenas[0] <= prepared.vram_budget
        return make_plan(prepared.sizes, both if fits else least, machine, *budgets), tokens
    except BudgetError as error:
        if not work.remedy:
            raise
        raise BudgetError(f"{error}; {work.remedy}") from None


def _arenas(units: Sequence[UnitSize]) -> tuple[int, int]:
    """Bytes of the arena that keeps a link busy, and of the smallest one: for the units in flight, for the largest."""
    sizes = [align(unit.nbytes) for unit in units if unit.kind != "embedding"]
    return window(sizes), max(sizes)
