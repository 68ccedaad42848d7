"""``pytorch_model*.bin`` → safetensors, once. Pickles are read as data only: nothing in them is ever called."""

from __future__ import annotations

import pickle
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError
from ..trace import ProgressCallback, silent
from .layout import companions, Choice
from .rewrite import Spec, is_complete, rewrite
from .source import Source

if TYPE_CHECKING:
    import torch

# The legacy format is a chain of pickles; torch refuses to map it, so it is read whole.
_FORBIDDEN = re.compile(r"Unsupported (?:global|class|operand)|GLOBAL|not an allowed|blocked|weights_only", re.IGNORECASE)


class PickledWeights(Mapping[str, "torch.Tensor"]):
    """Tensor name → tensor over several .bin files, of which one at a time is open (mapped, not read).

    Raises
    ------
    CheckpointError
        If a file is damaged, or asks for code to be run.
    """

    def __init__(self, files: tuple[Path, ...]):
        self.specs: dict[str, Spec] = {}
        self._home: dict[str, Path] = {}
        self._open: tuple[Path, dict[str, torch.Tensor]] | None = None
        for file in files:
            for name, tensor in self._load(file).items():
                if name in self._home:
                    raise CheckpointError(f"{file}: tensor {name!r} is also in {self._home[name].name}; remove the file "
                                          "that does not belong")  # fmt: skip
                self.specs[name] = Spec(_dtype_name(file, name, tensor), tuple(tensor.shape))
                self._home[name] = file

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._load(self._home[name])[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    def _load(self, file: Path) -> dict[str, torch.Tensor]:
        if self._open is None or self._open[0] != file:
            self._open = None  # unmap before the next is mapped
            self._open = (file, load_pickle(file))
        return self._open[1]


def load_pickle(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of one .bin file, mapped where its format allows; views of one storage stay views.

    Raises
    ------
    CheckpointError
        If the file is damaged, is no dictionary of tensors, or asks for code to be run (which is not done).
    """
    import torch

    try:
        whole = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        if _FORBIDDEN.search(str(error)):
            raise CheckpointError(f"{file} asks for more than tensors ({_asked(error)}) and was not loaded: a pickle "
                                  "can run any code. Use a safetensors version of the model") from None  # fmt: skip
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


def convert_pickles(source: Source, folder: Path, *, progress: ProgressCallback = silent) -> Path:
    """Rewrite the source's .bin files as safetensors in ``folder``, with its config and tokenizer; dtypes stay.

    Raises
    ------
    CheckpointError
        If a file is damaged or asks for code to be run.
    StoreError
        If the folder cannot be written.
    """
    metadata = {"source": source.fingerprint}
    if is_complete(folder, metadata):
        return folder
    names = [path.relative_to(source.folder).as_posix() for path in source.folder.rglob("*") if path.is_file()]
    small = companions(names, Choice("bin", None, ()))

    def copy(target: Path) -> None:
        for name in small:
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source.folder / name, target / name)

    weights = PickledWeights(source.files)
    if not weights:
        raise CheckpointError(f"{source.files[0]} holds no tensors; download it again")
    return rewrite(folder, weights, companions=copy, metadata=metadata, progress=progress)


def _dtype_name(file: Path, name: str, tensor: torch.Tensor) -> str:
    from .encoded import TORCH_DTYPES

    for text, dtype in TORCH_DTYPES.items():
        if dtype == tensor.dtype:
            return text
    raise CheckpointError(f"{file}: tensor {name!r} is {tensor.dtype}, which a safetensors file cannot hold")


def _asked(error: Exception) -> str:
    """What the pickle wanted to call, out of torch's long message."""
    found = re.search(r"(?:GLOBAL|class|global)\s+`?([\w.]+(?: [\w.]+)?)`?", str(error))
    return found[1] if found else "a function call"


def _damaged(file: Path, error: Any) -> CheckpointError:
    line = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
    return CheckpointError(f"{file} is truncated or damaged ({line}); download the file again")
