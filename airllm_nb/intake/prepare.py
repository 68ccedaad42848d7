"""From a name to a prepared model: source, config, skeleton, units, sizes.

Nothing of the weights is read here, except where a store must be written first, and of weights that the config ties
though the checkpoint has both: those must be equal.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..checkpoint.hub.headers import Headers
from ..checkpoint.picks import Room
from ..checkpoint.source import Source, read_config, resolve
from ..config import LoadOptions
from ..decode.ids import guard_positions
from ..encoding.base import Encoding
from ..encoding.formats import get_encoding
from ..encoding.linear import Scratch
from ..encoding.names import stand_ins
from ..errors import OptionError, UnsupportedModelError
from ..model import adapter as lora
from ..model.architecture import check_supported, native_config
from ..model.calls import mark_taken
from ..model.device import Budgets, budgets_of, choose_device, choose_dtype, has_memory
from ..model.placing import compress, compressible, place
from ..model.skeleton import build, collect_weights
from ..model.tying import untie
from ..plan.needs import check_positions
from ..store.locks import hold
from ..store.manifest import Store
from ..tensors.dtypes import TORCH_DTYPES
from ..tensors.index import Extent, TensorInfo
from ..trace import Progress, ProgressCallback, silent
from . import in_place as at_rest
from . import pointer, written
from .planning import Prepared

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

NONE = get_encoding(None)
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
        By which a file of several is chosen and matrices are sliced; else those of ``options``.
    weights
        ``False`` stops before weights are downloaded or converted: sizes then come from the headers of the files, also
        of those that are on the Hub only, or from the config alone.
    """
    device = choose_device(options)
    model = pointer.meant(model, options.layer_shards_saving_path)
    store = pointer.opened_store(model, options, finish=weights)
    codec = get_encoding(store.meta.codec if store else options.compression)
    codec.require(device)
    vram, ram = free = free or budgets_of(options)
    room = Room(ram=ram, vram=vram if has_memory(options, device) else 0)
    source = _of_store(store) if store else _resolve(model, options, progress, room, weights=False)
    headers = Headers(source, options, progress)
    holds = functools.cache(lambda: at_rest.holds(source, headers, store))
    config = native_config(read_config(source), options.trust_remote_code, holds)
    stored = None if options.dtype or getattr(config, "dtype", None) else at_rest.stored_dtype(source, headers)
    dtype = choose_dtype(options, config, stored, device)
    progress(Progress("build", 0, 1, "models", source.name))
    skeleton, scratch = build(config, dtype, device, options.attn_implementation, holds), Scratch()
    check_positions(skeleton, options.max_seq_len)
    mark_taken(skeleton)
    guard_positions(skeleton)
    # Before the model is downloaded or converted: an adapter of another one is refused here.
    adapter = lora.open_adapter(skeleton, options, progress=progress, weights=weights)
    packed_as = at_rest.packed_as(source, headers) if codec.compression == "none" or store is None else ""
    _check_codec(codec, source, skeleton, packed_as, options)
    resolved = functools.partial(_resolve, model, options, progress, room, weights=True)
    source, found, known, once, piecewise = (
        _Found(source, at_rest.Weights(store.folder, store.index)) if store else
        _find(source, skeleton, codec, dtype, headers, options, progress, resolved, weights)
    )  # fmt: skip
    if there := found or known:
        untie(skeleton, there.tensors, there.packed, whole=weights)
    compress(skeleton, codec, dtype, scratch)
    origin = "config" if known is None or codec.compression != "none" else "files" if source.files else "headers"
    read, origin = (found, "files") if found else (_planned(skeleton, codec, source, known), origin)
    held = hold(*found.folders, *([adapter.file.parent] if adapter else [])) if found else hold()
    try:
        placed = place(skeleton, read.packed, dtype, scratch)
        tensors = lora.replace_weights(skeleton, adapter, {**read.tensors, **placed})
        made = Prepared(
            source, options, config, device, dtype, codec, scratch, skeleton, tensors, read.folder, origin,
            headers.why_not, once, piecewise, _as_packed(packed_as, read), adapter, held=held,
        )  # fmt: skip
        made.cut(free)
    except BaseException:
        held.close()  # at once: whoever keeps the exception keeps what it refers to
        raise
    progress(Progress("build", 1, 1, "models", source.name))
    return made


def _check_codec(codec: Encoding, source: Source, skeleton: Any, packed_as: str, options: LoadOptions) -> None:
    if codec.compression != "none" and packed_as and source.format != "gguf":
        raise OptionError(f"{source.name} is packed already ({packed_as}) and streams as it is; leave out "
                          f"compression={codec.compression!r}, or load the unquantised checkpoint")  # fmt: skip
    if codec.compression != "none" and packed_as:
        level = logging.WARNING if options.delete_original else logging.INFO  # for good, then
        log.log(level, "%s is packed already (%s) and streams as it is; compression=%r quantises it a second time, "
                "which is slower and worse, and may be larger", source.name, packed_as, codec.compression)  # fmt: skip
    if codec.compression != "none" and not compressible(skeleton):
        raise UnsupportedModelError(f"nothing in {type(skeleton).__name__} can be compressed (only nn.Linear matrices "
                                    "are); load it without compression")  # fmt: skip


class _Found(NamedTuple):
    """What is known of the weights.

    Attributes
    ----------
    source
        With what of it is here now.
    weights
        Where they are, if they are here.
    known
        What is known of them otherwise.
    once, piecewise
        As of :class:`~airllm_nb.intake.planning.Prepared`.
    """

    source: Source
    weights: at_rest.Weights | None
    known: at_rest.Weights | None = None
    once: int = 0
    piecewise: int | None = None


def _find(
    source: Source, skeleton: Any, codec: Encoding, dtype: torch.dtype, headers: Headers, options: LoadOptions,
    progress: ProgressCallback, resolved: Callable[[], Source], weights: bool,
) -> _Found:  # fmt: skip
    """The weights, downloaded and written as far as ``weights`` asks for it."""
    found = written.find(source, skeleton, codec, dtype, options)
    # Before a load downloads anything too: a layout that cannot be streamed is refused here.
    known = None if found or (weights and source.files) else at_rest.expected(source, skeleton, headers)
    if weights and known is not None:
        # What the checkpoint lacks is said before it is downloaded.
        whole = _planned(skeleton, NONE, source, known)
        collect_weights(skeleton, {**whole.tensors, **stand_ins(whole.packed)}, dtype)
    once = 0 if found else written.to_write(source, skeleton, codec, dtype, options, known)
    if found is None and not weights:
        pieces = written.piecewise(source, skeleton, codec, dtype, options, progress, headers, known)
        return _Found(source, None, known, once, pieces.nbytes if pieces and pieces.is_better() else None)
    if found is None:
        with written.alone(source, codec, dtype, options, progress):
            # Looked for again: another process may have written it meanwhile, and deleted what it was made from.
            found = written.find(source, skeleton, codec, dtype, options)
            if found is None:
                found = written.write_piecewise(source, skeleton, codec, dtype, options, progress, headers, known)
            if found is None:
                source = resolved()
                found = written.write(source, skeleton, codec, dtype, options, progress)
    if found and options.delete_original:
        pointer.replace_original(source, found.folder)
    return _Found(source, found, known, once)


def _as_packed(kind: str, weights: at_rest.Weights) -> str:
    """As in ``"GGUF: Q4_K, Q6_K"``; empty where nothing is packed."""
    names = sorted({encoding.name for weight in weights.packed.values() for encoding in weight.encodings})
    return (kind if names == [kind] else f"{kind}: {', '.join(names)}") if names else ""


def _planned(skeleton: Any, codec: Encoding, source: Source, known: at_rest.Weights | None) -> at_rest.Weights:
    """Weights that are not written yet: those of the checkpoint that are ``known``, the rest as the skeleton has it."""
    if codec.compression != "none" or known is None:
        return at_rest.Weights(source.folder, sizes_only(skeleton))
    once = at_rest.written_once(source, skeleton.dtype)
    rest = {name: info for name, info in sizes_only(skeleton).items() if name in once}
    return at_rest.Weights(source.folder, {**known.tensors, **rest}, known.packed)


def _resolve(model: str | Path, options: LoadOptions, progress: ProgressCallback, room: Room, weights: bool) -> Source:
    def check(config: dict[str, Any]) -> None:
        check_supported(config, options.trust_remote_code, str(model))

    return resolve(model, options, progress=progress, weights=weights, check_config=check, room=room)


def _of_store(store: Store) -> Source:
    return Source(store.folder.name, store.folder, "safetensors", store.files, store.nbytes, store.meta.source)


def sizes_only(skeleton: Any) -> dict[str, TensorInfo]:
    """What a checkpoint of this skeleton would hold, with extents that lie nowhere."""
    names = {dtype: name for name, dtype in TORCH_DTYPES.items()}
    sizes, offset = {}, 0
    for name, tensor in skeleton.state_dict().items():
        nbytes = tensor.numel() * tensor.element_size()
        sizes[name] = TensorInfo(name, names[tensor.dtype], tuple(tensor.shape), (Extent(NOWHERE, offset, nbytes),))
        offset += nbytes
    return sizes
