"""Checkpoints that others packed, streamed as they lie, say what the format's own library says of them, dequantised.

``docs/FORMATS.md`` is what was found: ``AIRLLM_NB_WRITE_DOCS=1 pytest tests/test_formats.py`` writes it anew.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import packed_awq
import packed_bnb
import packed_fp8
import packed_gptq
import packed_mxfp4
import pytest
import torch
from gguf_files import dequantised_gguf, mixed, tiny_llama_gguf, tiny_qwen2moe_gguf
from tiny_models import IDS, run, streamed

from airllm_nb import AutoModel
from airllm_nb.checkpoint.gguf_file import read_gguf
from airllm_nb.checkpoint.index import read_index
from airllm_nb.errors import OptionError
from airllm_nb.model import skeleton

pytestmark = pytest.mark.usefixtures("one_thread")

DOCS = Path(__file__).parents[1] / "docs" / "FORMATS.md"
WRITE = "AIRLLM_NB_WRITE_DOCS"


@dataclass(frozen=True)
class Case:
    """A checkpoint: ``make(folder, source)`` packs it (``source`` is a plain Llama), ``reference`` is its model.

    ``packed_as`` is what a loaded model says of its weights.
    """

    format: str
    variant: str
    made_by: str
    packed_as: str
    make: Callable[[Path, Path], Path]
    reference: Callable[[Path], Any]


def bnb(variant: str, packed_as: str, made_by: str = "transformers", **options: Any) -> Case:
    return Case("bitsandbytes", variant, made_by, packed_as,
                lambda folder, _: packed_bnb.make(folder, **options), packed_bnb.reference)  # fmt: skip


def fp8(variant: str, packed_as: str, make: Callable[..., Path] = packed_fp8.make, **options: Any) -> Case:
    made_by = "transformers' conversion" if make is packed_fp8.make else "the definition"
    return Case("FP8", variant, made_by, packed_as, lambda folder, _: make(folder, **options), packed_fp8.reference)


def gptq(variant: str, packed_as: str, **options: Any) -> Case:
    def make(folder: Path, source: Path) -> Path:
        return packed_gptq.make(folder / "gptq", source, **options)

    return Case("GPTQ", variant, "AutoGPTQ", packed_as, make, packed_gptq.reference)


def awq(variant: str, packed_as: str, **options: Any) -> Case:
    def make(folder: Path, source: Path) -> Path:
        return packed_awq.make(folder / "awq", source, **options)

    return Case("AWQ", variant, "AutoAWQ", packed_as, make, packed_awq.reference)


def gguf(variant: str, packed_as: str, make: Callable[..., Path] = tiny_llama_gguf, **options: Any) -> Case:
    return Case("GGUF", variant, "gguf", packed_as,
                lambda folder, _: make(folder / "tiny.gguf", words=260, **options), dequantised_gguf)  # fmt: skip


def moe_gptq(folder: Path, source: Path) -> Path:
    plain = packed_gptq.tiny_qwen2_moe(folder / "plain", source)
    return packed_gptq.make(folder / "gptq", plain)


LARGE: dict[str, Any] = {"hidden": 256, "inner": 512}
CASES = [
    bnb("4-bit, nf4, double quantisation", "bitsandbytes: nf4"),
    bnb("4-bit, nf4", "bitsandbytes: nf4", double=False),
    bnb("4-bit, fp4", "bitsandbytes: fp4", kind="fp4"),
    bnb("4-bit, GPT-2 (transposed)", "bitsandbytes: nf4", model_type="gpt2"),
    bnb("8-bit (LLM.int8)", "bitsandbytes: int8", kind="int8"),
    Case("bitsandbytes", "4-bit, each expert apart (Mixtral)", "bitsandbytes", "bitsandbytes: nf4",
         lambda folder, _: packed_bnb.make_mixture(folder), packed_bnb.reference),
    fp8("blocks", "fp8"),
    fp8("blocks, scales of powers of two", "fp8", scales="ue8m0"),
    fp8("one scale a matrix", "fp8", block=None),
    fp8("blocks, mixture (Qwen3-MoE)", "fp8", model_type="qwen3_moe"),
    fp8("blocks, mixture (DeepSeek-V3)", "fp8", model_type="deepseek_v3"),
    fp8("compressed-tensors, a scale each row", "compressed-tensors: fp8", packed_fp8.make_compressed),
    Case("MXFP4", "experts of gpt-oss", "random blocks", "mxfp4",
         lambda folder, source: packed_mxfp4.make(folder / "mxfp4", source), packed_mxfp4.reference),
    gptq("4-bit, groups of 32", "gptq: 4-bit"),
    gptq("4-bit, act-order, asymmetric", "gptq: 4-bit", desc_act=True, sym=False),
    gptq("3-bit, version 2", "gptq: 3-bit", bits=3, checkpoint_format="gptq_v2"),
    gptq("8-bit, one group", "gptq: 8-bit", bits=8, group_size=-1),
    Case("GPTQ", "4-bit, mixture (Qwen2-MoE)", "AutoGPTQ", "gptq: 4-bit", moe_gptq, packed_gptq.reference),
    awq("4-bit, groups of 32", "awq: 4-bit"),
    awq("4-bit, symmetric", "awq: 4-bit", zero_point=False),
    *(gguf(kind, f"GGUF: {kind}", kind=kind) for kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")),
    *(gguf(kind, f"GGUF: {kind}", kind=kind, **LARGE) for kind in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")),
    gguf("Q4_K_M, tied head", "GGUF: Q4_K, Q6_K", kind=mixed, tied=True, **LARGE),
    gguf("Q8_0, mixture (Qwen2-MoE)", "GGUF: Q8_0", tiny_qwen2moe_gguf),
]  # fmt: skip
CASES_BY_NAME = {f"{case.format} {case.variant}": case for case in CASES}
FOUND: dict[str, str] = {}


@pytest.fixture(scope="module", params=CASES_BY_NAME)
def made(request: Any, tmp_path_factory: pytest.TempPathFactory, tiny_llama: Any) -> Iterator[tuple[str, Path, Any]]:
    case = CASES_BY_NAME[request.param]
    folder = tmp_path_factory.mktemp("packed")
    path = case.make(folder, tiny_llama())
    yield request.param, path, run(case.reference(path))


def stored_bytes(path: Path) -> dict[str, int]:
    """Bytes of every tensor, by the checkpoint's own header."""
    if path.suffix == ".gguf":
        return {name: tensor.nbytes for name, tensor in read_gguf(path).tensors.items()}
    return {name: info.nbytes for name, info in read_index(path).items()}


def test_it_says_what_the_library_says(made: tuple[str, Path, Any], tmp_path: Path) -> None:
    name, path, (tokens, logits) = made
    worst = 0.0
    for open_it in (in_place, through_a_device):
        with open_it(path, tmp_path) as model:
            assert model.status()["compression"] == CASES_BY_NAME[name].packed_as
            ours_tokens, ours = run(model)
        worst = max(worst, ((ours - logits).abs().max() / logits.abs().max()).item())
        assert worst <= 1e-4
        assert torch.equal(ours_tokens, tokens)
    FOUND[name] = f"{worst:.0e}" if worst else "none"


def in_place(path: Path, shards: Path) -> Any:
    return AutoModel.from_pretrained(path, dtype="float32", layer_shards_saving_path=shards)


def through_a_device(path: Path, shards: Path, **options: Any) -> Any:
    """Through a memory with room for three matrices."""
    whole, skeleton.cut_units.__defaults__ = skeleton.cut_units.__defaults__, (12_000,)
    try:
        return streamed(path, layer_shards_saving_path=shards, **options)
    finally:
        skeleton.cut_units.__defaults__ = whole


def test_the_packed_bytes_move_and_no_others(made: tuple[str, Path, Any], tmp_path: Path) -> None:
    _, path, _ = made
    with through_a_device(path, tmp_path, prefetching=False) as model:
        units = model._prepared.units
        # Some vectors of a GGUF file are written once; whatever streams lies in the checkpoint.
        files = {piece.extent.path for unit in units for piece in unit.stream.pieces}
        assert all(path in (file, file.parent) for file in files)
        # Each byte of the checkpoint is in one unit or in none.
        pieces = {(piece.extent.path, piece.extent.offset + at) for unit in units if unit.kind != "embedding"
                  for piece in unit.stream.pieces for at in range(0, piece.extent.nbytes, 1 << 20)}  # fmt: skip
        assert len(pieces) >= len(units) - 2
        model(IDS)
        moved = model.trace.totals["copy"].nbytes
        assert moved == model.plan.streamed_bytes > 0
    assert moved <= sum(stored_bytes(path).values())


def test_what_is_packed_is_encoded_again_for_gguf_only(made: tuple[str, Path, Any], tmp_path: Path) -> None:
    name, path, _ = made
    options = {"compression": "4bit", "layer_shards_saving_path": tmp_path}
    if CASES_BY_NAME[name].format == "GGUF":
        with AutoModel.from_pretrained(path, **options) as model:
            assert model.status()["compression"] == "4bit", "a store made from what transformers dequantises"
        return
    with pytest.raises(OptionError, match="packed already"):
        AutoModel.from_pretrained(path, **options)


# ---- what is written down --------------------------------------------------------------------------------------------

KERNELS = {
    "bitsandbytes": "bitsandbytes' 4-bit kernel for few tokens, else one matrix at a time",
}
ALONE = "one matrix at a time"
ON_CPU = "one matrix at a time, kept where RAM has room for all"
NOTES = {
    "bitsandbytes": "as `save_pretrained` writes it; `unsloth/*-bnb-4bit`",
    "FP8": "DeepSeek-V3, Qwen3-FP8, Llama-FP8, compressed-tensors; activations are not rounded",
    "MXFP4": "gpt-oss",
    "GPTQ": "2, 3, 4 and 8 bits, versions 1 and 2",
    "AWQ": "4 bits, version gemm",
    "GGUF": "every type that the `gguf` package can dequantise",
}


def document() -> str:
    """The table of formats and devices."""
    variants = [f"| {case.format} | {case.variant} | {case.made_by} | {FOUND[name]} |"
                for name, case in CASES_BY_NAME.items()]  # fmt: skip
    formats = dict.fromkeys(case.format for case in CASES)
    devices = [f"| {name} | {NOTES[name]} | {ON_CPU} | {(gpu := KERNELS.get(name, ALONE))} | {gpu} | {gpu} |"
               for name in formats]  # fmt: skip
    return "\n".join([HEAD, *devices, VARIANTS, *variants, ""])


HEAD = """# Formats

Checkpoints that somebody has quantised already stream as they lie: their packed bytes go from the file to the GPU, are
never encoded anew, and are unpacked there, one matrix at a time into one reused scratch, or computed on by a kernel of
the format's library. `tests/test_formats.py` makes this page and fails where it no longer holds.

| format | what it is | CPU | GPU without bfloat16 (computes in float16) | GPU with bfloat16 | GPU with FP8 |
|---|---|---|---|---|---|"""
VARIANTS = """
The columns for GPUs say which code runs; `make test-gpu` compares it with the CPU's on the GPU at hand. FP8 weights are
computed on in bfloat16 or float16 on every GPU: FP8 products would round activations too.

What cannot be streamed is refused with the reason: other `quant_method`s (hqq, aqlm, exl2, mlx, …), GPTQ and AWQ in
layouts of one kernel (marlin, gemv), compressed-tensors other than FP8, split GGUF files. A GGUF architecture whose
layout transformers changes within rows (GPT-2) is dequantised once into a store.

Each variant below was made tiny by the library named, loaded from disk in place and through a device memory with room
for three matrices, and compared in float32 with the model that the format's own library, or transformers, dequantises:
the greatest difference of a logit is relative to the greatest logit, and eight greedy tokens of two prompts are equal.
The bytes copied in a sweep are those of the file.

| format | variant | made by | difference |
|---|---|---|---|"""


def test_the_page_of_formats_holds(request: pytest.FixtureRequest) -> None:
    """Last: it writes down what the tests above found."""
    if missing := CASES_BY_NAME.keys() - FOUND.keys():
        pytest.skip(f"only a part of the formats was tested here: {len(missing)} are missing")
    if os.environ.get(WRITE):
        DOCS.write_text(document(), encoding="utf-8")
    said = DOCS.read_text(encoding="utf-8").splitlines()
    # Differences depend on the processor; that they are small is asserted above.
    begin = said.index(VARIANTS.splitlines()[-1])
    wanted = document().splitlines()
    assert said[:begin] == wanted[:begin], f"run this file with {WRITE}=1"
    assert [row.rpartition(" | ")[0] for row in said[begin:]] == [row.rpartition(" | ")[0] for row in wanted[begin:]]
