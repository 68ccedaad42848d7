"""Run by test_kernels.py in a process of its own: every kernel compiles for the GPUs of people, which takes none."""

from __future__ import annotations

from typing import Any

import pytest
import triton
from test_ggml import Kind, every_type
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from airllm_nb.checkpoint.codecs import triton_blocks, triton_fp8, triton_words
from airllm_nb.checkpoint.codecs.ggml import packing_of

# By compute capability, and what people's models are computed in there.
every_gpu = pytest.mark.parametrize(("gpu", "dtype"), [(75, "*fp16"), (90, "*bf16")], ids=["T4", "H100"])


def compile_for(gpu: int, kernel: Any, constants: dict[str, Any], **types: str) -> None:
    """Each argument that has neither a constant nor a type is an int."""
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    assert triton.compile(source, target=GPUTarget("cuda", gpu, 32)).asm["cubin"]


@every_gpu
@every_type
def test_blocks(kind: Kind, gpu: int, dtype: str) -> None:
    found = packing_of(int(kind))
    assert found is not None
    table = "*i8" if kind.name.startswith("IQ") else "*fp32"
    constants = {"KIND": kind.name, "VALUES": found.values, "NBYTES": found.nbytes, "GROUP": found.group,
                 "GROUPS": 1024 // found.group}  # fmt: skip
    types = {"packed": "*u8", "table": table, "out": dtype}
    compile_for(gpu, triton_blocks.unpack_blocks, constants, **types)
    compile_for(gpu, triton_blocks.multiply_blocks, constants | {"HAS_BIAS": True}, **types, x=dtype, bias=dtype)


@every_gpu
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("order", ["listed", "runs", "tiles"])
def test_words(bits: int, order: str, gpu: int, dtype: str) -> None:
    constants = {"BITS": bits, "OFFSET": 1, "IS_AWQ": False, "ORDER": order, "ROWS": 16, "COLUMNS": 128}
    types = {"words": "*i32", "zeros": "*i32", "scale": "*fp16", "groups": "*i32"}
    for settings in [constants, constants | {"IS_AWQ": True}][: 1 + (bits == 4)]:
        compile_for(gpu, triton_words.unpack_words, settings, **types, out=dtype)
        compile_for(gpu, triton_words.multiply_words, settings, **types, x=dtype, out="*fp32")


@every_gpu
@pytest.mark.parametrize("scale", ["*fp32", "*bf16", "*u8"])
@pytest.mark.parametrize("is_e5m2", [False, True])
def test_fp8(scale: str, is_e5m2: bool, gpu: int, dtype: str) -> None:
    constants = {"IS_E5M2": is_e5m2, "IS_EXPONENT": scale == "*u8", "BLOCK": 1024}
    types = {"weight": "*u8", "scale": scale, "out": dtype}
    compile_for(gpu, triton_fp8.unpack_fp8, constants, **types)
    compile_for(gpu, triton_fp8.multiply_fp8, constants | {"HAS_BIAS": True}, **types, x=dtype, bias=dtype)


@every_gpu
def test_mxfp4(gpu: int, dtype: str) -> None:
    types = {"blocks": "*u8", "scales": "*u8", "powers": "*fp32", "out": dtype}
    compile_for(gpu, triton_words.unpack_mxfp4, {"BLOCK": 1024}, **types)
