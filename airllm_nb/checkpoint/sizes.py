"""Numbers of a config against what the weight files hold, before anything is built by them.

A config may ask for two thousand million layers in a hundred bytes. First its numbers are looked at, then what is built
is counted while it is built: a model of tensors on ``meta`` costs nothing, its modules and its buffers do.
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..config import GiB, MiB, format_bytes
from ..errors import AirLLMError, CheckpointError

if TYPE_CHECKING:
    from ..tensors.index import TensorInfo

# What is built without a question, and what where nothing is known of the files: layers and the like, one dimension,
# parameters, bytes of computed buffers.
LAYERS, WIDTH, PARAMETERS, BUFFERS = 256, 1 << 20, 5_000, 96 * MiB
MOST_LAYERS, MOST_WIDTH, MOST_PARAMETERS, MOST_BUFFERS = 2048, 1 << 24, 300_000, GiB
_DEEPEST = 32
# How often something is repeated: transformers makes lists of this length as soon as it reads a config.
_COUNT = re.compile(
    r"(^|_)n?_?layers?(_per_\w+)?$|depths?$|(^|_)blocks?(_count)?$|labels$|classes$|stages$|repeats$|types?$|"
    r"_replace$|levels$"
)
# How wide something is, so that a tensor of the files has this dimension, or a part of it.
_WIDTH = re.compile(
    r"size|dim(_|$)|heads?(_|$)|experts?(_|$)|rank$|hidden|width|channels|kernel|groups?$|^n_|^d_|_ff$|dff$|"
    r"(embedding|feed_forward|key|value)_length$|count$"
)
# Neither: a number of something that goes in or is learned from, or a number in a vocabulary.
_OTHER = re.compile(
    r"param|token|step|sample|flop|train|posi|ctx|seq|window|distance|base|scale|_ids?$|index|seed|byte|"
    r"^(model|data|dataset|file|total)_size"
)
# Types whose table of positions is computed in Python, though the files hold it too.
_COMPUTED_TABLES = ("xlm", "flaubert")


@dataclass(frozen=True)
class Holds:
    """What weight files hold, as far as it bounds a config.

    Attributes
    ----------
    pieces
        Tensors; merged ones count as often as they have matrices.
    widest
        The largest dimension of any.
    nbytes
        Of all.
    """

    pieces: int
    widest: int
    nbytes: int

    @classmethod
    def of(cls, tensors: Iterable[Any]) -> Holds:
        """Of tensors that have a ``shape`` and ``nbytes``, such as :class:`~airllm_nb.tensors.index.TensorInfo`."""
        found: list[TensorInfo] = list(tensors)
        return cls(
            sum(info.shape[0] if len(info.shape) == 3 else 1 for info in found),
            max((max(info.shape, default=1) for info in found), default=1),
            sum(info.nbytes for info in found),
        )


# Asked only where a config is out of the ordinary; ``None`` where nothing is known of the files.
AskHolds = Callable[[], "Holds | None"]


def check_sizes(config: Mapping[str, Any], holds: AskHolds, where: str = "config.json") -> None:
    """Refuse a config that asks for far more than the weight files hold.

    Parameters
    ----------
    config
        The content of a ``config.json``, or the metadata of a GGUF file.
    where
        What it is, for the message.

    Raises
    ------
    CheckpointError
        Which names the entry and its value.
    """
    computed = config.get("model_type") in _COMPUTED_TABLES
    for name, value in _numbers(config):
        is_count = _COUNT.search(name) is not None
        is_table = computed and "posi" in name
        is_width = is_table or (_WIDTH.search(name) is not None and _OTHER.search(name) is None)
        if not is_count and not is_width:
            continue
        most = LAYERS if is_count else WIDTH
        if value <= most:
            continue
        held = holds()
        if held is None:
            most, against = MOST_LAYERS if is_count else MOST_WIDTH, "no model has so many"
        elif is_count:
            most, against = max(most, held.pieces), f"the weight files hold {held.pieces:,} tensors"
        else:  # packed weights lie in fewer and wider numbers, or in more and narrower ones
            most, against = max(most, 16 * held.widest), f"the weight files have no dimension above {held.widest:,}"
        if value > most:
            raise CheckpointError(f"{where} says {name}={_shown(value)}, and {against}; the two do not belong "
                                  "together, or one is damaged: download the checkpoint again")  # fmt: skip


def _numbers(config: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, float]]:
    """Every number of a config with the name of its entry; numbers that are written as text count too."""
    if depth > _DEEPEST:
        raise CheckpointError(f"config.json is damaged: {name} has parts in parts, more than {_DEEPEST} deep; download "
                              "it again")  # fmt: skip
    if isinstance(config, Mapping):
        for key, value in config.items():
            # Of the metadata of a GGUF file: "llama.block_count".
            yield from _numbers(value, str(key).rpartition(".")[2], depth + 1)
    elif isinstance(config, (list, tuple)):
        for value in config:
            yield from _numbers(value, name, depth + 1)
    elif isinstance(config, (int, float)) and not isinstance(config, bool):
        yield name, config
    elif isinstance(config, str) and config[:1].isdigit() and len(config) < 400:
        try:
            yield name, float(config)
        except ValueError:
            return


def _shown(value: float) -> str:
    text = f"{value:,}"
    return text if len(text) <= 30 else f"{text[:12]}… ({len(str(value)):,} digits)"


@contextmanager
def limited(what: str, holds: AskHolds) -> Iterator[None]:
    """Build a model of a config inside: what it is made of is counted, and whatever it runs into is one line.

    Parameters
    ----------
    what
        The class that is built, for the message.

    Raises
    ------
    CheckpointError
        If there is far more of it than the weight files hold, or the config's values give no model.
    """
    from torch.nn.modules import module

    count = _Count(holds)
    hooks = [
        module.register_module_parameter_registration_hook(count.parameter),
        module.register_module_buffer_registration_hook(count.buffer),
    ]
    try:
        with count.watch():
            yield
    except (AirLLMError, ImportError):
        raise
    except Exception as error:  # whatever an architecture runs into with such values
        reason = " ".join(str(error).split())[:160]
        raise CheckpointError(f"config.json gives no {what} ({type(error).__name__}{': ' * bool(reason)}{reason}); "
                              "download it again") from None  # fmt: skip
    finally:
        for hook in hooks:
            hook.remove()


class _Count:
    """What one thread registers in modules; the hooks are those of all threads."""

    def __init__(self, holds: AskHolds):
        self._holds, self._thread = holds, threading.get_ident()
        self._parameters, self._nbytes = 0, 0
        self._asked = False
        self._most = {"weights": PARAMETERS, "bytes": BUFFERS}

    def parameter(self, *_: Any) -> None:
        if threading.get_ident() == self._thread:
            self._parameters += 1
            self._check("weights", self._parameters, f"more than {self._parameters - 1:,} weights")

    def buffer(self, _: Any, __: str, tensor: Any) -> None:
        if threading.get_ident() == self._thread and tensor is not None and tensor.device.type != "meta":
            self._nbytes += tensor.nbytes
            self.room(self._nbytes)

    def room(self, nbytes: int) -> None:
        self._check("bytes", nbytes, f"computed tables of {format_bytes(nbytes)}")

    def _check(self, kind: str, amount: int, shown: str) -> None:
        if amount > self._most[kind] and not self._asked:
            held, self._asked = self._holds(), True
            self._most["weights"] = PARAMETERS + 4 * held.pieces if held else MOST_PARAMETERS
            self._most["bytes"] = BUFFERS + held.nbytes if held else MOST_BUFFERS
        if amount > self._most[kind]:
            raise CheckpointError(f"config.json asks for a model with {shown}, which the weight files do not hold; the "
                                  "two do not belong together, or one is damaged: download the checkpoint "
                                  "again")  # fmt: skip

    def watch(self) -> Any:
        """A mode in which a tensor that there is no room for is not made."""
        from torch.overrides import TorchFunctionMode

        room = self.room

        class Watch(TorchFunctionMode):
            def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                kwargs = kwargs or {}
                # Not more than all that goes in, multiplied: most calls are far below.
                if math.prod(_amounts([args, kwargs])) > MiB:
                    room(_nbytes(func, args, kwargs))
                return func(*args, **kwargs)

        return Watch()


def _amounts(value: Any) -> Iterator[float]:
    import torch

    if isinstance(value, torch.Tensor):
        yield 0 if value.device.type == "meta" else max(value.numel(), 1)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield max(abs(value), 1)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _amounts(each)
    elif isinstance(value, Mapping):
        yield from _amounts(list(value.values()))


def _nbytes(func: Any, args: Any, kwargs: Any) -> int:
    """Bytes of what a call gives, by a call without bytes; 0 where that cannot be told."""
    import torch

    def moved(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return torch.empty_like(value, device="meta")
        return type(value)(map(moved, value)) if type(value) in (list, tuple) else value

    if str(kwargs.get("device")) == "meta":
        return 0
    try:
        where = {"device": "meta"} if "device" in kwargs else {}
        result = func(*map(moved, args), **{name: moved(value) for name, value in kwargs.items()} | where)
    except (NotImplementedError, TypeError, ValueError, RuntimeError):  # it depends on values, or fails anyway
        return 0
    is_tensor = isinstance(result, torch.Tensor) and result.device.type == "meta"
    return result.untyped_storage().nbytes() if is_tensor else 0
