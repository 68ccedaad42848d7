"""Every causal language model of transformers, made tiny and streamed from disk, says what the resident model says.

``docs/MODELS.md`` is what was found; with ``AIRLLM_NB_WRITE_DOCS=1`` in the environment this file writes it anew.
"""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import transformers
from tiny_models import generated, resident, run, streamed
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES as MULTIMODAL

from airllm_nb.decode import prefill
from airllm_nb.engine.facade import StreamedModel
from airllm_nb.errors import AirLLMError
from airllm_nb.model import skeleton
from airllm_nb.plan.needs import cache_bytes

pytestmark = pytest.mark.usefixtures("one_thread")

DOCS = Path(__file__).parents[2] / "docs" / "MODELS.md"
WRITE = "AIRLLM_NB_WRITE_DOCS"
# The tables below and docs/MODELS.md are of this one; another knows other models.
VERSION = "5.23.0"
# Two prompts, the second padded at its left.
LONG = torch.randint(3, 250, (2, 23), generator=torch.Generator().manual_seed(2))
LONG_MASK = torch.ones_like(LONG)
LONG[1, :9] = LONG_MASK[1, :9] = 0
# A whole block as one unit, and each of its matrices as its own.
UNIT_BYTES = {"blocks": skeleton.UNIT_BYTES, "parts": 12_000}

# Models of several parts, one of them a decoder that no causal class is registered for.
OF_PARTS = (
    "aya_vision", "cohere2_vision", "glm4v", "granite_speech", "idefics3", "internvl", "kimi_k25", "lfm2_vl", "llava",
    "llava_next", "llava_onevision", "minimax_m3_vl", "mistral3", "mistral_large4", "paligemma", "qwen2_5_vl",
    "qwen2_audio", "qwen2_vl", "qwen3_vl", "qwen3_vl_moe", "smolvlm", "voxtral",
)  # fmt: skip
NOT_TINY = {
    "gemma3n": "its vision tower needs the timm library; the text model alone is gemma3n_text",
    "gemma4_assistant": "drafts for another model and runs on that one's states only",
    "gemma4_unified_assistant": "drafts for another model and runs on that one's states only",
    "musicgen": "speaks codes of sound; transformers makes its decoder from a config of its own only",
    "musicgen_melody": "speaks codes of sound; transformers makes its decoder from a config of its own only",
}
# By the message: each of these is refused before anything is read.
REFUSED = {
    "emu3": "the checkpoint lacks model.embed_tokens.weight",
}
# transformers itself cannot run them in bfloat16 on a CPU.
NOT_HALF = ("reformer", "xlnet")
REASONS = {
    "emu3": "the text part has other names in the whole checkpoint, which transformers does not know either",
}

# What holds for published checkpoints, not for those that are saved today; see test_layouts.py.
NOTES = {
    "qwen3_vl_moe": "experts as published, transposed, are refused: load and save them once with transformers",
}


@dataclass
class Row:
    """What was found of one type."""

    result: str
    remark: str = ""


ROWS: dict[str, Row] = {}


@pytest.mark.parametrize("model_type", [*CAUSAL, *OF_PARTS])
def test_streamed_equals_resident(model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if model_type not in CONFIG_MAPPING:
        assert transformers.__version__ != VERSION
        pytest.skip(f"transformers {transformers.__version__} does not know {model_type}")
    ROWS[model_type] = Row("**fails**")
    if model_type in NOT_TINY:
        with pytest.raises(Exception):  # noqa: B017 - whatever transformers raises; else the table is out of date
            tiny_models.save_tiny(model_type, tmp_path)
        ROWS[model_type] = Row("cannot be made tiny", NOT_TINY[model_type])
        return
    tiny_models.save_tiny(model_type, tmp_path)
    if model_type in REFUSED:
        with pytest.raises(AirLLMError, match=re.escape(REFUSED[model_type])):
            streamed(tmp_path)
        ROWS[model_type] = Row("refused", REASONS[model_type])
        return
    native = resident(tmp_path)
    expected = run(native)
    remarks = []
    for cut, limit in UNIT_BYTES.items():
        monkeypatch.setattr(skeleton.cut_units, "__defaults__", (limit,))
        with left_on_disk() as left, streamed(tmp_path) as model:
            tokens, logits = run(model)
            assert torch.equal(logits, expected[1]), cut
            assert torch.equal(tokens, expected[0]), cut
            if cut == "blocks":
                remarks = remarks_on(model, left)
    check_chunks(native)
    check_cache(native)
    check_half(model_type, tmp_path)
    remarks += [NOTES[model_type]] if model_type in NOTES else []
    ROWS[model_type] = Row("streams exactly", "; ".join(remarks))


def check_half(model_type: str, folder: Path) -> None:
    """Weights, states, and buffers that no checkpoint holds have the precision that they have in the resident model."""
    try:
        expected = run(resident(folder, torch.bfloat16))
    except RuntimeError as error:
        assert model_type in NOT_HALF and re.search("dtype|scalar type", str(error))
        return
    assert model_type not in NOT_HALF
    with streamed(folder, dtype="bfloat16") as model:
        tokens, logits = run(model)
    assert torch.equal(logits, expected[1]) and torch.equal(tokens, expected[0])


class left_on_disk(list[str]):
    """What the log says is left on disk."""

    def __enter__(self) -> left_on_disk:
        self._handler = logging.Handler()
        self._handler.emit = lambda record: self.append(record.getMessage())  # type: ignore[method-assign]
        self._logger, self._level = logging.getLogger("airllm_nb.model.units"), logging.INFO
        self._logger.addHandler(self._handler)
        self._before = self._logger.level
        self._logger.setLevel(logging.INFO)
        return self

    def __exit__(self, *_: object) -> None:
        self._logger.removeHandler(self._handler)
        self._logger.setLevel(self._before)


def remarks_on(model: StreamedModel, left: list[str]) -> list[str]:
    remarks = []
    if type(model.config) is not type(model._prepared.config):
        remarks.append("the text part of the whole checkpoint")
    for message in left:
        names = message.partition(": ")[2]
        remarks.append(f"left on disk: {', '.join(f'`{name}`' for name in names.split(', '))}")
    if model._executor is not None and model._executor.resets:
        remarks.append("runs its blocks in turns of its own, so that less is read ahead")
    if why := prefill._why_model_is_whole(model.native, 1):
        assert why.startswith("the architecture")
        remarks.append("long prompts run in one piece")
    return remarks


def check_chunks(native: Any) -> None:
    """Where long prompts may be cut, the answers are those of the whole ones."""
    if not prefill._why_model_is_whole(native, LONG.shape[1]):
        cut, whole = (generated(native, LONG, attention_mask=LONG_MASK, **options)
                      for options in ({"prefill_chunk_size": 5}, {}))  # fmt: skip
        assert torch.equal(cut, whole)


def check_cache(native: Any) -> None:
    """What the cache grows by, a token, is no more than what is planned for it."""
    sizes = []
    for length in (20, 60):
        with torch.inference_mode():
            output = native(torch.arange(length)[None] + 3, use_cache=True)
        sizes.append(sum(tensor.nbytes for tensor in tensors_in(getattr(output, "past_key_values", None), set())))
    assert sizes[1] - sizes[0] <= cache_bytes(native.config, 40, 1, 4)


def tensors_in(value: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(each, seen)
    elif hasattr(value, "__dict__"):
        for name, each in vars(value).items():
            if "config" not in name:
                yield from tensors_in(each, seen)


# ---- the tables ------------------------------------------------------------------------------------------------------


def test_the_tables_name_models_that_there_are() -> None:
    if transformers.__version__ != VERSION:
        pytest.skip(f"the tables are of transformers {VERSION}")
    assert {*NOT_TINY, *REFUSED, *tiny_models.FIXES} <= {*CAUSAL, *OF_PARTS}
    assert set(MULTIMODAL) - set(CAUSAL) >= set(OF_PARTS)
    assert set(REASONS) == set(REFUSED)
    assert set(CONFIG_MAPPING) >= prefill.WHOLE | prefill.WHOLE_AT_FIRST | prefill.STATEFUL_IN_CHUNKS
    assert not (prefill.WHOLE | prefill.WHOLE_AT_FIRST) & prefill.STATEFUL_IN_CHUNKS


def test_nine_in_ten_stream() -> None:
    assert 10 * len(set(CAUSAL) - set(NOT_TINY) - set(REFUSED)) >= 9 * len(CAUSAL)


def test_the_document_says_what_was_found() -> None:
    if transformers.__version__ != VERSION:
        pytest.skip(f"docs/MODELS.md is of transformers {VERSION}")
    if missing := {*CAUSAL, *OF_PARTS} - set(ROWS):
        pytest.skip(f"only a part was run: {len(missing)} architectures are missing")
    text = document()
    if os.environ.get(WRITE):
        DOCS.write_text(text, encoding="utf-8")
    assert DOCS.read_text(encoding="utf-8") == text, f"run this file with {WRITE}=1 and commit docs/MODELS.md"


def document() -> str:
    counts = Counter(ROWS[kind].result for kind in CAUSAL)
    streams = counts.pop("streams exactly")
    others = ", ".join(f"{count} {result}" for result, count in sorted(counts.items()))
    head = HEAD.format(version=VERSION, total=len(CAUSAL), streams=streams, others=others)
    return head + table(CAUSAL) + PARTS + table({kind: MULTIMODAL[kind] for kind in OF_PARTS})


def table(classes: Mapping[str, Any]) -> str:
    lines = ["| `model_type` | class | result | remarks |", "|---|---|---|---|"]
    for kind in sorted(classes):
        lines.append(f"| `{kind}` | {classes[kind]} | {ROWS[kind].result} | {ROWS[kind].remark} |")
    return "\n".join(lines) + "\n"


HEAD = """# Models

Every causal language model that transformers {version} has a class for, {total} in all: {streams} stream exactly,
{others}.

`tests/whole/test_architectures.py` makes this table, and fails where it no longer holds. Each architecture is made tiny
(four layers of width 64, random weights, at least one layer of each kind that it has), saved, and loaded from disk
through a device memory with room for three units and less RAM than weights, once in whole blocks and once in single
matrices.
*Streams exactly* means that in float32 all logits of a prompt and eight greedy tokens are those of the resident model,
bit for bit; that prompts which may be cut give the same when cut; and that the cache takes no more than is planned for
it.

The code is always transformers' own; code of a repository is never run. What is not in this table (encoders,
encoder-decoders, models of images or sound alone) is refused by name before anything is downloaded.

"""
PARTS = """
## Checkpoints of several parts

Where a model sees or hears too, its decoder runs on text from the whole checkpoint. What only images or sound need is
left on disk, and the log says so; given an image all the same, its weights are read when they are used. Of the types
above, those of several parts are marked; these are more that were tried:

"""
