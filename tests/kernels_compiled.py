"""Run by test_kernels.py in a process of its own: every kernel compiles for the GPUs of people, which takes none."""

from __future__ import annotations

from typing import Any

import pytest
import triton
from test_ggml import Kind, every_type
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from airllm_nb.checkpoint.codecs import triton_blocks, triton_words
from airllm_nb.checkpoint.codecs.ggml import packing_of

FLOATS = ("fp16", "bf16")
# By compute capability.
every_gpu = pytest.mark.parametrize("gpu", [75, 80, 90, 120], ids=["T4", "A100", "H100", "RTX 5090"])


def compile_for(gpu: int, kernel: Any, constants: dict[str, Any], **types: str) -> None:
    """Each argument that has neither a constant nor a type is an int."""
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    assert triton.compile(source, target=GPUTarget("cuda", gpu, 32)).asm["cubin"]


@every_gpu
@every_type
def test_blocks(kind: Kind, gpu: int) -> None:
    found = packing_of(int(kind))
    assert found is not None
    table = "*i8" if kind.name.startswith("IQ") else "*fp32"
    constants = {"KIND": kind.name, "VALUES": found.values, "NBYTES": found.nbytes, "BLOCK": 1024}
    for dtype in FLOATS:
        types = {"packed": "*u8", "table": table, "out": f"*{dtype}"}
        compile_for(gpu, triton_blocks.unpack_blocks, constants, **types)


@every_gpu
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_words(bits: int, gpu: int) -> None:
    constants = {"BITS": bits, "OFFSET": 1, "IS_AWQ": False, "HAS_GROUPS": True, "ROWS": 16, "COLUMNS": 128}
    for dtype in FLOATS:
        types = {"words": "*i32", "zeros": "*i32", "scale": "*fp16", "groups": "*i32", "out": f"*{dtype}"}
        compile_for(gpu, triton_words.unpack_words, constants, **types)
        if bits == 4:
            others = constants | {"OFFSET": 0, "IS_AWQ": True, "HAS_GROUPS": False}
            compile_for(gpu, triton_words.unpack_words, others, **types)


@every_gpu
def test_mxfp4(gpu: int) -> None:
    for dtype in FLOATS:
        types = {"blocks": "*u8", "scales": "*u8", "powers": "*fp32", "out": f"*{dtype}"}
        compile_for(gpu, triton_words.unpack_mxfp4, {"BLOCK": 1024}, **types)
