"""Run by test_kernels.py in a process of its own: every kernel compiles for the GPUs of people, which takes none."""

from __future__ import annotations

from typing import Any

import pytest
import triton
from test_ggml import Kind, every_type
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from airllm_nb.encoding.ggml import encoding_of
from airllm_nb.encoding.kernels import (
    triton_blocks,
    triton_bytes,
    triton_fp8,
    triton_mxfp4,
    triton_nf4,
    triton_runs,
    triton_slots,
    triton_units,
    triton_words,
)

# Compute capability, and what models are computed in there. What unpacks is compiled for one, products for the other.
T4, H100 = (75, "*fp16"), (90, "*bf16")


def compile_for(gpu: tuple[int, str], kernel: Any, constants: dict[str, Any], warps: int = 4, **types: str) -> None:
    """Each argument that has neither a constant nor a type is an int; ``"float"`` is the type of the GPU's models."""
    types = {name: gpu[1] if kind == "float" else kind for name, kind in types.items()}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    target = GPUTarget("cuda", gpu[0], 32)
    assert triton.compile(source, target=target, options={"num_warps": warps}).asm["cubin"]


@every_type
def test_blocks(kind: Kind) -> None:
    found = encoding_of(int(kind))
    assert found is not None
    table = "*i8" if kind.name.startswith("IQ") else "*fp32"
    constants = {"KIND": kind.name, "VALUES": found.values, "NBYTES": found.nbytes, "GROUP": found.group,
                 "GROUPS": 1024 // found.group}  # fmt: skip
    types = {"packed": "*u8", "table": table, "out": "float"}
    compile_for(T4, triton_blocks.unpack_blocks, constants, **types)
    constants |= {"HAS_SLOTS": True, "HAS_BIAS": True}
    compile_for(H100, triton_blocks.multiply_blocks, constants, **types, slots="*i32", x="float", bias="float")


@pytest.mark.parametrize(("bits", "is_awq"), [(2, False), (3, False), (4, False), (8, False), (4, True)])
@pytest.mark.parametrize("order", ["listed", "runs", "tiles"])
def test_words(bits: int, is_awq: bool, order: str) -> None:
    constants = {"BITS": bits, "OFFSET": 1, "IS_AWQ": is_awq, "ORDER": order, "ROWS": 16, "COLUMNS": 128}
    types = {"words": "*i32", "zeros": "*i32", "scale": "*fp16", "groups": "*i32"}
    compile_for(T4, triton_words.unpack_words, constants, **types, out="float")
    if order != "listed":
        constants["HAS_SLOTS"] = True
        compile_for(H100, triton_words.multiply_words, constants, **types, slots="*i32", x="float", out="*fp32")


@pytest.mark.parametrize("scale", ["*fp32", "*bf16", "*u8"])
@pytest.mark.parametrize("is_e5m2", [False, True])
def test_fp8(scale: str, is_e5m2: bool) -> None:
    constants = {"IS_E5M2": is_e5m2, "IS_EXPONENT": scale == "*u8", "BLOCK": 1024}
    types = {"weight": "*u8", "scale": scale, "out": "float"}
    compile_for(T4, triton_fp8.unpack_fp8, constants, **types)
    constants |= {"HAS_SLOTS": True, "HAS_BIAS": True}
    compile_for(H100, triton_fp8.multiply_fp8, constants, **types, slots="*i32", x="float", bias="float")


# A product, most of which are compiled for both.
GIVEN = {"HAS_SLOTS": True, "HAS_BIAS": True, "ROWS": 2, "UNITS": 32}
VECTORS = {"slots": "*i32", "x": "float", "bias": "float", "out": "float"}


@pytest.mark.parametrize("gpu", [T4, H100])
@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K"])
def test_units(gpu: tuple[int, str], kind: str) -> None:
    compile_for(gpu, triton_units.multiply_units, {"KIND": kind, **GIVEN}, 1, **VECTORS, packed="*u8")


@pytest.mark.parametrize("gpu", [T4, H100])
@pytest.mark.parametrize(("is_e5m2", "scale"), [(False, "*fp32"), (True, "*bf16"), (False, "*u8")])
def test_units_of_fp8(gpu: tuple[int, str], is_e5m2: bool, scale: str) -> None:
    constants = {"IS_E5M2": is_e5m2, "IS_EXPONENT": scale == "*u8", **GIVEN}
    compile_for(gpu, triton_fp8.multiply_fp8_units, constants, 1, **VECTORS, weight="*u8", scale=scale)


@pytest.mark.parametrize("gpu", [T4, H100])
def test_units_of_mxfp4(gpu: tuple[int, str]) -> None:
    compile_for(gpu, triton_mxfp4.multiply_mxfp4, GIVEN, 1, **VECTORS, weight="*u8", scale="*u8")


@pytest.mark.parametrize("gpu", [T4, H100])
@pytest.mark.parametrize("bits", [2, 4, 8, "awq"])
def test_runs(gpu: tuple[int, str], bits: int | str) -> None:
    types = {"words": "*i32", "zeros": "*i32", "scale": "*fp16", "sums": "*fp32", "slots": "*i32", "x": "float"}
    constants: dict[str, Any] = {"RUN": 64, "HAS_SLOTS": True, "RUNS": 4, "COLUMNS": 32}
    if bits == "awq":
        compile_for(gpu, triton_runs.multiply_awq, constants, **types)
    else:
        constants |= {"BITS": bits, "OFFSET": 1, "COLUMNS": 128}
        compile_for(gpu, triton_runs.multiply_gptq, constants, **types)


@pytest.mark.parametrize("gpu", [T4, H100])
def test_shares(gpu: tuple[int, str]) -> None:
    constants = {"HAS_BIAS": True, "SHARES": 8, "COLUMNS": 128}
    compile_for(gpu, triton_runs.add_shares, constants, sums="*fp32", bias="float", out="float")


@pytest.mark.parametrize("gpu", [T4, H100])
def test_mxfp4(gpu: tuple[int, str]) -> None:
    types = {"blocks": "*u8", "scales": "*u8", "powers": "*fp32", "out": "float"}
    compile_for(gpu, triton_words.unpack_mxfp4, {"BLOCK": 1024}, **types)


@pytest.mark.parametrize("gpu", [T4, H100])
@pytest.mark.parametrize("nested", [0, 256])
def test_nf4(gpu: tuple[int, str], nested: int) -> None:
    constants = {"BLOCK": 64, "NESTED": nested, "HAS_SLOTS": True, "HAS_BIAS": True, "ROWS": 2, "STEPS": 4,
                 "IS_EVEN": gpu is H100}  # fmt: skip
    types = {"weight": "*u8", "absmax": "*u8" if nested else "*fp32", "nested_absmax": "*fp32", "quant_map": "*fp32",
             "code": "*fp32", "slots": "*i32", "offset": "fp32"}  # fmt: skip
    compile_for(gpu, triton_nf4.multiply_nf4, constants, 1, **types, x="float", bias="float", out="float")


@pytest.mark.parametrize("gpu", [T4, H100])
@pytest.mark.parametrize(("weight", "block"), [("*u8", 32), ("*i8", 0)])
def test_bytes(gpu: tuple[int, str], weight: str, block: int) -> None:
    constants = {"BLOCK": block, "IS_SIGNED": weight == "*i8", "HAS_SLOTS": True, "HAS_BIAS": True, "ROWS": 2,
                 "STEPS": 4, "IS_EVEN": gpu is H100}  # fmt: skip
    types = {"weight": weight, "scale": "*fp16", "minimum": "*fp16", "slots": "*i32", "factor": "fp32"}
    compile_for(gpu, triton_bytes.multiply_bytes, constants, 1, **types, x="float", bias="float", out="float")


@pytest.mark.parametrize("gpu", [T4, H100])
@pytest.mark.parametrize("ids", ["*i32", "*i64"])
def test_slots(gpu: tuple[int, str], ids: str) -> None:
    """The tables at their largest, and every width that is copied."""
    constants: dict[str, Any] = {"IDS": 64, "SLOTS": 512, "KEEPS": True}
    tables = dict.fromkeys(("slot_of", "expert_of", "order", "slots", "moves"), "*i32")
    compile_for(gpu, triton_slots.ensure, constants, ids=ids, **tables, counts="*i64", routed="*i64")
    constants = {"IDS": 64, "WIDTHS": (16, 8, 4, 2, 1), "BLOCK": 512}
    tables = {"moves": "*i32", "addresses": "*i64", "stacks": "*i64", "sizes": "*i64", "strides": "*i64"}
    compile_for(gpu, triton_slots.gather, constants, **tables)
