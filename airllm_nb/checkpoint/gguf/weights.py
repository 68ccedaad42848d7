"""GGUF → a plain checkpoint: config, tokenizer, and the weights dequantised one parameter at a time.

Names, permutations and merges come from transformers' own GGUF tables, so that the result is bit for bit what
``AutoModelForCausalLM.from_pretrained(folder, gguf_file=…, dtype=…)`` loads; RoPE scaling apart, which that leaves out.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...disk import status
from ...errors import AirLLMError, CheckpointError, UnsupportedModelError
from ...progress import ProgressCallback, silent
from ...store.manifest import StoreMeta
from ...store.shard import Entry
from ...tensors.dtypes import DTYPE_NAMES
from ..rewrite import is_complete, rewrite
from ..sizes import limited
from .cursor import called, damaged, read_as_array
from .header import GGUFFile, GGUFTensor, dequantised, read_gguf
from .rope import TENSORS, scale_rope

if TYPE_CHECKING:
    from ..source import Source

log = logging.getLogger(__name__)


class GGUFWeights(Mapping[str, torch.Tensor]):
    """Native parameter name → tensor, dequantised when it is asked for; holds no weights.

    Parameters
    ----------
    file
        The checked header.
    config
        The native config that :func:`gguf_config` gives for it.
    dtype
        ``"float32"``, ``"bfloat16"`` or ``"float16"``.

    Attributes
    ----------
    specs
        Parameter name → dtype and shape, in the order of the model.

    Raises
    ------
    UnsupportedModelError
        If the file's tensors do not cover the native model's parameters.
    """

    def __init__(self, file: GGUFFile, config: Any, dtype: str):
        from transformers import AutoModelForCausalLM
        from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

        self.file, self.dtype = file, getattr(torch, dtype)
        with limited(f"model of type {config.model_type}", lambda: file.holds), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        self.architecture = type(model).__name__
        self._processor = TENSOR_PROCESSORS.get(file.architecture, TensorProcessor)(config=config.to_dict())
        self._names = _name_map(model, self._processor)
        self._sources = _group(file, self._names)
        keys = getattr(model, "all_tied_weights_keys", None) or getattr(model, "_tied_weights_keys", None)
        tied = set(keys or ()) if getattr(config, "tie_word_embeddings", False) else set()
        wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()
                  if name not in tied or name in self._sources}  # fmt: skip
        missing = [name for name in wanted if name not in self._sources]
        if missing:
            raise UnsupportedModelError(f"{called(file.path)}: no tensor of this {file.architecture} file gives "
                                        f"{missing[0]!r} ({len(missing)} parameters in all); use the model's "
                                        "safetensors checkpoint")  # fmt: skip
        self.specs = {name: Entry(name, DTYPE_NAMES[self.dtype], shape) for name, shape in wanted.items()}

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    def __getitem__(self, name: str) -> torch.Tensor:
        import numpy as np

        # A copy of what is still a view of the file: its pages are read-only, and a tensor is not.
        try:
            values = self.rearranged(name, dequantised)
        except AirLLMError:
            raise
        except (ValueError, IndexError, RuntimeError) as error:  # transformers' rules trust the shapes of the file
            shapes = ", ".join(f"{source.name} {list(source.shape)}" for source in self._sources[name])
            raise damaged(self.file.path, f"{name!r} of shape {self.specs[name].shape} cannot be made of {shapes} "
                                          f"({error})") from None  # fmt: skip
        tensor = values if isinstance(values, torch.Tensor) else torch.from_numpy(np.require(values, requirements="CW"))
        if tuple(tensor.shape) != self.specs[name].shape:
            raise damaged(self.file.path, f"{name!r} has shape {tuple(tensor.shape)}, the config of the same file "
                                          f"says {self.specs[name].shape}")  # fmt: skip
        return tensor.to(self.dtype)

    def sources(self, name: str) -> list[GGUFTensor]:
        """The file's tensors that make up a parameter."""
        return self._sources[name]

    def rearranged(self, name: str, values: Callable[[GGUFTensor], Any]) -> Any:
        """A parameter, as transformers' own rules make it of ``values`` (numpy arrays) of the file's tensors."""
        # Merged experts are the processor's own work: it fills this dict over several of the file's tensors.
        merged: dict[str, Any] = {"tensors": {}}
        for source in self._sources[name]:
            result = self._processor.process(
                weights=values(source), name=source.name, tensor_key_mapping=self._names, parsed_parameters=merged
            )
            if result.name is not None:
                merged["tensors"][name] = result.weights
        return merged["tensors"][name]


def convert_gguf(
    source: Source, folder: Path, dtype: str, names: Collection[str] = (), *, progress: ProgressCallback = silent
) -> Path:
    """Dequantise a GGUF file into ``folder``, once: a complete Hugging Face checkpoint, tokenizer included.

    Parameters
    ----------
    dtype
        ``"float32"``, ``"bfloat16"`` or ``"float16"``; every weight gets it.
    names
        The weights that are written, where the others are streamed from the file itself.

    Raises
    ------
    CheckpointError, UnsupportedModelError
        If the file is damaged, or its architecture is not one that transformers maps.
    StoreError
        If the folder cannot be written.
    """
    assert source.gguf_file is not None
    meta = StoreMeta("none", dtype, source.fingerprint)
    if is_complete(folder, meta):
        return folder
    file = read_gguf(source.gguf_file)
    config = gguf_config(file)
    weights = GGUFWeights(file, config, dtype)
    weights.specs = {name: weights.specs[name] for name in names} if names else weights.specs

    def companions(target: Path) -> None:
        save_companions(file, config, target, dtype)

    origin = str(source.gguf_file) if names else source.origin  # beside a file that stays where it is
    return rewrite(folder, weights, meta, companions, progress, origin, source.files)


def gguf_config(file: GGUFFile) -> Any:
    """The native config of a GGUF file, with ``architectures`` filled in.

    Raises
    ------
    UnsupportedModelError
        If transformers has no GGUF table for the architecture, or it is not a causal language model.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    known = supported_architectures()
    if file.architecture not in known:
        raise _unsupported(file, known)
    stat = status(file.path)
    file.check_sizes()
    with _guard(file):
        config = copy.deepcopy(_parsed_config(file.path, stat.st_size, stat.st_mtime_ns))
    if config.model_type not in CAUSAL:
        raise _unsupported(file, known)
    names = CAUSAL[config.model_type]
    config.architectures = [names if isinstance(names, str) else names[0]]
    return config


@functools.lru_cache(maxsize=8)
def _parsed_config(path: Path, nbytes: int, changed: int) -> Any:
    """Which takes transformers seconds: a plan and a load after it ask for the same."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    file = read_gguf(path)
    if file.is_split:  # transformers looks for the head in the first part alone
        config.tie_word_embeddings = "output.weight" not in file.tensors or file.architecture in ("falcon", "bloom")
    scale_rope(config, file)
    _scale_attention(config, file.architecture)
    return config


def _scale_attention(config: Any, architecture: str) -> None:
    """Gemma's largest models divide by another number than the others; a file does not say it, their layers do.

    So does llama.cpp tell them (``f_attention_scale`` in its ``src/llama-model.cpp``).
    """
    if config.num_hidden_layers == {"gemma2": 46, "gemma3": 62}.get(architecture):
        config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads


def supported_architectures() -> tuple[str, ...]:
    """The GGUF architectures of causal language models that the installed transformers can map."""
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    spelled = {"qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe", "minimax_m2": "minimax-m2"}
    # Of gpt-oss it reads neither the RoPE scaling nor the experts.
    other = {"general", "tokenizer", "t5", "umt5", "mistral", "gpt_oss"}
    return tuple(sorted(spelled.get(name, name) for name in GGUF_SUPPORTED_ARCHITECTURES if name not in other))


def save_companions(file: GGUFFile, config: Any, folder: Path, dtype: str) -> None:
    """Write config.json, generation_config.json and the tokenizer of a GGUF file into ``folder``."""
    from transformers import AutoTokenizer, GenerationConfig

    config.dtype = dtype
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    with _guard(file):
        tokenizer = AutoTokenizer.from_pretrained(file.path.parent, gguf_file=file.path.name)
    _set_special_tokens(tokenizer, file)
    # True in transformers 5.15, for which 5.23 warns whoever loads it and ignores it.
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.save_pretrained(folder)


def _set_special_tokens(tokenizer: Any, file: GGUFFile) -> None:
    """Name the special tokens as the file does; some versions of transformers leave one out or take a wrong one."""
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        number = file.metadata.get(f"tokenizer.ggml.{theirs}_token_id")
        if isinstance(number, int) and 0 <= number < len(tokenizer):
            token = tokenizer.convert_ids_to_tokens(number)
            if getattr(tokenizer, f"{ours}_token") != token:
                setattr(tokenizer, f"{ours}_token", token)


class _Names:
    """What transformers' name map asks of a model, two levels deep.

    Its recursion rebuilds a table for every module: 66 s for 80 layers. Only the base model inside the causal one
    can add names, because everything deeper has lost its layer number.
    """

    def __init__(self, module: Any, config: Any, depth: int = 1):
        self._module, self.config, self._depth = module, config, depth

    def state_dict(self) -> dict[str, Any]:
        return self._module.state_dict()

    def named_children(self) -> list[tuple[str, _Names]]:
        if not self._depth:
            return []
        return [(name, _Names(child, self.config, self._depth - 1)) for name, child in self._module.named_children()]


def _name_map(model: Any, processor: Any) -> dict[str, str]:
    from transformers.modeling_gguf_pytorch_utils import get_gguf_hf_weights_map

    try:
        return get_gguf_hf_weights_map(_Names(model, model.config), processor)
    except NotImplementedError as error:
        raise UnsupportedModelError(f"{str(error).splitlines()[0]}; pip install -U gguf") from None


def _group(file: GGUFFile, names: dict[str, str]) -> dict[str, list[GGUFTensor]]:
    """Parameter name → the file's tensors that make it up (several for merged experts)."""
    groups: dict[str, list[GGUFTensor]] = {}
    for tensor in file.tensors.values():
        # Merged expert parameters have no ".weight" of their own, the file's tensors do.
        target = names.get(tensor.name) or names.get(tensor.name.removesuffix(".weight"))
        if target is not None:
            groups.setdefault(target, []).append(tensor)
        elif tensor.name not in TENSORS:
            log.info("%s: tensor %s has no place in the native model", file.path.name, tensor.name)
    return groups


def _unsupported(file: GGUFFile, known: tuple[str, ...]) -> UnsupportedModelError:
    return UnsupportedModelError(f"{called(file.path)}: GGUF architecture {file.architecture!r} is not one that "
                                 f"transformers maps here; these work: {', '.join(known)}")  # fmt: skip


@contextmanager
def _guard(file: GGUFFile) -> Iterator[None]:
    """Errors of transformers' GGUF readers, as one line."""
    try:
        with read_as_array():
            yield
    except AirLLMError:
        raise
    except ImportError as error:
        raise UnsupportedModelError(f"reading GGUF files needs a package: {str(error).splitlines()[0]}") from None
    except Exception as error:  # the tokenizers library raises plain Exception
        raise CheckpointError(f"{called(file.path)}: transformers cannot read its metadata ({type(error).__name__}: "
                              f"{str(error).splitlines()[0] if str(error) else 'no detail'})") from error  # fmt: skip
