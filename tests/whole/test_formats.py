"""Checkpoints that others packed, streamed as they lie, say what the format's own library says of them, dequantised.

``docs/FORMATS.md`` is what was found: ``AIRLLM_NB_WRITE_DOCS=1 pytest tests/whole/test_formats.py`` writes it anew.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
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
from safetensors.torch import load_file
from tiny_models import IDS, run, streamed

from airllm_nb import AutoModel
from airllm_nb.checkpoint.gguf.header import read_gguf
from airllm_nb.config import LoadOptions
from airllm_nb.encoding.base import Encoding
from airllm_nb.encoding.kernels import launch as kernels
from airllm_nb.errors import OptionError
from airllm_nb.model import placing, skeleton
from airllm_nb.model.device import choose_dtype
from airllm_nb.stream.unit import ALIGNMENT
from airllm_nb.tensors.index import read_index

pytestmark = pytest.mark.usefixtures("one_thread")

DOCS = Path(__file__).parents[2] / "docs" / "FORMATS.md"
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


def mixture(maker: Any) -> Callable[[Path, Path], Path]:
    def make(folder: Path, source: Path) -> Path:
        return maker.make(folder / "packed", packed_gptq.tiny_qwen2_moe(folder / "plain", source))

    return make


def dynamic_gptq(folder: Path, source: Path) -> Path:
    """GPTQModel's rules for single matrices: some of 8 bits, some not quantised."""
    four, eight = (packed_gptq.make(folder / f"{bits}", source, bits=bits) for bits in (4, 8))
    tensors = {name: value for name, value in stored(four).items() if not OTHERS.search(name)}
    tensors |= {name: value for name, value in stored(eight).items() if EIGHT.search(name)}
    tensors |= {name: value for name, value in packed_gptq.plain_tensors(source).items() if PLAIN.search(name)}
    settings = json.loads((four / "config.json").read_text("utf-8"))["quantization_config"]
    rules = {f"+:{EIGHT.pattern}": {"bits": 8}, f"-:{PLAIN.pattern}": {}}
    return packed_gptq.save(folder / "gptq", source, tensors, settings | {"dynamic": rules})


EIGHT, PLAIN = re.compile(r".*\.down_proj"), re.compile(r".*\.0\.self_attn\.q_proj")
OTHERS = re.compile(f"{EIGHT.pattern}|{PLAIN.pattern}")


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def dynamic_reference(path: Path) -> Any:
    """Each matrix as the library dequantises it in the checkpoint that it is from."""
    four, eight = (packed_gptq.weights(path.parent / bits) for bits in ("4", "8"))
    weights = four | {name: value for name, value in eight.items() if EIGHT.search(name)}
    weights |= {name: value.float() for name, value in stored(path).items() if PLAIN.search(name)}
    return packed_gptq.load_plain(path, weights)


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
    fp8("compressed-tensors, a scale each row, mixture (Qwen3-MoE)", "compressed-tensors: fp8",
        packed_fp8.make_compressed, model_type="qwen3_moe"),
    fp8("compressed-tensors, one scale a matrix, mixture (Qwen3-MoE)", "compressed-tensors: fp8",
        packed_fp8.make_compressed, model_type="qwen3_moe", strategy="tensor"),
    Case("MXFP4", "experts of gpt-oss", "random blocks", "mxfp4",
         lambda folder, source: packed_mxfp4.make(folder / "mxfp4", source), packed_mxfp4.reference),
    gptq("4-bit, groups of 32", "gptq: 4-bit"),
    gptq("4-bit, act-order, asymmetric", "gptq: 4-bit", desc_act=True, sym=False),
    gptq("3-bit, version 2", "gptq: 3-bit", bits=3, checkpoint_format="gptq_v2"),
    gptq("8-bit, one group", "gptq: 8-bit", bits=8, group_size=-1),
    Case("GPTQ", "4-bit, mixture (Qwen2-MoE)", "AutoGPTQ", "gptq: 4-bit", mixture(packed_gptq), packed_gptq.reference),
    Case("GPTQ", "dynamic: 4-bit, 8-bit and plain", "AutoGPTQ", "gptq: 4-bit, 8-bit", dynamic_gptq, dynamic_reference),
    awq("4-bit, groups of 32", "awq: 4-bit"),
    awq("4-bit, symmetric", "awq: 4-bit", zero_point=False),
    Case("AWQ", "4-bit, mixture (Qwen2-MoE)", "AutoAWQ", "awq: 4-bit", mixture(packed_awq), packed_awq.reference),
    *(gguf(kind, f"GGUF: {kind}", kind=kind) for kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")),
    *(gguf(kind, f"GGUF: {kind}", kind=kind, **LARGE) for kind in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")),
    gguf("Q4_K_M, tied head", "GGUF: Q4_K, Q6_K", kind=mixed, tied=True, **LARGE),
    gguf("Q8_0, mixture (Qwen2-MoE)", "GGUF: Q8_0", tiny_qwen2moe_gguf),
]  # fmt: skip
CASES_BY_NAME = {f"{case.format} {case.variant}": case for case in CASES}
FIRST = list({case.format: name for name, case in reversed(CASES_BY_NAME.items())}.values())
FOUND: dict[str, str] = {}


@dataclass
class Runs:
    """How a format was seen to run: ``kernels`` are packings that have one of its library for packed bytes."""

    keeps: bool = True
    one_by_one: bool = True
    kernels: set[str] = field(default_factory=set)
    has_ours: bool = False
    dtypes: dict[str, None] = field(default_factory=dict)


RUNS: dict[str, Runs] = {}


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


# Vectors stay on the device, and so do small tables of a quantisation; those of experts are stacked, and move.
# Scales of activations, and what only says how weights are packed, are for nobody.
RESIDENT = re.compile(r"norm|ln_|wpe|bias|sinks|nested_|quant_state|quant_map|SCB|weight_format|g_idx|input_scale")
STACKED = re.compile(r"experts.*(nested_|_bias)")


def streaming(sizes: dict[str, int]) -> dict[str, int]:
    """Those of the tensors that pass through the device in each sweep: every matrix, with its scales."""
    is_tied = not sizes.keys() & {"lm_head.weight", "output.weight"}
    table = re.compile("embd|embed_tokens|wte")
    return {
        name: nbytes
        for name, nbytes in sizes.items()
        if (STACKED.search(name) or not RESIDENT.search(name)) and (is_tied or not table.search(name))
    }


def test_it_says_what_the_library_says(made: tuple[str, Path, Any], tmp_path: Path) -> None:
    name, path, (tokens, logits) = made
    worst = 0.0
    for open_it in (in_place, through_a_device):
        with open_it(path, tmp_path) as model:
            assert model.status()["compression"] == CASES_BY_NAME[name].packed_as
            ours_tokens, ours = run(model)
            look(CASES_BY_NAME[name].format, model, is_here=open_it is in_place)
        worst = max(worst, ((ours - logits).abs().max() / logits.abs().max()).item())
        assert worst <= 1e-4
        assert torch.equal(ours_tokens, tokens)
    FOUND[name] = f"{worst:.0e}" if worst else "none"


def look(form: str, model: Any, is_here: bool) -> None:
    """Write down how the packed weights of a model that has run were computed on."""
    runs, packed = RUNS.setdefault(form, Runs()), placing._encoded_in(model.native)
    runs.dtypes |= {"float32": None}
    for packing in {one for weight in packed for one in weight._encoded.encodings}:
        runs.kernels |= {packing.name} if type(packing).multiply is not Encoding.multiply else set()
        runs.has_ours |= packing.kernel in kernels.MULTIPLY
    if is_here:
        runs.keeps &= all(weight._kept is not None for weight in packed)
    else:
        largest = max(math.prod(weight.shape[-2:]) * weight.dtype.itemsize for weight in packed)
        runs.one_by_one &= model._prepared.scratch.nbytes <= largest


# Rounding of the compute dtype, through two layers and a head.
NEAR = {"float16": 1e-2, "bfloat16": 6e-2}


@pytest.mark.parametrize("made", FIRST, indirect=True)
@pytest.mark.parametrize("dtype", NEAR)
def test_it_runs_in_half_precision(made: tuple[str, Path, Any], tmp_path: Path, dtype: str) -> None:
    name, path, (_, logits) = made
    with AutoModel.from_pretrained(path, dtype=dtype, layer_shards_saving_path=tmp_path) as model:
        ours = model(IDS).logits
    assert str(ours.dtype) == f"torch.{dtype}"
    assert ((ours.float() - logits).abs().max() / logits.abs().max()).item() <= NEAR[dtype]
    RUNS.setdefault(CASES_BY_NAME[name].format, Runs()).dtypes |= {dtype: None}


def in_place(path: Path, shards: Path) -> Any:
    return AutoModel.from_pretrained(path, dtype="float32", layer_shards_saving_path=shards)


def through_a_device(path: Path, shards: Path, **options: Any) -> Any:
    """Through a memory with room for three matrices."""
    whole, skeleton.cut_units.__defaults__ = skeleton.cut_units.__defaults__, (12_000,)
    try:
        return streamed(path, layer_shards_saving_path=shards, **options)
    finally:
        skeleton.cut_units.__defaults__ = whole


def extents_of(unit: Any) -> list[Any]:
    if unit.experts:
        return [run.extent for runs in unit.bank.runs for run in runs]
    return [piece.extent for piece in unit.stream.pieces]


def test_the_packed_bytes_move_and_no_others(made: tuple[str, Path, Any], tmp_path: Path) -> None:
    _, path, _ = made
    with through_a_device(path, tmp_path, prefetching=False) as model:
        units = model._prepared.units
        # Some vectors of a GGUF file are written once; whatever streams lies in the checkpoint.
        extents = {unit.name: extents_of(unit) for unit in units}
        assert all(path in (each.path, each.path.parent) for several in extents.values() for each in several)
        # Each byte of the checkpoint is in one unit or in none.
        pieces = {(each.path, each.offset + at) for unit in units if unit.kind != "embedding"
                  for each in extents[unit.name] for at in range(0, each.nbytes, 1 << 20)}  # fmt: skip
        assert len(pieces) >= len(units) - 2
        model(IDS)
        moved, experts = model.trace.totals["copy"].nbytes, model.trace.experts
        assert moved > 0
        assert "gpu" not in model.plan.tiers
        # Of experts those that were asked for: here no others.
        asked = {unit.name: sum(experts[unit.name].asked) for unit in units if unit.experts}
        swept = sum(unit.bank.expert_bytes * asked[unit.name] if unit.experts else unit.nbytes
                    for unit in units if unit.kind != "embedding")  # fmt: skip
        assert moved == swept
    wanted = streaming(stored_bytes(path))
    idle = sum(unit.bank.expert_bytes * (unit.experts - asked[unit.name]) for unit in units if unit.experts)
    dense = [unit for unit in units if unit.kind not in ("embedding", "experts")]
    padding = sum(unit.nbytes - unit.stream.read_bytes for unit in dense)
    assert moved - padding + idle == sum(wanted.values())
    assert padding < ALIGNMENT * len(wanted)


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

# No test can find what a format is called in the world.
NOTES = {
    "bitsandbytes": "as `save_pretrained` writes it; `unsloth/*-bnb-4bit`",
    "FP8": "DeepSeek-V3, Qwen3-FP8, Llama-FP8, compressed-tensors, ModelOpt; activations are not rounded",
    "MXFP4": "gpt-oss",
    "GPTQ": "2, 3, 4 and 8 bits, versions 1 and 2",
    "AWQ": "4 bits, version gemm",
    "GGUF": "every type that the `gguf` package can dequantise",
}


# Compute capabilities of a T4, an A100 and an H100.
GPUS = {"a GPU without bfloat16": (7, 5), "a GPU with bfloat16": (8, 0), "a GPU with FP8": (9, 0)}


def document() -> str:
    """The table of formats and devices."""
    variants = [f"| {case.format} | {case.variant} | {case.made_by} | {FOUND[name]} |"
                for name, case in CASES_BY_NAME.items()]  # fmt: skip
    columns = ["format", "what it is", "a CPU", *GPUS]
    devices = [
        f"| {name} | {NOTES[name]} | {on_cpu(runs)} | {' | '.join(on_gpu(runs, GPUS[gpu]) for gpu in GPUS)} |"
        for name, runs in RUNS.items()
    ]
    head = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    return "\n".join([HEAD, *head, *devices, VARIANTS, *variants, ""])


def on_cpu(runs: Runs) -> str:
    kept = ", kept where RAM has room for all" if runs.keeps else ""
    return f"{alone(runs)}{kept}; {', '.join(runs.dtypes)}"


def on_gpu(runs: Runs, capability: tuple[int, int]) -> str:
    kernel = "our kernel for one token, else " if runs.has_ours else ""
    if runs.kernels:
        kernel = f"its library's kernel for few tokens ({', '.join(sorted(runs.kernels))}), else "
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        dtype = choose_dtype(LoadOptions(), None, None, torch.device("cuda"))
    return f"{kernel}{alone(runs)}; {str(dtype).removeprefix('torch.')}"


def alone(runs: Runs) -> str:
    return "one matrix at a time" if runs.one_by_one else "all matrices of a layer"


HEAD = """# Formats

Checkpoints that somebody has quantised already stream as they lie: their packed bytes go from the file to the GPU, are
never encoded anew, and are unpacked there, one matrix at a time into one reused scratch, or computed on by a kernel of
the format's library, or of ours. `tests/whole/test_formats.py` makes this page and fails where it no longer holds.
"""
VARIANTS = """
The column for a CPU is what was seen to run there. Those for GPUs say which code runs, and the dtype that a checkpoint
in bfloat16 is computed in, by the program's own rules; `make test-gpu` compares it with the CPU's on the GPU at hand.
Our kernels need Triton, which PyTorch brings along for NVIDIA's GPUs on Linux, of compute capability 7.0 or more: one
unpacks a matrix, one computes on packed bytes, except where GPTQ has its inputs in an order, matrices are merged, or
rows lie in another order. Elsewhere PyTorch's own operations unpack, and the results are the same but for rounding.
No kernel rounds activations, not those for FP8 either: a GPU's own FP8 products would, by 2.6 % of a product, and a
sweep of fewer than some 4,000 tokens would still wait for the link (`benchmarks/LOG.md`).

How weights are packed is read from `quantization_config` in `config.json`, or from `quantize_config.json`,
`quant_config.json` or `hf_quant_config.json` beside it. FP8 weights with scales that nothing explains are refused;
those without any scale were only cast, and are taken as they are.

What cannot be streamed is refused with the reason: other `quant_method`s (hqq, aqlm, exl2, mlx, …), GPTQ and AWQ in
layouts of one kernel (marlin, gemv), compressed-tensors and ModelOpt other than FP8. A GGUF architecture
whose layout transformers changes within rows (GPT-2) is dequantised once into a store.

A GGUF file in parts (`NAME-00001-of-00003.gguf`) streams from all of them: any part names it, or `NAME.gguf`. RoPE
scaling is taken from the file: linear, yarn, and the factors of Llama 3 and LongRoPE; what transformers has no words
for is left out with a warning that says from which length it matters. Experts whose gate and up are of different types
stay packed.

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
