"""From a name to a prepared model, in five steps: find, understand, place, write what is missing, bind.

Nothing of the weights is read here, except where a store must be written first, and of weights that the config ties
though the checkpoint has both: those must be equal.
"""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Any

from ..checkpoint.hub.headers import Headers
from ..checkpoint.source import Source, read_config
from ..config import LoadOptions
from ..decode.ids import guard_positions
from ..encoding.formats import get_encoding
from ..encoding.names import stand_ins
from ..errors import OptionError, UnsupportedModelError
from ..model import adapter as lora
from ..model.architecture import check_supported, native_config
from ..model.calls import mark_taken
from ..model.device import Budgets, budgets_of, choose_device, choose_dtype, has_memory
from ..model.placing import compress, compressible, merged_experts
from ..model.placing import place as place_packed
from ..model.skeleton import build, collect_weights
from ..model.tying import untie
from ..plan.needs import check_positions
from ..progress import Progress, ProgressCallback, silent
from ..store.locks import Hold
from ..tensors.dtypes import TORCH_DTYPES
from ..tensors.index import Extent, TensorInfo
from . import pointer, written
from .containers.container import Weights
from .containers.store import StoreContainer
from .find.picks import Room
from .find.resolve import resolve
from .planning import cut
from .prepared import Prepared

log = logging.getLogger(__name__)

# Where a weight that is not here would be.
NOWHERE = Path("(not downloaded)")


def prepare(
    model: str | Path, options: LoadOptions, free: Budgets | None = None, *, progress: ProgressCallback = silent,
    weights: bool = True,
) -> Prepared:  # fmt: skip
    """Find a model, download or convert what is missing, and cut it into units.

    Parameters
    ----------
    free
        By which one of several files is chosen and large matrices are sliced; else those of ``options``.
    weights
        ``False`` stops before weights are downloaded or converted: sizes then come from the headers of the files, also
        of those that are on the Hub only, or from the config alone.
    """
    free = free or budgets_of(options)
    prepared = Prepared(model, options, progress, weights)
    find(prepared, free)
    understand(prepared)
    place(prepared)
    write(prepared)
    bind(prepared, free)
    return prepared


def find(prepared: Prepared, free: Budgets) -> None:
    """The name → which files, what reads them, and how weights are encoded."""
    options, device = prepared.options, choose_device(prepared.options)
    prepared.device = device
    prepared.room = Room(ram=free.ram, vram=free.vram if has_memory(options, device) else 0)
    prepared.model = pointer.original_of(prepared.model, options.layer_shards_saving_path)
    store = pointer.opened_store(prepared.model, options, finish=prepared.weights)
    prepared.codec = get_encoding(store.meta.codec if store else options.compression)
    prepared.codec.require(device)
    container = StoreContainer(store) if store else None
    source = container.source if container else _resolve(prepared, weights=False)
    prepared.headers = Headers(source, options, prepared.progress)
    prepared.take(source, container)


def understand(prepared: Prepared) -> None:
    """Config and headers → the native model without weights, its dtype, and whether it can be what was asked for."""
    options, container, source = prepared.options, prepared.container, prepared.source
    holds = functools.cache(container.holds)
    prepared.config = config = native_config(read_config(source), options.trust_remote_code, holds)
    stored = None if options.dtype or getattr(config, "dtype", None) else container.stored_dtype()
    prepared.dtype = dtype = choose_dtype(options, config, stored, prepared.device)
    prepared.progress(Progress("build", 0, 1, "models", source.name))
    prepared.skeleton = skeleton = build(config, dtype, prepared.device, options.attn_implementation, holds)
    check_positions(skeleton, options.max_seq_len)
    mark_taken(skeleton)
    guard_positions(skeleton)
    # Before the model is downloaded or converted: an adapter of another one is refused here.
    prepared.adapter = lora.open_adapter(skeleton, options, progress=prepared.progress, weights=prepared.weights)
    _check_codec(prepared)


def _check_codec(prepared: Prepared) -> None:
    if not prepared.is_compressed:
        return
    name, packed_as, codec = prepared.source.name, prepared.container.packed_as, prepared.codec.compression
    if packed_as and not prepared.container.repacks:
        raise OptionError(f"{name} is packed already ({packed_as}) and streams as it is; leave out "
                          f"compression={codec!r}, or load the unquantised checkpoint")  # fmt: skip
    if packed_as:
        level = logging.WARNING if prepared.options.delete_original else logging.INFO  # for good, then
        log.log(level, "%s is packed already (%s) and streams as it is; compression=%r quantises it a second time, "
                "which is slower and worse, and may be larger", name, packed_as, codec)  # fmt: skip
    if not compressible(prepared.skeleton) and not merged_experts(prepared.skeleton):
        raise UnsupportedModelError(f"nothing in {type(prepared.skeleton).__name__} can be compressed (only nn.Linear "
                                    "matrices and merged experts are); load it without compression")  # fmt: skip


def place(prepared: Prepared) -> None:
    """What is here → where each weight is read; else what headers say of them."""
    prepared.at_rest = written.find(prepared)
    if prepared.at_rest or (prepared.weights and prepared.source.files):
        return
    # Before a load downloads anything too: a layout that cannot be streamed is refused here.
    known, once = prepared.container.in_place(prepared.skeleton), prepared.container.written_once(prepared.dtype)
    if known is None:
        return
    tensors = {name: info for name, info in known.tensors.items() if name not in once}
    prepared.known = Weights(known.folder, tensors, known.packed)
    if prepared.weights:  # what the checkpoint lacks is said before it is downloaded
        whole = _expected(prepared)
        collect_weights(prepared.skeleton, {**whole.tensors, **stand_ins(whole.packed)}, prepared.dtype)


def write(prepared: Prepared) -> None:
    """Download and convert what is missing; of a plan, how many bytes that would be."""
    if prepared.at_rest is None and not prepared.weights:
        prepared.written_once = written.bytes_once(prepared)
        pieces = written.piecewise(prepared)
        prepared.piecewise = pieces.nbytes if pieces and pieces.is_better() else None
        return
    if prepared.at_rest is None:
        with written.alone(prepared):
            # Looked for again: another process may have written it meanwhile, and deleted what it was made from.
            prepared.at_rest = written.find(prepared) or written.write_piecewise(prepared)
            if prepared.at_rest is None:
                prepared.take(_resolve(prepared, weights=True))
                prepared.at_rest = written.write(prepared)
    if prepared.weights and prepared.options.delete_original and not isinstance(prepared.container, StoreContainer):
        pointer.replace_original(prepared.source, prepared.at_rest.folder)


def bind(prepared: Prepared, free: Budgets) -> None:
    """Put what computes on the weights as they lie into the model, pair it with their bytes, and cut it into units."""
    skeleton, dtype, adapter = prepared.skeleton, prepared.dtype, prepared.adapter
    if there := prepared.at_rest or prepared.known:
        untie(skeleton, there.tensors, there.packed, whole=prepared.weights)
    stored = prepared.at_rest.tensors if prepared.at_rest else {}
    if prepared.at_rest and prepared.is_compressed and any(name in stored for name in merged_experts(skeleton)):
        log.warning("%s was written by an earlier version, which left experts uncompressed; remove it (airllm-nb cache "
                    "remove) and load the original model to have them compressed", prepared.at_rest.folder)  # fmt: skip
    compress(skeleton, prepared.codec, dtype, prepared.scratch, stored)
    there = prepared.at_rest or _expected(prepared)
    prepared.folder = there.folder
    if prepared.at_rest:
        prepared.held = Hold(*there.folders, *([adapter.file.parent] if adapter else []))
    try:
        prepared.packed_as = _packed_as(prepared.container.packed_as, there)
        placed = place_packed(skeleton, there.packed, dtype, prepared.scratch)
        prepared.tensors = lora.replace_weights(skeleton, adapter, {**there.tensors, **placed})
        cut(prepared, free)
    except BaseException:
        prepared.held.close()  # at once: whoever keeps the exception keeps what it refers to
        raise
    prepared.progress(Progress("build", 1, 1, "models", prepared.source.name))


def _expected(prepared: Prepared) -> Weights:
    """Weights that are not here yet: those of the checkpoint that are known, the rest as the skeleton has it."""
    known, sizes = prepared.known, sizes_only(prepared.skeleton)
    if known is None or (prepared.is_compressed and not prepared.weights):
        return Weights(prepared.source.folder, sizes)
    once = prepared.container.written_once(prepared.dtype)
    rest = {name: info for name, info in sizes.items() if name in once}
    return Weights(prepared.source.folder, {**known.tensors, **rest}, known.packed)


def _packed_as(kind: str, weights: Weights) -> str:
    """As in ``"GGUF: Q4_K, Q6_K"``; empty where nothing is packed."""
    names = sorted({encoding.name for weight in weights.packed.values() for encoding in weight.encodings})
    return (kind if names == [kind] else f"{kind}: {', '.join(names)}") if names else ""


def _resolve(prepared: Prepared, weights: bool) -> Source:
    model, options = prepared.model, prepared.options

    def check(config: dict[str, Any]) -> None:
        check_supported(config, options.trust_remote_code, str(model))

    return resolve(
        model, options, progress=prepared.progress, weights=weights, check_config=check, room=prepared.room
    )  # fmt: skip


def sizes_only(skeleton: Any) -> dict[str, TensorInfo]:
    """What a checkpoint of this skeleton would hold, with extents that lie nowhere."""
    names = {dtype: name for name, dtype in TORCH_DTYPES.items()}
    sizes, offset = {}, 0
    for name, tensor in skeleton.state_dict().items():
        nbytes = tensor.numel() * tensor.element_size()
        sizes[name] = TensorInfo(name, names[tensor.dtype], tuple(tensor.shape), (Extent(NOWHERE, offset, nbytes),))
        offset += nbytes
    return sizes
