"""``pytorch_model*.bin`` → safetensors, once. Pickles are read as data only: nothing in them is ever called."""

from __future__ import annotations

import functools
import logging
import pickle
import re
import struct
import sys
import weakref
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ...disk import open_file, status
from ...errors import CheckpointError
from ...progress import ProgressCallback, silent
from ...store.manifest import StoreMeta
from ...store.shard import Entry
from ...tensors.dtypes import CASTABLE, DTYPE_NAMES, TORCH_DTYPES
from ...tensors.index import BIN_INDEX_FILE
from ...tensors.pages import watch
from ..companions import copy_companions
from ..rewrite import is_complete, rewrite
from ..source import Source

log = logging.getLogger(__name__)

# What stands before each record of a zip archive: at its end the lengths of a name and of a field that follow.
_HEADER, _ENCRYPTED = struct.Struct("<26xHH"), 1
_STORAGE = re.compile(r"/data/(\d+)$")
# How torch's data-only unpickler names what it refused to import.
_CALL = re.compile(r"(?:GLOBAL|Unsupported class) ([\w.]+)")


class PickledWeights(Mapping[str, torch.Tensor]):
    """Tensor name → tensor over several .bin files, of which one at a time is open (mapped, not read).

    Parameters
    ----------
    dtype
        What matrices of floating point are cast to; vectors keep theirs. ``None`` keeps all.

    Raises
    ------
    CheckpointError
        If a file is damaged, or asks for code to be run.
    """

    def __init__(self, files: tuple[Path, ...], dtype: str | None = None):
        self.specs: dict[str, Entry] = {}
        self._home: dict[str, Path] = {}
        self._open: tuple[Path, dict[str, torch.Tensor]] | None = None
        self._unwatch: Callable[[], None] = lambda: None
        is_indexed, odd = has_index(files), dict[str, str]()
        for file in files:
            for name, tensor in self._load(file).items():
                if name in self._home and not is_indexed:
                    raise CheckpointError(f"{file}: tensor {name!r} is also in {self._home[name].name}; remove the "
                                          "file that does not belong")  # fmt: skip
                self._home[name] = file
                if (target := _target(tensor, dtype)) is not None:
                    self.specs[name] = Entry(name, target, tuple(tensor.shape))
                else:
                    odd[name] = (f"{file}: tensor {name!r} is {tensor.dtype} {tensor.layout}, which a safetensors file "
                                 "cannot hold")  # fmt: skip
        if odd and not self.specs:
            raise CheckpointError(next(iter(odd.values())))
        for what in odd.values():  # where it is needed, loading says that it is not there
            log.warning("%s; it is left out", what)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._load(self._home[name])[name].resolve_neg().to(TORCH_DTYPES[self.specs[name].dtype])

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    def _load(self, file: Path) -> dict[str, torch.Tensor]:
        if self._open is None or self._open[0] != file:
            self._unwatch()
            self._open = None  # unmap before the next is mapped
            self._open = (file, load_pickle(file))
            plain = (tensor for tensor in self._open[1].values() if tensor.layout is torch.strided)
            storages = [tensor.untyped_storage() for tensor in plain]
            self._unwatch = watch(file, {(storage.data_ptr(), storage.nbytes()) for storage in storages})
            weakref.finalize(self, self._unwatch)
        return self._open[1]


def has_index(files: tuple[Path, ...]) -> bool:
    """Whether an index says that the files belong together: then the last of those that hold a tensor gives it."""
    return len(files) > 1 and (files[0].parent / BIN_INDEX_FILE).is_file()


def load_pickle(file: Path, opened: BinaryIO | None = None) -> dict[str, torch.Tensor]:
    """The tensors of one .bin file, mapped where its format allows; views of one storage stay views.

    Parameters
    ----------
    opened
        What to read instead of the file itself, which only gives its name then.

    Raises
    ------
    CheckpointError
        If the file is damaged, is no dictionary of tensors, or asks for code to be run (which is not done).
    """
    try:
        whole = torch.load(opened or file, map_location="cpu", weights_only=True,
                           mmap=opened is None and _is_mappable(file))  # fmt: skip
    except pickle.UnpicklingError as error:
        if found := _CALL.search(str(error)):
            raise CheckpointError(f"{file} wants to call {found[1]}; nothing was run and the file was not loaded. Use "
                                  "a safetensors version of the model") from None  # fmt: skip
        raise _damaged(file, error) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, TypeError, AttributeError,
            AssertionError, UnicodeDecodeError, zipfile.BadZipFile) as error:  # fmt: skip
        raise _damaged(file, error) from None
    # Trainers save {"state_dict": …} or {"model": …}.
    for key in ("state_dict", "model", "module"):
        if isinstance(whole, dict) and isinstance(whole.get(key), dict):
            whole = whole[key]
    if not isinstance(whole, dict):
        raise CheckpointError(f"{file} holds a {type(whole).__name__}, not a dictionary of tensors")
    return {str(name): value for name, value in whole.items() if isinstance(value, torch.Tensor)}


def plain_runs(opened: BinaryIO) -> dict[int, int] | None:
    """Where the bytes of each record of a .bin file begin → how many they are.

    ``None`` where they are not what they are in memory: of another archive than an uncompressed zip, packed, encrypted,
    in another byte order or another order than torch writes them in. Damage is the loader's to name.
    """
    try:
        opened.seek(0)
        if not zipfile.is_zipfile(opened):
            return None
        with zipfile.ZipFile(opened) as archive:
            records = sorted(archive.infolist(), key=lambda record: record.header_offset)
        if any(record.compress_type != zipfile.ZIP_STORED or record.flag_bits & _ENCRYPTED for record in records):
            return None
        fetch = getattr(opened, "fetch", None)  # of a file that is not here
        if fetch is not None:
            fetch([record.header_offset for record in records], _HEADER.size)
        runs, numbers = {}, []
        ends = [*(record.header_offset for record in records[1:]), archive.start_dir]
        for record, end in zip(records, ends, strict=True):
            opened.seek(record.header_offset)
            name, extra = _HEADER.unpack(opened.read(_HEADER.size))
            start = record.header_offset + _HEADER.size + name + extra
            runs[start] = record.file_size
            if start + record.file_size > end:
                return None
            if record.filename.endswith("/byteorder"):
                opened.seek(start)
                if opened.read(16)[: record.file_size] != sys.byteorder.encode():
                    return None
            if number := _STORAGE.search(record.filename):
                numbers.append(int(number[1]))
    except (zipfile.BadZipFile, OSError, ValueError, EOFError, RuntimeError, NotImplementedError, struct.error):
        return None
    return runs if numbers == sorted(numbers) else None


def convert_pickles(
    source: Source, folder: Path, dtype: str | None = None, *, progress: ProgressCallback = silent
) -> Path:
    """Rewrite the source's .bin files as safetensors in ``folder``, once, with config and tokenizer beside them.

    Parameters
    ----------
    dtype
        What matrices of floating point are cast to (``"bfloat16"``); ``None`` keeps every dtype.

    Raises
    ------
    CheckpointError
        If a file is damaged or asks for code to be run.
    StoreError
        If the folder cannot be written.
    """
    meta = StoreMeta("none", dtype or "original", source.fingerprint)
    if is_complete(folder, meta):
        return folder
    weights = PickledWeights(source.files, dtype)
    if not weights:
        raise CheckpointError(f"{source.files[0]} holds no tensors; download it again")
    copy = functools.partial(copy_companions, source.folder)
    return rewrite(folder, weights, meta, copy, progress, source.origin, source.files)


def _is_mappable(file: Path) -> bool:
    """Whether each storage is as long as its record: of a file that it maps, torch takes whatever lies there."""
    stat = status(file)
    return _is_sized(file, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _is_sized(file: Path, nbytes: int, changed: int) -> bool:
    with open_file(file) as opened:
        try:
            if (runs := plain_runs(opened)) is None:
                return False
            return all(place(tensor, runs) is not None for tensor in load_without_data(file, opened).values())
        except CheckpointError:  # what it says may be of a load without data only
            return False


def load_without_data(file: Path, opened: BinaryIO) -> dict[str, torch.Tensor]:
    """As :func:`load_pickle`, but sizes and places alone."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    opened.seek(0)
    with FakeTensorMode():
        return load_pickle(file, opened)


def place(tensor: torch.Tensor, runs: Mapping[int, int]) -> int | None:
    """Where the storage of a tensor without data begins, if it is one of the ``runs`` from first byte to last."""
    if tensor.layout is not torch.strided:
        return None
    storage = tensor.untyped_storage()
    start: int | None = getattr(storage, "_checkpoint_offset", None)  # older versions of torch do not say it
    # Torch calculates it as if it had written the archive itself: that is checked.
    return None if storage.nbytes() and runs.get(start or 0) != storage.nbytes() else start


def _target(tensor: torch.Tensor, dtype: str | None) -> str | None:
    own = DTYPE_NAMES.get(tensor.dtype)
    if own is None or tensor.layout is not torch.strided:
        return None
    return DTYPE_NAMES[getattr(torch, dtype)] if dtype and own in CASTABLE and tensor.dim() > 1 else own


def _damaged(file: Path, error: Any) -> CheckpointError:
    # Of torch's twenty lines of advice, the one that says what is wrong.
    found = re.search(r"WeightsUnpickler error: (.+)", str(error))
    line = found[1] if found else (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
    return CheckpointError(f"{file} is truncated or damaged ({line.split('. ')[0]}); download the file again")
